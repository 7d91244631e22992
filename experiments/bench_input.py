"""From files to what the model takes: our data loading against the released code's."""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import soundfile
import torch
from PIL import Image
from torch.utils.data import Dataset

from audio_io import SAMPLE_RATE, load_audio, num_samples, power_spectrogram
from dataset import Pair, TrainingPairs, bytes_of, make_loader, select_training_pairs
from experiments.fp32_input import Fp32Pairs
from experiments.released import ReleasedPairs
from experiments.timing import Timing, add_rounds, alternate, one_thread
from model_slot import JointSlotModel, TokenMasks
from recipes import PAPER_WEIGHTS, SMALL
from synthetic.generate import COUNTS, generate
from training.decoded import keep_decoded
from training.step import Inputs, Optimisation, choose_amp, keep_freed_memory
from utils import bf16_is_fast, number

IMAGE_SIZE, AUDIO_SECONDS = 224, 5.0
INPUT_FILES = 32  # different images and audio files
TRAIN_BATCH, TRAIN_WORKERS = 32, 2


def add_flags(parser) -> None:
    add_rounds(parser)
    parser.add_argument("--train_pairs", type=number(int, low=2), default=256, help="pairs per training epoch")


def run(args) -> Iterator[Timing]:
    return bench_input(args.rounds, args.train_pairs)


