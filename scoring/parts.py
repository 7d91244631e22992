"""Work in parts: a CPU's cores share the samples of a batch, a CUDA device takes them whole.

B samples of a batch.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

PART = 8  # samples whose enlarged maps are scored at once: more would leave the processor's cache
Result = TypeVar("Result")


def in_parts(work: Callable[[slice], Result], count: int) -> Iterator[Result]:
    """work(slice of PART samples) for all of `count`, in order; parts run in parallel, each on one core."""
    slices = [slice(start, start + PART) for start in range(0, count, PART)]
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(work, slices)
    torch.set_num_threads(threads)  # what a thread of the pool sets is the default of threads to come


def on_device(work: Callable[..., Result], device: torch.device, *inputs: torch.Tensor) -> Iterator[Result]:
    """work(*inputs) without gradient: of the whole batch on a CUDA device, on a CPU in parts, one core each.

    So the numbers of a CPU do not depend on how many cores it has.
    """

    @torch.no_grad()
    def run(rows: slice) -> Result:
        return work(*(x[rows].to(device, non_blocking=True) for x in inputs))

    count = len(inputs[0])
    return in_parts(run, count) if device.type == "cpu" else iter([run(slice(count))])
