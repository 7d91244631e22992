"""Clips (mp4, webm, mkv, avi): what their names say, how long they are, the frame at a moment, the audio.

Seconds count from the first frame and the first sample.
"""

import csv
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from audio_io import SAMPLE_RATE, resample
from utils import UserError

CLIP_SECONDS = 10.0  # a pair's audio is at most so long
SHORTEST = 1.0  # seconds of video, and of audio, below which a clip gives no pair
TRUNCATED_BY = 0.5  # seconds that may be missing from the length which the header announces
CLOCK_ERROR = 0.02  # seconds: containers round their time stamps
CONTAINERS = "mov,matroska,avi,mpegts,flv"  # what such files really hold; playlists, which reach elsewhere, are refused
CLIP_NAME = re.compile(r"([\w-]{11})_(\d+)(?:_(\d+))?", re.ASCII)  # an id of YouTube: 11 of A-Z a-z 0-9 _ -
LATEST_START = 43_200  # seconds: YouTube's videos last 12 h at most


class BadClip(Exception):
    """Why a clip gives no pair: the kind, then, after a colon, what is particular to it."""


# ---------------------------------------------------------------- names


def readings(stem: str) -> set[str]:
    """Ids `<youtube id>_<start second, 6 digits>` that a name can mean: none, one, or two (seconds or milliseconds)."""
    found = CLIP_NAME.fullmatch(stem)
    if not found:
        return set()
    start, length = int(found[2]), int(found[3]) - int(found[2]) if found[3] else None
    in_seconds = start <= LATEST_START and (length is None or 0 < length < 1000)
    six_digits = length is None and len(found[2]) == 6 and in_seconds
    in_milliseconds = start % 1000 == 0 and (start > 0 and not six_digits if length is None else length >= 1000)
    starts = [start] * in_seconds + [start // 1000] * in_milliseconds
    return {f"{found[1]}_{second:06d}" for second in starts}


def clip_id(stem: str, listed: Collection[str] = ()) -> tuple[str, str]:
    """The id of a clip's name, and "", "other" (no known form) or "ambiguous"; in both of these the stem is the id.

    listed: known ids; one of them decides between two readings of a name.
    """
    ids = readings(stem)
    if len(ids) > 1:
        ids = ids.intersection(listed) or ids
    return (ids.pop(), "") if len(ids) == 1 else (stem, "ambiguous" if ids else "other")


def read_vggsound_csv(path: Path) -> dict[str, tuple[str, str]]:
    """VGG-Sound's list, rows of youtube id, start second, label, split -> {id: (label, split)}. Raises UserError."""
    classes: dict[str, tuple[str, str]] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for line, row in enumerate(csv.reader(file), 1):
                if len(row) == 4 and row[1].strip().isdecimal():
                    classes[f"{row[0].strip()}_{int(row[1]):06d}"] = (row[2].strip(), row[3].strip())
                elif row and line > 1:  # the first may be a heading
                    raise UserError(f"line {line} of {path} is not `youtube id,start second,label,split`: {row!r:.80}")
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not classes:
        raise UserError(f"{path} holds no row `youtube id,start second,label,split`")
    return classes


# ---------------------------------------------------------------- reading one clip


class Clip(NamedTuple):
    """What the packets of a clip tell; all in seconds."""

    start: float  # time stamp of the first frame
    times: list[float]  # of the frames in the order they are shown, from the first
    video_seconds: float
    audio_seconds: float
    tolerance: float  # how far a frame's time may lie past the moment at which it is shown
    counted: bool  # frames go by their number: AVI has no time stamps of its own


@contextmanager
def opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream, av.AudioStream]]:
    """The container, its video and its audio, decoded by one thread. Raises BadClip where there is none."""
    if path.stat().st_size == 0:
        raise BadClip("empty: 0 bytes")
    try:
        container = av.open(str(path), options={"format_whitelist": CONTAINERS}, metadata_errors="ignore")
    except av.FFmpegError as error:
        with open(path, "rb") as file:
            is_mp4 = file.read(8)[4:] == b"ftyp"
        if is_mp4 and isinstance(error, av.InvalidDataError):
            raise BadClip("truncated: the index at the end of the file is missing") from error
        raise BadClip(f"no video: it cannot be opened ({error.strerror})") from error
    with container:
        videos = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        for kind, streams in (("video", videos), ("audio", container.streams.audio)):
            if not streams:
                raise BadClip(f"no {kind} stream")
            if streams[0].codec_context is None:
                raise BadClip(f"no decoder: the {kind} is in an unknown format")
            streams[0].codec_context.thread_count = 1
        yield container, videos[0], container.streams.audio[0]


