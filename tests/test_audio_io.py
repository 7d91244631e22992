"""Sound preprocessing: reference spectrograms, cutting, bad files."""

from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch
from conftest import GOLDEN, files_up_to

import audio_io
from utils import UserError

HUGE_HEADER = b"\x93NUMPY\x01\x00\x50\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1, 257, 10000000000)}      "


@pytest.mark.parametrize("name", ["long", "short", "stereo"])
def test_spectrogram_matches_the_reference(name):
    """FFT kernels differ between CPUs, most where there is next to nothing: what is compared is power."""
    reference = np.load(GOLDEN / "preprocess_public.npz")[f"spectrogram_{name}"].astype(np.float64)
    ours = audio_io.load_spectrogram(GOLDEN / "preprocess" / f"{name}.wav", seconds=5.0).numpy().astype(np.float64)
    assert ours.shape == (1, 257, 501)
    power, expected = np.exp(12 * ours), np.exp(12 * reference)
    assert (np.abs(power - expected) <= 5e-6 * expected.max(axis=1, keepdims=True)).all()
    assert np.abs(ours - reference).max() <= 3e-4


def test_a_cut_keeps_the_middle_and_a_short_sound_is_repeated():
    ramp = np.arange(10, dtype=np.float32)
    assert audio_io.crop_or_tile(ramp, 4).tolist() == [3, 4, 5, 6]
    assert audio_io.crop_or_tile(ramp, 4, position=0.0).tolist() == [0, 1, 2, 3]
    assert audio_io.crop_or_tile(ramp[:3], 7).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_stereo_is_mixed_and_other_rates_are_resampled(tmp_path):
    time = np.arange(44100) / 44100
    tone = np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / "a.wav", np.stack([tone, tone / 2], axis=1), 44100)
    assert abs(np.abs(audio_io.load_audio(tmp_path / "a.wav")).max() - 0.75) < 0.01
    soundfile.write(tmp_path / "b.flac", tone, 44100)
    mono = audio_io.load_audio(tmp_path / "b.flac")
    assert mono.shape == (16000,)
    spectrum = np.abs(np.fft.rfft(mono))
    assert spectrum.argmax() == 440


def test_a_sound_that_the_disk_does_not_take_is_one_line(tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000) / 2
    audio_io.write_audio(tmp_path / "a.wav", tone)
    assert soundfile.info(tmp_path / "a.wav").subtype == "PCM_16"
    assert np.abs(audio_io.load_audio(tmp_path / "a.wav") - tone).max() < 2**-14
    with files_up_to(5_000), pytest.raises(UserError, match=r"b\.wav cannot be written \(File too large\)"):
        audio_io.write_audio(tmp_path / "b.wav", tone)


@pytest.mark.parametrize("right", [-1.0, -0.9, -0.8])
def test_of_channels_that_cancel_the_loudest_is_taken(right, tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(32000) / 16000)
    soundfile.write(tmp_path / "a.wav", np.stack([0.5 * tone, 0.5 * right * tone], axis=1), 16000)
    for length in (None, 16000):
        assert abs(np.abs(audio_io.load_audio(tmp_path / "a.wav", length)).max() - 0.5) < 0.01
    soundfile.write(tmp_path / "b.wav", np.random.default_rng(0).uniform(-0.5, 0.5, (16000, 2)), 16000, subtype="FLOAT")
    stereo = soundfile.read(tmp_path / "b.wav", dtype="float32")[0]
    assert np.array_equal(audio_io.load_audio(tmp_path / "b.wav"), stereo.mean(axis=1))  # unrelated: the mean


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_every_kind_of_wav_gives_the_same_waveform(subtype, tmp_path):
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(96000) / 96000)
    soundfile.write(tmp_path / "a.wav", np.stack([tone] * 6, axis=1), 96000, subtype=subtype)  # 96 kHz, six channels
    mono = audio_io.load_audio(tmp_path / "a.wav")
    wanted = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    assert mono.dtype == np.float32 and mono.shape == (16000,)
    assert np.abs(mono - wanted)[500:-500].max() < (0.01 if subtype == "PCM_U8" else 1e-3)


