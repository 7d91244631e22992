"""What training on so many pairs takes: computed from unit costs measured here and from counted operations.

    python -m experiments.benchmark plan --pairs 2000000 --gpus 8 --cores 96
    python -m experiments.benchmark plan --pairs 10000 --gpus 0 --cores 2 --freeze_image

Measured on this machine, as time of one core: input of a pair, on CPUs its step, a sample scored. Counted: operations
of a step, what it keeps for its backward pass, parameters, bytes. Assumed, and printed as such: what a GPU sustains,
unless --measured names what `benchmark gpu` wrote.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dataset import TrainingPairs, bytes_of
from experiments.bench_frozen import CPU, step_of
from experiments.bench_input import AUDIO_SECONDS, IMAGE_SIZE, make_input_files
from experiments.bench_step import full_model, random_inputs
from experiments.stored_set import score_stored_set
from experiments.timing import Timing, one_thread, seconds
from recipes import CACHED_VIEWS, PAPER_WEIGHTS, RECIPES
from training.features import ViewImages, trunk_features
from training.step import Inputs, choose_amp, weighted
from utils import UserError, add_boolean, number

FILES, SCORED = 24, 24  # pairs whose input is measured, samples that are scored
MEASURED_BATCH = 16  # of a step on this CPU
PREFETCH = 2  # batches that each data-loading worker holds ready, and one is under way
VGGSS = 5158
SMALL_SET = 10_000  # pairs up to which the paper trains for 100 epochs
SUSTAINED = (70.0, 160.0)  # TFLOP/s of this network on an H100, an estimate
BYTES_PER_WEIGHT = 16  # weight, gradient and AdamW's two averages in fp32


class Counted(NamedTuple):
    """Of a training step, forward and backward, with the paper's losses."""

    gflop: float  # per pair
    kept_bytes: float  # for the backward pass, per pair
    trained: int  # parameters that have a gradient
    parameters: int


class Costs(NamedTuple):
    """What one pair takes; *_ms is time of one core."""

    input_ms: float  # in every epoch
    view_ms: float  # reading a view of its image, once, where features are kept
    sent_bytes: float  # by a data-loading worker
    stored_bytes: float  # on disk
    feature_bytes: float  # of a kept view
    step: Counted
    view_gflop: float  # features of a view
    step_ms: float | None  # on CPUs
    features_ms: float | None  # of a view, on CPUs
    scoring_ms: float  # per sample of a test set, every metric


class Wanted(NamedTuple):
    pairs: int
    gpus: int  # 0: CPUs alone
    cores: int
    batch_size: int  # of all processes together
    epochs: int
    views: int  # kept for each image; 0: the image encoder is trained, too
    tflops: tuple[float, ...]  # that a GPU sustains: low and high, or what was measured
    measured: bool = False


def add_flags(parser) -> None:
    parser.add_argument("--pairs", type=number(int, low=1), default=144_000, help="training pairs")
    parser.add_argument("--gpus", type=number(int, low=0), default=1, help="GPUs of one machine; 0: CPUs alone")
    parser.add_argument("--cores", type=number(int, low=1), default=16, help="CPU cores of that machine")
    parser.add_argument("--batch_size", type=number(int, low=2), default=256, help="pairs per step of all processes")
    epochs = "epochs of the run (default: the paper's, 100 for up to 10,000 pairs and 50 for more)"
    parser.add_argument("--epochs", type=number(int, low=1), help=epochs)
    add_boolean(parser, "--freeze_image", f"keep features of {CACHED_VIEWS} views and train the rest")
    parser.add_argument(
        "--gpu_tflops",
        type=number(float, above=0),
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=SUSTAINED,
        help="what a GPU sustains on this network, in TFLOP/s (default: 70 to 160, an estimate for an H100 in bf16)",
    )
    parser.add_argument("--measured", type=Path, metavar="JSON", help="what benchmark gpu wrote, in place of it")


