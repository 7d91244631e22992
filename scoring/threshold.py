"""The universal threshold u of a model: where AUD_share is above it, something in view sounds, in every image alike.

    python -m scoring.threshold checkpoints/old.pth /path/to/pairs

u is the third quartile of the largest values of AUD_share in images that are asked with audio which nothing in view
causes (`negative_audio`; published values of u are of this kind, Juanola et al., arXiv 2410.01020). No box is used.
Training chooses it at its end; the command chooses it for a checkpoint that has none, and writes it into the file.
B batch, F bins, L frames, N pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from annotations import read_ids, read_rows
from dataset import LAYOUTS, Pair, TrainingPairs, find_pairs, in_order, make_loader
from distributed import gather_in_order, hidden_bar, is_main, shard
from maps import enlarge_absolute
from models import Model, load, read_checkpoint, rows_of, write_safetensors
from scoring.negative_audio import WithNegativeAudio, silence
from scoring.negatives import NEGATIVES, third_quartile
from scoring.parts import on_device
from sets import count_undecodable, undecodable
from utils import (
    SAFETENSORS,
    Absent,
    ArgumentParser,
    UserError,
    add_boolean,
    add_workers,
    evaluation_mode,
    full_precision,
    is_safetensors,
    number,
    pick_device,
    run_cli,
    save_checkpoint,
)

MOST_PAIRS = 1000  # of more, so many are drawn
RULE = f"third quartile of the largest AUD_share under {', '.join(NEGATIVES)}"


def universal_threshold(
    model: Model,
    pairs: Sequence[Pair],
    device: torch.device,
    pairs_from: str,
    batch_size: int = 64,
    workers: int = 0,
    seed: int = 0,
    class_of: Mapping[str, str] | None = None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any] | None:
    """u of a model, with how it was chosen: what a checkpoint stores as `threshold`.

    pairs: images and audio, of which at most MOST_PAIRS are taken, drawn by seed; pairs_from: what they are, in words;
    class_of: see `WithNegativeAudio`; between: called between batches. Several processes share the batches; the first
    one returns the record, the others None. UserError for fewer than two pairs.
    """
    order = np.random.default_rng(seed).permutation(len(pairs))[:MOST_PAIRS]
    taken = [pairs[i] for i in sorted(order)]
    shape = model.shape
    dataset = WithNegativeAudio(
        TrainingPairs(taken, model.infer_image_size, shape["audio_seconds"], "none"), seed, class_of
    )
    with count_undecodable(taken, workers):
        largest = largest_shares(model, dataset, device, batch_size, workers, between)
    if largest is None:
        return None
    if not all(np.isfinite(values).all() for values in largest.values()):
        raise UserError("the universal threshold cannot be chosen: a map of the model holds a value that is not finite")
    return {
        "value": third_quartile(np.concatenate([*largest.values()])),
        "rule": RULE,
        "quartiles": {name: third_quartile(values) for name, values in largest.items()},
        "pairs": len(taken),
        "pairs_from": pairs_from,
        "offscreen": f"audio of {dataset.offscreen}",
        "infer_image_size": model.infer_image_size,
        "seed": seed,
    }


@torch.no_grad()
@full_precision()
def largest_shares(
    model: Model,
    dataset: WithNegativeAudio,
    device: torch.device,
    batch_size: int,
    workers: int,
    between: Callable[[], None],
) -> dict[str, np.ndarray] | None:
    """The largest value of each AUD_share at 224 x 224 under each of NEGATIVES, (N,); only on the first process."""
    batches = in_order(len(dataset), batch_size)
    loader = make_loader(dataset, batch_size, workers, shard(batches), device)
    with evaluation_mode(model):
        silent = model.attend_audio(silence(dataset.dataset.audio_seconds)[None].to(device))
        ask = partial(_largest, model, silent)
        own = ([*on_device(ask, device, batch.image, *negative)] for batch, *negative in loader)
        found = []
        progress = {"desc": "universal threshold", "leave": False, "unit": "batch", "disable": hidden_bar()}
        for parts in tqdm(gather_in_order(own, len(batches)), total=len(batches), **progress):
            found += parts
            between()
    return {name: torch.cat([part[name] for part in found]).numpy() for name in NEGATIVES} if is_main() else None


def _largest(model: Model, silent: Any, image: torch.Tensor, noise: torch.Tensor, other: torch.Tensor) -> dict:
    """Images (B, 3, H, W), the audio state of silence, spectrograms (B, 1, F, L) -> {negative: (B,)} on the CPU."""
    seen, grid = model.attend_image(image)
    heard = (rows_of(silent, [0] * len(image)), model.attend_audio(noise), model.attend_audio(other))
    shares = (model.maps(seen, audio, grid).share.cpu() for audio in heard)
    return {name: enlarge_absolute(share).flatten(1).amax(1) for name, share in zip(NEGATIVES, shares, strict=True)}


def known_classes(root: Path) -> dict[str, str]:
    """{id: class} of `classes.csv` in a folder of pairs, as `prepare_data.py clips` writes it; empty where none is."""
    path = root / "classes.csv"
    rows = read_rows(path) if path.is_file() else []
    return {row["id"]: row["class"] for row in rows if row.get("id") and row.get("class")}


# ---------------------------------------------------------------- for a checkpoint without one


def pairs_in(root: Path, ids: Sequence[str] | None, allow_missing: bool) -> list[Pair]:
    """Pairs of image and audio in a folder of any layout that a data set has."""
    if not root.is_dir():
        raise UserError(f"there is no folder of pairs {root}")
    for layout in LAYOUTS:
        try:
            pairs, missing = find_pairs(root, layout, ids, allow_missing)
        except Absent:
            continue
        if missing:
            print(f"left out: {len(missing)} ids lack their image or audio")
        return pairs
    raise UserError(f"{root} holds no pairs: it needs a folder of images and one of audio, such as frames/ and audio/")


def parse_args():
    parser = ArgumentParser(
        prog="python -m scoring.threshold",
        description="Choose the universal threshold of a checkpoint on a folder of pairs, and write it into the file.",
    )
    parser.add_argument("checkpoint", type=Path, help="the checkpoint")
    parser.add_argument(
        "pairs",
        type=Path,
        metavar="DIR",
        help="folder with frames/<id>.jpg and audio/<id>.wav, or laid out as another set",
    )
    parser.add_argument("--list", help="file of the ids to take, one per line, in place of all that are there")
    parser.add_argument("--out", type=Path, help="write a copy with the threshold (default: the checkpoint itself)")
    add_boolean(parser, "--allow_missing", "continue without missing or broken pairs, but count them")
    parser.add_argument("--gpu", default="0", help="number of a CUDA device, or cpu")
    add_workers(parser)
    parser.add_argument("--batch_size", type=number(int, low=1), default=64, help="pairs per batch")
    parser.add_argument(
        "--seed", type=number(int, low=0, high=2**32 - 1), default=0, help="random seed of noise and wrong audio"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = pick_device(args.gpu)
    trained = load(args.checkpoint, device)
    model = trained.model.to(memory_format=torch.channels_last)  # rounds as in training
    pairs = pairs_in(args.pairs, read_ids(args.list) if args.list else None, args.allow_missing)
    if args.allow_missing and (broken := undecodable(pairs, args.num_workers)):
        print(f"left out: {len(broken)} pairs cannot be decoded")
        pairs = [pair for pair in pairs if pair.id not in broken]
    source = f"{args.pairs}" + (f", those of {args.list}" if args.list else "")
    chosen = universal_threshold(
        model, pairs, device, source, args.batch_size, args.num_workers, args.seed, known_classes(args.pairs)
    )
    out = args.out or args.checkpoint
    if out.suffix == SAFETENSORS or (out == args.checkpoint and is_safetensors(out)):
        write_safetensors(out, trained._replace(about=trained.about | {"threshold": chosen}))
    else:
        save_checkpoint(out, read_checkpoint(args.checkpoint) | {"threshold": chosen})
    print(describe_threshold(chosen))
    print(f"written into {out}")


def describe_threshold(chosen: Mapping[str, Any], tested_size: int | None = None) -> str:
    """One line about u and how it was chosen; tested_size: px of the images that it is used with, where it is known."""
    size = chosen.get("infer_image_size", tested_size)
    other = f"; chosen on images of {size} px, not {tested_size}" if tested_size and size != tested_size else ""
    return (
        f"universal threshold {chosen['value']:.4f} ({chosen['rule']}; {chosen['pairs']} pairs, "
        f"{chosen['pairs_from']}; off-screen: {chosen['offscreen']}{other})"
    )


if __name__ == "__main__":
    run_cli(main)
