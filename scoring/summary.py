"""From per-sample columns to the figures of a test set, with bootstrap intervals; knows neither models nor data sets.

B batch, H x W pixels, N samples, U units (what a bootstrap resamples: images, or videos whose frames share a sound). A
*figure* is a ratio of two sums over samples, so one resample of all figures is a matrix product. Fractions of 1.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from scoring.metrics import (
    IOU_BARS,
    JACCARD_THRESHOLDS,
    RULES,
    THRESHOLD,
    TIED_SHARE,
    Groups,
    ceiling_iou,
    centred_disc,
    consensus_iou,
    cut_adaptive,
    cut_half,
    detection_scores,
    f_scores,
    jaccard,
    pixel_average_precision,
    pointing,
    region_above,
    region_average_precision,
    region_fixed,
    sort_pixels,
    tied_share,
)

RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles
CHUNK = 2**22  # draws of a bootstrap that are in memory at once
SIZES = {"under 32x32": 32**2, "32x32 to 96x96": 96**2, "96x96 to 144x144": 144**2, "larger": math.inf}

Columns = Mapping[str, np.ndarray]  # name: (N,), or (N, thresholds)


class Figure(NamedTuple):
    """sum(numerator) / sum(denominator) over samples; with several numerators per sample the largest of the ratios."""

    numerator: np.ndarray  # (N,), or (N, T)
    denominator: np.ndarray  # (N,)

    def value(self) -> float:
        total = self.denominator.sum()
        return float((self.numerator.sum(0) / total).max()) if total else math.nan


# ---------------------------------------------------------------- per-sample columns


class Table:
    """Columns that grow batch by batch."""

    def __init__(self) -> None:
        self._parts: list[dict[str, np.ndarray]] = []

    def extend(self, columns: Mapping[str, Tensor | np.ndarray | Sequence]) -> None:
        """Append {name: B values}; the names are the same in every call."""
        self._parts.append({name: np.asarray(torch.as_tensor(values).cpu()) for name, values in columns.items()})

    def columns(self, order: np.ndarray | slice = slice(None)) -> dict[str, np.ndarray]:
        """{name: (N, ...)} in the order in which the samples came, or in another."""
        names = self._parts[0] if self._parts else ()
        return {name: np.concatenate([part[name] for part in self._parts])[order] for name in names}


def map_columns(maps: Tensor, truth: Tensor, masks: bool = False, threshold: float = THRESHOLD) -> dict[str, Tensor]:
    """Score one kind of map of a batch: maps (B, H, W), upsampled and normalised; truth (B, H, W) in 0..1.

    -> iou, iou_half, iou_adaptive, tied_half, tied_adaptive (share of pixels at the cut), average_precision, pointing;
    with `masks` AVSBench's jaccard (B, 19) and f (B, 255), too. threshold: of the rule `fixed`.
    """
    ascending = sort_pixels(maps)
    columns = {"iou": consensus_iou(region_fixed(maps, threshold), truth)}
    for rule, cut in {"half": cut_half(ascending), "adaptive": cut_adaptive(ascending, truth)}.items():
        columns["iou" + RULES[rule]] = consensus_iou(region_above(maps, cut), truth)
        columns["tied" + RULES[rule]] = tied_share(maps, cut)
    columns["average_precision"] = pixel_average_precision(maps, truth, ascending)
    columns["pointing"] = pointing(maps, truth)
    if masks:
        columns |= {"jaccard": jaccard(maps, truth, ascending), "f": f_scores(maps, truth, ascending).float()}
    return columns


def reference_columns(truth: Tensor, masks: bool = False) -> dict[str, dict[str, Tensor]]:
    """What truth (B, H, W) gives away without any model -> {"ceiling" | "whole_frame" | "centred_disc": columns}.

    Frame and disc are regions, the same P under every rule; the ceiling takes G itself where no rule limits it.
    """
    disc = centred_disc(*truth.shape[1:]).to(truth.device).expand_as(truth)
    regions = {"ceiling": truth >= 0.5, "whole_frame": torch.ones_like(disc), "centred_disc": disc}
    references = {}
    for name, region in regions.items():
        given = consensus_iou(region, truth)
        references[name] = {
            "iou" + suffix: ceiling_iou(truth, rule) if name == "ceiling" else given for rule, suffix in RULES.items()
        }
        references[name]["average_precision"] = region_average_precision(region, truth)
        if masks:
            as_map = region.float()
            as_map[:, 0, 0] += 1e-6  # so that the whole frame is no constant map, which would predict nothing
            references[name] |= {"jaccard": jaccard(as_map, truth), "f": f_scores(as_map, truth).float()}
    return references


# ---------------------------------------------------------------- figures of a set


def figures_of(columns: Columns, empty: np.ndarray, groups: Groups | None = None) -> dict[str, Figure]:
    """Every figure that the columns of one map allow; empty (N,) bool, where G is; `groups` adds the interactive ones.

    Of the rule `fixed`: cIoU, AUC, mean_iou, cIoU_sounding (without the samples whose G is empty; cIoU counts them as
    misses), with groups IIoU and IAUC; of another rule the same names and its suffix. mAP (an empty G counts 0),
    pointing, with groups both_pointing; AVSBench's mIoU and F.
    """
    everywhere = np.ones(len(empty))
    figures = {}
    for suffix in RULES.values():
        if "iou" + suffix not in columns:
            continue
        ious = columns["iou" + suffix]
        figures[f"cIoU{suffix}"] = Figure(ious >= 0.5, everywhere)
        figures[f"AUC{suffix}"] = Figure(area_under_steps(ious), everywhere)
        figures[f"mean_iou{suffix}"] = Figure(ious, everywhere)
        figures[f"cIoU{suffix}_sounding"] = Figure((ious >= 0.5) & ~empty, ~empty)
        if groups is not None:
            worst, first = _by_image(ious, groups)
            figures[f"IIoU{suffix}"] = Figure((worst >= 0.5) & first, first)
            figures[f"IAUC{suffix}"] = Figure(area_under_steps(worst) * first, first)
    if "average_precision" in columns:
        figures["mAP"] = Figure(np.nan_to_num(columns["average_precision"]), everywhere)
    if "pointing" in columns:
        figures["pointing"] = Figure(columns["pointing"], everywhere)
        if groups is not None:
            worst, first = _by_image(columns["pointing"], groups)
            figures["both_pointing"] = Figure(worst & first, first)
    if "jaccard" in columns:
        figures["mIoU"] = Figure(columns["jaccard"][:, JACCARD_THRESHOLDS.index(0.5)], everywhere)
        figures["F"] = Figure(columns["f"] * ~empty[:, None], ~empty)
    return figures


def area_under_steps(ious: np.ndarray) -> np.ndarray:
    """(N,) IoUs -> (N,): each one's part in `metrics.area_under_curve`, whose mean over samples it is."""
    reached = (np.asarray(ious)[:, None] >= np.arange(21) / 20).astype(float)
    return (reached.sum(1) - (reached[:, 0] + reached[:, -1]) / 2) / 20


