"""All scores of a batch by name, each map's from one sort of its pixels.

B batch, H x W pixels, n = H * W, C cuts. `metrics` defines every score. Where G is 0, 1/2 or 1 everywhere, as every
annotation here gives it, all of them follow from how many pixels, and how many of G, are at least as large as some
cuts. One sort that carries G along gives these counts: on a CPU to the last bit what the definitions give, in a
fraction of the time. On a CUDA device the whole batch is sorted there.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import scoring.metrics as metrics
from scoring.metrics import F_BETA_SQUARED, F_THRESHOLDS, JACCARD_THRESHOLDS, RULES, THRESHOLD

KEYS = {4: np.uint32, 8: np.uint64}  # bytes of a pixel: integers of that size, which sort like numbers in 0..1


def map_columns(maps: Tensor, truth: Tensor, masks: bool = False, steps: Tensor | None = None) -> dict[str, Tensor]:
    """Score one kind of map of a batch: maps (B, H, W), upsampled and normalised; truth (B, H, W) in 0..1.

    -> iou, iou_half, iou_adaptive, tied_half, tied_adaptive (share of pixels at the cut), average_precision, pointing;
    with `masks` AVSBench's jaccard (B, 19) and f (B, 255), too. steps: `half_steps(truth)`, where it is known.
    """
    steps = half_steps(truth) if steps is None else steps
    in_range = bool(maps.min() >= 0 and maps.max() <= 1)  # no NaN is
    if steps is None or not in_range or maps.dtype not in CUTS:
        columns = _by_definition(maps, truth, masks)
    else:
        columns = _from_counts((_count_on_device if maps.is_cuda else _count)(maps, steps, masks), masks)
    return columns  # add a further score of each sample here: columns["name"] = metrics.name(maps, truth)


def half_steps(truth: Tensor) -> Tensor | None:
    """(B, H, W) in 0..1 -> 2 G as uint8; None where G is anything but 0, 1/2 and 1."""
    doubled = 2 * truth
    # NumPy converts ten times as fast
    steps = doubled.byte() if truth.is_cuda else torch.from_numpy(doubled.numpy().astype(np.uint8))
    return steps if bool((steps == doubled).all()) else None


def _by_definition(maps: Tensor, truth: Tensor, masks: bool) -> dict[str, Tensor]:
    ascending = metrics.sort_pixels(maps)
    columns = {"iou": metrics.consensus_iou(metrics.region_fixed(maps), truth)}
    cuts = {"half": metrics.cut_half(ascending), "adaptive": metrics.cut_adaptive(ascending, truth)}
    for rule, cut in cuts.items():
        columns["iou" + RULES[rule]] = metrics.consensus_iou(metrics.region_above(maps, cut), truth)
        columns["tied" + RULES[rule]] = metrics.tied_share(maps, cut)
    columns["average_precision"] = metrics.pixel_average_precision(maps, truth, ascending)
    columns["pointing"] = metrics.pointing(maps, truth)
    if masks:
        columns["jaccard"] = metrics.jaccard(maps, truth, ascending)
        columns["f"] = metrics.f_scores(maps, truth, ascending)
    return columns


# ---------------------------------------------------------------- from counts to scores


class _Counts(NamedTuple):
    """Of each sample and cut, pixels at least as large as the cut; the cuts are those of `_own_cuts` and CUTS."""

    region: Tensor  # (B, C) all of them
    inside: Tensor  # (B, C) those with G > 0
    doubled: Tensor  # (B, C) their sum of 2 G
    average_precision: Tensor  # (B,)
    own: Tensor  # (B,) pixels with G > 0
    weight: Tensor  # (B,) sum of 2 G
    lit: Tensor  # (B,) bool: the peak is above 0
    size: int  # n


def _least(thresholds: np.ndarray | list[float], kind: type) -> np.ndarray:
    """The smallest numbers of a kind that are at least the thresholds: pixels of that kind compare alike with both."""
    rounded = np.asarray(thresholds).astype(kind)
    return np.where(rounded < thresholds, np.nextafter(rounded, kind(math.inf)), rounded)


def _fixed_cuts(kind: type) -> np.ndarray:
    """Of rule `fixed`, of AVSBench's IoU (strictly above: at least the next number) and of its F."""
    above = np.nextafter(JACCARD_THRESHOLDS, math.inf)
    return np.concatenate([[kind(THRESHOLD)], _least(above, kind), _least(F_THRESHOLDS, kind)])


CUTS = {torch.float32: _fixed_cuts(np.float32), torch.float64: _fixed_cuts(np.float64)}
OWN_CUTS = 5  # of `_own_cuts`, which come first
IOU_CUTS = {"fixed": OWN_CUTS, "half": 1, "adaptive": 3}  # column of each rule's region
JACCARD = slice(OWN_CUTS + 1, OWN_CUTS + 1 + len(JACCARD_THRESHOLDS))
F = slice(JACCARD.stop, None)


