"""A small synthetic set of sounding objects in the VGG-Sound layout, made from a seed in under a minute.

    python prepare_data.py synthetic                        write the set into data/synthetic
    python prepare_data.py synthetic --probe                how far one gets on it without learning anything
    python prepare_data.py synthetic --preview sheet.png    contact sheet: images and a sound of each kind
    python prepare_data.py synthetic --out data/synthetic_3 --train_objects 3    training images show silent objects

Ten kinds of objects, each with a look (shape, texture, range of colours) and a sound, both varied within the kind.
Splits: train, val, test (one object in view), distractor (the sounding object among one or two silent ones of other
kinds), interactive (two objects, and one entry for the sound of each) and offscreen (one to three objects; half of the
pairs hear one of them, the others a kind that is not in view, digital silence or noise). Each sample comes from its own
random stream, (seed, split, index): nothing is shared between splits, and the number of processes changes nothing.
"""

import json
import multiprocessing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from tqdm import tqdm

from audio_io import write_audio
from synthetic.kinds import (
    BACKGROUND_CONTRAST,
    CLUTTER_CONTRAST,
    CLUTTER_COUNT,
    KINDS,
    LEVEL_DB,
    SAMPLES,
    difficulty,
    draw_object,
    make_noise,
    make_sound,
)
from utils import UserError, write_text

FORMAT_VERSION = 1
SIDE = 128  # pixels
OBJECT_SIDE = (0.25, 0.5)  # longer side of an object's box, as a part of the image's side
JPEG_QUALITY = 92
COUNTS = {"train": 4000, "val": 256, "test": 400, "distractor": 400, "interactive": 200, "offscreen": 360}  # images
SPLITS = tuple(COUNTS)  # a split's place seeds its random streams: a new one goes to the end
SILENCE, NOISE = "silence", "noise"  # what is heard besides the kinds, in offscreen alone
MOST_OBJECTS = 3  # in an image
MARKER = "synthetic.json"  # what a complete set was made with
UNFINISHED = "unfinished"  # a file that stands in a root while it is written: an interrupted set is made anew


# ---------------------------------------------------------------- images


