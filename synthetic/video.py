"""Films of sounding objects: 40 MP4 clips of 10 s with the truth of every frame, made from a seed.

    python prepare_data.py synthetic --video                write them into data/synthetic_video

Two or three objects of the kinds of the built-in data move about an image and sound in turns, with two pauses. One of
them leaves the image, and sounds once more from outside. Which one sounds cannot be seen. In half of the films the
pauses are digital silence, in the others the noise of the film goes on. No film shares a random stream with `generate`
or with another film: its own is that of (seed, index).
F frames of a film, O objects, n samples of its audio. Places are in pixels, times in s unless a name says otherwise.
"""

import json
import multiprocessing
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import cv2
import numpy as np
from numpy.random import Generator
from tqdm import tqdm

from audio_io import SAMPLE_RATE, num_samples
from synthetic.generate import OBJECT_SIDE, begin_set, draw_background, finish_set
from synthetic.kinds import KINDS, LEVEL_DB, SNR_DB, difficulty, draw_object, make_noise, make_sound
from utils import atomic_path, write_text

FORMAT_VERSION = 1
FILMS = 40
SECONDS, FPS = 10, 20
FRAMES = SECONDS * FPS
SIDE = 256
TENTHS = 10  # turns begin and end at whole tenths of a second
TURNS, TURN_TENTHS = 4, (15, 18)
PAUSES, SHORTER_PAUSE = 2, (0.4, 0.6)  # share of the shorter one of what the turns leave
DRAWS = 256  # of places at once
EXIT_SECONDS = 0.8  # an object takes so long to leave
SWAY, SWAY_SECONDS = (0.04, 0.14), (4.0, 9.0)  # how far an object moves, as a part of the side, and its period
FADE_SECONDS = 0.02  # at the ends of a turn
OVERLAP_SECONDS = 0.1  # of a sound with its repetition
STREAM = 1_000  # beside the split numbers of `generate`
TRUTH = "truth.json"


class Task(NamedTuple):
    root: Path
    seed: int
    index: int

    @property
    def name(self) -> str:
        return f"video_{self.index:06d}"


class Turn(NamedTuple):
    """One object sounds from begin to end."""

    begin: float
    end: float
    object: int


class Plan(NamedTuple):
    kinds: list[str]
    turns: list[Turn]
    leaver: int  # the object that leaves ...
    leaves: float  # ... from this moment on


# ---------------------------------------------------------------- who sounds when, and where everybody is


