"""Working through images and films: what is done already, several processes, what failed and why."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context
from typing import Any, NamedTuple

import pooch
import torch
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

import media
from film.inputs import Task
from film.localizer import Localizer
from film.render import Look, Outputs, render_clip, render_image
from film.tables import MADE_BY, read_about
from media import MediaError
from utils import Unwritable, UserError, write_json


class Settings(NamedTuple):
    """How all inputs are asked and drawn."""

    checkpoint: str
    device: str
    window: float | None
    map_fps: float
    look: Look

    def localizer(self) -> Localizer:
        return Localizer(self.checkpoint, self.device, self.window, self.map_fps)


class Outcome(NamedTuple):
    reason: str = ""  # why nothing was made of it; "" where something was
    complete: bool = True  # False of a film that ends where the run was interrupted


def describe_settings(settings: Settings, localizer: Localizer) -> dict[str, Any]:
    """What the files of two runs must share to be of one run."""
    return {
        "made_by": MADE_BY,
        "checkpoint": settings.checkpoint,
        "checkpoint_sha256": pooch.file_hash(settings.checkpoint),
        "window": localizer.window,
        "map_fps": settings.map_fps,
        "show": settings.look.show,
        "mask": settings.look.mask,
        "threshold": localizer.threshold,
    }


# ---------------------------------------------------------------- one input


def about_task(task: Task, described: Mapping[str, Any]) -> dict[str, Any]:
    """The head of a task's JSON: by which the same command later knows that it is done."""
    files = {"source": task.source} | ({"sound": task.sound} if task.sound else {})
    marks = {name: [str(path), path.stat().st_size, path.stat().st_mtime_ns] for name, path in files.items()}
    return {**described, **{name: mark[0] for name, mark in marks.items()}, "files": marks}


def is_done(task: Task, described: Mapping[str, Any]) -> bool:
    """Whether an earlier run finished this task with the same settings, and nothing changed since."""
    there = read_about(Outputs(task.stem).file(".json"))
    try:
        wanted = about_task(task, described)
    except OSError:
        return False
    return bool(there and there.get("complete")) and all(there.get(name) == value for name, value in wanted.items())


def run_task(
    task: Task,
    localizer: Localizer,
    look: Look,
    described: Mapping[str, Any],
    stopped: Callable[[], bool] = lambda: False,
    hide_bar: bool | None = True,
) -> Outcome:
    """Make the files of one input. Whatever is wrong with it is an outcome, and none of its files are left.

    Unwritable where the disk takes no more: the other inputs would end alike.
    """
    outputs = Outputs(task.stem)
    try:
        about = about_task(task, described)
        claim(task, about)
    except Unwritable:
        raise
    except (UserError, OSError) as error:
        return Outcome(_reason(error, task))
    try:
        with media.open(task.source) as file:
            is_image = file.has_image and file.is_still and not file.has_sound
        if not is_image:
            return Outcome(
                complete=render_clip(localizer, task.source, task.sound, outputs, look, about, stopped, hide_bar)
            )
        if not task.sound:
            raise MediaError(task.source, "an image without a sound: --sound FILE, or a sound of its name beside it")
        render_image(localizer, task.source, task.sound, outputs, look, about)
        return Outcome()
    except Exception as error:  # whatever a decoder raises: the other inputs go on
        clear(task)
        if isinstance(error, Unwritable):
            raise
        return Outcome(_reason(error, task))


def claim(task: Task, about: Mapping[str, Any]) -> None:
    """Take the names of a task's files, removing what an earlier run made. UserError where others' files are there."""
    outputs = Outputs(task.stem)
    task.stem.parent.mkdir(parents=True, exist_ok=True)
    there = [path for path in task.files() if path.exists()]
    mark = read_about(outputs.file(".json")) or {}
    if there and mark.get("made_by") != MADE_BY:
        raise UserError(f"{there[0]} is there and was not made by {MADE_BY}: choose another --out")
    clear(task)
    write_json(outputs.file(".json"), {"about": dict(about), "steps": [], "complete": False})


def clear(task: Task) -> None:
    for path in task.files():
        path.unlink(missing_ok=True)


def _reason(error: Exception, task: Task) -> str:
    if isinstance(error, MediaError) and str(error.args[0]) == str(task.source):
        return error.reason
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        return error.strerror if str(error.filename) == str(task.source) else f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# ---------------------------------------------------------------- all of them


class Stop:
    """Set by the first SIGINT or SIGTERM; a second SIGINT interrupts at once. Processes of a pool share `event`."""

    def __init__(self, event: Any = None) -> None:
        self.event = event or threading.Event()

    def is_set(self) -> bool:
        return self.event.is_set()

    def _set(self, number: int, _: Any) -> None:
        if self.event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.event.set()

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        before = {number: signal.signal(number, self._set) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_all(
    tasks: Sequence[Task], settings: Settings, localizer: Localizer, described: Mapping[str, Any], workers: int
) -> Iterator[tuple[Task, Outcome]]:
    """Each task with its outcome, as they come; KeyboardInterrupt after those that were under way are finished."""
    workers = min(workers, len(tasks))
    if workers < 2:
        with Stop().listening() as stop:
            bar = tqdm(tasks, unit="file", disable=True if len(tasks) < 2 else None)
            for task in bar:
                yield task, run_task(task, localizer, settings.look, described, stop.is_set, hide_bar=None)
                if stop.is_set():
                    raise KeyboardInterrupt
    else:
        yield from _run_in_processes(tasks, settings, described, workers)


def _run_in_processes(
    tasks: Sequence[Task], settings: Settings, described: Mapping[str, Any], workers: int
) -> Iterator[tuple[Task, Outcome]]:
    context, waiting = get_context("spawn"), iter(tasks)  # a fork would share locks that torch's threads hold
    stop = Stop(context.Event())
    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPool(
        workers, initializer=_start_worker, initargs=(settings, dict(described), threads, stop.event), context=context
    )
    try:
        with stop.listening(), tqdm(total=len(tasks), unit="file", disable=None) as bar:
            running = {pool.schedule(_work, [task]): task for task in islice(waiting, workers)}
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    yield task, _outcome_of(future, task)
                    bar.update()
                    for following in islice(waiting, 0 if stop.is_set() else 1):
                        running[pool.schedule(_work, [following])] = following
        if stop.is_set():
            raise KeyboardInterrupt
    finally:
        pool.stop()
        pool.join()


def _outcome_of(future, task: Task) -> Outcome:
    try:
        return future.result()
    except ProcessExpired as error:
        clear(task)
        return Outcome(f"crash: the process ended with status {error.exitcode}")


_worker: dict[str, Any] = {}  # of a process of the pool: what all of its tasks share


def _start_worker(settings: Settings, described: dict[str, Any], threads: int, event: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process tells when to stop
    torch.set_num_threads(threads)
    _worker.update(localizer=settings.localizer(), look=settings.look, described=described, stopped=event.is_set)


def _work(task: Task) -> Outcome:
    return run_task(task, **_worker)
