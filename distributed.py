"""Several processes on one global batch, started by torchrun: rank, device, and communication between them.

With a single process all of it works as well and does nothing. W processes, B rows of the global batch.
"""

import atexit
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather

from utils import UserError, end_workers, pick_device

PATIENCE = timedelta(hours=1)  # how long the others wait while the first process scores and writes
WATCH_SECONDS = 1.0  # between two looks at the other processes
OTHER_FAILED = "another process of this run failed, so this one ends, too"


def under_torchrun() -> bool:
    """Whether torchrun started this process, alone or as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def own_device(gpu: str) -> torch.device:
    """ "cpu" or the number of a CUDA device -> device; under torchrun each process takes that of its own number."""
    device = pick_device(os.environ["LOCAL_RANK"] if under_torchrun() and gpu != "cpu" else gpu)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else pinned memory and collectives open every process's context on device 0
    return device


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """True on the one process that writes and prints."""
    return rank() == 0


def hidden_bar() -> bool | None:
    """Value for tqdm's `disable`: only the first process shows a bar, and only on a terminal."""
    return None if is_main() else True


@contextmanager
def process_group(device: torch.device):
    """Join the other processes, by nccl on CUDA devices, by gloo on CPUs. From then on only the first one prints.

    Where one of them fails or is killed, the others end within seconds, too, whatever they are waiting for.
    """
    if not under_torchrun():
        yield
        return
    backend, others = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", OtherProcesses()
    dist.init_process_group(backend, timeout=PATIENCE)
    others.meet()
    if not is_main():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        yield
    except BaseException as error:
        atexit.register(leave_at_once)  # after the message, and before what would wait for the others
        if isinstance(error, RuntimeError):  # perhaps a collective that lost a partner, which is about to be gone
            time.sleep(WATCH_SECONDS)
        lost = isinstance(error, RuntimeError) and others.have_failed()
        others.tell_of_failure()
        if lost:
            raise UserError(OTHER_FAILED) from None
        raise
    others.ended.set()
    barrier()
    dist.destroy_process_group()


class OtherProcesses(threading.Thread):
    """Watches the processes of the run, and ends this one where another failed (any node) or is gone (this node).

    A process that waits in a collective does not return to Python before PATIENCE, and torchrun's SIGTERM, which also
    says that a scheduler wants the run to stop, does not tell it why.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.parent, self.siblings, self.ended = os.getppid(), [], threading.Event()
        self.store: dist.Store | None = None
        self.start()

    def meet(self) -> None:
        """Once the group exists: find out which processes to watch, and where failures are told."""
        server = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        self.store = dist.PrefixStore(f"failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", server)
        self.siblings = [pid for pid in all_gather_object(os.getpid()) if self.is_alive(pid)]
        barrier()  # nobody leaves before all have looked

    def run(self) -> None:
        while not self.ended.wait(WATCH_SECONDS):
            if self.have_failed():
                self.tell_of_failure()  # to the other nodes
                if not self.ended.wait(2 * WATCH_SECONDS):  # for the message of this process, if it failed as well
                    print(f"error: {OTHER_FAILED}", file=sys.stderr, flush=True)
                    leave_at_once()

    def have_failed(self) -> bool:
        if os.getppid() != self.parent or not all(map(self.is_alive, self.siblings)):
            return True
        try:
            return self.store is not None and self.store.check(["failed"])
        except RuntimeError:  # the process that holds the store is gone
            return True

    def is_alive(self, pid: int) -> bool:
        """Whether the process runs as a child of the same torchrun; one on another node is not found."""
        try:
            state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            return False
        return state not in "ZX" and int(parent) == self.parent

    def tell_of_failure(self) -> None:
        with suppress(RuntimeError):  # where nobody is left who could read it
            if self.store is not None:
                self.store.set("failed", "")


def leave_at_once() -> None:
    """End this process with status 1, without waiting for workers, threads or collectives."""
    with suppress(OSError):
        sys.stdout.flush()
    end_workers()
    os._exit(1)


# ---------------------------------------------------------------- rows of a batch


def local_slice(total: int) -> slice:
    """The rows of a batch of `total` that are this process's; the processes share it evenly."""
    each = total // world_size()
    return slice(rank() * each, (rank() + 1) * each)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """This process's rows of a batch, (b, ...) -> those of all processes in their order, (world_size * b, ...).

    With gradient: the gradients of all processes' losses at our rows are summed; the mean over processes that
    DistributedDataParallel takes then makes this the gradient of one loss over the global batch.
    """
    if world_size() == 1:
        return rows
    whole = torch.cat(all_gather(rows))
    if whole.requires_grad:  # the backward of all_gather mixes up the values of a gradient stored by columns
        whole.register_hook(torch.Tensor.contiguous)
    return whole


# ---------------------------------------------------------------- numbers and objects


def average(values: torch.Tensor) -> torch.Tensor:
    """Mean over the processes of a tensor that each of them holds, and that may be changed."""
    if world_size() > 1:
        dist.all_reduce(values)
        values = values / world_size()
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process."""
    return bool(average(torch.tensor(float(flag), device=device)) > 0) if world_size() > 1 else flag


def broadcast_buffers(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite the tensors with the first process's: batch-norm statistics follow each process's own rows."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_gather_object(value: Any) -> list[Any]:
    """Every process's value, in their order, on every process."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def shard(items: Sequence) -> Sequence:
    """This process's share of the items: process r takes r, r + W, r + 2 W, ..."""
    return items[rank() :: world_size()]


def gather_in_order(own: Iterable, count: int) -> Iterator:
    """Each process's results for its `shard` of `count` items -> on the first process all in order, elsewhere none.

    Every process has to iterate over it.
    """
    own = iter(own)
    for start in range(0, count, world_size()):
        item = next(own, None)
        received = [item] * world_size() if is_main() else None
        if world_size() > 1:
            dist.gather_object(item, received)
        yield from (received or [])[: count - start]
