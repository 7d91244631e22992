"""Metrics of one set: scores collected sample by sample in a pass over it, and cIoU, AUC and so on of them.

B batch, h x w map as given; maps are scored at 224 x 224, in fp32. N samples. Figures are fractions of 1.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from annotations import GroundTruth, check_finite
from maps import ABSOLUTE, enlarge, enlarge_absolute, normalize_maps
from scoring.bootstrap import Combined, Ratio, intervals_of, values_of
from scoring.columns import half_steps, map_columns, reference_columns
from scoring.detection import detect
from scoring.maps_file import SCALARS
from scoring.metrics import JACCARD_THRESHOLDS, RULES, area_under_success, success
from scoring.negatives import negative_columns, negative_ratios, over_seeds
from scoring.parts import in_parts
from scoring.sources import source_columns, source_ratios

CPU = torch.device("cpu")
WRONG = "_wrong"  # suffix of a map that was computed with the wrong audio
OVER_SEEDS = ("lit_", "change_")  # columns with a value for each seed of a negative, of which a row has the mean
LEAST_ROWS = 256  # for which a column has room from the start
TIED_SHARE = 0.01  # more pixels than this share exactly at a cut: the region depends on the ties
SIZES = {"under 32x32": 32**2, "32x32 to 96x96": 96**2, "96x96 to 144x144": 144**2, "larger": math.inf}

Columns = Mapping[str, np.ndarray]  # name: (N,), or (N, thresholds)
Groups = dict[str, list[int]]  # image: indices of its samples


# ---------------------------------------------------------------- a pass over the set


class ScoredBatch:
    """What `on_batch` functions receive of each batch, to draw or keep it.

    ids; raw: {map: (B, h, w)}, as the model gives it; scalars: {name: (B,)}; negatives: {map: {kind: (B, S, h, w)}}.
    truth: (B, H, W), 224 x 224, twice as wide where two images stand side by side; maps: {map: (B, H, W)} in 0..1, but
    an absolute one in its own range. Those two stay with the process that scored the batch, and are made again, the
    same, where another one asks for them.
    """

    def __init__(
        self,
        ids: list[str],
        raw: Mapping[str, Tensor],
        scalars: Mapping[str, Tensor],
        negatives: Mapping[str, Mapping[str, Tensor]],
        make: Callable[["ScoredBatch"], tuple[Tensor, dict[str, Tensor]]],
        large: tuple[Tensor, dict[str, Tensor]] | None = None,
    ) -> None:
        """make: of this batch its truth and maps; large: these, where they are at hand."""
        self.ids, self.raw, self.scalars, self.negatives = ids, raw, scalars, negatives
        self.make, self._large = make, large

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "make": None, "_large": None}

    @property
    def large(self) -> tuple[Tensor, dict[str, Tensor]]:
        if self._large is None:
            self._large = self.make(self)
        return self._large

    @property
    def truth(self) -> Tensor:
        return self.large[0]

    @property
    def maps(self) -> dict[str, Tensor]:
        return self.large[1]


class Scored(NamedTuple):
    """The scores of a batch, by map or reference and then by column, (B, ...)."""

    batch: ScoredBatch
    maps: dict[str, Columns]
    references: dict[str, Columns]
    scalars: Columns


class Table:
    """Columns that grow batch by batch.

    They lie in a few large arrays: small ones, kept between the enlarged maps that come and go, would hold the memory
    of these.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}  # longer than what they hold
        self._count = 0

    def extend(self, columns: Mapping[str, Tensor | np.ndarray | Sequence]) -> None:
        """Append {name: B values}; the names are the same in every call."""
        columns = in_numpy(columns)
        end = self._count + len(next(iter(columns.values()), ()))
        for name, values in columns.items():
            kept = self._arrays.setdefault(name, values[:0])
            kind = np.result_type(kept, values)
            if len(kept) < end or kept.dtype != kind:
                grown = np.empty((max(LEAST_ROWS, 2 * end), *values.shape[1:]), kind)
                grown[: self._count] = kept[: self._count]
                self._arrays[name] = kept = grown
            kept[self._count : end] = values
        self._count = end

    def columns(self, order: np.ndarray | slice = slice(None)) -> dict[str, np.ndarray]:
        """{name: (N, ...)} in the order in which the samples came, or in another."""
        return {name: values[: self._count][order] for name, values in self._arrays.items()}


