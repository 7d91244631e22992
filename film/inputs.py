"""What is to be localized: files and folders as they are named on the command line -> tasks with names of their own."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from annotations import SUFFIXES
from dataset import LAYOUTS
from film.tables import FAILURES, MADE_BY, PAGE, read_about
from utils import UserError, cut_to_bytes

SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".aac", ".aiff", ".aif", ".wma", ".mka")
WRITTEN = (".mp4", ".csv", ".json", ".png", "_mask.mp4", "_mask.png")  # what ends the names of an input's files
LONGEST_STEM = 220  # bytes of the 255 that a name may have
RESERVED = tuple(Path(name).stem for name in (FAILURES, PAGE))


class Task(NamedTuple):
    """One image or film."""

    source: Path
    sound: Path | None  # a file that holds its sound; None: it is the film's own
    stem: Path  # of what is written, without a suffix
    asked_for: bool  # named on the command line, and not merely found in a folder

    def files(self) -> list[Path]:
        return [self.stem.with_name(self.stem.name + suffix) for suffix in WRITTEN]


def find_tasks(inputs: Sequence[Path], out: Path, sound: Path | None) -> list[Task]:
    """Every file that is named, and every one of a folder that is, as `walk` finds them.

    A sound file of the same name beside an image, or in the folder of sounds beside its folder (`dataset.LAYOUTS`), is
    the sound of that image and no input; sound: a file that all inputs take instead. UserError for an input or sound
    that is not there or a folder without files, and where an output would replace an input.
    """
    found: list[tuple[Path, Path, bool]] = []  # source, its name below --out, whether it was named itself
    for given in inputs:
        if given.is_dir():
            below = [(path, path.relative_to(given), False) for path in walk(given, out)]
            if not below:
                raise UserError(f"{given} holds no files to look at")
            found += below
        elif given.exists():
            found.append((given, Path(given.name), True))
        else:
            raise UserError(f"there is no file or folder {given}")
    if sound and not sound.is_file():
        raise UserError(f"there is no file {sound} for --sound")
    found = _each_once(found)
    sources = [source for source, *_ in found]
    sound_of = {} if sound else sounds_beside(sources)
    partners = set(sound_of.values())
    found = [entry for entry in found if entry[2] or entry[0] not in partners]
    stems = name_outputs([name for _, name, _ in found])
    tasks = [
        Task(source, sound or sound_of.get(source), out / stem, asked_for)
        for (source, _, asked_for), stem in zip(found, stems, strict=True)
    ]
    taken = {path.resolve() for path in (*sources, *([sound] if sound else []))}
    for task in tasks:
        if clash := [path for path in task.files() if path.resolve() in taken]:
            raise UserError(f"--out {out} would replace the input {clash[0]}: choose another folder")
    return tasks


def _each_once(found: Sequence[tuple[Path, Path, bool]]) -> list[tuple[Path, Path, bool]]:
    """A file that is named twice, or in a folder that is named, too, is one input."""
    kept: dict[Path, tuple[Path, Path, bool]] = {}
    for source, name, asked_for in found:
        key = Path(os.path.normpath(source.absolute()))
        first = kept.setdefault(key, (source, name, asked_for))
        kept[key] = (*first[:2], first[2] or asked_for)
    return list(kept.values())


def walk(folder: Path, out: Path) -> Iterable[Path]:
    """Every file in or below a folder, sorted, but for hidden ones, those below `out`, and what was made by us."""
    excluded = out.resolve()
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and Path(parent, name).resolve() != excluded
        )
        made = _made(Path(parent), names)
        yield from (Path(parent, name) for name in sorted(names) if not (name.startswith(".") or name in made))


def _made(folder: Path, names: Iterable[str]) -> set[str]:
    """What an earlier run left in a folder, which may hold its inputs, too."""
    found = {PAGE, FAILURES}
    for name in names:
        if name.endswith(".json") and (read_about(folder / name) or {}).get("made_by") == MADE_BY:
            found |= {name.removesuffix(".json") + suffix for suffix in WRITTEN}
    return found


def sounds_beside(sources: Sequence[Path]) -> dict[Path, Path]:
    """{image or film: the sound file of its name}, of the sources; for images, which have no sound, of all files."""
    looked_at = {path: _folders_of_sounds(path) for path in sources if path.suffix.lower() not in SOUND_SUFFIXES}
    of_images = {folder for path in looked_at if path.suffix.lower() in SUFFIXES["image"] for folder in looked_at[path]}
    there = [path for folder in sorted(of_images) if folder.is_dir() for path in sorted(folder.iterdir())]
    known, every = (
        {path.with_suffix(""): path for path in paths if path.suffix.lower() in SOUND_SUFFIXES}
        for paths in (sources, [*there, *sources])
    )
    found: dict[Path, Path] = {}
    for path, folders in looked_at.items():
        sounds = every if path.suffix.lower() in SUFFIXES["image"] else known
        for folder in folders:
            if sound := sounds.get(folder / path.stem):
                found[path] = sound
                break
    return found


def _folders_of_sounds(path: Path) -> list[Path]:
    """Its own folder, and the folder of sounds beside that where it is one of images."""
    beside = {(image, audio) for pairs in LAYOUTS.values() for image, audio in pairs if "/" not in image}
    return [path.parent, *(path.parent.with_name(audio) for image, audio in beside if path.parent.name == image)]


def name_outputs(names: Sequence[Path]) -> list[Path]:
    """Names of inputs -> the stem of each one's files: its own, else with its suffix, else with a number, too."""
    stems = [name.with_name(_shortened(name.stem)) for name in names]
    wanted = Counter(_key(stem) for stem in stems)
    taken: set[str] = set()
    given = []
    for name, own in zip(names, stems, strict=True):
        stem = own
        is_mask = stem.name.endswith("_mask") and _key(stem.with_name(stem.name[:-5])) in wanted
        if wanted[_key(stem)] > 1 or stem.name.lower() in RESERVED or is_mask:
            stem = stem.with_name(f"{stem.name}_{name.suffix.removeprefix('.') or 'file'}")
        unique, number = stem, 2
        while _key(unique) in taken or (unique != own and _key(unique) in wanted):
            unique, number = stem.with_name(f"{stem.name}_{number}"), number + 1
        taken.add(_key(unique))
        given.append(unique)
    return given


def _shortened(stem: str) -> str:
    """A file's name without its suffix, such that whatever is added to it, file systems take it."""
    return stem if len(os.fsencode(stem)) <= LONGEST_STEM else cut_to_bytes(stem, LONGEST_STEM)


def _key(stem: Path) -> str:
    return str(stem).casefold()  # some file systems do not tell capitals from small letters