def random_image(rng: np.random.Generator, height: int = 360, width: int = 640) -> np.ndarray:
    """(height, width, 3) uint8: smooth fields of several scales, discs with sharp edges, a little noise."""
    image = np.zeros((height, width, 3))
    for cells in (3, 8, 20, 60, 160):
        field = rng.normal(size=(cells, cells * width // height, 3))
        image += cells**-0.5 * cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC)
    image = 128 + 45 * image / image.std()
    for _ in range(6):
        centre, radius = rng.integers((width, height)).tolist(), int(rng.integers(height // 36, height // 4))
        cv2.circle(image, centre, radius, rng.uniform(0, 255, 3).tolist(), cv2.FILLED, cv2.LINE_AA)
    return (image + rng.normal(0, 2, image.shape)).clip(0, 255).astype(np.uint8)


def random_audio(rng: np.random.Generator, length: int) -> np.ndarray:
    """(length,) in -1..1: a tone in noise."""
    time_axis = np.arange(length) / SAMPLE_RATE
    return 0.3 * np.sin(2 * np.pi * rng.uniform(100, 4000) * time_axis) + rng.normal(0, 0.05, length)


def make_input_files(folder: Path, count: int) -> tuple[list[Pair], list[Pair]]:
    """Images of 640 x 360 and 10 s of audio, as ours reads them and, with stored spectrograms, as the baseline does."""
    rng = np.random.default_rng(0)
    ours, baseline = [], []
    for i in range(count):
        image, audio, stored = (str(folder / f"{i}.{suffix}") for suffix in ("jpg", "wav", "npy"))
        Image.fromarray(random_image(rng)).save(image, quality=90)
        soundfile.write(audio, random_audio(rng, 10 * SAMPLE_RATE), SAMPLE_RATE, subtype="PCM_16")
        np.save(stored, power_spectrogram(load_audio(audio, num_samples(AUDIO_SECONDS))).numpy())
        ours.append(Pair(str(i), image, audio))
        baseline.append(Pair(str(i), image, stored))
    return ours, baseline


def read_all(pairs: Dataset) -> None:
    """Make every batch in this process: what the workers do, and what follows on the device, here the CPU."""
    for _ in make_loader(pairs, TRAIN_BATCH, 0):
        pass


def read_bytes(pairs: Dataset) -> None:
    """What the workers do."""
    for _ in make_loader(pairs, TRAIN_BATCH, 0).batches:
        pass


def bytes_per_pair(pairs: Dataset) -> float:
    return bytes_of(next(iter(make_loader(pairs, TRAIN_BATCH, 0).batches))) / TRAIN_BATCH


def train_epoch(pairs: Dataset, model: JointSlotModel, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Forward, backward and step over all batches, in bfloat16 where that is fast."""
    for batch in make_loader(pairs, TRAIN_BATCH, TRAIN_WORKERS, device=device):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16_is_fast(device)):
            loss = sum(model(batch.image.to(device), batch.spectrogram.to(device)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()  # waits for the device


def bench_input(rounds: int, train_pairs: int) -> Iterator[Timing]:
    with tempfile.TemporaryDirectory() as folder:
        files = make_input_files(Path(folder), INPUT_FILES)
        paths = [[found[i % len(found)] for i in range(2 * INPUT_FILES)] for found in files]
        ours, before = (kind(paths[0], IMAGE_SIZE, AUDIO_SECONDS, "hard") for kind in (TrainingPairs, Fp32Pairs))
        released = ReleasedPairs(paths[1])
        yield from cost_per_pair(ours, before, released, rounds)

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        model = JointSlotModel("small", image_size=IMAGE_SIZE, audio_seconds=AUDIO_SECONDS).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        paths = [[found[i % len(found)] for i in range(train_pairs)] for found in files]
        ours, released = TrainingPairs(paths[0], IMAGE_SIZE, AUDIO_SECONDS, "hard"), ReleasedPairs(paths[1])
        spent = alternate(
            lambda: train_epoch(ours, model, optimizer, device),
            lambda: train_epoch(released, model, optimizer, device),
            rounds,
        )
        name = f"input: training epoch, {TRAIN_WORKERS} data-loading workers, {device.type}, per pair"
        yield Timing(name, *(1000 * t / len(ours) for t in spent), "ms")
        yield bench_small(Path(folder) / "synthetic", rounds, train_pairs, device)


def bench_small(root: Path, rounds: int, train_pairs: int, device: torch.device) -> Timing:
    """An epoch of the recipe small on the built-in data, against the same steps on pairs that workers decode and send
    in fp32."""
    generate(root, counts=dict.fromkeys(COUNTS, 1) | {"train": train_pairs})
    pairs = select_training_pairs("synthetic", str(root), "").pairs
    sizes = SMALL["image_size"], SMALL["audio_seconds"]
    ours, before = (kind(pairs, *sizes, SMALL["augment"]) for kind in (TrainingPairs, Fp32Pairs))
    keep_decoded([ours], SMALL["decode_once"])
    spent = alternate(*(small_training(pairs, device) for pairs in (ours, before)), rounds)
    return Timing(
        "input: recipe small, whole epoch, per pair (baseline: fp32 from workers)",
        *(1000 * t / train_pairs for t in spent),
        "ms",
    )


def small_training(pairs: TrainingPairs, device: torch.device) -> Callable[[], None]:
    """A function that trains the model of the recipe small for an epoch, as train_slot.py does."""
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    settings = {name: SMALL[name] for name in ("image_size", "audio_seconds", "iterations", "tau")}
    model = JointSlotModel("small", **settings).to(device, memory_format=torch.channels_last).train()
    optimisation = Optimisation(model, device, SMALL["lr"], clip=SMALL["clip"], amp=choose_amp("auto", device))
    batch_size = min(SMALL["batch_size"], len(pairs))

    def epoch() -> None:
        for batch in make_loader(pairs, batch_size, TRAIN_WORKERS, device=device, keep_workers=True):
            masks = TokenMasks(*(mask.to(device) for mask in model.draw_masks(len(batch.image))))
            optimisation.step(Inputs(batch.image, batch.spectrogram, masks), PAPER_WEIGHTS, 1.0)

    return epoch


def cost_per_pair(ours: TrainingPairs, before: Fp32Pairs, released: ReleasedPairs, rounds: int) -> Iterator[Timing]:
    """Core time on one thread, and bytes that a worker hands over."""
    clock, scale = time.process_time, 1000 / len(ours)
    with one_thread():
        spent = alternate(lambda: read_all(ours), lambda: read_all(released), rounds, clock)
        yield Timing("input: core time, per sample", *(scale * t for t in spent), "ms")
        spent = alternate(lambda: read_all(ours), lambda: read_all(before), rounds, clock)
        yield Timing("input: core time, per sample (baseline: fp32 from workers)", *(scale * t for t in spent), "ms")
        spent = alternate(lambda: read_bytes(ours), lambda: read_bytes(before), rounds, clock)
        yield Timing("input: of it in workers (baseline: fp32 from workers)", *(scale * t for t in spent), "ms")
        keep_decoded([ours], "memory")
        spent = alternate(lambda: read_all(ours), lambda: read_all(before), rounds, clock)
        yield Timing("input: decoded once (baseline: fp32 from workers)", *(scale * t for t in spent), "ms")
        ours.store = None
    sizes = (bytes_per_pair(pairs) / 1000 for pairs in (ours, before))
    yield Timing("input: from a worker, per pair (baseline: fp32 from workers)", *sizes, "kB")
