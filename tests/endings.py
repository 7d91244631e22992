"""Programs that end badly: `python endings.py FOLDER` for the cases of one process, under torchrun for several."""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils.data import Dataset

from dataset import make_loader
from distributed import barrier, process_group, rank, under_torchrun
from utils import UserError, run_cli

SECONDS = 300  # a program that takes longer counts as one that never ends; most of them are for a busy machine
MESSAGES = {  # case: what the one line names
    "of the run": ["--micro_batch", "--batch_size", "CUDA out of memory"],
    "of a killed worker": ["a data-loading worker", "--num_workers 0", "--batch_size"],
    "of a batch that cannot be sent": ["/dev/shm", "--shm-size", "--num_workers 0"],
}


class Numbers(Dataset):
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        return index


class Unsendable:
    def __reduce__(self):
        raise RuntimeError("no space")


def unsendable(_):
    return Unsendable()


def load(case: str) -> None:
    """Data-loading workers at work, and an error."""
    loader = make_loader(Numbers(), 2, 2).batches
    if case == "of a batch that cannot be sent":
        loader.collate_fn = unsendable
    batches = iter(loader)
    next(batches)
    if case == "of a killed worker":
        os.kill(batches._workers[0].pid, signal.SIGKILL)
        for _ in batches:
            time.sleep(0.1)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB")


def as_one_of_several() -> None:
    """First one process fails while the other computes, then one is killed while the other waits."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a run does, which finishes its step
    with process_group(torch.device("cpu")):
        if attempt == 0 and rank() == 1:
            raise UserError("this is the first cause")
        if attempt == 1 and rank() == 0:
            print("started again", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if attempt == 0:
            time.sleep(10 * SECONDS)
        barrier()
        raise AssertionError("the other process was to be gone")


def try_each(folder: Path) -> None:
    """Every case in a process of its own, which saves their imports; its messages and its status go into folder."""
    children = {}
    for case in MESSAGES:
        if not (pid := os.fork()):
            os.dup2(os.open(folder / case, os.O_CREAT | os.O_WRONLY), 2)
            sys.argv = ["endings.py"]
            run_cli(partial(load, case))
            sys.exit(0)  # not reached
        children[pid] = case
    while children:
        pid, status = os.wait()
        (folder / f"{children.pop(pid)}.status").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    if under_torchrun():
        run_cli(as_one_of_several)
    else:
        try_each(Path(sys.argv[1]))
