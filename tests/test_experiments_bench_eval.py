"""Both ways of scoring do the same work; figures of two revisions are compared to the last bit."""

import json

import numpy as np
import pytest
import torch

import experiments.bench_eval as bench_eval
from annotations import box_map
from experiments.bench_eval import different_figures, our_scoring
from experiments.released import SIX_MAPS, released_scoring
from experiments.stored_set import random_maps, score_stored_set


def test_both_ways_of_scoring_give_the_same_figures():
    raw, boxes = random_maps(32)
    truth = torch.stack([box_map([box]) for box in boxes])
    theirs, ours = released_scoring(raw, truth), our_scoring(raw, truth)
    for name in SIX_MAPS:
        assert theirs[name] == pytest.approx(ours[name], abs=0.04), name  # one sample may lie on a threshold
    assert theirs["AUD"][1] == pytest.approx(ours["AUD"][1], abs=1e-6)


def test_figures_are_compared_to_the_last_bit_and_new_ones_are_no_difference():
    theirs = {"a": 0.1, "b": {"c": [1, 2.0], "d": float("nan")}, "name": "x"}
    assert different_figures({**theirs, "new": 3}, theirs) == 0
    assert different_figures({"a": np.nextafter(0.1, 1), "b": {"c": [1, 3.0]}, "name": "x"}, theirs) == 3
    assert different_figures({**theirs, "b": {"c": [1], "d": float("nan")}}, theirs) == 1


def test_a_set_with_negative_audio_is_the_same_set_and_gives_its_figures_beside():
    without, asked = (score_stored_set(12, 5, negatives) for negatives in (False, True))
    assert different_figures(asked["results"]["maps"], without["results"]["maps"]) == 0
    assert "F_LOC" not in without["results"]["maps"]["AUD"]
    figures = asked["results"]["maps"]["AUD"]
    assert len({figures[f"pIA_{kind}"] for kind in ("silence", "noise", "offscreen")}) == 3  # three files of maps
    assert 0 < figures["pIA"] < 1 and 0 < figures["F_LOC"] < 1 and asked["memory_gib"] > 0


def test_the_cost_of_negative_audio_is_printed_beside_that_without(cli, monkeypatch):
    monkeypatch.setattr(bench_eval, "bench_figures", lambda rounds: ())
    monkeypatch.setattr(bench_eval, "score_with", lambda _, pairs, *more: score_stored_set(pairs, 5, bool(more)))
    done = cli("experiments.benchmark", "eval", "--pairs", "4")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["baseline"] for line in lines[2:]] == [lines[0]["value"], lines[3]["baseline"]]
    assert "negative audio" in lines[2]["name"] and lines[2]["value"] > 0 and lines[3]["ratio"] > 0


@pytest.mark.slow
def test_negative_audio_is_timed_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(bench_eval, "RESAMPLES", 20)
    asked = bench_eval.score_with(bench_eval.ROOT, 8, "negatives")
    assert asked["results"]["maps"]["AUD"]["pIA_noise"] > 0 and asked["memory_gib"] > 0


def test_an_unknown_revision_is_one_line(cli):
    done = cli("experiments.benchmark", "eval", "--rounds", "1", "--pairs", "2", "--against", "no_such_revision")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "no_such_revision" in done.stderr


@pytest.mark.slow
def test_another_revision_scores_the_same_set_in_turns(cli, monkeypatch):
    monkeypatch.setattr(bench_eval, "RESAMPLES", 20)
    done = cli("experiments.benchmark", "eval", "--rounds", "1", "--pairs", "8", "--against", "HEAD")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["unit"] for line in lines] == ["s", ""] and lines[0]["baseline"] > 0
