"""Ratios of sums over the samples of a set, and their 95 % bootstrap intervals.

N samples, U units (what a resample draws: images, or videos whose frames share their audio), T thresholds. Every
metric is a ratio of two sums, so one resample of all metrics is a matrix product.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles
CHUNK = 2**22  # draws that are in memory at once


class Ratio(NamedTuple):
    """sum(numerator) / sum(denominator) over samples; with several numerators per sample the largest of the ratios."""

    numerator: np.ndarray  # (N,), or (N, T)
    denominator: np.ndarray  # (N,)

    def value(self) -> float:
        total = self.denominator.sum()
        return float((self.numerator.sum(0) / total).max()) if total else math.nan


class Combined(NamedTuple):
    """A figure that is formed of several ratios, such as a harmonic mean of two; resampled together with them."""

    parts: tuple[Ratio, ...]
    form: Callable[..., np.ndarray | float]  # of as many values, or arrays of values, as there are parts

    def value(self) -> float:
        return float(self.form(*(part.value() for part in self.parts)))


Ratios = Mapping[str, Mapping[str, Ratio | Combined]]  # by map, then by metric


def resampled_counts(units: int, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each of U units is drawn in a bootstrap resample, in chunks (some resamples, U), the same per seed."""
    rng = np.random.default_rng(seed)
    chunk = max(1, min(resamples, CHUNK // max(units, 1)))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        draws = rng.integers(units, size=(size, units)) + units * np.arange(size)[:, None]
        yield np.bincount(draws.ravel(), minlength=size * units).reshape(size, units)


def bootstrap(
    figures: Mapping[str, Ratio | Combined], units: Sequence[str], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:
    """Resample the units (N >= 1 labels) -> {name: (resamples,) values}, NaN where a resample leaves it undefined."""
    parts = {
        (name, i): part
        for name, figure in figures.items()
        for i, part in enumerate(figure.parts if isinstance(figure, Combined) else (figure,))
    }
    drawn = _resample(parts, units, resamples, seed)
    return {
        name: figure.form(*(drawn[name, i] for i in range(len(figure.parts))))
        if isinstance(figure, Combined)
        else drawn[name, 0]
        for name, figure in figures.items()
    }


def _resample(ratios: Mapping[Any, Ratio], units: Sequence[str], resamples: int, seed: int) -> dict[Any, np.ndarray]:
    labels, unit_of = np.unique(np.asarray(units), return_inverse=True)
    tops = [ratio.numerator.reshape(len(unit_of), -1) for ratio in ratios.values()]
    widths = [top.shape[1] for top in tops]
    first = np.cumsum([0, *widths[:-1]])  # each ratio's first column
    top, bottom = np.zeros((len(labels), sum(widths))), np.zeros((len(labels), len(tops)))
    np.add.at(top, unit_of, np.concatenate(tops, 1))
    np.add.at(bottom, unit_of, np.stack([ratio.denominator for ratio in ratios.values()], 1))
    wide = [(i, slice(start, start + width)) for i, (start, width) in enumerate(zip(first, widths)) if width > 1]
    drawn = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for counts in resampled_counts(len(labels), resamples, seed):
            counts = counts.astype(float)
            sums = counts @ top
            largest = sums[:, first]
            for i, columns in wide:  # one denominator for all: the largest ratio is that of the largest sum
                largest[:, i] = sums[:, columns].max(1)
            drawn.append(largest / (counts @ bottom))
    return dict(zip(ratios, np.concatenate(drawn).T, strict=True))


def interval(values: np.ndarray) -> list[float]:
    """Bootstrap values -> [low, high] of the 95 % interval; NaN where none is defined."""
    return intervals(values[:, None])[0]


def intervals(values: np.ndarray) -> list[list[float]]:
    """(resamples, M) -> the `interval` of each of M."""
    found = np.full((values.shape[1], 2), math.nan)
    defined = np.isfinite(values)
    whole = defined.all(0)
    found[whole] = np.percentile(values[:, whole], INTERVAL, axis=0).T
    for i in np.flatnonzero(defined.any(0) & ~whole):
        found[i] = np.percentile(values[defined[:, i], i], INTERVAL)
    return found.tolist()


def values_of(ratios: Ratios) -> dict[str, dict[str, float]]:
    """{map: {metric: Ratio}} -> {map: {metric: value}}."""
    return {name: {metric: ratio.value() for metric, ratio in row.items()} for name, row in ratios.items()}


def intervals_of(
    ratios: Ratios, units: Sequence[str], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict[str, list[float]]]:
    """{map: {metric: Ratio}} -> {map: {metric: [low, high]}}, all maps resampled together; empty for 0 resamples."""
    if not resamples:
        return {}
    flat = {(name, metric): ratio for name, row in ratios.items() for metric, ratio in row.items()}
    spans = iter(intervals(np.stack([*bootstrap(flat, units, resamples, seed).values()], 1)))
    return {name: {metric: next(spans) for metric in row} for name, row in ratios.items()}
