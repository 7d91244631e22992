"""`test_model.py --testset synthetic_video`: a model's maps over films whose truth is known in every frame.

The films go through the engine of localize.py, as anybody's would.
"""

import csv
import io
import math
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from film.localizer import Localizer, Step
from scoring.over_time import Moment, Seen, held, moments_of, over_time, read_films
from utils import UserError, json_text, provenance, write_together

ROOT, CLIPS, TRUTH = Path("data/synthetic_video"), "clips", "truth.json"
FIGURES = {  # figure: head of its column, and its unit
    "pointing": ("pointing", "%"),
    "lit_sounding": ("lit, sounding", "%"),
    "lit_pauses": ("lit, pauses", "%"),
    "lit_outside": ("lit, outside", "%"),
    "false_peaks": ("false peaks", "%"),
    "delay": ("delay", "s"),
    "followed": ("followed", "%"),
    "on_time": ("on time", "%"),
}
HELD = "_held"


def score_films(localizer: Localizer, root: Path, resamples: int, seed: int) -> tuple[dict[str, Any], list[dict]]:
    """Results and a row per step. Raises UserError where films or their truth are missing or cannot be decoded."""
    films = read_films(root / TRUTH)
    if missing := [film.name for film in films if not _clip(root, film.name).is_file()]:
        raise UserError(f"{len(missing)} of {len(films)} films are missing below {root / CLIPS}, first {missing[0]}")
    moments: list[Moment] = []
    seen: dict[str, list[Seen]] = {"now": [], "held": []}
    rows = []
    for film in tqdm(films, "films", leave=False, unit="film", disable=None):
        steps = list(localizer.clip(_clip(root, film.name)))
        times, own = [step.time for step in steps], [_seen(step, localizer.has_threshold) for step in steps]
        truth = moments_of(film, times)
        moments += truth
        seen["now"] += own
        seen["held"] += held(own, times, localizer.window)
        rows += [_row(moment, step) for moment, step in zip(truth, own, strict=True)]
    on_time = localizer.window / 2 + 1 / localizer.map_fps
    named = {"AUD": (seen["now"], False), "AUD" + HELD: (seen["held"], False)}
    if localizer.has_threshold:
        named |= {"AUD_share": (seen["now"], True), "AUD_share" + HELD: (seen["held"], True)}
    results = over_time(named, moments, on_time, resamples, seed)
    results["settings"] = {
        "window": localizer.window,
        "map_fps": localizer.map_fps,
        "on_time": on_time,
        "threshold": localizer.threshold if localizer.has_threshold else None,
        "resamples": resamples,
        "seed": seed,
        "infer_image_size": localizer.model.infer_image_size,
        **localizer.trained.inference,
    }
    results["films"], results["steps"] = len(films), len(moments)
    return results, rows


def _clip(root: Path, name: str) -> Path:
    return root / CLIPS / f"{name}.mp4"


def _seen(step: Step, has_threshold: bool) -> Seen:
    height, width = step.image.shape[:2]
    lit = step.lit if has_threshold else math.nan
    return Seen((step.peak.x + 0.5) / width, (step.peak.y + 0.5) / height, lit)


def _row(moment: Moment, seen: Seen) -> dict[str, Any]:
    state = "pause" if moment.turn < 0 else "outside" if moment.source is None else "sounding"
    box = moment.source or [None] * 4
    return {"film": moment.film, "time": round(moment.time, 3), "state": state, "turn": moment.turn,
            "peak_x": seen.x, "peak_y": seen.y, "lit": seen.lit,
            **dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))}  # fmt: skip


def publish_films(results: dict[str, Any], rows: list[dict], folder: Path, **about: Any) -> None:
    """Write results.json and per_step.csv, and print the table."""
    results = {**about, **results, "provenance": provenance()}
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_together({folder / "per_step.csv": text.getvalue(), folder / "results.json": json_text(results)})
    print(films_table(results))
    print(f"written: {folder / 'results.json'}, {folder / 'per_step.csv'}\n")


def films_table(results: dict[str, Any]) -> str:
    """The figures as plain text, with their 95 % intervals below; `-` where undefined."""

    def cell(value: Any, unit: str) -> str:
        if isinstance(value, list):
            return f"{cell(value[0], unit)} to {cell(value[1], unit)}"
        if not isinstance(value, int | float) or not math.isfinite(value):
            return "-"
        return f"{100 * value:.1f}" if unit == "%" else f"{value:.2f}"

    lines = []
    for name, figures in results["maps"].items():
        lines.append([name, *(cell(figures.get(key), unit) for key, (_, unit) in FIGURES.items())])
        if spans := results["intervals"].get(name):
            lines.append(["  95 %", *(cell(spans.get(key), unit) for key, (_, unit) in FIGURES.items())])
    for name, figures in results["references"].items():
        lines.append([name.replace("_", " "), *(cell(figures[key], unit) for key, (_, unit) in FIGURES.items())])
    heads = ["map", *(f"{head}, {unit}" for head, unit in FIGURES.values())]
    settings = results["settings"]
    threshold = (
        "none: python -m scoring.threshold chooses one"
        if settings["threshold"] is None
        else (f"{settings['threshold']:.4g}")
    )
    return "\n".join([
        f"{results.get('testset', 'films')}: {results['films']} films, {results['steps']} steps",
        "",
        tabulate(lines, heads, colalign=["left", *["right"] * len(FIGURES)], disable_numparse=True),
        "",
        f"window {settings['window']:g} s, {settings['map_fps']:g} maps per second; threshold of AUD_share {threshold}",
        f"on time: within {settings['on_time']:g} s, half the window and a step; {HELD}: windows that do not overlap",
    ])  # fmt: skip
