"""The engine of localize.py: windows of sound, steps over a film, images and arrays."""

import math
import os
from itertools import pairwise

import av
import moving_films as films
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import film.localizer as engine
import media
from audio_io import log_spectrogram
from film.localizer import Localizer, Windows, heat_of
from maps import enlarge_absolute, smooth_maps, upsample_maps
from model_maxpool import MaxPoolModel
from models import load
from scoring.metrics import share_above
from transforms import eval_transform
from utils import UserError, load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return films.write_film(tmp_path_factory.mktemp("film") / "film.mp4", 4)


@pytest.fixture(scope="module")
def localizer(checkpoint):
    return Localizer(checkpoint)


# ---------------------------------------------------------------- sound


@pytest.mark.parametrize("heard", [0, 1, 900, 30_000, 80_000])
@pytest.mark.parametrize("duration", [0.05, 2.0, 5.0])
def test_a_window_is_cut_around_its_moment_from_the_sound_mirrored_at_both_ends(heard, duration):
    """Whatever the pieces: the same as cutting the whole sound, filled up with silence, mirrored by NumPy."""
    rng = np.random.default_rng(heard)
    sound = rng.standard_normal(heard).astype(np.float32)
    cuts = np.sort(rng.integers(0, heard + 1, 4))
    windows = Windows(iter(np.split(sound, cuts)), 0.5, duration)
    count = max(heard, round(duration * 16000))
    whole = np.pad(np.pad(sound, (0, count - heard)), 8000, mode="reflect")
    for time in np.arange(0, count / 16000, 0.1):
        start = 8000 - 4000 + round(time * 16000)
        assert np.array_equal(windows.around(float(time)), whole[start : start + 8000]), time


def test_windows_of_a_long_sound_hold_little_of_it():
    pieces = (np.zeros(16000, np.float32) for _ in range(10_000))
    windows = Windows(pieces, 1.6, 10_000)
    held = []
    for time in range(0, 2000, 7):
        windows.around(time)
        held.append(len(windows._held))
    assert max(held) < 12 * 16000


# ---------------------------------------------------------------- films


def test_a_step_is_what_the_model_gives_for_its_frame_and_window(localizer, film, checkpoint):
    """The whole path once more, by hand: frame and sound by seeking, no batches, no streaming."""
    steps = list(localizer.clip(film))
    assert [step.time for step in steps] == pytest.approx(np.arange(40) / 10)
    model, inference = load(checkpoint).model, localizer.trained.inference
    with media.open(film) as opened:
        for step in (steps[k] for k in (7, 20, 31)):
            image = opened.frame_at(step.time).image
            sound = opened.sound(step.time - 0.4, step.time + 0.4)[:12800]
            assert np.array_equal(step.image, image)
            pixels = eval_transform(64)(Image.fromarray(image))[None]
            with torch.no_grad():
                seen, grid = model.attend_image(pixels)
                heard = model.attend_audio(log_spectrogram(sound)[None])
                maps = model.maps(seen, heard, grid, inference["infer_sharpening"])
                presence = model.confidences(seen, heard)["presence"].item()
            assert np.allclose(step.share, maps.share[0], atol=1e-4)
            relative = smooth_maps(maps.audio_map, inference["infer_smoothing"])
            assert np.allclose(step.relative, relative[0], atol=1e-4)
            assert step.presence == pytest.approx(presence, abs=1e-4)
            large = enlarge_absolute(torch.from_numpy(step.share)[None])
            assert step.lit == share_above(large, localizer.threshold).item()
            peaked = upsample_maps(torch.from_numpy(step.relative)[None])[0]
            y, x = divmod(int(peaked.argmax()), 224)
            assert (step.peak.x, step.peak.y) == pytest.approx(((x + 0.5) * 64 / 224 - 0.5, (y + 0.5) * 48 / 224 - 0.5))
            assert step.peak.value == large[0, y, x].item()


