"""From an image or a film to the files that show where its sound comes from.

H x W pixels as displayed, h x w tokens of a map.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from film.localizer import Localizer, Piece, Step, heat_of, opened
from film.strip import Strip
from film.tables import Rows
from film.writer import FilmWriter, playable_size
from media import Media
from reports.pictures import overlay
from utils import atomic_path

SHOWS = ("share", "relative")
MASK_CRF = 8  # edges stay sharp
AHEAD = 16  # steps by which the model may be ahead of the drawing


class Look(NamedTuple):
    """How maps are drawn."""

    show: str = "share"  # as it is, dark where nothing in view sounds; or "relative": stretched to its own range
    mask: bool = False  # also write where AUD_share is above the threshold, white on black


class Outputs(NamedTuple):
    """The files of one input: `stem` without a suffix, in a folder that is there."""

    stem: Path

    def file(self, suffix: str) -> Path:
        return self.stem.with_name(self.stem.name + suffix)


# ---------------------------------------------------------------- drawing


def heat_tokens(step: Step, show: str) -> np.ndarray:
    """(h, w) float32 in 0..1: what is drawn of a step."""
    if show == "share":
        return np.clip(step.share, 0, 1)
    low, high = step.relative.min(), step.relative.max()
    return (step.relative - low) / (high - low) if high > low else np.zeros_like(step.relative)


def paint(image: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 under the heat of tokens (h, w) in 0..1."""
    return overlay(image, heat_of(tokens, image.shape[:2]))