def test_a_stored_power_spectrogram_equals_the_sound_it_came_from(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 32000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, 16000, subtype="FLOAT")
    np.save(tmp_path / "a.npy", audio_io.power_spectrogram(noise).numpy())
    loaded = [audio_io.load_spectrogram(tmp_path / name, seconds=2.0) for name in ("a.wav", "a.npy")]
    assert torch.equal(*loaded)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.wav", b""),
        ("a.wav", b"RIFF not a sound"),
        ("a.npy", b""),
        ("a.npy", np.ones((2, 3)).tobytes()),
        ("a.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((("),
        ("a.npy", HUGE_HEADER),
    ],
)
def test_a_broken_sound_is_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name):
        audio_io.load_spectrogram(path, seconds=1.0)


def test_a_sound_too_loud_for_a_spectrogram_is_named(tmp_path):
    wave = np.zeros(16000, np.float32)
    wave[5] = 1e30
    soundfile.write(tmp_path / "loud.wav", wave, 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"loud\.wav.*not finite"):
        audio_io.load_spectrogram(tmp_path / "loud.wav", seconds=1.0)


def test_a_wav_that_is_cut_short_is_refused(tmp_path):
    path = tmp_path / "cut.wav"
    soundfile.write(path, np.full(16000, 0.1), 16000)
    whole = path.read_bytes()
    assert len(audio_io.load_audio(path)) == 16000
    path.write_bytes(whole[:9000])
    with pytest.raises(ValueError, match=r"cut\.wav is cut short"):
        audio_io.load_audio(path)
    path.write_bytes(whole[:4] + b"\xff" * 4 + whole[8:])  # as a stream writes it
    assert len(audio_io.load_audio(path)) == 16000


def write_mp3(path, wave, rate, **options):
    """MP3 with or without a header that tells its length (`write_xing`)."""
    with av.open(str(path), "w", options={key: str(value) for key, value in options.items()}) as file:
        stream = file.add_stream("libmp3lame", rate=rate, layout="mono", options={"global_quality": "600"})
        stream.codec_context.qscale = True
        frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), "fltp", "mono")
        frame.rate, frame.pts = rate, 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode())


def pitches(mono):
    """Hz of the strongest tone of each second."""
    return [int(np.abs(np.fft.rfft(mono[i : i + 16000])).argmax()) for i in range(0, len(mono) - 15999, 16000)]


def test_an_mp3_that_does_not_tell_its_length_is_read_to_the_end(tmp_path):
    time = np.arange(10 * 44100) / 44100
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, len(time)) * (time < 2)  # many bits first, few later
    write_mp3(tmp_path / "a.mp3", 0.3 * np.sin(2 * np.pi * 440 * time) + noise, 44100, write_xing=0)
    mono = audio_io.load_audio(tmp_path / "a.mp3")
    assert abs(len(mono) / 16000 - 10) < 0.1 and pitches(mono)[3:9] == [440] * 6


