"""Reading from shards is compared with the same pairs in loose files."""

import json
from pathlib import Path

import pytest

import experiments.bench_input as bench_input
import experiments.bench_shards as bench_shards


@pytest.fixture
def small(monkeypatch):
    for name, value in {"PAIRS_PER_SHARD": 4, "BATCH": 4, "IMAGE_SIZE": 32, "AUDIO_SECONDS": 0.5}.items():
        monkeypatch.setattr(bench_shards, name, value)


def test_an_epoch_opens_each_shard_once_and_every_loose_file(cli, small, tmp_path):
    done = cli("experiments.benchmark", "shards", "--rounds", "1", "--shard_pairs", "16", "--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 4 and all(line["value"] > 0 and line["baseline"] > 0 for line in lines)
    assert (lines[-1]["value"], lines[-1]["baseline"]) == (4, 32)
    assert not [*tmp_path.iterdir()]


def test_both_read_every_pair_once_and_the_same_content(small, tmp_path):
    files, _ = bench_input.make_input_files(tmp_path, 8)
    loose, packed = bench_shards.both_ways(files, tmp_path / "packed")
    read = [{sample.id: sample.image.levels.shape for sample in bench_shards.read(pairs)} for pairs in (loose, packed)]
    assert read[0] == read[1] and read[0].keys() == {pair.id for pair in files}
    by_id = {pair.id: pair for pair in packed.pairs}
    for pair in loose.pairs:
        fetched = by_id[pair.id].fetched()
        assert fetched.image.content == Path(pair.image).read_bytes()
        assert fetched.audio.content == Path(pair.audio).read_bytes()
