"""The one door for films, sounds and images from outside: what is in a file, on one clock, as a player shows it.

H x W frame as displayed (rotated, square pixels, BT.709 SDR), C channels. Times are seconds on the clock of the file,
which starts at 0 with whatever begins first, image or sound. Nothing but the file itself is opened: no file or address
that it names, no network protocol, no device, no pipe.
"""

import gc
import heapq
import os
import stat
import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
import soxr
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, ColorTrc, VideoReformatter
from PIL import Image, ImageSequence

from transforms import NO_IMAGES, load_image, on_white, to_sdr
from utils import UserError

SAMPLE_RATE = 16000  # Hz: what the models hear
CANCELLED = 0.25  # of the level of unrelated channels, 12 dB below it: their mean is no more what was heard
CLOCK_ERROR = 0.02  # seconds: containers round their time stamps
TRUNCATED_BY = 0.5  # seconds that may be missing from the length which the header announces
HIGHEST_RATE = 1000  # frames per second that a header may claim
PRIMING = 0.1  # seconds of sound before the first image that only warm a decoder up
WARM_UP = 1.0  # seconds of sound that are decoded before those wanted
SOUND_GAP = 0.04  # seconds by which a time stamp must differ from the sound before it to be believed
SILENCE = 2**-16  # half a step of 16 bits
RESTART = 1.0  # seconds by which time stamps must go back to be those of another film that was appended
JUMP = 10.0  # seconds by which they must go on, image and sound alike, to be of another one
JOINABLE = {"mpegts", "mpeg"}  # formats whose files may be appended to each other, and play on
SEARCHED = 2**28  # bytes of a film up to which it is searched for such places when it is opened
REFUSED_FORMATS = {  # formats that name other files or addresses, and text drawn as images
    "concat", "dash", "hls", "hls,applehttp", "image2", "image2pipe", "imf", "lavfi", "mpjpeg", "rtp", "rtsp", "sap",
    "sdp", "smoothstreaming", "tty", "vapoursynth", "webm_dash_manifest",
}  # fmt: skip
ANIMATIONS = ("gif", "apng", "webp", "ico")
CONTAINER_HEADS = (b"\x1aE\xdf\xa3", b"RIFF", b"OggS", b"FLV\x01", b"fLaC", b"FORM")  # Matroska, AVI and WAV, Ogg, ...
IMAGE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # of images in MP4's boxes
FORMATS = ",".join(sorted(av.formats_available - REFUSED_FORMATS))
TIMED_BY_ORDER = {"avi"}  # its time stamps count packets in the order of decoding, so that a seek may be off by two
COUNTED = 120  # s of such a film within which all frames are counted instead
TIMED_AT_THE_END = {"mpegts", "ogg"}  # by their last time stamp: what is cut off is not missed
UNSTAMPED = {"mp3", "aac", "ac3", "eac3", "dts", "amr"}  # sound whose stamps are counted at its first rate
UNTIMED = UNSTAMPED | {"mpeg", "mpegvideo", "h264", "hevc", "m4v", "obu", "vc1", "h261", "h263"}  # no length to believe
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, TypeError, struct.error, Image.DecompressionBombError)

