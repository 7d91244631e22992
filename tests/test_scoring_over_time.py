"""Figures over time: against a slow second computation by hand, and on models whose figures are known."""

import json
import math

import numpy as np
import pytest

from scoring.over_time import PAUSE, Film, Seen, deaf_ratios, held, moments_of, over_time, read_films, time_ratios
from utils import UserError

LEFT, RIGHT, TIMES = [0.1, 0.1, 0.4, 0.4], [0.6, 0.1, 0.9, 0.4], [k / 10 for k in range(100)]


@pytest.fixture
def film():
    """The left object sounds from 1 to 3 s, the right one from 3 to 5 s, leaves at 6 s, and sounds from 7 to 9 s."""
    boxes = [[LEFT] * 200, [RIGHT] * 120 + [None] * 80]
    return Film("a", 20.0, boxes, [(1.0, 3.0, 0), (3.0, 5.0, 1), (7.0, 9.0, 1)])


def point(box, lit=0.1):
    return Seen((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, lit)


def values(seen, moments, dark=False):
    return {name: ratio.value() for name, ratio in time_ratios(seen, moments, 0.9, dark).items()}


def test_moments_say_who_sounds_and_who_is_in_view(film):
    moments = moments_of(film, TIMES)
    assert [moment.turn for moment in moments[::10]] == [PAUSE, 0, 0, 1, 1, PAUSE, PAUSE, 2, 2, PAUSE]
    assert moments[15].source == LEFT and moments[15].silent == [RIGHT] and moments[30].source == RIGHT
    assert moments[75].source is None and moments[75].silent == [LEFT] and moments[55].silent == [LEFT, RIGHT]
    assert [i for i, moment in enumerate(moments) if moment.onset] == [10, 30, 70]
    assert moments[30].left == pytest.approx(2) and moments[49].left == pytest.approx(0.1)
    at_once = moments_of(film._replace(turns=[(0.0, 2.0, 0)]), TIMES)
    assert not any(moment.onset for moment in at_once)  # nothing changed when the film began


def test_a_perfect_model_and_a_deaf_one(film):
    moments = moments_of(film, TIMES)
    perfect = [point(m.source) if m.source else Seen(0.5, 0.9, 0.0) for m in moments]
    wanted = {"pointing": 1, "false_peaks": 0, "delay": 0, "followed": 1, "on_time": 1, "lit_pauses": 0}
    wanted |= {"lit_outside": 0, "lit_sounding": 0.1}
    assert values(perfect, moments, dark=True) == pytest.approx(wanted)
    deaf = values([point(LEFT)] * 100, moments)
    assert deaf["pointing"] == 0.5 and deaf["followed"] == 0.5 and deaf["delay"] == pytest.approx((0 + 2) / 2)
    assert deaf["false_peaks"] == pytest.approx(80 / 100)  # everywhere but in its own turn
    assert deaf["lit_pauses"] == deaf["lit_outside"] == pytest.approx(0.1)


def test_a_change_that_is_followed_late_counts_with_its_delay(film):
    moments = moments_of(film, TIMES)
    late = [point(LEFT)] * 38 + [point(RIGHT)] * 62
    assert values(late, moments)["delay"] == pytest.approx(0.8 / 2)
    assert values(late, moments)["on_time"] == 1
    later = [point(LEFT)] * 42 + [point(RIGHT)] * 58
    assert values(later, moments)["on_time"] == 0.5 and values(later, moments)["followed"] == 1


def test_where_nothing_is_lit_there_is_no_peak(film):
    moments = moments_of(film, TIMES)
    dark = [point(m.source or LEFT, lit=0.0) for m in moments]
    assert values(dark, moments, dark=True) == pytest.approx(
        {"pointing": 0, "false_peaks": 0, "delay": 2, "followed": 0, "on_time": 0, "lit_sounding": 0, "lit_pauses": 0}
        | {"lit_outside": 0}
    )
    assert values(dark, moments)["pointing"] == 1
    unknown = [seen._replace(lit=math.nan) for seen in dark]
    assert "lit_pauses" not in values(unknown, moments)


def test_the_deaf_oracle_is_the_mean_of_taking_either_object(film):
    moments = moments_of(film, TIMES)
    expected = {name: ratio.value() for name, ratio in deaf_ratios(moments, 0.9).items()}
    sides = [
        values([point(box, 0.09) if any(box == b for b in (*m.silent, m.source)) else point(LEFT, 0.09)
                for m in moments], moments)  # the right one is gone after 6 s
        for box in (LEFT, RIGHT)
    ]  # fmt: skip
    for name in expected:
        assert expected[name] == pytest.approx(np.mean([side[name] for side in sides])), name


def test_a_window_is_held_until_the_next_one_is_whole():
    seen = [Seen(time, 0, 0) for time in TIMES]
    kept = held(seen, TIMES, 1.6)
    assert [kept[k].x for k in (0, 15, 16, 31, 32, 99)] == pytest.approx([0.8, 0.8, 0.8, 0.8, 2.4, 8.8])


def test_films_are_resampled_and_seeds_repeat(film):
    moments, seen = [], []
    for i in range(8):
        own = moments_of(film._replace(name=str(i)), TIMES)
        moments += own
        seen += [point(LEFT if i % 2 else m.source or RIGHT) for m in own]
    results = over_time({"AUD": (seen, False)}, moments, 0.9, resamples=200)
    low, high = results["intervals"]["AUD"]["pointing"]
    assert low < results["maps"]["AUD"]["pointing"] == 0.75 < high
    assert results == over_time({"AUD": (seen, False)}, moments, 0.9, resamples=200)


@pytest.mark.parametrize("text", ["{", "[]", '{"fps": 20, "films": []}', '{"fps": 20, "films": [{"id": "../a"}]}'])
def test_another_file_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "truth.json").write_text(text)
    with pytest.raises(UserError, match=r"truth\.json"):
        read_films(tmp_path / "truth.json")
    with pytest.raises(UserError, match="--video"):
        read_films(tmp_path / "absent.json")


def test_the_built_in_truth_is_read(film_root):
    films = read_films(film_root / "truth.json")
    assert len(films) == len(json.loads((film_root / "truth.json").read_text())["films"]) == 3
    moments = moments_of(films[0], TIMES)
    assert {moment.turn for moment in moments} == {PAUSE, 0, 1, 2, 3}
    assert sum(moment.turn != PAUSE and moment.source is None for moment in moments) >= 14
