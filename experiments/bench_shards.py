"""Reading pairs from shards and from loose files: the same items, in one run, in turns.

Both are read in an order of training: shards as their plan says, loose files at random. Cold means that the pages of
all files were given back to the system before, as far as it lets them go: --folder must be on a disk for that.
"""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from dataset import Pair, Sample, TrainingPairs
from experiments.bench_input import AUDIO_SECONDS, IMAGE_SIZE, make_input_files
from experiments.timing import Timing, add_rounds, alternate, one_thread, seconds
from prepare.shards import Settings, write_shards
from shards.addresses import Files
from shards.index import load_index
from shards.pairs import PairsInShards, ShardedPairs
from utils import number

PAIRS_PER_SHARD, BATCH = 64, 16


def add_flags(parser) -> None:
    add_rounds(parser)
    parser.add_argument(
        "--shard_pairs", type=number(int, low=BATCH), default=512, help="pairs that are written and read"
    )
    parser.add_argument("--folder", type=Path, help="where they are written (default: the folder of temporary files)")


def run(args) -> Iterator[Timing]:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        yield from bench_shards(Path(folder), args.shard_pairs, args.rounds)


def both_ways(files: Sequence[Pair], folder: Path) -> tuple[TrainingPairs, ShardedPairs]:
    """The pairs as loose files, and from shards that are written into the folder."""
    write_shards(files, folder, Settings(PAIRS_PER_SHARD, None, 0))
    sizes = IMAGE_SIZE, AUDIO_SECONDS, "hard"
    return TrainingPairs(files, *sizes), ShardedPairs(PairsInShards(load_index(str(folder))), *sizes)


def read(pairs: TrainingPairs) -> list[Sample]:
    """Every item of an epoch's batches, as one process without workers makes them."""
    return [pairs.raw(index) for batch in pairs.batches(BATCH, (1, 0)) for index in batch]


def bench_shards(folder: Path, count: int, rounds: int) -> Iterator[Timing]:
    count -= count % BATCH  # full batches
    (folder / "loose").mkdir()
    files, _ = make_input_files(folder / "loose", count)
    loose, packed = both_ways(files, folder / "packed")
    baseline = "per pair (baseline: loose files)"
    with one_thread():
        spent = alternate(lambda: read(packed), lambda: read(loose), rounds, time.process_time)
        yield Timing(f"shards: CPU time, {baseline}", *(1000 * s / count for s in spent), "ms")
        spent = alternate(lambda: read(packed), lambda: read(loose), rounds)
        yield Timing(f"shards: time, warm, {baseline}", *(1000 * s / count for s in spent), "ms")
        cold = [[time_cold(folder, pairs) for pairs in (packed, loose)] for _ in range(rounds)]
        yield Timing(f"shards: time, cold, {baseline}", *(1000 * median(s) / count for s in zip(*cold)), "ms")
    packed.pairs.reader.files = Files()
    read(packed)
    opened = packed.pairs.reader.files.opened
    yield Timing("shards: files opened in an epoch (baseline: loose files)", opened, 2 * count, "")


def time_cold(folder: Path, pairs: TrainingPairs) -> float:
    """Seconds of an epoch after the pages of all files below the folder were let go."""
    for path in folder.rglob("*.*"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    return seconds(lambda: read(pairs), time.perf_counter)
