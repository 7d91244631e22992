"""The one door for films, sounds and images from outside: what is in a file, on one clock, as a player shows it.

H x W frame as displayed (rotated, square pixels, BT.709 SDR), C channels. Times are seconds on the clock of the file,
which starts at 0 with whatever begins first, image or sound. Nothing but the file itself is opened: no file or address
that it names, no network protocol, no device, no pipe.
"""

import heapq
import os
import stat
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
import soxr
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, ColorTrc
from PIL import Image, ImageSequence

from audio_io import SAMPLE_RATE, mix_down
from transforms import load_image, on_white, to_sdr
from utils import UserError

CLOCK_ERROR = 0.02  # seconds: containers round their time stamps
PRIMING = 0.1  # seconds of sound before the first image that only warm a decoder up
SOUND_GAP = 0.04  # seconds by which a time stamp must differ from the sound before it to be believed
SILENCE = 2**-16  # half a step of 16 bits
REFUSED_FORMATS = {  # formats that name other files or addresses, and text drawn as images
    "concat", "dash", "hls", "hls,applehttp", "image2", "image2pipe", "imf", "lavfi", "mpjpeg", "rtp", "rtsp", "sap",
    "sdp", "smoothstreaming", "tty", "vapoursynth", "webm_dash_manifest",
}  # fmt: skip
FORMATS = ",".join(sorted(av.formats_available - REFUSED_FORMATS))
UNTIMED = {"mp3", "aac", "ac3", "eac3", "dts", "amr", "mpegvideo", "h264", "hevc", "m4v", "obu", "vc1", "h261", "h263"}


class Limits(NamedTuple):
    """What a file may cost."""

    pixels: int = 2**27  # of an image or frame; 8K has 2**25
    lost: float = 0.1  # share of the packets read that may be damaged
    threads: int = 1  # of a decoder


LIMITS = Limits()


class MediaError(UserError):
    """Why a file, or what was asked of it, cannot be read; `reason` leaves out which file."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.reason}"


class Frame(NamedTuple):
    time: float  # s on the file's clock at which it comes up
    duration: float  # s until the next one; of the last one, until the file ends
    image: np.ndarray  # (H, W, 3) uint8 RGB as displayed


def open(path: str | Path, limits: Limits = LIMITS) -> "Media":
    """Open a film, sound or image, whatever its name. Raises MediaError, which names the file and the reason."""
    with _regular_file(path) as file:
        head = file.read(16)
    if not head:
        raise MediaError(path, "empty: 0 bytes")
    picture = _identify(path)
    return Pictures(path, limits) if picture else Streams(path, limits)


class Media:
    """An opened file. Use it in `with`; frames and sound may be read side by side.

    has_image, has_sound: whether it can give frames, and sound.
    is_still: it has one image, which is shown all the time.
    start: s at which all that it has has begun: 0 where image and sound begin together.
    duration: s at which the last of them ends; 0 of an image without sound.
    image_span, sound_span: (first, last) s of either; (0, 0) where there is none.
    size: (width, height) in pixels as displayed; (0, 0) without images. rate: frames per second on average.
    sound_rate: Hz of the stored sound, 0 without sound.
    decisions: what had to be decided, in words: stream 2 of 3, offset 1.5 s, tone-mapped, 3 packets lost.
    """

    has_image = has_sound = is_still = False
    duration = rate = 0.0
    sound_rate = 0
    size = (0, 0)
    image_span = sound_span = (0.0, 0.0)

    def __init__(self, path: str | Path, limits: Limits) -> None:
        self.path, self.limits = Path(path), limits
        self._decided: dict[str, None] = {}  # an ordered set
        self.lost: Counter[str] = Counter()  # damaged packets of "image" and "sound", as far as read
        self.read: Counter[str] = Counter()

    def __enter__(self) -> "Media":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        pass

    @property
    def start(self) -> float:
        return max(self.image_span[0], self.sound_span[0])

    @property
    def decisions(self) -> list[str]:
        lost = [f"{count} of {self.read[kind]} {kind} packets lost" for kind, count in self.lost.items() if count]
        return [*self._decided, *lost]

    def decide(self, text: str) -> None:
        self._decided[text] = None

    def frames(self, start: float = 0.0, stop: float | None = None) -> Iterator[Frame]:
        """The frames shown from `start` to `stop` (None: the end), each decoded once; the first one may begin earlier.

        Raises MediaError where there is no image, and where more is damaged than `limits.lost`.
        """
        raise MediaError(self.path, "no video stream")

    def frame_at(self, time: float) -> Frame:
        """The frame shown at `time`; before the first one the first, after the end the last."""
        with closing(self.frames(time)) as frames:
            for frame in frames:
                return frame
        raise MediaError(self.path, "no video: no frame can be decoded")

    def sound(self, start: float = 0.0, stop: float | None = None, rate: int = SAMPLE_RATE) -> np.ndarray:
        """(samples,) float32 mono from `start` to `stop` (None: the end) at `rate` Hz.

        The first sample is that of `start`; where the file has no sound at a time, zeros stand. It ends with the
        file's sound. Raises MediaError where there is no sound, and where more is damaged than `limits.lost`.
        """
        pieces = list(self._resampled(start, stop, rate))
        return np.concatenate(pieces) if pieces else np.empty(0, np.float32)

    def sounds(
        self, seconds: float, start: float = 0.0, stop: float | None = None, rate: int = SAMPLE_RATE
    ) -> Iterator[np.ndarray]:
        """`sound` in pieces of so many seconds, the last one as long as what is left; holds one piece at a time."""
        length, held, count = round(seconds * rate), [], 0
        for piece in self._resampled(start, stop, rate):
            held.append(piece)
            count += len(piece)
            if count >= length:
                joined = np.concatenate(held)
                for begin in range(0, count - length + 1, length):
                    yield joined[begin : begin + length]
                held, count = [joined[count - count % length :]], count % length
        if count:
            yield np.concatenate(held)

    def _resampled(self, start: float, stop: float | None, rate: int) -> Iterator[np.ndarray]:
        raise MediaError(self.path, "no audio stream")


# ---------------------------------------------------------------- files


def _regular_file(path: str | Path):
    """A binary file object. Raises MediaError for what is no plain file: opening a pipe may never return."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise MediaError(path, "not a regular file")
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except (OSError, ValueError) as error:
        raise MediaError(path, f"cannot be opened ({getattr(error, 'strerror', None) or error})") from error


