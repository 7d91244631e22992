"""Both ways of scoring do the same work."""

import pytest

from experiments.bench_eval import SIX_MAPS, our_scoring, random_maps, released_scoring


def test_both_ways_of_scoring_give_the_same_figures():
    raw, truth = random_maps(32)
    theirs, ours = released_scoring(raw, truth), our_scoring(raw, truth)
    for name in SIX_MAPS:
        assert theirs[name] == pytest.approx(ours[name], abs=0.04), name  # one sample may lie on a threshold
    assert theirs["AUD"][1] == pytest.approx(ours["AUD"][1], abs=1e-6)
