"""Pictures of results: heat maps over photos, panels and contact sheets of samples, training curves.

A picture is an RGB uint8 array (H, W, 3); a heat map is (H, W) in 0..1; G is the ground-truth map (H, W) in 0..1.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from scoring.metrics import consensus_iou, region_fixed
from utils import atomic_path

Floats = Sequence[float]
Log = Sequence[Mapping[str, Any]]  # one dict per epoch

TRUTH_COLOUR = (60, 255, 90)
INK, SOFT_INK, PAPER = (25, 25, 30), (105, 105, 115), (255, 255, 255)
GAP, LABEL_HEIGHT, TITLE_HEIGHT, HEADER_HEIGHT = 8, 24, 26, 44  # pixels
LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222", "#999999")  # Okabe and Ito
NOT_CURVES = ("epoch", "step", "steps", "seconds", "memory_gib")
OWN_AXES = {  # key: title of its axis
    "grad_norm": "gradient norm",
    "pairs_per_second": "pairs per second",
    "data_wait": "share of time waiting for data",
}
DRAWN_SCORES = ("cIoU", "AUC", "cIoU_half", "mAP", "pointing", "IIoU", "listening")  # of a test set, one axis each


# ---------------------------------------------------------------- one picture


def denormalize(image: torch.Tensor, mean: Floats, std: Floats) -> np.ndarray:
    """Undo the network's normalisation: (3, H, W) float, (x - mean) / std -> (H, W, 3) uint8."""
    pixels = image.detach().cpu().float() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Blend a heat map over a picture: the warmer, the more opaque, so cold regions stay a darkened photo.

    image (H, W, 3) or (3, H, W) uint8, heat (H, W) in 0..1 of the same size -> (H, W, 3) uint8. Colours: matplotlib's
    inferno.
    """
    image = _as_picture(image)
    heat = np.clip(_as_array(heat), 0, 1)
    if heat.shape != image.shape[:2]:
        raise ValueError(f"a heat map {heat.shape} does not fit a picture {image.shape[:2]}")
    colours = cv2.applyColorMap((heat * 255).round().astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]  # BGR to RGB
    opacity = (0.45 + 0.2 * heat)[..., None]
    return ((1 - opacity) * image + opacity * colours).round().astype(np.uint8)


def draw_truth(image: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """A copy of the picture (H, W, 3) with G >= 0.5 outlined in green on a dark edge."""
    drawn = np.ascontiguousarray(_as_picture(image)).copy()
    mask = (_as_array(truth) >= 0.5).astype(np.uint8)
    outlines, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(drawn, outlines, -1, (0, 40, 10), 4)
    cv2.drawContours(drawn, outlines, -1, TRUTH_COLOUR, 2)
    return drawn


def _as_array(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def _as_picture(image: Any) -> np.ndarray:
    image = _as_array(image)
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError(f"a picture is (H, W, 3) uint8, not {image.shape} {image.dtype}")
    return image if image.shape[2] == 3 else image.transpose(1, 2, 0)


# ---------------------------------------------------------------- panels and sheets


def sample_panel(
    image: np.ndarray,
    truth: np.ndarray,
    maps: Mapping[str, np.ndarray],
    title: str = "",
    ious: Mapping[str, float] | None = None,
) -> np.ndarray:
    """One sample in a row: the picture, G, then each map over the picture with G's outline, labelled with name and IoU.

    image (H, W, 3) or (3, H, W) uint8; truth and every map (H, W) in 0..1; ious by map name, by default the consensus
    IoU of the rule `fixed`. Returns (H + 58, (H + 8)(2 + maps) + 8 wide, 3) uint8.
    """
    image = _as_picture(image)
    if ious is None:
        ious = {name: _fixed_iou(heat, truth) for name, heat in maps.items()}
    tiles = [("picture", image), ("ground truth", draw_truth(_veil(image, truth), truth))]
    for name, heat in maps.items():
        label = f"{name}   IoU {100 * ious[name]:.0f} %" if name in ious else name
        tiles.append((label, draw_truth(overlay(image, heat), truth)))
    height, width = image.shape[:2]
    panel = _blank(TITLE_HEIGHT + height + LABEL_HEIGHT + GAP, GAP + (width + GAP) * len(tiles))
    panel = _write(panel, title, (GAP, 5), 15, panel.shape[1] - 2 * GAP)
    for index, (label, tile) in enumerate(tiles):
        left = GAP + (width + GAP) * index
        panel[TITLE_HEIGHT : TITLE_HEIGHT + height, left : left + width] = tile
        panel = _write(panel, label, (left, TITLE_HEIGHT + height + 4), 13, width, SOFT_INK)
    return panel


def contact_sheet(panels: Sequence[np.ndarray], path: str | Path, header: str = "") -> None:
    """Stack panels (H, W, 3) uint8 under a header line and write them as a PNG, whole or not at all.

    ValueError for no panels.
    """
    if not panels:
        raise ValueError("a contact sheet needs at least one panel")
    top = HEADER_HEIGHT if header else GAP
    width = max(panel.shape[1] for panel in panels)
    sheet = _blank(top + sum(panel.shape[0] for panel in panels) + GAP, width)
    if header:
        sheet[top - 3 : top - 2, GAP : width - GAP] = SOFT_INK
        sheet = _write(sheet, header, (GAP, 10), 20, width - 2 * GAP)
    for panel in panels:
        sheet[top : top + panel.shape[0], : panel.shape[1]] = panel
        top += panel.shape[0]
    with atomic_path(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")


def _fixed_iou(heat: np.ndarray, truth: np.ndarray) -> float:
    heat, truth = (torch.as_tensor(_as_array(x))[None] for x in (heat, truth))
    return consensus_iou(region_fixed(heat), truth).item()


def _veil(image: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Darken the picture where G is small, so that its fractions show."""
    return (image * (0.35 + 0.65 * np.clip(_as_array(truth), 0, 1)[..., None])).round().astype(np.uint8)