def _cuts(pixels: Tensor, own: Tensor, masks: bool) -> Tensor:
    """Ascending pixels (B, n), pixels in G (B,) -> (B, C): at and above half, at and above adaptive, peak; CUTS."""
    half, beyond = metrics.cut_half(pixels), pixels.new_tensor(math.inf)
    lightest = pixels.gather(1, (pixels.shape[1] - own[:, None]).clamp(max=pixels.shape[1] - 1))[:, 0]
    adaptive = torch.where(own > 0, lightest, beyond)
    own_cuts = [half, half.nextafter(beyond), adaptive, adaptive.nextafter(beyond)]
    fixed = torch.as_tensor(CUTS[pixels.dtype][: None if masks else 1], device=pixels.device)
    return torch.cat([torch.stack([*own_cuts, pixels[:, -1]], 1), fixed.expand(len(pixels), -1)], 1)


def _from_counts(counts: _Counts, masks: bool) -> dict[str, Tensor]:
    """The scores as `metrics` defines them."""
    region, inside, size, own = counts.region, counts.inside, counts.size, counts.own[:, None]
    weight = counts.weight[:, None].double() / 2
    columns = {}
    for rule, at in IOU_CUTS.items():
        whole = weight[:, 0] + (region[:, at] - inside[:, at])
        columns["iou" + RULES[rule]] = counts.doubled[:, at].double() / 2 / whole.clamp(min=1e-12)
        if rule != "fixed":  # at the cut, but not above
            columns["tied" + RULES[rule]] = (region[:, at - 1] - region[:, at]).float() / size
    columns["average_precision"] = counts.average_precision
    columns["pointing"] = counts.lit & (region[:, 4] == inside[:, 4])
    if masks:
        taken, both = region[:, JACCARD].double(), inside[:, JACCARD].double()
        columns["jaccard"] = torch.where(own > 0, both / (taken + own - both), 1 - taken / size)
        constant = region[:, 4:5] == size  # its peak is everywhere
        columns["f"] = _f(inside[:, F], region[:, F] * ~constant, own)
    return columns


def _f(both: Tensor, region: Tensor, own: Tensor) -> Tensor:
    """Pixels in P and M, in P, in M -> F: (1 + b) precision recall / (b precision + recall)."""
    score = (1 + F_BETA_SQUARED) * both.double() * (region > 0)
    return score / (F_BETA_SQUARED * own.double() + region).clamp(min=1)


# ---------------------------------------------------------------- counting


def _count(maps: Tensor, steps: Tensor, masks: bool) -> _Counts:
    """On a CPU, one map after the other: it stays in the cache."""
    rows, labels = maps.detach().flatten(1).numpy(), steps.flatten(1).numpy()
    pixels, owns, fulls, precisions = np.empty_like(rows), [], [], []
    whole = not (labels == 1).any()
    for row, label, ascending in zip(rows, labels, pixels, strict=True):
        keys = row.view(KEYS[row.itemsize]) << 2  # the two bits of 2 G travel below those of the pixel
        keys |= label
        keys.sort()
        ascending[:] = (keys >> 2).view(row.dtype)
        rank = np.flatnonzero((keys & 3).astype(bool))
        own = ascending[rank]
        owns.append(own)
        fulls.append(own if whole else own[keys[rank] & 3 == 2])
        precisions.append(_average_precision(ascending, own, rank))
    own = torch.tensor([len(own) for own in owns])
    weight = own + torch.tensor([len(full) for full in fulls])
    cuts = _cuts(torch.from_numpy(pixels), own, masks).numpy()

    def at_least(values: Sequence[np.ndarray]) -> Tensor:
        found = [own.size - own.searchsorted(cut) for own, cut in zip(values, cuts, strict=True)]
        return torch.from_numpy(np.stack(found))

    inside = at_least(owns)
    doubled = 2 * inside if whole else inside + at_least(fulls)
    lit = torch.from_numpy(pixels[:, -1] > 0)
    precision = torch.tensor(precisions, dtype=torch.float64)
    return _Counts(at_least(pixels), inside, doubled, precision, own, weight, lit, rows.shape[1])


def _average_precision(ascending: np.ndarray, own: np.ndarray, rank: np.ndarray) -> float:
    """Of one map: pixels (n,), those in G (m,) and their places among all (m,)."""
    if not own.size:
        return math.nan
    tied = ascending[rank - 1] == own
    tied[0] &= rank[0] > 0
    if tied.any():  # pixels that are equal share the place of the first of them
        rank = rank.copy()
        rank[tied] = ascending.searchsorted(own[tied])
        hits = own.size - rank.searchsorted(rank)
    else:
        hits = np.arange(own.size, 0, -1)
    return (hits / (ascending.size - rank)).mean()


