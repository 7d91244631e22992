"""Where a sound comes from, in an image or over a film, without boxes: the engine of localize.py.

H x W pixels of an image as displayed, h x w tokens of a map. Times are seconds on the film's clock. A step is a moment
at which the model is asked: about the frame shown then, with a window of sound around it.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image

import media
from audio_io import SAMPLE_RATE, crop_or_tile, log_spectrogram, num_samples
from maps import MAP_SIZE, enlarge_absolute, smooth_maps, upsample_maps
from media import Frame, Media, MediaError
from models import Trained, load, rows_of
from resnet import fuse_batch_norm
from scoring.metrics import share_above
from transforms import eval_transform
from utils import UserError, full_precision, number

BATCH = 8  # steps that go through the model at once: more take no less time on a CPU, but memory
BUFFER_BYTES = 2**28  # of frames that wait for the map of the step after them
THRESHOLD = 0.5  # where a checkpoint has none
SHORTEST_WINDOW = 0.1  # seconds
CLOCK_ERROR = 0.002  # seconds: containers round their time stamps to milliseconds
LONG = 1.5  # steps: a frame that is shown for longer is shown again at each step, as its map moves on


def add_window(group, of: str = "") -> None:
    """The flag --window, the same wherever films are asked; `of` names the films."""
    text = f"{of}seconds of sound around each frame (default: as the model was trained)"
    group.add_argument("--window", type=number(float, low=SHORTEST_WINDOW, high=60), help=text)


class Peak(NamedTuple):
    """Where AUD is largest, in pixels of the image, and what AUD_share is there."""

    x: float
    y: float
    value: float


class Box(NamedTuple):
    """In pixels of the image."""

    left: float
    top: float
    right: float
    bottom: float


class Step(NamedTuple):
    """What a model finds at a moment of a film, or in an image."""

    time: float  # s; 0 of an image
    image: np.ndarray  # (H, W, 3) uint8 RGB as displayed
    share: np.ndarray  # (h, w) float32, AUD_share: 0..1, of max-pooled models -1..1
    relative: np.ndarray  # (h, w) float32, AUD as the model is scored by it
    presence: float  # confidence that the source is in view
    lit: float  # share of the image where AUD_share is above the threshold, 0..1
    peak: Peak
    box: Box | None  # of the largest lit region; None where nothing is lit

    @property
    def map(self) -> np.ndarray:
        """(H, W) float32: AUD_share at the image's size, a map that may stay dark."""
        return heat_of(self.share, self.image.shape[:2])


class Piece(NamedTuple):
    """A step, and the frames that are shown from its time until that of the next one."""

    step: Step
    shots: list[tuple[float, np.ndarray]]  # time and (H, W, 3) uint8; a frame shown for long comes several times


