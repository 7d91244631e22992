"""What every part of experiments.benchmark times with: figures beside a baseline, in turns, within one run."""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import torch
from tabulate import tabulate
from tqdm import tqdm

from utils import number


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


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread, as in a loader's worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def add_rounds(parser, default: int = 5) -> None:
    parser.add_argument(
        "--rounds",
        type=number(int, low=1),
        default=default,
        help="how often our code and the baseline are each timed",
    )


def results_table(timings: Sequence[Mapping[str, str | float | None]]) -> str:
    rows = [[line["name"], line["value"], line["unit"], line["baseline"], line["ratio"]] for line in timings]
    heads = ("", "ours", "", "baseline", "ratio")
    return tabulate(rows, heads, tablefmt="simple", floatfmt=".3g", missingval="-")