def _refuse(url: str, *_, **__):
    raise PermissionError(f"a media file asks for another file or address: {url}")


def _identify(path: str | Path) -> bool:
    """Whether Pillow knows the file for an image."""
    errors = (OSError, ValueError, SyntaxError, TypeError, struct.error, Image.DecompressionBombError)
    with suppress(*errors), Image.open(path) as image:
        return image.format not in ("EPS", "MPEG")  # Ghostscript's programs; films
    return False


# ---------------------------------------------------------------- images


class Pictures(Media):
    """An image file, or an animation without sound."""

    has_image = True

    def __init__(self, path: str | Path, limits: Limits) -> None:
        super().__init__(path, limits)
        try:
            with Image.open(path) as image:
                if image.width * image.height > limits.pixels:
                    raise MediaError(path, f"too large: {image.width} x {image.height} pixels")
                self.is_still = not getattr(image, "is_animated", False)
            first = next(self.frames())
        except (OSError, ValueError, SyntaxError, TypeError, struct.error, Image.DecompressionBombError) as error:
            raise MediaError(path, f"cannot be decoded: {' '.join(str(error).split())}") from error
        self.size = first.image.shape[1::-1]
        if not self.is_still:
            with Image.open(path) as image:
                lengths = [_shown_for(part) for part in ImageSequence.Iterator(image)]
            self.duration, self.rate = sum(lengths), len(lengths) / sum(lengths)
            self.image_span = (0.0, self.duration)

    def frames(self, start: float = 0.0, stop: float | None = None) -> Iterator[Frame]:
        if self.is_still:
            yield Frame(0.0, self.duration, np.asarray(load_image(self.path)))
            return
        time, shown = 0.0, None
        with Image.open(self.path) as image:
            for part in ImageSequence.Iterator(image):
                length = _shown_for(part)
                shown = Frame(time, length, np.asarray(on_white(part)))
                time += length
                if time > start:
                    yield shown
                    shown = None
                if stop is not None and time >= stop:
                    return
        if shown is not None:  # asked for a time after the end
            yield shown


