"""Metrics on localization maps, ground truth and embeddings; knows neither models nor data sets.

Letters: B batch, H x W pixels (224 x 224 in every published protocol), h x w tokens of a map, N samples, D channels. A
*map* is a float tensor, larger where the sound comes from; G, the *truth*, is the box or mask map in [0, 1] (fractions
where annotators disagree); P, the *region*, is the Boolean set of pixels that a map predicts. Which pixels are P is a
rule, and numbers of different rules are never compared:

    fixed      map >= 0.6 after min-max          (the released code of joint slot attention)
    half       the upper half of the pixels      (LVS, EZ-VSL, FNAC, SSLalignment)
    adaptive   as many pixels as G has           (it knows the true area: an oracle's help)

A constant map predicts nothing under every rule. Scores are fractions of 1.
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MAP_SIZE = 224  # pixels per side at which maps and ground truth are compared
THRESHOLD = 0.6  # of the rule `fixed`, on min-max normalised maps
CONSTANT_RANGE = 1e-6  # a map whose range is at most this share of its largest magnitude is constant
TIED_SHARE = 0.01  # more pixels than this share exactly at a cut: the region depends on the ties
TIED_COSINE = 1e-6  # cosine similarities that differ by less are rounding, and count as equal
RULES = {"fixed": "", "half": "_half", "adaptive": "_adaptive"}  # rule: what ends the names of its scores

Groups = dict[str, list[int]]  # image: indices of its samples


# ---------------------------------------------------------------- maps


def upsample_maps(maps: Tensor, size: int = MAP_SIZE, interpolation: str = "bicubic") -> Tensor:
    """Enlarge (B, h, w) maps to (B, size, size).

    "bicubic" (this method) has align_corners=False and no antialiasing; "bilinear" (LVS, EZ-VSL, FNAC, SSLalignment)
    has align_corners=True. Half-precision maps become float32. ValueError for another interpolation.
    """
    if interpolation not in ("bicubic", "bilinear"):
        raise ValueError(f"interpolation must be bicubic or bilinear, not {interpolation!r}")
    if maps.dtype not in (torch.float32, torch.float64):
        maps = maps.float()
    align_corners = interpolation == "bilinear"
    return F.interpolate(maps[:, None], (size, size), mode=interpolation, align_corners=align_corners)[:, 0]


def _range(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per sample the smallest value, the range and whether the map is constant, each (B,)."""
    low, high = maps.flatten(1).aminmax(dim=1)
    return low, high - low, high - low <= CONSTANT_RANGE * torch.maximum(low.abs(), high.abs())


def is_constant(maps: Tensor) -> Tensor:
    """(B, H, W) -> (B,) bool: the range is at most 1e-6 of the largest magnitude."""
    return _range(maps)[2]


def normalize_maps(maps: Tensor) -> Tensor:
    """Min-max normalise each (B, H, W) map to 0..1; a constant one becomes 0. ValueError for a NaN or an infinity."""
    low, span, constant = _range(maps)
    if not torch.isfinite(span).all():
        raise ValueError(
            f"map {int((~torch.isfinite(span)).nonzero()[0])} of the batch holds a value that is not finite"
        )
    span = span.masked_fill(constant, 1)
    normalised = (maps - low[:, None, None]) / span[:, None, None]
    return normalised.masked_fill(constant[:, None, None], 0)


# ---------------------------------------------------------------- predicted regions


def _ascending(maps: Tensor, indices: Sequence[int]) -> Tensor:
    """Per sample of (B, H, W) the value at an index of its ascending order -> (B,); infinity beyond the last."""
    rows = maps.detach().flatten(1).cpu().numpy()  # NumPy partitions and sorts many times faster than torch on a CPU
    values = [
        np.partition(row, index)[index] if index < row.size else math.inf
        for row, index in zip(rows, indices, strict=True)
    ]
    return torch.tensor(values, dtype=maps.dtype, device=maps.device)