def test_frames_and_windows_go_through_the_model_once_and_frames_are_decoded_once(localizer, film, monkeypatch):
    seen, heard, decoded = [], [], []
    model, frames = localizer.model, media.Streams.frames
    attend_image, attend_audio = model.attend_image, model.attend_audio
    monkeypatch.setattr(model, "attend_image", lambda x: (seen.append(len(x)), attend_image(x))[1])
    monkeypatch.setattr(model, "attend_audio", lambda x: (heard.append(len(x)), attend_audio(x))[1])

    def count(self, *limits):
        for frame in frames(self, *limits):
            decoded.append(frame.time)
            yield frame

    monkeypatch.setattr(media.Streams, "frames", count)
    steps = list(localizer.clip(film))
    assert sum(heard) == len(steps) == 40 and max(heard) == engine.BATCH
    assert sum(seen) == 40 and len(decoded) == len(set(decoded)) == 100
    seen.clear(), heard.clear()
    slow = films.write_film(film.with_name("slow.mp4"), 4, fps=2)
    assert len(list(localizer.clip(slow))) == 40 == sum(heard)
    assert sum(seen) < 14  # 8 frames, and those that two batches share


def test_pieces_hold_every_frame_once_and_a_frame_that_lasts_at_every_step(localizer, film, tmp_path):
    def times_of(path):
        with engine.opened(path) as (shown, heard):
            pieces = list(localizer.follow(shown, heard))
        for piece, following in pairwise(pieces):
            assert all(piece.step.time - 1e-9 <= time < following.step.time for time, _ in piece.shots)
        return [time for piece in pieces for time, _ in piece.shots]

    assert times_of(film) == pytest.approx(np.arange(100) / 25)
    stops = [0.0, 0.04, 0.08, 1.0, 1.05, 2.5]
    uneven = films.write_film(tmp_path / "uneven.mp4", 3, times=stops)
    expected = {*stops, *np.round(np.arange(0.1, 1, 0.1), 6), *np.round(np.arange(1.1, 3, 0.1), 6)}
    assert times_of(uneven) == pytest.approx(sorted(expected), abs=1e-3)


def test_images_that_begin_late_are_shown_from_the_beginning(localizer, tmp_path):
    late = films.write_film(tmp_path / "late.mkv", 3, begins=1.0)
    steps = list(localizer.clip(late))
    assert steps[0].time == 0 and len(steps) == 40
    assert np.array_equal(steps[0].image, steps[9].image)


def test_a_still_with_sound_and_a_clip_shorter_than_the_window_and_silence_are_followed(localizer, tmp_path):
    still = films.write_film(tmp_path / "still.mp4", 2, times=[0.0])
    steps = list(localizer.clip(still))
    assert len(steps) == pytest.approx(20, abs=1) and len({step.presence for step in steps}) > 2
    short = films.write_film(tmp_path / "short.mp4", 0.2)
    assert 2 <= len(list(localizer.clip(short))) <= 3
    silent = films.write_film(tmp_path / "silent.mp4", 1, sound=lambda start, seconds: 0 * films.tone(start, seconds))
    assert len({step.share.tobytes() for step in localizer.clip(silent)}) >= 1


def test_large_frames_do_not_wait_for_a_full_batch(localizer, film, monkeypatch):
    whole = list(localizer.clip(film))
    monkeypatch.setattr(engine, "BUFFER_BYTES", 3 * 64 * 48 * 3)
    parts = list(localizer.clip(film))
    assert [step.time for step in parts] == [step.time for step in whole]
    assert all(np.allclose(a.share, b.share, atol=1e-4) for a, b in zip(parts, whole, strict=True))


def test_another_sound_takes_the_place_of_the_films_own(localizer, film, tmp_path):
    soundfile.write(tmp_path / "own.wav", films.tone(0, 4), 16000)
    quiet = films.write_film(tmp_path / "quiet.mp4", 4, sound=None)
    with pytest.raises(UserError, match=r"quiet\.mp4: no sound"):
        next(localizer.clip(quiet))
    given = list(localizer.clip(quiet, tmp_path / "own.wav"))
    for one, other in zip(given, localizer.clip(film), strict=True):
        assert one.presence == pytest.approx(other.presence, abs=0.05)


