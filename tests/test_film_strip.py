"""The picture of a film: which frames, which sound, in constant memory."""

import os
import warnings

import numpy as np
from moving_films import moving_square, tone
from PIL import Image

from film.strip import COLUMNS, FRAMES, Strip


def test_frames_are_spread_over_the_film_and_the_spectrogram_shows_when_it_sounds(tmp_path):
    strip = Strip(4.0)
    for time in np.arange(0, 4, 0.04):
        strip.see(time, moving_square(time, (64, 48)))
    strip.until(4.0)
    for second in range(4):
        strip.hear(tone(second, 1.0))
    kept = [time for time, _ in strip.frames]
    assert len(kept) == FRAMES and np.allclose(kept, np.arange(0.25, 4, 0.5), atol=0.04)
    bin_of_440 = round(440 / 16000 * 512)
    line = strip._decibels()[bin_of_440].reshape(8, COLUMNS // 8)[:, 15:-15].mean(1)  # half seconds, sounding by turns
    assert line[0::2].min() > line[1::2].max() + 40
    times = np.arange(0, 4, 0.1)
    strip.draw(tmp_path / "strip.png", times, np.abs(np.sin(times)), np.abs(np.cos(times)), "a $ name_with^signs")
    with Image.open(tmp_path / "strip.png") as image:
        assert image.size == (1200, 540)


def test_the_spectrogram_does_not_depend_on_how_the_sound_is_cut():
    sine = np.sin(2 * np.pi * 440 * np.arange(3 * 16000) / 16000).astype(np.float32)
    drawn = []
    for cuts in ((), (16000, 32000), (100, 350, 5000, 5001, 47990)):
        strip = Strip(3.0)
        for piece in np.split(sine, cuts):
            strip.hear(piece)
        drawn.append(strip._decibels())
    assert np.allclose(drawn[0], drawn[1], atol=0.1) and np.allclose(drawn[0], drawn[2], atol=0.1)
    assert drawn[1][200, 100:900].max() < drawn[1][14, 100:900].min() - 60  # no clicks


def test_of_few_frames_each_is_shown_as_long_as_in_the_film():
    strip = Strip(4.0)
    for time, grey in ((0.0, 10), (1.0, 20), (2.9, 30), (2.95, 40)):
        strip.see(time, np.full((48, 64, 3), grey, np.uint8))
    strip.until(3.5)  # interrupted
    assert [image[0, 0, 0] for _, image in strip.frames] == [10, 10, 20, 20, 20, 20, 40]
    assert [time for time, _ in strip.frames] == [0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25]


def test_a_film_that_ends_early_or_holds_next_to_nothing_is_drawn(tmp_path):
    strip = Strip(0.0)
    strip.draw(tmp_path / "a.png", np.zeros(0), np.zeros(0), np.zeros(0), "")
    strip = Strip(10.0)
    strip.hear(np.ones(16000, np.float32))
    assert (strip._decibels()[:, COLUMNS // 2 :] == strip._decibels().min()).all()
    strip.draw(tmp_path / "b.png", np.array([0.0]), np.array([-0.5]), np.array([1.0]), "b")
    assert (tmp_path / "b.png").stat().st_size > 1000


def test_a_title_in_any_script_or_none_is_no_error_and_no_warning(tmp_path):
    for title in ("日本語 żółć", os.fsdecode(b"caf\xe9")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Strip(1.0).draw(tmp_path / "a.png", np.zeros(1), np.zeros(1), np.zeros(1), title)