# A frame holds threads of its decoder, which a forked process does not have: freeing one there would wait for them for
# ever, so a child never collects what it has from its parent.
os.register_at_fork(after_in_child=gc.freeze)


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
    head = _head(path)
    if not head:
        raise MediaError(path, "empty: 0 bytes")
    try:
        container = _container(path, limits)
    except MediaError:
        if is_image(path):
            return Pictures(path, limits)
        raise
    formats = container.format.name.split(",")
    like_image = formats[0].endswith("_pipe") or formats[0] in ANIMATIONS or head[8:12] in IMAGE_BRANDS
    if like_image and is_image(path):
        container.close()
        return Pictures(path, limits)
    return Streams(path, limits, container)


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
        self.read: Counter[str] = Counter()  # packets of "image" and "sound", each once
        self.lost: dict[str, set] = {"image": set(), "sound": set()}  # stamps of those that are damaged
        self.gaps: dict[str, dict[float, float]] = {"image": {}, "sound": {}}  # begin -> end of what is missing, in s
        self.doubts: dict[float, float] = {}  # begin -> end of images after a damaged one, until the next key frame

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
        lost = [f"{len(lost)} {kind} packets lost" for kind, lost in self.lost.items() if lost]
        gaps = [
            f"{sum(end - begin for begin, end in gaps.items()):.2f} s of {kind} missing"
            for kind, gaps in self.gaps.items()
            if gaps
        ]
        return [*self._decided, *lost, *gaps]

    def decide(self, text: str) -> None:
        self._decided[text] = None

    def frames(self, start: float = 0.0, stop: float | None = None, step: float = 0.0) -> Iterator[Frame]:
        """The frames shown from `start` to `stop` (None: the end), each decoded once; the first one may begin earlier.

        step: of frames that follow closer than so many s only the first is given. Raises MediaError where there is no
        image.
        """
        raise MediaError(self.path, "no video stream")

    def check_whole(self) -> None:
        """Raises MediaError where the file ends before what its header announces."""

    def check_damage(self) -> None:
        """Raises MediaError where of the packets read so far, or of a hundred, more are damaged than `limits.lost`."""
        for kind, lost in self.lost.items():
            if len(lost) > self.limits.lost * max(self.read[kind], 100):
                raise MediaError(self.path, f"damaged: {len(lost)} of {self.read[kind]} {kind} packets")

    def frame_at(self, time: float) -> Frame:
        """The frame shown at `time`; before the first one the first, after the end the last."""
        with closing(self.frames(time)) as frames:
            for frame in frames:
                return frame
        raise MediaError(self.path, "no video: no frame can be decoded")

    def sound(self, start: float = 0.0, stop: float | None = None, rate: int = SAMPLE_RATE) -> np.ndarray:
        """(samples,) float32 mono from `start` to `stop` (None: the end) at `rate` Hz.

        The first sample is that of `start`; where the file has no sound at a time, zeros stand. It ends with the
        file's sound. Raises MediaError where there is no sound.
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

    def track(self, start: float = 0.0, stop: float | None = None) -> Iterator[tuple[np.ndarray, int]]:
        """The sound as it is stored: successive short pieces (samples, C) float32 from `start` s on, and their rate."""
        raise MediaError(self.path, "no audio stream")

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


def _head(path: str | Path) -> bytes:
    with _regular_file(path) as file:
        return file.read(16)


def _container(path: str | Path, limits: Limits) -> av.container.InputContainer:
    """What FFmpeg makes of the file. Raises MediaError."""
    options = {"format_whitelist": FORMATS, "max_pixels": str(limits.pixels)}
    file = _regular_file(path)
    try:
        container = av.open(file, options=options, metadata_errors="ignore", io_open=_refuse, buffer_size=2**16)
    except (av.FFmpegError, OSError, ValueError) as error:
        file.close()
        if _head(path)[4:8] == b"ftyp" and isinstance(error, av.InvalidDataError):
            raise MediaError(path, "truncated: the index at the end of the file is missing") from error
        if _head(path).startswith(CONTAINER_HEADS) or isinstance(error, EOFError):
            raise MediaError(
                path, "truncated or damaged: it begins like a film or sound and cannot be read on"
            ) from error
        raise MediaError(path, f"no video or sound: it cannot be opened ({_reason(error)})") from error
    for stream in container.streams:
        if stream.type in ("video", "audio") and stream.codec_context is not None:
            stream.codec_context.thread_count = limits.threads
    return container


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def is_image(path: str | Path) -> bool:
    """Whether Pillow knows the file for an image."""
    with suppress(*PILLOW_ERRORS), Image.open(path) as image:
        return image.format not in NO_IMAGES
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
        except PILLOW_ERRORS as error:
            raise MediaError(path, f"cannot be decoded: {_reason(error)}") from error
        self.size = first.image.shape[1::-1]
        if not self.is_still:
            with Image.open(path) as image:
                lengths = [_shown_for(part) for part in ImageSequence.Iterator(image)]
            self.duration, self.rate = sum(lengths), len(lengths) / sum(lengths)
            self.image_span = (0.0, self.duration)

    def frames(self, start: float = 0.0, stop: float | None = None, step: float = 0.0) -> Iterator[Frame]:
        if self.is_still:
            yield Frame(0.0, self.duration, np.asarray(load_image(self.path)))
            return
        time, shown, due = 0.0, None, 0.0
        with Image.open(self.path) as image:
            for part in ImageSequence.Iterator(image):
                length = _shown_for(part)
                shown = Frame(time, length, np.asarray(on_white(part)))
                time += length
                if time > start:
                    if step == 0 or shown.time >= due:
                        yield shown
                        due = shown.time + step
                    shown = None
                if stop is not None and time >= stop:
                    return
        if shown is not None:  # asked for a time after the end
            yield shown


def _shown_for(part: Image.Image) -> float:
    """Seconds for which one image of an animation is shown; viewers show what asks for none for a tenth."""
    part.load()  # WebP tells then
    return (part.info.get("duration") or 100) / 1000


# ---------------------------------------------------------------- films and sounds


class Streams(Media):
    """What FFmpeg's demuxers and decoders read."""

    def __init__(self, path: str | Path, limits: Limits, container: av.container.InputContainer) -> None:
        super().__init__(path, limits)
        self._reformatter = VideoReformatter()  # one for all frames: its tables and threads take longer than a frame
        self._header, self._unused, self._idle = container, [container], []
        self._read_to = {"image": -np.inf, "sound": -np.inf}  # s of the last stamp that was counted
        self._joined_at: float | None = None  # stamp in s at which another film is appended
        self.format = container.format.name.split(",")[0]
        self._video, self._audio = self._choose_video(container), self._choose_audio(container)
        self._origin, self._frame_seconds = 0.0, 1 / self._rate_of(container)
        self._measure()

    # ---- containers

    def _take(self, fresh: bool = False) -> av.container.InputContainer:
        """A container that nobody reads from; fresh: from which nobody has read, so that it stands at the start."""
        if self._idle and not fresh:
            return self._idle.pop()
        return self._unused.pop() if self._unused else _container(self.path, self.limits)

    def _give_back(self, container: av.container.InputContainer) -> None:
        if container is self._header or len(self._idle) < 2:
            self._idle.append(container)
        else:
            container.close()

    def close(self) -> None:
        for container in {self._header, *self._idle}:
            container.close()

    # ---- which streams

    def _choose_video(self, container) -> int | None:
        """Index of the stream of images: the default one, else the largest; covers and previews are none."""
        hidden = Disposition.attached_pic | Disposition.timed_thumbnails
        streams = [s for s in container.streams.video if s.codec_context is not None and not s.disposition & hidden]
        if not streams:
            if container.streams.video:
                self.decide("cover image not used" if container.streams.video[0].codec_context else "no decoder: video")
            return None
        chosen = max(streams, key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height, -s.index))
        if len(streams) > 1:
            self.decide(f"image stream {streams.index(chosen) + 1} of {len(streams)}")
        return chosen.index

    def _choose_audio(self, container) -> int | None:
        """Index of the stream of sound: the default one, else the first, of those that sound."""
        streams = [s for s in container.streams.audio if s.codec_context is not None]
        if not streams:
            if container.streams.audio:
                self.decide("no decoder: audio")
            return None
        ordered = sorted(streams, key=lambda s: (not s.disposition & Disposition.default, s.index))
        chosen = ordered[0]
        if len(streams) > 1:
            chosen = next((s for s in ordered if self._sounds(s.index)), chosen)
            self.decide(f"sound stream {streams.index(chosen) + 1} of {len(streams)}")
        return chosen.index

    def _sounds(self, index: int) -> bool:
        """Whether a stream of sound is more than zeros in its first minute."""
        container, heard = self._take(fresh=True), 0.0
        try:
            for frame in container.decode(container.streams[index]):
                if np.abs(_samples(frame)).max(initial=0) >= SILENCE:
                    return True
                heard += frame.samples / frame.sample_rate
                if heard > 60:
                    break
        except av.FFmpegError:
            pass
        finally:
            self._give_back(container)
        return False

    # ---- the clock

    def _measure(self) -> None:
        """The spans of image and sound on the clock, its origin, and what the first frame tells."""
        frames, first, begins = [], None, {}
        if self._video is not None:
            with closing(self._decoded_frames(None)) as decoded:
                frames = list(islice(decoded, 2))
        if self._audio is not None:
            with closing(self._decoded_sounds(None, fresh=False)) as decoded:
                first = next(decoded, None)
        self.read.clear()
        if frames:
            self.has_image, begins["image"] = True, frames[0][0]
        if first:
            self.has_sound, begins["sound"], self.sound_rate = True, first[0], first[2]
        for kind, index in (("image", self._video), ("sound", self._audio)):
            if index is not None and kind not in begins:
                self.decide(f"no {kind} can be decoded")
        if not begins:
            return
        self._origin = min(begins.values())
        if 0 < begins.get("image", 0.0) - begins.get("sound", np.inf) < PRIMING:
            self._origin = begins["image"]
        ends = self._ends(begins)
        spans = {
            kind: (max(at - self._origin, 0.0), max(ends[kind] - self._origin, 0.0)) for kind, at in begins.items()
        }
        self.duration = max(end for _, end in spans.values())
        self.image_span, self.sound_span = (spans.get(kind, (0.0, 0.0)) for kind in ("image", "sound"))
        if self.has_image:
            self.is_still = len(frames) == 1
            self.image_span = (self.image_span[0], self.duration if self.is_still else self.image_span[1])
            self._look_at(frames[0][1])
        offset = self.image_span[0] - self.sound_span[0] if len(spans) == 2 else 0.0
        if abs(offset) > PRIMING:
            later, other = ("image", "sound") if offset > 0 else ("sound", "image")
            self.decide(f"offset: the {later} begins {abs(offset):.2f} s after the {other}")

    def _ends(self, begins: Mapping[str, float]) -> dict[str, float]:
        """When image and sound end, in s of their stamps: as the header says, where it can be believed."""
        indices = {"image": self._video, "sound": self._audio}
        container, ends = self._header, {}
        searched = self.format in JOINABLE and os.path.getsize(self.path) <= SEARCHED
        if self.format not in UNTIMED and container.duration and not searched:
            announced = ((container.start_time or 0) + container.duration) / av.time_base
            for kind in begins:
                stream = container.streams[indices[kind]]
                own = float(((stream.start_time or 0) + (stream.duration or 0)) * stream.time_base)
                ends[kind] = min(own, _end_by_index(stream)) if stream.duration else announced
        if ends.keys() != begins.keys():
            ends |= self._ends_by_packets({indices[kind]: kind for kind in begins})
        return {kind: max(at, ends.get(kind, at)) for kind, at in begins.items()}

    def _ends_by_packets(self, kinds: Mapping[int, str], place: float | None = None) -> dict[str, float]:
        """When they end, by reading every packet, from `place` s on, without decoding it."""
        from_start = place is None or place <= 0 or self.format == "avi"
        container, ends, counts = self._take(fresh=from_start), {}, Counter()
        joinable, decoded_at, latest = self.format in JOINABLE and from_start, {}, None
        if not from_start:
            with suppress(av.FFmpegError):
                container.seek(int(place * av.time_base))
        with suppress(av.FFmpegError):
            for packet in container.demux([container.streams[index] for index in kinds]):
                if packet.size == 0:
                    continue
                kind, stamp = kinds[packet.stream_index], packet.dts if packet.pts is None else packet.pts
                if joinable and packet.dts is not None:
                    at = float(packet.dts * packet.time_base)
                    latest = at if latest is None else latest
                    if at < decoded_at.get(kind, at) - RESTART or at > latest + JUMP:
                        self._joined_at = latest
                        self._tell_of_restart(latest)
                        break
                    decoded_at[kind], latest = at, max(at, latest)
                counts[kind] += 1
                if stamp is None:
                    end = counts[kind] / self._rate_of(container)
                else:
                    end = float((stamp + (packet.duration or 0)) * packet.time_base)
                ends[kind] = max(end, ends.get(kind, end))
        self._give_back(container)
        return ends

    def _tell_of_restart(self, stamp: float) -> None:
        at = stamp - self._origin
        self.decide(f"another film is appended at {at:.1f} s, where time stamps start again: it is not used")

    def _rate_of(self, container) -> float:
        if self._video is None:
            return 25.0
        video = container.streams[self._video]
        rates = (video.average_rate, video.guessed_rate, video.base_rate)
        return next((float(rate) for rate in rates if rate and 0 < rate <= HIGHEST_RATE), 25.0)

    def _look_at(self, frame: av.VideoFrame) -> None:
        """Pixel shape, rate and size, from the header and the first frame."""
        container = self._header
        video = container.streams[self._video]
        self._pixel_shape = video.sample_aspect_ratio or Fraction(1)
        self.rate = 0.0 if self.is_still else self._rate_of(container)
        self.size = self._displayed(frame).shape[1::-1]

    def check_whole(self) -> None:
        container, size = self._header, os.path.getsize(self.path)
        for stream in (container.streams[i] for i in (self._video, self._audio) if i is not None):
            entries = stream.index_entries
            if len(entries) and self.format == "mov" and entries[-1].pos + entries[-1].size > size:
                first = bisect_right(range(len(entries)), size, key=lambda i: entries[i].pos + entries[i].size)
                at = float((entries[first].timestamp - (stream.start_time or 0)) * stream.time_base)
                raise MediaError(self.path, f"truncated: it ends after {max(at, 0):.1f} s")
        announced = self._announced(container)
        if announced is None:
            return
        ends = self._ends_by_packets({stream.index: str(stream.index) for stream in container.streams}, announced - 3)
        if not ends:
            ends = self._ends_by_packets({stream.index: str(stream.index) for stream in container.streams})
        end = max(ends.values(), default=0.0)
        if announced - end > TRUNCATED_BY:
            raise MediaError(
                self.path, f"truncated: it ends after {end:.1f} of the {announced:.1f} s that its header announces"
            )

    def _announced(self, container) -> float | None:
        """The stamp at which the file ends by its header, in s; None where the demuxer takes it from the end itself."""
        if self.format == "avi" and self._video is not None:  # of a cut AVI the duration is guessed from its size
            return container.streams[self._video].frames / self._rate_of(container)
        if self.format in UNTIMED or self.format in TIMED_AT_THE_END or not container.duration:
            return None
        return container.duration / av.time_base + min((container.start_time or 0) / av.time_base, 0)

    # ---- images

    def frames(self, start: float = 0.0, stop: float | None = None, step: float = 0.0) -> Iterator[Frame]:
        if not self.has_image:
            yield from super().frames(start, stop)
        shown, due = None, -np.inf
        with closing(self._from(start, self._decoded_frames, self.image_span[0])) as decoded:
            for time, frame in decoded:
                if shown is not None and time > start + self._tolerance:
                    if shown[0] >= due:
                        yield Frame(shown[0], time - shown[0], self._displayed(shown[1]))
                        due = shown[0] + step - self._tolerance
                    if stop is not None and time >= stop:
                        return
                shown = time, frame
        if shown is not None and shown[0] >= due:
            yield Frame(shown[0], max(self.duration - shown[0], self._frame_seconds), self._displayed(shown[1]))

    @property
    def _tolerance(self) -> float:
        """How far a frame's time may lie past the moment at which it is shown."""
        return min(CLOCK_ERROR, 0.4 * self._frame_seconds)

    def _from(self, start: float, decode: Callable, begin: float) -> Iterator[tuple]:
        """What `decode` gives, with times on the clock, from a time at or before `start` on; begin: of its span.

        Where a container seeks too far, from further back, at last from its beginning.
        """
        count_all = (self.format in TIMED_BY_ORDER and start < COUNTED) or self._joined_at is not None
        for back in (None,) if count_all else (0.0, 10.0, None):
            place = None if back is None or start - back <= begin else start - back
            decoded = decode(place)
            first = next(decoded, None)
            if place is None or (first and first[0] is not None and first[0] - self._origin <= start + CLOCK_ERROR):
                break
            decoded.close()
        with closing(decoded):
            for time, *rest in chain([first] if first else [], decoded):
                yield None if time is None else time - self._origin, *rest

    def _decoded_frames(self, place: float | None) -> Iterator[tuple[float, av.VideoFrame]]:
        """Frames in the order they are shown, with their stamps in s, from the key frame before `place`."""
        by_order = self.format in TIMED_BY_ORDER
        guessed = 2 if self.format == "mpeg" and place is not None else 0  # stamps from the second own one on are true
        true_from = -np.inf
        stamps: list[float] = []  # of packets without a time of presentation: these go in the order shown
        seconds, number, before = self._frame_seconds, 0, -np.inf
        lost_from = whole_from = np.inf  # frames between them lean on a key frame that is lost
        doubtful_from = np.inf  # frames from here to the next key frame lean on another frame that is lost
        for packet, decoded, whole in self._packets("image", self._video, place):
            stamp = packet.dts if by_order or packet.pts is None else packet.pts
            stamp = None if stamp is None else float(stamp * packet.time_base)
            if guessed and packet.pos is not None:
                guessed -= 1
                true_from = np.inf if guessed or stamp is None else stamp
            if (by_order or packet.pts is None) and stamp is not None and packet.size:
                heapq.heappush(stamps, stamp)
            if not whole and stamp is not None:
                if packet.is_keyframe or packet.is_corrupt:
                    lost_from, whole_from = min(lost_from, stamp), np.inf
                elif doubtful_from == np.inf:
                    doubtful_from = stamp
                    self.doubts[doubtful_from - self._origin] = self.duration
            elif packet.is_keyframe and whole and stamp is not None:
                whole_from = min(whole_from, stamp) if lost_from < np.inf else np.inf
                if doubtful_from < np.inf:
                    self.doubts[doubtful_from - self._origin] = stamp - self._origin
                    doubtful_from = np.inf
            for frame in decoded:
                if frame.pts is not None and not by_order:
                    time = frame.time
                elif stamps:
                    time = heapq.heappop(stamps)
                else:  # not even an order of decoding, as in a bare stream
                    time = number * seconds
                number += 1
                if time < true_from:
                    continue
                if lost_from <= time < whole_from:
                    continue
                if frame.is_corrupt:
                    self.lost["image"].add(packet.dts)
                    continue
                if time >= whole_from:
                    if whole_from > lost_from:  # stamps of a damaged file may go back
                        self.gaps["image"][lost_from - self._origin] = whole_from - self._origin
                    lost_from = whole_from = np.inf
                if time <= before:  # stamps that go back: shown after the one before all the same
                    time = before + seconds
                yield time, frame
                before = time
        if lost_from < np.inf:
            self.gaps["image"][lost_from - self._origin] = self.duration

    def _packets(
        self, kind: str, index: int, place: float | None, fresh: bool = False
    ) -> Iterator[tuple[av.Packet, Sequence, bool]]:
        """Packets of a stream, what they decode to and whether they are whole, from before `place` s on."""
        container = self._take(fresh or place is None)
        begun, early, last, behind = False, 0, -np.inf, 0
        try:
            stream = container.streams[index]
            if place is not None:
                stream.codec_context.flush_buffers()
                container.seek(int((place + self._origin) / stream.time_base), stream=stream)
            for packet in container.demux(stream):
                at = last if packet.dts is None else float(packet.dts * packet.time_base)
                behind = behind + 1 if at < last - RESTART else 0
                if self._video is not None and self._is_appended(kind, packet, at, behind):
                    yield av.Packet(), stream.codec_context.decode(None), True
                    break
                decoded, whole = self._decode(packet)
                begun |= bool(decoded)
                if begun and not whole:
                    self.lost[kind].add(packet.dts)
                early += not (whole or begun)
                if decoded and early and place is None:
                    self.decide(f"{early} {kind} packets before the first that can be decoded")
                    early = 0
                if packet.size and packet.dts is not None and packet.dts * packet.time_base > self._read_to[kind]:
                    self._read_to[kind] = packet.dts * packet.time_base
                    self.read[kind] += 1
                last = at if behind == 0 else last
                yield packet, decoded, whole
        except av.EOFError:
            pass
        except (av.FFmpegError, OSError) as error:
            if isinstance(error, av.PatchWelcomeError):  # a chained Ogg whose rate changes
                raise MediaError(
                    self.path, f"what follows {last - self._origin:.1f} s is of a kind that FFmpeg cannot read"
                ) from error
            if begun and last - self._origin < self.duration - 1:  # some demuxers end with an error
                self.decide(f"{kind}: reading ends at {last - self._origin:.1f} s ({_reason(error)})")
        finally:
            self._give_back(container)

    def _is_appended(self, kind: str, packet: av.Packet, stamp: float, behind: int) -> bool:
        """Whether a packet belongs to another film; behind: how many packets in a row have stamps that went back."""
        if self._joined_at is not None:
            return behind > 0 or stamp > self._joined_at + RESTART
        appended = behind > 2 or (behind > 0 and kind == "image" and packet.is_keyframe)
        if appended:
            self._tell_of_restart(self._origin + self.duration)
        return appended

    @staticmethod
    def _decode(packet: av.Packet) -> tuple[Sequence, bool]:
        try:
            return packet.decode(), not packet.is_corrupt
        except av.EOFError:
            return (), True
        except (av.FFmpegError, ValueError):
            return (), False

    def _displayed(self, frame: av.VideoFrame) -> np.ndarray:
        """(H, W, 3) uint8 RGB as a player shows it."""
        if frame.width * frame.height > self.limits.pixels:
            raise MediaError(self.path, f"too large: {frame.width} x {frame.height} pixels")
        if frame.interlaced_frame:
            self.decide("interlaced: both half images of a frame are shown at once")
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
            wide = self._reformatter.reformat(
                frame, format="rgb48le", src_colorspace=matrix, dst_color_range=ColorRange.JPEG
            )
            image, brighter = to_sdr(wide.to_ndarray(), transfer, primaries)
            if brighter > 0.001:
                self.decide("brighter than reference white, cut off")
            return image
        rgb = "rgba" if any(c.is_alpha for c in frame.format.components) else "rgb24"
        image = self._reformatter.reformat(
            frame, format=rgb, src_colorspace=matrix, dst_colorspace=matrix, dst_color_range=ColorRange.JPEG
        ).to_ndarray()
        return image if rgb == "rgb24" else np.asarray(on_white(Image.fromarray(image)))

    # ---- sound

    def _decoded_sounds(
        self, place: float | None, fresh: bool = True
    ) -> Iterator[tuple[float | None, np.ndarray, int]]:
        """Pieces of sound: stamp in s, (samples, C) float32, rate in Hz.

        fresh: by a decoder without a past, for the same numbers every time: AAC's goes on drawing its noise.
        """
        stamp = None
        for packet, decoded, _ in self._packets("sound", self._audio, place, fresh):
            if stamp is None and packet.dts is not None:
                stamp = float(packet.dts * packet.time_base)
            for frame in decoded:
                time = frame.time if frame.pts is not None else stamp
                yield time, _samples(frame), frame.sample_rate
                stamp = None

    def track(self, start: float = 0.0, stop: float | None = None) -> Iterator[tuple[np.ndarray, int]]:
        yield from (self._timeline(start, stop) if self.has_sound else super().track(start, stop))

    def _timeline(self, start: float, stop: float | None) -> Iterator[tuple[np.ndarray, int]]:
        """Pieces ((samples, C) float32, rate) that follow each other without a gap from `start` on."""
        at, begun, shift = start, False, 0.0
        for time, samples, rate in self._from(start - WARM_UP, self._decoded_sounds, self.sound_span[0]):
            time = None if time is None else time + shift
            ahead = 0.0 if time is None or (begun and self.format in UNSTAMPED) else time - at
            if begun and ahead < -RESTART and self.format == "ogg" and self._video is None:
                shift -= ahead  # another stream is chained on, whose stamps start again
                ahead = 0.0
            if abs(ahead) > SOUND_GAP or not begun:
                if 0 < ahead < self.duration + 1:
                    if begun:
                        self.gaps["sound"][round(at, 3)] = at + ahead
                    yield from _silence(ahead, rate, samples.shape[1])
                    at += ahead
                elif ahead < 0:
                    samples = samples[min(len(samples), round(-ahead * rate)) :]
            if stop is not None:
                samples = samples[: max(0, round((stop - at) * rate))]
            if len(samples):
                begun = True
                yield samples, rate
            at += len(samples) / rate
            if stop is not None and at >= stop - 0.5 / rate:
                return

    def _mono(self, start: float, stop: float | None) -> Iterator[tuple[np.ndarray, int]]:
        """The same in pieces of about a second with one channel, (samples,)."""
        held: list[np.ndarray] = []
        before, count = (0, 0), 0
        for samples, rate in self._timeline(start, stop):
            if (held and (rate, samples.shape[1]) != before) or count >= before[0]:
                if held:
                    yield self._mixed(held, before[0]), before[0]
                held, count = [], 0
            before = (rate, samples.shape[1])
            held.append(samples)
            count += len(samples)
        if held:
            yield self._mixed(held, before[0]), before[0]

    def _mixed(self, pieces: list[np.ndarray], rate: int) -> np.ndarray:
        mono, cancelled = mix_down(np.concatenate(pieces), rate)
        if cancelled:
            self.decide("one channel taken: the mean of the channels cancels")
        return mono

    def _resampled(self, start: float, stop: float | None, rate: int) -> Iterator[np.ndarray]:
        if not self.has_sound:
            yield from super()._resampled(start, stop, rate)
        stream, native, nothing = None, None, np.empty(0, np.float32)
        for mono, its_rate in self._mono(start, stop):
            if its_rate != native:
                if native is not None:
                    self.decide("the sound's rate changes on the way")
                if stream is not None:
                    yield stream.resample_chunk(nothing, last=True)
                stream = None if its_rate == rate else soxr.ResampleStream(its_rate, rate, 1, quality="HQ")
                native = its_rate
            yield mono if stream is None else stream.resample_chunk(mono)
        if stream is not None:
            yield stream.resample_chunk(nothing, last=True)


