"""Decoders in processes of their own: 500 mutated films cost at most one line each, and nothing hangs."""

import csv
import mmap
import os

import numpy as np
import pytest
from films import make_film

from prepare.pool import Lost, run_all

KINDS = {
    "mp4": {},
    "mkv": {"audio": "flac"},
    "ts": {"b_frames": 2},
    "avi": {"video": "mpeg4", "audio": "libmp3lame"},
    "webm": {"video": "libvpx", "audio": "libopus", "rate": 48000},
}


def grab(count):
    """Ask for so many bytes."""
    return len(bytearray(count))


def test_a_process_that_wants_too_much_memory_costs_its_task_alone():
    results = dict(run_all([1000, 64 * 2**30, 2000], 1, grab))
    assert results[1000] == 1000 and results[2000] == 2000
    assert isinstance(results[64 * 2**30], Lost) and "MemoryError" in str(results[64 * 2**30])


def reserve(count):
    """Take addresses without memory behind them, as each thread does: 64 MiB each, on 16 cores 8 GiB."""
    with mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0) as place:
        return len(place)


def test_addresses_that_are_only_reserved_do_not_count_as_memory():
    assert dict(run_all([8 * 2**30], 1, reserve)) == {8 * 2**30: 8 * 2**30}


def mutate(content, rng):
    """Bytes changed, cut out, repeated or cut off, most of them near the head, where the structure is."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 20)):
        place = int(len(content) * rng.random() ** rng.choice([1, 4]))
        length = int(rng.integers(1, 64))
        how = rng.integers(4)
        if how == 0:
            content[place : place + length] = rng.bytes(length)
        elif how == 1:
            del content[place : place + length]
        elif how == 2:
            content[place:place] = content[place : place + length]
        else:
            content[place : place + 4] = int(rng.choice([0, 2**31 - 1, 2**32 - 1, 2**16])).to_bytes(4, "big")
    return bytes(content[: int(len(content) * rng.uniform(0.5, 1))] if rng.random() < 0.2 else content)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_films_neither_crash_the_run_nor_hang(kind, cli, tmp_path):
    make_film(tmp_path / f"film.{kind}", seconds=2, **KINDS[kind])
    content, rng = (tmp_path / f"film.{kind}").read_bytes(), np.random.default_rng([*kind.encode()])
    (tmp_path / "clips").mkdir()
    for number in range(100):
        (tmp_path / f"clips/film{number}.{kind}").write_bytes(mutate(content, rng))
    os.link(tmp_path / f"film.{kind}", tmp_path / f"clips/whole.{kind}")
    done = cli("prepare_data", "clips", tmp_path / "clips", "--out", tmp_path / "out", "--workers", 2)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    tables = []
    for name in ("pairs", "failures"):
        with open(tmp_path / f"out/{name}.csv", newline="") as file:
            tables.append(list(csv.DictReader(file)))
    made, failed = tables
    assert len(made) + len(failed) == 101 and "whole" in {row["id"] for row in made}
    assert not [row for row in failed if row["reason"].startswith("hang")]
