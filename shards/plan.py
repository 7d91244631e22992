"""Which pair comes when, if pairs are read from shards: decided by counts alone, before anything is read.

N pairs in S shards, W processes, V data-loading workers each, B pairs per batch of all processes. An epoch deals the
shards, in a new order, along a line and cuts the line into W x V lanes, one for each worker, so that every shard is
read once, two where a cut goes through it. A worker reads its lane in blocks: runs of RUN neighbours from DEALT shards
at a time, shuffled together. So a pair is shuffled freely among the shards of an epoch, and among BLOCK pairs within.
Batch k of a process comes from its worker k mod V: lanes are as long as that takes, however uneven the shards are.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RUN, DEALT = 32, 8
BLOCK = RUN * DEALT
SALT = 0x5348  # apart from what else is drawn by seed and epoch


class Plan(NamedTuple):
    """One epoch; pairs are numbers 0 ... N - 1 in the order of the shards."""

    reading: np.ndarray  # (steps * B,) lane by lane, in the order in which they are read
    given: np.ndarray  # (steps * B,) lane by lane, in the order in which they are needed
    starts: np.ndarray  # (W * V + 1,) where each lane begins in both
    processes: int
    workers: int
    batch_size: int

    def batches(self) -> np.ndarray:
        """(steps, B): pairs of every batch, process by process."""
        each = self.batch_size // self.processes
        found = np.empty((len(self.given) // self.batch_size, self.batch_size), self.given.dtype)
        for lane, (start, stop) in enumerate(zip(self.starts, self.starts[1:])):
            rank, worker = divmod(lane, self.workers)
            rows = self.given[start:stop].reshape(-1, each)
            found[worker :: self.workers, rank * each : (rank + 1) * each] = rows
        return found

    def places(self, count: int) -> np.ndarray:
        """(count,) of every pair its place in `given`; -1 for those that no batch holds."""
        found = np.full(count, -1, self.given.dtype)
        found[self.given] = np.arange(len(self.given), dtype=self.given.dtype)
        return found

    def lane(self, place: int) -> int:
        return int(np.searchsorted(self.starts, place, side="right")) - 1

    def block(self, place: int) -> slice:
        """The block that a place belongs to."""
        start, stop = (int(value) for value in self.starts[self.lane(place) :][:2])
        first = start + (place - start) // BLOCK * BLOCK
        return slice(first, min(first + BLOCK, stop))


def make_plan(
    sizes: Sequence[int] | np.ndarray, batch_size: int, processes: int, workers: int, seed: int, epoch: int
) -> Plan:
    """sizes: (S,) pairs of each shard that take part. Pairs that fill no batch are left out, others in each epoch."""
    rng = np.random.default_rng([SALT, seed, epoch])
    sizes = np.asarray(sizes)
    first = np.concatenate([[0], np.cumsum(sizes)])
    steps, each = int(first[-1]) // batch_size, batch_size // processes
    lengths = [each * len(range(worker, steps, workers)) for _ in range(processes) for worker in range(workers)]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    order = rng.permutation(len(sizes))
    ends = np.cumsum(sizes[order])  # along the line
    reading = np.empty(starts[-1], np.int64 if first[-1] >= 2**31 else np.int32)
    given = np.empty_like(reading)
    for start, stop in itertools.pairwise(starts):
        pieces = []
        for at in range(int(np.searchsorted(ends, start, side="right")), len(order)):
            shard, begin = order[at], ends[at] - sizes[order[at]]
            if begin >= stop:
                break
            low, high = max(start, begin) - begin, min(stop, ends[at]) - begin
            if high > low:
                pieces.append((first[shard] + low, first[shard] + high))
        reading[start:stop] = dealt(pieces, rng)
        given[start:stop] = reading[start:stop]
        for block in range(start, stop, BLOCK):
            rng.shuffle(given[block : min(block + BLOCK, stop)])
    return Plan(reading, given, starts, processes, workers, batch_size)


def dealt(pieces: Sequence[tuple[int, int]], rng: np.random.Generator) -> np.ndarray:
    """Pieces of shards (first pair, end) -> their pairs: runs from DEALT pieces in turns, then from the next ones."""
    runs: list[np.ndarray] = [np.empty(0, int)]
    for start in range(0, len(pieces), DEALT):
        own = []
        for low, high in pieces[start : start + DEALT]:
            cuts = [low, *range(low + int(rng.integers(1, RUN + 1)), high, RUN), high]  # other neighbours every time
            own.append([np.arange(a, b) for a, b in itertools.pairwise(cuts)])
        for turn in range(max(map(len, own))):
            runs += [piece[turn] for piece in own if turn < len(piece)]
    return np.concatenate(runs)
