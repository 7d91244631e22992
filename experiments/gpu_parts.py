"""What `benchmark gpu` measures and tries: a generator of rows for each part, which may fail by itself."""

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dataset import TrainingPairs, make_loader, select_training_pairs
from experiments.bench_input import AUDIO_SECONDS, IMAGE_SIZE, make_input_files
from experiments.bench_localize import FPS, time_model, write_film
from experiments.bench_plan import count_step
from experiments.bench_step import full_model, our_step
from experiments.reference import deviations
from model_slot import JointSlotModel, TokenMasks
from recipes import PAPER_WEIGHTS, SMALL
from scoring.evaluate import evaluate
from sets import build_test_set
from training.step import Inputs, Optimisation, choose_amp
from utils import full_precision, load_checkpoint, peak_memory_gib, seed_everything

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
SPLITS = {"train": 400, "val": 32, "test": 128, "distractor": 1, "interactive": 1, "offscreen": 1}
QUICK_SPLITS = {"train": 70, "val": 8, "test": 8, "distractor": 1, "interactive": 1, "offscreen": 1}
TINY = {"image_encoder": "small", "dim": 16}
TINY_FLAGS = ["dim=16", "--image_size", "64", "--audio_seconds", "0.8"]
BATCH_SIZES, WORKERS, LOADED_BATCH = (64, 128, 256, 512, 1024), (4, 8, 16), 256
TIMED_STEPS = 5


class Row(NamedTuple):
    what: str
    value: float | str
    unit: str = ""
    step: Mapping[str, Any] | None = None  # of a timed step: what `plan --measured` reads


class Setting(NamedTuple):
    device: torch.device
    quick: bool  # every part, small, in a minute or two
    folder: Path
    ends: float  # on time.monotonic()

    @property
    def gpu(self) -> str:
        return "cpu" if self.device.type == "cpu" else str(self.device.index or 0)

    @property
    def data(self) -> Path:
        """Built-in data, made before the first part."""
        return self.folder / "data"

    def left(self) -> float:
        """Seconds for what is started now."""
        return max(self.ends - time.monotonic(), 1.0)

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# ---------------------------------------------------------------- numbers


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    with full_precision():
        for backend in (torch.backends.cudnn.conv, torch.backends.cuda.matmul) if on else ():
            backend.fp32_precision = "tf32"
        yield


def reference(setting: Setting) -> Iterator[Row]:
    """Allowed without TF32 (tests/golden/README.md): 1e-5, gradient norms 1e-4."""
    for on in (False, True) if setting.device.type == "cuda" else (False,):
        with tf32(on):
            for name, value in deviations(setting.device).items():
                allowed = 1e-4 if name == "gradient norms" else 1e-5
                verdict = "TF32" if on else "within" if value <= allowed else f"ABOVE {allowed:g}"
                yield Row(f"{name}, TF32 {'on' if on else 'off'}: furthest from the reference", value, verdict)


def precisions(setting: Setting) -> Iterator[Row]:
    """Steps of the small model on the same batches of built-in data from the same weights."""
    steps, size = (4, 16) if setting.quick else (50, 64)
    pairs = select_training_pairs("synthetic", str(setting.data), "metadata").pairs
    train = TrainingPairs(pairs, SMALL["image_size"], SMALL["audio_seconds"], "plain")
    batches = [*make_loader(train, size, 0, train.batches(size, (1, 0)))]
    batches = [(batch.image, batch.spectrogram) for batch in batches]
    wanted = losses_of(CPU, None, batches, steps)
    yield Row(f"loss on the CPU in fp32 after 1 and {steps} steps", f"{wanted[0]:.5f} {wanted[-1]:.5f}")
    for name, amp in {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
        with full_precision():
            found = losses_of(setting.device, amp, batches, steps)
        worst = max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))
        yield Row(f"loss in {name} after 1 and {steps} steps", f"{found[0]:.5f} {found[-1]:.5f}")
        yield Row(f"loss in {name}: largest difference from the CPU's over all steps", 100 * worst, "%")


def losses_of(device: torch.device, amp: torch.dtype | None, batches: Sequence, steps: int) -> list[float]:
    """nan for a step of fp16 that overflowed."""
    seed_everything(0)
    names = ("dim", "iterations", "image_size", "audio_seconds", "tau", "reciprocal_k")
    model = JointSlotModel("small", **{name: SMALL[name] for name in names}).train()
    optimisation = Optimisation(model.to(device, memory_format=torch.channels_last), device, SMALL["lr"], amp=amp)
    losses = []
    for step in range(steps):
        image, spectrogram = batches[step % len(batches)]
        masks = TokenMasks(*(mask.to(device) for mask in model.draw_masks(len(image))))
        found = optimisation.step(Inputs(image.to(device), spectrogram.to(device), masks), PAPER_WEIGHTS, 1.0)
        losses.append(found.get("loss", float("nan")))
    return losses