def _shown_for(part: Image.Image) -> float:
    """Seconds for which one image of an animation is shown; viewers show what asks for none for a tenth."""
    return (part.info.get("duration") or 100) / 1000


# ---------------------------------------------------------------- films and sounds


class Streams(Media):
    """What FFmpeg's demuxers and decoders read."""

    def __init__(self, path: str | Path, limits: Limits) -> None:
        super().__init__(path, limits)
        self._idle: list[av.container.InputContainer] = []
        container = self._take()
        self.format = container.format.name.split(",")[0]
        self._video = self._choose_video(container)
        self._audio = self._choose_audio(container)
        self._give(container)
        self._measure()

    # ---- containers

    def _take(self, fresh: bool = False) -> av.container.InputContainer:
        """A container that nobody reads from, at any place.

        fresh: a new one, whose decoders have no past: AAC's goes on drawing its noise where it was.
        """
        if self._idle and not fresh:
            return self._idle.pop()
        options = {"format_whitelist": FORMATS, "max_pixels": str(self.limits.pixels)}
        file = _regular_file(self.path)
        try:
            container = av.open(file, options=options, metadata_errors="ignore", io_open=_refuse, buffer_size=2**16)
        except (av.FFmpegError, OSError, ValueError) as error:
            file.close()
            head = _head(self.path)
            if head[4:8] == b"ftyp" and isinstance(error, av.InvalidDataError):
                raise MediaError(self.path, "truncated: the index at the end of the file is missing") from error
            reason = getattr(error, "strerror", None) or error
            raise MediaError(self.path, f"no video or sound: it cannot be opened ({reason})") from error
        for stream in container.streams:
            if stream.type in ("video", "audio") and stream.codec_context is not None:
                stream.codec_context.thread_count = self.limits.threads
        return container

    def _give(self, container: av.container.InputContainer) -> None:
        self._idle.append(container)

    def close(self) -> None:
        while self._idle:
            container = self._idle.pop()
            container.close()

    # ---- which streams

    def _choose_video(self, container) -> int | None:
        """Index of the stream of images: the default one, else the largest; covers and previews are none."""
        hidden = Disposition.attached_pic | Disposition.timed_thumbnails
        streams = [s for s in container.streams.video if s.codec_context is not None and not s.disposition & hidden]
        if not streams:
            return None
        chosen = max(streams, key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height, -s.index))
        if len(streams) > 1:
            self.decide(f"image stream {streams.index(chosen) + 1} of {len(streams)}")
        return chosen.index

    def _choose_audio(self, container) -> int | None:
        """Index of the stream of sound: the default one, else the first that sounds."""
        streams = [s for s in container.streams.audio if s.codec_context is not None]
        if not streams:
            return None
        ordered = sorted(streams, key=lambda s: (not s.disposition & Disposition.default, s.index))
        chosen = ordered[0]
        if len(streams) > 1:
            chosen = next((s for s in ordered if self._sounds(container, s)), chosen)
            self.decide(f"sound stream {streams.index(chosen) + 1} of {len(streams)}")
        return chosen.index

    def _sounds(self, container, stream, seconds: float = 10.0) -> bool:
        """Whether a stream of sound is more than zeros in its first seconds."""
        _rewind(container, stream)
        heard = 0
        with suppress(av.FFmpegError):
            for frame in container.decode(stream):
                samples = _samples(frame)
                if np.abs(samples).max(initial=0) >= SILENCE:
                    return True
                heard += len(samples)
                if heard > seconds * frame.sample_rate:
                    break
        return False

    # ---- the clock

    def _measure(self) -> None:
        """The spans of image and sound, the origin of the clock, and what the first frame tells."""
        container = self._take()
        begins: dict[str, float] = {}
        ends: dict[str, float] = {}
        announced = None
        if container.duration and self.format not in UNTIMED:
            announced = ((container.start_time or 0) + container.duration) / av.time_base
        first = next(self._decoded_frames(None), None) if self._video is not None else None
        heard = next(self._decoded_sounds(None), None) if self._audio is not None else None
        if first is not None:
            begins["image"] = first[0]
            self.has_image = True
        if heard is not None:
            begins["sound"] = heard[0]
            self.has_sound, self.sound_rate = True, heard[2]
        if not begins:
            self._give(container)
            return
        for kind, index in (("image", self._video), ("sound", self._audio)):
            if kind in begins:
                stream = container.streams[index]
                if stream.duration and self.format not in UNTIMED:
                    ends[kind] = float((stream.start_time or 0) * stream.time_base + stream.duration * stream.time_base)
        if any(kind not in ends for kind in begins) and announced is not None:
            for kind in begins:
                ends.setdefault(kind, announced)
        if any(kind not in ends for kind in begins):
            ends |= self._ends_by_packets()
        self._origin = min(begins.values())
        if len(begins) == 2 and 0 < begins["image"] - begins["sound"] < PRIMING:
            self._origin = begins["image"]
        spans = {
            kind: (max(begin - self._origin, 0.0), max(ends.get(kind, begin) - self._origin, 0.0))
            for kind, begin in begins.items()
        }
        self.image_span, self.sound_span = spans.get("image", (0.0, 0.0)), spans.get("sound", (0.0, 0.0))
        self.duration = max(end for _, end in spans.values())
        self._give(container)
        if self.has_image:
            stream = container.streams[self._video]
            self._pixel_shape = stream.sample_aspect_ratio or Fraction(1)
            self._guessed_rate = float(stream.guessed_rate or stream.average_rate or 25)
            self.is_still = stream.frames == 1 or self._has_one_frame()
            self.size = self._displayed(first[1]).shape[1::-1]
            self.rate = 0.0 if self.is_still else float(stream.average_rate or stream.guessed_rate or 0)
            self.image_span = (self.image_span[0], self.duration if self.is_still else self.image_span[1])
        offset = spans["image"][0] - spans["sound"][0] if len(spans) == 2 else 0.0
        if abs(offset) > PRIMING:
            later = "image" if offset > 0 else "sound"
            self.decide(
                f"offset: the {later} begins {abs(offset):.2f} s after the {'sound' if offset > 0 else 'image'}"
            )

    _origin = 0.0

    def _has_one_frame(self) -> bool:
        frames = self._decoded_frames(None)
        with closing(frames):
            return sum(1 for _ in zip(range(2), frames)) == 1

    def _ends_by_packets(self) -> dict[str, float]:
        """The end of either stream, by reading every packet of the file without decoding it."""
        container, ends = self._take(), {}
        _rewind(container, container.streams[0])
        names = {self._video: "image", self._audio: "sound"}
        with suppress(av.FFmpegError):
            for packet in container.demux():
                stamp = packet.dts if packet.pts is None else packet.pts
                if packet.stream_index in names and stamp is not None and packet.size:
                    end = float((stamp + (packet.duration or 0)) * packet.time_base)
                    ends[names[packet.stream_index]] = max(end, ends.get(names[packet.stream_index], end))
        self._give(container)
        return ends

    # ---- images

    def frames(self, start: float = 0.0, stop: float | None = None) -> Iterator[Frame]:
        if not self.has_image:
            yield from super().frames(start, stop)
        shown = None
        with closing(self._from(start)) as decoded:
            for time, frame in decoded:
                if shown is not None and time > start + self._tolerance:
                    yield Frame(shown[0], time - shown[0], self._displayed(shown[1]))
                    if stop is not None and time >= stop:
                        return
                shown = time, frame
        if shown is not None:
            yield Frame(shown[0], max(self.duration - shown[0], 1 / self._guessed_rate), self._displayed(shown[1]))

    @property
    def _tolerance(self) -> float:
        """How far a frame's time may lie past the moment at which it is shown."""
        return min(CLOCK_ERROR, 0.4 / self._guessed_rate)

    def _from(self, start: float) -> Iterator[tuple[float, av.VideoFrame]]:
        """Decoded frames with their times on the clock, from one at or before `start` on, if there is one."""
        for back in (0.0, 10.0, None):
            place = None if back is None or start - back <= self.image_span[0] else start - back
            decoded = self._decoded_frames(place)
            first = next(decoded, None)
            if place is None or (first is not None and first[0] - self._origin <= start):
                break
            decoded.close()
        with closing(decoded):
            if first is not None:
                yield first[0] - self._origin, first[1]
            for time, frame in decoded:
                yield time - self._origin, frame

    def _decoded_frames(self, place: float | None) -> Iterator[tuple[float, av.VideoFrame]]:
        """Frames in the order they are shown, with their stamps in s, from the key frame before `place`."""
        stamps: list[float] = []  # of packets without a time of presentation, as in AVI: these go in the order shown
        for packet, decoded in self._packets("image", self._video, place):
            if packet.pts is None and packet.dts is not None and packet.size:
                heapq.heappush(stamps, float(packet.dts * packet.time_base))
            for frame in decoded:
                if frame.pts is not None:
                    time = frame.time
                elif stamps:
                    time = heapq.heappop(stamps)
                else:
                    continue
                if frame.is_corrupt:
                    self.lost["image"] += 1
                    continue
                yield time, frame

    def _packets(self, kind: str, index: int, place: float | None) -> Iterator[tuple[av.Packet, list]]:
        """Packets of a stream with what they decode to, from before `place` s on; damaged ones are counted."""
        container = self._take(fresh=kind == "sound")
        stream = container.streams[index]
        stream.codec_context.flush_buffers()
        try:
            if place is None:
                _rewind(container, stream)
            else:
                container.seek(int((place + self._origin) / stream.time_base), stream=stream)
            for packet in container.demux(stream):
                self.read[kind] += packet.size > 0
                try:
                    yield packet, packet.decode()
                except (av.InvalidDataError, av.error.UndefinedError, ValueError):
                    self.lost[kind] += 1
        except av.EOFError:
            pass
        except (av.FFmpegError, OSError) as error:
            self.decide(f"{kind}: reading ends early ({getattr(error, 'strerror', None) or error})")
        finally:
            self._give(container)

    def _displayed(self, frame: av.VideoFrame) -> np.ndarray:
        """(H, W, 3) uint8 RGB as a player shows it."""
        if frame.width * frame.height > self.limits.pixels:
            raise MediaError(self.path, f"too large: {frame.width} x {frame.height} pixels")
        image = self._colours(frame)
        shape = self._pixel_shape
        if shape != 1 and 0.1 < shape < 10:
            width = max(1, round(image.shape[1] * shape))
            image = cv2.resize(image, (width, image.shape[0]), interpolation=cv2.INTER_LINEAR)
            self.decide(f"pixels of {shape.numerator}:{shape.denominator} made square")
        turned = upright(image, frame)
        if turned is not image:
            self.decide("rotated")
        return turned

    def _colours(self, frame: av.VideoFrame) -> np.ndarray:
        matrix = _MATRICES.get(frame.colorspace, Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601)
        transfer = _TRANSFERS.get(frame.color_trc, "sdr")
        primaries = _PRIMARIES.get(frame.color_primaries, "bt709" if transfer == "sdr" else "bt2020")
        if transfer != "sdr" or primaries != "bt709":
            self.decide(
                f"tone-mapped from {transfer.upper()}" if transfer != "sdr" else f"colours of {primaries} mapped"
            )
            wide = frame.reformat(format="rgb48le", src_colorspace=matrix, dst_color_range=ColorRange.JPEG)
            image, brighter = to_sdr(wide.to_ndarray(), transfer, primaries)
            if brighter > 0.001:
                self.decide("brighter than reference white, cut off")
            return image
        rgb = "rgba" if any(c.is_alpha for c in frame.format.components) else "rgb24"
        image = frame.reformat(
            format=rgb, src_colorspace=matrix, dst_colorspace=matrix, dst_color_range=ColorRange.JPEG
        ).to_ndarray()
        return image if rgb == "rgb24" else np.asarray(on_white(Image.fromarray(image)))

    # ---- sound

    def _decoded_sounds(self, place: float | None) -> Iterator[tuple[float | None, np.ndarray, int]]:
        """Pieces of sound: stamp in s, (samples, C) float32, rate in Hz."""
        stamp = None
        for packet, decoded in self._packets("sound", self._audio, place):
            if stamp is None and packet.dts is not None:
                stamp = float(packet.dts * packet.time_base)
            for frame in decoded:
                time = frame.time if frame.pts is not None else stamp
                yield time, _samples(frame), frame.sample_rate
                stamp = None

    def _timeline(self, start: float, stop: float | None) -> Iterator[tuple[np.ndarray, int]]:
        """Pieces ((samples, C) float32, rate) that follow each other without a gap from `start` on."""
        place = start - 1.0 if start - 1.0 > self.sound_span[0] else None
        at, begun = start, False
        for time, samples, rate in self._decoded_sounds(place):
            time = at if time is None else time - self._origin
            ahead = time - at
            if not begun or abs(ahead) > SOUND_GAP:
                if ahead > 0 and ahead < self.duration + 1:
                    yield from _silence(ahead, rate, samples.shape[1])
                    at += ahead
                elif ahead < 0:
                    samples = samples[min(len(samples), round(-ahead * rate)) :]
            if not len(samples):
                continue
            begun = True
            if stop is not None:
                samples = samples[: max(0, round((stop - at) * rate))]
            if len(samples):
                yield samples, rate
            at += len(samples) / rate
            if stop is not None and at >= stop - 0.5 / rate:
                return

    def _resampled(self, start: float, stop: float | None, rate: int) -> Iterator[np.ndarray]:
        if not self.has_sound:
            yield from super()._resampled(start, stop, rate)
        stream, native = None, None
        for samples, its_rate in self._timeline(start, stop):
            mono, cancelled = mix_down(samples)
            if cancelled:
                self.decide("one channel taken: the mean of the channels cancels")
            if its_rate != native:
                if stream is not None:
                    yield stream.resample_chunk(np.empty(0, np.float32), last=True)
                    self.decide("the sound's rate changes on the way")
                stream = None if its_rate == rate else soxr.ResampleStream(its_rate, rate, 1, quality="HQ")
                native = its_rate
            yield mono if stream is None else stream.resample_chunk(mono)
        if stream is not None:
            yield stream.resample_chunk(np.empty(0, np.float32), last=True)


