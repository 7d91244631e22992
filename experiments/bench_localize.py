"""localize.py on a film of 640 x 360 at 25 frames per second: how many times as fast as real time, and what takes it.

The models are untrained: their weights change no time. Drawing and encoding run on a thread beside decoding and model,
so the shares are of the time of all parts together.
"""

import inspect
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import film.render as render
import media
from experiments.timing import Timing, add_rounds
from film.localizer import Localizer
from film.render import Look, Outputs, render_clip
from film.strip import Strip
from film.writer import FilmWriter
from model_slot import JointSlotModel
from models import Trained
from recipes import RECIPES
from utils import number

WIDTH, HEIGHT, FPS = 640, 360, 25
MODELS = {"small": "small", "full-size": "paper"}  # name: recipe


def add_flags(parser) -> None:
    add_rounds(parser, default=1)
    parser.add_argument("--seconds", type=number(float, low=1), default=20.0, help="length of the film")
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS], help="which models to time")


def run(args) -> Iterator[Timing]:
    with tempfile.TemporaryDirectory() as folder:
        film = Path(folder, "film.mp4")
        write_film(film, args.seconds)
        for name in args.models:
            yield from time_model(name, film, args.seconds, Path(folder), args.rounds)


def time_model(
    name: str, film: Path, seconds: float, folder: Path, rounds: int, device: str = "cpu"
) -> Iterator[Timing]:
    localizer = Localizer(untrained(MODELS[name]), device)
    list(zip(range(1), localizer.clip(film)))  # what happens only once, such as choosing convolutions
    spent: dict[str, float] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    with counted(spent):
        for _ in range(rounds):
            render_clip(localizer, film, None, Outputs(folder / name), Look(), {}, hide_bar=None)
    wall, cpu, seconds = time.perf_counter() - wall, time.process_time() - cpu, rounds * seconds
    title = f"localize: {name} model, {WIDTH} x {HEIGHT}, {FPS} fps"
    yield Timing(f"{title}, per second of film (baseline: real time)", wall / seconds, 1.0, "s")
    yield Timing(f"{title}, processor time per second of film", cpu / seconds, None, "s")
    for part, took in spent.items():
        yield Timing(f"localize: {name} model, share of {part}", 100 * took / sum(spent.values()), None, "%")


def untrained(recipe: str) -> Trained:
    torch.manual_seed(0)
    settings = RECIPES[recipe]
    known = [name for name in inspect.signature(JointSlotModel).parameters if name in settings]
    model = JointSlotModel(**{name: settings[name] for name in known})
    inference = {name: settings[name] for name in ("infer_sharpening", "infer_smoothing")}
    return Trained(model.eval(), {}, inference)


def write_film(path: Path, seconds: float) -> None:
    """A texture that moves, with some grain, and a chord: neither trivial to encode nor noise."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (HEIGHT // 8, WIDTH // 4, 3), dtype=np.uint8)
    texture = np.kron(coarse, np.ones((8, 8, 1), np.uint8))  # (HEIGHT, 2 WIDTH, 3)
    grain = rng.integers(0, 12, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    writer = FilmWriter(path, (WIDTH, HEIGHT), FPS, 1)
    for index in range(round(seconds * FPS)):
        left = 3 * index % WIDTH
        writer.frame(index / FPS, texture[:, left : left + WIDTH] // 2 + np.roll(grain, 37 * index, 1))
    moments = np.arange(round(seconds * 16000)) / 16000
    chord = sum(np.sin(2 * np.pi * pitch * moments) for pitch in (262, 330, 392)) / 6
    for start in range(0, len(chord), 16000):
        writer.sound(chord[start : start + 16000, None].astype(np.float32), 16000)
    writer.close(seconds)


def counted(spent: dict[str, float]) -> ExitStack:
    """A block in which the seconds of every part are added up in `spent`."""
    stack = ExitStack()
    parts = {
        "decoding": [(media.Streams, "frames"), (media.Streams, "sounds"), (media.Streams, "track")],
        "model": [(Localizer, "_ask")],
        "drawing": [(render, "paint"), (render, "heat_tokens"), (Strip, "see"), (Strip, "hear"), (Strip, "draw")],
        "encoding": [(FilmWriter, "frame"), (FilmWriter, "sound"), (FilmWriter, "close")],
    }
    for part, functions in parts.items():
        spent[part] = 0.0
        for owner, name in functions:
            iterates = part == "decoding"
            stack.enter_context(patch.object(owner, name, clocked(getattr(owner, name), spent, part, iterates)))
    return stack


def clocked(work: Callable, spent: dict[str, float], part: str, iterates: bool) -> Callable:
    @wraps(work)
    def timed(*arguments, **named):
        start = time.perf_counter()
        try:
            return work(*arguments, **named)
        finally:
            spent[part] += time.perf_counter() - start

    @wraps(work)
    def timed_items(*arguments, **named):
        items, end = work(*arguments, **named), object()
        while True:
            start = time.perf_counter()
            item = next(items, end)
            spent[part] += time.perf_counter() - start
            if item is end:
                return
            yield item

    return timed_items if iterates else timed
