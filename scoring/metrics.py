"""Metrics on localization maps and ground truth; knows neither models nor data sets.

Letters: B batch, H x W pixels (224 x 224 in every published protocol), n = H * W, h x w tokens of a map, N samples. A
*map* is a float tensor, larger where the sound comes from; G, the *truth*, is the box or mask map in [0, 1] (fractions
where annotators disagree); P, the *region*, is the Boolean set of pixels that a map predicts. Which pixels are P is a
rule, and numbers of different rules are never compared:

    fixed      map >= 0.6 after min-max          (the released code of joint slot attention)
    half       the upper half of the pixels      (LVS, EZ-VSL, FNAC, SSLalignment)
    adaptive   as many pixels as G has           (it knows the true area: an oracle's help)

A constant map predicts nothing under every rule: `normalize_maps` makes it 0 everywhere. Scores are fractions of 1.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from maps import MAP_SIZE

THRESHOLD = 0.6  # of the rule `fixed`, on min-max normalised maps
TIED_SHARE = 0.01  # more pixels than this share exactly at a cut: the region depends on the ties
RULES = {"fixed": "", "half": "_half", "adaptive": "_adaptive"}  # rule: what ends the names of its scores

IOU_BARS = (0.3, 0.5, 0.75)  # of detection: a region is right from this IoU on
JACCARD_THRESHOLDS = [step / 20 for step in range(1, 20)]  # 0.5 is the headline, never the best of them
F_THRESHOLDS = np.linspace(0, 1 - 1e-10, 255)
F_BETA_SQUARED = 0.3

Groups = dict[str, list[int]]  # image: indices of its samples


# ---------------------------------------------------------------- predicted regions, of normalised maps


def sort_pixels(maps: Tensor) -> Tensor:
    """(B, H, W) -> (B, n), each map's pixels in ascending order: what every cut, and average precision, reads."""
    rows = maps.detach().flatten(1).cpu().numpy()  # NumPy sorts many times faster than torch on a CPU
    return torch.from_numpy(np.sort(rows, axis=1)).to(maps.device)