def mix_down(samples: np.ndarray, rate: int) -> tuple[np.ndarray, bool]:
    """(samples, C) at `rate` Hz -> the mean of the channels (samples,), and whether it had to be mended.

    Second by second: where the mean lies 12 dB below what unrelated channels would give, as where one channel is the
    other's negative, the loudest channel takes its place.
    """
    if samples.shape[1] == 1:
        return samples[:, 0], False
    mono, mended = samples.mean(axis=1), False
    for begin in range(0, len(mono), rate):
        block, mean = samples[begin : begin + rate], mono[begin : begin + rate]
        power = np.vdot(block, block)
        if power > block.size * SILENCE**2 and np.vdot(mean, mean) < CANCELLED**2 * power / samples.shape[1] ** 2:
            mean[:] = block[:, np.square(block).sum(axis=0).argmax()]
            mended = True
    return mono, mended


def _end_by_index(stream: av.stream.Stream) -> float:
    """When the last packet of an MP4's stream ends at the latest, in s: a late stream's length counts its delay in."""
    entries = stream.index_entries
    if not stream.start_time or len(entries) < 2 or not stream.container.format.name.startswith("mov"):
        return np.inf
    average = (entries[-1].timestamp - entries[0].timestamp) / (len(entries) - 1)
    longest = max(average, entries[-1].timestamp - entries[-2].timestamp)
    return float((entries[-1].timestamp + longest) * stream.time_base) + SOUND_GAP


_TRANSFERS = {ColorTrc.SMPTE2084: "pq", ColorTrc.ARIB_STD_B67: "hlg"}
_PRIMARIES = {1: "bt709", 9: "bt2020", 11: "p3", 12: "p3"}  # FFmpeg's numbers
_MATRICES = {
    1: Colorspace.ITU709, 5: Colorspace.ITU601, 6: Colorspace.ITU601, 7: Colorspace.SMPTE240M, 9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}  # fmt: skip


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