def draw_background(rng: Generator) -> np.ndarray:
    """A cluttered background of muted colours, RGB (SIDE, SIDE, 3) in about 0..255."""
    texture = np.zeros((SIDE, SIDE, 3))
    for cells in (3, 6, 12, 24, 48):
        noise = rng.normal(size=(cells, cells, 1)) + 0.35 * rng.normal(size=(cells, cells, 3))
        texture += cells ** -rng.uniform(0.2, 0.8) * cv2.resize(noise, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    unevenness = np.exp(0.5 * cv2.resize(rng.normal(size=(5, 5, 1)), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC))
    texture = unevenness[..., None] * (texture - texture.mean()) / texture.std()
    image = rng.uniform(80, 170) + rng.normal(0, 12, 3) + BACKGROUND_CONTRAST * texture / texture.std()
    image = np.clip(image, 0, 255).astype(np.uint8)
    for _ in range(rng.integers(CLUTTER_COUNT[0], CLUTTER_COUNT[1] + 1)):
        colour = image[tuple(rng.integers(0, SIDE, 2))] + CLUTTER_CONTRAST * (rng.normal() + 0.5 * rng.normal(size=3))
        place = rng.integers(0, SIDE, 2)
        if rng.random() < 0.5:
            end = place + rng.integers(-SIDE // 2, SIDE // 2, 2)
            cv2.line(image, place.tolist(), end.tolist(), colour.tolist(), int(rng.integers(1, 4)), cv2.LINE_AA)
        else:
            patch = place + rng.integers(-9, 10, (rng.integers(3, 7), 2))
            cv2.fillConvexPoly(image, cv2.convexHull(patch.astype(np.int32)), colour.tolist(), cv2.LINE_AA)
    return image.astype(float)


def place_squares(count: int, rng: Generator) -> np.ndarray:
    """Squares inside the image that do not overlap: (count, 3) whole numbers x, y, side in pixels, all alike."""
    smallest, largest = (round(SIDE * part) for part in OBJECT_SIDE)
    while True:
        sides = rng.integers(smallest, largest + 1, count)
        corners = (rng.random((count, 2)) * (SIDE + 1 - sides[:, None])).astype(int)
        apart = [
            (np.maximum(corners[i], corners[j]) >= np.minimum(corners[i] + sides[i], corners[j] + sides[j])).any()
            for i in range(count)
            for j in range(i)
        ]
        if all(apart):
            return np.column_stack([corners, sides])


def make_image(kinds: list[str], rng: Generator) -> tuple[np.ndarray, list[list[float]]]:
    """An image of an object of each kind: RGB uint8 (SIDE, SIDE, 3); a tight box [xmin, ymin, xmax, ymax], 0..1, each.

    The longer side of a box is 25 to 50 % of the image's; the other is as short as the shape makes it. Each object is
    centred in a square drawn before its kind is known, so that place and size tell nothing about the kind.
    """
    squares, image, boxes = place_squares(len(kinds), rng), draw_background(rng), []
    for kind, (left, top, side) in zip(kinds, squares.tolist()):
        rgb, opacity = draw_object(kind, side, rng)
        height, width = opacity.shape
        left, top = left + (side - width) // 2, top + (side - height) // 2
        window = image[top : top + height, left : left + width]
        window += opacity[..., None] * (rgb - window)
        boxes.append([left / SIDE, top / SIDE, (left + width) / SIDE, (top + height) / SIDE])
    light = rng.uniform(0.85, 1.1) * rng.uniform(0.95, 1.05, 3)
    image = image * light + rng.normal(0, 3, image.shape)
    return np.clip(np.round(image), 0, 255).astype(np.uint8), boxes


# ---------------------------------------------------------------- the set on disk


class Task(NamedTuple):
    """One sample to write."""

    root: Path
    seed: int
    split: str
    index: int
    train_objects: int = 1  # most objects in an image of train and val


class Entry(NamedTuple):
    """One image with its audio; objects in view: {"kind", "bbox", "sounding"} each."""

    name: str
    heard: str  # a kind, SILENCE or NOISE
    in_view: list[dict]


def plan_scene(task: Task) -> tuple[list[str], list[str]]:
    """Kinds in view in an image, and what is heard with it, in an entry each: interactive hears both kinds in view.

    Each block of as many images as there are kinds lets every kind sound once, and stay silent equally often.
    """
    names, (block, place) = list(KINDS), divmod(task.index, len(KINDS))
    if task.split == "offscreen":
        return plan_offscreen(task.seed, task.index)
    rng = np.random.default_rng([task.seed, SPLITS.index(task.split), block, 1])  # differs from a sample's stream
    order, steps = rng.permutation(len(names)), rng.permutation(len(names) - 1) + 1
    extra = block % task.train_objects
    silent = {"train": extra, "val": extra, "distractor": 1 + block % 2, "interactive": 1}.get(task.split, 0)
    in_view = [names[order[(place + step) % len(names)]] for step in (0, *steps[:silent])]
    return in_view, in_view if task.split == "interactive" else in_view[:1]


def plan_offscreen(seed: int, index: int) -> tuple[list[str], list[str]]:
    """As plan_scene: two images in a row show the same kinds; the first hears one of them, the second none.

    Within a round of three blocks of two images per kind every kind is heard in view thrice, and its second image
    hears another kind, silence and noise once each. Three rounds give each of these equally many images of one, two
    and three objects.
    """
    names, (pair, second) = list(KINDS), divmod(index, 2)
    block, place = divmod(pair, len(names))
    turns, turn = divmod(block, 3)
    rng = np.random.default_rng([seed, SPLITS.index("offscreen"), turns, 1])
    order, steps = rng.permutation(len(names)), rng.permutation(len(names) - 1) + 1
    *kinds, absent = (names[order[(place + step) % len(names)]] for step in (0, *steps[:MOST_OBJECTS]))
    heard = (absent, SILENCE, NOISE)[(place + turn) % 3] if second else kinds[0]
    return kinds[: 1 + (turn + turns) % MOST_OBJECTS], [heard]


def make_waveform(heard: str, rng: Generator) -> np.ndarray:
    """What is heard, within -1..1: (SAMPLES,). Silence is zero throughout, noise is as loud as the sounds of kinds."""
    if heard == SILENCE:
        return np.zeros(SAMPLES)
    if heard == NOISE:
        return 10 ** (rng.uniform(*LEVEL_DB) / 20) * make_noise(rng)
    return sum(make_sound(heard, rng))


def write_sample(task: Task) -> list[Entry]:
    """Write one sample: image and audio."""
    rng = np.random.default_rng([task.seed, SPLITS.index(task.split), task.index])
    kinds, sounds = plan_scene(task)
    image, boxes = make_image(kinds, rng)
    entries = []
    for heard in sounds:
        name = f"{task.split}_{task.index:06d}" + (f"_{heard}" if task.split == "interactive" else "")
        jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
        (task.root / "frames" / f"{name}.jpg").write_bytes(jpeg.tobytes())
        path = task.root / "audio" / f"{name}.wav"
        write_audio(path, make_waveform(heard, rng))
        in_view = [{"kind": kind, "bbox": box, "sounding": kind == heard} for kind, box in zip(kinds, boxes)]
        entries.append(Entry(name, heard, in_view))
    return entries


def begin_set(root: Path, settings: str, force: bool, own: Sequence[str]) -> bool:
    """Make room for a set in a root -> False if this very one is there already, complete.

    Another set of ours is removed with force, or where it was interrupted, as far as the patterns `own` name its files;
    else UserError, and for a folder that holds anything else.
    """
    marker = root / MARKER
    if marker.is_file() and (b'"films"' in marker.read_bytes()) != ('"films"' in settings):
        raise UserError(f"{root} holds pairs where films were to go, or films where pairs were: name another --out")
    force = force or (root / UNFINISHED).exists()
    if marker.is_file() and not force:
        if marker.read_bytes() == settings.encode():
            return False
        raise UserError(f"{root} holds a synthetic set with other settings: name another --out, or --force")
    if root.exists() and any(root.iterdir()):
        if not force:
            raise UserError(f"{root} is not empty and holds no complete set: name another --out, or --force")
        marker.unlink(missing_ok=True)
        for pattern in own:  # only what this program wrote
            for path in root.glob(pattern):
                path.unlink()
    root.mkdir(parents=True, exist_ok=True)
    (root / UNFINISHED).touch()
    return True


def finish_set(root: Path, settings: str) -> None:
    write_text(root / MARKER, settings)
    (root / UNFINISHED).unlink()  # last: the set is complete


def generate(
    root: str | Path,
    seed: int = 0,
    counts: Mapping[str, int] | None = None,
    processes: int = 2,
    force: bool = False,
    train_objects: int = 1,
) -> bool:
    """Write a set below root; counts: images per split (COUNTS for those left out). False if it was there already.

    train_objects: images of train and val hold one to so many objects, all but one silent.
    """
    root, counts = Path(root), {**COUNTS, **(counts or {})}
    if set(counts) != set(COUNTS) or min(counts.values()) < 1:
        raise ValueError(f"counts {counts}: each of {', '.join(COUNTS)}, and nothing else, needs at least 1")
    chosen = {"version": FORMAT_VERSION, "seed": seed, "counts": counts, "train_objects": train_objects}
    settings = json.dumps({**chosen, **difficulty()}, indent=1) + "\n"
    own = [pattern for split in SPLITS for pattern in (f"frames/{split}_*.jpg", f"audio/{split}_*.wav")]
    if not begin_set(root, settings, force, own):
        return False
    for folder in ("frames", "audio"):
        (root / folder).mkdir(exist_ok=True)
    tasks = [Task(root, seed, split, index, train_objects) for split in SPLITS for index in range(counts[split])]
    entries: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    cv2.setNumThreads(1)  # before the fork: a child would wait forever for the threads of its parent's OpenCV
    with multiprocessing.Pool(processes) as pool:
        written = tqdm(pool.imap(write_sample, tasks, chunksize=16), total=len(tasks), unit="image", mininterval=1)
        for task, sample in zip(tasks, written):
            entries[task.split] += sample
    write_lists(root, entries)
    finish_set(root, settings)
    return True


def write_lists(root: Path, entries: Mapping[str, Sequence[Entry]]) -> None:
    """Write the ids and the annotation of each split, and what is in view in every image.

    An entry's class is what is heard, its boxes are those of the sounding object: none where no source is in view.
    """
    for split, of_split in entries.items():
        write_text(root / f"{split}.txt", "".join(f"{entry.name}\n" for entry in of_split))
        annotations = [
            {"file": name, "class": heard, "bbox": [thing["bbox"] for thing in in_view if thing["sounding"]]}
            for name, heard, in_view in of_split
        ]
        write_text(root / f"{split}.json", json.dumps(annotations))
    objects = {entry.name: entry.in_view for of_split in entries.values() for entry in of_split}
    write_text(root / "objects.json", json.dumps(objects))
