"""A training step against the released code's: time, share of the machine's limit, memory; and how it scales."""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from audio_io import num_frames
from distributed import local_slice
from experiments.released import released_step
from experiments.timing import Timing, add_rounds, alternate, apart, seconds
from model_slot import MAP_LOSSES, JointSlotModel, TokenMasks
from recipes import PAPER_WEIGHTS
from training.step import Inputs, Optimisation, choose_amp, compile_model, keep_freed_memory, weighted
from utils import add_boolean, number, peak_memory_gib

IMAGE_SIZE, AUDIO_SECONDS = 224, 5.0
WITH_MAPS = PAPER_WEIGHTS | dict.fromkeys(MAP_LOSSES, 1.0)
CPU = torch.device("cpu")
MATRIX = 4096  # rows and columns of a product, large enough to reach a machine's limit


def add_flags(parser) -> None:
    add_rounds(parser)
    parser.add_argument("--batch_size", type=number(int, low=2), default=32, help="pairs per batch")
    add_boolean(parser, "--compile", "time the compiled step, too: compiling the full size takes minutes")


def add_scaling_flags(parser) -> None:
    add_rounds(parser, 2)
    parser.add_argument(
        "--batch_size",
        type=number(int, low=2),
        default=32,
        help="pairs per micro-batch, and per batch that two processes share",
    )
    parser.add_argument(
        "--batch_sizes", type=number(int, low=2), nargs="+", default=[16, 32, 64, 128, 256], help="batch sizes to time"
    )


def run(args) -> Iterator[Timing]:
    return bench_step(args.rounds, args.batch_size, args.compile)


def run_scaling(args) -> Iterator[Timing]:
    return bench_scaling(args.rounds, args.batch_sizes, args.batch_size)


def random_inputs(model: JointSlotModel, batch: int) -> Inputs:
    """Images and spectrograms of the full size, on the CPU."""
    image = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE).contiguous(memory_format=torch.channels_last)
    return Inputs(image, torch.randn(batch, 1, 257, num_frames(AUDIO_SECONDS)), model.draw_masks(batch))


def full_model(**settings) -> JointSlotModel:
    torch.manual_seed(0)
    return JointSlotModel(image_size=IMAGE_SIZE, audio_seconds=AUDIO_SECONDS, **settings).train()


def our_step(
    batch: int, micro_batch: int | None = None, device: torch.device = CPU, compiled: bool = False, **settings
) -> Callable[[], dict[str, float]]:
    """A function that takes one step exactly as train_slot.py does, from ready tensors. settings: of the model, in
    place of the full size."""
    if device.type == "cpu":
        keep_freed_memory()
    model = full_model(**settings).to(device, memory_format=torch.channels_last)
    if compiled:
        compile_model(model, device)
    optimisation = Optimisation(model, device, 5e-5, amp=choose_amp("auto", device), micro_batch=micro_batch)
    inputs, rows = random_inputs(model, batch), local_slice(batch)
    masks = TokenMasks(*(x[rows].to(device) for x in inputs.masks))
    inputs = Inputs(*(x[rows].to(device) for x in inputs[:2]), masks)
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

    amp = choose_amp("auto", CPU)

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
    return peak_memory_gib(CPU)


def share_of_limit(step: Callable[[], object], flops: int, dtype: torch.dtype, rounds: int) -> tuple[float, float]:
    """Which share of this machine's limit a step of so many operations reaches, and that limit in FLOP per second.

    The limit is that of products of square matrices with as many operations, timed in turns with the step: what a
    processor holds for a moment, cool and alone, is more.
    """
    a, b = (torch.randn(MATRIX, MATRIX).to(dtype) for _ in range(2))
    products = math.ceil(flops / (2 * MATRIX**3))

    def multiply() -> None:
        for _ in range(products):
            a @ b

    at_limit, spent = alternate(multiply, step, rounds)
    limit = 2 * MATRIX**3 * products / at_limit
    return flops / spent / limit, limit


def instruction_set() -> str:
    """The widest vector instructions that PyTorch takes on this CPU, and whether it has tiles for matrices."""
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return torch.backends.cpu.get_cpu_capability() + " with AMX" * tiles


def bench_step(rounds: int, batch: int, compiled: bool) -> Iterator[Timing]:
    ours, baseline, rest = our_step(batch), their_step(batch), slots_and_losses(batch)
    with FlopCounterMode(display=False) as counter:
        baseline()
    spent, released = alternate(ours, baseline, rounds)
    yield Timing(f"step: full size, batch {batch}", spent, released, "s")
    precision = choose_amp("auto", CPU) or torch.float32
    share, limit = share_of_limit(ours, counter.get_total_flops(), precision, rounds)
    what = f"{limit / 1e9:.0f} GFLOP/s in {str(precision).removeprefix('torch.')}, {instruction_set()}"
    yield Timing(f"step: share of this machine's {what}", 100 * share, None, "%")
    beside, _ = alternate(rest, lambda: None, rounds)
    yield Timing("step: slots and losses, share of the step", 100 * beside / spent, None, "%")
    with_maps, beside = alternate(slots_and_losses(batch, WITH_MAPS), rest, rounds)
    yield Timing("step: all losses of the map, share of the step", 100 * (with_maps - beside) / spent, None, "%")
    if compiled:
        spent, eager = alternate(our_step(batch, compiled=True), ours, rounds)
        yield Timing("step: compiled (baseline: ours)", spent, eager, "s")
    del ours, baseline, rest
    memory = [apart(memory_of, make, batch) for make in (our_step, their_step)]
    yield Timing("step: peak memory", *memory, "GiB")


# ---------------------------------------------------------------- scaling


def time_of_step(batch: int, micro_batch: int | None, rounds: int) -> tuple[float, float]:
    """Median seconds of a step after an untimed one, and the peak memory in GiB."""
    step = our_step(batch, micro_batch)
    step()
    return median(seconds(step, time.perf_counter) for _ in range(rounds)), peak_memory_gib(CPU)


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
