"""Figures of negative audio: what a map lights up when nothing in view sounds (Juanola et al., arXiv 2410.01020).

B batch, N samples, S seeds of a negative, H x W pixels (224 x 224), T thresholds. A is an absolute map, enlarged
bilinearly with aligned corners and never stretched to its own range; u is the threshold of its method, the same for
every image and set. Each image is asked with its own sound, with silence, with noise, and with a sound of another class
(off-screen); of noise and off-screen sounds there may be several seeds, over which every sample's values are averaged.
Scores are fractions of 1.

    pIA_c    mean share of the pixels with A > u under negative c; pIA: mean over the negatives. Lower is better
    AUC_N_c  area under the share of samples with pIA <= x, x = 0, 0.05 ... 1; AUC_N: mean over the negatives
    cIoU_u   mean, not the share above 0.5, of the consensus IoU of {A >= u} under the own sound; no pixel: 0
    AUC_u    area under the share of samples with that IoU >= x
    F_LOC    harmonic mean of cIoU_u and 1 - pIA;  F_AUC  that of AUC_u and AUC_N
    change_a_b  IoU of the regions A > u under two sounds of one image: 1 where the map stays as it was
    TN_u     share of the pairs whose source is not in view in which nothing is lit, under the own sound

On sets of masks also AVSBench-Robust's (arXiv 2502.00358), at 0.5 instead of u: mIoU_c and F_c of the map under
negative c against the mask of the object, which is silent then, and FPR_c, the mean share of the pixels above 0.5.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from scoring.bootstrap import Combined, Ratio
from scoring.metrics import (
    IOU_STEPS,
    JACCARD_THRESHOLDS,
    area_under_steps,
    area_under_success,
    consensus_iou,
    f_scores,
    jaccard,
    region_change,
    share_above,
    sort_pixels,
)

OWN = "own"
NEGATIVES = ("silence", "noise", "offscreen")  # kinds, in the order of tables
MASK_THRESHOLD = 0.5  # AVSBench's


def kinds_of(columns: Mapping[str, np.ndarray]) -> list[str]:
    """The negatives that the columns of a map know."""
    return [kind for kind in NEGATIVES if f"lit_{kind}" in columns]


# ---------------------------------------------------------------- scores of samples


def negative_columns(
    own: Tensor, negatives: Mapping[str, Tensor], truth: Tensor, threshold: float, masks: bool = False
) -> dict[str, Tensor]:
    """Score absolute maps under the own sound and under negatives: own (B, H, W), negatives (B, S, H, W) by kind.

    truth (B, H, W) in 0..1 -> iou_u (B,): consensus IoU of {A >= u}; lit_own (B,) and lit_KIND (B, S): share of the
    pixels above u; change_A_B (B, S): see `region_change`. With `masks` also jaccard_own, jaccard_KIND (B,), f_own,
    f_KIND (B, T) and fpr_KIND (B,), where seeds are averaged. Kinds with one seed go with those of several.
    """
    columns = {"iou_u": consensus_iou(own >= threshold, truth), "lit_own": share_above(own, threshold)}
    columns |= {f"lit_{kind}": _share_above(maps, threshold) for kind, maps in negatives.items()}
    regions = {OWN: own[:, None] > threshold} | {kind: maps > threshold for kind, maps in negatives.items()}
    for one, other in combinations(regions, 2):
        columns[f"change_{one}_{other}"] = region_change(*torch.broadcast_tensors(regions[one], regions[other]))
    if masks:
        for kind, maps in {OWN: own[:, None], **negatives}.items():
            columns |= {f"{name}_{kind}": values for name, values in _mask_columns(maps, truth).items()}
    return columns


def _mask_columns(maps: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """AVSBench's jaccard at 0.5 (B,), f (B, T) and the share above 0.5 (B,) of maps (B, S, H, W), seeds averaged."""
    at = JACCARD_THRESHOLDS.index(MASK_THRESHOLD)
    scores = []
    for of_seed in maps.unbind(1):
        ascending = sort_pixels(of_seed)
        scores.append((jaccard(of_seed, masks, ascending)[:, at], f_scores(of_seed, masks, ascending)))
    of_jaccard, of_f = (torch.stack(values).mean(0) for values in zip(*scores, strict=True))
    return {"jaccard": of_jaccard, "f": of_f, "fpr": _share_above(maps, MASK_THRESHOLD).mean(1)}


