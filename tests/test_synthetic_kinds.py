"""The kinds of the built-in data: tight boxes, sounds that vary, noise that lies below them."""

import numpy as np
import pytest

from synthetic.kinds import KINDS, draw_object, make_sound


@pytest.mark.parametrize("kind", KINDS)
def test_box_is_tight_around_what_is_drawn(kind):
    for size in (32, 51):
        rgb, opacity = draw_object(kind, size, np.random.default_rng(size))
        assert max(opacity.shape) == size and rgb.shape == (*opacity.shape, 3)
        edges = opacity[0], opacity[-1], opacity[:, 0], opacity[:, -1]
        assert all(edge.max() > 0.01 for edge in edges) and opacity.max() < 1 + 1e-6


def test_kinds_are_many_and_named_for_ids():
    assert 8 <= len(KINDS) <= 10 and all(kind.isascii() and kind.isalnum() for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_lies_10_to_20_db_below_and_sounds_vary(kind):
    sounds, noises = zip(*(make_sound(kind, np.random.default_rng(i)) for i in range(8)))
    ratios = [10 * np.log10(np.mean(a**2) / np.mean(b**2)) for a, b in zip(sounds, noises)]
    assert min(ratios) > 9.99 and max(ratios) < 20.01 and np.ptp(ratios) > 2
    correlation = np.corrcoef(np.stack(sounds))
    assert np.isfinite(correlation).all() and np.abs(correlation[np.triu_indices(8, 1)]).max() < 0.9
