"""One film -> its pairs: which seconds, which frames, and the two files of each pair.

Seconds are those of the film's clock, see media.py; a film's first pair begins where image and sound have both begun,
and where one of them ends much before the other, the image is taken from the part that has both.
"""

import errno
import json
import math
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
from PIL import Image

import media
from audio_io import SAMPLE_RATE, write_audio
from media import Media, MediaError
from prepare.names import Failure, Task
from utils import UserError, atomic_path

PAIR_SECONDS = 10.0  # of sound in a pair, where nothing else is asked for
MOMENT = 5.0  # s of a VGG-Sound clip at which VGG-SS drew its boxes
TURN_SECONDS = 300  # of work on one film before another gets its turn
SHORTEST = 1.0  # seconds of images, and of sound, below which there is no pair
JPEG_QUALITY = 95
APART = 1.0  # s between the ends of image and sound that are worth a word
NEAR = 1.0  # s from a damaged frame within which another one does
LOUDNESS_WINDOW = 0.1  # s
SHARPNESS_STEP, SHARPNESS_WIDTH = 0.2, 320  # s between the frames that are compared, and pixels of what is compared
LIMITS = media.Limits()


class Wish(NamedTuple):
    """What to take of a film."""

    source: str = "vggsound"  # or flickr: from where the one pair of a film is taken
    every: float | None = None  # s between the pairs of a film; None: one pair
    overlap: float = 0.0  # s that the sound of a pair goes on into the next one
    frame: str = "middle"  # or first, sharpest, loudest
    frames: int = 1  # of each pair


class Row(NamedTuple):
    """A row of pairs.csv: where a pair comes from."""

    id: str
    file: str
    bytes: int  # size of that file
    start: str  # s of the film at which the sound begins
    seconds: str  # of sound
    frame: str  # s of the film at which the image comes up; several are separated by blanks
    decisions: str  # what media.py decided, separated by "; "


class Outcome(NamedTuple):
    """What became of a film."""

    rows: tuple[Row, ...] = ()  # pairs made
    there: tuple[str, ...] = ()  # ids of pairs that were there already
    failures: tuple[Failure, ...] = ()  # why there is no pair; with --every, of each part
    unused: float = 0.0  # s of the film that are in no pair
    unfinished: Task | None = None  # time is up: with what to go on
    fatal: str = ""  # why the output cannot be written: the run is over


class Piece(NamedTuple):
    """The part of a film that becomes a pair."""

    id: str
    start: float
    stop: float
    moment: float | None = None  # s of the frame, where it is settled


# ---------------------------------------------------------------- which part


def pieces_of(film: Media, task: Task, wish: Wish) -> list[Piece]:
    """The parts of a film that become pairs. Raises MediaError."""
    if not film.has_image or not film.has_sound:
        missing = "video" if not film.has_image else "audio"
        raise MediaError(film.path, "; ".join([f"no {missing} stream", *film.decisions]))
    film.check_whole()
    begin = film.start
    seen, heard = film.image_span[1] - begin, film.sound_span[1] - begin
    for seconds, of in ((seen, "pictures"), (heard, "sound")):
        if seconds < SHORTEST:
            raise MediaError(film.path, f"too short: {max(seconds, 0):.2f} s of {of}")
    both = min(seen, heard)
    if abs(seen - heard) > APART and not film.is_still:
        first, last = ("image", "sound") if seen < heard else ("sound", "image")
        film.decide(f"the {first} ends {abs(seen - heard):.2f} s before the {last}")
    if wish.every:
        return list(_pieces_every(task.id, begin, begin + both, wish))
    moment = begin + both / 2
    if wish.source == "flickr":
        begin += max(0.0, (both - PAIR_SECONDS) / 2)
    elif film.is_still or both > MOMENT:
        moment = begin + MOMENT
    settled = wish.frame == "middle" and wish.frames == 1
    if settled and wish.source == "vggsound" and moment != begin + MOMENT:
        film.decide(f"image or sound ends before {MOMENT} s: the frame nearest their middle was taken")
    return [Piece(task.id, begin, min(begin + PAIR_SECONDS, film.sound_span[1]), moment if settled else None)]


