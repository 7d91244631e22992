"""The benchmark compares equal work and prints figures that programs can read."""

import json

import pytest

import benchmark


def test_both_ways_of_scoring_give_the_same_figures():
    raw, truth = benchmark.random_maps(32)
    theirs, ours = benchmark.released_scoring(raw, truth), benchmark.our_scoring(raw, truth)
    for name in benchmark.SIX_MAPS:
        assert theirs[name] == pytest.approx(ours[name], abs=0.04), name  # one sample may lie on a threshold
    assert theirs["AUD"][1] == pytest.approx(ours["AUD"][1], abs=1e-6)


def test_the_command_prints_a_table_and_one_object_a_line(cli):
    done = cli("benchmark", "eval", "--pairs", "8", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 3 and all(line.keys() == {"name", "value", "baseline", "ratio", "unit"} for line in lines)
    assert lines[0]["ratio"] == pytest.approx(lines[0]["baseline"] / lines[0]["value"])
