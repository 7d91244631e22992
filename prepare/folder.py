"""The folder of pairs: one run at a time in it, what made it, what is finished, and the tables beside the pairs."""

import csv
import io
import json
import os
import re
import signal
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from prepare.convert import Row, Wish, row_of
from utils import UserError, write_json, write_text

HALF_WRITTEN = re.compile(
    r"\.(.+)\.[a-z0-9_]{8}\.(jpg|wav|csv|json)"
)  # what `atomic_path` writes into before it renames
TABLE_TIMEOUT = 60  # s to wait for another shard that is writing the tables


@contextmanager
def lock_folder(out: Path, shard: tuple[int, int], ids: Collection[str]) -> Iterator[None]:
    """Keep a second run off the folder, or off this shard of it, and it free of half-written files.

    ids: of the films of this run. SIGTERM interrupts as Ctrl-C does.
    """
    for folder in (out / "frames", out / "audio"):
        folder.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    name = ".lock" if shard[1] == 1 else f".lock.{shard[0]}-of-{shard[1]}"
    mine = None if shard[1] == 1 else set(ids)
    try:
        with FileLock(out / name, timeout=0):
            remove_half_written(out, mine)
            try:
                yield
            finally:
                remove_half_written(out, mine)  # of a process that was ended
    except Timeout:
        raise UserError(f"another run is writing into {out}") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def remove_half_written(out: Path, ids: Collection[str] | None = None) -> None:
    """ids: of the films whose files may be removed, others may be another shard's; None: all."""
    folders = [out, out / "frames", out / "audio"]
    folders += [Path(entry.path) for entry in os.scandir(out / "frames") if entry.is_dir()]
    for folder in folders:
        for name in os.listdir(folder):
            found = HALF_WRITTEN.fullmatch(name)
            owner = found and (folder.name if folder.parent.name == "frames" else found[1])
            if found and (ids is None or owner in ids or owner.rpartition("_")[0] in ids):
                (folder / name).unlink(missing_ok=True)


def remember(out: Path, wish: Wish) -> None:
    """Keep what a folder's pairs were made with. Raises UserError where it differs from before."""
    path, wanted = out / "made.json", wish._asdict()
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        write_json(path, wanted)
        return
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}, which says how the pairs were made: {error}") from error
    before = wish._asdict() | {name: value for name, value in before.items() if name in wanted}
    shown = [{name: "none" if value is None else value for name, value in wish.items()} for wish in (before, wanted)]
    different = [f"--{name} {shown[0][name]}, not {shown[1][name]}" for name in wanted if before[name] != wanted[name]]
    if different:
        raise UserError(f"the pairs in {out} were made with {'; '.join(different)}: give another --out")


def finished_ids(out: Path) -> set[str]:
    frames = {name.removesuffix(".jpg") for name in os.listdir(out / "frames") if not name.startswith(".")}
    audio = {name.removesuffix(".wav") for name in os.listdir(out / "audio") if name.endswith(".wav")}
    return frames & audio


# ---------------------------------------------------------------- tables


def read_csv(path: Path) -> list[list[str]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.reader(file))
    except FileNotFoundError:
        return []


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue().encode("utf-8", "backslashreplace").decode())


def known_rows(out: Path) -> dict[str, Row]:
    """{id: row} of pairs.csv."""
    return {row[0]: Row(*row) for row in read_csv(out / "pairs.csv")[1:] if len(row) == len(Row._fields)}


def join_tables(
    out: Path, made: Iterable[Row], failures: Iterable[Sequence[str]], handled: Collection[str] | None
) -> None:
    """Write pairs.csv and failures.csv: this run's rows, and those of other shards.

    handled: files that this run answers for; None: all there are. Pairs without a row, whose run was killed, have it
    in their JPEG.
    """
    with FileLock(out / ".tables.lock", timeout=TABLE_TIMEOUT):
        rows = known_rows(out) | {row.id: row for row in made}
        finished = finished_ids(out)
        for name in finished - rows.keys():
            image = out / "frames" / name
            first = min(image.iterdir(), default=image) if image.is_dir() else image.with_name(f"{name}.jpg")
            rows[name] = row_of(first) or Row(name, "", 0, "", "", "", "")
        write_csv(out / "pairs.csv", [Row._fields, *(rows[name] for name in sorted(finished))])
        kept = [] if handled is None else [row for row in read_csv(out / "failures.csv")[1:] if row[0] not in handled]
        write_csv(out / "failures.csv", [("file", "id", "reason"), *sorted([*map(tuple, kept), *map(tuple, failures)])])