def _pieces_every(name: str, begin: float, end: float, wish: Wish) -> Iterator[Piece]:
    """Pieces named after the second at which they begin; a last one that is shorter than half of the others is none."""
    for number in range(math.ceil((end - begin) / wish.every)):
        start = begin + number * wish.every
        if number == 0 or end - start >= max(wish.every / 2, SHORTEST):
            yield Piece(f"{name}_{int(number * wish.every):06d}", start, min(start + wish.every + wish.overlap, end))


# ---------------------------------------------------------------- which frames


def choose_frames(film: Media, piece: Piece, wish: Wish, sound: np.ndarray) -> list[media.Frame]:
    """The frames of a piece: of each of its `wish.frames` equal parts the one that `wish.frame` names."""
    if piece.moment is not None:
        return [whole_frame_at(film, piece.moment)]
    stop = min(piece.stop, film.image_span[1])
    edges = np.linspace(piece.start, stop, wish.frames + 1).tolist()
    chosen = []
    for begin, end in pairwise(edges):
        if wish.frame == "sharpest":
            chosen.append(max(film.frames(begin, end, SHARPNESS_STEP), key=_sharpness))
            continue
        moment = {"middle": (begin + end) / 2, "first": begin}.get(wish.frame)
        if moment is None:
            moment = begin + _loudest(sound[round((begin - piece.start) * SAMPLE_RATE) :], end - begin)
        chosen.append(whole_frame_at(film, moment))
    return chosen


def whole_frame_at(film: Media, moment: float) -> media.Frame:
    """The frame shown at `moment`, or the nearest one that no damage touches; MediaError where that is too far away."""
    frame = film.frame_at(moment)
    for gaps, usable in ((film.gaps["image"], False), (film.doubts, True)):
        for begin, end in list(gaps.items()):
            if not begin <= moment < end:
                continue
            around = film.frame_at(begin - 0.05), film.frame_at(end)
            nearest = min(around, key=lambda shown: abs(shown.time - moment))
            if abs(nearest.time - moment) <= NEAR:
                return nearest
            if not usable:
                raise MediaError(film.path, f"damaged: no whole image within {NEAR:g} s of {moment:.2f} s")
            film.decide(f"the image at {frame.time:.2f} s comes after a damaged one")
    return frame


def _sharpness(frame: media.Frame) -> float:
    """Variance of the Laplacian of the grey image at one width."""
    grey = cv2.cvtColor(frame.image, cv2.COLOR_RGB2GRAY)
    height = max(1, round(grey.shape[0] * SHARPNESS_WIDTH / grey.shape[1]))
    return float(
        cv2.Laplacian(cv2.resize(grey, (SHARPNESS_WIDTH, height), interpolation=cv2.INTER_AREA), cv2.CV_32F).var()
    )


def _loudest(sound: np.ndarray, seconds: float) -> float:
    """The middle, in s, of the loudest tenth of a second."""
    window = round(LOUDNESS_WINDOW * SAMPLE_RATE)
    count = min(len(sound), round(seconds * SAMPLE_RATE)) // window
    if count == 0:
        return seconds / 2
    power = np.square(sound[: count * window]).reshape(count, window).sum(axis=1)
    return (int(power.argmax()) + 0.5) * LOUDNESS_WINDOW


# ---------------------------------------------------------------- the files