@pytest.mark.parametrize("setting", ["map_fps", "window"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
def test_numbers_that_make_no_sense_are_refused(setting, value, localizer):
    with pytest.raises(UserError, match=f"{value}"):
        Localizer(localizer.trained, **{setting: value})


def test_a_file_without_image_is_refused(localizer, tmp_path):
    sound = films.write_film(tmp_path / "sound.m4a", 1, picture=None)
    with pytest.raises(UserError, match=r"sound\.m4a: no image"):
        next(localizer.clip(sound))


def test_of_a_film_that_was_cut_off_what_is_there_is_shown_and_that_is_said(film, tmp_path):
    indexed = tmp_path / "indexed.mp4"
    with av.open(str(film)) as source, av.open(str(indexed), "w", options={"movflags": "faststart"}) as copy:
        streams = {stream.index: copy.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                copy.mux(packet)
    with engine.opened(indexed) as (shown, _):
        assert not any("truncated" in decision for decision in shown.decisions)
    os.truncate(indexed, indexed.stat().st_size * 2 // 3)
    with engine.opened(indexed) as (shown, _):
        assert any("truncated" in decision and "what is there" in decision for decision in shown.decisions)


def test_a_shorter_window_hears_less_and_is_repeated_to_the_models_length(checkpoint, film):
    short = Localizer(checkpoint, window=0.2)
    step = list(short.clip(film))[20]
    with media.open(film) as opened:
        sound = opened.sound(step.time - 0.1, step.time + 0.1)[:3200]
        heard = log_spectrogram(np.tile(sound, 4))[None]
        pixels = eval_transform(64)(Image.fromarray(opened.frame_at(step.time).image))[None]
    share = load(checkpoint).model.localize(pixels, heard).share
    assert np.allclose(step.share, share[0], atol=1e-4)
    with pytest.raises(UserError, match="window"):
        Localizer(checkpoint, window=0.01)


def test_a_model_that_is_tested_with_larger_images_is_asked_about_larger_ones(checkpoint, film, tmp_path):
    """checkpoint: of 64 px, which are 4 x 4 tokens."""
    larger = tmp_path / "larger.pth"
    save_checkpoint(larger, load_checkpoint(checkpoint) | {"args": {"infer_image_size": 96}})
    steps = [next(Localizer(path).clip(film)) for path in (checkpoint, larger)]
    assert [step.share.shape for step in steps] == [(4, 4), (6, 6)]


# ---------------------------------------------------------------- images


def test_files_and_arrays_give_the_same_step(localizer, tmp_path):
    image, sound = films.moving_square(1.3, (80, 60)), films.tone(0, 0.8)
    Image.fromarray(image).save(tmp_path / "image.png")
    soundfile.write(tmp_path / "sound.wav", sound, 16000, subtype="FLOAT")
    one, other = localizer.image(image, sound), localizer.image(tmp_path / "image.png", str(tmp_path / "sound.wav"))
    assert np.array_equal(one.image, other.image) and np.allclose(one.share, other.share, atol=1e-5)
    maps = load(localizer.trained.about["path"]).model.localize(
        eval_transform(64)(Image.fromarray(image))[None], log_spectrogram(sound)[None]
    )
    assert np.allclose(one.share, maps.share[0], atol=1e-5)
    assert one.map.shape == (60, 80) and one.map.dtype == np.float32
    assert np.allclose(heat_of(one.share, (224, 224)), enlarge_absolute(maps.share)[0], atol=1e-5)
    for bad in (image[..., 0], image.astype(float), image[:0]):
        with pytest.raises(ValueError, match="uint8"):
            localizer.image(bad, sound)
    for bad in (sound[None], (sound * 100).astype(np.int16), sound * np.nan):
        with pytest.raises(ValueError, match="finite floats"):
            localizer.image(image, bad)
    with pytest.raises(UserError, match="empty"):
        localizer.image(image, sound[:0])


def test_the_box_is_that_of_the_largest_lit_region_in_pixels_of_the_image(localizer):
    lit = np.zeros((224, 224), bool)
    lit[10:20, 10:20] = lit[100:140, 56:112] = True
    image = np.zeros((448, 112, 3), np.uint8)
    assert engine._largest_box(lit, image) == (28, 200, 56, 280)
    assert engine._largest_box(np.zeros((224, 224), bool), image) is None


def test_a_max_pooled_model_is_followed_in_its_own_range(tmp_path, film):
    torch.manual_seed(0)
    model = MaxPoolModel("small", 16, image_size=64, audio_seconds=0.8)
    about = {"model": model.state_dict(), "model_config": model.config, "threshold": {"value": -0.25}}
    save_checkpoint(tmp_path / "pooled.pth", about)
    localizer = Localizer(tmp_path / "pooled.pth")
    assert localizer.threshold == -0.25 and localizer.has_threshold
    step = next(localizer.clip(film))
    assert -1 <= step.share.min() <= step.share.max() <= 1
    assert step.presence == pytest.approx(step.share.max(), abs=1e-5)
