"""Heat-map films: what is drawn when, that it plays with its sound, stopped anywhere, in constant memory."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import moving_films as films
import numpy as np
import pytest
import soundfile
from conftest import ROOT
from PIL import Image

import film.localizer as engine
import film.render as render
import media
from film.localizer import Localizer, Step, heat_of
from film.render import Look, Outputs, heat_tokens, mask_of, paint, render_clip, render_image
from reports.pictures import overlay


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return films.write_film(tmp_path_factory.mktemp("film") / "film.mp4", 3, size=(96, 64))


@pytest.fixture(scope="module")
def localizer(checkpoint):
    return Localizer(checkpoint)


def frames_of(path):
    with media.open(path) as opened:
        return list(opened.frames())


def test_share_is_drawn_as_it_is_and_relative_stretched():
    share = np.array([[0.2, 0.4], [-0.5, 0.3]], np.float32)
    step = Step(0, np.zeros((2, 2, 3), np.uint8), share, share + 3, 0, 0, None, None)
    assert np.array_equal(heat_tokens(step, "share"), np.clip(share, 0, 1))
    assert heat_tokens(step, "relative").min() == 0 and heat_tokens(step, "relative").max() == 1
    flat = step._replace(relative=np.full((2, 2), 0.3, np.float32))
    assert not heat_tokens(flat, "relative").any()
    image = films.moving_square(1, (96, 64))
    assert np.array_equal(paint(image, share), overlay(image, heat_of(share, (64, 96))))
    mask = mask_of(share, 0.1, (64, 96))
    assert np.array_equal(mask[..., 0] > 0, heat_of(share, (64, 96)) > 0.1) and set(np.unique(mask)) == {0, 255}


def test_the_film_shows_every_frame_under_the_map_interpolated_at_its_time(localizer, film, tmp_path):
    assert render_clip(localizer, film, None, Outputs(tmp_path / "a"), Look(mask=True), {}, hide_bar=True)
    steps, own = list(localizer.clip(film)), frames_of(film)
    drawn, masks = frames_of(tmp_path / "a.mp4"), frames_of(tmp_path / "a_mask.mp4")
    assert len(drawn) == len(masks) == len(own) == 75
    assert [frame.time for frame in drawn] == pytest.approx([frame.time for frame in own], abs=1e-3)
    for k in (0, 12, 33, 74):
        at = own[k].time * 10
        before, after = steps[int(at + 1e-6)], steps[min(int(at + 1e-6) + 1, 29)]
        share = before.share + (at - int(at + 1e-6)) * (after.share - before.share)
        expected = overlay(own[k].image, heat_of(share, (64, 96)))
        assert np.abs(drawn[k].image.astype(int) - expected).mean() < 6
        lit = heat_of(share, (64, 96)) > localizer.threshold
        assert ((masks[k].image[..., 0] > 127) == lit).mean() > 0.97
    with media.open(tmp_path / "a.mp4") as opened, media.open(film) as source:
        heard, sound = opened.sound(), source.sound()
        assert opened.duration == pytest.approx(3, abs=0.03)
    count = min(len(heard), len(sound))
    assert count == pytest.approx(48000, abs=700)
    assert np.corrcoef(heard[:count], sound[:count])[0, 1] > 0.95
    table = json.loads((tmp_path / "a.json").read_text())
    assert table["complete"] and len(table["steps"]) == 30 and table["about"]["width"] == 96
    assert table["steps"][7]["presence"] == pytest.approx(steps[7].presence, abs=1e-5)
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_silence_stays_dark_if_the_model_claims_nothing(localizer, film, tmp_path, monkeypatch):
    follow = localizer.follow

    def dark(*args, **kwargs):
        for piece in follow(*args, **kwargs):
            yield piece._replace(step=piece.step._replace(share=np.full_like(piece.step.share, 1e-4)))

    monkeypatch.setattr(localizer, "follow", dark)
    bright = {}
    for show in render.SHOWS:
        render_clip(localizer, film, None, Outputs(tmp_path / show), Look(show), {}, hide_bar=True)
        bright[show] = [frame.image.mean() for frame in frames_of(tmp_path / f"{show}.mp4")]
    own = [frame.image.mean() for frame in frames_of(film)]
    assert max(bright["share"]) < 0.6 * min(own) < min(bright["relative"])


def test_a_run_that_is_stopped_leaves_a_film_that_plays_up_to_there(localizer, tmp_path):
    long = films.write_film(tmp_path / "long.mp4", 12)
    asked = iter(range(1000))
    done = render_clip(
        localizer, long, None, Outputs(tmp_path / "a"), Look(), {}, stopped=lambda: next(asked) >= 20, hide_bar=True
    )
    assert not done
    table = json.loads((tmp_path / "a.json").read_text())
    assert not table["complete"] and len(table["steps"]) == 21
    with media.open(tmp_path / "a.mp4") as opened:
        assert opened.duration == pytest.approx(2.1, abs=0.1) and len(opened.sound()) == pytest.approx(33600, abs=1600)
    assert len(frames_of(tmp_path / "a.mp4")) == 53


def test_an_error_on_the_way_leaves_nothing(localizer, film, tmp_path, monkeypatch):
    monkeypatch.setattr(render, "paint", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        render_clip(localizer, film, None, Outputs(tmp_path / "a"), Look(mask=True), {}, hide_bar=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(64, 48), (98, 54), (48, 96)])
def test_pixels_are_those_of_the_film_whatever_its_shape(localizer, size, tmp_path):
    film = films.write_film(tmp_path / "film.mp4", 0.4, size=size)
    render_clip(localizer, film, None, Outputs(tmp_path / "a"), Look(), {}, hide_bar=True)
    with media.open(tmp_path / "a.mp4") as opened:
        assert opened.size == size
    for row in json.loads((tmp_path / "a.json").read_text())["steps"]:
        assert -1 <= row["peak_x"] <= size[0] and -1 <= row["peak_y"] <= size[1]
        if row["box_left"] is not None:
            assert 0 <= row["box_left"] < row["box_right"] <= size[0] and row["box_bottom"] <= size[1]


def test_a_still_with_sound_becomes_a_film_whose_map_moves(localizer, tmp_path):
    still = films.write_film(tmp_path / "still.mp4", 2, times=[0.0])
    render_clip(localizer, still, None, Outputs(tmp_path / "a"), Look(), {}, hide_bar=True)
    assert len(frames_of(tmp_path / "a.mp4")) == pytest.approx(20, abs=1)


def test_an_image_gets_an_overlay_and_one_row(localizer, tmp_path):
    image = films.moving_square(2, (90, 60))
    Image.fromarray(image).save(tmp_path / "photo.png")
    soundfile.write(tmp_path / "sound.wav", films.tone(0, 2), 16000)
    files = tmp_path / "photo.png", tmp_path / "sound.wav"
    render_image(localizer, *files, Outputs(tmp_path / "a"), Look(mask=True), {})
    step = localizer.image(*files)
    with Image.open(tmp_path / "a.png") as drawn, Image.open(tmp_path / "a_mask.png") as mask:
        assert np.array_equal(np.asarray(drawn), paint(image, step.share))
        assert np.array_equal(np.asarray(mask)[..., 0] > 0, step.map > localizer.threshold)
    table = json.loads((tmp_path / "a.json").read_text())
    assert len(table["steps"]) == 1 and table["complete"] and table["steps"][0]["time"] == 0


@pytest.mark.slow
def test_an_hour_of_360p_stays_under_a_gibibyte_and_a_half(checkpoint, tmp_path):
    """Peak memory of a process over two lengths, the longer one an hour."""
    peaks = {}
    for minutes in (2, 60):
        film = films.write_film(tmp_path / f"{minutes}.mp4", 60 * minutes, size=(640, 360))
        code = """
import sys
from pathlib import Path
import torch
from film.localizer import Localizer
from film.render import Look, Outputs, render_clip
from utils import peak_memory_gib
checkpoint, film, out = sys.argv[1:]
render_clip(Localizer(checkpoint), Path(film), None, Outputs(Path(out)), Look(), {})
print(peak_memory_gib(torch.device("cpu")))
"""
        command = [sys.executable, "-c", code, checkpoint, film, tmp_path / "a"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks[minutes] = float(done.stdout)
    assert peaks[60] < 1.5 and peaks[60] < peaks[2] + 0.1, peaks


def test_memory_does_not_grow_with_the_length(localizer, tmp_path, monkeypatch):
    """What Python and NumPy hold at most, traced, over two lengths."""
    monkeypatch.setattr(engine, "BATCH", 4)
    peaks = []
    for seconds in (2, 6):
        film = films.write_film(tmp_path / f"{seconds}.mp4", seconds, fps=12, size=(320, 180))
        tracemalloc.start()
        render_clip(localizer, film, None, Outputs(Path(tmp_path / "a")), Look(), {}, hide_bar=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.15 * peaks[0], peaks