@pytest.mark.parametrize("announced", ["part", "nothing"])
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_a_wav_that_holds_more_than_its_header_announces_is_read_to_the_end(announced, subtype, tmp_path):
    path, time = tmp_path / "a.wav", np.arange(5 * 16000) / 16000
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 440 * time), 16000, subtype=subtype)
    content = bytearray(path.read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = (8000 if announced == "part" else 0).to_bytes(4, "little")
    content[4:8] = (8000 + place if announced == "part" else 0).to_bytes(4, "little")
    path.write_bytes(content)
    assert pitches(audio_io.load_audio(path)) == [440] * 5
    assert len(audio_io.load_audio(path, 64000)) == 64000 and pitches(audio_io.load_audio(path, 64000)) == [440] * 4
    path.write_bytes(content[: place + 8004] + b"LIST" + (4).to_bytes(4, "little") + b"INFO")  # a true length
    assert len(audio_io.load_audio(path)) == (4000 if subtype == "PCM_16" else 2000) or announced == "nothing"


def test_a_sound_whose_rate_changes_on_the_way_keeps_pitch_and_length(tmp_path):
    for name, rate in (("a", 44100), ("b", 22050)):
        write_mp3(tmp_path / f"{name}.mp3", 0.3 * np.sin(2 * np.pi * 440 * np.arange(4 * rate) / rate), rate)
    both = tmp_path / "both.mp3"
    both.write_bytes((tmp_path / "a.mp3").read_bytes() + (tmp_path / "b.mp3").read_bytes())
    mono = audio_io.load_audio(both)
    found = pitches(mono)
    assert abs(len(mono) / 16000 - 8) < 0.3 and found[:3] == [440] * 3 and found[5:7] == [440] * 2


def write_sound(path, codec, container, rate, frequency=440):
    """4 s of a tone."""
    wave = 0.3 * np.sin(2 * np.pi * frequency * np.arange(4 * rate) / rate)
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), "fltp", "mono")
        frame.rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for part in av.AudioResampler(stream.format, "mono", rate).resample(frame):
            file.mux(stream.encode(part))
        file.mux(stream.encode())


@pytest.mark.parametrize(
    ("codec", "container", "rates"),
    [("aac", "adts", (44100, 32000)), ("libopus", "ogg", (48000, 48000)), ("flac", "ogg", (44100, 44100))],
)
def test_sounds_that_are_appended_to_each_other_are_read_to_the_end(codec, container, rates, tmp_path):
    content = b""
    for rate, frequency in zip(rates, (440, 880), strict=True):
        write_sound(tmp_path / "part", codec, container, rate, frequency)
        content += (tmp_path / "part").read_bytes()
    (tmp_path / "both").write_bytes(content)
    mono = audio_io.load_audio(tmp_path / "both")
    found = pitches(mono)
    assert abs(len(mono) / 16000 - 8) < 0.3 and found[1:3] == [440] * 2 and found[5:7] == [880] * 2


def test_a_chained_ogg_that_ffmpeg_cannot_read_on_is_named_and_not_cut_short(tmp_path):
    content = b""
    for rate in (44100, 22050):
        soundfile.write(
            tmp_path / "part", 0.3 * np.sin(2 * np.pi * 440 * np.arange(4 * rate) / rate), rate, format="OGG"
        )
        content += (tmp_path / "part").read_bytes()
    (tmp_path / "both.ogg").write_bytes(content)
    with pytest.raises(ValueError, match=r"both\.ogg: what follows 4\.0 s is of a kind that FFmpeg cannot read"):
        audio_io.load_audio(tmp_path / "both.ogg")


def test_a_wav_that_libsndfile_cannot_seek_in_is_read(tmp_path):
    soundfile.write(tmp_path / "a.wav", 0.3 * np.sin(2 * np.pi * 440 * np.arange(32000) / 8000), 8000, "GSM610")
    assert pitches(audio_io.load_audio(tmp_path / "a.wav")) == [440] * 4


@pytest.mark.parametrize("kind", ["m4a", "aac", "opus", "aiff", "wv", "mka", "ac3"])
def test_sounds_in_other_formats_are_read_by_their_content(kind, tmp_path):
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(4 * 48000) / 48000)
    codecs = {"m4a": ("ipod", "aac"), "aac": ("adts", "aac"), "opus": ("opus", "libopus"), "wv": ("wv", "wavpack")}
    codecs |= {"mka": ("matroska", "flac"), "ac3": ("ac3", "ac3")}
    path = tmp_path / f"a.{kind}"
    if kind == "aiff":
        soundfile.write(path, wave, 48000, format="AIFF")
    else:
        container, codec = codecs[kind]
        with av.open(str(path), "w", format=container) as file:
            stream = file.add_stream(codec, rate=48000, layout="mono")
            frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), "fltp", "mono")
            frame.rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
            for part in av.AudioResampler(stream.format, "mono", 48000).resample(frame):
                file.mux(stream.encode(part))
            file.mux(stream.encode())
    path = path.rename(tmp_path / "a.sound")  # by content
    mono = audio_io.load_audio(path)
    assert abs(len(mono) / 16000 - 4) < 0.1 and pitches(mono)[1:3] == [440] * 2


