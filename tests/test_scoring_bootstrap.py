"""Ratios of sums and their intervals: what a bootstrap must keep."""

import numpy as np
import pytest

import scoring.bootstrap as bootstrap
from scoring.bootstrap import Ratio


def test_an_interval_is_that_of_the_binomial():
    hits = (np.arange(400) % 4 == 0).astype(float)
    ratios = {"rate": Ratio(hits, np.ones(400))}
    low, high = bootstrap.interval(bootstrap.bootstrap(ratios, [str(i) for i in range(400)])["rate"])
    assert (low, high) == pytest.approx((0.25 - 1.96 * 0.02165, 0.25 + 1.96 * 0.02165), abs=0.006)
    again = bootstrap.bootstrap(ratios, [str(i) for i in range(400)])["rate"]
    assert bootstrap.interval(again) == [low, high]


def test_frames_of_a_video_are_drawn_together():
    hits = np.repeat(np.arange(80) % 2, 5).astype(float)
    by_frame, by_video = (
        np.std(bootstrap.bootstrap({"rate": Ratio(hits, np.ones(400))}, units)["rate"])
        for units in (range(400), np.repeat(range(80), 5))
    )
    assert by_video / by_frame == pytest.approx(5**0.5, rel=0.15)


def test_the_size_of_a_chunk_changes_no_draw(monkeypatch):
    whole = np.concatenate(list(bootstrap.resampled_counts(7, 50)))
    monkeypatch.setattr(bootstrap, "CHUNK", 20)
    assert (np.concatenate(list(bootstrap.resampled_counts(7, 50))) == whole).all()
    assert (whole.sum(1) == 7).all()


def test_a_curve_takes_its_best_threshold_in_every_resample():
    curve = np.array([[1.0, 0.0], [0.0, 1.0]])
    values = bootstrap.bootstrap({"F": Ratio(curve, np.ones(2))}, ["a", "b"], 200)["F"]
    assert set(values) == {0.5, 1.0} and Ratio(curve, np.ones(2)).value() == 0.5


def test_ratios_of_nothing_are_undefined():
    nothing = Ratio(np.zeros(3), np.zeros(3, dtype=bool))
    assert np.isnan(nothing.value())
    assert np.isnan(bootstrap.interval(bootstrap.bootstrap({"x": nothing}, [*"abc"], 10)["x"])).all()


def test_intervals_of_a_table_are_those_of_its_columns():
    values = np.random.default_rng(0).random((50, 4))
    values[3, 1], values[:, 2] = np.nan, np.nan
    found = bootstrap.intervals(values)
    assert found[:2] == [bootstrap.interval(values[:, 0]), bootstrap.interval(np.delete(values[:, 1], 3))]
    assert np.isnan(found[2]).all() and found[3] == np.percentile(values[:, 3], (2.5, 97.5)).tolist()


def test_a_resample_without_a_denominator_is_undefined_and_the_others_count():
    ratios = {"F": Ratio(np.array([[1.0, 0.5], [0.0, 0.0]]), np.array([1, 0]))}
    values = bootstrap.bootstrap(ratios, ["a", "b"], 100)["F"]
    assert np.isnan(values).any() and set(values[np.isfinite(values)]) == {1.0}
