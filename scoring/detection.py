"""Detection on extended sets, where some pairs have no source in view, by a method's confidence that there is one.

N pairs. A confidence is any finite number, larger where the method is more certain; scores are fractions of 1.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.metrics import average_precision_score

from scoring.bootstrap import RESAMPLES, interval, resampled_counts
from scoring.metrics import RULES

IOU_BARS = (0.3, 0.5, 0.75)  # a region is right if its IoU reaches this


def detection_scores(
    ious: np.ndarray, confidence: np.ndarray, has_source: np.ndarray, bar: float = 0.5
) -> dict[str, float]:
    """AP, max_F1 and max_F1_11 of pairs of which some have no source in view (Mo and Morgado, NeurIPS 2022).

    (N,) each; has_source bool. A pair with a source is right when it is confident and its IoU reaches `bar`, a false
    positive when confident and wrong, a miss when not confident; without a source, a false positive when confident.
    ValueError for a confidence that is not finite.
    """
    if not np.isfinite(confidence).all():
        raise ValueError("a confidence is not finite")
    right, ascending = has_source & (ious >= bar), np.sort(confidence)
    precision, recall = _precision_recall(
        right, confidence, has_source, ascending[:-1][:: -max(1, len(ascending) // 200)]
    )
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    scores = {"AP": float((best_from_here[:-1] * np.diff(recall)).sum())}
    for name, step in (("max_F1", 1), ("max_F1_11", max(1, len(ascending) // 10))):
        precision, recall = _precision_recall(right, confidence, has_source, ascending[::step])
        scores[name] = float((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max(initial=0))
    return scores


def _precision_recall(right, confidence, has_source, cuts) -> tuple[np.ndarray, np.ndarray]:
    """At every cut of the confidence; 1 where the denominator is 0."""
    order = np.argsort(confidence, kind="stable")
    below = np.searchsorted(confidence[order], cuts)  # pairs that are not confident
    found, missable = (np.concatenate([[0], np.cumsum(flags[order])]) for flags in (right, has_source))
    hits, misses, confident = found[-1] - found[below], missable[below], len(order) - below
    precision, recall = np.ones(len(below)), np.ones(len(below))
    np.divide(hits, confident, out=precision, where=confident > 0)
    np.divide(hits, hits + misses, out=recall, where=hits + misses > 0)
    return precision, recall


def detect(
    ious: Mapping[str, Mapping[str, np.ndarray]],
    confidence: np.ndarray,
    has_source: np.ndarray,
    units: Sequence[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, list[float]]]]:
    """Figures of an extended set by map, for one confidence of the pairs, and the intervals of the headline ones.

    ious: {map: columns}, with `iou` of every rule among them; confidence, has_source (N,). AP, max_F1, max_F1_11 at IoU
    0.5, AP_30, AP_50, AP_75, each with the rule's suffix; presence_AP: average precision of the confidence for "the
    source is in view". Intervals: AP, max_F1, max_F1_11 of the rule `fixed`, presence_AP.
    """

    def headline(rows: np.ndarray | slice) -> dict[str, dict[str, float]]:
        sure, there = confidence[rows], has_source[rows]
        presence = float(average_precision_score(there, sure)) if there.any() else math.nan
        found = {name: detection_scores(columns["iou"][rows], sure, there) for name, columns in ious.items()}
        return {name: {**scores, "presence_AP": presence} for name, scores in found.items()}

    values = headline(slice(None))
    for name, columns in ious.items():
        for suffix in RULES.values():
            own = columns["iou" + suffix]
            by_bar = {bar: detection_scores(own, confidence, has_source, bar) for bar in IOU_BARS}
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
        for name in (ious if drawn else ())
    }
    return values, intervals
