"""Figures of harder questions as tables: negative audio, several sources, parts of a set, noise in the audio.

The printed table and the page show the same blocks. All cells are texts, figures in %.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tabulate import tabulate

from scoring.negatives import NEGATIVES, OWN

SOURCE_COLUMNS = ("CIoU@0.3", "IoU@0.5", "AUC", "CAP", "PIAP", "CAP_median", "CAP_swapped")
SNR_COLUMNS = ("cIoU", "AUC", "pointing", "F_LOC")
PART_COLUMNS = ("cIoU", "AUC", "pointing", "cIoU_u", "TN_u")
CLEAN = "clean"


class Block(NamedTuple):
    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int  # so many first columns are words
    notes: Sequence[str] = ()


def percent(value: Any, sign: bool = False) -> str:
    """A fraction, or the two ends of an interval, in percent; `-` where it is undefined."""
    if isinstance(value, list | tuple):
        return f"{percent(value[0])} to {percent(value[1])}"
    known = isinstance(value, int | float) and math.isfinite(value)
    return f"{100 * value:{'+' if sign else ''}.1f}" if known else "-"


def blocks(results: Mapping[str, Any]) -> list[Block]:
    """The tables that the results allow, in order."""
    makers: Sequence[Callable[[Mapping], Block]] = (
        negative_block, kind_block, robust_block, source_block, part_block, snr_block,
    )  # fmt: skip
    return [block for block in (make(results) for make in makers) if block.rows]


def harder_lines(results: Mapping[str, Any]) -> list[str]:
    """The blocks as lines of text, each after an empty line."""
    lines = []
    for block in blocks(results):
        sides = ["left" if i < block.labels else "right" for i in range(len(block.heads))]
        text = tabulate(block.rows, block.heads, colalign=sides, disable_numparse=True)
        lines += ["", f"{block.title}, in %", *text.splitlines(), *block.notes]
    return lines


def negative_block(results: Mapping[str, Any]) -> Block:
    """F_LOC and its parts of each absolute map."""
    about, rows = results.get("negatives", {}), []
    heads = ("map", "threshold", "F_LOC", "(95 %)", "F_AUC", "cIoU_u", "AUC_u", "pIA", "(95 %)", "AUC_N")
    for name, scores in results.get("maps", {}).items():
        if "F_LOC" not in scores:
            continue
        ends = results.get("intervals", {}).get(name, {})
        threshold = about.get("thresholds", {}).get(name, {}).get("value")
        cells = {key: percent(scores[key]) for key in ("F_LOC", "F_AUC", "cIoU_u", "AUC_u", "pIA", "AUC_N")}
        found, lit = (percent(ends[key]) if key in ends else "-" for key in ("F_LOC", "pIA"))
        shown = [cells["F_LOC"], found, cells["F_AUC"], cells["cIoU_u"], cells["AUC_u"], cells["pIA"], lit]
        rows.append([name, "-" if threshold is None else f"{threshold:.4g}", *shown, cells["AUC_N"]])
    notes = []
    if "offscreen" in about.get("kinds", ()) and "offscreen" in about:
        notes.append(f"off-screen: {about['offscreen']}; seeds {', '.join(map(str, about['seeds']))}")
    given = {name: chosen.get("from") for name, chosen in about.get("thresholds", {}).items()}
    notes += [f"threshold of {name}: {source}" for name, source in given.items() if source]
    return Block(f"Negative audio: {', '.join(about.get('kinds', ()))}", heads, rows, 1, notes)


def kind_block(results: Mapping[str, Any]) -> Block:
    """What every negative lights up."""
    rows = []
    for name, scores in results.get("maps", {}).items():
        for kind in (kind for kind in NEGATIVES if f"pIA_{kind}" in scores):
            ends = results.get("intervals", {}).get(name, {}).get(f"pIA_{kind}")
            lit, dark, same = (scores[key] for key in (f"pIA_{kind}", f"AUC_N_{kind}", f"change_{OWN}_{kind}"))
            rows.append([name, kind, percent(lit), percent(ends), percent(dark), percent(same)])
    return Block("By negative", ("map", "under", "pIA", "(95 %)", "AUC_N", "same as under own"), rows, 2)


def robust_block(results: Mapping[str, Any]) -> Block:
    """AVSBench-Robust: each absolute map under every sound, against the masks, at 0.5."""
    rows = [
        [name, kind, *(percent(scores[f"{figure}_{kind}"]) for figure in ("mIoU", "F", "FPR"))]
        for name, scores in results.get("maps", {}).items()
        for kind in (OWN, *NEGATIVES)
        if f"FPR_{kind}" in scores
    ]
    return Block("AVSBench-Robust, map at 0.5 against the mask", ("map", "under", "mIoU", "F", "FPR"), rows, 2)


def source_block(results: Mapping[str, Any]) -> Block:
    maps = {name: scores for name, scores in results.get("maps", {}).items() if "CAP" in scores}
    rows = [[name, *(percent(scores.get(key)) for key in SOURCE_COLUMNS)] for name, scores in maps.items()]
    return Block("Several sources", ("map", *SOURCE_COLUMNS), rows, 1)


def part_block(results: Mapping[str, Any]) -> Block:
    rows = [
        [part, f"{found['samples']:,}", name, *(percent(found["maps"][name].get(key)) for key in PART_COLUMNS)]
        for part, found in results.get("parts", {}).items()
        for name in main_maps(found["maps"])
    ]
    return Block("By part of the set", ("part", "samples", "map", *PART_COLUMNS), rows, 3)


def snr_block(results: Mapping[str, Any]) -> Block:
    """Figures of the main maps with noise added, after the clean ones."""
    noisy = results.get("snr") or {}
    levels = {CLEAN: results, **{f"{level} dB": found for level, found in noisy.items()}}
    names = main_maps(results.get("maps", {}))
    columns = [key for key in SNR_COLUMNS if any(key in results["maps"][name] for name in names)]
    rows = [
        [name, level, *(percent(found["maps"][name].get(key)) for key in columns)]
        for name in names
        for level, found in levels.items()
    ]
    return Block("With white noise in the audio", ("map", "signal to noise", *columns), rows if noisy else [], 2)


def main_maps(maps: Mapping[str, Any]) -> list[str]:
    """The maps that short tables show: AUD, AUD_share and IQR as far as there, else the first two."""
    return [name for name in ("AUD", "AUD_share", "IQR") if name in maps] or [*maps][:2]
