"""Which file of a folder is which pair: what a walk finds, what a file is, what its name says."""

import csv
import os
import stat
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import media
from annotations import FILM_SUFFIXES, UNWRITABLE, as_id, clip_id
from utils import UserError

HIDDEN = "hidden"  # a file that is left out because it, or a folder that it lies in, is


class Task(NamedTuple):
    """A film, and the id of its pair."""

    path: Path
    name: str  # path below the folder of clips
    id: str
    done: int = 0  # number of its parts that are done


class Failure(NamedTuple):
    """A row of failures.csv."""

    file: str
    id: str
    reason: str


class Found(NamedTuple):
    """What a folder holds."""

    tasks: list[Task]  # files that are films, by their name or because nobody has looked yet
    refused: list[Failure]  # what cannot be opened or named
    hidden: list[str]  # paths below the folder


def walk(folder: Path, out: Path) -> Iterator[tuple[Path, str]]:
    """Every entry in or below a folder that is no folder itself, with "", HIDDEN or the reason why it is not opened.

    What lies in `out`, the folder of pairs, is left out. Raises UserError when the folder is not there.
    """
    if not folder.is_dir():
        raise UserError(f"the folder of clips {folder} does not exist")
    root, results = folder.resolve(), out.resolve()
    if root == results:
        raise UserError(f"--out is {folder}, the folder of clips itself: choose another, which may lie in it")
    waiting = [folder]
    while waiting:
        try:
            entries = sorted(os.scandir(waiting.pop()), key=lambda entry: entry.name)
        except OSError as error:
            yield Path(error.filename), f"folder: it cannot be read ({error.strerror})"
            continue
        for entry in entries:
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                if path.resolve() != results:
                    waiting.append(path)
            elif any(part.startswith(".") for part in path.relative_to(folder).parts):
                yield path, HIDDEN
            elif entry.is_symlink():
                yield path, _of_link(path, root)
            else:
                yield path, "" if entry.is_file() else "not a regular file"


def _of_link(path: Path, root: Path) -> str:
    """Why a link is not followed; empty where it leads to a file in the folder."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return "link: it leads nowhere"
    if not target.is_relative_to(root):
        return "link: it leads out of the folder; give the folder that it leads to"
    if target.is_dir():
        return "link: it leads to another folder of the same"
    return "" if stat.S_ISREG(target.stat().st_mode) else "not a regular file"


def find_files(folder: Path, out: Path, source: str, listed: Collection[str], shard: tuple[int, int] = (1, 1)) -> Found:
    """The files of a folder, but for those in `out`, with their ids; listed: see `clip_id`.

    shard: only the i-th of n parts, shared by id.
    """
    found = Found([], [], [])
    for path, problem in walk(folder, out):
        name = str(path.relative_to(folder))
        readable = _is_utf8(path.name)
        own = clip_id(path.stem, listed)[0] if source == "vggsound" and readable else as_id(path.stem)
        if zlib.crc32(own.encode("utf-8", "surrogateescape")) % shard[1] != shard[0] - 1:
            continue
        if problem == HIDDEN:
            found.hidden.append(name)
            continue
        if not readable or UNWRITABLE.search(path.name) or not own:
            problem = "name: not in UTF-8" if not readable else "name: it holds a line break or control character"
        if problem:
            found.refused.append(Failure(name, own, problem))
            continue
        found.tasks.append(Task(path.absolute(), name, own))
    found.tasks.sort(key=lambda task: task.name)
    return found


def refuse_shared_ids(tasks: list[Task]) -> tuple[list[Task], list[Failure]]:
    """Films with an id of their own, and rows for those that share theirs."""
    by_id: dict[str, list[Task]] = {}
    for task in tasks:
        by_id.setdefault(task.id, []).append(task)
    refused = []
    for group in by_id.values():
        for task in group if len(group) > 1 else ():
            others = ", ".join(other.name for other in group if other != task)
            refused.append(Failure(task.name, task.id, f"same id: {others}"))
    return [group[0] for group in by_id.values() if len(group) == 1], refused


def looks_like_film(path: Path) -> bool:
    return path.suffix.lower() in FILM_SUFFIXES


def kind_of(path: Path) -> str:
    """What a file is by its content: "film" (moving images), "sound", "image" or "" for anything else."""
    try:
        with media.open(path) as opened:
            if opened.has_image:
                return "film" if opened.has_sound or not opened.is_still else "image"
            return "sound" if opened.has_sound else ""
    except UserError:
        return ""


def _is_utf8(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:  # the file system's other bytes, which Python keeps as lone surrogates
        return False


def read_vggsound_csv(path: Path) -> dict[str, tuple[str, str]]:
    """VGG-Sound's list, rows of youtube id, start second, label, split -> {id: (label, split)}. Raises UserError."""
    classes: dict[str, tuple[str, str]] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for line, row in enumerate(csv.reader(file), 1):
                if len(row) == 4 and row[1].strip().isdecimal():
                    classes[f"{row[0].strip()}_{int(row[1]):06d}"] = (row[2].strip(), row[3].strip())
                elif row and line > 1:  # the first may be a heading
                    raise UserError(f"line {line} of {path} is not `youtube id,start second,label,split`: {row!r:.80}")
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not classes:
        raise UserError(f"{path} holds no row `youtube id,start second,label,split`")
    return classes
