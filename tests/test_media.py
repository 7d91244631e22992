"""Films, sounds and images through the one door: time, colour and pitch against truth, made here with PyAV."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

import media

COLOURS = np.array([(220, 40, 40), (40, 220, 40), (40, 40, 220), (220, 220, 40), (220, 40, 220), (40, 220, 220)])
TONES = (440, 880, 660, 550, 990, 770)  # Hz of each second


def make_film(path, seconds=6, fps=25):
    """H.264 and AAC: a colour and a tone a second."""
    with av.open(str(path), "w") as film:
        video, audio = film.add_stream("libx264", rate=fps), film.add_stream("aac", rate=44100, layout="mono")
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for number in range(seconds * fps):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), COLOURS[number // fps], np.uint8), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            film.mux(video.encode(frame))
        film.mux(video.encode())
        for second in range(seconds):
            wave = 0.3 * np.sin(2 * np.pi * TONES[second] * np.arange(44100) / 44100)
            frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), "fltp", "mono")
            frame.rate, frame.pts, frame.time_base = 44100, second * 44100, Fraction(1, 44100)
            film.mux(audio.encode(frame))
        film.mux(audio.encode())


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    path = tmp_path_factory.mktemp("media") / "film.mp4"
    make_film(path)
    return path


def pitch(sound, rate=16000):
    """Hz of the strongest tone in the middle of a second of sound."""
    part = sound[rate // 4 : 3 * rate // 4] * np.hanning(rate // 2)
    return np.abs(np.fft.rfft(part, 4 * rate)).argmax() / 4


def test_a_film_tells_what_it_holds(film):
    with media.open(film) as opened:
        assert opened.has_image and opened.has_sound and not opened.is_still
        assert opened.start == 0 and abs(opened.duration - 6) < 0.05
        assert opened.size == (64, 48) and opened.rate == 25 and opened.sound_rate == 44100
        assert opened.decisions == []


def test_frames_come_once_each_in_order_and_last_until_the_next(film):
    with media.open(film) as opened:
        frames = list(opened.frames())
        assert [round(25 * frame.time) for frame in frames] == list(range(150))
        assert all(abs(frame.duration - 0.04) < 1e-6 for frame in frames[:-1])
        part = list(opened.frames(2.5, 3.0))
        assert abs(part[0].time - 2.48) < 0.021 and abs(part[-1].time - 2.96) < 0.021


@pytest.mark.parametrize("time", [0.0, 0.5, 3.5, 5.9, 100.0])
def test_a_frame_at_a_time_is_the_one_shown_then(film, time):
    with media.open(film) as opened:
        frame = opened.frame_at(time)
    assert frame.time <= time + 0.021
    assert np.abs(frame.image[24, 32] - COLOURS[min(int(time), 5)]).max() <= 8


def test_sound_has_its_pitch_at_its_time_and_pieces_are_the_whole(film):
    with media.open(film) as opened:
        whole = opened.sound()
        assert [abs(pitch(whole[16000 * i :]) - tone) < 3 for i, tone in enumerate(TONES)] == [True] * 6
        assert abs(pitch(opened.sound(3.0, 4.0)) - TONES[3]) < 3 and len(opened.sound(3.0, 4.0)) == 16000
        pieces = list(opened.sounds(0.7))
        assert [len(piece) for piece in pieces[:-1]] == [11200] * (len(pieces) - 1)
        assert np.array_equal(np.concatenate(pieces), whole)


def test_an_image_is_a_still(tmp_path):
    Image.new("RGB", (30, 20), (10, 200, 30)).save(tmp_path / "image.dat", "PNG")
    with media.open(tmp_path / "image.dat") as opened:
        assert opened.has_image and opened.is_still and not opened.has_sound and opened.size == (30, 20)
        assert opened.frame_at(7.0).image[5, 5].tolist() == [10, 200, 30]
        with pytest.raises(media.MediaError, match=r"image\.dat: no audio stream"):
            opened.sound()
