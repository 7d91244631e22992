"""Training curves: the log of a run, one dict per epoch, drawn as `curves.png`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils import atomic_path

Log = Sequence[Mapping[str, Any]]  # one dict per epoch

LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222", "#999999")  # Okabe and Ito
NOT_CURVES = ("epoch", "step", "steps", "seconds", "memory_gib")
OWN_AXES = {  # key: title of its axis
    "grad_norm": "gradient norm",
    "pairs_per_second": "pairs per second",
    "data_wait": "share of time waiting for data",
}
AXIS_INCHES = 5.4, 4.0  # width and height, with title and legend
DRAWN_SCORES = ("cIoU", "AUC", "cIoU_half", "mAP", "pointing", "IIoU", "listening")  # of a test set, one axis each


def plot_curves(log_lines: Log, path: str | Path) -> None:
    """Draw the training log, one dict per epoch, and write it as a PNG, whole or not at all.

    Numbers are sorted by their names: `lr*` is a learning rate; `val*`, and what holds `retrieval` or `recall`, is
    validation; `set/map/metric` is a score, one axis per set and metric of `DRAWN_SCORES`; the keys of `OWN_AXES` have
    one each; all others are losses. Curves skip epochs that lack their key; `epoch` is the x axis, else the line's
    index. ValueError for an empty log.
    """
    if not log_lines:
        raise ValueError("no line in the training log")
    axes_of = _sort_keys(log_lines)
    columns = min(3, len(axes_of))
    rows = -(-len(axes_of) // columns)
    width, height = AXIS_INCHES
    figure = Figure(figsize=(width * columns, height * rows), dpi=110)
    FigureCanvasAgg(figure)
    # margins by hand: measuring every label would take most of the time, in every epoch
    figure.subplots_adjust(
        left=0.6 / (width * columns), right=1 - 0.2 / (width * columns), wspace=0.16,
        bottom=1.2 / (height * rows), top=1 - 0.35 / (height * rows), hspace=0.62,
    )  # fmt: skip
    epochs = [line.get("epoch", index) for index, line in enumerate(log_lines)]
    for index, (title, keys) in enumerate(axes_of.items()):
        _plot_axis(figure.add_subplot(rows, columns, index + 1), title, keys, epochs, log_lines)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", pil_kwargs={"compress_level": 3})


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


def _plot_axis(axis, title: str, keys: Mapping[str, str], epochs: Sequence[float], log_lines: Log) -> None:
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
    axis.locator_params(axis="y", nbins=6)
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