_TRANSFERS = {ColorTrc.SMPTE2084: "pq", ColorTrc.ARIB_STD_B67: "hlg"}
_PRIMARIES = {1: "bt709", 9: "bt2020", 11: "p3", 12: "p3"}  # FFmpeg's numbers
_MATRICES = {
    1: Colorspace.ITU709, 5: Colorspace.ITU601, 6: Colorspace.ITU601, 7: Colorspace.SMPTE240M, 9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}  # fmt: skip


def _rewind(container: av.container.InputContainer, stream: av.stream.Stream) -> None:
    """To the stream's first packet; a place of the container would be one of its main stream, which may begin later."""
    with suppress(av.FFmpegError):
        container.seek(stream.start_time or 0, stream=stream)


def _head(path: Path) -> bytes:
    with _regular_file(path) as file:
        return file.read(16)


def _silence(seconds: float, rate: int, channels: int) -> Iterator[tuple[np.ndarray, int]]:
    left = round(seconds * rate)
    while left > 0:
        yield np.zeros((min(left, rate), channels), np.float32), rate
        left -= rate


def _samples(frame: av.AudioFrame) -> np.ndarray:
    """(samples, C) float32 in -1..1; read plane by plane, since PyAV gives one plane too many of eight channels."""
    channels = frame.layout.nb_channels
    name = frame.format.name.removesuffix("p")
    kinds = {"u8": np.uint8, "s16": np.int16, "s32": np.int32, "s64": np.int64, "flt": np.float32, "dbl": np.float64}
    planes = frame.planes[: channels if frame.format.is_planar else 1]
    per_plane = frame.samples * (1 if frame.format.is_planar else channels)
    arrays = [np.frombuffer(plane, kinds[name], per_plane) for plane in planes]
    samples = np.stack(arrays, axis=1) if frame.format.is_planar else arrays[0].reshape(-1, channels)
    if name == "u8":
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        return samples.astype(np.float32) * np.float32(2.0 ** (1 - 8 * samples.dtype.itemsize))
    return samples.astype(np.float32)


def upright(image: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Turn and mirror (H, W, 3) as the frame's display matrix asks; angles between are taken to the nearest quarter."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    right, down, _, x_of_down, y_of_down = np.frombuffer(matrix, np.int32)[:5].tolist()  # where the two axes go
    if abs(down) > abs(right):
        image, right, y_of_down = image.swapaxes(0, 1), x_of_down, down
    return np.ascontiguousarray(image[:: -1 if y_of_down < 0 else 1, :: -1 if right < 0 else 1])
