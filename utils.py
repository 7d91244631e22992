"""Checkpoints, seeds, devices and the command line: what every script needs and no method depends on."""

import argparse
import codecs
import difflib
import errno
import glob
import io
import json
import math
import multiprocessing
import os
import platform
import random
import re
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import numpy as np
import torch


class UserError(Exception):
    """A mistake that the user can correct: one line that says what is wrong, where, and what to do."""


class Absent(UserError):
    """Data that are not there at all: a root, its folders, a list or an annotation."""


class Undecodable(UserError):
    """An image, audio or mask file that cannot be decoded; the message names the file."""


class Unwritable(UserError):
    """A file that cannot be written, whatever is to be in it: the disk is full, or may only be read."""


# ---------------------------------------------------------------- command line

SHARED_MEMORY = "/dev/shm"
_SMALLER = "a smaller --batch_size"
RAN_OUT = (  # how the error reads, what ran out, what helps
    (
        r"unable to allocate shared memory[^<\n]*|Bus error",
        "{shm} is too small for the batches of the data-loading workers",
        f"enlarge it (docker run --shm-size 8g), or --num_workers 0, or {_SMALLER}",
    ),
    (
        r"Too many open files|received 0 items of ancdata",
        "this process may not open more files",
        "ulimit -n 65536, or fewer --num_workers",
    ),
    (
        r"CUDA out of memory[^.]*|OutOfMemoryError[^.\n]*|CUBLAS_STATUS_ALLOC_FAILED",
        "the GPU has too little memory",
        f"{_SMALLER}, in training --micro_batch 32, which keeps the batch of the losses",
    ),
    (
        r"DataLoader worker \(pid[^:.]*is killed by signal: \w+",
        "a data-loading worker was ended from outside, as a machine does that has no memory left",
        f"fewer --num_workers, or --num_workers 0, or {_SMALLER}",
    ),
    (
        r"DataLoader worker \(pid[^:.]*exited unexpectedly[^.\n]*",
        "a data-loading worker ended, as when memory runs out or {shm} is too small",
        f"enlarge it (docker run --shm-size 8g), or --num_workers 0, or {_SMALLER}",
    ),
    (
        r"(MemoryError|DefaultCPUAllocator|Cannot allocate memory)[^.\n]*",
        "this machine has too little memory",
        f"{_SMALLER}, fewer --num_workers, in training --micro_batch 32",
    ),
)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a flag's help, unless it is None, False or (), or the help mentions it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default in (None, ()) or action.default is False or "default" in (action.help or "")
        return action.help if silent else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse that answers a wrong flag with one line, which says the likely one, and takes no abbreviated names.

    instead: {flag that is none: what to write for it}.
    """

    def __init__(self, **kwargs: Any) -> None:
        self.instead: dict[str, str] = {}
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: --"):
            flag = re.split(r"[\s=]", message.partition(": ")[2])[0]
            for near in difflib.get_close_matches(flag, [*self.instead, *self._option_string_actions], n=1):
                message += f": did you mean {self.instead.get(near, near)}?"
        self.exit(2, f"{self.prog}: error: {message} (--help lists every flag)\n")


def run_cli(main: Callable[[], None]) -> None:
    """Run a script's main; a UserError, a file or folder that cannot be used, or a machine that runs out of something
    becomes one line and exit status 2.

    A warning is one line, too. Other errors are the code's, and show their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    sys.unraisablehook = _unless_told
    try:
        main()
    except UserError as error:
        last_line = str(error).strip().splitlines()[-1]  # a data-loading worker puts its traceback in front
        sys.exit(_fail(re.sub(r"^utils\.\w+: ", "", last_line), 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted; what was finished is kept", 130))
    except (OSError, RuntimeError, MemoryError, EOFError) as error:
        try:
            remedy = what_ran_out(error)
        except RuntimeError as later:  # PyTorch tells the end of a worker from a signal handler, at any time
            remedy = what_ran_out(later)
        if remedy:
            sys.exit(_fail(remedy, 2))
        if not isinstance(error, OSError):
            raise
        sys.exit(_fail(f"{error.filename}: {error.strerror}" if error.filename else str(error).splitlines()[-1], 2))


def _unless_told(unraisable: Any) -> None:
    """PyTorch tells the end of a worker from a signal handler: lost where that strikes within a destructor, and told
    again by the loader."""
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and what_ran_out(error)):
        sys.__unraisablehook__(unraisable)


def _fail(message: str, status: int) -> int:
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    return status


def what_ran_out(error: BaseException) -> str | None:
    """What the machine lacked and what helps, in one line; None for an error that says nothing of the kind."""
    text = f"{type(error).__name__}: {error}"
    files = [Path(frame.f_code.co_filename).name for frame, _ in traceback.walk_tb(error.__traceback__)]
    if "resource_sharer.py" in files:  # whoever held the batch is gone
        text = "DataLoader worker (pid unknown) exited unexpectedly"
    for pattern, what, helps in RAN_OUT:
        if found := re.search(pattern, text):
            return f"{what.format(shm=_size_of(SHARED_MEMORY))} ({found[0].strip()}): {helps}"
    return None


def lacking_shared_memory(needed: int) -> str | None:
    """Where less than `needed` bytes of /dev/shm are free: one line that says so, and what helps."""
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return None
    _, what, helps = RAN_OUT[0]
    need = f"they need {needed / 2**20:.1f} MiB, and {free / 2**20:.1f} MiB are free"
    return f"{what.format(shm=_size_of(SHARED_MEMORY))} ({need}): {helps}" if needed > free else None


def _size_of(folder: str) -> str:
    try:
        return f"{folder}, {shutil.disk_usage(folder).total / 2**20:.0f} MiB,"
    except OSError:
        return folder


def end_workers() -> None:
    """Kill this process's data-loading workers: at exit they would be waited for, for ever as they ignore SIGTERM."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler reports a worker that is killed as an error
    for worker in multiprocessing.active_children():
        worker.kill()


@contextmanager
def as_user_error(*errors: type[Exception], kind: type[UserError] = UserError):
    """Turn errors whose message already names the file and the remedy into a UserError."""
    try:
        yield
    except errors as error:
        raise kind(" ".join(str(error).split())) from error


def number(kind: type, low: float = -math.inf, high: float = math.inf, above: float = -math.inf) -> Callable:
    """An argparse type: a finite int or float with low <= value <= high and above < value."""
    words = {"at least": low, "at most": high, "above": above}
    bounds = [f"{word} {bound}" for word, bound in words.items() if math.isfinite(bound)]
    wanted = " ".join(["a whole number" if kind is int else "a number", " and ".join(bounds)]).strip()

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high and above < value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


def boolean(text: str) -> bool:
    """An argparse type: true or false, nothing else."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text == "true"


def add_boolean(group, flag: str, help: str, default: bool | None = False) -> None:
    """Add a flag that takes true or false to an argument parser or a group of one; the bare flag means true."""
    help += " (default: true)" if default else ""
    group.add_argument(flag, type=boolean, nargs="?", const=True, default=default, metavar="true|false", help=help)


def add_workers(group) -> None:
    """The flag --num_workers of an argument parser or a group of one."""
    shared = "data-loading workers per process (default: the cores of this machine, shared by its processes)"
    group.add_argument("--num_workers", type=number(int, low=0), default=cores_per_process(), help=shared)


# ---------------------------------------------------------------- device, seeds, provenance


def cores_per_process() -> int:
    """The cores that this process may use, shared by those that torchrun started on this machine; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def pick_device(gpu: str) -> torch.device:
    """ "cpu" or the number of a CUDA device -> device. Raises UserError for a device that is not there."""
    if gpu == "cpu":
        return torch.device("cpu")
    if not gpu.isdigit():
        raise UserError(f"--gpu {gpu}: give a number or cpu")
    if not torch.cuda.is_available():
        raise UserError(f"--gpu {gpu}: this machine offers no CUDA device to PyTorch; use --gpu cpu")
    if int(gpu) >= torch.cuda.device_count():
        raise UserError(f"--gpu {gpu}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return torch.device("cuda", int(gpu))


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 autocast gains speed: what the hardware has decides, no clock, so that numbers repeat."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


@contextmanager
def full_precision():
    """No TF32 on CUDA devices while the block runs, though cuDNN takes it by default: numbers are those of fp32."""
    backends = torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before, benchmark = [backend.fp32_precision for backend in backends], torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.benchmark = False  # the same algorithm in every run
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def evaluation_mode(module: torch.nn.Module):
    """The module is in evaluation mode while the block runs, and then in the mode that it had."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that PyTorch held on a CUDA device, or that this process held at all on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count the parent's memory, too
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def available_memory() -> int:
    """Bytes of memory that this process may still take: what is free, or less where a control group limits it."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", meminfo)[1])
    except (OSError, TypeError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min([free, *_left_in_control_groups()])


def _left_in_control_groups(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What is left of each memory limit that this process or a group above it has, in versions 1 and 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    places = [(root, line[3:], "memory.max", "memory.current") for line in lines if line.startswith("0::")]
    places += [
        (root / "memory", line.split(":", 2)[2], "memory.limit_in_bytes", "memory.usage_in_bytes")
        for line in lines
        if "memory" in line.split(":")[1].split(",")
    ]
    left = []
    for base, group, limit, usage in places:
        own = Path(group.lstrip("/"))
        for folder in (own, *own.parents):  # in a container the whole path may be hidden, and its own group the root
            try:
                left.append(int((base / folder / limit).read_text()) - int((base / folder / usage).read_text()))
            except (OSError, ValueError):  # not there, or "max"
                continue
    return [max(amount, 0) for amount in left]


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """State of the generator that training draws from, PyTorch's on the CPU, as `weights_only` loading allows it."""
    return {"torch": torch.get_rng_state()}


def restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])


