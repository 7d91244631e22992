"""Speed against the way the released code works, as ratios within one run.

    python -m experiments.benchmark step|input|eval|scaling|all

The baselines do the work as the released code does; each is timed in alternation with ours, and medians are compared.
After the table comes one JSON object per figure: name, value, baseline, ratio (baseline / value), unit.
Where nothing of the released code compares, the baseline is what the name says, or null.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import cv2
import numpy as np
import soundfile
import torch
from PIL import Image
from tabulate import tabulate
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from annotations import GroundTruth, box_map
from audio_io import SAMPLE_RATE, load_audio, num_frames, num_samples, power_spectrogram
from dataset import Pair, TrainingPairs, make_loader
from distributed import local_slice
from experiments.released import ALPHA, BATCH, SIX_MAPS, ReleasedPairs, released_scoring, released_step
from maps import enlarge
from model_slot import MAP_LOSSES, JointSlotModel, TokenMasks
from recipes import PAPER_WEIGHTS
from scoring.bootstrap import RESAMPLES
from scoring.evaluate import evaluate_stored
from scoring.maps_file import StoredMaps
from scoring.metrics import consensus_iou, region_fixed
from scoring.summary import area_under_success, in_parts, success
from training.step import Inputs, Optimisation, choose_amp, weighted
from utils import ArgumentParser, bf16_is_fast, number, peak_memory_gib, provenance, run_cli, strict_json

VGGSS_PAIRS = 5158
IMAGE_SIZE, AUDIO_SECONDS = 224, 5.0
INPUT_FILES = 32  # different images and audio files
WITH_MAPS = PAPER_WEIGHTS | dict.fromkeys(MAP_LOSSES, 1.0)
TRAIN_BATCH, TRAIN_WORKERS = 32, 2
MATRIX = 4096  # rows and columns, large enough to reach a machine's limit


class Timing(NamedTuple):
    name: str
    value: float
    baseline: float | None
    unit: str

    def figures(self) -> dict[str, str | float | None]:
        ratio = None if self.baseline is None else self.baseline / self.value
        return {"name": self.name, "value": self.value, "baseline": self.baseline, "ratio": ratio, "unit": self.unit}


def seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


def alternate(
    ours: Callable[[], object],
    baseline: Callable[[], object],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Median seconds of both by the clock, timed in turns after one untimed call of each."""
    ours(), baseline()
    pairs = [
        (seconds(ours, clock), seconds(baseline, clock))
        for _ in tqdm(range(rounds), "timing", leave=False, disable=None)
    ]
    return median(pair[0] for pair in pairs), median(pair[1] for pair in pairs)


