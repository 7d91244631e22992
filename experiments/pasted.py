"""Scenes of cut-outs on photographs, each cut-out with its sound, in the layout of the built-in data.

A kind has cut-outs (images with alpha) and sounds. Splits as those of synthetic/generate.py: train and val (one to
three objects, one of which sounds), test (one object), distractor (the sounding object among one or two silent ones),
interactive (two objects, an entry for the sound of each), offscreen (half of the pairs hear nothing that is in view);
and unseen and unseen_distractor, of cut-outs and sounds that no other split shows, from kinds that have several. Train,
val and the tests have photographs of their own. Each sample comes from its own random stream, (seed, split, index).
"""

import csv
import hashlib
import json
import multiprocessing
import struct
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from PIL import Image, ImageOps
from tqdm import tqdm

from annotations import AUDIO_SUFFIXES, IMAGE_SUFFIXES, check_id
from audio_io import SAMPLE_RATE, load_audio, write_audio
from synthetic.generate import NOISE, SILENCE, Entry, write_lists
from transforms import load_image
from utils import UserError, as_user_error, write_text, writing

FORMAT_VERSION = 1
SIDE = 448  # pixels
OBJECT_SIDE = (0.28, 0.55)  # longer side of an object's box, as a part of the image's side
AUDIO_SECONDS = 2.0
SPEED, LEVEL_DB = (0.95, 1.05), (-9.0, 0.0)  # of a sound, drawn anew each time
SHORTEST = 0.01  # seconds of a recording
LOUD = 0.3  # an excerpt has at least this share of the whole recording's RMS
JPEG_QUALITY = 92
HELD_OUT = 4  # of so many cut-outs (or sounds) of a kind, one is for `unseen`; of fewer than two, none
COUNTS = {
    "train": 3010, "val": 200, "test": 300, "distractor": 300, "interactive": 150, "offscreen": 300,
    "unseen": 200, "unseen_distractor": 200,
}  # fmt: skip
SPLITS = tuple(COUNTS)  # a split's place seeds its random streams: a new one goes to the end
PHOTO_SHARES = {"train": 0.55, "val": 0.18, "tests": 0.27}
UNFINISHED = "unfinished"  # as in synthetic/generate.py
SETTINGS = "photographs.json"
UNREADABLE = OSError, ValueError, SyntaxError, TypeError, struct.error, Image.DecompressionBombError


class Kind(NamedTuple):
    name: str
    cutouts: tuple[str, ...]
    sounds: tuple[str, ...]

    def of(self, unseen: bool) -> "Kind":
        """What the split may show: the cut-outs and sounds held out for `unseen`, or the others."""
        return Kind(self.name, _part(self.cutouts, unseen), _part(self.sounds, unseen, at_least=HELD_OUT))


