"""Metrics: the reference numbers, scikit-learn, and what must hold for any map and any ground truth."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, shared_folder
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

import scoring.metrics as metrics
from maps import normalize_maps, upsample_maps
from scoring.columns import map_columns
from scoring.metrics import consensus_iou, success

SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=20, deadline=None)


def boxes_to_truth(boxes, weight=1.0):
    truth = torch.zeros(224, 224)
    for left, top, right, bottom in boxes:
        truth[top:bottom, left:right] += weight
    return truth.clamp(max=1)


def is_constant(maps):
    return maps.flatten(1).amin(1) == maps.flatten(1).amax(1)


def region_half(maps):
    return metrics.region_above(maps, metrics.cut_half(metrics.sort_pixels(maps)))


def region_adaptive(maps, truth):
    return metrics.region_above(maps, metrics.cut_adaptive(metrics.sort_pixels(maps), truth))


def random_batch(seed, count=6, size=24):
    """Smooth, normalised maps and truths of every kind: a box, a consensus of two, a full frame, an empty one."""
    generator = torch.Generator().manual_seed(seed)
    maps = normalize_maps(upsample_maps(torch.rand(count, 5, 5, generator=generator), size))
    truth = torch.zeros(count, size, size)
    for sample in truth[: count - 1]:
        for weight in (0.5, 0.5):
            top, left = torch.randint(0, size - 2, (2,), generator=generator).tolist()
            height, width = torch.randint(2, size, (2,), generator=generator).tolist()
            sample[top : top + height, left : left + width] += weight
    truth[0] = 1
    return maps, truth


# ---------------------------------------------------------------- reference numbers


@pytest.fixture(scope="module")
def golden():
    arrays = dict(np.load(GOLDEN / "evaluation_public.npz"))
    boxes = json.loads((GOLDEN / "evaluation_public.json").read_text())
    weights = {"flickr": 0.5, "vggss": 1.0}
    pairs = zip(boxes["boxes"], boxes["format"], strict=True)
    arrays["truth"] = torch.stack([boxes_to_truth(drawn, weights[kind]) for drawn, kind in pairs])
    for name in ("audio_query", "image_query", "object_prior"):
        arrays[name] = normalize_maps(upsample_maps(torch.from_numpy(arrays[f"{name}_maps"])))
    return arrays


WEIGHTS = {
    "AUD": (1, 0, 0),
    "IMG": (0, 1, 0),
    "OBJ": (0, 0, 1),
    "IQR": (0.6, 0.4, 0),
    "OGL": (0.6, 0, 0.4),
    "ALL": (0.6, 0.2, 0.2),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_fixed_rule_matches_the_reference(golden, name):
    sources = golden["audio_query"], golden["image_query"], golden["object_prior"]
    fused = normalize_maps(sum(weight * maps for weight, maps in zip(WEIGHTS[name], sources, strict=True)))
    ious = consensus_iou(metrics.region_fixed(fused), golden["truth"])
    tolerance = np.full(48, 1e-6)
    if name == "AUD":
        tolerance[35] = 1e-4  # one of its pixels is exactly the threshold
    assert (np.abs(ious.numpy() - golden[f"iou_{name}"]) <= tolerance).all()


def test_half_and_adaptive_rules_match_the_reference(golden):
    maps, truth = golden["audio_query"], golden["truth"]
    half = consensus_iou(region_half(maps), truth)
    adaptive = consensus_iou(region_adaptive(maps, truth), truth)
    assert np.allclose(half, golden["iou_half"], rtol=0, atol=1e-6)
    assert np.allclose(adaptive, golden["iou_adaptive"], rtol=0, atol=1e-6)


def test_pixel_average_precision_matches_the_reference(golden):
    ours = metrics.pixel_average_precision(golden["audio_query"], golden["truth"])
    assert np.allclose(ours, golden["pixel_average_precision"], rtol=0, atol=1e-6)


def test_avsbench_matches_the_reference(golden):
    maps, masks = torch.from_numpy(golden["avs_prob"]), torch.from_numpy(golden["avs_mask"])
    at_half = metrics.jaccard(maps, masks)[:, metrics.JACCARD_THRESHOLDS.index(0.5)]
    curves = metrics.f_scores(maps, masks)[:9]  # the last mask is empty
    found = [at_half.mean().item(), curves.mean(0).max().item()]
    assert np.allclose(found, golden["avs_summary"], rtol=0, atol=1e-6)
    assert np.allclose(curves.amax(1), golden["avs_F_per_frame_max"], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_vggss_ceiling_and_disc_are_the_known_bars():
    entries = json.loads((shared_folder("metadata") / "vggss.json").read_text())
    ceiling, disc, frame = [], [], []
    for start in range(0, len(entries), 64):
        boxes = [(224 * np.clip(entry["bbox"], 0, 1)).astype(int) for entry in entries[start : start + 64]]
        truth = torch.stack([boxes_to_truth(drawn) for drawn in boxes])
        ceiling.append(metrics.ceiling_iou(truth, "half"))
        disc.append(consensus_iou(metrics.centred_disc().expand_as(truth), truth))
        frame.append(truth.mean((1, 2)))
    assert success(torch.cat(ceiling).numpy()).mean() == pytest.approx(0.505, abs=5e-4)
    assert success(torch.cat(disc).numpy()).mean() == pytest.approx(0.340, abs=1e-3)
    assert torch.cat(frame).mean().item() == pytest.approx(0.31, abs=5e-3)


# ---------------------------------------------------------------- maps and regions


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-30])
def test_a_constant_map_predicts_nothing_and_never_points(value):
    maps = torch.full((1, 24, 24), value)
    maps[0, 3, 3] += value * 5e-7  # below 1e-6 of the largest magnitude: rounding, not a source
    truth = torch.ones(1, 24, 24)
    ready = normalize_maps(maps)
    assert not metrics.region_fixed(ready).any()
    assert not region_half(ready).any()
    assert not region_adaptive(ready, truth).any()
    assert not metrics.pointing(ready, truth).any()
    assert not metrics.f_scores(ready, truth).any() and not metrics.jaccard(ready, truth).any()
    assert (ready == 0).all()


@few
@given(SEEDS)
def test_half_and_adaptive_regions_have_their_size(seed):
    order = torch.randperm(23 * 24, generator=torch.Generator().manual_seed(seed)).float().reshape(1, 23, 24)
    truth = torch.zeros(1, 23, 24)
    truth[0, :3, : 1 + seed % 24] = 0.5
    assert region_half(order).sum() == 23 * 24 - 1 - 23 * 24 // 2
    assert region_adaptive(order, truth).sum() == (truth != 0).sum() - 1
    assert not region_adaptive(order, torch.zeros_like(truth)).any()


# ---------------------------------------------------------------- scores


def test_consensus_iou_by_hand():
    truth = torch.tensor([[[1.0, 0.5], [0.0, 0.25]]])
    region = torch.tensor([[[True, False], [True, True]]])
    assert consensus_iou(region, truth).item() == pytest.approx(1.25 / (1.75 + 1))
    assert consensus_iou(region, torch.zeros_like(truth)).item() == 0
    assert consensus_iou(torch.zeros_like(region), torch.zeros_like(truth)).item() == 0
    with pytest.raises(ValueError, match="truth"):
        consensus_iou(region, truth[0])


@few
@given(SEEDS)
def test_a_perfect_map_scores_one_under_the_fixed_rule(seed):
    _, truth = random_batch(seed)
    perfect = (truth[1:-1] > 0).float()  # the box itself, neither the whole frame nor an empty one
    perfect = perfect[~is_constant(perfect)]
    assume(len(perfect))
    kept = truth[1:-1][~is_constant((truth[1:-1] > 0).float())]
    assert (consensus_iou(metrics.region_fixed(normalize_maps(perfect)), kept) == 1).all()
    box = (kept > 0).float()
    assert (metrics.pixel_average_precision(perfect, box) == 1).all() and metrics.pointing(perfect, box).all()


@few
@given(SEEDS, st.integers(-20, 20))
def test_rescaling_a_map_changes_no_score(seed, exponent):
    maps, truth = random_batch(seed)
    before = map_columns(maps, truth)
    after = map_columns(normalize_maps(maps * 2.0**exponent), truth)  # a power of two: no rounding
    assert all(torch.equal(after[name].nan_to_num(-1), before[name].nan_to_num(-1)) for name in before)
    coarse = (maps * 1024).round() / 1024  # room for an exact shift in float32
    shifted = normalize_maps(coarse.double() * 3 + 7)
    plain = normalize_maps(coarse.double())
    for region in (region_half, lambda m: region_adaptive(m, truth)):
        assert torch.equal(region(coarse * 4 - 2), region(coarse))
    assert (shifted - plain).abs().amax() < 1e-12


@few
@given(SEEDS)
def test_neither_order_nor_batch_size_changes_a_score(seed):
    maps, truth = random_batch(seed, count=8)
    together = map_columns(maps, truth)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    shuffled = map_columns(maps[order], truth[order])
    single = [map_columns(maps[i : i + 1], truth[i : i + 1]) for i in range(8)]
    for name, values in together.items():
        values = values.nan_to_num(-1)
        assert torch.equal(shuffled[name].nan_to_num(-1), values[order])
        assert torch.equal(torch.cat([columns[name] for columns in single]).nan_to_num(-1), values)


@few
@given(SEEDS, st.sampled_from([2, 5, 1000]), st.sampled_from([torch.float32, torch.float64]))
def test_average_precision_is_scikit_learns_with_ties(seed, levels, dtype):
    generator = torch.Generator().manual_seed(seed)
    maps = (torch.rand(3, 16, 16, generator=generator, dtype=dtype) * levels).floor() / levels
    truth = (torch.rand(3, 16, 16, generator=generator) * 3).floor() / 2  # 0, 0.5 and 1
    truth[:, 0, 0] = 1
    wanted = [average_precision_score((g >= 0.5).flatten(), m.flatten()) for m, g in zip(maps, truth, strict=True)]
    assert np.allclose(metrics.pixel_average_precision(maps, truth), wanted, rtol=0, atol=1e-12)


def test_pointing_needs_the_largest_pixel_inside():
    maps, truth = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)
    truth[:, :4, :4] = 0.5
    maps[0, 1, 1] = maps[1, 6, 6] = 1
    maps[2, 1, 1] = maps[2, 6, 6] = 1  # two largest pixels, one outside: no luck of the order
    assert metrics.pointing(maps, truth).tolist() == [True, False, False]


# ---------------------------------------------------------------- references


@few
@given(SEEDS)
def test_no_map_without_ties_passes_the_ceiling_and_the_best_one_reaches_it(seed):
    _, truth = random_batch(seed, size=12)
    generator = torch.Generator().manual_seed(seed)
    truth[1] = torch.randint(0, 17, (12, 12), generator=generator) / 16  # any fractions, not only halves
    noise = torch.stack([torch.randperm(144, generator=generator) for _ in truth]).reshape_as(truth) / 1e3
    regions = {"half": region_half, "adaptive": lambda maps: region_adaptive(maps, truth)}
    for rule, region in regions.items():
        ceiling = metrics.ceiling_iou(truth, rule)
        assert (consensus_iou(region(noise), truth) <= ceiling + 1e-12).all()
        best = consensus_iou(region(truth + noise / 1e3), truth)  # G's order, ties broken
        assert torch.allclose(best, ceiling, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="upper"):
        metrics.ceiling_iou(truth, "upper")
    assert metrics.ceiling_iou(truth, "fixed").tolist() == [float(sample.any()) for sample in truth]


def test_the_disc_covers_half_the_picture_and_is_centred():
    disc = metrics.centred_disc()
    assert disc.sum().item() == pytest.approx(224 * 224 / 2, rel=2e-3)
    assert torch.equal(disc, disc.flip(0)) and torch.equal(disc, disc.T)
    assert metrics.centred_disc(10, 20).shape == (10, 20)


# ---------------------------------------------------------------- masks


@few
@given(SEEDS)
def test_jaccard_and_f_are_those_of_the_counted_pixels(seed):
    maps, masks = random_batch(seed)
    maps, masks = (maps * 20).round() / 20, (masks > 0).float()  # pixels exactly on thresholds
    for column, threshold in enumerate(metrics.JACCARD_THRESHOLDS):
        region, mask = maps.double() > threshold, masks > 0
        union = (region | mask).flatten(1).sum(1)
        wanted = torch.where(
            mask.flatten(1).any(1), (region & mask).flatten(1).sum(1) / union, 1 - region.double().mean((1, 2))
        )
        assert torch.allclose(metrics.jaccard(maps, masks)[:, column], wanted.double(), atol=1e-12)
    curve = metrics.f_scores(maps, masks)
    for column in (0, 100, 254):
        region = maps.double() >= metrics.F_THRESHOLDS[column]
        both = (region & (masks > 0)).flatten(1).sum(1).double()
        precision, recall = both / region.flatten(1).sum(1), both / masks.flatten(1).sum(1)
        wanted = (1.3 * precision * recall / (0.3 * precision + recall)).nan_to_num(0)
        assert torch.allclose(curve[:, column], wanted, atol=1e-12)


def test_a_region_scores_as_its_map_does():
    _, truth = random_batch(3)
    region = metrics.centred_disc(24, 24).expand_as(truth)
    wanted = metrics.pixel_average_precision(region.float(), truth)
    assert torch.allclose(metrics.region_average_precision(region, truth), wanted, equal_nan=True)


def test_share_above_counts_the_pixels_strictly_above_the_threshold():
    maps = torch.zeros(3, 4, 5)
    maps[0, 0], maps[1] = 0.7, 1.0
    assert metrics.share_above(maps, 0.5).tolist() == [0.25, 1.0, 0.0]
    assert metrics.share_above(maps, float(maps[0, 0, 0])).tolist() == [0, 1, 0]  # at the threshold is not above it
    assert metrics.share_above(maps - 2, -2.5).tolist() == [1, 1, 1] and metrics.share_above(maps, 2).sum() == 0
    assert metrics.share_above(maps, 0.5).dtype == torch.float64
    maps[2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="map 2 of the batch"):
        metrics.share_above(maps, 0.5)
