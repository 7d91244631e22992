"""Markdown tables of finished trainings, from their results.json, and writing them into the pages of docs/."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from tabulate import tabulate

from annotations import read_ids
from experiments.runs import DISTRACTOR, INTERACTIVE, OFFSCREEN, TEST, Rows, Training
from maps import ABSOLUTE
from scoring.summary import interactive_groups
from synthetic.probe import oracle_scores
from utils import UserError, write_text

CLASS_RECALL = "class R@1, worse way"
OF_SHARE = ("F_LOC", "F_AUC", "cIoU_u", "pIA_silence", "pIA_noise", "pIA_offscreen")  # figures of AUD_share, not of AUD
OVER_TIME = (  # head, figure of a map over time
    ("pointing", "pointing"),
    ("lit in pauses", "lit_pauses"),
    ("lit, sounding", "lit_sounding"),
    ("false peaks", "false_peaks"),
)
LOWER = ("pIA_silence", "pIA_noise", "pIA_offscreen", "lit_pauses", "false_peaks")  # is better
TABLES = {  # name: (title, columns: head, split, metric of AUD or AUD_share, or CLASS_RECALL)
    "fixed": ("Fixed rule, in %", (
        ("test cIoU", TEST, "cIoU"),
        ("distractor pointing", DISTRACTOR, "pointing"),
        ("distractor cIoU", DISTRACTOR, "cIoU"),
        ("distractor listening", DISTRACTOR, "listening"),
        ("interactive both_pointing", INTERACTIVE, "both_pointing"),
        ("interactive IIoU", INTERACTIVE, "IIoU"),
    )),
    "half": ("Half rule, retrieval and presence, in %", (
        ("test cIoU_half", TEST, "cIoU_half"),
        ("distractor cIoU_half", DISTRACTOR, "cIoU_half"),
        ("interactive IIoU_half", INTERACTIVE, "IIoU_half"),
        ("test class R@1, worse way", TEST, CLASS_RECALL),
        ("offscreen presence_AP", OFFSCREEN, "presence_AP"),
        ("by the map", OFFSCREEN, "presence_AP@presence"),
    )),
    "negatives": ("Negative audio on `synthetic_distractor`, in %", tuple(
        (head, DISTRACTOR, metric)
        for head, metric in (
            ("F_LOC", "F_LOC"), ("F_AUC", "F_AUC"), ("cIoU_u", "cIoU_u"), ("pIA silence", "pIA_silence"),
            ("pIA noise", "pIA_noise"), ("pIA off-screen", "pIA_offscreen"),
        )
    )),
}  # fmt: skip
DEMO_MEASURES = (
    ("test cIoU", TEST, "cIoU"),
    ("test pointing", TEST, "pointing"),
    ("test class R@1, worse way", TEST, CLASS_RECALL),
    *TABLES["fixed"][1][1:],
)


def figure(run: Training, split: str, metric: str, name: str = "AUD", last: bool = False) -> float | None:
    """One figure of a map, of AUD_share where only that has it; None where a result does not define it.

    last: of the last epoch, not of the chosen one.
    """
    name = ABSOLUTE if metric in OF_SHARE else name
    results = read_results(run, split)
    if last:
        return None if metric == CLASS_RECALL else results["last_epoch"]["maps"].get(name, {}).get(metric)
    if metric != CLASS_RECALL:
        return results["maps"].get(name, {}).get(metric)
    recalls = [way["R@1"] for way in ((results.get("retrieval") or {}).get("by_class") or {}).values()]
    return min(recalls) if recalls and None not in recalls else None


def read_results(run: Training, split: str) -> dict[str, Any]:
    return json.loads(run.results(split).read_text())


def cell(runs: Sequence[Training], split: str, metric: str) -> str:
    """Mean over seeds and, of several, the worst in brackets, in %."""
    return mean_and_worst([figure(run, split, metric) for run in runs], lower_is_better=metric in LOWER)


def mean_and_worst(values: Sequence[float | None], lower_is_better: bool = False) -> str:
    """Fractions of seeds in %: their mean and, of several, the worst in brackets; `-` where one is undefined."""
    if not values or None in values:
        return "-"
    worst = f" ({100 * (max if lower_is_better else min)(values):.1f})" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{worst}"


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return tabulate(lines, heads, tablefmt="github", disable_numparse=True)


def objective_table(name: str, rows: Rows) -> str:
    """A table of TABLES: a line for each row."""
    columns, lines = TABLES[name][1], []
    for runs in rows.values():
        settings = read_results(runs[0], TEST)["settings"]
        inference = f"{settings['infer_sharpening']:g}, {settings.get('infer_smoothing', 0):g}"
        row = runs[0].row
        objects = "1" if row.objects == 1 else f"1 to {row.objects}"
        lines.append([row.label, objects, inference, *(cell(runs, split, metric) for _, split, metric in columns)])
    return markdown(["trained with", "objects", "sharpening, smoothing", *(head for head, _, _ in columns)], lines)


def over_time_table(rows: Rows, windows: Sequence[float]) -> str:
    """A line for each row and window of sound: AUD on the built-in films, and the deaf oracle's line."""
    lines, oracle = [], {}
    for runs in rows.values():
        for window in windows:
            results = [json.loads(run.over_time(window).read_text()) for run in runs]
            oracle = results[0]["references"]["deaf_oracle"]
            figures = [result["maps"]["AUD"] for result in results]
            cells = [mean_and_worst([of[name] for of in figures], name in LOWER) for _, name in OVER_TIME]
            lines.append([runs[0].row.label, f"{window:g} s", *cells, _delay([of["delay"] for of in figures])])
    if oracle:
        cells = [mean_and_worst([oracle[name]]) for _, name in OVER_TIME]
        lines.append(["deaf oracle", "", *cells, _delay([oracle["delay"]])])
    return markdown(["trained with", "window", *(head for head, _ in OVER_TIME), "delay"], lines)


