"""File -> waveform -> log power spectrogram.

F = 257 frequency bins, L frames of 10 ms. This is the only file that knows 512 and 160; 16 kHz stands in media.py.
"""

import io
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO, NamedTuple

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

import media
from media import SAMPLE_RATE, MediaError, mix_down
from transforms import mask_bands
from utils import Contents, as_file, on_disk, writing

N_FFT = 512
HOP = 160
N_BINS = N_FFT // 2 + 1  # F
WINDOW = torch.hann_window(N_FFT)
LOG_FLOOR = 1e-7
LOG_SCALE = 12.0
VALUES_AT_ONCE = 2**18  # of clips, on a CPU: what lies between waveform and spectrogram stays in its caches
LOUDEST = 1e15  # a sample from which power in float32 stays finite


def num_samples(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE)


def num_frames(seconds: float) -> int:
    """Number of frames L of a centred spectrogram: 501 for 5 s."""
    return 1 + num_samples(seconds) // HOP


class Sound(NamedTuple):
    """What an audio file holds, or the part of it that the wanted cuts reach."""

    values: np.ndarray  # (samples,) mono 16 kHz, float32 in -1..1 or its 16-bit levels; or power (1, F, frames)
    first: int  # place of the first sample or frame in the whole
    total: int  # samples or frames of the whole


def load_audio(path: str | Path, length: int | None = None, position: float = 0.5) -> np.ndarray:
    """Decode the sound of a file, whatever its format, rate and number of channels, to mono 16 kHz.

    length, position: cut or repeat it to `length` samples, see `crop_or_tile`; of a 16-bit WAV no more is read.
    Returns (samples,) float32 in -1..1: the channels as `mix_down` mixes them, resampled with soxr's high quality.
    Raises ValueError, naming the file, when it cannot be decoded, is cut short, empty or, in what is read, not finite.
    """
    sound = _load_waveform(path, length, (position, position))
    return as_float(sound.values if length is None else cut(sound, length, position))


def load_sound(path: str | Path, seconds: float, positions: tuple[float, float] = (0.5, 0.5)) -> Sound:
    """Audio file, or stored power spectrogram (.npy), as far as cuts of `seconds` between both positions reach.

    Raises ValueError, naming the file, when it is neither: see `load_audio`, `load_power`.
    """
    if str(path).endswith(".npy"):
        power = load_power(path)
        first, end = _reach(power.shape[2], num_frames(seconds), positions)
        with np.errstate(over="ignore"):
            sound = Sound(power[:, :, first:end].astype(np.float32), first, power.shape[2])
        too_loud = not np.isfinite(sound.values).all()
    else:
        sound = _load_waveform(path, num_samples(seconds), positions)
        too_loud = sound.values.dtype != np.int16 and np.abs(sound.values).max() > LOUDEST
    if too_loud:
        raise ValueError(f"the audio {path} is so loud that its spectrogram is not finite: samples must be in -1..1")
    return sound


def load_heard(path: str | Path | Sequence[str], seconds: float, at: float | None = None) -> Sound:
    """What a model hears of an audio file: its middle, or around second `at`; of several files the sum of that.

    ValueError, naming the file, as `load_sound`, and for stored spectrograms where waveforms are needed.
    """
    if isinstance(path, str | Path) and at is None:
        return load_sound(path, seconds)
    length, heard = num_samples(seconds), []
    for file in (path,) if isinstance(path, str | Path) else path:
        refuse_stored(file)
        sound = load_sound(file, seconds, (0.5, 0.5) if at is None else (0.0, 1.0))
        slack = sound.total / SAMPLE_RATE - seconds
        position = 0.5 if at is None or slack <= 0 else min(max((at - seconds / 2) / slack, 0.0), 1.0)
        heard.append(as_float(cut(sound, length, position)))
    return Sound(heard[0] if len(heard) == 1 else np.sum(heard, axis=0), 0, length)


def refuse_stored(path: str | Path) -> None:
    if str(path).endswith(".npy"):
        raise ValueError(f"{path} is a stored spectrogram: a waveform is needed to mix, to add noise or to cut by time")