def measure(path: Path) -> Clip:
    """Read a clip to its end without decoding it. Raises BadClip when it is truncated or lacks video or audio."""
    with opened(path) as (container, video, audio):
        counted, rate = container.format.name == "avi", float(video.average_rate or 25)
        spans: dict[int, list[tuple[float, float]]] = {video.index: [], audio.index: []}
        for packet in container.demux():
            stamp = packet.dts if counted or packet.pts is None else packet.pts
            if stamp is None or packet.size == 0 or packet.is_discard:
                continue
            if packet.is_corrupt:
                raise BadClip("truncated: a packet is not whole")
            begin, length = (float((ticks or 0) * packet.time_base) for ticks in (stamp, packet.duration))
            spans.setdefault(packet.stream_index, []).append((begin, begin + length))
        if counted:  # of a cut AVI the file's length is guessed from its size
            announced = video.frames / rate
        else:
            announced = (container.duration or 0) / av.time_base + min((container.start_time or 0) / av.time_base, 0)
        frames, heard = sorted(spans[video.index]), sorted(spans[audio.index])  # a closed container's streams are gone
    for kind, found in (("video", frames), ("audio", heard)):
        if not found:
            raise BadClip(f"no {kind}: the stream is empty")
    end = max(stop for found in spans.values() for _, stop in found)
    if announced - end > TRUNCATED_BY:
        raise BadClip(f"truncated: it ends after {end:.1f} of the {announced:.1f} s that its header announces")
    start, (last, until) = frames[0][0], frames[-1]
    video_seconds = max(until, last + (1 / rate if until == last else 0)) - start
    if video_seconds < SHORTEST:
        raise BadClip(f"too short: {video_seconds:.2f} s of pictures")
    audio_seconds = heard[-1][1] - heard[0][0]
    times = [begin - start for begin, _ in frames]
    return Clip(start, times, video_seconds, audio_seconds, min(CLOCK_ERROR, 0.4 / rate), counted)


def frame_at(path: Path, clip: Clip, moment: float) -> tuple[np.ndarray, float]:
    """The frame shown at `moment` s: upright RGB (H, W, 3) uint8, and the second at which it came up."""
    shown, since = None, 0.0
    with opened(path) as (container, video, _):
        for place, frame in enumerate(container.decode(video)):
            by_number = clip.counted or frame.pts is None
            time = clip.times[min(place, len(clip.times) - 1)] if by_number else frame.time - clip.start
            if shown is not None and time > moment + clip.tolerance:
                break
            shown, since = frame, time
        if shown is None:
            raise BadClip("no video: no frame can be decoded")
        if shown.is_corrupt:
            raise BadClip(f"damaged: the frame at {since:.2f} s")
        return upright(shown.to_ndarray(format="rgb24"), shown), since


def upright(image: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Turn and mirror (H, W, 3) as the frame's display matrix asks; angles between are taken to the nearest quarter."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    right, down, _, x_of_down, y_of_down = np.frombuffer(matrix, np.int32)[:5].tolist()  # where the two axes go
    if abs(down) > abs(right):
        image, right, y_of_down = image.swapaxes(0, 1), x_of_down, down
    return np.ascontiguousarray(image[:: -1 if y_of_down < 0 else 1, :: -1 if right < 0 else 1])


def audio_from(path: Path, begin: float) -> np.ndarray:
    """At most 10 s of audio from `begin` s on: (samples,) float32 at 16 kHz, the mean of the channels.

    Raises BadClip when it is too short, all zero (as 16-bit numbers) or not finite.
    """
    to_float, pieces, heard, rate = av.AudioResampler(format="fltp"), [], 0, SAMPLE_RATE
    with opened(path) as (container, _, audio):
        for frame in container.decode(audio):
            rate = frame.sample_rate
            first, last = round(begin * rate), round((begin + CLIP_SECONDS) * rate)
            for part in to_float.resample(frame):
                mono = part.to_ndarray().mean(axis=0)
                pieces.append(mono[max(first - heard, 0) : max(last - heard, 0)])
                heard += len(mono)
            if heard >= last:
                break
    waveform = np.concatenate(pieces) if pieces else np.empty(0, np.float32)
    if len(waveform) < SHORTEST * rate:
        raise BadClip(f"too short: {len(waveform) / rate:.2f} s of sound")
    if not np.isfinite(waveform).all():
        raise BadClip("damaged: the sound holds values that are not finite")
    if np.abs(waveform).max() < 2**-16:
        raise BadClip("all-zero sound")
    if rate != SAMPLE_RATE:
        waveform = resample(waveform, rate)
    return waveform
