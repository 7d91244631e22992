"""Take a trained model elsewhere: one file without this code's own format.

    python export.py checkpoints/listen.pth --format safetensors
    python export.py checkpoints/listen.pth --format torch
    python export.py checkpoints/listen.pth --format onnx --out model.onnx

safetensors: weights, and in the header all settings; `models.load` and every script read it like a checkpoint.
torch, onnx: a program that needs no code of ours. It takes any number B of pairs, of the size that the model is tested
with:

    image (B, 3, H, W), as `transforms.eval_transform` makes it; spectrogram (B, 1, F, L), of `audio_io.log_spectrogram`
    -> aud (B, h, w), AUD as the model is scored by it: sharpened and smoothed as it was trained for
       share (B, h, w), AUD_share, an absolute map; presence (B,), the confidence that the source is in view
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import torch
from torch import nn

from audio_io import log_spectrogram, num_samples
from maps import smooth_maps
from models import HOW_INSTALLED, Trained, load, settings_of, write_safetensors
from utils import ArgumentParser, UserError, as_user_error, atomic_path, run_cli

INPUTS, OUTPUTS = ("image", "spectrogram"), ("aud", "share", "presence")
SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt2", "onnx": ".onnx"}
TOLERANCE = 1e-5  # between a program and the model
CHECKED = (1, 3)  # numbers of pairs at which a program is compared with the model

Pairs = tuple[torch.Tensor, torch.Tensor]
Program = Callable[[Pairs], Sequence[torch.Tensor]]


class Exported(nn.Module):
    """What a program computes: a model with the inference settings that it was trained for."""

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.model = trained.model
        self.sharpening, self.smoothing = (trained.inference[f"infer_{name}"] for name in ("sharpening", "smoothing"))

    def forward(
        self, image: torch.Tensor, spectrogram: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W), spectrograms (B, 1, F, L) -> aud, share (B, h, w), presence (B,)."""
        seen, grid = self.model.attend_image(image)
        heard = self.model.attend_audio(spectrogram)
        maps = self.model.maps(seen, heard, grid, self.sharpening)
        confidences = self.model.confidences(seen, heard, self.sharpening)
        presence = confidences["presence"] if "presence" in confidences else confidences["confidence"]
        return smooth_maps(maps.audio_map, self.smoothing), maps.share, presence


def example_pairs(trained: Trained, count: int) -> Pairs:
    """Images (count, 3, H, W) and spectrograms (count, 1, F, L) of noise, always the same."""
    rng, size = np.random.default_rng(count), trained.model.infer_image_size
    images = rng.standard_normal((count, 3, size, size), dtype=np.float32)
    samples = num_samples(trained.model.shape["audio_seconds"])
    sounds = 0.1 * rng.standard_normal((count, samples), dtype=np.float32)
    return torch.from_numpy(images), torch.stack([log_spectrogram(sound) for sound in sounds])


def trace(trained: Trained) -> torch.export.ExportedProgram:
    """The model's computation as a graph with a free number of pairs. UserError where PyTorch cannot follow it."""
    batch = torch.export.Dim("batch", min=1)
    shapes = {name: {0: batch} for name in INPUTS}
    try:
        return torch.export.export(Exported(trained).eval(), example_pairs(trained, 3), dynamic_shapes=shapes)
    except Exception as error:  # of many kinds, whatever the encoder's code runs into
        raise UserError(_not_for(trained, "torch.export", error)) from error


def _not_for(trained: Trained, what: str, error: Exception) -> str:
    encoders = " and ".join(dict.fromkeys(trained.model.shape[f"{kind}_encoder"] for kind in ("image", "audio")))
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{what} cannot follow this model (encoders {encoders}): {reason}; --format safetensors takes every model"


def write_torch(path: Path, trained: Trained) -> Program:
    """Write a program for `torch.export.load`, with `settings.json` among its extra files -> the program, read back."""
    whole = BytesIO()  # PyTorch's own writing to a file hides why a disk refuses
    torch.export.save(trace(trained), whole, extra_files={"settings.json": json.dumps(settings_of(trained))})
    path.write_bytes(whole.getbuffer())
    program = torch.export.load(path).module()
    return lambda pairs: program(*pairs)


def write_onnx(path: Path, trained: Trained) -> Program:
    """Write an ONNX program, with the settings as its metadata -> the program as onnxruntime runs it."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (what torch.onnx writes with)
    except ImportError as error:
        raise UserError(HOW_INSTALLED.replace("safetensors is", f"{error.name} is")) from error
    graph = trace(trained)
    names = {"input_names": INPUTS, "output_names": OUTPUTS, "dynamic_shapes": {name: {0: "batch"} for name in INPUTS}}
    try:
        program = torch.onnx.export(graph, dynamo=True, verbose=False, **names)
    except Exception as error:
        raise UserError(_not_for(trained, "torch.onnx", error)) from error
    program.model.metadata_props.update({name: json.dumps(value) for name, value in settings_of(trained).items()})
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(pairs: Pairs) -> list[torch.Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(INPUTS, pairs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(OUTPUTS, given)]

    return run


@torch.no_grad()
def largest_difference(program: Program, trained: Trained) -> float:
    """Between what a program and the model give for CHECKED numbers of pairs, over all outputs."""
    own, largest = Exported(trained).eval(), 0.0
    for count in CHECKED:
        pairs = example_pairs(trained, count)
        for found, expected in zip(program(pairs), own(*pairs), strict=True):
            if found.shape != expected.shape:
                raise UserError(f"the program gives {tuple(found.shape)} where the model gives {tuple(expected.shape)}")
            largest = np.maximum(largest, (found - expected).abs().max().item())  # NaN stays NaN
    return float(largest)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what PyTorch's exporters warn of, log and print about themselves."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def write_program(path: Path, trained: Trained, write: Callable[[Path, Trained], Program]) -> float:
    """Write a program and compare it with the model -> the largest difference; UserError above TOLERANCE: no file."""
    with torch.no_grad(), quiet(), atomic_path(path) as temporary:
        difference = largest_difference(write(temporary, trained), trained)
        if not difference <= TOLERANCE:
            raise UserError(f"{path} is not written: the program differs from the model by {difference:.1e}")
    return difference


def parse_args():
    parser = ArgumentParser(description="Write a trained model as one file for use elsewhere.")
    parser.add_argument("checkpoint", type=Path, help="the model's checkpoint")
    kinds = "safetensors: weights and settings; torch, onnx: a program of images and spectrograms"
    parser.add_argument("--format", choices=SUFFIXES, required=True, help=kinds)
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: beside the checkpoint, by its name")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    suffix = SUFFIXES[args.format]
    out = args.out or args.checkpoint.with_suffix(suffix)
    if out.suffix != suffix:
        raise UserError(f"--out {out}: the name of a {args.format} file ends in {suffix}")
    if out.exists() and args.checkpoint.exists() and out.samefile(args.checkpoint):
        raise UserError(f"--out {out} is the checkpoint itself")
    trained = load(args.checkpoint)
    if args.format == "safetensors":
        with as_user_error(ValueError):
            write_safetensors(out, trained)
        compared = ""
    else:
        write = write_torch if args.format == "torch" else write_onnx
        compared = f", at most {write_program(out, trained, write):.1e} from the model on {sum(CHECKED)} pairs of noise"
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB{compared}")


if __name__ == "__main__":
    run_cli(main)