def provenance() -> dict[str, str]:
    """Revision of this checkout and versions of what computes the numbers."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown (not a git checkout)"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"revision": revision} | versions


# ---------------------------------------------------------------- files


def cut_to_bytes(name: str, count: int) -> str:
    """The beginning of a file's name that takes at most `count` bytes; no letter is cut in two."""
    return os.fsencode(name)[:count].decode("utf-8", "ignore") or "file"


def printable(name: str | Path) -> str:
    r"""A file's name, or a text with such names, as UTF-8 can hold it: bytes that are none are shown as \udcNN."""
    return str(name).encode("utf-8", "backslashreplace").decode()


@contextmanager
def atomic_path(path: str | Path):
    """Yield a temporary path beside `path` that replaces it when the block ends without an error.

    Unwritable where it cannot be written: a full disk, a folder that may only be read.
    """
    path = Path(path)
    name = path.with_name(f".{cut_to_bytes(path.stem, 100)}.{secrets.token_hex(4)}{path.suffix}")
    try:
        with writing(path, name):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less what the umask takes away
            yield name
            os.replace(name, path)
    finally:
        with suppress(OSError):
            name.unlink(missing_ok=True)


REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)  # of a disk or folder


@contextmanager
def writing(path: str | Path, draft: str | Path | None = None):
    """Turn an error of the disk in a block that writes `path` into an Unwritable that names it and the reason.

    draft: the name under which it is written. What another file would not meet, such as a name that is too long, is a
    plain UserError.
    """
    path, draft = Path(path), Path(draft or path)
    try:
        yield
    except OSError as error:
        if error.filename not in (None, draft, *map(str, (draft, path, path.parent))):
            raise  # of another file
        kept = "; the one before is kept" if path.is_file() and draft != path else ""
        kind = Unwritable if error.errno in REFUSALS else UserError
        raise kind(f"{path} cannot be written ({error.strerror or error}){kept}") from error