def with_noise(sound: Sound, path: str | Path | Sequence[str], seconds: float, snr: float) -> Sound:
    """The part of the sound that a model hears, with white noise `snr` dB below it; silence stays silence.

    The noise is drawn by what is heard, so that the same audio gets the same noise everywhere. ValueError for a stored
    spectrogram.
    """
    for file in (path,) if isinstance(path, str | Path) else path:
        refuse_stored(file)
    waveform = as_float(cut(sound, num_samples(seconds)))
    draw = np.random.default_rng(zlib.crc32(np.ascontiguousarray(waveform).tobytes()))
    level = np.sqrt(np.mean(np.square(waveform, dtype=np.float64)) * 10 ** (-snr / 10))
    noise = draw.standard_normal(len(waveform), np.float32)
    return Sound(waveform + np.float32(level) * noise, 0, len(waveform))


def write_audio(path: str | Path, samples: np.ndarray, kind: str = "WAV") -> None:
    """Write (samples,) or (samples, C) at 16 kHz, WAV in 16 bits; Unwritable where the disk does not take it.

    kind: of soundfile's formats. libsndfile does not say what is wrong with a disk, so it never writes to one.
    """
    content = io.BytesIO()
    soundfile.write(content, samples, SAMPLE_RATE, "PCM_16" if kind == "WAV" else None, format=kind)
    with writing(path):
        Path(path).write_bytes(content.getbuffer())


def _load_waveform(path: str | Path, length: int | None, positions: tuple[float, float]) -> Sound:
    try:
        file = _opened(path)
        if file is None:
            with on_disk(path) as there, media.open(there) as opened:
                sound = _reached(opened.sound(), length, positions)
        else:
            with file:
                sound = _read(file, length, positions)
    except MediaError as error:
        raise ValueError(f"cannot decode the audio {path}: {error.reason}") from error
    except (soundfile.LibsndfileError, OSError, MemoryError, OverflowError) as error:
        raise ValueError(f"cannot decode the audio {path}: {error}") from error
    if sound.values.size == 0:
        raise ValueError(f"the audio {path} is empty")
    if not np.isfinite(sound.values).all():
        raise ValueError(f"the audio {path} holds values that are not finite")
    return sound


def _read(file: soundfile.SoundFile, length: int | None, positions: tuple[float, float]) -> Sound:
    """What the cuts reach; of a 16-kHz 16-bit WAV, where every sample's place is known, no more is read."""
    known = file.format in ("WAV", "WAVEX", "RAW") and file.subtype == "PCM_16" and file.samplerate == SAMPLE_RATE
    if known and length is not None:
        first, end = _reach(file.frames, length, positions)
        file.seek(first)
        levels = file.read(end - first, dtype="int16", always_2d=True)
        mono = levels[:, 0] if levels.shape[1] == 1 else mix_down(as_float(levels), SAMPLE_RATE)[0]
        return Sound(mono, first, file.frames)
    mono, _ = mix_down(file.read(dtype="float32", always_2d=True), file.samplerate)
    if file.samplerate != SAMPLE_RATE and mono.size and np.isfinite(mono).all():
        mono = resample(mono, file.samplerate)
    return _reached(mono, length, positions)


def _reached(mono: np.ndarray, length: int | None, positions: tuple[float, float]) -> Sound:
    first, end = (0, len(mono)) if length is None else _reach(len(mono), length, positions)
    return Sound(mono[first:end], first, len(mono))


def _opened(path: str | Path) -> soundfile.SoundFile | None:
    """An uncompressed or FLAC file, ready to be read; None for what media.py reads, which believes no header's length.

    Raises ValueError when a WAV is cut short. A WAV whose header announces less than there is is read to its end.
    """
    if not (isinstance(path, Contents) or os.path.isfile(path)):
        raise ValueError(f"cannot decode the audio {path}: no such file")
    beyond = _check_whole(path)
    try:
        file = soundfile.SoundFile(as_file(path))
    except soundfile.LibsndfileError:
        return None
    unread = file.format in ("MP3", "MPEG", "OGG") or (file.format == "FLAC" and file.frames >= 2**62)
    if unread or not file.seekable():  # libsndfile cannot say how much there is
        file.close()
        return None
    if beyond and file.subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"):
        settings = file.samplerate, file.channels, file.subtype, "LITTLE", "RAW"
        file.close()
        with _opened_bytes(path) as whole:
            whole.seek(beyond)
            return soundfile.SoundFile(io.BytesIO(whole.read()), "r", *settings)
    return file


def _reach(total: int, length: int, positions: tuple[float, float]) -> tuple[int, int]:
    """The first and the end of what cuts of `length` between two positions take of `total` samples or frames."""
    slack = max(total - length, 0)
    return int(slack * positions[0]), min(int(slack * positions[1]) + length, total)


