"""Detection on extended sets, where some pairs have no source in view, by a method's confidence that there is one.

N pairs. A confidence is any finite number, larger where the method is more certain; scores are fractions of 1.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from scoring.bootstrap import RESAMPLES, interval, resampled_counts
from scoring.metrics import RULES

IOU_BARS = (0.3, 0.5, 0.75)  # a region is right if its IoU reaches this


class Draw:
    """Pairs in ascending order of their confidence, each as often as it was drawn; equal ones are one group.

    A cut is a group's confidence: confident are the pairs of this group and of all above.
    """

    def __init__(self, confidence: "Confidence", counts: np.ndarray) -> None:
        """counts: (N,) how often each pair counts, 0 for those that a bootstrap resample leaves out."""
        self.confidence, self.counts = confidence, counts
        self.pairs, self.sources = (self.below(flags) for flags in (np.ones_like(counts), confidence.has_source))
        self.size = self.pairs[-1]
        self.confident, self.misses = self.size - self.pairs[:-1], self.sources[:-1]

    def below(self, flags: np.ndarray) -> np.ndarray:
        """(N,) bool -> (groups + 1,) how many flagged pairs lie below each group, and in all."""
        chosen = (flags * self.counts)[self.confidence.order]
        return np.concatenate([[0], np.cumsum(np.add.reduceat(chosen, self.confidence.starts))])

    def scores(self, right: np.ndarray) -> dict[str, float]:
        """AP, max_F1, max_F1_11; right: (N,) bool, pairs with a source whose IoU reaches the bar."""
        found = self.below(right)
        hits = found[-1] - found[:-1]
        precision, recall = np.ones(len(hits)), np.ones(len(hits))  # 1 where the denominator is 0
        np.divide(hits, self.confident, out=precision, where=self.confident > 0)
        np.divide(hits, hits + self.misses, out=recall, where=hits + self.misses > 0)
        places = self.groups(np.arange(self.size - 2, -1, -max(1, self.size // 200)))
        best_from_here = np.maximum.accumulate(precision[places][::-1])[::-1]
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        eleven = self.groups(np.arange(0, self.size, max(1, self.size // 10)))
        return {
            "AP": float((best_from_here[:-1] * np.diff(recall[places])).sum()),
            "max_F1": float(f1[np.diff(self.pairs) > 0].max()),
            "max_F1_11": float(f1[eleven].max()),
        }

    def groups(self, places: np.ndarray) -> np.ndarray:
        """Places in the ascending order of all pairs drawn -> the groups that hold them."""
        return np.searchsorted(self.pairs, places, side="right") - 1

    def presence(self) -> float:
        """Average precision of the confidence for "the source is in view", as scikit-learn defines it; NaN for none."""
        if not self.sources[-1]:
            return math.nan
        drawn = np.diff(self.pairs) > 0
        there = (self.sources[-1] - self.misses)[drawn]
        precision = there / self.confident[drawn]
        return float(max(0.0, -(np.diff(np.append(there / self.sources[-1], 0)) * precision).sum()))


class Confidence:
    """One confidence of N pairs, of which some have no source in view. ValueError where it is not finite."""

    def __init__(self, confidence: np.ndarray, has_source: np.ndarray) -> None:
        if not np.isfinite(confidence).all():
            raise ValueError("a confidence is not finite")
        self.has_source, self.order = has_source, np.argsort(confidence, kind="stable")
        ascending = confidence[self.order]
        self.starts = np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1]))

    def drawn(self, counts: np.ndarray | None = None) -> Draw:
        """Each pair as often as `counts` (N,) says; once without them."""
        return Draw(self, np.ones(len(self.order), dtype=int) if counts is None else counts)


def detection_scores(
    ious: np.ndarray, confidence: np.ndarray, has_source: np.ndarray, bar: float = 0.5
) -> dict[str, float]:
    """AP, max_F1 and max_F1_11 of pairs of which some have no source in view (Mo and Morgado, NeurIPS 2022).

    (N,) each; has_source bool. A pair with a source is right when it is confident and its IoU reaches `bar`, a false
    positive when confident and wrong, a miss when not confident; without a source, a false positive when confident.
    ValueError for a confidence that is not finite.
    """
    return Confidence(confidence, has_source).drawn().scores(has_source & (ious >= bar))


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

    ranked = Confidence(confidence, has_source)
    right = {name: has_source & (columns["iou"] >= 0.5) for name, columns in ious.items()}

    def headline(draw: Draw) -> dict[str, dict[str, float]]:
        presence = draw.presence()
        return {name: {**draw.scores(own), "presence_AP": presence} for name, own in right.items()}

    whole = ranked.drawn()
    values = headline(whole)
    for name, columns in ious.items():
        for suffix in RULES.values():
            by_bar = {bar: whole.scores(has_source & (columns["iou" + suffix] >= bar)) for bar in IOU_BARS}
            values[name] |= {f"AP_{100 * bar:.0f}{suffix}": by_bar[bar]["AP"] for bar in IOU_BARS}
            values[name] |= {metric + suffix: value for metric, value in by_bar[0.5].items()}
    unit_of = np.unique(np.asarray(units), return_inverse=True)[1]
    drawn = [
        headline(ranked.drawn(count[unit_of]))
        for counts in resampled_counts(unit_of.max() + 1, resamples, seed)
        for count in counts
    ]
    spans = {
        name: {metric: interval(np.array([draw[name][metric] for draw in drawn])) for metric in drawn[0][name]}
        for name in (ious if drawn else ())
    }
    return values, spans