def heat_of(tokens: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Tokens of a map (h, w) -> (H, W) float32, bilinear with aligned corners, as `enlarge_absolute`."""
    down, across = (_bilinear(count, length) for count, length in zip(tokens.shape, size, strict=True))
    return down @ tokens @ across.T


@lru_cache(maxsize=16)
def _bilinear(count: int, length: int) -> np.ndarray:
    """(length, count) float32: the weights of `count` values in each of `length` that lie between them."""
    place = np.linspace(0, count - 1, length) if length > 1 else np.zeros(1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(count))).astype(np.float32)


# ---------------------------------------------------------------- sound


class Windows:
    """Windows of a film's sound around its moments, read in one pass: asked for in the order of time.

    sounds: successive pieces (samples,) at 16 kHz; window: seconds; duration: of the film, beyond whose ends its sound
    is mirrored. Where the film goes on without sound, there is silence. At most the window and two pieces are held.
    """

    def __init__(self, sounds: Iterator[np.ndarray], window: float, duration: float) -> None:
        self.length = num_samples(window)
        self._half = self.length // 2
        self._pieces = _filled(sounds, max(num_samples(duration), 1))
        self._held, self._start = np.empty(0, np.float32), -self._half  # index on the film's clock of the first sample
        self._ended = False
        self._read(self.length + 1)
        self._held = np.pad(self._held, (self._half, self.length * self._ended), mode="reflect")

    def _read(self, count: int) -> None:
        """Hold at least `count` samples, or all that are left."""
        parts, held = [self._held], len(self._held)
        while held < count and not self._ended:
            piece = next(self._pieces, None)
            if piece is None:
                self._ended = True
            else:
                parts.append(piece)
                held += len(piece)
        if len(parts) > 1:
            self._held = np.concatenate(parts)

    def around(self, time: float) -> np.ndarray:
        """(samples,) float32: the window whose middle is `time`; past the film's end, its last one."""
        start = max(0, num_samples(time) - self._half - self._start)
        was_open = not self._ended
        self._read(start + self.length)
        if self._ended and was_open:
            self._held = np.pad(self._held, (0, self.length), mode="reflect")
        start = min(start, len(self._held) - self.length)
        window = self._held[start : start + self.length]
        drop = max(0, min(start, len(self._held) - self.length - 1))
        self._held, self._start = self._held[drop:], self._start + drop
        return window


def _tapped(pieces: Iterator[np.ndarray], tap: Callable[[np.ndarray], None]) -> Iterator[np.ndarray]:
    for piece in pieces:
        tap(piece)
        yield piece


def _filled(sounds: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The pieces, then zeros until there are `count` samples."""
    heard = 0
    for piece in sounds:
        yield piece
        heard += len(piece)
    while heard < count:
        yield np.zeros(min(SAMPLE_RATE, count - heard), np.float32)
        heard += min(SAMPLE_RATE, count - heard)


# ---------------------------------------------------------------- the engine


class Localizer:
    """A trained model, ready to be asked about images and films.

        localizer = Localizer("checkpoints/listen.pth")
        step = localizer.image("photo.jpg", "sound.wav")
        for step in localizer.clip("film.mp4"): ...

    checkpoint: its path, or one that is loaded; device: where the model runs; window: seconds of sound around each
    frame (default: as in training); a shorter one is repeated, as training does it with short sounds; map_fps: steps
    per second of a film. UserError for a checkpoint that cannot be read, and numbers that make no sense.
    """

    def __init__(
        self,
        checkpoint: str | Path | Trained,
        device: str | torch.device = "cpu",
        window: float | None = None,
        map_fps: float = 10.0,
    ) -> None:
        self.device, self.map_fps = torch.device(device), map_fps
        is_loaded = isinstance(checkpoint, Trained)
        self.trained = checkpoint if is_loaded else load(checkpoint, self.device)
        model = copy.deepcopy(self.trained.model) if is_loaded else self.trained.model
        self.model = fuse_batch_norm(model.eval()).to(self.device, memory_format=torch.channels_last)
        shape = self.model.shape
        self.window = shape["audio_seconds"] if window is None else window
        if not SHORTEST_WINDOW <= self.window < math.inf:
            raise UserError(f"a window of {self.window} s of sound cannot be: {SHORTEST_WINDOW} s or more")
        if not 0 < map_fps < math.inf:
            raise UserError(f"{map_fps} steps a second are no number above 0")
        self._heard = max(num_samples(self.window), num_samples(shape["audio_seconds"]))
        self._seen = eval_transform(self.model.infer_image_size)
        self.has_threshold = self.trained.threshold is not None
        self.threshold = self.trained.threshold if self.has_threshold else THRESHOLD

    # ---- images

    def image(self, image: str | Path | np.ndarray, sound: str | Path | np.ndarray) -> Step:
        """Where in an image a sound comes from.

        image: a file, or (H, W, 3) uint8 RGB; sound: a file, or (samples,) floats in -1..1 at 16 kHz, mono. Of a longer
        sound the middle is taken, a shorter one is repeated. UserError for a file that cannot be decoded, ValueError
        for an array of another kind.
        """
        pixels = _as_pixels(image) if isinstance(image, np.ndarray) else _image_of(image)
        waveform = _as_waveform(sound) if isinstance(sound, np.ndarray) else _sound_of(sound)
        if not len(waveform):
            raise UserError(f"{sound}: the sound is empty" if isinstance(sound, str | Path) else "the sound is empty")
        heard = crop_or_tile(waveform, num_samples(self.window))
        return self._ask([0.0], [pixels], [0], [heard])[0]

    # ---- films

    def clip(self, film: str | Path, sound: str | Path | None = None) -> Iterator[Step]:
        """The steps of a film in the order of time, map_fps a second, from files alone; sound: in place of its own.

        Memory does not grow with the length. UserError for a file without image or sound, and for damage on the way.
        """
        with opened(film, sound) as (shown, heard):
            for piece in self.follow(shown, heard, shots=False):
                yield piece.step

    def follow(
        self, film: Media, heard: Media, shots: bool = True, tap: Callable[[np.ndarray], None] = lambda piece: None
    ) -> Iterator[Piece]:
        """The steps of an opened film, each with the frames shown until the next one (none if not `shots`).

        tap: called with the pieces of sound at 16 kHz as they are read. Each frame is decoded once, each frame and each
        window of sound goes through the model once.
        """
        length = heard.duration if film.is_still else film.duration
        windows = Windows(_tapped(heard.sounds(1.0), tap), self.window, length)
        times: list[float] = []  # of the steps that wait for the model
        rows: list[int] = []  # the frame of each
        images: list[np.ndarray] = []
        waiting: list[list[tuple[float, np.ndarray]]] = []

        def flush() -> Iterator[Piece]:
            steps = self._ask(times, images, rows, [windows.around(time) for time in times])
            yield from map(Piece, steps, waiting)
            for kept in (times, rows, images, waiting):
                kept.clear()

        count, held = 0, 0
        for frame in _from_zero(film.frames(), length if film.is_still else 0.0):
            used, end = False, frame.time + frame.duration - CLOCK_ERROR
            if shots and waiting and frame.time < count / self.map_fps - CLOCK_ERROR:
                waiting[-1].append((frame.time, frame.image))
            held += frame.image.nbytes
            while (time := count / self.map_fps) < end or not count:  # however short, a film is asked about once
                if len(times) >= BATCH or (times and held > BUFFER_BYTES):
                    yield from flush()
                    used, held = False, frame.image.nbytes
                if not used:
                    images.append(frame.image)
                    used = True
                begins = frame.time > time - CLOCK_ERROR
                lasts = frame.duration > LONG / self.map_fps
                times.append(time)
                rows.append(len(images) - 1)
                waiting.append([(time, frame.image)] if shots and (begins or lasts) else [])
                count += 1
        if times:
            yield from flush()

    # ---- the model

    @torch.no_grad()
    @full_precision()
    def _ask(
        self, times: Sequence[float], images: Sequence[np.ndarray], rows: Sequence[int], heard: Sequence[np.ndarray]
    ) -> list[Step]:
        """Steps at `times`: images[rows[i]] with the sound heard[i]."""
        pixels = torch.stack([self._seen(Image.fromarray(image)) for image in images])
        sound = torch.stack([log_spectrogram(crop_or_tile(window, self._heard)) for window in heard])
        pixels = pixels.to(self.device, memory_format=torch.channels_last)
        seen, grid = self.model.attend_image(pixels)
        seen, audio = rows_of(seen, list(rows)), self.model.attend_audio(sound.to(self.device))
        sharpening, smoothing = (self.trained.inference[name] for name in ("infer_sharpening", "infer_smoothing"))
        maps = self.model.maps(seen, audio, grid, sharpening)
        confidences = self.model.confidences(seen, audio, sharpening)
        presence = confidences.get("presence", confidences["confidence"]).cpu().tolist()
        share, relative = maps.share.float().cpu(), smooth_maps(maps.audio_map.float(), smoothing).cpu()
        if not (torch.isfinite(share).all() and torch.isfinite(relative).all()):
            raise UserError(f"the model gives a map that is not finite at {times[0]:.1f} s or soon after it")
        large, peaked = enlarge_absolute(share), upsample_maps(relative)
        lit = share_above(large, self.threshold).tolist()
        return [
            Step(
                time,
                images[row],
                share[i].numpy(),
                relative[i].numpy(),
                presence[i],
                lit[i],
                _peak(peaked[i].numpy(), large[i].numpy(), images[row]),
                _largest_box(large[i].numpy() > self.threshold, images[row]),
            )
            for i, (time, row) in enumerate(zip(times, rows, strict=True))
        ]


def _peak(relative: np.ndarray, share: np.ndarray, image: np.ndarray) -> Peak:
    """Where a map (224, 224) is largest, in pixels of the image, and the value of another map there."""
    y, x = np.unravel_index(int(relative.argmax()), relative.shape)
    across, down = (length / MAP_SIZE for length in image.shape[1::-1])
    return Peak(float((x + 0.5) * across - 0.5), float((y + 0.5) * down - 0.5), float(share[y, x]))


def _largest_box(lit: np.ndarray, image: np.ndarray) -> Box | None:
    """The box, in pixels of the image, of the largest connected region of (224, 224) bool."""
    count, _, stats, _ = cv2.connectedComponentsWithStats(lit.astype(np.uint8), connectivity=8)
    if count < 2:
        return None
    left, top, width, height, _ = stats[1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())].tolist()
    across, down = (length / MAP_SIZE for length in image.shape[1::-1])
    return Box(left * across, top * down, (left + width) * across, (top + height) * down)


# ---------------------------------------------------------------- files and arrays


@contextmanager
def opened(film: str | Path, sound: str | Path | None = None) -> Iterator[tuple[Media, Media]]:
    """A film, and what its sound is read from: itself, or the file `sound`. MediaError where either lacks its part."""
    with media.open(film) as shown:
        if not shown.has_image:
            raise MediaError(film, "no image: it holds sound only" if shown.has_sound else "neither image nor sound")
        if sound is None:
            if not shown.has_sound:
                raise MediaError(film, "no sound: --sound FILE gives it one")
            _tell_whether_whole(shown)
            yield shown, shown
            return
        with media.open(sound) as heard:
            if not heard.has_sound:
                raise MediaError(sound, "no sound")
            _tell_whether_whole(shown)
            _tell_whether_whole(heard)
            yield shown, heard


def _tell_whether_whole(file: Media) -> None:
    """What is there of a film that was cut off can be looked at, which is said; as training data it is refused."""
    try:
        file.check_whole()
    except MediaError as error:
        file.decide(f"{error.reason}; what is there is shown")


def _image_of(path: str | Path) -> np.ndarray:
    with media.open(path) as file:
        return file.frame_at(0.0).image


def _sound_of(path: str | Path) -> np.ndarray:
    with media.open(path) as file:
        if not file.has_sound:
            raise MediaError(path, "no sound")
        return file.sound()


def _as_pixels(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"an image is (H, W, 3) uint8 RGB, not {image.shape} {image.dtype}")
    return image


def _as_waveform(sound: np.ndarray) -> np.ndarray:
    if sound.ndim != 1 or sound.dtype.kind != "f" or not np.isfinite(sound).all():
        raise ValueError(f"a sound is (samples,) finite floats in -1..1, not {sound.shape} {sound.dtype}")
    return sound.astype(np.float32)


def _from_zero(frames: Iterator[Frame], length: float) -> Iterator[Frame]:
    """The frames; the first one is shown from the film's beginning, and for at least `length` s."""
    for first in frames:
        yield Frame(0.0, max(first.time + first.duration, length), first.image)
        break
    yield from frames