def _by_image(values: np.ndarray, groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """The smallest value of every image, in the place of the image's first sample, and which places those are."""
    first = np.zeros(len(values), dtype=bool)
    first[[group[0] for group in groups.values()]] = True
    worst = np.zeros_like(values)
    for group in groups.values():
        worst[group[0]] = values[group].min()
    return worst, first


def resampled_counts(units: int, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each of U units is drawn in a bootstrap resample, in chunks (some resamples, U), the same per seed."""
    rng = np.random.default_rng(seed)
    chunk = max(1, min(resamples, CHUNK // max(units, 1)))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        draws = rng.integers(units, size=(size, units)) + units * np.arange(size)[:, None]
        yield np.bincount(draws.ravel(), minlength=size * units).reshape(size, units)


def bootstrap(
    figures: Mapping[str, Figure], units: Sequence[str], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:
    """Resample the units (N >= 1 labels) -> {figure: (resamples,) values}, NaN where a resample leaves it undefined."""
    labels, unit_of = np.unique(np.asarray(units), return_inverse=True)
    tops = [figure.numerator.reshape(len(unit_of), -1) for figure in figures.values()]
    widths = [top.shape[1] for top in tops]
    first = np.cumsum([0, *widths[:-1]])  # each figure's first column
    top, bottom = np.zeros((len(labels), sum(widths))), np.zeros((len(labels), len(tops)))
    np.add.at(top, unit_of, np.concatenate(tops, 1))
    np.add.at(bottom, unit_of, np.stack([figure.denominator for figure in figures.values()], 1))
    drawn = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for counts in resampled_counts(len(labels), resamples, seed):
            counts = counts.astype(float)
            ratios = (counts @ top) / np.repeat(counts @ bottom, widths, axis=1)
            drawn.append(np.maximum.reduceat(ratios, first, axis=1))
    return dict(zip(figures, np.concatenate(drawn).T, strict=True))


def interval(values: np.ndarray) -> list[float]:
    """Bootstrap values -> [low, high] of the 95 % interval; NaN where none is defined."""
    values = values[np.isfinite(values)]
    return [float(v) for v in np.percentile(values, INTERVAL)] if len(values) else [math.nan, math.nan]


def summarise(
    figures: Mapping[str, Mapping[str, Figure]], units: Sequence[str], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict[str, dict]]:
    """{map: {metric: Figure}} -> {"maps": {map: {metric: value}}, "intervals": {map: {metric: [low, high]}}}.

    All maps are resampled together, so their differences may be taken, too. No intervals for 0 resamples.
    """
    values = {name: {metric: figure.value() for metric, figure in row.items()} for name, row in figures.items()}
    if not resamples:
        return {"maps": values, "intervals": {}}
    flat = {(name, metric): figure for name, row in figures.items() for metric, figure in row.items()}
    drawn = bootstrap(flat, units, resamples, seed)
    intervals = {name: {metric: interval(drawn[name, metric]) for metric in row} for name, row in figures.items()}
    return {"maps": values, "intervals": intervals}


def size_names(areas: np.ndarray) -> np.ndarray:
    """Pixels of G at 224 x 224, (N,) -> (N,) names of `SIZES`, "empty" for none."""
    index = np.searchsorted(list(SIZES.values()), areas, side="right")
    return np.where(areas == 0, "empty", np.array(list(SIZES))[index])


def count_tied(maps: Mapping[str, Columns]) -> dict[str, dict[str, int]]:
    """{map: {"tied_half", "tied_adaptive": samples where over 1 % of the pixels tie at the cut}}; warns, too."""
    keys = ["tied" + suffix for suffix in RULES.values()]
    counts = {
        name: {key: int((columns[key] > TIED_SHARE).sum()) for key in keys if key in columns}
        for name, columns in maps.items()
    }
    for rule, key in zip(RULES, keys, strict=True):
        tied = [f"{count[key]} of {len(maps[name][key])} {name}" for name, count in counts.items() if count.get(key)]
        if tied:
            warnings.warn(
                f"rule {rule}: more than {TIED_SHARE:.0%} of the pixels tie at the cut in {', '.join(tied)} maps "
                "(constant or binary?)",
                stacklevel=2,
            )
    return counts


# ---------------------------------------------------------------- when nothing sounds


def detect(
    maps: Mapping[str, Columns],
    confidence: np.ndarray,
    has_source: np.ndarray,
    units: Sequence[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, list[float]]]]:
    """Figures of an extended set by map, for one confidence of the pairs, and the intervals of the headline ones.

    maps: columns with iou of every rule; confidence, has_source (N,). AP, max_F1, max_F1_11 at IoU 0.5, AP_30, AP_50,
    AP_75, each with the rule's suffix; presence_AP: average precision of the confidence for "the source is in view".
    Intervals: AP, max_F1, max_F1_11 of the rule `fixed`, presence_AP.
    """

    def headline(rows: np.ndarray | slice) -> dict[str, dict[str, float]]:
        sure, there = confidence[rows], has_source[rows]
        presence = float(average_precision_score(there, sure)) if there.any() else math.nan
        found = {name: detection_scores(columns["iou"][rows], sure, there) for name, columns in maps.items()}
        return {name: {**scores, "presence_AP": presence} for name, scores in found.items()}

    values = headline(slice(None))
    for name, columns in maps.items():
        for suffix in RULES.values():
            ious = columns["iou" + suffix]
            by_bar = {bar: detection_scores(ious, confidence, has_source, bar) for bar in (0.5, *IOU_BARS)}
            values[name] |= {f"AP_{100 * bar:.0f}{suffix}": by_bar[bar]["AP"] for bar in IOU_BARS}
            values[name] |= {metric + suffix: value for metric, value in by_bar[0.5].items()}
    unit_of = np.unique(np.asarray(units), return_inverse=True)[1]
    samples = np.arange(len(unit_of))
    drawn = [
        headline(np.repeat(samples, count[unit_of]))
        for counts in resampled_counts(unit_of.max() + 1, resamples, seed)
        for count in counts
    ]
    intervals = {
        name: {metric: interval(np.array([draw[name][metric] for draw in drawn])) for metric in drawn[0][name]}
        for name in (maps if drawn else ())
    }
    return values, intervals
