"""What a test has written beside results.json, so that the next one removes that and nothing else."""

from collections.abc import Iterable
from pathlib import Path

from utils import write_text

MARK = ".written"  # in the folder of a set's results: the files that a test wrote there, a line each


def remove_own(folder: Path, keep: Path | None = None) -> None:
    """Remove the files that an earlier test wrote into the folder, but for `keep`, and folders that are empty then."""
    if not (folder / MARK).is_file():
        return
    names, kept = (folder / MARK).read_text(encoding="utf-8").splitlines(), []
    for path in [folder / name for name in names if name and ".." not in Path(name).parts]:
        if path.resolve() == keep:
            kept.append(path)
            continue
        path.unlink(missing_ok=True)
        for parent in list(path.relative_to(folder).parents)[:-1]:
            if (folder / parent).is_dir() and not any((folder / parent).iterdir()):
                (folder / parent).rmdir()
    (folder / MARK).unlink()
    if kept:
        note_own(folder, kept)


def note_own(folder: Path, files: Iterable[Path]) -> None:
    """Note what was written, beside what was noted before."""
    mark = folder / MARK
    before = mark.read_text(encoding="utf-8").splitlines() if mark.is_file() else []
    names = dict.fromkeys([*before, *(file.relative_to(folder).as_posix() for file in files)])
    write_text(mark, "".join(f"{name}\n" for name in names))
