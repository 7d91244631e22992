"""The benchmark of localize.py prints how fast it is, and what takes the time."""

import json

import pytest

import experiments.bench_localize as bench


def test_it_prints_speed_and_shares_that_add_up(cli, monkeypatch):
    monkeypatch.setattr(bench, "WIDTH", 96)
    monkeypatch.setattr(bench, "HEIGHT", 64)
    done = cli("experiments.benchmark", "localize", "--seconds", "1", "--models", "small")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines[0]["baseline"] == 1 and lines[0]["ratio"] == pytest.approx(1 / lines[0]["value"])
    shares = {line["name"].rpartition(" ")[2]: line["value"] for line in lines if line["unit"] == "%"}
    assert shares.keys() == {"decoding", "model", "drawing", "encoding"} and min(shares.values()) > 0
    assert sum(shares.values()) == pytest.approx(100)