def in_numpy(columns: Mapping[str, Tensor | np.ndarray | Sequence]) -> dict[str, np.ndarray]:
    return {name: np.asarray(torch.as_tensor(values).cpu()) for name, values in columns.items()}


class Samples(NamedTuple):
    """The columns of all or some samples of a set, and what the set says of each."""

    maps: dict[str, Columns]
    references: dict[str, Columns]
    empty: np.ndarray  # (N,) bool, where G is
    units: np.ndarray  # (N,) labels: what the bootstrap draws
    groups: Groups | None = None  # of interactive sets
    images: np.ndarray | None = None  # (N,) labels, of sets of several sources

    def take(self, rows: np.ndarray) -> "Samples":
        """Some of the samples, without `groups`: a part of the set may hold only some entries of an image."""
        tables = (
            {name: {key: values[rows] for key, values in columns.items()} for name, columns in table.items()}
            for table in (self.maps, self.references)
        )
        images = None if self.images is None else self.images[rows]
        return Samples(*tables, self.empty[rows], self.units[rows], images=images)


class SetScores:
    """Collects scalars per sample (for masks two curves, too), never maps, and summarises them.

    thresholds: {absolute map: above it the map says that something sounds}; see `scoring.negatives`.
    """

    def __init__(self, ground_truth: GroundTruth, thresholds: Mapping[str, float] | None = None) -> None:
        self.ground_truth, self.thresholds, self.ids = ground_truth, thresholds or {}, []
        self.maps: dict[str, Table] = {}
        self.references: dict[str, Table] = {}
        self.scalars = Table()

    def add(self, ids: Sequence[str], truth: Tensor, *found: Any, **settings: Any) -> Iterator[ScoredBatch]:
        """`score`, and keep the scores; the parts come as they are taken, in order."""
        for part in self.score(ids, truth, *found, **settings):
            self.keep(part)
            yield part.batch

    def keep(self, part: Scored) -> None:
        """Add the scores of a batch; names are the same in every call."""
        self.ids += part.batch.ids
        for kept, columns_of in ((self.maps, part.maps), (self.references, part.references)):
            for name, columns in columns_of.items():
                kept.setdefault(name, Table()).extend(columns)
        self.scalars.extend(part.scalars)

    def score(
        self,
        ids: Sequence[str],
        truth: Tensor,
        raw: Mapping[str, Tensor],
        scalars: Mapping[str, Tensor],
        interpolation: str = "bicubic",
        alpha: float | None = None,
        negatives: Mapping[str, Mapping[str, Tensor]] | None = None,
        device: torch.device = CPU,
    ) -> Iterator[Scored]:
        """Score ids (B,), truth (B, H, W), raw (B, h, w) each, scalars (B,) each, and keep nothing.

        negatives: of absolute maps, {map: {negative: (B, S, h, w)}}. On a CPU in parts of a few samples; on a CUDA
        device all at once, but what few sets have. ValueError, with the id, for a value that is not finite.
        """
        raw, scalars = ({name: values.detach().cpu() for name, values in side.items()} for side in (raw, scalars))
        negatives = negatives or {}
        asked = {f"map {name}_{kind}": maps for name, own in negatives.items() for kind, maps in own.items()}
        check_finite(ids, {f"map {name}": values for name, values in raw.items()} | asked | scalars)
        make = partial(self.enlarged, interpolation=interpolation, alpha=alpha)

        def score(rows: slice) -> Scored:
            own, own_scalars = ({name: values[rows] for name, values in side.items()} for side in (raw, scalars))
            asked = {name: {kind: maps[rows] for kind, maps in kinds.items()} for name, kinds in negatives.items()}
            there = truth[rows].to(device)
            size = tuple(there.shape[1:])
            maps = enlarge({name: values.to(device) for name, values in own.items()}, interpolation, alpha, size)
            large = (there, maps) if device.type == "cpu" else None
            batch = ScoredBatch(ids[rows], own, own_scalars, asked, make, large)
            steps, masks = half_steps(there), self.ground_truth.masks
            relative = maps | {name: normalize_maps(maps[name]) for name in maps if name == ABSOLUTE}
            columns = {name: map_columns(values, there, masks, steps) for name, values in relative.items()}
            columns = {name: in_numpy(found) for name, found in columns.items()}
            self._add_columns(columns, batch, relative)
            references = {name: in_numpy(found) for name, found in reference_columns(there, masks, steps).items()}
            area = (there > 0).flatten(1).sum(1)
            return Scored(batch, columns, references, in_numpy({"area": area, **own_scalars}))

        return in_parts(score, len(ids)) if device.type == "cpu" else iter([score(slice(len(ids)))])

    def enlarged(self, batch: ScoredBatch, interpolation: str, alpha: float | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Truth and maps of a batch that another process, or another device, has scored."""
        truth = torch.stack([self.ground_truth.truth_of(name) for name in batch.ids])
        return truth, enlarge(batch.raw, interpolation, alpha, tuple(truth.shape[1:]))

    def _add_columns(self, columns: dict[str, dict], batch: ScoredBatch, maps: Mapping[str, Tensor]) -> None:
        """Add what absolute maps have, with the negatives that they were asked with, and what several sources have."""
        truth = self.ground_truth
        if not (self.thresholds or truth.siblings):
            return
        size = tuple(batch.truth.shape[1:])
        for name, threshold in self.thresholds.items():
            own = enlarge_absolute(batch.raw[name], size)
            asked = {
                kind: enlarge_absolute(values.flatten(0, 1), size).unflatten(0, values.shape[:2])
                for kind, values in batch.negatives.get(name, {}).items()
            }
            found = negative_columns(own, asked, batch.truth, threshold, truth.robust)
            in_view = torch.tensor([i not in truth.silent for i in batch.ids])
            columns[name] |= in_numpy(found | {"iou_u": found["iou_u"].where(in_view, torch.nan)})
        if truth.siblings:
            most = max(map(len, truth.siblings.values()))
            sources = torch.full((len(batch.ids), most, *size), torch.nan)
            for row, i in enumerate(batch.ids):
                for place, sibling in enumerate(truth.siblings[i]):
                    sources[row, place] = batch.truth[row] if sibling == i else truth.truth_of(sibling)
            for name, values in maps.items():
                columns[name] |= in_numpy(source_columns(values.cpu(), batch.truth, sources))

    def _in_order(self) -> tuple[list[str], Samples, Columns]:
        """Ids, samples and scalars, sorted by id: the order of the pass changes nothing."""
        order = np.argsort(self.ids)
        ids = [self.ids[i] for i in order]
        tables = (
            {name: table.columns(order) for name, table in group.items()} for group in (self.maps, self.references)
        )
        scalars = self.scalars.columns(order)
        units = np.array([self.ground_truth.unit_of.get(i, i) for i in ids])
        siblings = self.ground_truth.siblings
        images = np.array([siblings[i][0] for i in ids]) if siblings else None
        return ids, Samples(*tables, scalars["area"] == 0, units, images=images), scalars

    def summary(self, missing: Sequence[str] = (), resamples: int = 0, seed: int = 0) -> dict[str, Any]:
        """maps, intervals, references, by_class and by_size, all by map or reference and then by metric.

        missing: ids of the set that were not scored. resamples: of the bootstrap over units; 0 leaves intervals out.
        """
        truth, resampling = self.ground_truth, (resamples, seed)
        ids, samples, scalars = self._in_order()
        expected = [*ids, *missing]
        groups = interactive_groups(ids, expected, images_by_id(truth, expected)) if truth.interactive else None
        result = summarise(samples._replace(groups=groups), *resampling)
        for name, tied in count_tied(samples.maps).items():
            counts = {"samples": len(ids), "empty": int(samples.empty.sum()), **tied}
            result["maps"][name] |= counts | ({"images": len(groups)} if groups is not None else {})
        if truth.masks:
            result["mIoU_at"] = {
                name: dict(zip(map(str, JACCARD_THRESHOLDS), columns["jaccard"].mean(0).tolist(), strict=True))
                for name, columns in samples.maps.items()
            }
        if truth.silent:
            has_source = np.array([i not in truth.silent for i in ids])
            _add_detection(result, samples, scalars, has_source, *resampling)
        classes, sizes = np.array([truth.class_of.get(i, "") for i in ids]), size_names(scalars["area"])
        known = [name for name in np.unique(classes) if name]
        result["by_class"] = _summarise_parts(samples, classes, known, *resampling)
        result["by_size"] = _summarise_parts(samples, sizes, [*SIZES, "empty"], *resampling)
        if truth.parts:
            result["parts"] = {}
            for part, members in truth.parts.items():
                inside = np.array([part if i in members else "" for i in ids])
                result["parts"] |= _summarise_parts(samples, inside, [part], *resampling)
        if truth.notes:
            result["notes"] = [*truth.notes]
        if seeds := {name: found for name in self.thresholds if (found := over_seeds(samples.maps[name]))}:
            result["over_seeds"] = seeds
        return result

    def rows(self) -> list[dict[str, Any]]:
        """One dict per sample, by id: what it is, its scalars, then the columns of every map."""
        truth = self.ground_truth
        ids, samples, scalars = self._in_order()
        columns = {
            "id": ids,
            "class": [truth.class_of.get(i, "") for i in ids],
            "unit": [truth.unit_of.get(i, i) for i in ids],
            "has_source": [i not in truth.silent for i in ids],
        }
        if samples.images is not None:
            columns["image"] = samples.images.tolist()
        columns |= {name: values.tolist() for name, values in scalars.items()}
        for name, own in samples.maps.items():
            at_half = {"jaccard": own["jaccard"][:, JACCARD_THRESHOLDS.index(0.5)]} if "jaccard" in own else {}
            plain = {column: values for column, values in own.items() if values.ndim == 1} | at_half
            plain |= {
                column: values.mean(1)
                for column, values in own.items()
                if column.startswith(OVER_SEEDS) and values.ndim == 2
            }
            columns |= {f"{name}_{column}": values.tolist() for column, values in plain.items()}
        return [dict(zip(columns, values)) for values in zip(*columns.values())]


# ---------------------------------------------------------------- figures


def ratios_of(
    columns: Columns, empty: np.ndarray, groups: Groups | None = None, images: Sequence[str] | None = None
) -> dict[str, Ratio | Combined]:
    """Every metric that the columns of one map allow; empty (N,) bool, where G is; `groups` adds the interactive ones.

    Of the rule `fixed`: cIoU, AUC, mean_iou, cIoU_sounding (without the samples whose G is empty; cIoU counts them as
    misses), with groups IIoU and IAUC; of another rule the same names and its suffix. mAP (an empty G counts 0),
    pointing, with groups both_pointing; AVSBench's mIoU and F; of absolute maps `negative_ratios`,
    with images, labels of each sample's image, `source_ratios`.
    """
    everywhere = np.ones(len(empty))
    ratios = {}
    for suffix in RULES.values():
        if "iou" + suffix not in columns:
            continue
        ious = columns["iou" + suffix]
        ratios[f"cIoU{suffix}"] = Ratio(success(ious), everywhere)
        ratios[f"AUC{suffix}"] = Ratio(area_under_success(ious), everywhere)
        ratios[f"mean_iou{suffix}"] = Ratio(ious, everywhere)
        ratios[f"cIoU{suffix}_sounding"] = Ratio(success(ious) & ~empty, ~empty)
        if groups is not None:
            worst, first = worst_by_image(ious, groups)
            ratios[f"IIoU{suffix}"] = Ratio(success(worst) & first, first)
            ratios[f"IAUC{suffix}"] = Ratio(area_under_success(worst) * first, first)
    if "average_precision" in columns:
        ratios["mAP"] = Ratio(np.nan_to_num(columns["average_precision"]), everywhere)
    if "pointing" in columns:
        ratios["pointing"] = Ratio(columns["pointing"], everywhere)
        if groups is not None:
            worst, first = worst_by_image(columns["pointing"], groups)
            ratios["both_pointing"] = Ratio(worst & first, first)
    if "jaccard" in columns:
        ratios["mIoU"] = Ratio(columns["jaccard"][:, JACCARD_THRESHOLDS.index(0.5)], everywhere)
        ratios["F"] = Ratio(columns["f"] * ~empty[:, None], ~empty)
    ratios |= negative_ratios(columns, empty)
    return ratios if images is None else ratios | source_ratios(columns, images)


def images_by_id(truth: GroundTruth, ids: Sequence[str]) -> dict[str, str]:
    """{id: image} of an interactive set; an entry without a source in view, which no map can get right, is apart.

    Where images are frames that share a unit, their video, the siblings tell them apart.
    """
    first = {i: siblings[0] for i, siblings in truth.siblings.items()}
    return {i: i if i in truth.silent else first.get(i) or truth.unit_of.get(i) or i.rpartition("_")[0] for i in ids}


def interactive_groups(
    ids: Sequence[str], expected: Sequence[str] | None = None, image_of: Mapping[str, str] = {}
) -> Groups:
    """Group the indices of `ids` by image: {image: [index, ...]}; without `image_of` the id up to its last underscore.

    Only images with at least two entries stay. With `expected`, every id that the set should hold, images of which an
    entry is missing drop out, too.
    """

    def by_image(names: Sequence[str]) -> Groups:
        groups = {}
        for index, name in enumerate(names):
            groups.setdefault(image_of.get(name) or name.rpartition("_")[0] or name, []).append(index)
        return groups

    complete = by_image(ids if expected is None else expected)
    return {
        image: group
        for image, group in by_image(ids).items()
        if len(group) > 1 and len(group) == len(complete.get(image, ()))
    }


def worst_by_image(values: np.ndarray, groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """Per image its smallest value, so that a threshold holds for every source of the image.

    values (N,) -> (N,) the smallest value at the image's first sample, 0 elsewhere; and (N,) bool, True at those.
    """
    first = np.zeros(len(values), dtype=bool)
    first[[group[0] for group in groups.values()]] = True
    worst = np.zeros_like(values)
    for group in groups.values():
        worst[group[0]] = values[group].min()
    return worst, first


def summarise(samples: Samples, resamples: int = 0, seed: int = 0) -> dict[str, dict]:
    """Figures of some samples: maps and references, {name: {metric: value}}; intervals, {map: {metric: [low, high]}}.

    A map that was also computed with the wrong audio gets `listening`, the difference of the two cIoU.
    """
    ratios, references = (
        {name: ratios_of(columns, samples.empty, samples.groups, samples.images) for name, columns in table.items()}
        for table in (samples.maps, samples.references)
    )
    for name, own in ratios.items():
        if name + WRONG in ratios:
            hits, wrong = own["cIoU"], ratios[name + WRONG]["cIoU"]
            own["listening"] = Ratio(hits.numerator.astype(float) - wrong.numerator, hits.denominator)
    return {
        "maps": values_of(ratios),
        "intervals": intervals_of(ratios, samples.units, resamples, seed),
        "references": values_of(references),
    }


def _summarise_parts(
    samples: Samples, labels: np.ndarray, names: Sequence[str], resamples: int, seed: int
) -> dict[str, dict]:
    """`summarise` of the samples of each label that occurs, and how many they are."""
    parts = {str(name): np.flatnonzero(labels == name) for name in names}
    return {
        name: {"samples": len(rows)} | summarise(samples.take(rows), resamples, seed)
        for name, rows in parts.items()
        if len(rows)
    }


def _add_detection(
    result: dict[str, Any], samples: Samples, scalars: Columns, has_source: np.ndarray, resamples: int, seed: int
) -> None:
    """Add `detect` by every confidence that there is; the second and further ones end the metric's name."""
    right = {name: columns for name, columns in samples.maps.items() if not name.endswith(WRONG)}
    for score in (name for name in SCALARS if name in scalars):
        end = "" if score == SCALARS[0] else f"@{score}"
        found = detect(right, scalars[score], has_source, samples.units, resamples, seed)
        for kind, by_map in zip(("maps", "intervals"), found, strict=True):
            for name, figures in by_map.items():
                result[kind][name] |= {metric + end: value for metric, value in figures.items()}


def size_names(areas: np.ndarray) -> np.ndarray:
    """Pixels of G at 224 x 224, (N,) -> (N,) names of `SIZES`, "empty" for none."""
    index = np.searchsorted(list(SIZES.values()), areas, side="right")
    return np.where(areas == 0, "empty", np.array(list(SIZES))[index])


def count_tied(maps: Mapping[str, Columns]) -> dict[str, dict[str, int]]:
    """{map: {"tied_half", "tied_adaptive": samples where over 1 % of the pixels tie at the cut}}; warns, too."""
    keys = ["tied" + suffix for suffix in RULES.values()]
    counts = {
        name: {key: int((columns[key] > TIED_SHARE).sum()) for key in keys if key in columns}
        for name, columns in maps.items()
    }
    for rule, key in zip(RULES, keys, strict=True):
        tied = [f"{count[key]} of {len(maps[name][key])} {name}" for name, count in counts.items() if count.get(key)]
        if tied:
            warnings.warn(
                f"rule {rule}: more than {TIED_SHARE:.0%} of the pixels tie at the cut in {', '.join(tied)} maps "
                "(constant or binary?)",
                stacklevel=2,
            )
    return counts
