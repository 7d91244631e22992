"""What is found, as rows: `<name>.csv` and `<name>.json`, written step by step, and read again.

time        s on the film's clock; 0 of an image
presence    confidence that the source is in view
lit_share   share of the image where AUD_share is above the threshold, 0..1
peak_x, peak_y, peak_value   where AUD is largest, in pixels of the image, and AUD_share there
box_left, box_top, box_right, box_bottom   the largest lit region, in pixels of the image; empty where nothing is lit
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from film.localizer import Step
from utils import atomic_path, printable, strict_json, write_text

MADE_BY = "localize.py"  # what the head of every JSON says
PAGE, FAILURES = "index.html", "failures.csv"  # about all inputs
COLUMNS = (
    "time", "presence", "lit_share", "peak_x", "peak_y", "peak_value", "box_left", "box_top", "box_right", "box_bottom",
)  # fmt: skip


def row_of(step: Step) -> dict[str, float | None]:
    """A step as a row; pixels to a tenth."""
    box = [round(edge, 1) for edge in step.box] if step.box else [None] * 4
    peak = round(step.peak.x, 1), round(step.peak.y, 1), _short(step.peak.value)
    return dict(zip(COLUMNS, [round(step.time, 4), _short(step.presence), _short(step.lit), *peak, *box], strict=True))


def _short(value: float) -> float:
    return float(f"{value:.6g}")


class Rows:
    """Writes both files of one input row by row; they appear, whole, when the block ends without an error.

    about: what stands at the head of the JSON: `source`, `settings` and so on.
    """

    def __init__(self, csv_path: Path, json_path: Path, about: Mapping[str, Any]) -> None:
        self.paths, self.about = (csv_path, json_path), about
        self.end: dict[str, Any] = {"complete": False}
        self.count = 0

    def __enter__(self) -> "Rows":
        self._stack = ExitStack()
        self._csv, self._json = (
            self._stack.enter_context(self._stack.enter_context(atomic_path(path)).open("w", encoding="utf-8"))
            for path in self.paths
        )
        self._writer = csv.DictWriter(self._csv, COLUMNS, lineterminator="\n")
        self._writer.writeheader()
        self._json.write(f'{{"about": {strict_json(self.about)},\n"steps": [')
        return self

    def add(self, step: Step) -> None:
        row = row_of(step)
        self._writer.writerow(row)
        self._json.write(("," if self.count else "") + "\n" + strict_json(row))
        self.count += 1

    def __exit__(self, *error: Any) -> None:
        if not error[0]:
            ends = "".join(f',\n"{name}": {strict_json(value)}' for name, value in self.end.items())
            self._json.write(f"\n]{ends}}}\n")
        self._stack.__exit__(*error)

    def columns(self, *names: str) -> list[np.ndarray]:
        """The values so far of some columns, NaN where they are empty."""
        self._csv.flush()
        with open(self._csv.name, encoding="utf-8") as file:
            values = [[float(row[name] or "nan") for name in names] for row in csv.DictReader(file)]
        return list(np.reshape(values, (-1, len(names))).T)


def read_about(path: Path) -> dict[str, Any] | None:
    """`about` of a JSON that `Rows` wrote, with what stands at its end; None for any other file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["about"] | {key: value for key, value in content.items() if key not in ("about", "steps")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_failures(path: Path, failures: Sequence[tuple[str, str]]) -> None:
    """`failures.csv`: which files could not be used, and why; none is left where there are no failures."""
    if not failures:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("file", "reason"), *failures])
    write_text(path, printable(text.getvalue()))
