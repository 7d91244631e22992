"""A step is timed against the same work; scaling speaks of every size."""

import json
from functools import partial

import pytest
import torch

import experiments.bench_step as bench_step
from model_slot import JointSlotModel


def test_a_step_is_timed_against_the_same_work(cli, monkeypatch):
    """Both take the losses and the gradient of one batch; the figures come in the order of the table."""
    monkeypatch.setattr(bench_step, "choose_amp", lambda *_: None)
    for name, value in {"MATRIX": 256, "IMAGE_SIZE": 64, "AUDIO_SECONDS": 1.0}.items():
        monkeypatch.setattr(bench_step, name, value)
    monkeypatch.setattr(bench_step, "apart", lambda work, *arguments: work(*arguments))
    monkeypatch.setattr(bench_step, "JointSlotModel", partial(JointSlotModel, "small"))
    monkeypatch.setattr(bench_step, "compile_model", lambda *_: None)
    monkeypatch.setattr(bench_step, "keep_freed_memory", lambda: None)
    done = cli("experiments.benchmark", "step", "--rounds", "1", "--batch_size", "2", "--compile")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["unit"] for line in lines] == ["s", "%", "%", "%", "s", "GiB"]
    assert f"in float32, {torch.backends.cpu.get_cpu_capability()}" in lines[1]["name"]
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
