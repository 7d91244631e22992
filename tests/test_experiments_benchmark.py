"""The benchmark compares equal work and prints figures that programs can read."""

import json
import re
from functools import partial

import pytest
import torch

import experiments.benchmark as benchmark
from model_slot import JointSlotModel


def test_both_ways_of_scoring_give_the_same_figures():
    raw, truth = benchmark.random_maps(32)
    theirs, ours = benchmark.released_scoring(raw, truth), benchmark.our_scoring(raw, truth)
    for name in benchmark.SIX_MAPS:
        assert theirs[name] == pytest.approx(ours[name], abs=0.04), name  # one sample may lie on a threshold
    assert theirs["AUD"][1] == pytest.approx(ours["AUD"][1], abs=1e-6)


def test_the_command_prints_a_table_and_one_object_a_line(cli, monkeypatch):
    for name, value in {"RESAMPLES": 20, "BATCH": 8}.items():
        monkeypatch.setattr(benchmark, name, value)
    done = cli("experiments.benchmark", "eval", "--pairs", "8", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert re.search(r"^eval: every metric, per map +[\d.]+ +ms +- +-$", done.stdout, re.M)
    assert len(lines) == 3 and all(line.keys() == {"name", "value", "baseline", "ratio", "unit"} for line in lines)
    assert lines[0]["ratio"] == pytest.approx(lines[0]["baseline"] / lines[0]["value"])


def test_both_input_pipelines_give_what_the_model_takes(tmp_path):
    ours, baseline = benchmark.make_input_files(tmp_path, 2)
    ours = benchmark.TrainingPairs(ours, benchmark.IMAGE_SIZE, benchmark.AUDIO_SECONDS, "hard")[1]
    baseline = benchmark.ReleasedPairs(baseline)[1]
    for one, other in zip(ours, baseline, strict=True):
        assert type(one) is type(other)
        if isinstance(one, torch.Tensor):
            assert one.shape == other.shape and one.dtype == other.dtype
    heard = ours.spectrogram.ne(0) & baseline.spectrogram.ne(0)
    assert heard.float().mean() > 0.9  # up to 9 bins and 9 frames are masked in each


def test_the_input_figures_are_costs_of_both_pipelines(cli, monkeypatch):
    monkeypatch.setattr(benchmark, "INPUT_FILES", 2)
    done = cli("experiments.benchmark", "input", "--rounds", "1", "--train_pairs", "4")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["unit"] for line in lines] == ["ms", "ms"] and all(line["baseline"] > 0 for line in lines)


def test_a_step_is_timed_against_the_same_work(cli, monkeypatch):
    """Both take the losses and the gradient of one batch; the figures come in the order of the table."""
    for name, value in {"MATRIX": 256, "IMAGE_SIZE": 64, "AUDIO_SECONDS": 1.0}.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(benchmark, "apart", lambda work, *arguments: work(*arguments))
    monkeypatch.setattr(benchmark, "JointSlotModel", partial(JointSlotModel, "small"))
    done = cli("experiments.benchmark", "step", "--rounds", "1", "--batch_size", "2")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["unit"] for line in lines] == ["s", "%", "%", "%", "GiB"]
    assert "losses of the map" in lines.pop(3)["name"]  # a difference, which noise may make negative
    assert all(line["value"] > 0 for line in lines) and lines[0]["baseline"] > 0


@pytest.mark.slow
def test_scaling_speaks_of_every_size_of_parts_and_of_processes(cli):
    done = cli("experiments.benchmark", "scaling", "--rounds", "1", "--batch_sizes", "2", "4", "--batch_size", "2")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    names = " ".join(line["name"] for line in lines)
    assert len(lines) == 7 and all(line["value"] > 0 for line in lines)
    assert "batch 4 in parts of 2" in names and "2 processes" in names