def _delay(seconds: Sequence[float]) -> str:
    return f"{fmean(seconds):.2f}" + (f" ({max(seconds):.2f})" if len(seconds) > 1 else "") + " s"


def demo_table(rows: Rows, root: Path) -> str:
    """A line for each measure: the objectives side by side, and the deaf oracle where several objects are in view.

    root: of the test data.
    """
    oracle = deaf_oracle(root)
    lines = []
    for head, split, metric in DEMO_MEASURES:
        blind = oracle.get((split, metric))
        cells = [cell(runs, split, metric) for runs in rows.values()]
        lines.append([head, *cells, "" if blind is None else f"{100 * blind:.1f}"])
    return markdown(["measure, in %", *rows, "deaf oracle"], lines)


def deaf_oracle(root: Path) -> dict[tuple[str, str], float]:
    """{(split, metric): score of an oracle that sees every object but hears nothing}."""
    objects = json.loads((root / "objects.json").read_text())
    scores = {}
    for split in (DISTRACTOR, INTERACTIVE):
        names = read_ids(root / f"{split.removeprefix('synthetic_')}.txt")
        groups = interactive_groups(names) if split == INTERACTIVE else {}
        of_split = oracle_scores([objects[name] for name in names], groups)
        scores |= {(split, metric): value for metric, value in of_split.items()}
    return scores


def provenance_line(rows: Rows, split: str = TEST) -> str:
    """The line below a table: seeds, encoders, epochs, time and revision. split: one that all runs were scored on."""
    runs = [run for of_row in rows.values() for run in of_row]
    configurations = [run.configuration() for run in runs]
    arch, epochs = ({str(c[name]) for c in configurations} for name in ("image_encoder", "epochs"))
    revisions = {read_results(run, split).get("provenance", {}).get("revision", "unknown") for run in runs}
    seeds = ", ".join(str(run.seed) for run in next(iter(rows.values())))
    meaning = ": mean (worst)" if "," in seeds else ""
    return "; ".join(
        [
            f"seeds {seeds}{meaning}",
            f"{', '.join(sorted(arch))}, {', '.join(sorted(epochs))} epochs",
            f"{median(run.seconds() for run in runs):.0f} s of training per run (median)",
            f"revision {', '.join(sorted(revisions))}",
        ]
    )


# ---------------------------------------------------------------- docs/


def write_tables(tables: Mapping[tuple[Path, str], str]) -> None:
    """Put tables, {(page, name): Markdown}, between the lines <!-- table: name --> and <!-- end: name --> of a page.

    UserError, before anything is written, for a page that cannot be read or that does not hold the two lines once.
    """
    pages: dict[Path, str] = {}
    for (path, name), table in tables.items():
        if path not in pages:
            try:
                pages[path] = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise UserError(f"cannot read {path}, which is to hold the table {name}: {error}") from error
        begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        if pages[path].count(begin) != 1 or pages[path].count(end) != 1:
            raise UserError(f"{path} must hold {begin} and {end}, once each, around the table")
        before, _, rest = pages[path].partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise UserError(f"{path}: {end} is before {begin}")
        pages[path] = f"{before}{begin}\n{table}\n{end}{after}"
    for path, text in pages.items():
        write_text(path, text)