def convert(task: Task, out: Path, wish: Wish) -> Outcome:
    """Write the pairs of one film that are not there, each whole or not at all, and say what became of it."""
    rows, there, failures = [], [], []
    end_of_turn = time.monotonic() + TURN_SECONDS

    def outcome(**more) -> Outcome:
        return Outcome(tuple(rows), tuple(there), tuple(failures), **more)

    try:
        with media.open(task.path, LIMITS) as film:
            pieces = pieces_of(film, task, wish)
            for number, piece in enumerate(pieces[task.done :], task.done + 1):
                if pair_is_there(out, piece.id, wish.frames > 1):
                    there.append(piece.id)
                    continue
                try:
                    rows.append(_write(film, task, piece, *_taken(film, piece, wish), out, wish))
                except MediaError as error:
                    failures.append(Failure(task.name, piece.id, error.reason))
                if time.monotonic() > end_of_turn and number < len(pieces):
                    return outcome(unfinished=task._replace(done=number))
            return outcome(unused=max(0.0, film.duration - film.start - pieces[-1].stop + pieces[0].start))
    except MediaError as error:
        failures.append(Failure(task.name, task.id, error.reason))
    except _CannotWrite as error:
        if not error.its_own_fault:
            return outcome(fatal=str(error))
        failures.append(Failure(task.name, task.id, str(error)))
    except (av.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        failures.append(Failure(task.name, task.id, f"cannot be decoded: {reason}"))
    return outcome()


def _taken(film: Media, piece: Piece, wish: Wish) -> tuple[list[media.Frame], np.ndarray]:
    """Frames and sound of a piece. Raises MediaError where too much of them is damaged, or nothing sounds."""
    sound = film.sound(piece.start, piece.stop)
    frames = choose_frames(film, piece, wish, sound)
    film.check_damage()
    silent = sum(max(0.0, min(end, piece.stop) - max(begin, piece.start)) for begin, end in film.gaps["sound"].items())
    if silent > LIMITS.lost * (piece.stop - piece.start):
        raise MediaError(film.path, f"damaged: {silent:.2f} of {piece.stop - piece.start:.2f} s of sound are missing")
    if len(sound) < SHORTEST * SAMPLE_RATE:
        raise MediaError(film.path, f"too short: {len(sound) / SAMPLE_RATE:.2f} s of sound")
    if not np.isfinite(sound).all():
        raise MediaError(film.path, "damaged: the sound holds values that are not finite")
    if np.abs(sound).max() < media.SILENCE:
        raise MediaError(film.path, "all-zero sound")
    return frames, sound


def pair_is_there(out: Path, name: str, several: bool) -> bool:
    image = out / "frames" / (name if several else f"{name}.jpg")
    return image.exists() and (out / "audio" / f"{name}.wav").exists()


class _CannotWrite(Exception):
    its_own_fault = False  # its name is too long; else the disk is full or the like


def _write(
    film: Media, task: Task, piece: Piece, frames: list[media.Frame], sound: np.ndarray, out: Path, wish: Wish
) -> Row:
    """frames/<id>.jpg (several: frames/<id>/<n>.jpg) and, last, audio/<id>.wav; the row stands in the JPEG, too."""
    times = " ".join(f"{frame.time:.3f}" for frame in frames)
    size, seconds = task.path.stat().st_size, len(sound) / SAMPLE_RATE
    decisions = "; ".join(film.decisions)
    row = Row(piece.id, task.name, size, f"{piece.start:.3f}", f"{seconds:.3f}", times, decisions)
    comment = json.dumps(row._asdict(), ensure_ascii=False).encode("utf-8", "replace")
    folder = out / "frames"
    names = [folder / f"{piece.id}.jpg"]
    if wish.frames > 1:
        names = [folder / piece.id / f"{number:02d}.jpg" for number in range(wish.frames)]
    try:
        with atomic_path(out / "audio" / f"{piece.id}.wav") as new_wav:
            write_audio(new_wav, sound)
            for name, frame in zip(names, frames, strict=True):
                with atomic_path(name) as new_jpeg:
                    Image.fromarray(frame.image).save(new_jpeg, "JPEG", quality=JPEG_QUALITY, comment=comment)
    except (OSError, UserError) as error:
        problem = _CannotWrite(f"cannot write: the pair {piece.id} in {out}: {error}")
        problem.its_own_fault = getattr(error.__cause__ or error, "errno", None) == errno.ENAMETOOLONG
        raise problem from error
    return row


def row_of(image: Path) -> Row | None:
    """The row that stands in a pair's JPEG; None where there is none, as in pairs of older code."""
    try:
        with Image.open(image) as opened:
            return Row(**json.loads(opened.info["comment"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
