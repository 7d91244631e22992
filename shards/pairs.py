"""Pairs in shards, as training takes them: which take part, and their files read ahead in the order of the plan.

N pairs that take part, S shards.
"""

import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from torch.utils.data import get_worker_info

from annotations import first_ids, read_ids
from dataset import TRAIN_SETS, Pair, Selection, TrainingPairs, count_held_out
from shards.addresses import WEB, Files, shown
from shards.index import BLOCK as HEADER
from shards.index import Index, Shard, load_index
from shards.plan import RUN, Plan, make_plan
from utils import Contents, UserError

GAP = 2**20  # bytes between two pairs that are read along
MOST = 2**26  # bytes of one read
T = TypeVar("T", bytes, memoryview)


class ShardPair(NamedTuple):
    """A `dataset.Pair` in a shard."""

    id: str
    image: str  # the shard's name and the file's, for messages
    audio: str
    number: int  # among those that take part
    reader: "Reader"

    def fetched(self) -> Pair:
        """The pair whose paths bring their contents: see `utils.Contents`."""
        image, audio = self.reader.get(self.number)
        return Pair(self.id, Contents(self.image, image), Contents(self.audio, audio))


class PairsInShards(Sequence):
    """Some of the pairs of an index, in its order; `ShardPair` each, made when it is asked for."""

    def __init__(self, index: Index, rows: np.ndarray | None = None) -> None:
        """rows: of the index, ascending; None for all."""
        self.index = index
        self.rows = np.arange(len(index.ids)) if rows is None else rows
        self.reader = Reader(self)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int | slice) -> ShardPair | list[ShardPair]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        row = self.rows[number]
        name, shard = self.index.ids[row].decode(), self.shard(number).name
        image, audio = (f"{shard}/{name}{suffix}" for suffix in self.index.suffixes[self.index.kinds[row]])
        return ShardPair(name, image, audio, number, self.reader)

    def shard(self, number: int) -> Shard:
        """The shard of a pair."""
        return self.index.shards[self.index.shard_of[self.rows[number]]]

    @property
    def ids(self) -> list[str]:
        return [name.decode() for name in self.index.ids[self.rows]]

    def sizes(self) -> np.ndarray:
        """(S,) how many of each shard take part."""
        return np.bincount(self.index.shard_of[self.rows], minlength=len(self.index.shards))

    def take(self, numbers: np.ndarray) -> "PairsInShards":
        return PairsInShards(self.index, self.rows[np.sort(numbers)])

    def without(self, ids: Collection[str]) -> "PairsInShards":
        return self.take(np.flatnonzero([name not in ids for name in self.ids])) if ids else self

    def only(self, ids: Collection[str]) -> "PairsInShards":
        return self.take(np.flatnonzero([name in ids for name in self.ids]))

    def bytes(self) -> int:
        """Of all files of the pairs."""
        return int(self.index.files[self.rows][:, 1::2].sum())


