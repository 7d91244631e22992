"""The printed figures of harder questions: negative audio, several sources, parts of a set, noise in the audio."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from scoring.negatives import NEGATIVES, OWN

SOURCE_COLUMNS = ("CIoU@0.3", "IoU@0.5", "AUC", "CAP", "PIAP", "CAP_median", "CAP_swapped")
SNR_COLUMNS = ("cIoU", "AUC", "pointing", "F_LOC")
PART_COLUMNS = ("cIoU", "AUC", "pointing", "cIoU_u", "TN_u")
CLEAN = "clean"


def percent(value: Any, sign: bool = False) -> str:
    """A fraction, or the two ends of an interval, in percent; `-` where it is undefined."""
    if isinstance(value, list | tuple):
        return f"{percent(value[0])} to {percent(value[1])}"
    known = isinstance(value, int | float) and math.isfinite(value)
    return f"{100 * value:{'+' if sign else ''}.1f}" if known else "-"


def harder_lines(results: Mapping[str, Any]) -> list[str]:
    """Tables of what there is, each after an empty line."""
    blocks: Sequence[Callable] = (negative_lines, robust_lines, source_lines, part_lines, snr_lines)
    return [line for block in blocks for line in block(results)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], labels: int = 1) -> list[str]:
    sides = ["left" if i < labels else "right" for i in range(len(heads))]
    return ["", *tabulate(rows, heads, colalign=sides, disable_numparse=True).splitlines()] if rows else []


def negative_lines(results: Mapping[str, Any]) -> list[str]:
    """F_LOC and so on of each absolute map, then what every negative lights up."""
    maps, spans = results.get("maps", {}), results.get("intervals", {})
    about = results.get("negatives", {})
    asked = [name for name, scores in maps.items() if "F_LOC" in scores]
    if not asked:
        return []
    head = ["negative audio", "threshold", "F_LOC", "(95 %)", "F_AUC", "cIoU_u", "AUC_u", "pIA", "(95 %)", "AUC_N"]
    lines, by_kind = [], []
    for name in asked:
        scores, ends = maps[name], {key: percent(end) for key, end in spans.get(name, {}).items()}
        threshold = about.get("thresholds", {}).get(name, {}).get("value")
        cells = {key: percent(scores[key]) for key in ("F_LOC", "F_AUC", "cIoU_u", "AUC_u", "pIA", "AUC_N")}
        shown = [cells["F_LOC"], ends.get("F_LOC", "-"), cells["F_AUC"], cells["cIoU_u"], cells["AUC_u"]]
        shown += [cells["pIA"], ends.get("pIA", "-"), cells["AUC_N"]]
        lines.append([name, "-" if threshold is None else f"{threshold:.4g}", *shown])
        for kind in (kind for kind in NEGATIVES if f"pIA_{kind}" in scores):
            lit, dark, same = (scores[key] for key in (f"pIA_{kind}", f"AUC_N_{kind}", f"change_{OWN}_{kind}"))
            by_kind.append([name, kind, percent(lit), ends.get(f"pIA_{kind}", "-"), percent(dark), percent(same)])
    text = _table(head, lines)
    text += _table(["map", "under", "pIA", "(95 %)", "AUC_N", "same as under own"], by_kind, labels=2)
    if "offscreen" in about.get("kinds", ()) and "offscreen" in about:
        seeds = about.get("seeds", [0])
        text.append(f"negative audio: off-screen is {about['offscreen']}; seeds {', '.join(map(str, seeds))}")
    for name, chosen in about.get("thresholds", {}).items():
        if chosen.get("from"):
            text.append(f"threshold of {name}: {chosen['from']}")
    return text


def robust_lines(results: Mapping[str, Any]) -> list[str]:
    """AVSBench-Robust: each absolute map under every sound, against the masks, at 0.5."""
    rows = []
    for name, scores in results.get("maps", {}).items():
        for kind in (OWN, *NEGATIVES):
            if f"FPR_{kind}" in scores:
                rows.append([name, kind, *(percent(scores[f"{figure}_{kind}"]) for figure in ("mIoU", "F", "FPR"))])
    return _table(["AVSBench-Robust, at 0.5", "under", "mIoU", "F", "FPR"], rows, labels=2)


def source_lines(results: Mapping[str, Any]) -> list[str]:
    maps = {name: scores for name, scores in results.get("maps", {}).items() if "CAP" in scores}
    rows = [[name, *(percent(scores.get(key)) for key in SOURCE_COLUMNS)] for name, scores in maps.items()]
    return _table(["several sources", *SOURCE_COLUMNS], rows)


def part_lines(results: Mapping[str, Any]) -> list[str]:
    rows = [
        [part, f"{found['samples']:,}", name, *(percent(scores.get(key)) for key in PART_COLUMNS)]
        for part, found in results.get("parts", {}).items()
        for name, scores in found["maps"].items()
        if name in main_maps(found["maps"])
    ]
    return _table(["part", "samples", "map", *PART_COLUMNS], rows, labels=3)


def snr_lines(results: Mapping[str, Any]) -> list[str]:
    """Figures of the main maps with noise added, after the clean ones."""
    noisy = results.get("snr", {})
    if not noisy:
        return []
    levels = {CLEAN: results, **{f"{level} dB": found for level, found in noisy.items()}}
    names = main_maps(results["maps"])
    columns = [key for key in SNR_COLUMNS if any(key in results["maps"][name] for name in names)]
    rows = [
        [name, level, *(percent(found["maps"][name].get(key)) for key in columns)]
        for name in names
        for level, found in levels.items()
    ]
    return _table(["map", "audio", *columns], rows, labels=2)


def main_maps(maps: Mapping[str, Any]) -> list[str]:
    """The maps that short tables show: AUD, AUD_share and IQR as far as there, else the first two."""
    return [name for name in ("AUD", "AUD_share", "IQR") if name in maps] or [*maps][:2]
