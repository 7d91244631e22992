"""Downloaded clips (mp4, webm, mkv, avi) -> frames/<id>.jpg and audio/<id>.wav, the pairs that training reads.

VGG-Sound: the frame at 5.0 s of the clip (the one that VGG-SS annotates) and its first 10 s of audio. Flickr: the frame
nearest the middle and the middle 10 s of audio. Audio becomes 16-kHz mono 16-bit WAV, frames keep their size. A clip
of VGG-Sound that ends before 5.0 s gives the frame nearest its middle, and is named. Seconds count from the first frame
and the first sample. Every clip ends as a pair or as a line of failures.csv.
"""

import csv
import errno
import io
import os
import re
import signal
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import av
import soundfile
from filelock import FileLock, Timeout
from pebble import ProcessExpired, ProcessFuture, ProcessPool
from PIL import Image
from tqdm import tqdm

from annotations import first_ids
from audio_io import SAMPLE_RATE
from prepare.clip_reader import CLIP_SECONDS, BadClip, audio_from, clip_id, frame_at, measure, read_vggsound_csv
from utils import UserError, atomic_path, number, write_text

CLIP_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi")
MOMENT = 5.0  # seconds: VGG-SS boxes belong to this frame
CLIP_TIMEOUT = 600  # seconds of work on one clip before its process is given up
JPEG_QUALITY = 95
STOPS = (signal.SIGINT, signal.SIGTERM)
HALF_WRITTEN = re.compile(r"\..+\.[a-z0-9_]{8}\.(jpg|wav|csv)")  # what `atomic_path` writes into before it renames


class Task(NamedTuple):
    path: Path
    name: str  # path below the folder of clips
    id: str


class Outcome(NamedTuple):
    reason: str = ""  # why there is no pair; empty: there is one
    early: bool = False  # the frame at 5.0 s is not there: the middle one was taken
    fatal: bool = False  # the output cannot be written: the run is over


# ---------------------------------------------------------------- one clip to one pair


def convert(task: Task, out: Path, source: str) -> Outcome:
    """Write frames/<id>.jpg and audio/<id>.wav of one clip, or neither of them and say why."""
    try:
        clip = measure(task.path)
        early = source == "vggsound" and clip.video_seconds <= MOMENT
        moment, begin = MOMENT, 0.0
        if early or source == "flickr":
            moment = clip.video_seconds / 2
        if source == "flickr":
            begin = max(0.0, (clip.audio_seconds - CLIP_SECONDS) / 2)
        frame, since = frame_at(task.path, clip, moment)
        waveform = audio_from(task.path, begin)
    except BadClip as error:
        return Outcome(str(error))
    except (av.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError) as error:
        return Outcome(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}")
    try:
        jpeg, wav = out / "frames" / f"{task.id}.jpg", out / "audio" / f"{task.id}.wav"
        with atomic_path(wav) as new_wav, atomic_path(jpeg) as new_jpeg:
            soundfile.write(new_wav, waveform, SAMPLE_RATE, subtype="PCM_16")
            comment = f"{task.name}, frame at {since:.3f} s"
            Image.fromarray(frame).save(new_jpeg, quality=JPEG_QUALITY, comment=comment.encode("utf-8", "replace"))
    except (OSError, soundfile.LibsndfileError) as error:
        its_own_fault = getattr(error, "errno", None) == errno.ENAMETOOLONG
        return Outcome(f"cannot write: the pair {task.id} in {out}: {error}", fatal=not its_own_fault)
    return Outcome(early=early)


# ---------------------------------------------------------------- processes


def convert_all(tasks: Sequence[Task], workers: int, work: Callable[[Task], Outcome]) -> Iterator[tuple[Task, Outcome]]:
    """Each task with its outcome, as they come. A clip on which a process dies or hangs costs that clip only."""
    waiting = iter(tasks)
    pool = ProcessPool(workers, initializer=signal.pthread_sigmask, initargs=(signal.SIG_UNBLOCK, STOPS))
    try:
        with stops_blocked():  # a worker starts with them blocked, until it knows what to do on them
            running = {pool.schedule(work, [task], timeout=CLIP_TIMEOUT): task for task in islice(waiting, workers)}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), outcome_of(future)
                for task in islice(waiting, 1):
                    running[pool.schedule(work, [task], timeout=CLIP_TIMEOUT)] = task
    finally:
        pool.stop()
        pool.join()


@contextmanager
def stops_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outcome_of(future: ProcessFuture) -> Outcome:
    try:
        return future.result()
    except TimeoutError:
        return Outcome(f"hang: not done after {CLIP_TIMEOUT} s")
    except ProcessExpired as error:
        return Outcome(f"crash: the process ended with status {error.exitcode}")
    except BrokenProcessPool as error:
        return Outcome(f"the processes cannot be kept running ({error}): the same command goes on", fatal=True)
    except Exception as error:  # whatever else a decoder raises
        return Outcome(f"crash: {' '.join(repr(error).split())}")


# ---------------------------------------------------------------- the folder


