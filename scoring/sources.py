"""Figures where several things sound at once: one map per source, an image with all its sources as a group.

B batch, N entries (a source of an image, and the map given for it), K sources of an image, H x W pixels. Protocols of
Mix-and-Localize (Hu et al., CVPR 2022), AVGN (Mo and Tian, CVPR 2023), NoPrior (Kim et al., CVPR 2024) and T-VSL; their
codes differ, here is one rule for all. Figures are fractions of 1, of the rule `fixed`.

    CIoU@0.3  share of entries whose map has a consensus IoU of at least 0.3 with its source;  IoU@0.5  of at least 0.5
    CAP       mean over sources of the pixel average precision of the map given for them
    PIAP      the same after the maps of an image were assigned to its sources: the pair with the largest IoU first,
              then the largest among what is left. A source without a map counts 0
    CAP_median, CAP_swapped  average precision as published codes take it: of the map cut at its median (NoPrior), and
              of the truth as a prediction of that region (AVGN and T-VSL swap the arguments). To compare with them only
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from scoring.bootstrap import Ratio
from scoring.metrics import (
    consensus_iou,
    cut_half,
    pixel_average_precision,
    region_above,
    region_average_precision,
    region_fixed,
    sort_pixels,
    success,
)

# ---------------------------------------------------------------- scores of entries


def source_columns(maps: Tensor, truth: Tensor, sources: Tensor) -> dict[str, Tensor]:
    """Score maps (B, H, W), normalised, against their own source (B, H, W) and all of their image (B, K, H, W).

    -> source_iou, source_ap (B, K): against each source of the image, NaN for what it has not (a truth of NaN);
    ap_median, ap_swapped (B,): see the head of this file.
    """
    ascending = sort_pixels(maps)
    upper = region_above(maps, cut_half(ascending))
    of_source: dict[str, list[Tensor]] = {"source_iou": [], "source_ap": []}
    for one in sources.unbind(1):
        there = ~torch.isnan(one[:, 0, 0])
        one = one.nan_to_num()
        scores = consensus_iou(region_fixed(maps), one), pixel_average_precision(maps, one, ascending).nan_to_num()
        for values, found in zip(of_source.values(), scores, strict=True):
            values.append(torch.where(there, found, torch.nan))
    return {name: torch.stack(values, 1) for name, values in of_source.items()} | {
        "ap_median": region_average_precision(upper, truth),
        "ap_swapped": region_average_precision(truth >= 0.5, upper.to(truth.dtype)),
    }


# ---------------------------------------------------------------- figures of a set


def source_ratios(columns: Mapping[str, np.ndarray], images: Sequence[str]) -> dict[str, Ratio]:
    """Every figure of the head of this file, of the columns of one map, (N, ...) each; images: of each entry.

    None where the columns are not those of a set of sources.
    """
    if "source_iou" not in columns:
        return {}
    everywhere = np.ones(len(images))
    found = {
        "CIoU@0.3": Ratio(success(columns["iou"], 0.3), everywhere),
        "IoU@0.5": Ratio(success(columns["iou"], 0.5), everywhere),
        "CAP": Ratio(np.nan_to_num(columns["average_precision"]), everywhere),
        "PIAP": assigned_precision(columns["source_iou"], columns["source_ap"], images),
    }
    for name in ("median", "swapped"):
        found[f"CAP_{name}"] = Ratio(np.nan_to_num(columns[f"ap_{name}"]), everywhere)
    return found


def assigned_precision(ious: np.ndarray, precisions: np.ndarray, images: Sequence[str]) -> Ratio:
    """PIAP: IoU and average precision of every entry's map with every source of its image, (N, K), NaN for none.

    Each image's sum stands at its first entry. Of equal IoUs the earlier entry, then the earlier source, goes first.
    """
    groups: dict[str, list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(image, []).append(i)
    total, sources = np.zeros(len(images)), np.zeros(len(images))
    for rows in groups.values():
        sources[rows[0]] = np.isfinite(ious[rows[0]]).sum()
        left = np.where(np.isfinite(ious[rows]), ious[rows], -np.inf)
        while left.size and left.max() > -np.inf:
            entry, source = np.unravel_index(left.argmax(), left.shape)
            total[rows[0]] += precisions[rows[entry], source]
            left[entry], left[:, source] = -np.inf, -np.inf
    return Ratio(total, sources)
