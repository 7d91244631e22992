"""The benchmark prints figures that people and programs can read."""

import json
import re

import pytest

import experiments.bench_eval as bench_eval
import experiments.benchmark as benchmark
from experiments.stored_set import score_stored_set
from experiments.timing import Timing


def test_the_command_prints_a_table_and_one_object_a_line(cli, monkeypatch):
    monkeypatch.setattr(bench_eval, "BATCH", 8)

    def score_with(_, pairs, *more):
        return score_stored_set(pairs, 20, bool(more)) | {"seconds": 2.0}

    monkeypatch.setattr(bench_eval, "score_with", score_with)
    done = cli("experiments.benchmark", "eval", "--pairs", "8", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert re.search(r"^eval: every metric, per map +[\d.]+ +ms +- +-$", done.stdout, re.M)
    assert len(lines) == 5 and all(line.keys() == {"name", "value", "baseline", "ratio", "unit"} for line in lines)
    assert lines[0]["ratio"] == pytest.approx(lines[0]["baseline"] / lines[0]["value"])


def test_all_runs_every_part_at_its_defaults(cli, monkeypatch):
    seen = {}

    def note(args):
        seen[args.bench] = vars(args)
        yield Timing(args.bench, 1.0, 2.0, "s")

    for name, bench in benchmark.BENCHES.items():
        monkeypatch.setitem(benchmark.BENCHES, name, bench._replace(run=note))
    done = cli("experiments.benchmark", "all", "--rounds", "3")
    assert done.returncode == 0, done.stderr
    assert seen.keys() == benchmark.BENCHES.keys() - {"plan", "gpu"} and {
        flags["rounds"] for flags in seen.values()
    } == {3}
    assert seen["eval"]["pairs"] == 5158 and done.stdout.count('"ratio": 2.0') == len(seen)