class Reader:
    """The files of pairs. Where a plan says what comes, the system is told block by block to read them ahead.

    From the web they are fetched ahead, block by block or, without a plan, one by one or in runs.
    """

    def __init__(self, pairs: PairsInShards) -> None:
        self.pairs, self.files, self.process = pairs, Files(), os.getpid()
        self.follow(None)

    def follow(self, plan: Plan | None, alone: bool = False) -> None:
        """Read in the order of this plan from now on; alone: this process does so itself, without workers."""
        self.plan, self.alone, self.last = plan, alone, -2
        self.places = None if plan is None else plan.places(len(self.pairs))
        self._forget()

    def _forget(self) -> None:
        # by lane; without a plan all is one. A resumed run leaves some pairs of its first blocks in `kept`.
        self.blocks: dict[int, slice] = {}
        self.kept: dict[int, dict[int, tuple[memoryview, memoryview]]] = {}
        self.ahead: dict[int, Block] = {}

    def get(self, number: int) -> tuple[bytes | memoryview, bytes | memoryview]:
        """The bytes of a pair's image and audio. UserError, naming the shard, where they cannot be read."""
        if self.process != os.getpid():  # forked: locks, connections and threads stay with the parent
            self.files, self.process = Files(), os.getpid()
            self._forget()
        ahead = self.places is not None and (self.alone or get_worker_info())
        place = int(self.places[number]) if ahead else -1
        lane = self.plan.lane(place) if place >= 0 else -1
        address = self.pairs.shard(number).address
        on_web = address.startswith(WEB)
        if lane >= 0 and not self._is_begun(lane, place):
            self._begin(lane, self.plan.block(place))
        if on_web and lane < 0 and number not in self.kept.get(lane, ()):
            self.kept[lane] = self._run(number)
        if on_web and number not in self.kept[lane]:  # asked for once more
            self.kept[lane] |= self.fetch(np.array([number]))
        self.last = number
        return self.kept[lane].pop(number) if on_web else self._members(number, partial(self.files.read, address))

    def _is_begun(self, lane: int, place: int) -> bool:
        block = self.blocks.get(lane)
        return block is not None and block.start <= place < block.stop

    def _begin(self, lane: int, block: slice) -> None:
        """Wait for a block of a lane; from then on the next one is read."""
        ready = self.ahead.pop(lane, None)
        if ready is None or ready.start != block.start:
            ready = Block(self, block)
        self.blocks[lane], self.kept[lane] = block, ready.result()
        if block.stop < self.plan.starts[lane + 1]:
            self.ahead[lane] = Block(self, self.plan.block(block.stop))

    def _run(self, number: int) -> dict[int, tuple[memoryview, memoryview]]:
        """The pair, and where it follows the one before it also some that come next."""
        length = RUN if number == self.last + 1 else 1
        return self.fetch(np.arange(number, min(number + length, len(self.pairs))))

    def fetch(self, numbers: np.ndarray) -> dict[int, tuple[memoryview, memoryview]]:
        """The bytes of pairs of shards on the web, neighbours in one read; local ones are announced to the system."""
        found = {}
        for address, begin, size, pairs in self._ranges(numbers):
            if not address.startswith(WEB):
                self.files.announce(address, begin, size)
                continue
            content = self.files.read(address, begin, size)
            for number in pairs:
                found[number] = self._members(number, partial(_part, content, begin))
        return found

    def _ranges(self, numbers: np.ndarray) -> Iterator[tuple[str, int, int, list[int]]]:
        """Parts of shards that hold these pairs, neighbours together: address, begin, size, pairs."""
        rows, index = self.pairs.rows[numbers], self.pairs.index
        files, shard_of = index.files[rows], index.shard_of[rows]
        low = np.minimum(files[:, 0], files[:, 2]) - HEADER
        high = np.maximum(files[:, 0] + files[:, 1], files[:, 2] + files[:, 3])
        start = 0
        while start < len(rows):
            stop = start + 1
            while (
                stop < len(rows)
                and shard_of[stop] == shard_of[start]
                and 0 <= low[stop] - high[stop - 1] <= GAP
                and high[stop] - low[start] <= MOST
            ):
                stop += 1
            begin, size = int(low[start]), int(high[stop - 1] - low[start])
            yield index.shards[shard_of[start]].address, begin, size, numbers[start:stop].tolist()
            start = stop

    def _members(self, number: int, read: Callable[[int, int], T]) -> tuple[T, T]:
        """A pair's files, by what reads so many bytes from a byte on. UserError unless their headers precede them."""
        places = [int(value) for value in self.pairs.index.files[self.pairs.rows[number]]]
        for at, size in zip(places[::2], places[1::2]):
            header = bytes(read(max(at - HEADER, 0), HEADER))
            if header[257:262] != b"ustar" or _octal(header[124:136]) != size:
                pair, shard = self.pairs[number], self.pairs.shard(number)
                raise UserError(
                    f"the shard {shown(shard.address)} is broken, or not the one that its index speaks of: {pair.id} "
                    "does not begin where it should; prepare_data.py check names every such shard"
                )
        return read(*places[:2]), read(*places[2:])


def _part(content: memoryview, begin: int, start: int, size: int) -> memoryview:
    return content[start - begin : start - begin + size]


