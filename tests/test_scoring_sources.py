"""Several sources: figures against scikit-learn and by hand, assignment by trying every order."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from maps import normalize_maps, upsample_maps
from scoring.metrics import consensus_iou, pixel_average_precision, region_fixed
from scoring.sources import assigned_precision, source_columns, source_ratios

SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=20, deadline=None)


def duets(seed, count=4, size=20):
    """Maps of both sources of `count` images, their truths, and those of their image's sources (2 count, 2, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    maps = normalize_maps(upsample_maps(torch.rand(2 * count, 5, 5, generator=generator), size))
    truth = torch.zeros(count, 2, size, size)
    for sample in truth.flatten(0, 1):
        top, left = torch.randint(0, size - 8, (2,), generator=generator).tolist()
        sample[top : top + 7, left : left + 6] = 1
    return maps, truth.flatten(0, 1), truth.repeat_interleave(2, 0), [f"image{i // 2}" for i in range(2 * count)]


def score(maps, truth, sources, images):
    columns = source_columns(maps, truth, sources) | {
        "iou": consensus_iou(region_fixed(maps), truth),
        "average_precision": pixel_average_precision(maps, truth),
    }
    columns = {name: np.asarray(values) for name, values in columns.items()}
    return columns, {name: ratio.value() for name, ratio in source_ratios(columns, images).items()}


@few
@given(SEEDS)
def test_every_figure_is_that_of_the_definitions(seed):
    maps, truth, sources, images = duets(seed)
    _, found = score(maps, truth, sources, images)
    ious = [(m >= 0.6).mul(t).sum() / (t.sum() + ((m >= 0.6) & (t == 0)).sum()) for m, t in zip(maps, truth)]
    assert found["CIoU@0.3"] == np.mean([iou >= 0.3 for iou in ious])
    assert found["IoU@0.5"] == np.mean([iou >= 0.5 for iou in ious])
    flat = [(t.flatten().numpy(), m.flatten().numpy()) for t, m in zip(truth, maps)]
    assert found["CAP"] == pytest.approx(np.mean([average_precision_score(t, m) for t, m in flat]))
    regions = [m > np.sort(m)[m.size // 2] for _, m in flat]
    median = [average_precision_score(t, r) for (t, _), r in zip(flat, regions)]
    swapped = [average_precision_score(r, t) for (t, _), r in zip(flat, regions)]
    assert [found["CAP_median"], found["CAP_swapped"]] == pytest.approx([np.mean(median), np.mean(swapped)], abs=1e-6)


@few
@given(SEEDS, st.integers(1, 4), st.integers(1, 4))
def test_the_assignment_is_greedy_and_permutation_invariant(seed, maps, sources):
    rng = np.random.default_rng(seed)
    ious, precisions = rng.random((maps, sources)), rng.random((maps, sources))
    taken, free_maps, free_sources = 0.0, {*range(maps)}, {*range(sources)}
    for i, j in sorted(((i, j) for i in range(maps) for j in range(sources)), key=lambda at: -ious[at]):
        if i in free_maps and j in free_sources:
            taken += precisions[i, j]
            free_maps.remove(i), free_sources.remove(j)
    for order in permutations(range(maps)):
        ratio = assigned_precision(ious[[*order]], precisions[[*order]], ["x"] * maps)
        assert ratio.value() == pytest.approx(taken / sources)


def test_swapped_maps_are_forgiven_by_piap_alone():
    _, truth, sources, images = duets(1)
    _, perfect = score(truth, truth, sources, images)
    assert perfect["PIAP"] == perfect["CAP"] == perfect["CIoU@0.3"] == 1
    other = truth.view(-1, 2, *truth.shape[1:]).flip(1).flatten(0, 1)
    _, found = score(other, truth, sources, images)
    assert found["PIAP"] == 1 > found["CAP"]


def test_one_map_for_both_sources_is_right_for_one_of_them_at_most():
    _, truth, sources, images = duets(2)
    same = truth[::2].repeat_interleave(2, 0)
    _, found = score(same, truth, sources, images)
    assert found["PIAP"] == pytest.approx(found["CAP"]) and found["CAP"] < 1


def test_a_source_without_a_map_counts_nothing_and_an_image_may_have_fewer_sources():
    ious = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, np.nan], [0.6, 0.5]])
    precisions = np.array([[1.0, 0.2], [0.3, 0.5], [0.25, np.nan], [1.0, 0.4]])
    ratio = assigned_precision(ious, precisions, ["a", "a", "single", "half"])
    assert ratio.numerator.tolist() == [1.5, 0, 0.25, 1.0] and ratio.denominator.tolist() == [2, 0, 1, 2]
    assert ratio.value() == pytest.approx(2.75 / 5)


def test_sets_of_one_source_have_no_figures_of_several():
    assert source_ratios({"iou": np.ones(2)}, ["a", "b"]) == {}


def test_what_an_image_has_not_is_no_source():
    maps, truth, sources, images = duets(3)
    sources[0, 1] = torch.nan
    columns, _ = score(maps, truth, sources, images)
    assert np.isnan(columns["source_iou"][0, 1]) and np.isfinite(columns["source_iou"][0, 0])