def _share_above(maps: Tensor, threshold: float) -> Tensor:
    """`share_above` of every seed: (B, S, H, W) -> (B, S)."""
    return share_above(maps.flatten(0, 1), threshold).unflatten(0, maps.shape[:2])


# ---------------------------------------------------------------- figures of a set


def negative_ratios(columns: Mapping[str, np.ndarray], empty: np.ndarray) -> dict[str, Ratio | Combined]:
    """Every figure of the head of this file that the columns of one map allow; none where it is not absolute.

    columns: of `negative_columns`, (N, ...) each; iou_u may be NaN where the source is not in view: such samples are
    left out of cIoU_u and AUC_u. empty (N,) bool: where the mask is.
    """
    if "iou_u" not in columns:
        return {}
    kinds, everywhere, sounding = kinds_of(columns), np.ones(len(empty)), np.isfinite(columns["iou_u"])
    ious = np.where(sounding, columns["iou_u"], 0.0)
    found: dict[str, Ratio | Combined] = {
        "cIoU_u": Ratio(ious, sounding),
        "AUC_u": Ratio(area_under_success(ious) * sounding, sounding),
    }
    if not sounding.all():
        found["TN_u"] = Ratio((columns["lit_own"] == 0) & ~sounding, ~sounding)
    if kinds:
        found |= _of_kinds(columns, kinds, found["cIoU_u"], found["AUC_u"])
    for kind in (OWN, *kinds) if f"jaccard_{OWN}" in columns else ():
        found[f"mIoU_{kind}"] = Ratio(columns[f"jaccard_{kind}"], everywhere)
        found[f"F_{kind}"] = Ratio(columns[f"f_{kind}"] * ~empty[:, None], ~empty)
        found[f"FPR_{kind}"] = Ratio(columns[f"fpr_{kind}"], everywhere)
    return found


def _of_kinds(
    columns: Mapping[str, np.ndarray], kinds: Sequence[str], inside: Ratio, reached: Ratio
) -> dict[str, Ratio | Combined]:
    """The figures that need negatives; inside: cIoU_u, reached: AUC_u."""
    everywhere = np.ones(len(columns["iou_u"]))
    lit = {kind: columns[f"lit_{kind}"] for kind in kinds}
    dark = {kind: area_within(shares).mean(1) for kind, shares in lit.items()}
    lit = {kind: shares.mean(1) for kind, shares in lit.items()}
    found = {f"pIA_{kind}": Ratio(shares, everywhere) for kind, shares in lit.items()}
    found["pIA"] = Ratio(np.mean([*lit.values()], axis=0), everywhere)
    found |= {f"AUC_N_{kind}": Ratio(areas, everywhere) for kind, areas in dark.items()}
    found["AUC_N"] = Ratio(np.mean([*dark.values()], axis=0), everywhere)
    found["F_LOC"] = Combined((inside, found["pIA"]), lambda right, wrong: harmonic_mean(right, 1 - wrong))
    found["F_AUC"] = Combined((reached, found["AUC_N"]), harmonic_mean)
    for one, other in combinations((OWN, *kinds), 2):
        found[f"change_{one}_{other}"] = Ratio(columns[f"change_{one}_{other}"].mean(1), everywhere)
    return found


def area_within(shares: np.ndarray) -> np.ndarray:
    """(...) shares of lit pixels -> (...): area under the steps share <= x, trapezoids. Their mean is AUC_N."""
    return area_under_steps(shares[..., None] <= IOU_STEPS)


def harmonic_mean(one: np.ndarray | float, other: np.ndarray | float) -> np.ndarray | float:
    """2 a b / (a + b) of numbers or arrays in 0..1; 0 where both are 0."""
    total = one + other
    return 2 * one * other / np.where(total == 0, 1, total)


def over_seeds(columns: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """pIA of every negative with several seeds, seed by seed: what another draw of the sounds would change."""
    lit = {kind: columns[f"lit_{kind}"] for kind in kinds_of(columns)}
    return {f"pIA_{kind}": shares.mean(0).tolist() for kind, shares in lit.items() if shares.shape[1] > 1}


def third_quartile(largest: Sequence[float] | np.ndarray) -> float:
    """u of a method: the third quartile of the largest value of A in each image under negative audio."""
    return float(np.quantile(np.asarray(largest, float), 0.75))