def _blank(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), PAPER, dtype=np.uint8)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont("DejaVu Sans"), size)  # matplotlib carries it


def _write(picture: np.ndarray, text: str, corner: tuple[int, int], size: int, width: int, colour=INK) -> np.ndarray:
    """A copy of the picture with one line of text, cut with an ellipsis where it would be wider than `width` pixels."""
    font = _font(size)
    if font.getlength(text) > width:
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    canvas = Image.fromarray(picture)
    ImageDraw.Draw(canvas).text(corner, text, fill=colour, font=font)
    return np.array(canvas)


# ---------------------------------------------------------------- training curves


def plot_curves(log_lines: Log, path: str | Path) -> None:
    """Draw the training log, one dict per epoch, and write it as a PNG, whole or not at all.

    Numbers are sorted by their names: `lr*` is a learning rate; `val*`, and what holds `retrieval` or `recall`, is
    validation; `set/map/metric` is a score, one axis per set and metric of `DRAWN_SCORES`; the keys of `OWN_AXES` have
    one each; `loss*` and what remains are losses. An epoch that lacks a key is bridged; `epoch` is the x axis, else the
    line's index. ValueError for an empty log.
    """
    if not log_lines:
        raise ValueError("no line in the training log")
    axes_of = _sort_keys(log_lines)
    columns = min(3, len(axes_of))
    rows = -(-len(axes_of) // columns)
    figure = Figure(figsize=(5.4 * columns, 4.0 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    epochs = [line.get("epoch", index) for index, line in enumerate(log_lines)]
    for index, (title, keys) in enumerate(axes_of.items()):
        _plot_axis(figure.add_subplot(rows, columns, index + 1), title, keys, epochs, log_lines)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _sort_keys(log_lines: Log) -> dict[str, dict[str, str]]:
    """Title of each axis -> {key: label of its curve}."""
    names = dict.fromkeys(key for line in log_lines for key, value in line.items() if _is_number(value))
    axes = {title: {} for title in ("losses", "learning rate", "validation", *OWN_AXES.values())}
    for key in names:
        parts = key.split("/")
        if len(parts) == 3:
            if parts[2] in DRAWN_SCORES:
                axes.setdefault(f"{parts[0]}: {parts[2]}", {})[key] = parts[1]
        elif parts[-1].startswith("lr") or parts[-1] == "learning_rate":
            axes["learning rate"][key] = key
        elif "retrieval" in key or "recall" in key or key.startswith("val"):
            axes["validation"][key] = key.removeprefix("val/")
        elif key in OWN_AXES:
            axes[OWN_AXES[key]][key] = key
        elif key not in NOT_CURVES:
            axes["losses"][key] = key
    return {title: keys for title, keys in axes.items() if keys} or {"nothing to draw": {}}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plot_axis(axis, title: str, keys: Mapping[str, str], epochs: Floats, log_lines: Log) -> None:
    drawn = []
    for (key, label), colour in zip(keys.items(), LINE_COLOURS * len(keys), strict=False):
        points = [
            (epoch, line[key]) for epoch, line in zip(epochs, log_lines, strict=True) if _is_number(line.get(key))
        ]
        drawn += [value for _, value in points]
        whole = key.rpartition("/")[2] in ("loss", "total")  # under its largest summand, which would hide it
        axis.plot(
            *zip(*points, strict=True),
            label=label,
            color="0.75" if whole else colour,
            linewidth=5 if whole else 1.6,
            zorder=1 if whole else 2,
            marker="o" if len(points) < 40 else None,
            markersize=3 if len(points) > 1 else 7,
        )
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("epoch", fontsize=9)
    axis.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    positive = [value for value in drawn if value > 0]
    if title == "losses" and positive and max(positive) > 20 * min(positive):
        axis.set_yscale("log")  # attention matching is orders of magnitude below the contrastive loss
    if "pairs_per_second" in keys:
        axis.set_ylim(0, 1.1 * max(drawn))
    if "data_wait" in keys:
        axis.set_ylim(-0.02, 1.02)
    if keys:
        axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