def _count_on_device(maps: Tensor, steps: Tensor, masks: bool) -> _Counts:
    """All maps at once."""
    pixels, order = maps.flatten(1).sort(1)
    doubled = steps.flatten(1).gather(1, order).long()
    size, inside = pixels.shape[1], (doubled > 0).long()
    # (B, n + 1): of each rank and all above it
    inside_from, doubled_from = (
        torch.nn.functional.pad(values.flip(1).cumsum(1).flip(1), (0, 1)) for values in (inside, doubled)
    )
    own = inside_from[:, 0]
    first = torch.searchsorted(pixels, pixels)
    precision = (inside * inside_from.gather(1, first).double() / (size - first)).sum(1) / own  # 0 / 0 is NaN
    start = torch.searchsorted(pixels, _cuts(pixels, own, masks))
    counted = size - start, inside_from.gather(1, start), doubled_from.gather(1, start)
    return _Counts(*counted, precision, own, doubled_from[:, 0], pixels[:, -1] > 0, size)


# ---------------------------------------------------------------- references that need no model


def reference_columns(truth: Tensor, masks: bool = False, steps: Tensor | None = None) -> dict[str, dict[str, Tensor]]:
    """Scores of truth (B, H, W) without any model -> {"ceiling" | "whole_frame" | "centred_disc": columns}.

    Frame and disc are regions, the same P under every rule; the ceiling takes G itself where no rule limits it.
    steps: `half_steps(truth)`, where it is known.
    """
    steps = half_steps(truth) if steps is None else steps
    disc = metrics.centred_disc(*truth.shape[1:]).to(truth.device).expand(truth.shape)
    if steps is None:
        regions = {"ceiling": truth >= 0.5, "whole_frame": torch.ones_like(disc), "centred_disc": disc}
        return {name: _reference_by_definition(name, region, truth, masks) for name, region in regions.items()}
    mask, certain, size = steps > 0, steps == 2, truth[0].numel()
    own, full = _pixels_in(mask), _pixels_in(certain)
    counts = {  # pixels of the region, of these with G > 0, of these with G = 1
        "ceiling": (own, own, full),
        "whole_frame": (torch.full_like(own, size), own, full),
        "centred_disc": (_pixels_in(disc), _pixels_in(disc & mask), _pixels_in(disc & certain)),
    }
    references = {}
    for name, (taken, both, certain_too) in counts.items():
        iou = (both + certain_too).double() / 2 / ((own + full).double() / 2 + taken - both).clamp(min=1e-12)
        ious = _ceilings(own, full, size) if name == "ceiling" else dict.fromkeys(RULES, iou)
        columns = {"iou" + RULES[rule]: values for rule, values in ious.items()}
        columns["average_precision"] = metrics.precision_of_region(taken, both, own, size)
        references[name] = columns | (_curves(taken, both, own, size) if masks else {})
    return references


def _reference_by_definition(name: str, region: Tensor, truth: Tensor, masks: bool) -> dict[str, Tensor]:
    given = None if name == "ceiling" else metrics.consensus_iou(region, truth)
    columns = {
        "iou" + suffix: metrics.ceiling_iou(truth, rule) if given is None else given for rule, suffix in RULES.items()
    }
    columns["average_precision"] = metrics.region_average_precision(region, truth)
    if masks:
        as_map = region.float()
        as_map[:, 0, 0] += 1e-6  # so that the whole frame is not a constant map, which would predict nothing
        columns |= {"jaccard": metrics.jaccard(as_map, truth), "f": metrics.f_scores(as_map, truth)}
    return columns


def _pixels_in(region: Tensor) -> Tensor:
    """(B, H, W) bool -> (B,) int64."""
    if region.is_cuda:
        return region.flatten(1).sum(1)
    return torch.tensor([np.count_nonzero(row) for row in region.numpy()])  # many times faster than torch's sum


def _ceilings(own: Tensor, full: Tensor, size: int) -> dict[str, Tensor]:
    """`ceiling_iou` under every rule, of pixels with G > 0 and with G = 1, (B,) each."""
    total = (own + full).double() / 2
    lightest = torch.where(full == own, 1.0, 0.5) * (own > 0)
    most = torch.full_like(own, size - 1 - size // 2)
    heaviest = torch.minimum(most, full) + torch.minimum((most - full).clamp(min=0), own - full).double() / 2
    best = {"fixed": (total, own), "half": (heaviest, most), "adaptive": (total - lightest, (own - 1).clamp(min=0))}
    return {
        rule: inside / (total + (taken - own).clamp(min=0)).clamp(min=1e-12) for rule, (inside, taken) in best.items()
    }


def _curves(taken: Tensor, both: Tensor, own: Tensor, size: int) -> dict[str, Tensor]:
    """AVSBench's columns of the map that is 1 in a region and 0 elsewhere; no such map counts as constant."""
    taken, both, own = (count[:, None].double() for count in (taken, both, own))
    at_any = torch.where(own > 0, both / (taken + own - both), 1 - taken / size)
    at_zero = _f(own, torch.full_like(own, size), own)  # every pixel is at least the first threshold, 0
    above = _f(both, taken, own).expand(-1, len(F_THRESHOLDS) - 1)
    return {"jaccard": at_any.repeat(1, len(JACCARD_THRESHOLDS)), "f": torch.cat([at_zero, above], 1)}
