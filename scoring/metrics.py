"""Scores of one sample: a localization map against its ground truth; knows neither models nor data sets.

Figures of a set are in `summary`. B batch, H x W pixels (224 x 224 in every published protocol), n = H * W, h x w
tokens of a map. A *map* is a float tensor, larger where the sound comes from; G, the *truth*, is the box or mask map in
[0, 1] (fractions where annotators disagree); P, the *region*, is the Boolean set of pixels that a map predicts. Which
pixels are P is a rule, and numbers of different rules are never compared:

    fixed      map >= 0.6 after min-max          (the released code of joint slot attention)
    half       the upper half of the pixels      (LVS, EZ-VSL, FNAC, SSLalignment)
    adaptive   as many pixels as G has           (uses the true area, as only an oracle could)

A constant map predicts nothing under every rule: `normalize_maps` makes it 0 everywhere. Scores are fractions of 1.
"""

import math

import numpy as np
import torch
from torch import Tensor

from maps import MAP_SIZE

THRESHOLD = 0.6  # of the rule `fixed`, on min-max normalised maps
RULES = {"fixed": "", "half": "_half", "adaptive": "_adaptive"}  # rule: what ends the names of its scores

IOU_STEPS = np.arange(21) / 20  # thresholds of the success curve, 0, 0.05 ... 1
JACCARD_THRESHOLDS = [step / 20 for step in range(1, 20)]  # 0.5 is the headline, never the best of them
F_THRESHOLDS = np.linspace(0, 1 - 1e-10, 255)
F_BETA_SQUARED = 0.3

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
    return precision_of_region(inside.sum(1), (own & inside).sum(1), own.sum(1), own.shape[1])


def precision_of_region(taken: Tensor, hits: Tensor, own: Tensor, pixels: int) -> Tensor:
    """`region_average_precision` by counts (B,): pixels of the region, of these in G >= 0.5, in G >= 0.5; of all."""
    own, hits = own.double(), hits.double()
    within = hits * hits / taken.clamp(min=1)
    return (within + (own - hits) * own / pixels) / own  # 0 / 0 is NaN: no pixel of G reaches 0.5


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


def success(ious: np.ndarray | Tensor, at: float = 0.5) -> np.ndarray | Tensor:
    """(N,) IoUs -> (N,) bool: which samples are localized at this IoU. Their share at 0.5 is a set's cIoU."""
    return ious >= at


def success_steps(ious: np.ndarray) -> np.ndarray:
    """(N,) IoUs -> (N, 21) bool: `success` at each of IOU_STEPS. Its mean over samples is the success curve."""
    return success(np.asarray(ious)[..., None], IOU_STEPS)


def area_under_success(ious: np.ndarray) -> np.ndarray:
    """(N,) IoUs -> (N,) in 0..1: the area under each sample's `success_steps` by trapezoids. AUC is its mean."""
    return area_under_steps(success_steps(ious))


def area_under_steps(steps: np.ndarray) -> np.ndarray:
    """What holds at each of IOU_STEPS, (..., 21) bool -> (...) in 0..1: the area below it by trapezoids."""
    heights = steps.astype(float)
    return (heights.sum(-1) - (heights[..., 0] + heights[..., -1]) / 2) / 20


def share_above(maps: Tensor, threshold: float) -> Tensor:
    """(B, H, W) -> (B,) float64 in 0..1: share of the pixels strictly above a threshold, how much of an image is lit.

    maps: absolute ones, never min-max normalised, or something is lit always. Under audio that nothing in view can
    cause this is pIA (Juanola et al., arXiv 2410.01020), a fraction here. ValueError for a NaN, which would count as
    dark, or an infinity.
    """
    bad = ~torch.isfinite(maps).flatten(1).all(1)
    if bad.any():
        raise ValueError(f"map {int(bad.nonzero()[0])} of the batch holds a value that is not finite")
    lit = (maps > threshold).flatten(1)
    return torch.from_numpy(np.count_nonzero(lit.cpu().numpy(), axis=1) / lit.shape[1]).to(maps.device)


def region_change(one: Tensor, other: Tensor) -> Tensor:
    """IoU of two regions of one image, (..., H, W) bool each -> (...) float64 in 0..1: 1 where both are empty.

    Of the regions that one image shows under two sounds it is the map change of Juanola et al. (arXiv 2410.01020): 1
    where the map stays as it was.
    """
    both, any_of_them = (np.asarray(x.flatten(-2).cpu()) for x in (one & other, one | other))
    shared, union = np.count_nonzero(both, axis=-1), np.count_nonzero(any_of_them, axis=-1)
    return torch.from_numpy(np.where(union == 0, 1.0, shared / np.maximum(union, 1)))


def _same_shape(maps: Tensor, truth: Tensor) -> None:
    if maps.shape != truth.shape or maps.dim() != 3:
        raise ValueError(f"maps {tuple(maps.shape)} and truth {tuple(truth.shape)} must both be (B, H, W)")


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
    """(height, width) bool: the centred disc of half the image's area; a pixel counts when its centre lies within."""
    y = torch.arange(height, dtype=torch.float64) - (height - 1) / 2
    x = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    return y[:, None] ** 2 + x[None, :] ** 2 <= height * width / (2 * math.pi)
