"""Decoders in processes of their own, with limits on time and memory: a bad file costs that file only."""

import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

CLIP_TIMEOUT = 600  # s of work on one file before its process is given up
MEMORY = 4 * 2**30  # bytes that a process may take beside what it starts with
STOPS = (signal.SIGINT, signal.SIGTERM)


class Lost(Exception):
    """Why a process gave no answer: hang, crash."""


class Broken(Exception):
    """The processes cannot be kept running."""


def run_all(tasks: Sequence[Any], workers: int, work: Callable[[Any], Any]) -> Iterator[tuple[Any, Any]]:
    """Each task with what `work` returned, or with a Lost or Broken that says why it did not, as they come.

    The task that a result names as `unfinished` joins the line.
    """
    waiting = list(tasks)[::-1]
    pool = ProcessPool(workers, initializer=_limit)
    try:
        with _stops_blocked():  # a worker starts with them blocked, until it knows what to do on them
            first = [waiting.pop() for _ in range(min(workers, len(waiting)))]
            running = {pool.schedule(work, [task], timeout=CLIP_TIMEOUT): task for task in first}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, result = running.pop(future), _result_of(future)
                if getattr(result, "unfinished", None):
                    waiting.insert(0, result.unfinished)
                yield task, result
                if waiting:
                    task = waiting.pop()
                    running[pool.schedule(work, [task], timeout=CLIP_TIMEOUT)] = task
    finally:
        pool.stop()
        pool.join()


def _limit() -> None:
    """Of what a process writes to: each thread of each core reserves addresses besides, which take no memory."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    pages = Path("/proc/self/statm")
    if pages.is_file():
        data = int(pages.read_text().split()[5])
        most = data * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


@contextmanager
def _stops_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _result_of(future: ProcessFuture) -> Any:
    try:
        return future.result()
    except TimeoutError:
        return Lost(f"hang: not done after {CLIP_TIMEOUT} s")
    except ProcessExpired as error:
        return Lost(f"crash: the process ended with status {error.exitcode}")
    except BrokenProcessPool as error:
        return Broken(f"the processes cannot be kept running ({error}): the same command goes on")
    except Exception as error:  # whatever else a decoder raises
        return Lost(f"crash: {' '.join(repr(error).split())}")