def cut_half(ascending: Tensor) -> Tensor:
    """Sorted pixels (B, n) -> (B,): the value at n // 2. The region lies strictly above."""
    return ascending[:, ascending.shape[1] // 2]


def cut_adaptive(ascending: Tensor, truth: Tensor) -> Tensor:
    """Sorted pixels (B, n), truth (B, H, W) -> (B,): the value at n - k, k pixels with G != 0; infinity for k = 0."""
    beyond = ascending.new_full((len(ascending), 1), math.inf)
    index = (truth == 0).flatten(1).sum(1, keepdim=True)
    return torch.cat([ascending, beyond], 1).gather(1, index)[:, 0]


def tied_share(maps: Tensor, cut: Tensor) -> Tensor:
    """(B, H, W), (B,) -> (B,): share of the pixels exactly at the cut. Above 1 % (binary maps) ties make the region."""
    return (maps == cut[:, None, None]).flatten(1).float().mean(1)


def region_above(maps: Tensor, cut: Tensor) -> Tensor:
    """(B, H, W), (B,) -> (B, H, W) bool: strictly above the cut."""
    return maps > cut[:, None, None]


def region_fixed(maps: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Rule `fixed`: (B, H, W) -> (B, H, W) bool, map >= threshold, a number above 0."""
    return maps >= threshold


# ---------------------------------------------------------------- scores of one sample


def consensus_iou(region: Tensor, truth: Tensor) -> Tensor:
    """Consensus intersection over union, sum(P G) / (sum(G) + sum(P where G = 0)) (Senocak et al., CVPR 2018).

    region (B, H, W) bool, truth (B, H, W) in 0..1 -> (B,) float64 in 0..1; 0 for an empty G. ValueError if shapes
    differ.
    """
    _same_shape(region, truth)
    inside, whole = np.zeros(len(truth)), np.zeros(len(truth))
    regions, weights = region.flatten(1).cpu().numpy(), truth.flatten(1).cpu().numpy()
    for i, (taken, weight) in enumerate(zip(regions, weights, strict=True)):  # row by row: it stays in the cache
        inside[i] = np.dot(weight, taken.astype(weight.dtype))  # exact: weights are 0, 1/2 and 1
        whole[i] = weight.sum() + np.count_nonzero(taken & (weight == 0))
    return torch.from_numpy(inside / np.maximum(whole, 1e-12)).to(truth.device)


def pixel_average_precision(maps: Tensor, truth: Tensor, ascending: Tensor | None = None) -> Tensor:
    """Average precision of the pixels against G >= 0.5, as scikit-learn's `average_precision_score` defines it.

    (B, H, W) twice; ascending: `sort_pixels(maps)` where it is known -> (B,) float64 in 0..1: the mean over the pixels
    of G of the precision at their value, which ties share. NaN where no pixel of G reaches 0.5 (scikit-learn gives 0
    and warns; a summary counts 0).
    """
    precisions = []
    for pixels, own in _sorted_pixels(maps, truth >= 0.5, ascending):
        hits = own.size - np.searchsorted(own, own)  # pixels of G at least as large as each pixel of G
        taken = pixels.size - np.searchsorted(pixels, own)  # all pixels at least as large
        precisions.append((hits / taken).mean() if own.size else math.nan)
    return torch.tensor(precisions, dtype=torch.float64, device=maps.device)


def _sorted_pixels(maps: Tensor, inside: Tensor, ascending: Tensor | None = None):
    """Per sample of (B, H, W) its pixels, and those in `inside`, as ascending arrays."""
    _same_shape(maps, inside)
    ascending = sort_pixels(maps) if ascending is None else ascending
    rows, masks = maps.detach().flatten(1).cpu().numpy(), inside.flatten(1).cpu().numpy()
    for pixels, row, mask in zip(ascending.cpu().numpy(), rows, masks, strict=True):
        yield pixels, np.sort(row[mask])


def region_average_precision(region: Tensor, truth: Tensor) -> Tensor:
    """`pixel_average_precision` of the map that is 1 in the region and 0 elsewhere: (B, H, W) twice -> (B,) float64."""
    _same_shape(region, truth)
    own, inside = ((truth >= 0.5).flatten(1), region.flatten(1))
    size, hits, pixels = own.sum(1).double(), (own & inside).sum(1).double(), own.shape[1]
    within = hits * hits / inside.sum(1).clamp(min=1)
    return (within + (size - hits) * size / pixels) / size  # 0 / 0 is NaN: no pixel of G reaches 0.5


def pointing(maps: Tensor, truth: Tensor) -> Tensor:
    """(B, H, W) twice -> (B,) bool: the largest pixel lies in G >= 0.5 (the pointing game, Zhang et al., ECCV 2016).

    maps: normalised. Where several pixels are largest, all must lie in G; a constant map never points.
    """
    _same_shape(maps, truth)
    peak = maps.flatten(1).amax(1)
    largest = maps == peak[:, None, None]
    return ~(largest & (truth < 0.5)).flatten(1).any(1) & (peak > 0)


def jaccard(maps: Tensor, masks: Tensor, ascending: Tensor | None = None) -> Tensor:
    """AVSBench's IoU of a frame, |P and M| / |P or M| with P = map > threshold (Zhou et al., ECCV 2022).

    maps (B, H, W) in 0..1, masks (B, H, W), any non-zero pixel is M -> (B, 19) float64, one column for each of
    JACCARD_THRESHOLDS, 0.05 ... 0.95. A frame with an empty M scores |not P| / n.
    """
    scores = []
    for pixels, own in _sorted_pixels(maps, masks != 0, ascending):
        region = pixels.size - np.searchsorted(pixels, JACCARD_THRESHOLDS, side="right")
        both = own.size - np.searchsorted(own, JACCARD_THRESHOLDS, side="right")
        scores.append(both / (region + own.size - both) if own.size else 1 - region / pixels.size)
    return torch.from_numpy(np.stack(scores)).to(maps.device)


def f_scores(maps: Tensor, masks: Tensor, ascending: Tensor | None = None) -> Tensor:
    """AVSBench's F of a frame, beta^2 = 0.3, with P = map >= threshold (Zhou et al., ECCV 2022).

    maps (B, H, W) in 0..1, masks (B, H, W), any non-zero pixel is M -> (B, 255) float64, one column for each of
    F_THRESHOLDS; undefined is 0, so an empty M has zeros, and so has a constant map, which predicts nothing. A set's F
    is the maximum of the mean over its frames with a mask.
    """
    scores = []
    for pixels, own in _sorted_pixels(maps, masks != 0, ascending):
        region = (pixels.size - np.searchsorted(pixels, F_THRESHOLDS)) * (pixels[0] < pixels[-1])
        both = own.size - np.searchsorted(own, F_THRESHOLDS)
        # (1 + b) precision recall / (b precision + recall), with precision = both / region, recall = both / |M|
        scores.append((1 + F_BETA_SQUARED) * both * (region > 0) / np.maximum(F_BETA_SQUARED * own.size + region, 1))
    return torch.from_numpy(np.stack(scores)).to(maps.device)


def _same_shape(maps: Tensor, truth: Tensor) -> None:
    if maps.shape != truth.shape or maps.dim() != 3:
        raise ValueError(f"maps {tuple(maps.shape)} and truth {tuple(truth.shape)} must both be (B, H, W)")


# ---------------------------------------------------------------- scores of a set


def success_rate(ious: Tensor, at: float = 0.5) -> float:
    """Share of the (N,) values that reach `at`: cIoU at 0.5. NaN for N = 0."""
    return (torch.as_tensor(ious) >= at).double().mean().item()


def area_under_curve(ious: Tensor) -> float:
    """Area under `success_rate` at x = 0, 0.05 ... 1 by trapezoids, of (N,) IoUs; in 0..1, NaN for N = 0."""
    rates = [success_rate(ious, step / 20) for step in range(21)]
    return (sum(rates) - (rates[0] + rates[-1]) / 2) / 20


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
    ascending = np.sort(confidence)
    precision, recall = _precision_recall(
        ious, confidence, has_source, ascending[:-1][:: -max(1, len(ascending) // 200)], bar
    )
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    scores = {"AP": float((best_from_here[:-1] * np.diff(recall)).sum())}
    for name, step in (("max_F1", 1), ("max_F1_11", max(1, len(ascending) // 10))):
        precision, recall = _precision_recall(ious, confidence, has_source, ascending[::step], bar)
        scores[name] = float((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max(initial=0))
    return scores


def _precision_recall(ious, confidence, has_source, cuts, bar) -> tuple[np.ndarray, np.ndarray]:
    """At every cut of the confidence; 1 where the denominator is 0."""
    order = np.argsort(confidence, kind="stable")
    below = np.searchsorted(confidence[order], cuts)  # pairs that are not confident
    right, missable = (
        np.concatenate([[0], np.cumsum(flags[order])]) for flags in (has_source & (ious >= bar), has_source)
    )
    hits, misses, confident = right[-1] - right[below], missable[below], len(order) - below
    precision, recall = np.ones(len(below)), np.ones(len(below))
    np.divide(hits, confident, out=precision, where=confident > 0)
    np.divide(hits, hits + misses, out=recall, where=hits + misses > 0)
    return precision, recall


def interactive_groups(ids: Sequence[str], expected: Sequence[str] | None = None) -> Groups:
    """Group the indices of `ids` by image, the id up to its last underscore: {image: [index, ...]}.

    Only images with at least two entries stay. With `expected`, every id that the set should hold, images of which an
    entry is missing drop out, too.
    """

    def by_image(names: Sequence[str]) -> Groups:
        groups = {}
        for index, name in enumerate(names):
            groups.setdefault(name.rpartition("_")[0] or name, []).append(index)
        return groups

    complete = by_image(ids if expected is None else expected)
    return {
        image: group
        for image, group in by_image(ids).items()
        if len(group) > 1 and len(group) == len(complete.get(image, ()))
    }


def every(values: Tensor, groups: Groups) -> Tensor:
    """(N,) values -> (images,): per image the smallest one, so that a threshold holds for every sound of the image."""
    if not groups:
        return values[:0]
    return torch.stack([values[group].amin() for group in groups.values()])


# ---------------------------------------------------------------- references that need no model


def ceiling_iou(truth: Tensor, rule: str) -> Tensor:
    """(B, H, W) truth -> (B,) float64: the largest consensus IoU that any map without tied pixels reaches under a rule.

    `fixed` allows any region, so 1 for a non-empty G; `half` has exactly n - 1 - n // 2 pixels and `adaptive` k - 1
    (both lie strictly above their cut), best spent on the heaviest pixels of G. 0 for an empty G. ValueError for
    another rule.
    """
    weights = truth.flatten(1)
    total, covered, pixels = weights.sum(1, dtype=torch.float64), (weights != 0).sum(1), weights.shape[1]
    if rule == "fixed":
        inside, size = total, covered
    elif rule == "adaptive":
        lightest = weights.masked_fill(weights == 0, math.inf).amin(1).masked_fill(covered == 0, 0)
        inside, size = total - lightest, (covered - 1).clamp(min=0)
    elif rule == "half":
        cut = cut_half(sort_pixels(truth))  # the pixels above it and, as far as there is room, pixels of its weight
        heavier = weights > cut[:, None]
        size = torch.full_like(covered, pixels - 1 - pixels // 2)
        inside = (weights * heavier).sum(1, dtype=torch.float64) + (size - heavier.sum(1)) * cut.double()
    else:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
    return inside / (total + (size - covered).clamp(min=0)).clamp(min=1e-12)


def centred_disc(height: int = MAP_SIZE, width: int = MAP_SIZE) -> Tensor:
    """(height, width) bool: the centred disc of half the picture's area; a pixel counts when its centre lies within."""
    y = torch.arange(height, dtype=torch.float64) - (height - 1) / 2
    x = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    return y[:, None] ** 2 + x[None, :] ** 2 <= height * width / (2 * math.pi)
