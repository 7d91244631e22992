"""What a pass over a test set accumulates, part by part, and what that says about the set.

B batch, h x w map as given; maps are scored at 224 x 224, in fp32.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from annotations import GroundTruth
from maps import enlarge
from scoring.maps_file import SCALARS
from scoring.metrics import JACCARD_THRESHOLDS, interactive_groups
from scoring.summary import (
    SIZES,
    Columns,
    Figure,
    Table,
    count_tied,
    detect,
    figures_of,
    map_columns,
    reference_columns,
    size_names,
    summarise,
)

PART = 8  # samples whose enlarged maps are scored at once: more would leave the processor's cache
WRONG = "_wrong"  # ends the name of a map that was asked with a wrong sound


class ScoredBatch(NamedTuple):
    """What a pass shows of a batch to those who draw or keep it."""

    ids: list[str]
    truth: torch.Tensor  # (B, 224, 224)
    raw: dict[str, torch.Tensor]  # (B, h, w) each, as the model gives them
    maps: dict[str, torch.Tensor]  # (B, 224, 224) each in 0..1
    scalars: dict[str, torch.Tensor]  # (B,) each


Result = TypeVar("Result")


def in_parts(work: Callable[[slice], Result], count: int) -> Iterator[Result]:
    """work(slice of PART samples) for all of `count`, in order: one core for each part, not all cores for each step."""
    slices = [slice(start, start + PART) for start in range(0, count, PART)]
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(work, slices)
    torch.set_num_threads(threads)  # what a thread of the pool sets is the default of threads to come


class SetScores:
    """Scalars per sample (for masks two curves, too), never maps; and what they say about the set."""

    def __init__(self, ground_truth: GroundTruth) -> None:
        self.ground_truth, self.ids = ground_truth, []
        self.maps: dict[str, Table] = {}
        self.references: dict[str, Table] = {}
        self.scalars = Table()

    def add(
        self,
        ids: Sequence[str],
        truth: torch.Tensor,
        raw: Mapping[str, torch.Tensor],
        scalars: Mapping[str, torch.Tensor],
        interpolation: str = "bicubic",
        alpha: float | None = None,
    ) -> Iterator[ScoredBatch]:
        """Score ids (B,), truth (B, 224, 224), raw (B, h, w) each, scalars (B,) each, in parts of a few samples.

        The parts come as they are taken, in order; names are the same in every call. On the CPU, where sorting is fast.
        """
        raw, scalars = ({name: values.detach().cpu() for name, values in side.items()} for side in (raw, scalars))
        masks = self.ground_truth.masks

        def score(rows: slice) -> tuple[ScoredBatch, dict, dict]:
            part = [{name: values[rows] for name, values in side.items()} for side in (raw, scalars)]
            batch = ScoredBatch(ids[rows], truth[rows], part[0], enlarge(part[0], interpolation, alpha), part[1])
            columns = {name: map_columns(maps, batch.truth, masks) for name, maps in batch.maps.items()}
            return batch, columns, reference_columns(batch.truth, masks)

        for batch, *tables in in_parts(score, len(ids)):
            self.ids += batch.ids
            for kept, columns_of in zip((self.maps, self.references), tables, strict=True):
                for name, columns in columns_of.items():
                    kept.setdefault(name, Table()).extend(columns)
            self.scalars.extend({"area": (batch.truth > 0).flatten(1).sum(1), **batch.scalars})
            yield batch

    def _in_order(self) -> tuple[list[str], dict[str, Columns], dict[str, Columns], Columns]:
        """Ids, columns of maps and of references, scalars, sorted by id: the order of the pass changes nothing."""
        order = np.argsort(self.ids)
        tables = (
            {name: table.columns(order) for name, table in group.items()} for group in (self.maps, self.references)
        )
        return [self.ids[i] for i in order], *tables, self.scalars.columns(order)

    def summary(self, missing: Sequence[str] = (), resamples: int = 0, seed: int = 0) -> dict[str, Any]:
        """maps, intervals, references, by_class and by_size, all by map or reference and then by metric.

        missing: ids that the set should hold, too. resamples: of the bootstrap over units; 0 leaves intervals out.
        """
        truth = self.ground_truth
        ids, maps, references, scalars = self._in_order()
        empty, units = scalars["area"] == 0, np.array([truth.unit_of.get(i, i) for i in ids])
        groups = interactive_groups(ids, [*ids, *missing]) if truth.interactive else None
        result = _summarise_group(maps, references, empty, units, groups, resamples, seed)
        for name, tied in count_tied(maps).items():
            counts = {"samples": len(ids), "empty": int(empty.sum()), **tied}
            result["maps"][name] |= counts | ({"images": len(groups)} if groups is not None else {})
        if truth.masks:
            result["mIoU_at"] = {
                name: dict(zip(map(str, JACCARD_THRESHOLDS), columns["jaccard"].mean(0).tolist(), strict=True))
                for name, columns in maps.items()
            }
        if truth.silent:
            has_source = np.array([i not in truth.silent for i in ids])
            # the confidence is the right sound's
            right = {name: columns for name, columns in maps.items() if not name.endswith(WRONG)}
            for score in SCALARS:
                if score not in scalars:
                    continue
                end = "" if score == SCALARS[0] else f"@{score}"
                found = detect(right, scalars[score], has_source, units, resamples, seed)
                for kind, by_map in zip(("maps", "intervals"), found, strict=True):
                    for name, figures in by_map.items():
                        result[kind][name] |= {metric + end: value for metric, value in figures.items()}
        classes, sizes = np.array([truth.class_of.get(i, "") for i in ids]), size_names(scalars["area"])
        for key, labels, names in (("by_class", classes, np.unique(classes)), ("by_size", sizes, (*SIZES, "empty"))):
            chosen = {str(name): np.flatnonzero(labels == name) for name in names if name}
            result[key] = {
                name: {"samples": len(rows)}
                | _summarise_group(
                    _take(maps, rows), _take(references, rows), empty[rows], units[rows], None, resamples, seed
                )
                for name, rows in chosen.items()
                if len(rows)
            }
        return result

    def rows(self) -> list[dict[str, Any]]:
        """One dict per sample, by id: what it is, its scalars, then the columns of every map."""
        truth = self.ground_truth
        ids, maps, _, scalars = self._in_order()
        columns = {
            "id": ids,
            "class": [truth.class_of.get(i, "") for i in ids],
            "unit": [truth.unit_of.get(i, i) for i in ids],
            "has_source": [i not in truth.silent for i in ids],
        } | {name: values.tolist() for name, values in scalars.items()}
        for name, own in maps.items():
            at_half = {"jaccard": own["jaccard"][:, JACCARD_THRESHOLDS.index(0.5)]} if "jaccard" in own else {}
            plain = {column: values for column, values in own.items() if values.ndim == 1} | at_half
            columns |= {f"{name}_{column}": values.tolist() for column, values in plain.items()}
        return [dict(zip(columns, values)) for values in zip(*columns.values())]


def _take(tables: Mapping[str, Columns], rows: np.ndarray) -> dict[str, Columns]:
    return {name: {key: values[rows] for key, values in columns.items()} for name, columns in tables.items()}


def _summarise_group(maps, references, empty, units, groups, resamples, seed) -> dict[str, dict]:
    """maps and intervals of some samples, and the values of their references."""
    figures = {name: figures_of(columns, empty, groups) for name, columns in maps.items()}
    for name in maps:
        if name + WRONG in maps:
            hits, wrong = figures[name]["cIoU"], figures[name + WRONG]["cIoU"]
            difference = hits.numerator.astype(float) - wrong.numerator
            figures[name]["listening"] = Figure(difference, hits.denominator)
    bars = {
        name: {metric: figure.value() for metric, figure in figures_of(columns, empty, groups).items()}
        for name, columns in references.items()
    }
    return summarise(figures, units, resamples, seed) | {"references": bars}
