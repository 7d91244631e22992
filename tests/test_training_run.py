"""An epoch of training: what it logs, and what becomes of a step that fails."""

import json

import pytest
import torch

from scoring.retrieval import Ranks
from training.step import Optimisation
from utils import load_checkpoint


def test_skipped_steps_are_logged_and_lower_no_average(synthetic_root, tmp_path, train, monkeypatch):
    step, count = Optimisation.step, iter(range(100))

    def sometimes(self, *arguments):
        skipped = next(count) % 4 == 3
        return step(self, *arguments) | {"grad_norm": 0.0 if skipped else 2.0, "skipped_steps": float(skipped)}

    monkeypatch.setattr(Optimisation, "step", sometimes)
    assert train(synthetic_root, tmp_path, "--epochs", "1").returncode == 0
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert line["skipped_steps"] == 1 and line["grad_norm"] == pytest.approx(2.0)


def test_a_training_that_is_stuck_says_so_in_the_log_the_summary_and_the_results(
    synthetic_root, tmp_path, train, monkeypatch, cli
):
    step = Optimisation.step
    monkeypatch.setattr(Optimisation, "step", lambda self, *a: step(self, *a) | {"info_nce": 7.0, "info_nce_chance": 6})
    monkeypatch.setattr("training.run.ranks_both_ways", lambda *_: Ranks(*[torch.arange(1, 11)] * 2))
    done = train(synthetic_root, tmp_path, "--epochs", "3", "--testset", "synthetic", "--eval_every", "0")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert ["warning" in line for line in lines] == [False, False, True]
    results = json.loads((tmp_path / "run" / "results" / "synthetic" / "results.json").read_text())
    assert results["training_warning"] == results["checkpoint"]["warning"] == lines[2]["warning"]
    assert "from epoch 1 to 3 the contrastive loss is at chance (7.000, chance 6.000)" in lines[2]["warning"]
    assert done.stdout.count("warning: nothing is learnt") == 2 and "warning: in training nothing" in done.stdout


def test_lost_steps_have_no_part_in_the_averages(synthetic_root, tmp_path, train, monkeypatch):
    step, count = Optimisation.step, iter(range(100))

    def sometimes(self, *arguments):
        found = step(self, *arguments) | {"loss": 3.0, "grad_norm": 2.0}
        lost = {"grad_norm": 0.0, "skipped_steps": 1.0, "lost_steps": 1.0}
        return lost if next(count) % 4 == 3 else found

    monkeypatch.setattr(Optimisation, "step", sometimes)
    assert train(synthetic_root, tmp_path, "--epochs", "1").returncode == 0
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert (line["skipped_steps"], line["loss"], line["grad_norm"]) == (1, pytest.approx(3.0), pytest.approx(2.0))


def test_a_loss_that_is_not_finite_keeps_the_state_before_the_step(synthetic_root, tmp_path, train, monkeypatch):
    count, matching = iter(range(1000)), Optimisation.backward

    def broken(self, *arguments):
        losses = matching(self, *arguments)
        return losses | {"info_nce": losses["info_nce"] / (next(count) != 6)}

    monkeypatch.setattr(Optimisation, "backward", broken)
    done = train(synthetic_root, tmp_path)
    assert done.returncode == 2
    assert "not finite in step 3 of epoch 2" in done.stderr and "train_0000" in done.stderr
    ids = (tmp_path / "run" / "failed_ids.txt").read_text().split()
    assert len(ids) == 16 and all(name.startswith("train_") for name in ids)
    failed, latest = (load_checkpoint(tmp_path / "run" / f"{name}.pth") for name in ("failed", "latest"))
    assert (failed["epoch"], failed["step"]) == (1, 2) and (latest["epoch"], latest["step"]) == (1, 0)
    assert all(value.isfinite().all() for value in failed["model"].values())