def run(args) -> Iterator[Timing]:
    if args.gpus and args.batch_size % args.gpus:
        raise UserError(f"--batch_size {args.batch_size} must be a multiple of --gpus {args.gpus}")
    own = args.batch_size / max(args.gpus, 1)
    tflops = (measured_tflops(args.measured, own),) if args.measured else tuple(sorted(args.gpu_tflops))
    epochs = args.epochs or RECIPES["paper" if args.pairs <= SMALL_SET else "paper_144k"]["epochs"]
    views = CACHED_VIEWS if args.freeze_image else 0
    shape = args.pairs, args.gpus, args.cores, args.batch_size, epochs, views
    wanted = Wanted(*shape, tflops, bool(args.measured))
    costs = measure(args.freeze_image, on_cpu=not args.gpus)
    print("\n".join(assumptions(costs, wanted)))
    yield from plan(costs, wanted)


def measured_tflops(path: Path, batch: float) -> float:
    """TFLOP/s of the step that `benchmark gpu` measured with the nearest batch. UserError where the file has none."""
    try:
        steps = json.loads(path.read_text())["steps"]
        return float(min(steps, key=lambda step: abs(math.log(step["batch"] / batch)))["tflops"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--measured {path} is not what benchmark gpu writes: {error!r:.80}") from error


# ---------------------------------------------------------------- unit costs


class NoFeatures:
    """In place of a store of features: reading them costs next to nothing beside the sound."""

    count = CACHED_VIEWS

    def __init__(self, shape: torch.Size) -> None:
        self.row = torch.zeros(shape, dtype=torch.float16)

    def get(self, index: int, view: int) -> torch.Tensor:
        return self.row


def measure(freeze_image: bool, on_cpu: bool) -> Costs:
    """Time is that of the processor, one thread, so that it does not depend on what else the machine does."""
    with one_thread(), torch.no_grad():
        encoder = full_model().eval().imgnet
        features = encoder.trunk(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))[0]
    step = count_step(features.shape if freeze_image else None)
    with tempfile.TemporaryDirectory() as folder, one_thread():
        files, _ = make_input_files(Path(folder), FILES)
        pairs = TrainingPairs(files, IMAGE_SIZE, AUDIO_SECONDS, "hard")
        pairs.views = NoFeatures(features.shape) if freeze_image else None
        views = ViewImages([(pair, 1) for pair in files], IMAGE_SIZE, "hard")
        sent = sum(bytes_of(pairs.raw(index)) for index in range(FILES)) / FILES
        stored = sum(Path(path).stat().st_size for pair in files for path in (pair.image, pair.audio)) / FILES
        input_ms = core_ms(lambda: [pairs.raw(index) for index in range(FILES)], FILES)
        view_ms = core_ms(lambda: [views[index] for index in range(FILES)], FILES) if freeze_image else 0.0
    with FlopCounterMode(display=False) as counter, FakeTensorMode(), torch.no_grad():
        full_model().eval().imgnet.trunk(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    step_ms, features_ms = cpu_costs(freeze_image) if on_cpu else (None, None)
    scoring_ms = 1000 * score_stored_set(SCORED, 0)["cpu_seconds"] / SCORED
    of_view = counter.get_total_flops() / 1e9
    return Costs(input_ms, view_ms, sent, stored, 2 * features.numel(), step, of_view, step_ms, features_ms, scoring_ms)


def core_ms(work: Callable[[], object], count: int) -> float:
    """Milliseconds of the processor for each of `count` items, after an untimed call."""
    work()
    return 1000 * seconds(work, time.process_time) / count


def cpu_costs(freeze_image: bool) -> tuple[float, float]:
    """Time of one core per pair: a step, in the precision of training on this CPU, and the features of a view."""
    with one_thread():
        model = full_model(standardise=freeze_image)
        image, spectrogram, _ = random_inputs(model, MEASURED_BATCH)
        features_ms = 0.0
        if freeze_image:
            model.imgnet.freeze()
            with torch.no_grad():
                features_ms = core_ms(lambda: trunk_features(model.imgnet, image, CPU), MEASURED_BATCH)
                image = trunk_features(model.imgnet, image, CPU).half()
        return core_ms(step_of(model, image, spectrogram), MEASURED_BATCH), features_ms


def count_step(features: torch.Size | None = None, batch: int = 256) -> Counted:
    """Counted on tensors without values, as a GPU computes it, in bf16. features: of an image that is not encoded."""
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        kept[storage._cdata] = storage.nbytes(), value  # the tensor, so that no other storage gets its address
        return value

    with FakeTensorMode():
        model = full_model()
        if features:
            model.imgnet.freeze()
        inputs = random_inputs(model, batch)
        inputs = Inputs(torch.randn(batch, *features) if features else inputs.image, *inputs[1:])
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        with FlopCounterMode(display=False) as counter:
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
            with hooks, torch.autocast("cpu", torch.bfloat16):
                loss = weighted(model(*inputs), PAPER_WEIGHTS)
            loss.backward()
        own = sum(size for storage, (size, _) in kept.items() if storage not in weights)
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, has_gradient in sizes if has_gradient)
    return Counted(counter.get_total_flops() / batch / 1e9, own / batch, trained, sum(size for size, _ in sizes))


# ---------------------------------------------------------------- the plan


class Speed(NamedTuple):
    what: str  # under which assumption, for the name of a figure
    rate: float  # pairs per second
    limit: str  # what sets it
    before: float  # seconds before the first epoch
    steps: float  # pairs per second of the steps alone


def speeds(costs: Costs, wanted: Wanted) -> list[Speed]:
    """How fast it goes; where the speed of a GPU is assumed, for the slow and for the fast assumption."""
    of_views = wanted.views * wanted.pairs
    if not wanted.gpus:
        spent = costs.input_ms + costs.step_ms
        limit = f"the step, {costs.step_ms / spent:.0%} of the cores' time"
        before = of_views * (costs.view_ms + costs.features_ms) / 1000 / wanted.cores
        return [Speed("", 1000 * wanted.cores / spent, limit, before, 1000 * wanted.cores / costs.step_ms)]
    found, input_rate = [], 1000 * wanted.cores / costs.input_ms
    for tflops in wanted.tflops:
        what = "" if wanted.measured else f", at {tflops:g} TFLOP/s a GPU"
        gflops = 1000 * tflops * wanted.gpus
        of_gpus = gflops / costs.step.gflop
        before = of_views * max(costs.view_ms / 1000 / wanted.cores, costs.view_gflop / gflops)
        limit = "the input" if input_rate < of_gpus else "the GPUs"
        found.append(Speed(what, min(input_rate, of_gpus), limit, before, of_gpus))
    return found


def plan(costs: Costs, wanted: Wanted) -> Iterator[Timing]:
    processes, per_weight = max(wanted.gpus, 1), 4 if wanted.gpus else 0
    for what, rate, limit, before, steps in speeds(costs, wanted):
        print(f"limited by {limit}{what}")
        epoch = wanted.pairs / rate / 3600
        if wanted.views:
            yield Timing(f"plan: features of {wanted.views} views, once{what}", before / 3600, None, "h")
        yield Timing(f"plan: an epoch{what}", epoch, None, "h")
        yield Timing(f"plan: {wanted.epochs} epochs{what}", before / 3600 + wanted.epochs * epoch, None, "h")
        yield Timing(f"plan: pairs per second{what}", rate, None, "")
        if wanted.gpus:
            yield Timing(f"plan: cores that feed the GPUs{what}", steps * costs.input_ms / 1000, None, "")
        yield Timing(f"plan: read from storage{what}", rate * costs.stored_bytes / 1e6, None, "MB/s")
        exchanged = 2 * per_weight * costs.step.trained * (processes - 1) / processes  # twice around a ring
        exchanged *= rate / wanted.batch_size
        yield Timing(f"plan: network, gradients out of each GPU{what}", exchanged / 1e6, None, "MB/s")
    yield Timing("plan: input of an epoch alone", wanted.pairs * costs.input_ms / 3.6e6 / wanted.cores, None, "h")
    yield Timing("plan: disk, pairs", wanted.pairs * costs.stored_bytes / 1e9, None, "GB")
    yield Timing("plan: disk, kept features", wanted.views * wanted.pairs * costs.feature_bytes / 1e9, None, "GB")
    weights = 4 * costs.step.parameters + 8 * costs.step.trained
    yield Timing("plan: disk, a checkpoint", weights / 1e6, None, "MB")
    workers = max(wanted.cores // processes, 1)
    in_flight = (PREFETCH * workers + 1) * wanted.batch_size
    yield Timing(f"plan: /dev/shm, {workers} workers a process", in_flight * costs.sent_bytes / 1e9, None, "GB")
    of_step = wanted.batch_size / processes * costs.step.kept_bytes + BYTES_PER_WEIGHT * costs.step.parameters
    what = "memory of a GPU" if wanted.gpus else "memory of the step in bf16"
    yield Timing(f"plan: {what}, at least", of_step / 1e9, None, "GB")
    scoring = VGGSS * costs.scoring_ms / 1000 / wanted.cores
    yield Timing(f"plan: scoring {VGGSS:,} samples with every metric, without the model", scoring, None, "s")


def assumptions(costs: Costs, wanted: Wanted) -> list[str]:
    network = (
        f"kept features of {wanted.views} views, the image encoder frozen" if wanted.views else "all of it trained"
    )
    measured = (
        f"measured here, of one core: {costs.input_ms:.2f} ms input per pair and epoch (640 x 360 JPEG, 10 s of 16-bit "
        f"WAV, hard augmentation), {costs.scoring_ms:.1f} ms per sample scored"
    )
    if wanted.views:
        measured += f", {costs.view_ms:.2f} ms to read a view"
    lines = [
        f"{wanted.pairs:,} pairs, {wanted.epochs} epochs, batch {wanted.batch_size}, {wanted.gpus} GPUs, "
        f"{wanted.cores} cores; ResNet-18 on both sides, {IMAGE_SIZE} px, {AUDIO_SECONDS:g} s, {network}",
        measured,
    ]
    if not wanted.gpus:
        of_views = f", {costs.features_ms:.0f} ms for the features of a view" if wanted.views else ""
        precision = choose_amp("auto", CPU) or torch.float32
        lines.append(f"  and {costs.step_ms:.0f} ms for the step of a pair{of_views} ({precision})")
    lines.append(
        f"counted: {costs.step.gflop:.1f} GFLOP and {costs.step.kept_bytes / 1e6:.0f} MB of activations (bf16) per "
        f"pair and step, {costs.step.parameters / 1e6:.2f} M parameters, {costs.step.trained / 1e6:.2f} M trained; "
        f"{costs.sent_bytes / 1e3:.0f} kB sent and {costs.stored_bytes / 1e3:.0f} kB stored per pair"
    )
    if wanted.gpus:
        known = "as measured" if wanted.measured else "not measured"
        speed = " to ".join(f"{tflops:g}" for tflops in wanted.tflops)
        lines.append(f"assumed: a GPU sustains {speed} TFLOP/s ({known}), {wanted.gpus} GPUs {wanted.gpus} times that;")
        lines.append("  input, steps and the exchange of gradients overlap, and all cores load data;")
    else:
        lines.append(f"assumed: {wanted.cores} cores do {wanted.cores} times what one does;")
    lines.append("  other cores are as fast as these; nothing waits for storage or network; validation, scoring and")
    lines.append("  checkpoints are not in the hours")
    return lines