def plan_film(task: Task, rng: Generator) -> Plan:
    """Kinds and turns of a film; of twenty films in a row every kind is in view in equally many.

    Two turns in a row are of different objects. The leaver leaves during the turn after its last one in view, so that
    it never sounds at the edge of the image.
    """
    names = list(KINDS)
    (block, of_block), count = divmod(task.index, 2 * len(names)), len(names)
    of_all = np.random.default_rng([task.seed, STREAM, block, 1])
    order, steps = of_all.permutation(count), of_all.permutation(count - 1) + 1
    seen = 2 + (of_block + of_block // count) % 2
    kinds = [names[order[(of_block + step) % count]] for step in (0, *steps[: seen - 1])]
    a, b, *others = rng.permutation(seen).tolist()
    if rng.random() < 0.5:  # the third turn is the one from outside
        sequence, leaver, outside = [a, b, a, others[0] if others else b], a, 2
    elif others:
        sequence = [a, b, others[0]]
        leaver, outside = sequence[rng.integers(2)], 3
        sequence.append(leaver)
    else:
        sequence, leaver, outside = [a, b, a, b], b, 3
    turns = time_turns(sequence, rng)
    last_seen = max(i for i, thing in enumerate(sequence[:outside]) if thing == leaver)
    return Plan(kinds, turns, leaver, round(turns[last_seen + 1].begin + 0.1, 1))


def time_turns(sequence: list[int], rng: Generator) -> list[Turn]:
    """Turns of these objects in a film, with two pauses: before, between or after them."""
    lengths = rng.integers(TURN_TENTHS[0], TURN_TENTHS[1] + 1, TURNS)
    rest = SECONDS * TENTHS - lengths.sum()
    shorter = round(rest * rng.uniform(*SHORTER_PAUSE))
    pauses = np.zeros(TURNS + 1, int)
    pauses[rng.choice(TURNS + 1, PAUSES, replace=False)] = shorter, rest - shorter
    begins = np.cumsum(pauses[:-1] + np.append(0, lengths[:-1]))
    spans = zip(begins.tolist(), (begins + lengths).tolist(), sequence)
    return [Turn(begin / TENTHS, end / TENTHS, thing) for begin, end, thing in spans]


def move_objects(plan: Plan, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Centres (F, O, 2) of the objects' squares, x and y, and their sides (O,): they never overlap.

    All sway about a place; the leaver goes out of the nearest edge.
    """
    count, time = len(plan.kinds), np.arange(FRAMES)[:, None, None] / FPS
    smallest, largest = (round(SIDE * part) for part in OBJECT_SIDE)
    while True:
        sides = rng.integers(smallest, largest + 1, (DRAWS, count))
        sways = SIDE * rng.uniform(*SWAY, (DRAWS, count, 2))
        room = SIDE - sides[..., None] - 2 * sways
        middles = sides[..., None] / 2 + sways + rng.random((DRAWS, count, 2)) * room
        hopeful = (room >= 0).all((1, 2)) & _apart(middles, sides - 2 * sways.max(2))  # the others always overlap
        for draw in np.flatnonzero(hopeful):
            phase = 2 * np.pi * (time / rng.uniform(*SWAY_SECONDS, (count, 2)) + rng.random((count, 2)))
            centres = middles[draw] + sways[draw] * np.sin(phase)
            _leave(centres[:, plan.leaver], sides[draw, plan.leaver], round(plan.leaves * FPS))
            if _apart(centres, sides[draw]).all():
                return centres, sides[draw]


def _apart(centres: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Whether squares do not overlap: centres (..., O, 2), sides (..., O) -> (...) bool."""
    apart = [
        np.abs(centres[..., i, :] - centres[..., j, :]).max(-1) > (sides[..., i] + sides[..., j]) / 2
        for i in range(sides.shape[-1])
        for j in range(i)
    ]
    return np.all(apart, axis=0)


def _leave(centre: np.ndarray, side: int, first: int) -> None:
    """Move a path (F, 2), in place, out of the nearest edge from a frame on."""
    start = centre[first].copy()
    axis = int(np.abs(start - SIDE / 2).argmax())
    target = start.copy()
    target[axis] = -side if start[axis] < SIDE / 2 else SIDE + side
    progress = np.clip((np.arange(FRAMES - first) / FPS / EXIT_SECONDS), 0, 1)[:, None]
    centre[first:] = start + (target - start) * progress**2


# ---------------------------------------------------------------- frames and audio


def draw_film(
    plan: Plan, centres: np.ndarray, sides: np.ndarray, rng: Generator
) -> tuple[Iterable[np.ndarray], list[list[list[float] | None]]]:
    """The frames, RGB uint8 (SIDE, SIDE, 3) each, and the boxes of every object in every frame.

    A box [xmin, ymin, xmax, ymax], 0..1, is tight around what is inside the image; None where nothing is.
    """
    light = rng.uniform(0.85, 1.1) * rng.uniform(0.95, 1.05, 3)
    background = cv2.resize(draw_background(rng), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) * light
    background, grain = background.astype(np.float32), rng.normal(0, 3, background.shape).astype(np.float32)
    cutouts = [draw_object(kind, int(side), rng) for kind, side in zip(plan.kinds, sides)]
    cutouts = [((rgb * light).astype(np.float32), opacity.astype(np.float32)) for rgb, opacity in cutouts]
    corners = centres - np.array([opacity.shape[::-1] for _, opacity in cutouts]) / 2  # (F, O, 2)
    boxes = [
        [_visible(corner, opacity.shape) for corner in of_object]
        for of_object, (_, opacity) in zip(corners.swapaxes(0, 1).tolist(), cutouts)
    ]

    def frames() -> Iterable[np.ndarray]:
        for of_frame in corners.tolist():
            image = background.copy()
            for corner, cutout in zip(of_frame, cutouts):
                _paste(image, corner, *cutout)
            yield np.clip(np.round(image + grain), 0, 255).astype(np.uint8)

    return frames(), boxes


def _paste(image: np.ndarray, corner: list[float], rgb: np.ndarray, opacity: np.ndarray) -> None:
    """Draw an object (h, w) in place, with its upper left corner between pixels where it falls there."""
    (left, top), (height, width) = np.floor(corner).astype(int).tolist(), opacity.shape
    window = np.s_[max(top, 0) : max(top + height + 1, 0), max(left, 0) : max(left + width + 1, 0)]
    rows, columns = image[window].shape[:2]
    if not rows or not columns:
        return
    shift = np.array([[1, 0, corner[0] - max(left, 0)], [0, 1, corner[1] - max(top, 0)]])
    cover = cv2.warpAffine(opacity, shift, (columns, rows))[..., None]
    moved = cv2.warpAffine(rgb, shift, (columns, rows), borderMode=cv2.BORDER_REPLICATE)
    image[window] += cover * (moved - image[window])


def _visible(corner: list[float], shape: tuple[int, int]) -> list[float] | None:
    """The box of an object of this shape (h, w) at its upper left corner, as far as it is inside the image."""
    begin = np.clip(np.array(corner) / SIDE, 0, 1)
    end = np.clip((np.array(corner) + shape[::-1]) / SIDE, 0, 1)
    return [round(v, 4) for v in (*begin.tolist(), *end.tolist())] if (end > begin).all() else None


def make_audio(plan: Plan, silent_pauses: bool, rng: Generator) -> np.ndarray:
    """What is heard in a film, within -1..1: (n,). Every object has one sound and one level of noise beneath it."""
    length, fade = num_samples(SECONDS), num_samples(FADE_SECONDS)
    level = 10 ** (rng.uniform(*LEVEL_DB) / 20)
    noise = level * 10 ** (-rng.uniform(*SNR_DB) / 20) * repeat(make_noise(rng), length)
    sounds = [make_sound(kind, rng)[0] for kind in plan.kinds]
    heard, open_noise = np.zeros(length), np.zeros(length)
    for begin, end, thing in plan.turns:
        span = slice(num_samples(begin), num_samples(end))
        count = span.stop - span.start
        gain = np.minimum(1, np.minimum(np.arange(1, count + 1), np.arange(count, 0, -1)) / fade)
        sound = repeat(sounds[thing], count)
        heard[span] += gain * sound * level / np.sqrt(np.mean(sounds[thing] ** 2))
        open_noise[span] = gain
    return np.clip(heard + (noise * open_noise if silent_pauses else noise), -1, 1)


def repeat(sound: np.ndarray, length: int) -> np.ndarray:
    """A sound (m,) again and again, faded into its repetition, until it is `length` samples long."""
    overlap = num_samples(OVERLAP_SECONDS)
    ramp = np.sin(np.linspace(0, np.pi / 2, overlap))  # of constant power
    window = np.concatenate([ramp, np.ones(len(sound) - 2 * overlap), ramp[::-1]])
    hop, out = len(sound) - overlap, np.zeros(length + 2 * len(sound))
    for start in range(0, length + overlap, hop):
        out[start : start + len(sound)] += window * sound
    return out[overlap : overlap + length]


def write_mp4(path: Path, frames: Iterable[np.ndarray], waveform: np.ndarray) -> None:
    """An MP4 that every browser plays: H.264 and AAC."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as film:
        video = film.add_stream("libx264", rate=FPS, options={"crf": "18", "preset": "veryfast"})
        video.width = video.height = SIDE
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1  # the same bytes on every machine with the same encoder
        audio = film.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        audio.bit_rate = 96_000
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            film.mux(video.encode(frame))
        film.mux(video.encode())
        sound = av.AudioFrame.from_ndarray(waveform.astype(np.float32)[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
        film.mux(audio.encode(sound))
        film.mux(audio.encode())


# ---------------------------------------------------------------- the set on disk


def write_film(task: Task) -> dict[str, Any]:
    """Write clips/<name>.mp4 -> the truth of its frames."""
    rng = np.random.default_rng([task.seed, STREAM, task.index])
    plan = plan_film(task, rng)
    frames, boxes = draw_film(plan, *move_objects(plan, rng), rng)
    silent_pauses = task.index % 4 < 2
    with atomic_path(task.root / "clips" / f"{task.name}.mp4") as temporary:
        write_mp4(temporary, frames, make_audio(plan, silent_pauses, rng))
    return {
        "id": task.name,
        "objects": [{"kind": kind, "boxes": of_object} for kind, of_object in zip(plan.kinds, boxes)],
        "turns": [turn._asdict() for turn in plan.turns],
        "silent_pauses": silent_pauses,
    }


def generate_films(
    root: str | Path, seed: int = 0, films: int = FILMS, processes: int = 2, force: bool = False
) -> bool:
    """Write the films below root, and truth.json. False if this very set was there already."""
    root = Path(root)
    chosen = {"version": FORMAT_VERSION, "seed": seed, "films": films}
    settings = json.dumps({**chosen, **difficulty()}, indent=1) + "\n"
    if not begin_set(root, settings, force, ["clips/video_*.mp4", TRUTH]):
        return False
    (root / "clips").mkdir(exist_ok=True)
    cv2.setNumThreads(1)  # before the fork: a child would wait forever for the threads of its parent's OpenCV
    with multiprocessing.Pool(processes) as pool:
        written = pool.imap(write_film, [Task(root, seed, index) for index in range(films)])
        truth = list(tqdm(written, total=films, unit="film", mininterval=1))
    write_text(root / TRUTH, json.dumps({"seconds": SECONDS, "fps": FPS, "films": truth}))
    finish_set(root, settings)
    return True
