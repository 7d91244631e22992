"""Films that play: H.264 and AAC, their times, colours and sound, finished wherever they end."""

import av
import numpy as np
import pytest
from moving_films import tone

import media
from film.writer import FilmWriter, playable_size


def write(path, frames, sound=(), end=0.0, size=(64, 48), channels=None, crf=10):
    """frames: (time, colour); sound: ((samples, C), rate)."""
    channels = sound[0][0].shape[1] if sound and channels is None else channels or 0
    writer = FilmWriter(path, size, 25, channels, crf)
    for time, colour in frames:
        writer.frame(time, np.full((size[1], size[0], 3), colour, np.uint8))
    for samples, rate in sound:
        writer.sound(samples, rate)
    writer.close(end)
    return path


@pytest.mark.parametrize("size, wanted", [((640, 361), (640, 360)), ((7680, 4320), (3840, 2160)), ((1, 3), (2, 4))])
def test_sizes_are_even_and_as_decoders_take_them(size, wanted):
    assert playable_size(*size) == wanted


def test_a_film_plays_in_browsers_its_index_first(tmp_path):
    path = write(tmp_path / "a.mp4", [(i / 25, (10, 200, 90)) for i in range(25)], [(tone(0, 1)[:, None], 16000)], 1)
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0].codec_context, container.streams.audio[0].codec_context
        assert (video.name, video.pix_fmt, video.profile) == ("h264", "yuv420p", "High")
        assert audio.name == "aac" and audio.sample_rate == 48000
    content = path.read_bytes()
    assert content[4:8] == b"ftyp" and 0 < content.index(b"moov") < content.index(b"mdat")


def test_frames_keep_their_own_times_and_colours(tmp_path):
    frames = [(0.0, (220, 30, 30)), (0.04, (30, 220, 30)), (1.0, (30, 30, 220)), (1.05, (250, 250, 250))]
    path = write(tmp_path / "a.mp4", frames, end=2.5)
    with media.open(path) as film:
        assert film.duration == pytest.approx(2.5, abs=0.01)
        shown = list(film.frames())
        assert [frame.time for frame in shown] == pytest.approx([time for time, _ in frames], abs=1e-3)
        for frame, (_, colour) in zip(shown, frames, strict=True):
            assert np.abs(frame.image[24, 32].astype(int) - colour).max() <= 6


@pytest.mark.parametrize("rate, times, end", [(1, [0, 1, 1.9], 2), (0.5, [0, 1.5], 2), (25, [0, 0.04], 3)])
def test_the_last_frame_ends_with_the_film_whatever_its_rate(rate, times, end, tmp_path):
    writer = FilmWriter(tmp_path / "a.mp4", (64, 48), rate, 1)
    for time in times:
        writer.frame(time, np.zeros((48, 64, 3), np.uint8))
    writer.sound(tone(0, end)[:, None], 16000)
    writer.close(end)
    with av.open(str(tmp_path / "a.mp4")) as container:
        for stream in container.streams:
            assert float(stream.duration * stream.time_base) == pytest.approx(end, abs=0.001)
        assert container.streams.video[0].frames == len(times)


def test_the_sound_keeps_pitch_length_and_channels_whatever_its_kind(tmp_path):
    """Three channels become two, twelve one; a rate that changes on the way is no other pitch."""
    time = np.arange(22050) / 22050
    left, right = 0.4 * np.sin(2 * np.pi * 440 * time), 0.4 * np.sin(2 * np.pi * 1000 * time)
    stereo = np.stack([left, right], 1).astype(np.float32)
    slow = np.stack([0.4 * np.sin(2 * np.pi * f * np.arange(8000) / 8000) for f in (440, 1000)], 1)
    path = write(tmp_path / "a.mp4", [(0, (9, 9, 9))], [(stereo, 22050), (slow.astype(np.float32), 8000)], 2)
    with media.open(path) as film:
        pieces = list(film.track())
        heard = np.concatenate([samples for samples, _ in pieces])
        assert {rate for _, rate in pieces} == {48000} and heard.shape[1] == 2
        assert len(heard) == pytest.approx(96000, abs=2048)
        for second in (0, 1):
            for channel, pitch in enumerate((440, 1000)):
                part = heard[second * 48000 + 4800 : second * 48000 + 43200, channel]
                assert np.abs(np.fft.rfft(part)).argmax() * 48000 / len(part) == pytest.approx(pitch, abs=3)
    for channels, kept in ((3, 2), (12, 2)):
        many = np.repeat(left[:, None], channels, 1).astype(np.float32)
        with media.open(write(tmp_path / f"{channels}.mp4", [(0, (9, 9, 9))], [(many, 22050)], 1)) as film:
            assert next(film.track())[0].shape[1] == kept


def test_a_film_without_frames_or_sound_is_closed_without_an_error(tmp_path):
    FilmWriter(tmp_path / "a.mp4", (64, 48), 25, 1).close()
    writer = FilmWriter(tmp_path / "b.mp4", (64, 48), 25, 1)
    writer.frame(0, np.zeros((48, 64, 3), np.uint8))
    writer.abandon()
    writer.abandon()
