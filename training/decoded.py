"""Pairs decoded once: what their files hold, kept for the later epochs of a run.

The first worker that needs a pair decodes it and keeps it where every worker of this process finds it: in memory, or in
a file that disappears with the run. What is drawn at random comes after, so no number depends on what is kept.
"""

import fcntl
import mmap
import os
import pickle
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset import Decoded, DecodedPairs
from utils import Undecodable, available_memory, cache_folder

SHARES = {"auto": 0.25, "memory": 0.5, "disk": 0.5}  # of what is free at the place: so much may be taken
PROBED = 16  # pairs from whose size the set's is estimated
MARGIN = 1.1  # of that estimate


class Store:
    """Decoded pairs by index, in a file that has no name; processes forked after it was made share them.

    capacity: bytes; a pair that does not fit any more is not kept.
    """

    def __init__(self, pairs: int, capacity: int, folder: Path | None = None) -> None:
        """folder: of the file; None: in memory, which does not count against /dev/shm."""
        self.capacity = capacity
        self.file = os.memfd_create("decoded") if folder is None else _file_without_name(folder)
        table = np.frombuffer(mmap.mmap(-1, 8 * (2 * pairs + 1)), np.int64)  # shared, and 0
        self.used, self.start, self.length = table[:1], table[1 : 1 + pairs], table[1 + pairs :]

    def __del__(self) -> None:
        os.close(self.file)

    def get(self, index: int) -> Decoded | None:
        length = int(self.length[index])
        return pickle.loads(os.pread(self.file, length, int(self.start[index]))) if length else None

    def put(self, index: int, decoded: Decoded) -> None:
        content = pickle.dumps(decoded, protocol=5)
        start = self._reserve(len(content))
        if start is None or not self._write(content, start):
            return
        self.start[index] = start
        self.length[index] = len(content)  # last: the pair is there

    def _reserve(self, size: int) -> int | None:
        fcntl.lockf(self.file, fcntl.LOCK_EX)  # a killed process lets go of it
        try:
            start = int(self.used[0])
            if start + size > self.capacity:
                return None
            self.used[0] = start + size
            return start
        finally:
            fcntl.lockf(self.file, fcntl.LOCK_UN)

    def _write(self, content: bytes, start: int) -> bool:
        try:
            return os.pwrite(self.file, content, start) == len(content)
        except OSError:  # the disk is full
            return False


def _file_without_name(folder: Path) -> int:
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno())


def keep_decoded(sets: Sequence[DecodedPairs], place: str) -> str:
    """Give each set a store, which the loaders made afterwards share -> a line that says so.

    place: auto (in memory, if the sets fit into their share of what is free), memory, disk or false. Where memory or
    disk was asked for and holds less than the sets need, as many pairs are kept as fit.
    """
    sets = [pairs for pairs in sets if len(pairs)]
    if place == "false" or not sets:
        return "every pair is decoded in every epoch"
    needed = [bytes_needed(pairs) for pairs in sets]
    folder = cache_folder("decoded") if place == "disk" else None
    free = shutil.disk_usage(folder).free if folder else available_memory()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each of them on this machine keeps pairs of its own
    room = SHARES[place] * free / processes
    fits = min(1.0, room / max(sum(needed), 1))
    sizes = f"{sum(needed) / 2**30:.2f} GiB, of {room / 2**30:.2f} GiB that may be taken"
    if place == "auto" and fits < 1:
        return f"every pair is decoded in every epoch: all would take {sizes} of memory (--decode_once disk keeps them)"
    for pairs, size in zip(sets, needed, strict=True):
        pairs.store = Store(len(pairs), int(fits * size), folder)
    kept = "every pair" if fits == 1 else f"about {100 * fits:.0f} % of the pairs"
    return f"{kept} is decoded once and kept {'on disk' if folder else 'in memory'}: {sizes}"


def bytes_needed(pairs: DecodedPairs) -> int:
    """Bytes that a store of all pairs takes, estimated from some of them."""
    sizes = []
    for index in np.unique(np.linspace(0, len(pairs) - 1, PROBED).astype(int)).tolist():
        try:
            sizes.append(len(pickle.dumps(pairs.decoded(index), protocol=5)))
        except Undecodable:  # named when its turn comes
            continue
    return int(MARGIN * len(pairs) * np.mean(sizes)) if sizes else 0