class Contents(str):
    """The name of a file that is no file of its own, as messages show it, and its `content`: a member of a shard."""

    content: bytes | memoryview

    def __new__(cls, name: str, content: bytes | memoryview) -> "Contents":
        own = super().__new__(cls, name)
        own.content = content
        return own


def as_file(path: str | Path) -> str | Path | io.BytesIO:
    """What libraries open: the path, or the content that it brings."""
    return io.BytesIO(path.content) if isinstance(path, Contents) else path


@contextmanager
def on_disk(path: str | Path) -> Iterator[str | Path]:
    """A path at which also what opens nothing but paths finds the content while the block lasts."""
    if not isinstance(path, Contents):
        yield path
        return
    file = os.memfd_create("contents", os.MFD_CLOEXEC)
    try:
        os.pwrite(file, path.content, 0)
        yield f"/proc/self/fd/{file}"
    finally:
        os.close(file)


def check_writable(folder: str | Path) -> None:
    """Before long work: Unwritable where no file can be made in the folder, or where it would be made."""
    there = next(path for path in (Path(folder), *Path(folder).absolute().parents) if os.path.lexists(path))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise Unwritable(f"{folder} cannot be written into ({error.strerror or error})") from error


def reserve(path: str | Path, size: int) -> None:
    """Make a file at least so many bytes long, on the disk, too. Unwritable where there is no room.

    A file that only claims its length ends the process when it is written to through memory and the disk is full.
    """
    with writing(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, size)
            elif os.fstat(file).st_size < size:
                os.truncate(file, size)
        finally:
            os.close(file)