def test_an_empty_sound_and_one_with_nan_are_refused(tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    with pytest.raises(ValueError, match="empty"):
        audio_io.load_audio(tmp_path / "empty.wav")
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match="not finite"):
        audio_io.load_audio(tmp_path / "nan.wav")


@pytest.mark.parametrize(
    "kind, subtype",
    [
        ("WAV", "PCM_16"),
        ("WAVEX", "PCM_16"),
        ("WAV", "PCM_24"),
        ("WAV", "FLOAT"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("MP3", "MPEG_LAYER_III"),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_a_cut_that_is_read_alone_equals_the_cut_of_the_whole(kind, subtype, channels, tmp_path):
    path = tmp_path / f"a.{kind.lower()}"
    noise = np.random.default_rng(0).uniform(-1, 1, (24001, channels))
    soundfile.write(path, noise, 16000, format=kind, subtype=subtype)
    whole = audio_io.load_audio(path)
    for length in (16000, len(whole), 40000):
        for position in (0.0, 0.4321, 1.0):
            wanted = audio_io.crop_or_tile(whole, length, position)
            assert np.array_equal(audio_io.load_audio(path, length, position), wanted)


@pytest.mark.parametrize("written", [b"\xff" * 4, bytes(4), b"\x24\xf0\xff\x7f", b"\x24\x00\x00\x80"])
def test_a_cut_of_a_wav_whose_writer_did_not_know_its_length(written, tmp_path):
    path = tmp_path / "stream.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, 16000), 16000)
    known = path.read_bytes()
    place = known.index(b"data") + 4
    path.write_bytes(known[:4] + written + known[8:place] + b"\xff" * 4 + known[place + 4 :])
    whole = audio_io.load_audio(path)
    assert np.array_equal(audio_io.load_audio(path, 8000, 0.4), audio_io.crop_or_tile(whole, 8000, 0.4))


def test_a_wav_that_is_cut_short_or_broken_is_refused_when_only_a_part_is_wanted(tmp_path):
    path = tmp_path / "cut.wav"
    soundfile.write(path, np.full(16000, 0.1), 16000)
    whole = path.read_bytes()
    path.write_bytes(whole[:30000])
    with pytest.raises(ValueError, match=r"cut\.wav is cut short"):
        audio_io.load_audio(path, 1000, 0.0)
    path.write_bytes(whole[:20])
    with pytest.raises(ValueError, match=r"cut\.wav"):
        audio_io.load_audio(path, 1000, 0.0)


def test_half_of_what_has_no_source_is_silence_and_the_rest_noise_of_every_colour_and_level():
    torch.manual_seed(0)
    drawn = [audio_io.log_spectrogram(audio_io.draw_silence(0.5)) for _ in range(200)]
    floor = np.log(audio_io.LOG_FLOOR) / audio_io.LOG_SCALE
    noisy = [x for x in drawn if x.max() > floor + 1e-6]
    assert all(x.shape == (1, 257, 51) and torch.isfinite(x).all() for x in drawn)
    assert 0.4 < len(noisy) / len(drawn) < 0.6
    power = [(audio_io.LOG_SCALE * x[0]).exp().mean(1) for x in noisy]
    level = [10 * np.log10(p.sum().item()) for p in power]
    assert 30 < max(level) - min(level) < 41  # 40 dB of levels
    low = [(p[1:17].sum() / p[1:].sum()).item() for p in power]  # white noise has 1/16 of its power there
    assert min(low) < 0.1 and max(low) > 0.9