def _part(files: tuple[str, ...], unseen: bool, at_least: int = 2) -> tuple[str, ...]:
    """The last quarter, at least one, or the others; all of them where there are fewer than at_least."""
    if len(files) < at_least:
        return files
    first = len(files) - max(1, len(files) // HELD_OUT)
    return files[first:] if unseen else files[:first]


class Material(NamedTuple):
    """What scenes are made of."""

    kinds: tuple[Kind, ...]
    photos: dict[str, tuple[str, ...]]  # of train, val and tests

    def kinds_of(self, split: str) -> list[Kind]:
        if not split.startswith("unseen"):
            return [kind.of(unseen=False) for kind in self.kinds]
        return [kind.of(unseen=True) for kind in self.kinds if len(kind.cutouts) > 1]

    def digest(self) -> str:
        """Of the contents of all files."""
        files = [file for kind in self.kinds for file in (*kind.cutouts, *kind.sounds)]
        files += [file for photos in self.photos.values() for file in photos]
        return hashlib.sha256("".join(map(contents, files)).encode()).hexdigest()


# ---------------------------------------------------------------- what there is


def read_kinds(path: Path) -> tuple[Kind, ...]:
    """Kinds from a folder with a folder of images and sounds for each, or from a CSV file with the columns kind, image,
    sound, where paths are relative to the column root, if there is one, or to the file.

    Copies of a kind's files count once, so that no cut-out is seen in training and held out, too. UserError for files
    that are not there or are of two kinds, a kind without image or sound, and fewer than three kinds.
    """
    found = _kinds_in_folder(path) if path.is_dir() else _kinds_in_list(path)
    if reserved := {SILENCE, NOISE} & found.keys():
        raise UserError(f"{path}: no kind may be called {' or '.join(sorted(reserved))}: off-screen sounds are")
    missing = [file for images, sounds in found.values() for file in (*images, *sounds) if not Path(file).is_file()]
    if missing:
        raise UserError(f"{path}: {len(missing)} of its files are not there, the first is {missing[0]}")
    bare = [name for name, (images, sounds) in found.items() if not (images and sounds)]
    if bare or len(found) < 3:
        raise UserError(
            f"{path}: three kinds or more, each with an image and a sound; without one: {', '.join(bare) or '-'}"
        )
    kinds, kind_of = [], {}
    for name, files in found.items():
        own = {contents(file): file for of_sort in files for file in reversed(of_sort)}  # of copies, the first
        for digest, file in own.items():
            other, there = kind_of.setdefault(digest, (name, file))
            if other != name:
                raise UserError(f"{path}: {there} and {file} are one file of two kinds, {other} and {name}")
        images, sounds = (tuple(file for file in of_sort if own[contents(file)] == file) for of_sort in files)
        kinds.append(Kind(name, images, sounds))
    return tuple(kinds)


def _kinds_in_folder(path: Path) -> dict[str, tuple[list[str], list[str]]]:
    """{kind: (images, sounds)}; hidden files and folders, as systems leave them, are none."""
    found = {}
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
        files = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
        images, sounds = ([str(p) for p in files if p.suffix.lower() in s] for s in (IMAGE_SUFFIXES, AUDIO_SUFFIXES))
        found[check_id(folder.name, path)] = images, sounds
    return found


def _kinds_in_list(path: Path) -> dict[str, tuple[list[str], list[str]]]:
    found: dict[str, tuple[list[str], list[str]]] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if lacking := [name for name in ("kind", "image", "sound") if name not in (rows.fieldnames or ())]:
                raise UserError(f"{path}: its first line must name the columns kind, image and sound: no {lacking[0]}")
            for row in rows:
                images, sounds = found.setdefault(check_id(row["kind"] or "", path), ([], []))
                root = Path(row.get("root") or path.parent)
                for column, files in (("image", images), ("sound", sounds)):
                    if row[column] and str(root / row[column]) not in files:
                        files.append(str(root / row[column]))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no list of kinds, a CSV file in UTF-8: {error}") from error
    return found


@cache
def contents(path: str) -> str:
    """A digest of a file's contents."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def split_photos(paths: Sequence[Path], seed: int) -> dict[str, tuple[str, ...]]:
    """Files, or all images in folders, divided by seed; copies count once. UserError for fewer than three."""
    files = []
    for path in paths:
        if not path.exists():
            raise UserError(f"there is no photograph or folder of photographs {path}")
        files += [path] if path.is_file() else [p for p in path.rglob("*") if _is_photo(p)]
    files = sorted({str(p) for p in files}, key=lambda name: (Path(name).name, name))
    first = {contents(file): file for file in reversed(files)}  # a copy may not be in training and in tests
    if copies := [file for file in files if first[contents(file)] != file]:
        print(f"{len(copies)} photographs are copies of others and left out, the first is {copies[0]}")
        files = [file for file in files if first[contents(file)] == file]
    if len(files) < 3:
        raise UserError(f"{len(files)} photographs: train, val and tests need one each at least")
    order = [files[i] for i in np.random.default_rng([seed, len(files)]).permutation(len(files))]
    val, tests = (max(1, round(PHOTO_SHARES[part] * len(files))) for part in ("val", "tests"))
    return {
        "tests": tuple(order[:tests]),
        "val": tuple(order[tests : tests + val]),
        "train": tuple(order[tests + val :]),
    }


def _is_photo(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


# ---------------------------------------------------------------- a scene


@cache
def _cutout(path: str) -> np.ndarray:
    """(H, W, 4) float32 in 0..255, cropped to what is seen, colours times opacity, as a viewer shows it.

    UserError for one without alpha, and for what cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            if not image.has_transparency_data:
                raise UserError(f"{path} has no alpha channel: a cut-out is transparent where the object is not")
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGBA"), np.float32)
    except UNREADABLE as error:
        raise UserError(f"cannot decode the cut-out {path}: {error}") from error
    opaque = pixels[..., 3] > 127
    if not opaque.any():
        raise UserError(f"{path} shows nothing: it is transparent throughout")
    rows, columns = (np.flatnonzero(opaque.any(axis)) for axis in (1, 0))
    pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    pixels[..., :3] *= pixels[..., 3:] / 255
    return pixels


@cache
def _photo(path: str) -> np.ndarray:
    """(H, W, 3) uint8, its shorter side at most three times the scene's."""
    with as_user_error(ValueError):
        image = load_image(path, 3 * SIDE)
    if (scale := 3 * SIDE / min(image.size)) < 1:
        image = image.resize([round(scale * length) for length in image.size], Image.Resampling.LANCZOS)
    return np.array(image)


@cache
def _sound(path: str) -> np.ndarray:
    """(n,) at 16 kHz with an RMS of 0.1 over what is not silent. UserError for silence, and for hardly anything."""
    with as_user_error(ValueError):
        wave = load_audio(path)
    loud = wave[np.abs(wave) > 0.02 * np.abs(wave).max()] if len(wave) else wave
    if not loud.size or not np.abs(loud).max():
        raise UserError(f"{path} is silent")
    if len(wave) < SHORTEST * SAMPLE_RATE:
        raise UserError(f"{path} lasts {1000 * len(wave) / SAMPLE_RATE:.1f} ms: nothing can be heard in it")
    return wave * (0.1 / np.sqrt(np.mean(loud.astype(float) ** 2)))


def draw_background(photos: Sequence[str], rng: Generator) -> np.ndarray:
    """A square part of a photograph, perhaps mirrored: (SIDE, SIDE, 3) float."""
    photo = _photo(photos[rng.integers(len(photos))])
    height, width = photo.shape[:2]
    side = max(1, int(rng.uniform(0.5, 1) * min(height, width)))
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    part = cv2.resize(photo[top : top + side, left : left + side], (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return part[:, :: 1 if rng.random() < 0.5 else -1].astype(float)


def draw_cutout(kind: Kind, rng: Generator) -> np.ndarray:
    """One of a kind's cut-outs at a size of its own, perhaps mirrored: (h, w, 4), colours times opacity."""
    pixels = _cutout(kind.cutouts[rng.integers(len(kind.cutouts))])
    scale = rng.uniform(*OBJECT_SIDE) * SIDE / max(pixels.shape[:2])
    size = [max(4, round(scale * length)) for length in (pixels.shape[1], pixels.shape[0])]
    pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC).clip(0, 255)
    return pixels[:, :: 1 if rng.random() < 0.5 else -1]


def place(sizes: Sequence[tuple[int, int]], rng: Generator) -> list[tuple[int, int]] | None:
    """Places (top, left) of rectangles (h, w) inside the scene that do not overlap; None where a hundred draws fail."""
    for _ in range(100):
        places = [(int(rng.integers(SIDE - h + 1)), int(rng.integers(SIDE - w + 1))) for h, w in sizes]
        boxes = [(top, left, top + h, left + w) for (top, left), (h, w) in zip(places, sizes, strict=True)]
        if not any(_overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i]):
            return places
    return None


def _overlap(a: Sequence[int], b: Sequence[int]) -> bool:
    return all(max(a[i], b[i]) < min(a[i + 2], b[i + 2]) for i in (0, 1))


def make_image(kinds: Sequence[Kind], photos: Sequence[str], rng: Generator) -> tuple[np.ndarray, list[list[float]]]:
    """RGB uint8 (SIDE, SIDE, 3) of an object of each kind, and its box [xmin, ymin, xmax, ymax] in 0..1: the smallest
    around what is at least half opaque; of thin lines, which are nowhere so when reduced, half as opaque as anything.
    """
    places = None
    while places is None:
        cutouts = [draw_cutout(kind, rng) for kind in kinds]
        places = place([pixels.shape[:2] for pixels in cutouts], rng)
    image, boxes = draw_background(photos, rng), []
    for pixels, (top, left) in zip(cutouts, places, strict=True):
        height, width = pixels.shape[:2]
        window = image[top : top + height, left : left + width]
        window *= 1 - pixels[..., 3:] / 255
        window += pixels[..., :3]
        opaque = pixels[..., 3] >= 127.5
        if not opaque.any():
            opaque = pixels[..., 3] >= pixels[..., 3].max() / 2
        rows, columns = (np.flatnonzero(opaque.any(axis)) for axis in (1, 0))
        edges = left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1
        boxes.append([int(edge) / SIDE for edge in edges])
    return np.clip(np.round(image), 0, 255).astype(np.uint8), boxes


def make_waveform(kind: Kind | str, rng: Generator) -> np.ndarray:
    """(AUDIO_SECONDS at 16 kHz) within -1..1 of one of a kind's sounds, a little faster or slower; SILENCE or NOISE."""
    length, level = int(AUDIO_SECONDS * SAMPLE_RATE), 10 ** (rng.uniform(*LEVEL_DB) / 20)
    if kind == SILENCE:
        return np.zeros(length)
    if kind == NOISE:
        return np.clip(level * 0.1 * rng.standard_normal(length), -1, 1)
    wave = _sound(kind.sounds[rng.integers(len(kind.sounds))])
    wave = np.interp(np.arange(0, len(wave) - 1, rng.uniform(*SPEED)), np.arange(len(wave)), wave)
    if len(wave) < length:
        return np.clip(level * np.resize(wave, length), -1, 1)
    whole, loudest = np.sqrt(np.mean(wave**2)), np.zeros(length)
    for _ in range(20):
        start = rng.integers(len(wave) - length + 1)
        part = wave[start : start + length]
        if np.mean(part**2) > np.mean(loudest**2):
            loudest = part
        if np.sqrt(np.mean(part**2)) >= LOUD * whole:
            return np.clip(level * part, -1, 1)
    return np.clip(level * loudest, -1, 1)


# ---------------------------------------------------------------- the set on disk


class Task(NamedTuple):
    root: Path
    material: Material
    seed: int
    split: str
    index: int


def plan_scene(task: Task) -> tuple[list[Kind], list[Kind | str]]:
    """Kinds in view, and what is heard, in an entry each. Over as many images as there are kinds, each sounds once."""
    kinds = task.material.kinds_of(task.split)
    index = task.index // 2 if task.split == "offscreen" else task.index  # two images show the same kinds
    block, turn = divmod(index, len(kinds))
    rng = np.random.default_rng([task.seed, SPLITS.index(task.split), block, 1])  # differs from a sample's stream
    order, steps = rng.permutation(len(kinds)), rng.permutation(len(kinds) - 1) + 1
    extra = (block + turn) % 3
    silent = {"train": extra, "val": extra, "offscreen": extra, "interactive": 1}.get(task.split, 0)
    silent = 1 + (block + turn) % 2 if task.split.endswith("distractor") else silent
    others = [kinds[order[(turn + step) % len(kinds)]] for step in steps]
    in_view, heard = [kinds[order[turn]], *others[:silent]], [kinds[order[turn]]]
    if task.split == "interactive":
        heard = in_view
    elif task.split == "offscreen" and task.index % 2:
        heard = [(others[-1], SILENCE, others[-1], NOISE)[index % 4]]
    return in_view, heard


def write_sample(task: Task) -> list[Entry]:
    rng = np.random.default_rng([task.seed, SPLITS.index(task.split), task.index])
    in_view, heard = plan_scene(task)
    part = task.split if task.split in task.material.photos else "tests"
    image, boxes = make_image(in_view, task.material.photos[part], rng)
    entries = []
    for sound in heard:
        sounding = getattr(sound, "name", sound)
        name = f"{task.split}_{task.index:06d}" + (f"_{sounding}" if task.split == "interactive" else "")
        jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
        with writing(path := task.root / "frames" / f"{name}.jpg"):
            path.write_bytes(jpeg.tobytes())
        path = task.root / "audio" / f"{name}.wav"
        write_audio(path, make_waveform(sound, rng))
        things = [{"kind": k.name, "bbox": box, "sounding": k == sound} for k, box in zip(in_view, boxes)]
        entries.append(Entry(name, sounding, things))
    return entries


def _says_the_same(marker: Path, about: Mapping[str, Any]) -> bool:
    """Whether the settings of a set are these; older code did not write all of them."""
    try:
        return about | json.loads(marker.read_text(encoding="utf-8")) == about
    except (ValueError, TypeError):
        return False


def make_set(root: Path, material: Material, seed: int, counts: Mapping[str, int], processes: int = 2) -> bool:
    """Write a set below root; False if this very one is there. UserError where the folder holds anything else."""
    counts = {**COUNTS, **counts}
    if len(material.kinds_of("unseen")) < 3:
        counts = {split: count for split, count in counts.items() if not split.startswith("unseen")}
    about = {"version": FORMAT_VERSION, "seed": seed, "counts": counts, "photos": material.photos}
    about["kinds"] = {kind.name: kind[1:] for kind in material.kinds}
    about["contents"] = material.digest()
    settings, marker = json.dumps(about, indent=1) + "\n", root / SETTINGS
    unfinished = (root / UNFINISHED).exists()
    if marker.is_file() and not unfinished and _says_the_same(marker, json.loads(settings)):
        return False
    if root.exists() and any(root.iterdir()) and not unfinished:
        raise UserError(f"{root} is not empty and holds another set: remove it, or name another --out")
    for folder in ("frames", "audio"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / UNFINISHED).touch()
    tasks = [Task(root, material, seed, split, i) for split, count in counts.items() for i in range(count)]
    entries: dict[str, list[Entry]] = {split: [] for split in counts}
    with multiprocessing.Pool(processes) as pool:
        written = tqdm(pool.imap(write_sample, tasks, chunksize=16), total=len(tasks), unit="image", disable=None)
        for task, sample in zip(tasks, written, strict=True):
            entries[task.split] += sample
    write_lists(root, entries)
    write_text(marker, settings)
    (root / UNFINISHED).unlink()
    return True