def cache_folder(kind: str) -> Path:
    """The folder of what can be computed again, made where it is not there: `CACHE_ROOT`, else cache/, by kind.

    Kinds: decoded (pairs, for one run), features (of frozen encoders, for all). Whatever is in it may be deleted while
    no run uses it.
    """
    folder = Path(os.environ.get("CACHE_ROOT") or "cache") / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_text(path: str | Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_together(texts: Mapping[str | Path, str]) -> None:
    """Write files that belong together: where one of them cannot be written, all stay as they were."""
    with ExitStack() as stack:
        for path, text in texts.items():
            stack.enter_context(atomic_path(path)).write_text(text, encoding="utf-8")


def strict_json(value: Any, indent: int | None = None) -> str:
    """JSON that every parser reads: numbers that are not finite become null."""
    return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def json_text(value: Any) -> str:
    """Indented, but a list of numbers stays on one line."""
    text = strict_json(value, indent=2)
    return re.sub(r"\[\n([\s\d.,eE+\-null]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def write_json(path: str | Path, value: Any) -> None:
    """`json_text` into a file."""
    write_text(path, json_text(value))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def remove_unfinished(folder: Path) -> None:
    """Remove files that a killed process left half written by `atomic_path` in its run's folder."""
    for path in folder.glob(".*.*"):
        if path.is_file():
            path.unlink()


def save_checkpoint(path: str | Path, state: dict[str, Any], also: Iterable[str | Path] = ()) -> None:
    """Write a checkpoint so that a kill or a full disk never leaves a broken file in place of a good one.

    also: further names of the same file, in the same folder; they are there before `path` is. They are hard links, and
    copies where the file system has none. Raises UserError when it cannot be written, saying that the old one is kept.
    """
    try:
        with atomic_path(path) as temporary:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            for name in also:
                _link(temporary, Path(name))
    except RuntimeError as error:  # torch.save reports some errors of the disk so
        first = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = (getattr(first, "strerror", None) or str(first).strip() or type(first).__name__).splitlines()[0]
        kept = "; the one before is kept" if Path(path).exists() else ""
        raise Unwritable(f"the checkpoint {path} cannot be written ({reason}){kept}") from error


def _link(path: Path, name: Path) -> None:
    """Make `name` another name of the file at `path`, or a copy of it; what had the name before is replaced."""
    with atomic_path(name) as temporary:
        try:
            temporary.unlink()
            os.link(path, temporary)
        except OSError:
            with open(path, "rb") as source, open(temporary, "wb") as target:
                shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())


SAFETENSORS = ".safetensors"

# NumPy scalars (a best score, as released checkpoints carry) are data, not code, under their old and new module names.
SAFE_GLOBALS = [
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
    type(np.dtype(np.int64)),
    codecs.encode,
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
]


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU with `weights_only=True`. Raises UserError when there is none or it is broken."""
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint file {path}{_beside(Path(path))}")
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (LookupError, AttributeError, TypeError, EOFError, UnpicklingError) as error:
        if isinstance(error, UnpicklingError) and zipfile.is_zipfile(path):
            raise UserError(f"{path} holds more than weights and plain values: such a file is not loaded") from error
        raise UserError(f"{path} is not a PyTorch checkpoint, or a damaged one") from error
    except (RuntimeError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the checkpoint {path} cannot be read ({reason}): damaged, or not PyTorch's") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path} is not a checkpoint of this project: it must be a dict with `model`")
    return state


def _beside(path: Path) -> str:
    """The newest checkpoints that a wrong path may mean: in it, in its folder, or of other runs."""
    name = glob.escape(path.name)
    found = [*path.glob("*.pth")] or [*path.parent.glob("*.pth")] or [*path.parent.parent.glob(f"*/{name}")]
    newest = sorted((file for file in found if file.is_file()), key=os.path.getmtime, reverse=True)
    return "; there are " + ", ".join(map(str, newest[:5])) if newest else ""


def is_safetensors(path: str | Path) -> bool:
    """Whether a file is to be read as safetensors: by its name, or by its first bytes, a length and then JSON."""
    path = Path(path)
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return path.suffix == SAFETENSORS or file.read(9)[8:] == b"{"


SHOWN_KEYS = 8


def check_weights(weights: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], path: str | Path) -> None:
    """Raise UserError unless both state dicts have the same keys and shapes, listing what differs."""
    shapes = {key: tuple(getattr(value, "shape", ())) for key, value in weights.items()}
    wanted_shapes = {key: tuple(value.shape) for key, value in wanted.items()}
    problems = [
        ("missing", sorted(wanted_shapes.keys() - shapes.keys())),
        ("unexpected", sorted(shapes.keys() - wanted_shapes.keys())),
        (
            "of another shape",
            [
                _shapes(k, shapes[k], wanted_shapes[k])
                for k in shapes
                if k in wanted_shapes and shapes[k] != wanted_shapes[k]
            ],
        ),
    ]
    if any(keys for _, keys in problems):
        listed = "; ".join(
            f"{len(keys)} {what}: {', '.join(keys[:SHOWN_KEYS])}{', ...' if len(keys) > SHOWN_KEYS else ''}"
            for what, keys in problems
            if keys
        )
        raise UserError(f"the weights in {path} do not fit the model: {listed}")


def _shapes(key: str, found: Iterable[int], wanted: Iterable[int]) -> str:
    return f"{key} {tuple(found)} instead of {tuple(wanted)}"
