"""Films -> frames/<id>.jpg and audio/<id>.wav, the pairs that training reads.

VGG-Sound: the frame at 5.0 s of the clip (the one that VGG-SS annotates) and its first 10 s of audio. Flickr: the frame
nearest the middle and the middle 10 s of audio. Audio becomes 16-kHz mono 16-bit WAV, frames keep their size. A clip
of VGG-Sound whose image or sound ends before 5.0 s gives the frame nearest the middle of what has both, and is named.
Every file of the folder ends as pairs, as a line of failures.csv, or is counted among the other files; pairs.csv says
where each pair comes from.
"""

import os
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from annotations import as_id, clip_id, first_ids
from prepare.convert import Outcome, Row, Wish, convert
from prepare.folder import finished_ids, join_tables, known_rows, lock_folder, remember, write_csv
from prepare.names import (
    HIDDEN,
    Failure,
    Found,
    Task,
    find_files,
    kind_of,
    looks_like_film,
    read_vggsound_csv,
    refuse_shared_ids,
)
from prepare.pool import Broken, Lost, run_all
from utils import UserError, number


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="films, in it or its folders")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where frames/, audio/ and failures.csv are written"
    )
    parser.add_argument(
        "--source",
        choices=("vggsound", "flickr"),
        default="vggsound",
        help="what to take of a clip: vggsound: the frame at 5.0 s and the first 10 s of audio; flickr: the middle "
        "frame and the middle of the audio, with the file's name as id",
    )
    parser.add_argument(
        "--vggsound_csv",
        type=Path,
        metavar="FILE",
        help="VGG-Sound's list (youtube id, start, label, split), which settles what names mean and from which "
        "classes.csv is written: each pair's class",
    )
    parser.add_argument(
        "--every",
        type=number(float, low=1),
        metavar="SECONDS",
        help="cut a film into parts of so many seconds, each a pair <id>_<second> (default: one pair per film)",
    )
    parser.add_argument(
        "--overlap",
        type=number(float, low=0),
        default=0.0,
        metavar="SECONDS",
        help="with --every: how far the audio of a pair goes on into the next one",
    )
    parser.add_argument(
        "--frame",
        choices=("middle", "first", "sharpest", "loudest"),
        default="middle",
        help="which frame of a pair's seconds is taken (vggsound: its middle is at 5.0 s); loudest: the one shown when "
        "the audio is loudest",
    )
    parser.add_argument(
        "--frames",
        type=number(int, low=1),
        default=1,
        metavar="N",
        help="frames per pair, each chosen in its share of the seconds, in frames/<id>/; training draws one per epoch",
    )
    parser.add_argument(
        "--shard",
        type=shard,
        default=(1, 1),
        metavar="I/N",
        help="make only the I-th of N parts, as one job of an array; all may write into one folder (default: 1/1)",
    )
    parser.add_argument(
        "--workers",
        type=number(int, low=1),
        default=os.cpu_count(),
        metavar="N",
        help="number of processes that decode",
    )