def apart(work: Callable, *arguments) -> object:
    """work(*arguments) in a process of its own, whose peak memory is that of the work."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


# ---------------------------------------------------------------- step


def random_inputs(model: JointSlotModel, batch: int) -> Inputs:
    """Images and spectrograms of the full size, on the CPU."""
    image = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE).contiguous(memory_format=torch.channels_last)
    return Inputs(image, torch.randn(batch, 1, 257, num_frames(AUDIO_SECONDS)), model.draw_masks(batch))


def full_model() -> JointSlotModel:
    torch.manual_seed(0)
    return JointSlotModel(image_size=IMAGE_SIZE, audio_seconds=AUDIO_SECONDS).train()


def our_step(batch: int, micro_batch: int | None = None) -> Callable[[], object]:
    """A function that takes one step of the full-size model exactly as train_slot.py does on this CPU."""
    device = torch.device("cpu")
    model = full_model().to(memory_format=torch.channels_last)
    optimisation = Optimisation(model, device, 5e-5, amp=choose_amp("auto", device), micro_batch=micro_batch)
    inputs = random_inputs(model, batch)
    inputs = Inputs(
        *(x[local_slice(batch)] for x in inputs[:2]), TokenMasks(*(x[local_slice(batch)] for x in inputs.masks))
    )
    return lambda: optimisation.step(inputs, PAPER_WEIGHTS, 1.0)


def their_step(batch: int) -> Callable[[], object]:
    """A function that takes the same step as the released code does."""
    model = full_model()
    return released_step(model, random_inputs(model, batch), PAPER_WEIGHTS)


def slots_and_losses(batch: int, weights: Mapping[str, float] = PAPER_WEIGHTS) -> Callable[[], object]:
    """What a step does beside the encoders, forward and backward."""
    model = full_model()
    with torch.no_grad():
        tokens = [x.detach().requires_grad_() for x in model.encode(*random_inputs(model, batch)[:2])]
    masks = model.draw_masks(batch)

    amp = choose_amp("auto", torch.device("cpu"))

    def run() -> None:
        with torch.autocast("cpu", amp, enabled=amp is not None):
            pairs = model.represent_tokens(*tokens, masks)
            losses = model.batch_losses(model.compared(pairs, weights)) | model.pair_losses(pairs)
        weighted(losses, weights).backward()

    return run


def memory_of(make_step: Callable, *arguments) -> float:
    """Peak memory of this process in GiB, after two steps."""
    step = make_step(*arguments)
    step(), step()
    return peak_memory_gib(torch.device("cpu"))


def limit_of_this_machine(dtype: torch.dtype) -> float:
    """FLOP per second of the best of 5 products of square matrices."""
    a, b = (torch.randn(MATRIX, MATRIX).to(dtype) for _ in range(2))
    return 2 * MATRIX**3 / min(seconds(lambda: a @ b, time.perf_counter) for _ in range(5))


def bench_step(rounds: int, batch: int) -> Iterator[Timing]:
    ours, baseline, rest = our_step(batch), their_step(batch), slots_and_losses(batch)
    with FlopCounterMode(display=False) as counter:
        baseline()
    spent, released = alternate(ours, baseline, rounds)
    yield Timing(f"step: full size, batch {batch}", spent, released, "s")
    limit = limit_of_this_machine(choose_amp("auto", torch.device("cpu")) or torch.float32)
    share = counter.get_total_flops() / spent / limit
    yield Timing(f"step: share of this machine's {limit / 1e9:.0f} GFLOP/s", 100 * share, None, "%")
    beside, _ = alternate(rest, lambda: None, rounds)
    yield Timing("step: slots and losses, share of the step", 100 * beside / spent, None, "%")
    with_maps, beside = alternate(slots_and_losses(batch, WITH_MAPS), rest, rounds)
    yield Timing("step: all losses of the map, share of the step", 100 * (with_maps - beside) / spent, None, "%")
    del ours, baseline, rest
    memory = [apart(memory_of, make, batch) for make in (our_step, their_step)]
    yield Timing("step: peak memory", *memory, "GiB")


# ---------------------------------------------------------------- scaling


def time_of_step(batch: int, micro_batch: int | None, rounds: int) -> tuple[float, float]:
    """Median seconds of a step after an untimed one, and the peak memory in GiB."""
    step = our_step(batch, micro_batch)
    step()
    return median(seconds(step, time.perf_counter) for _ in range(rounds)), peak_memory_gib(torch.device("cpu"))


def time_in_process(rank: int, world: int, threads: int, store: str, batch: int, rounds: int) -> None:
    """One of `world` processes that take the step together; the first one writes the median seconds."""
    torch.set_num_threads(threads)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    spent, _ = time_of_step(batch, None, rounds)
    if rank == 0:
        Path(store).with_name("seconds").write_text(str(spent))
    torch.distributed.destroy_process_group()


def time_of_processes(world: int, batch: int, rounds: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        threads = max(1, torch.get_num_threads() // world)
        arguments = (world, threads, f"{folder}/store", batch, rounds)
        torch.multiprocessing.spawn(time_in_process, arguments, world)
        return float((Path(folder) / "seconds").read_text())


def bench_scaling(rounds: int, sizes: Sequence[int], part_size: int) -> Iterator[Timing]:
    baseline = None
    for batch, part in [*((size, None) for size in sizes), (sizes[-1], part_size)]:
        spent, memory = apart(time_of_step, batch, part, rounds)
        name = f"scaling: batch {batch}" + (f" in parts of {part}" if part else "")
        baseline = baseline or 1000 * spent / batch
        yield Timing(f"{name}, per pair (baseline: batch {sizes[0]})", 1000 * spent / batch, baseline, "ms")
        yield Timing(f"{name}, peak memory", memory, None, "GiB")
    one, two = (time_of_processes(world, part_size, rounds) for world in (1, 2))
    yield Timing(f"scaling: 2 processes, global batch {part_size} (baseline: 1 process)", two, one, "s")


# ---------------------------------------------------------------- input


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


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread, as in a loader's worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_all(pairs: Dataset) -> None:
    for index in range(len(pairs)):
        pairs[index]


def train_epoch(pairs: Dataset, model: JointSlotModel, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Forward, backward and step over all batches, in bfloat16 where that is fast."""
    for batch in make_loader(pairs, TRAIN_BATCH, TRAIN_WORKERS):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16_is_fast(device)):
            loss = sum(model(batch.image.to(device), batch.spectrogram.to(device)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()  # waits for the device


def bench_input(rounds: int, train_pairs: int) -> Iterator[Timing]:
    with tempfile.TemporaryDirectory() as folder:
        files = make_input_files(Path(folder), INPUT_FILES)

        def data_sets(count: int) -> tuple[TrainingPairs, ReleasedPairs]:
            ours, baseline = ([found[i % len(found)] for i in range(count)] for found in files)
            return TrainingPairs(ours, IMAGE_SIZE, AUDIO_SECONDS, "hard"), ReleasedPairs(baseline)

        ours, baseline = data_sets(2 * INPUT_FILES)
        with one_thread():
            spent = alternate(lambda: read_all(ours), lambda: read_all(baseline), rounds, time.process_time)
        yield Timing("input: core time, per sample", *(1000 * t / len(ours) for t in spent), "ms")

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        model = JointSlotModel(arch="small", image_size=IMAGE_SIZE, audio_seconds=AUDIO_SECONDS).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        ours, baseline = data_sets(train_pairs)
        spent = alternate(
            lambda: train_epoch(ours, model, optimizer, device),
            lambda: train_epoch(baseline, model, optimizer, device),
            rounds,
        )
        name = f"input: training epoch, {TRAIN_WORKERS} data-loading workers, {device.type}, per pair"
        yield Timing(name, *(1000 * t / len(ours) for t in spent), "ms")


# ---------------------------------------------------------------- eval


def random_maps(count: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Maps (count, 7, 7) of the three sources, and boxes as truth (count, 224, 224)."""
    rng = np.random.default_rng(seed)
    raw = {name: torch.from_numpy(rng.random((count, 7, 7), dtype=np.float32)) for name in SIX_MAPS[:3]}
    corners = rng.random((count, 2, 2)) / 2
    truth = torch.stack([box_map([[*low, *(low + 0.2 + size / 2)]]) for low, size in corners])
    return raw, truth


def our_scoring(raw: dict[str, torch.Tensor], truth: torch.Tensor) -> dict[str, tuple[float, float]]:
    """The same figures by the code that every evaluation here uses."""

    def score(rows: slice) -> dict[str, torch.Tensor]:
        maps = enlarge({name: values[rows] for name, values in raw.items()}, "bicubic", ALPHA)
        return {name: consensus_iou(region_fixed(values), truth[rows]) for name, values in maps.items()}

    parts = list(in_parts(score, len(truth)))
    ious = {name: torch.cat([part[name] for part in parts]).numpy() for name in SIX_MAPS}
    return {name: (success(values).mean(), area_under_success(values).mean()) for name, values in ious.items()}


def score_stored_set(pairs: int) -> tuple[float, int]:
    """Seconds for stored maps of `pairs` samples, six kinds, with every metric there is, intervals, and maps scored."""
    raw, truth = random_maps(pairs)
    ids = [f"clip_{i}" for i in range(pairs)]
    rows = dict(zip(ids, truth, strict=True))
    classes = {name: f"class {i % 220}" for i, name in enumerate(ids)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "maps.npz"
        np.savez(
            path,
            id=ids,
            alpha=ALPHA,
            confidence=np.linspace(0, 1, pairs),
            **{name: maps.numpy() for name, maps in raw.items()},
        )
        silent = frozenset(ids[::2])
        wanted = GroundTruth("benchmark", ids, rows.__getitem__, pairs, classes, silent=silent, masks=True)
        start = time.perf_counter()
        scored = evaluate_stored(StoredMaps(path), wanted, BATCH, resamples=RESAMPLES)
        return time.perf_counter() - start, pairs * len(scored.results["maps"])


def bench_eval(rounds: int, pairs: int) -> Iterator[Timing]:
    raw, truth = random_maps(8 * BATCH)
    theirs, ours = released_scoring(raw, truth), our_scoring(raw, truth)
    worst = max(abs(a - b) for name in SIX_MAPS for a, b in zip(theirs[name], ours[name], strict=True))
    assert worst < 0.005, f"the two ways of scoring disagree by {worst}: the timing would compare different work"
    scale = 1000 / len(truth)
    times = alternate(lambda: our_scoring(raw, truth), lambda: released_scoring(raw, truth), rounds)
    yield Timing("eval: cIoU and AUC of six maps, per sample", *(scale * t for t in times), "ms")
    spent, maps = score_stored_set(pairs)
    yield Timing(f"eval: every metric and interval, {pairs} samples, six maps", spent, None, "s")
    yield Timing("eval: every metric, per map", 1000 * spent / maps, None, "ms")


# ---------------------------------------------------------------- the command line


def results_table(timings: Sequence[Mapping[str, str | float | None]]) -> str:
    rows = [[line["name"], line["value"], line["unit"], line["baseline"], line["ratio"]] for line in timings]
    heads = ("", "ours", "", "released", "ratio")
    return tabulate(rows, heads, tablefmt="simple", floatfmt=".3g", missingval="-")


def main() -> None:
    parser = ArgumentParser(description="Time our way against the released code's.")
    parser.add_argument("what", choices=("step", "input", "eval", "scaling", "all"), help="what to time")
    parser.add_argument(
        "--rounds",
        type=number(int, low=1),
        default=5,
        help="how often our code and the released code are each timed (scaling: at most 2)",
    )
    parser.add_argument(
        "--pairs",
        type=number(int, low=2),
        default=VGGSS_PAIRS,
        help="eval: number of samples whose stored maps are scored",
    )
    parser.add_argument("--train_pairs", type=number(int, low=2), default=256, help="input: pairs per training epoch")
    parser.add_argument(
        "--batch_size",
        type=number(int, low=2),
        default=32,
        help="step: pairs per batch; scaling: pairs per micro-batch, and per batch that two processes share",
    )
    parser.add_argument(
        "--batch_sizes",
        type=number(int, low=2),
        nargs="+",
        default=[16, 32, 64, 128, 256],
        help="scaling: batch sizes to time",
    )
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in provenance().items()) + f", {torch.get_num_threads()} threads")
    benches = {
        "step": lambda: bench_step(args.rounds, args.batch_size),
        "input": lambda: bench_input(args.rounds, args.train_pairs),
        "eval": lambda: bench_eval(args.rounds, args.pairs),
        "scaling": lambda: bench_scaling(min(args.rounds, 2), args.batch_sizes, args.batch_size),
    }
    chosen = benches if args.what == "all" else [args.what]
    timings = [timing.figures() for name in chosen for timing in benches[name]()]
    print(f"\n{results_table(timings)}\n")
    for line in timings:
        print(strict_json(line))


if __name__ == "__main__":
    run_cli(main)