def as_float(waveform: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """16-bit levels to float32 in -1..1, as soundfile scales them; float32 stays as it is."""
    if isinstance(waveform, torch.Tensor):
        return waveform.float() * 2**-15 if waveform.dtype == torch.int16 else waveform
    return waveform * np.float32(2**-15) if waveform.dtype == np.int16 else waveform


def resample(mono: np.ndarray, rate: int) -> np.ndarray:
    """(samples,) at `rate` Hz -> (samples,) at 16 kHz, by soxr's high quality."""
    return soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")


def _check_whole(path: str | Path) -> int:
    """Where the samples of a WAV begin that holds more of them than its header announces; 0 for all other files.

    A WAV shorter than its header says decodes without an error: ValueError. See `_is_unknown` for streams.
    """
    with _opened_bytes(path) as file:
        head, size = file.read(12), file.seek(0, os.SEEK_END)
        length = int.from_bytes(head[4:8], "little")
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return 0
        if not _is_unknown(length) and size < length + 8 - length % 2:
            raise ValueError(f"the audio {path} is cut short: {size} of {length + 8} bytes")
        place = 12
        while place + 8 <= size:
            file.seek(place)
            name, length = struct.unpack("<4sI", file.read(8))
            if name == b"data":
                after = place + 8 + length + length % 2
                file.seek(min(after, size))
                follows = file.read(8)
                other_chunks = len(follows) == 8 and follows[:4].isascii() and follows[:4].decode().isprintable()
                return place + 8 if after < size and not other_chunks else 0
            place += 8 + length + length % 2
    return 0


def _opened_bytes(path: str | Path) -> BinaryIO:
    return as_file(path) if isinstance(path, Contents) else open(path, "rb")


def _is_unknown(length: int) -> bool:
    """Whether the length in a WAV's header stands for any: streams write 0, all ones, or about 2 GiB (arecord, SoX)."""
    return length in (0, 2**32 - 1) or 2**31 - 2**16 <= length <= 2**31 + 2**16


def crop_or_tile(waveform: np.ndarray, length: int, position: float = 0.5) -> np.ndarray:
    """Cut (samples,) to `length` samples, or repeat it until it is that long.

    position: where the cut lies, as a fraction of the slack; 0.5 is the middle.
    """
    return cut(Sound(waveform, 0, len(waveform)), length, position)


def cut(sound: Sound, length: int, position: float = 0.5) -> np.ndarray:
    """`length` samples, or frames of power: cut at that fraction of the slack, or repeated until there are as many."""
    slack = sound.total - length
    if slack < 0:
        repeats = -(-length // sound.total)
        return np.tile(sound.values, repeats)[..., :length]
    start = int(slack * position) - sound.first
    return sound.values[..., start : start + length]


def power_spectrogram(waveform: np.ndarray | torch.Tensor) -> torch.Tensor:
    """(samples,) in -1..1, or 16-bit levels -> (1, F, L) float32, |STFT|^2: see `power_spectrograms`."""
    return power_spectrograms(torch.as_tensor(waveform)[None])[0]


def power_spectrograms(waveforms: torch.Tensor) -> torch.Tensor:
    """(B, samples) in -1..1, or 16-bit levels -> (B, 1, F, L) float32, |STFT|^2 on the waveforms' device.

    Periodic Hann window, centred, reflect padding. A clip's numbers do not depend on the others of its batch.
    """
    padded = F.pad(as_float(waveforms).float(), (N_FFT // 2, N_FFT // 2), mode="reflect")
    frames = padded.unfold(1, N_FFT, HOP)  # (B, L, N_FFT)
    spectrum = torch.view_as_real(torch.fft.rfft(frames * _window(waveforms.device)))  # (B, L, F, 2)
    power = spectrum[..., 0].square().add_(spectrum[..., 1].square())
    return power.transpose(1, 2)[:, None]


@cache
def _window(device: torch.device) -> torch.Tensor:
    return WINDOW.to(device)


def compress(power: torch.Tensor) -> torch.Tensor:
    """Power, in place, to what the audio encoder takes: log(power + 1e-7) / 12, about -1.35 (silence) to 1."""
    return power.add_(LOG_FLOOR).log_().div_(LOG_SCALE)


def log_spectrogram(waveform: np.ndarray | torch.Tensor) -> torch.Tensor:
    """(samples,) in -1..1 -> (1, F, L) float32 log power spectrogram, divided by 12."""
    return compress(power_spectrogram(waveform))


def log_spectrograms(audio: torch.Tensor) -> torch.Tensor:
    """Waveforms (B, samples), in -1..1 or 16-bit levels, or power (B, 1, F, L) -> (B, 1, F, L), on their device."""
    return compress(power_spectrograms(audio) if audio.ndim == 2 else audio.clone()).contiguous()


def draw_silence(seconds: float) -> torch.Tensor:
    """Audio that nothing in view can cause, drawn by PyTorch's CPU generator -> waveform (samples,) in about -1..1.

    Half of the draws are digital silence. The others are noise whose power falls with frequency f as f^-a, a in 0..2
    (white, pink, brown), with a root mean square of -50 to -10 dB of full scale.
    """
    noisy, slope, level = torch.rand(3).tolist()
    waveform = torch.zeros(num_samples(seconds))
    if noisy < 0.5:
        spectrum = torch.fft.rfft(torch.randn(len(waveform)))
        shaped = spectrum * torch.arange(1, len(spectrum) + 1) ** -slope  # the root of the power
        waveform = torch.fft.irfft(shaped, len(waveform))
        waveform *= 10 ** ((40 * level - 50) / 20) / waveform.square().mean().sqrt()
    return waveform


def load_spectrogram(path: str | Path, seconds: float, position: float = 0.5) -> torch.Tensor:
    """Audio file, or stored (1, F, L) power spectrogram (.npy, before the log) -> (1, F, L) log power spectrogram.

    seconds: length that the model takes; position: see `crop_or_tile`, stored spectrograms are cut likewise.
    Raises ValueError, naming the file, when it is neither.
    """
    return log_spectrograms(clip_of(load_sound(path, seconds, (position, position)), seconds, position)[None])[0]


def clip_of(sound: Sound, seconds: float, position: float = 0.5) -> torch.Tensor:
    """The cut at that position: waveform (samples,), 16-bit levels or float32, or power (1, F, L)."""
    length = num_frames(seconds) if sound.values.ndim == 3 else num_samples(seconds)
    return torch.from_numpy(np.ascontiguousarray(cut(sound, length, position)))


def load_power(path: str | Path) -> np.ndarray:
    """Stored power spectrogram (.npy) -> (1, F, any frames). Raises ValueError, naming the file, for anything else."""
    try:
        power = np.load(path, allow_pickle=False, mmap_mode="r")  # a header can promise any size
    except (OSError, ValueError, EOFError, TypeError, IndexError, SyntaxError, OverflowError, TokenError) as error:
        raise ValueError(f"cannot read the spectrogram {path}: {error}") from error
    if not isinstance(power, np.ndarray) or power.dtype.kind not in "fiub":
        raise ValueError(f"the spectrogram {path} is not an array of numbers")
    if power.ndim != 3 or power.shape[:2] != (1, N_FFT // 2 + 1) or power.shape[2] == 0:
        raise ValueError(f"the spectrogram {path} has shape {power.shape}, wanted (1, {N_FFT // 2 + 1}, frames)")
    if not np.isfinite(power).all() or (power < 0).any():
        raise ValueError(
            f"the spectrogram {path} holds values that are negative or not finite: not a power spectrogram"
        )
    return power


# ---------------------------------------------------------------- batches


class Heard(NamedTuple):
    """A clip of audio, or a batch of them, until `finish` computes the spectrogram."""

    clip: torch.Tensor  # (samples,) int16 levels or float32 in -1..1; or power (1, F, L)
    bands: torch.Tensor = torch.empty(0)  # to mask, see `draw_bands`


def collate_heard(heard: Sequence[Heard], *, collate_fn_map: Mapping | None = None) -> Heard:
    clips = [one.clip for one in heard]
    if any(clip.ndim == 3 for clip in clips):
        clips = [clip if clip.ndim == 3 else power_spectrogram(clip) for clip in clips]
    elif len({clip.dtype for clip in clips}) > 1:
        clips = [as_float(clip) for clip in clips]
    return Heard(default_collate(clips), default_collate([one.bands for one in heard]))


def spectrograms_of(heard: Heard, device: torch.device) -> torch.Tensor:
    """A batch of clips -> (B, 1, F, L) log power spectrograms with their bands masked, computed on the device."""
    count = max(1, VALUES_AT_ONCE // heard.clip.shape[1:].numel())
    if device.type == "cpu" and len(heard.clip) > count:
        parts = zip(heard.clip.split(count), heard.bands.split(count), strict=True)
        return torch.cat([spectrograms_of(Heard(*part), device) for part in parts])
    found = log_spectrograms(heard.clip.to(device, non_blocking=True))
    return mask_bands(found, heard.bands.to(device, non_blocking=True)) if heard.bands.numel() else found