def mask_of(share: np.ndarray, threshold: float, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8: white where AUD_share (h, w) is above the threshold."""
    lit = np.where(heat_of(share, size) > threshold, np.uint8(255), np.uint8(0))
    return cv2.merge([lit, lit, lit])


# ---------------------------------------------------------------- an image


def render_image(
    localizer: Localizer, image: Path, sound: Path, outputs: Outputs, look: Look, about: Mapping[str, Any]
) -> None:
    """Write the overlay of an image, its row, and its mask if wanted."""
    step = localizer.image(image, sound)
    drawn = {".png": paint(step.image, heat_tokens(step, look.show))}
    if look.mask:
        drawn["_mask.png"] = mask_of(step.share, localizer.threshold, step.image.shape[:2])
    height, width = step.image.shape[:2]
    about = {**about, "kind": "image", "width": width, "height": height}
    with Rows(outputs.file(".csv"), outputs.file(".json"), about) as rows:
        rows.add(step)
        for suffix, pixels in drawn.items():
            with atomic_path(outputs.file(suffix)) as temporary:
                Image.fromarray(pixels).save(temporary, format="PNG", compress_level=3)
        rows.end = {"presence": step.presence, "complete": True}


# ---------------------------------------------------------------- a film


class Track:
    """A film's sound as it is stored, handed to a writer as far as the images have come."""

    def __init__(self, heard: Media) -> None:
        self._pieces = heard.track()
        self._next = next(self._pieces, None)
        self._heard = 0.0
        self.channels = self._next[0].shape[1] if self._next else 0

    def until(self, time: float, writer: FilmWriter) -> None:
        while self._next and self._heard < time:
            samples, rate = self._next
            samples = samples[: math.ceil((time - self._heard) * rate)] if time < math.inf else samples
            writer.sound(samples, rate)
            self._heard += len(samples) / rate
            rest = self._next[0][len(samples) :]
            self._next = (rest, rate) if len(rest) else next(self._pieces, None)


class Drawing:
    """The films and the picture of one clip, drawn piece by piece."""

    def __init__(self, localizer: Localizer, shown: Media, heard: Media, length: float, look: Look) -> None:
        self.look, self.threshold, self.fps = look, localizer.threshold, localizer.map_fps
        self.size, self.rate = playable_size(*shown.size), max(shown.rate or self.fps, 1.0)
        self.track, self.strip = Track(heard), Strip(length)

    def begin(self, stack: ExitStack, outputs: Outputs) -> "Drawing":
        """Open the films, which appear when the stack ends without an error."""
        size, rate = self.size, self.rate
        self.film = _writer(stack, outputs.file(".mp4"), size, rate, self.track.channels)
        self.mask = _writer(stack, outputs.file("_mask.mp4"), size, rate, 0, MASK_CRF) if self.look.mask else None
        return self

    def add(self, piece: Piece, after: Step) -> None:
        """Draw the frames of a piece, each under the map between its step and the one after it, and their sound."""
        step = piece.step
        for time, image in piece.shots:
            part = min(1.0, (time - step.time) * self.fps)
            if image.shape[1::-1] != self.size:
                image = cv2.resize(image, self.size, interpolation=cv2.INTER_AREA)
            tokens = _between(heat_tokens(step, self.look.show), heat_tokens(after, self.look.show), part)
            drawn = paint(image, tokens)
            self.film.frame(time, drawn)
            self.strip.see(time, drawn)
            if self.mask:
                lit = mask_of(_between(step.share, after.share, part), self.threshold, image.shape[:2])
                self.mask.frame(time, lit)
        self.track.until(step.time + 1 / self.fps, self.film)

    def close(self, end: float) -> None:
        self.strip.until(end)
        self.track.until(end, self.film)
        for writer in filter(None, (self.film, self.mask)):
            writer.close(end)


def render_clip(
    localizer: Localizer,
    film: Path,
    sound: Path | None,
    outputs: Outputs,
    look: Look,
    about: Mapping[str, Any],
    stopped: Callable[[], bool] = lambda: False,
    hide_bar: bool | None = None,
) -> bool:
    """Write the film with its heat map and sound, its rows, its picture, its mask -> whether to its end.

    When `stopped` says so, what has been written by then is finished: a film that plays up to there. After any error
    no file is left, or the one before it. Drawing and encoding run on a thread, at most AHEAD steps behind the model.
    """
    with ExitStack() as stack:
        shown, heard = stack.enter_context(opened(film, sound))
        length = heard.duration if shown.is_still else shown.duration
        about = {**about, "kind": "film", "width": shown.size[0], "height": shown.size[1], "duration": length}
        rows = stack.enter_context(Rows(outputs.file(".csv"), outputs.file(".json"), about))
        drawing = Drawing(localizer, shown, heard, length, look).begin(stack, outputs)
        bar = stack.enter_context(tqdm(total=round(length, 1), unit="s", desc=film.name, leave=False, disable=hide_bar))
        thread, behind = stack.enter_context(ThreadPoolExecutor(1)), deque()
        end, complete = length, True
        for piece, after in _with_next(localizer.follow(shown, heard, tap=drawing.strip.hear)):
            rows.add(piece.step)
            behind.append(thread.submit(drawing.add, piece, after))
            if len(behind) > AHEAD:
                behind.popleft().result()
            bar.update(min(1 / localizer.map_fps, length - bar.n))
            if stopped():
                end, complete = piece.step.time + 1 / localizer.map_fps, False
                break
        for drawn in behind:
            drawn.result()
        drawing.close(end)
        decisions = list(dict.fromkeys([*shown.decisions, *heard.decisions]))
        times, presence, lit = rows.columns("time", "presence", "lit_share")
        drawing.strip.draw(outputs.file(".png"), times, presence, lit, film.name)
        rows.end = {"presence": float(presence.max()), "decisions": decisions, "complete": complete}
    return complete


def _writer(stack: ExitStack, path: Path, *settings: Any) -> FilmWriter:
    """A writer of a file that appears when the stack ends without an error."""
    temporary = stack.enter_context(atomic_path(path))
    writer = FilmWriter(temporary, *settings)
    stack.callback(writer.abandon)
    return writer


def _with_next(pieces: Iterator[Piece]) -> Iterator[tuple[Piece, Step]]:
    """Each piece with the step after it; the last one with its own."""
    before = next(pieces, None)
    for piece in pieces:
        yield before, piece.step
        before = piece
    if before:
        yield before, before.step


def _between(one: np.ndarray, other: np.ndarray, part: float) -> np.ndarray:
    return one if part <= 0 else (1 - part) * one + part * other