def _octal(field: bytes) -> int:
    """A number of a tar header."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    text = field.strip(b"\0 ")
    return int(text, 8) if text.isdigit() and b"8" not in text and b"9" not in text else -1


class Block:
    """A block of a plan that a thread of its own reads."""

    def __init__(self, reader: Reader, place: slice) -> None:
        self.start, self.found, self.error = place.start, {}, None
        self.thread = threading.Thread(target=self._run, args=(reader, reader.plan.reading[place]), daemon=True)
        self.thread.start()

    def _run(self, reader: Reader, numbers: np.ndarray) -> None:
        try:
            self.found = reader.fetch(numbers)
        except Exception as error:
            self.error = error

    def result(self) -> dict[int, tuple[memoryview, memoryview]]:
        self.thread.join()
        if self.error:
            raise self.error
        return self.found


# ---------------------------------------------------------------- what is trained on


class ShardedPairs(TrainingPairs):
    """`TrainingPairs` whose pairs are in shards: the same items, in batches of the order of a plan."""

    pairs: PairsInShards
    plan_of: tuple[int, int, int, int] | None = None  # batch size, processes, workers, epoch

    def batches(self, batch_size: int, lanes: tuple[int, int]) -> list[list[int]]:
        """Every full batch of the epoch; lanes: processes, and data-loading workers of each."""
        if self.plan_of is not None and self.plan_of[:3] != (batch_size, *lanes):
            self.loader = None  # workers that are there would follow the old plan
        self.plan_of = (batch_size, *lanes, self.epoch)
        self._follow()
        return self.pairs.reader.plan.batches().tolist()

    def _follow(self) -> None:
        batch_size, processes, workers, epoch = self.plan_of
        plan = make_plan(self.pairs.sizes(), batch_size, processes, max(workers, 1), self.seed, epoch)
        self.pairs.reader.follow(plan, alone=not workers)

    def decoded(self, index: int):
        if self.plan_of and self.plan_of[-1] != self.epoch:  # in a worker that outlives an epoch
            self.plan_of = (*self.plan_of[:-1], self.epoch)
            self._follow()
        return super().decoded(index)


def select_from_shards(
    name: str, path: str, metadata: str, train_list: str | None = None, allow_missing: bool = False
) -> Selection:
    """As `dataset.select_training_pairs`: pairs of a row of TRAIN_SETS, found in shards; train_list replaces its list.

    Where neither is there, every pair of the shards.
    """
    row = TRAIN_SETS[name]
    listed = train_list or (None if row.lists_in_root or row.ids is None else Path(metadata) / row.ids)
    index = load_index(path)
    pairs, missing = PairsInShards(index), list(index.incomplete)
    if listed:
        wanted = read_ids(listed)
        there = {*pairs.ids}
        missing = [i for i in wanted if i not in there]
        pairs = pairs.only({*wanted})
    return Selection(pairs, missing, max(len(pairs) + len(missing), 0 if train_list else row.expected or 0))


def hold_out_shards(
    pairs: PairsInShards, val_list: str | None, val_fraction: float, seed: int, allow_missing: bool = False
) -> tuple[PairsInShards, PairsInShards]:
    """As `dataset.hold_out`: pairs to train on, and those held out: the ids of val_list, else a seeded fraction.

    The fraction is taken from as few shards as hold it, so that it is read in few pieces.
    """
    if val_list:
        wanted = read_ids(val_list)
        held_out = pairs.only({*wanted})
        if lacking := len(wanted) - len(held_out):
            if not allow_missing:
                known = {*held_out.ids}
                missing = first_ids([i for i in wanted if i not in known])
                raise UserError(f"{lacking} of {len(wanted)} ids of {val_list} are not in the shards: {missing}")
            print(f"held-out pairs: {len(held_out)} of {len(wanted)} of {val_list}, the others are missing")
        return pairs.without({*held_out.ids}), held_out
    sizes = pairs.sizes()
    order = np.random.default_rng(seed).permutation(len(sizes))
    place = np.empty(len(order), int)
    place[order] = np.cumsum(sizes[order]) - sizes[order]  # where each shard begins, one behind the other
    within = np.arange(len(pairs)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = np.repeat(place, sizes) + within < count_held_out(val_fraction, len(pairs))
    return pairs.take(np.flatnonzero(~chosen)), pairs.take(np.flatnonzero(chosen))