def scoring(setting: Setting) -> Iterator[Row]:
    """A test set scored on the device and on the CPU: the same figures within 1e-5, and the time of a sample."""
    seed_everything(0)
    model = full_model(**(TINY if setting.quick else {}))
    dataset = build_test_set("synthetic", str(setting.data), None, "metadata", IMAGE_SIZE, AUDIO_SECONDS)
    found, spent = [], []
    for device in (CPU, setting.device):
        model = model.to(device)
        evaluate(model, dataset, device, max_batches=1)
        start = time.perf_counter()
        found.append(evaluate(model, dataset, device).results)
        spent.append(time.perf_counter() - start)
    yield Row("time of a sample with model and every metric, on the device", 1000 * spent[1] / len(dataset), "ms")
    yield Row("time of a sample with model and every metric, on the CPU", 1000 * spent[0] / len(dataset), "ms")
    for what, pick in {"of the set": "maps", "of a class": "by_class", "of a size": "by_size"}.items():
        worst = largest_difference(*(results[pick] for results in found))
        yield Row(f"largest difference of a figure {what}, device against CPU", worst)


def largest_difference(ours: Any, theirs: Any) -> float:
    """Of all numbers in two results; infinite where one of them is missing."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        both = ours.keys() | theirs.keys()
        return max((largest_difference(ours.get(key), theirs.get(key)) for key in both), default=0.0)
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) == len(theirs):
        return max((largest_difference(*pair) for pair in zip(ours, theirs, strict=True)), default=0.0)
    if ours == theirs or (ours != ours and theirs != theirs):
        return 0.0
    numbers = all(isinstance(value, int | float) for value in (ours, theirs))
    return abs(ours - theirs) if numbers else float("inf")


# ---------------------------------------------------------------- whole runs


def training_command(setting: Setting, name: str, *more: str) -> list[str]:
    """train_slot.py on the built-in data, small; the same name, the same folder."""
    where = ["--train_data_path", str(setting.data), "--model_dir", str(setting.folder), "--experiment_name", name]
    size = ["--batch_size", "16" if setting.quick else "64", "--epochs", "2", "--num_workers", "0"]
    small = ["--recipe", "small", *(TINY_FLAGS if setting.quick else [])]
    every = ["--save_every_steps", "1", "--gpu", setting.gpu]
    return [str(ROOT / "train_slot.py"), "--trainset", "synthetic", *small, *where, *size, *every, *more]


def started(command: Sequence[str]) -> subprocess.Popen:
    """A script of ours in a process of its own; what it prints goes nowhere, its errors are kept."""
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(setting: Setting, command: Sequence[str]) -> None:
    """Run it to its end. RuntimeError with the last line that it said where that is no good one."""
    with started(command) as process:
        try:
            _, said = process.communicate(timeout=setting.left())
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=30)
            process.kill()
            raise RuntimeError("not finished when the time was up") from None
    if process.returncode:
        raise RuntimeError((said.strip().splitlines() or [f"status {process.returncode}"])[-1])


def last_loss(setting: Setting, name: str) -> float:
    return json.loads((setting.folder / name / "log.jsonl").read_text().splitlines()[-1])["loss"]


def resuming(setting: Setting) -> Iterator[Row]:
    """A run that is killed after its first saved step and resumed, against one that is left alone; and two of those.

    Kernels of a GPU add in any order unless told otherwise, so that no two runs end alike there.
    """
    for name in ("whole", "again"):
        finish(setting, training_command(setting, name))
    command = training_command(setting, "killed")
    latest = setting.folder / "killed" / "latest.pth"
    with started(command) as run:
        while run.poll() is None and not latest.exists() and setting.left() > 1:
            time.sleep(0.01)
        was_running = run.poll() is None
        run.kill()
    yield Row("killed while it ran", "yes" if was_running and latest.exists() else "NO")
    finish(setting, [*command, "--resume"])
    names = "whole", "again", "killed"
    whole, *others = (load_checkpoint(setting.folder / name / "latest.pth")["model"] for name in names)
    for what, other in zip(("uninterrupted once more", "resumed"), others, strict=True):
        worst = max(float((whole[key].double() - other[key].double()).abs().max()) for key in whole)
        yield Row(f"largest difference of a weight, {what} against uninterrupted", worst)
    losses = " ".join(f"{last_loss(setting, name):.6f}" for name in names)
    yield Row("loss of the last epoch, uninterrupted, once more, resumed", losses)


def processes(setting: Setting) -> Iterator[Row]:
    """torchrun on all GPUs by nccl (on CPUs: two processes by gloo), and with --sync_bn."""
    cuda = setting.device.type == "cuda"
    count = torch.cuda.device_count() if cuda else 2
    backend = "nccl" if cuda else "gloo"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    finish(setting, [*launch, *training_command(setting, "processes")])
    yield Row(f"loss of the last epoch, {count} processes by {backend}", last_loss(setting, "processes"))
    if not cuda:
        yield Row("--sync_bn", "for CUDA only")
        return
    finish(setting, [*launch, *training_command(setting, "sync_bn", "--sync_bn")])
    yield Row(f"loss of the last epoch, {count} processes with --sync_bn", last_loss(setting, "sync_bn"))


# ---------------------------------------------------------------- speed


def waiting(setting: Setting) -> Iterator[Row]:
    """How often the host waits for the device in a step: once, by design."""
    if setting.device.type != "cuda":
        yield Row("waits of the host in a step", "for CUDA only")
        return
    step = our_step(32, device=setting.device)
    step(), step()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in seen if "synchronizing CUDA operation" in str(warning.message)]
    yield Row("waits of the host in a step", len(found))
    for warning in found[:5]:
        yield Row("a wait", f"{Path(warning.filename).name}:{warning.lineno}")


def stepping(setting: Setting) -> Iterator[Row]:
    """The step of the full-size model from ready tensors."""
    gflop = None if setting.quick else count_step().gflop
    for batch in (4, 8) if setting.quick else BATCH_SIZES:
        step = None
        try:
            if setting.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(setting.device)
            step = our_step(batch, device=setting.device, **(TINY if setting.quick else {}))
            step(), step()
            spent = timed(setting, step, 2 if setting.quick else TIMED_STEPS)
            memory, speed = peak_memory_gib(setting.device), batch / spent
            figures = {"batch": batch, "ms": 1000 * spent, "pairs_per_second": speed, "memory_gib": memory}
            figures |= {"tflops": speed * gflop / 1000} if gflop else {}
            yield Row(f"batch {batch}", 1000 * spent, "ms", figures)
            yield Row(f"batch {batch}", speed, "pairs/s")
            yield Row(f"batch {batch}, peak memory", memory, "GiB")
        except torch.OutOfMemoryError as error:
            yield Row(f"batch {batch}", f"out of memory: {str(error).splitlines()[0][:100]}")
        finally:
            del step
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()


def compiled(setting: Setting) -> Iterator[Row]:
    """The same step with `--compile`, and what compiling takes."""
    for batch in (4,) if setting.quick else (64, 256):
        start = time.perf_counter()
        step = our_step(batch, device=setting.device, compiled=True, **(TINY if setting.quick else {}))
        step(), step()
        setting.wait()
        yield Row(f"batch {batch}, compiled: the first two steps", time.perf_counter() - start, "s")
        yield Row(f"batch {batch}, compiled", 1000 * timed(setting, step, TIMED_STEPS), "ms")


def timed(setting: Setting, work: Callable[[], object], count: int) -> float:
    """Seconds of one of `count` calls."""
    setting.wait()
    start = time.perf_counter()
    for _ in range(count):
        work()
    setting.wait()
    return (time.perf_counter() - start) / count


def loading(setting: Setting) -> Iterator[Row]:
    """Pairs per second from files, by themselves and with the step; the batches that were prefetched do not count."""
    files, _ = make_input_files(setting.folder, 4 if setting.quick else 64)
    size = 4 if setting.quick else LOADED_BATCH
    step_settings = TINY if setting.quick else {}
    model = full_model(**step_settings).to(setting.device, memory_format=torch.channels_last)
    optimisation = Optimisation(model, setting.device, 5e-5, amp=choose_amp("auto", setting.device))

    def learn(batch) -> None:
        masks = TokenMasks(*(mask.to(setting.device) for mask in model.draw_masks(size)))
        image, spectrogram = (x.to(setting.device) for x in (batch.image, batch.spectrogram))
        optimisation.step(Inputs(image, spectrogram, masks), PAPER_WEIGHTS, 1.0)

    for workers in (0, 1) if setting.quick else WORKERS:
        skipped = 2 * workers + 1
        count = skipped + max(2 * workers, 4)
        pairs = TrainingPairs([files[i % len(files)] for i in range(size * count)], IMAGE_SIZE, AUDIO_SECONDS, "hard")
        for what, work in (("from files alone", lambda batch: None), ("with the step", learn)):
            speed = rate_of(setting, pairs, size, workers, skipped, work)
            yield Row(f"{workers} workers, {what}", speed, "pairs/s")


def rate_of(
    setting: Setting, pairs: TrainingPairs, size: int, workers: int, skipped: int, work: Callable[[Any], object]
) -> float:
    """Pairs per second after the first `skipped` batches."""
    start, counted = 0.0, 0
    for number, batch in enumerate(make_loader(pairs, size, workers, device=setting.device)):
        work(batch)
        if number + 1 == skipped:
            setting.wait()
            start = time.perf_counter()
        counted += size * (number >= skipped)
    setting.wait()
    return counted / (time.perf_counter() - start)


def films(setting: Setting) -> Iterator[Row]:
    film, seconds = setting.folder / "film.mp4", 1.0 if setting.quick else 20.0
    write_film(film, seconds)
    for name in ("small",) if setting.quick else ("small", "full-size"):
        first = next(iter(time_model(name, film, seconds, setting.folder, 1, str(setting.device))))
        yield Row(f"localize.py, {name} model, frames of film", FPS / first.value, "frames/s")


PARTS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "reference numbers": reference,
    "50 steps in each precision": precisions,
    "a step": stepping,
    "waits": waiting,
    "loading": loading,
    "kill and resume": resuming,
    "processes": processes,
    "scoring": scoring,
    "films": films,
    "a compiled step": compiled,
}