def cut_half(maps: Tensor) -> Tensor:
    """(B, H, W) -> (B,): the value at n // 2 of the n pixels in ascending order. The region lies strictly above."""
    return _ascending(maps, [maps[0].numel() // 2] * len(maps))


def cut_adaptive(maps: Tensor, truth: Tensor) -> Tensor:
    """(B, H, W) twice -> (B,): the value at n - k in ascending order, k the pixels with G != 0; infinity for k = 0."""
    _same_shape(maps, truth)
    return _ascending(maps, (truth == 0).flatten(1).sum(1).tolist())


def tied_share(maps: Tensor, cut: Tensor) -> Tensor:
    """(B, H, W), (B,) -> (B,): share of the pixels exactly at the cut. Above 1 % (binary maps) ties make the region."""
    return (maps == cut[:, None, None]).flatten(1).float().mean(1)


def region_above(maps: Tensor, cut: Tensor) -> Tensor:
    """(B, H, W), (B,) -> (B, H, W) bool: strictly above the cut; nothing of a constant map."""
    return (maps > cut[:, None, None]) & ~is_constant(maps)[:, None, None]


def region_fixed(maps: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Rule `fixed`: normalised (B, H, W) maps -> (B, H, W) bool, map >= threshold."""
    return (maps >= threshold) & ~is_constant(maps)[:, None, None]


def region_half(maps: Tensor) -> Tensor:
    """Rule `half`: (B, H, W) -> (B, H, W) bool, strictly above `cut_half`, so at most n - 1 - n // 2 pixels."""
    return region_above(maps, cut_half(maps))


def region_adaptive(maps: Tensor, truth: Tensor) -> Tensor:
    """Rule `adaptive`: (B, H, W) twice -> (B, H, W) bool, strictly above `cut_adaptive`, at most k - 1 pixels."""
    return region_above(maps, cut_adaptive(maps, truth))


# ---------------------------------------------------------------- scores of one sample


def consensus_iou(region: Tensor, truth: Tensor) -> Tensor:
    """Consensus intersection over union, sum(P G) / (sum(G) + sum(P where G = 0)) (Senocak et al., CVPR 2018).

    region (B, H, W) bool, truth (B, H, W) in 0..1 -> (B,) float64 in 0..1; 0 for an empty G. ValueError if shapes
    differ.
    """
    _same_shape(region, truth)
    inside = (truth * region).flatten(1).sum(1, dtype=torch.float64)
    outside = (region & (truth == 0)).flatten(1).sum(1)
    return inside / (truth.flatten(1).sum(1, dtype=torch.float64) + outside).clamp(min=1e-12)


def pixel_average_precision(maps: Tensor, truth: Tensor) -> Tensor:
    """Average precision of the pixels against G >= 0.5, as scikit-learn's `average_precision_score` defines it.

    (B, H, W) twice -> (B,) float64 in 0..1: the mean over the pixels of G of the precision at their value, which
    ties share. NaN where no pixel of G reaches 0.5 (scikit-learn gives 0 and warns; `Scores.summary` counts 0).
    """
    _same_shape(maps, truth)
    precisions = []
    for row, positive in zip(
        maps.detach().flatten(1).cpu().numpy(), (truth >= 0.5).flatten(1).cpu().numpy(), strict=True
    ):
        ascending, own = np.sort(row), np.sort(row[positive])
        hits = own.size - np.searchsorted(own, own)  # pixels of G at least as large as each pixel of G
        taken = row.size - np.searchsorted(ascending, own)  # all pixels at least as large
        precisions.append((hits / taken).mean() if own.size else math.nan)
    return torch.tensor(precisions, dtype=torch.float64, device=maps.device)


def pointing(maps: Tensor, truth: Tensor) -> Tensor:
    """(B, H, W) twice -> (B,) bool: the largest pixel lies in G >= 0.5 (the pointing game, Zhang et al., ECCV 2016).

    Where several pixels are largest, all must lie in it; a constant map never points.
    """
    _same_shape(maps, truth)
    largest = maps == maps.amax((1, 2), keepdim=True)
    return ~(largest & (truth < 0.5)).flatten(1).any(1) & ~is_constant(maps)


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
        cut = cut_half(truth)  # the pixels above it and, as far as there is room, pixels of its weight
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


# ---------------------------------------------------------------- accumulators


class Scores:
    """Per-sample columns of one map over a test set, and their summary."""

    def __init__(self) -> None:
        self._parts = []

    def extend(self, columns: dict[str, Tensor]) -> None:
        """Append {name: (B,) tensor}; the names are the same in every call."""
        self._parts.append({name: column.cpu() for name, column in columns.items()})

    def columns(self) -> dict[str, Tensor]:
        """{name: (N,) tensor}, in the order in which the samples came."""
        names = self._parts[0] if self._parts else ()
        return {name: torch.cat([part[name] for part in self._parts]) for name in names}

    def summary(self, groups: Groups | None = None) -> dict[str, float]:
        """Flat dict of floats, as far as the columns go; `groups` (`interactive_groups`) adds the interactive scores.

        Of the rule `fixed`: cIoU, AUC, mean_iou, cIoU_sounding (without the samples whose G is empty; cIoU counts them
        as misses), with groups IIoU and IAUC; of another rule the same names and _half or _adaptive, and tied_*, the
        number of samples where more than 1 % of the pixels tie at the cut, with a warning. mAP (an empty G counts 0),
        pointing, with groups both_pointing; the numbers `samples`, `empty` and, with groups, `images`.
        """
        columns = self.columns()
        if not columns:
            return {"samples": 0}
        empty = columns["empty"]
        result = {"samples": len(empty), "empty": int(empty.sum())}
        for suffix in RULES.values():
            if "iou" + suffix in columns:
                result |= _summarise_ious(columns["iou" + suffix], empty, groups, suffix)
            if "tied" + suffix in columns:
                result["tied" + suffix] = _count_tied(columns["tied" + suffix], suffix)
        if "average_precision" in columns:
            result["mAP"] = columns["average_precision"].nan_to_num(0).mean().item()
        if "pointing" in columns:
            result["pointing"] = columns["pointing"].double().mean().item()
        if groups is not None:
            result["images"] = len(groups)
            if "pointing" in columns:
                result["both_pointing"] = every(columns["pointing"], groups).double().mean().item()
        return result


def _summarise_ious(ious: Tensor, empty: Tensor, groups: Groups | None, suffix: str) -> dict[str, float]:
    result = {
        f"cIoU{suffix}": success_rate(ious),
        f"AUC{suffix}": area_under_curve(ious),
        f"mean_iou{suffix}": ious.mean().item(),
        f"cIoU{suffix}_sounding": success_rate(ious[~empty]),
    }
    if groups is not None:
        worst = every(ious, groups)
        result |= {f"IIoU{suffix}": success_rate(worst), f"IAUC{suffix}": area_under_curve(worst)}
    return result


def _count_tied(shares: Tensor, suffix: str) -> int:
    tied = int((shares > TIED_SHARE).sum())
    if tied:
        warnings.warn(
            f"rule {suffix[1:]}: more than {TIED_SHARE:.0%} of the pixels tie at the cut in {tied} of "
            f"{len(shares)} maps (constant or binary maps?)",
            stacklevel=3,
        )
    return tied


class MapScores(Scores):
    """Scores of one kind of map (AUD, IQR, ...) under several rules, in one pass over a test set.

    rules: names of `RULES`; threshold: of the rule `fixed`. Columns: iou, iou_half, tied_half (by rule),
    average_precision, pointing, empty.
    """

    def __init__(self, rules: Sequence[str] = ("fixed", "half"), threshold: float = THRESHOLD) -> None:
        super().__init__()
        self.rules, self.threshold = rules, threshold

    def add(self, maps: Tensor, truth: Tensor) -> None:
        """Score a batch: maps (B, H, W), upsampled and normalised; truth (B, H, W) in 0..1."""
        columns = {}
        for rule in self.rules:
            if rule == "fixed":
                region = region_fixed(maps, self.threshold)
            else:
                cut = cut_half(maps) if rule == "half" else cut_adaptive(maps, truth)
                region = region_above(maps, cut)
                columns["tied" + RULES[rule]] = tied_share(maps, cut)
            columns["iou" + RULES[rule]] = consensus_iou(region, truth)
        columns["average_precision"] = pixel_average_precision(maps, truth)
        columns["pointing"] = pointing(maps, truth)
        columns["empty"] = _empty(truth)
        self.extend(columns)


class ReferenceScores:
    """What a set gives away without any model: the ceiling of each rule, the whole frame, the centred disc."""

    def __init__(self, rules: Sequence[str] = ("fixed", "half")) -> None:
        self.rules = rules
        self.scores = {name: Scores() for name in ("ceiling", "whole_frame", "centred_disc")}

    def add(self, truth: Tensor) -> None:
        """truth (B, H, W) in 0..1. A fixed region (frame, disc) is the same P under every rule."""
        disc = centred_disc(*truth.shape[1:]).to(truth.device)
        regions = {"whole_frame": torch.ones_like(disc), "centred_disc": disc}
        fixed = {name: consensus_iou(region.expand_as(truth), truth) for name, region in regions.items()}
        for name, scores in self.scores.items():
            ious = {
                "iou" + RULES[rule]: ceiling_iou(truth, rule) if name == "ceiling" else fixed[name]
                for rule in self.rules
            }
            scores.extend({**ious, "empty": _empty(truth)})

    def summary(self, groups: Groups | None = None) -> dict[str, dict[str, float]]:
        """{"ceiling" | "whole_frame" | "centred_disc": as `Scores.summary`, without mAP and pointing}."""
        return {name: scores.summary(groups) for name, scores in self.scores.items()}


def _empty(truth: Tensor) -> Tensor:
    return (truth == 0).flatten(1).all(1)


# ---------------------------------------------------------------- cross-modal retrieval


def partner_ranks(queries: Tensor, keys: Tensor, targets: Sequence | None = None, chunk: int = 1024) -> Tensor:
    """Rank of the best right key of every query by cosine similarity: (N, D) twice -> (N,) int64, 1 is best.

    Right is the key of the same index or, with `targets` (N labels), any key with the query's label. The rank is 1 +
    the number of wrong keys at least as similar (to 1e-6, in float64): ties rank last, so collapsed embeddings find
    nothing. Memory is chunk x N. ValueError where the shapes differ or an embedding is not finite (a NaN would compare
    as the best).
    """
    count = len(queries)
    if queries.shape != keys.shape or queries.dim() != 2:
        raise ValueError(f"embeddings {tuple(queries.shape)} and {tuple(keys.shape)} must both be (N, D)")
    if not (torch.isfinite(queries).all() and torch.isfinite(keys).all()):
        raise ValueError("an embedding holds a value that is not finite")
    labels = np.arange(count) if targets is None else np.unique(np.asarray(targets), return_inverse=True)[1]
    if len(labels) != count:
        raise ValueError(f"{len(labels)} targets for {count} embeddings")
    labels = torch.as_tensor(labels, device=queries.device)
    queries, keys = F.normalize(queries.double(), dim=1), F.normalize(keys.double(), dim=1)
    ranks = []
    for start in range(0, count, chunk):
        similarity = queries[start : start + chunk] @ keys.T
        right = labels[start : start + chunk, None] == labels[None, :]
        best = similarity.masked_fill(~right, -math.inf).amax(1, keepdim=True)
        ranks.append(1 + (~right & (similarity >= best - TIED_COSINE)).sum(1))
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64)


def retrieval_recall(
    image_embeddings: Tensor, audio_embeddings: Tensor, targets: Sequence | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, dict[str, float]]:
    """Recall at k in both directions: {"image_to_audio" | "audio_to_image": {"R@1": fraction, ...}}.

    image_embeddings, audio_embeddings (N, D); by pair, or by class with `targets`, N labels. Ties rank last:
    `partner_ranks`.
    """
    ranks = {
        "image_to_audio": partner_ranks(image_embeddings, audio_embeddings, targets),
        "audio_to_image": partner_ranks(audio_embeddings, image_embeddings, targets),
    }
    return {direction: {f"R@{k}": (rank <= k).double().mean().item() for k in ks} for direction, rank in ranks.items()}


def retrieval_score(image_embeddings: Tensor, audio_embeddings: Tensor) -> float:
    """Mean percentile rank of the right partner over both directions: 1 best, about 0.5 chance, 0 collapsed.

    (N, D) twice. It needs no boxes, and so chooses a checkpoint without looking at a test set.
    """
    ranks = torch.cat(
        [partner_ranks(image_embeddings, audio_embeddings), partner_ranks(audio_embeddings, image_embeddings)]
    )
    return (1 - (ranks.double() - 1) / max(len(image_embeddings) - 1, 1)).mean().item()


# ---------------------------------------------------------------- wrong sounds


class Derangement(NamedTuple):
    """permutation (N,) int64: sample i gets the sound of permutation[i]; same_label: pairs that share a label."""

    permutation: np.ndarray
    same_label: int


def derangement(labels: Sequence, seed: int) -> Derangement:
    """Pair every sample with one of another label (class name, or id where classes are unknown), reproducibly.

    A random permutation, whose clashes are swapped with random samples that fit. Where one label holds more than half
    of the samples some pairs must share it: as few as possible, and no sample is its own partner. ValueError for fewer
    than 2.
    """
    labels = np.unique(np.asarray(labels), return_inverse=True)[1]
    count = len(labels)
    if count < 2:
        raise ValueError("a derangement needs at least two samples")
    rng = np.random.default_rng(seed)
    permutation = rng.permutation(count)

    def swap(i: int, allowed: np.ndarray) -> None:
        j = rng.choice(np.flatnonzero(allowed))
        permutation[[i, j]] = permutation[[j, i]]

    for i in np.flatnonzero(labels[permutation] == labels):
        fits = (labels != labels[i]) & (labels[permutation] != labels[i])
        if labels[permutation[i]] == labels[i] and fits.any():
            swap(i, fits)
    for i in np.flatnonzero(permutation == np.arange(count)):
        if permutation[i] == i:  # an earlier swap may have moved it
            swap(i, (labels == labels[i]) & (np.arange(count) != i))
    return Derangement(permutation, int((labels[permutation] == labels).sum()))