def shard(text: str) -> tuple[int, int]:
    """An argparse type: I/N with 1 <= I <= N."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N")
    return int(found[1]), int(found[2])


class Report(NamedTuple):
    """What became of the files of a folder, so far."""

    made: list[Row]
    there: list[str]
    failures: list[Failure]
    unused: dict[str, float]  # name of a film -> s of it that are in no pair
    others: Counter[str]  # suffixes of files that are no films, and HIDDEN
    reached: set[str]  # names of films whose outcome is known


def run(args: Namespace) -> None:
    """`prepare_data.py clips`: convert what is not there yet, and account for every file, interrupted or not."""
    if args.overlap and not args.every:
        raise UserError("--overlap needs --every: how far the audio of a part goes on into the next one")
    wish = Wish(args.source, args.every, args.overlap, args.frame, args.frames)
    classes = read_vggsound_csv(args.vggsound_csv) if args.vggsound_csv else {}
    found = find_files(args.folder, args.out, args.source, classes, args.shard)
    if not found.tasks and not found.refused and args.shard[1] == 1:
        raise UserError(f"{args.folder} holds no file")
    report = Report([], [], list(found.refused), {}, Counter(), {failure.file for failure in found.refused})
    if found.hidden:
        report.others[HIDDEN] = len(found.hidden)
    with lock_folder(args.out, args.shard, [task.id for task in found.tasks]):
        remember(args.out, wish)
        films = choose_films(found, args.workers, report)
        todo = tasks_left(films, args.out, wish, report)
        try:
            convert_all(todo, args, wish, report)
        finally:
            handled = None if args.shard[1] == 1 else {task.name for task in found.tasks} | report.reached
            join_tables(args.out, report.made, report.failures, handled)
            print_summary(args, films, classes, report)
            if args.vggsound_csv:
                write_classes(args, sorted(finished_ids(args.out)), classes)


def choose_films(found: Found, workers: int, report: Report) -> list[Task]:
    """Files that are films by their name or, looked into in processes of their own, by their content.

    Sound without images is a failure, unless a film has the same name; all else is counted by its suffix.
    """
    films = [task for task in found.tasks if looks_like_film(task.path)]
    others = [task for task in found.tasks if not looks_like_film(task.path)]
    named = {task.id for task in films}
    for task, kind in run_all(others, min(workers, max(1, len(others))), _kind_of):
        if kind == "film":
            films.append(task)
        elif kind == "sound" and task.id not in named:
            report.failures.append(Failure(task.name, task.id, "no video stream"))
        elif isinstance(kind, Lost | Broken):
            report.failures.append(Failure(task.name, task.id, str(kind)))
        else:
            report.others[task.path.suffix or "no suffix"] += 1
        if kind != "film":
            report.reached.add(task.name)
    return sorted(films, key=lambda task: task.name)


def _kind_of(task: Task) -> str:
    return kind_of(task.path)


def tasks_left(films: Sequence[Task], out: Path, wish: Wish, report: Report) -> list[Task]:
    """Films whose pairs are to be made; those that share an id, and those whose pair another file made, are refused."""
    own, shared = refuse_shared_ids(list(films))
    report.failures.extend(shared)
    report.reached.update(failure.file for failure in shared)
    if wish.every:
        return own
    finished, rows, left = finished_ids(out), known_rows(out), []
    for task in own:
        if task.id not in finished:
            left.append(task)
            continue
        row = rows.get(task.id)
        report.reached.add(task.name)
        if row and row.file and int(row.bytes) != task.path.stat().st_size:
            reason = f"same id: another file, {row.file} of {row.bytes} bytes, made the pair that is there"
            if row.file == task.name:
                reason += "; delete the pair to have it made anew"
            report.failures.append(Failure(task.name, task.id, reason))
        else:
            report.there.append(task.id)
    return left


def convert_all(todo: Sequence[Task], args: Namespace, wish: Wish, report: Report) -> None:
    """Convert films in processes and keep account of them. Raises UserError when nothing can be written any more."""
    results = run_all(todo, args.workers, partial(convert, out=args.out, wish=wish))
    with closing(results), tqdm(total=len(todo), unit="film", disable=None) as bar:
        for task, outcome in results:
            if isinstance(outcome, Broken):
                raise UserError(str(outcome))
            if isinstance(outcome, Lost):
                outcome = Outcome(failures=(Failure(task.name, task.id, str(outcome)),))
            if outcome.fatal:
                raise UserError(outcome.fatal)
            report.made.extend(outcome.rows)
            report.there.extend(outcome.there)
            report.failures.extend(outcome.failures)
            if outcome.unused > 1:
                report.unused[task.name] = outcome.unused
            if not outcome.unfinished:
                report.reached.add(task.name)
                bar.update()


def print_summary(args: Namespace, films: Sequence[Task], listed: Collection[str], report: Report) -> None:
    failures, others, known = report.failures, report.others, {task.name for task in films}
    total = len(films) + sum(1 for failure in failures if failure.file not in known)
    part = "" if args.shard[1] == 1 else f", part {args.shard[0]} of {args.shard[1]}"
    counts = f"{len(report.made)} pairs made, {len(report.there)} there already, {len(failures)} failed"
    print(f"{total} clips in {args.folder}{part}: {counts}")
    for reason, count in Counter(re.split("[:;]", failure.reason)[0] for failure in failures).most_common():
        print(f"  {reason}: {count}")
    if failures:
        print(f"which, and why: {args.out / 'failures.csv'}")
    if others:
        print(f"other files: {sum(others.values())} ({', '.join(f'{s} {n}' for s, n in others.most_common())})")
    left = sum(1 for task in films if task.name not in report.reached)
    if left:
        print(f"not reached: {left}; the same command goes on with them")
    rows = known_rows(args.out)
    mine = [rows[name] for name in [*(row.id for row in report.made), *report.there] if name in rows]
    notes = notes_of(args, films, listed) | decisions_of(mine)
    if args.shard[1] == 1:
        names = {task.name for task in films} | report.reached
        notes["pairs of films that are not in this folder"] = [i for i, row in rows.items() if row.file not in names]
    for note, names in notes.items():
        if names:
            print(f"{note}: {len(names)} ({first_ids(names)})")
    if report.unused and not args.every:
        spare = sum(report.unused.values())
        print(
            f"films longer than a pair: {len(report.unused)}, of which {spare:,.0f} s are in no pair (--every SECONDS "
            f"cuts many pairs from each)"
        )


def notes_of(args: Namespace, films: Sequence[Task], listed: Collection[str]) -> dict[str, list[str]]:
    """What the names of the films were taken for, with the ids that it is about."""
    remarks: dict[str, list[str]] = {}
    for task in films if args.source == "vggsound" else ():
        remark = clip_id(task.path.stem, listed)[1]
        remarks.setdefault(remark, []).append(task.id)
    return {
        "named in no known form, the whole name is the id": remarks.get("other", []),
        "named so that it may be a youtube id and a start, the whole name is the id (--vggsound_csv can settle it)": (
            remarks.get("ambiguous", [])
        ),
        "names read as a youtube id and a start": [
            f"{task.path.stem} -> {task.id}" for task in films if task.id != as_id(task.path.stem)
        ],
    }


def decisions_of(rows: Iterable[Row]) -> dict[str, list[str]]:
    """What was decided about the films of these pairs, with their ids; what differs in its numbers alone is one."""
    alike: dict[str, dict[str, str]] = {}  # with # for the numbers -> {id: as it was said}
    for row in rows:
        for decision in filter(None, row.decisions.split("; ")):
            alike.setdefault(re.sub(r"\d+(\.\d+)?", "#", decision), {})[row.id] = decision
    said = {}
    for ids in alike.values():
        example = next(iter(ids.values()))
        said[example if len(set(ids.values())) == 1 else f"{example}, or other numbers"] = list(ids)
    return said


def write_classes(args: Namespace, ids: Iterable[str], classes: Mapping[str, tuple[str, str]]) -> None:
    ids = list(ids)
    known = [i for i in ids if i in classes or i.rpartition("_")[0] in classes]
    rows = [(i, *(classes.get(i) or classes[i.rpartition("_")[0]])) for i in known]
    write_csv(args.out / "classes.csv", [("id", "class", "split"), *rows])
    print(f"{args.out / 'classes.csv'}: {len(known)} of {len(ids)} pairs are in {args.vggsound_csv}")