def find_clips(folder: Path) -> list[Path]:
    """Every clip in or below a folder, sorted; hidden files are none. Raises UserError when there is no clip."""
    if not folder.is_dir():
        raise UserError(f"the folder of clips {folder} does not exist")
    found = [
        Path(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(CLIP_SUFFIXES) and not name.startswith(".")
    ]
    if not found:
        raise UserError(f"{folder} holds no clip ({', '.join(CLIP_SUFFIXES)})")
    return sorted(found)


@contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Keep a second run off the folder, and it free of half-written files. SIGTERM interrupts as Ctrl-C does."""
    for folder in (out / "frames", out / "audio"):
        folder.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with FileLock(out / ".lock", timeout=0):
            remove_half_written(out)
            try:
                yield
            finally:
                remove_half_written(out)  # of a process that was ended
    except Timeout:
        raise UserError(f"another run is writing into {out}") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def remove_half_written(out: Path) -> None:
    for folder in (out, out / "frames", out / "audio"):
        for name in filter(HALF_WRITTEN.fullmatch, os.listdir(folder)):
            (folder / name).unlink(missing_ok=True)


def finished_ids(out: Path) -> set[str]:
    frames, audio = (
        {name.removesuffix(suffix) for name in os.listdir(out / folder) if name.endswith(suffix)}
        for folder, suffix in (("frames", ".jpg"), ("audio", ".wav"))
    )
    return frames & audio


def write_csv(path: Path, rows: Iterable[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue().encode("utf-8", "backslashreplace").decode())


# ---------------------------------------------------------------- the sub-command


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help=f"clips ({', '.join(CLIP_SUFFIXES)}), in it or its folders"
    )
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
        help="VGG-Sound's list (youtube id, start, label, split), from which classes.csv is written: each pair's class",
    )
    parser.add_argument(
        "--workers",
        type=number(int, low=1),
        default=os.cpu_count(),
        metavar="N",
        help="number of processes that decode",
    )


class Names(NamedTuple):
    """Which clip is which pair."""

    tasks: list[Task]  # clips with an id of their own
    refused: list[tuple[str, str, str]]  # rows of failures.csv: clips that can have no id, or share theirs
    kept: dict[str, list[str]]  # "other" or "ambiguous" -> ids that are the stem of the clip's name


def is_utf8(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:  # the file system's other bytes, which Python keeps as lone surrogates
        return False


def name_clips(folder: Path, source: str, listed: Collection[str]) -> Names:
    """The id of every clip in a folder; listed: see `clip_id`."""
    by_id: dict[str, list[Task]] = {}
    refused: list[tuple[str, str, str]] = []
    kept: dict[str, list[str]] = {}
    for path in find_clips(folder):
        if not is_utf8(path.name):
            refused.append((str(path.relative_to(folder)), path.stem, "name: not in UTF-8"))
            continue
        name, remark = clip_id(path.stem, listed) if source == "vggsound" else (path.stem, "")
        by_id.setdefault(name, []).append(Task(path.absolute(), str(path.relative_to(folder)), name))
        if remark:
            kept.setdefault(remark, []).append(name)
    for tasks in by_id.values():
        for task in tasks if len(tasks) > 1 else ():
            others = ", ".join(other.name for other in tasks if other != task)
            refused.append((task.name, task.id, f"same id: {others}"))
    return Names([tasks[0] for tasks in by_id.values() if len(tasks) == 1], refused, kept)


def run(args: Namespace) -> None:
    """`prepare_data.py clips`: convert what is not there yet, and account for every clip, interrupted or not."""
    classes = read_vggsound_csv(args.vggsound_csv) if args.vggsound_csv else {}
    names = name_clips(args.folder, args.source, classes)
    with lock_folder(args.out):
        there = finished_ids(args.out)
        todo = [task for task in names.tasks if task.id not in there]
        failures, early = list(names.refused), []
        results = convert_all(todo, args.workers, partial(convert, out=args.out, source=args.source))
        try:
            with closing(results), tqdm(total=len(todo), unit="clip", disable=None) as bar:
                for task, outcome in results:
                    if outcome.fatal:
                        raise UserError(outcome.reason)
                    if outcome.reason:
                        failures.append((task.name, task.id, outcome.reason))
                    early += [task.id] * outcome.early
                    bar.update()
        finally:
            write_csv(args.out / "failures.csv", [("file", "id", "reason"), *sorted(failures)])
            made = finished_ids(args.out) - there
            print_summary(args, names, len(todo), made, failures, early)
            if args.vggsound_csv:
                write_classes(args, [task.id for task in names.tasks if task.id in made | there], classes)


def print_summary(
    args: Namespace,
    names: Names,
    todo: int,
    made: Collection[str],
    failures: Sequence[tuple[str, str, str]],
    early: Sequence[str],
) -> None:
    total, there = len(names.tasks) + len(names.refused), len(names.tasks) - todo
    print(f"{total} clips in {args.folder}: {len(made)} pairs made, {there} there already, {len(failures)} failed")
    for reason, count in Counter(reason.partition(":")[0] for _, _, reason in failures).most_common():
        print(f"  {reason}: {count}")
    if failures:
        print(f"which, and why: {args.out / 'failures.csv'}")
    left = todo + len(names.refused) - len(made) - len(failures)
    if left:
        print(f"not reached: {left}; the same command goes on with them")
    notes = {
        f"end before {MOMENT} s, the frame nearest their middle was taken": early,
        "named in no known form, the whole name is the id": names.kept.get("other"),
        "named so that the start may be in s or in ms, the whole name is the id (--vggsound_csv can settle it)": (
            names.kept.get("ambiguous")
        ),
    }
    for note, ids in notes.items():
        if ids:
            print(f"{note}: {len(ids)} ({first_ids(ids)})")


def write_classes(args: Namespace, ids: Sequence[str], classes: Mapping[str, tuple[str, str]]) -> None:
    known = [i for i in ids if i in classes]
    write_csv(args.out / "classes.csv", [("id", "class", "split"), *((i, *classes[i]) for i in known)])
    print(f"{args.out / 'classes.csv'}: {len(known)} of {len(ids)} pairs are in {args.vggsound_csv}")
