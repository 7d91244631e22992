"""Figures of a set: by hand, and the reference numbers."""

import json
import warnings
import weakref

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

import scoring.metrics as metrics
import scoring.summary as summary
from annotations import GroundTruth
from maps import normalize_maps, upsample_maps
from scoring.columns import map_columns
from scoring.summary import SetScores, Table, ratios_of

SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=20, deadline=None)


def random_set(seed, count=12, size=224):
    """Ids, maps and boxes; the last box is empty."""
    generator = torch.Generator().manual_seed(seed)
    maps = normalize_maps(upsample_maps(torch.rand(count, 5, 5, generator=generator), size))
    truth = torch.zeros(count, size, size)
    for sample in truth[:-1]:
        top, left = torch.randint(0, size - 2, (2,), generator=generator).tolist()
        sample[top : top + 90, left : left + 70] = 1
    return [f"image{i // 2}_{i % 2}" for i in range(count)], maps, truth


def score(ids, maps, truth, batch=5, truth_of_set=None, resamples=50, **scalars):
    wanted = truth_of_set or GroundTruth("x", sorted(ids), None, len(ids), {i: "ab"[len(i) % 2] for i in ids})
    one = SetScores(wanted)
    for start in range(0, len(ids), batch):
        rows = slice(start, start + batch)
        chosen = {name: values[rows] for name, values in scalars.items()}
        list(one.add(ids[rows], truth[rows], {"AUD": maps[rows], "AUD_wrong": maps.flip(0)[rows]}, chosen))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return one.summary(resamples=resamples)


def test_the_summary_matches_the_reference():
    golden = np.load(GOLDEN / "evaluation_public.npz")
    boxes = json.loads((GOLDEN / "evaluation_public.json").read_text())
    maps = normalize_maps(upsample_maps(torch.from_numpy(golden["audio_query_maps"])))
    truth = torch.zeros(48, 224, 224)
    for sample, drawn, kind in zip(truth, boxes["boxes"], boxes["format"], strict=True):
        for left, top, right, bottom in drawn:
            sample[top:bottom, left:right] += 0.5 if kind == "flickr" else 1
    ids = [f"image{index // 2:02}_{index % 2}" for index in range(48)]
    wanted = GroundTruth("x", ids, None, 48, interactive=True)
    figures = score(ids, maps, truth.clamp(max=1), 10, wanted, resamples=0)["maps"]["AUD"]
    names = [f"{name}_{rule}" for name in ("cIoU", "IIoU", "AUC", "IAUC") for rule in ("half", "adaptive")]
    assert np.allclose([figures[name] for name in names], golden["summary_interactive"], rtol=0, atol=1e-6)
    assert np.allclose([figures[n] for n in ("cIoU", "AUC", "mean_iou")], golden["summary_AUD"], rtol=0, atol=1e-5)
    assert figures["mAP"] == pytest.approx(golden["pixel_average_precision"].mean(), abs=1e-6)
    assert figures["samples"] == 48 and figures["images"] == 24


@few
@given(SEEDS)
def test_neither_order_nor_batch_size_changes_a_figure_or_an_interval(seed):
    ids, maps, truth = random_set(seed)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    shuffled = [ids[i] for i in order]
    together = score(ids, maps, truth, 64)
    assert repr(together) == repr(score(ids, maps, truth, 1))
    other = SetScores(GroundTruth("x", sorted(ids), None, len(ids), {i: "ab"[len(i) % 2] for i in ids}))
    list(other.add(shuffled, truth[order], {"AUD": maps[order], "AUD_wrong": maps.flip(0)[order]}, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert repr(other.summary(resamples=50)) == repr(together)


def test_ties_at_the_cut_are_counted_and_warned_about():
    binary = torch.zeros(1, 10, 10)
    binary[0, :3] = 1
    columns = {"AUD": {name: values.numpy() for name, values in map_columns(binary, binary).items()}}
    with pytest.warns(UserWarning, match="rule (half|adaptive): .* 1 of 1 AUD maps"):
        assert summary.count_tied(columns) == {"AUD": {"tied_half": 1, "tied_adaptive": 1}}
    smooth = map_columns(torch.arange(400.0).reshape(1, 20, 20) / 399, torch.ones(1, 20, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert summary.count_tied({"AUD": {k: v.numpy() for k, v in smooth.items()}})["AUD"]["tied_half"] == 0


def test_an_empty_ground_truth_is_a_miss_and_counted():
    ids, maps, truth = random_set(0)
    maps[:3] = truth[:3]
    result = score(ids, maps, truth)
    figures = result["maps"]["AUD"]
    assert figures["empty"] == 1 and figures["samples"] == 12
    assert figures["cIoU_sounding"] == pytest.approx(figures["cIoU"] * 12 / 11)
    assert figures["cIoU"] >= 3 / 12 and result["by_size"]["empty"]["samples"] == 1


def test_classes_and_sizes_split_the_set():
    ids, maps, truth = random_set(1)
    result = score(ids, maps, truth)
    for key in ("by_class", "by_size"):
        groups = result[key].values()
        assert sum(group["samples"] for group in groups) == 12
        hits = sum(group["samples"] * group["maps"]["AUD"]["cIoU"] for group in groups)
        assert hits / 12 == pytest.approx(result["maps"]["AUD"]["cIoU"])
    assert summary.size_names(np.array([0, 1, 1023, 1024, 9216, 20736])).tolist() == [
        "empty", "under 32x32", "under 32x32", "32x32 to 96x96", "96x96 to 144x144", "larger",
    ]  # fmt: skip


def test_listening_is_the_difference_to_wrong_sounds_with_an_interval_of_its_own():
    ids, maps, truth = random_set(2)
    maps[:6] = truth[:6]
    result = score(ids, maps, truth)
    maps_of = result["maps"]
    assert maps_of["AUD"]["listening"] == pytest.approx(maps_of["AUD"]["cIoU"] - maps_of["AUD_wrong"]["cIoU"])
    low, high = result["intervals"]["AUD"]["listening"]
    assert low <= maps_of["AUD"]["listening"] <= high and "listening" not in maps_of["AUD_wrong"]


def test_references_stand_beside_every_rule():
    truth = torch.zeros(2, 224, 224)
    truth[0, :, :56] = 1
    references = score(["a_0", "a_1"], torch.rand(2, 9, 9), truth)["references"]
    assert references["whole_frame"]["mean_iou"] == references["whole_frame"]["mean_iou_half"] == pytest.approx(0.125)
    assert references["ceiling"]["cIoU"] == 0.5 and references["ceiling"]["cIoU_sounding"] == 1
    assert references["ceiling"]["mean_iou_half"] == pytest.approx(56 * 224 / (224 * 112 - 1) / 2)
    assert references["whole_frame"]["mAP"] == pytest.approx(0.125) and references["ceiling"]["mAP"] == 0.5


def test_masks_add_their_two_figures_with_the_headline_at_one_half():
    ids, maps, truth = random_set(4)
    wanted = GroundTruth("x", ids, None, 12, masks=True, unit_of={i: i[:6] for i in ids})
    result = score(ids, maps, truth, truth_of_set=wanted)
    figures = result["maps"]["AUD"]
    assert figures["mIoU"] == pytest.approx(metrics.jaccard(maps, truth)[:, 9].mean().item())
    assert figures["mIoU"] == pytest.approx(result["mIoU_at"]["AUD"]["0.5"]) and len(result["mIoU_at"]["AUD"]) == 19
    assert figures["F"] == pytest.approx(metrics.f_scores(maps, truth)[:-1].mean(0).max().item(), abs=1e-6)
    assert result["references"]["ceiling"]["mIoU"] == result["references"]["ceiling"]["F"] == 1
    assert "mIoU" not in score(ids, maps, truth)["maps"]["AUD"]


def test_silent_pairs_add_detection_only_where_there_are_some():
    ids, maps, truth = random_set(5)
    maps[:6] = truth[:6]
    wanted = GroundTruth("x", ids, None, 12, silent=frozenset(ids[-1:]))
    sure = torch.linspace(1, 0, 12, dtype=torch.float64)
    result = score(ids, maps, truth, truth_of_set=wanted, confidence=sure)
    figures = result["maps"]["AUD"]
    assert figures["presence_AP"] == 1 and figures["AP_50"] == figures["AP"]
    assert {"AP_30", "AP_75", "max_F1_half", "AP_adaptive"} <= figures.keys()
    assert set(result["intervals"]["AUD"]) >= {"AP", "max_F1", "max_F1_11", "presence_AP"}
    assert "AP" not in score(ids, maps, truth, confidence=sure)["maps"]["AUD"]


# ---------------------------------------------------------------- cIoU, AUC and what they become on interactive sets


@pytest.mark.parametrize("name", ["AUD", "IMG", "OBJ", "IQR", "OGL", "ALL"])
def test_ciou_and_auc_of_the_reference_ious_are_the_reference(name):
    golden = np.load(GOLDEN / "evaluation_public.npz")
    ratios = ratios_of({"iou": golden[f"iou_{name}"]}, np.zeros(48, dtype=bool))
    found = [ratios[metric].value() for metric in ("cIoU", "AUC", "mean_iou")]
    assert np.allclose(found, golden[f"summary_{name}"], rtol=0, atol=1e-6)


def test_thresholds_of_the_curve_are_exact():
    for step in range(21):  # an IoU of exactly x counts at x: 0.05 * 3 would be above 0.15
        (area,) = metrics.area_under_success(np.array([step / 20]))
        assert area == pytest.approx((step + 0.5) / 20 if step < 20 else 1)
    assert summary.success(np.array([0.5, 0.49, 0.51])).tolist() == [True, False, True]
    assert metrics.success_steps(np.array([0.25, np.nan])).sum(1).tolist() == [6, 0]


def test_interactive_images_need_every_sound():
    ids = ["a_b_0", "a_b_1", "c_0", "d_0", "d_1", "a_b_2"]
    groups = summary.interactive_groups(ids)
    assert groups == {"a_b": [0, 1, 5], "d": [3, 4]}
    assert summary.interactive_groups(ids, expected=[*ids, "d_2"]) == {"a_b": [0, 1, 5]}
    worst, first = summary.worst_by_image(np.array([0.9, 0.4, 0.0, 0.6, 0.7, 0.8]), groups)
    assert first.tolist() == [True, False, False, True, False, False] and worst[first].tolist() == [0.4, 0.6]
    worst, first = summary.worst_by_image(np.array([True, True, False, True, False, True]), groups)
    assert worst[first].tolist() == [True, False]
    assert not summary.worst_by_image(np.ones(6), {})[1].any()


def test_interactive_figures_follow_the_worst_sound_of_an_image():
    columns = {"iou": np.array([0.9, 0.6, 0.7, 0.2]), "pointing": np.array([True, True, True, False])}
    ratios = ratios_of(columns, np.zeros(4, dtype=bool), {"a": [0, 1], "b": [2, 3]})
    assert ratios["IIoU"].value() == ratios["both_pointing"].value() == 0.5
    assert ratios["IAUC"].value() == pytest.approx(metrics.area_under_success(np.array([0.6, 0.2])).mean())


def test_tables_keep_the_order_they_are_asked_for():
    table = Table()
    table.extend({"x": torch.tensor([1, 2])})
    table.extend({"x": torch.tensor([3])})
    assert table.columns(np.array([2, 0, 1]))["x"].tolist() == [3, 1, 2]


def test_a_table_grows_without_keeping_what_came_and_widens_its_numbers():
    rng, table, parts, watched = np.random.default_rng(0), Table(), [], []
    for size, kind in [(3, np.float32), (0, np.float32), (300, np.float32), (5, np.float64), (4, np.float32)]:
        part = {"one": rng.random(size).astype(kind), "curve": rng.random((size, 4), np.float32)}
        table.extend(part)
        parts.append({name: values.copy() for name, values in part.items()})
        watched += map(weakref.ref, part.values())
        del part
    assert not any(one() is not None for one in watched)  # or they hold the memory between large maps
    order = rng.permutation(312)
    for name, values in table.columns(order).items():
        wanted = np.concatenate([part[name] for part in parts])
        assert values.dtype == wanted.dtype and (values == wanted[order]).all()
    assert Table().columns() == {}


@pytest.mark.slow
def test_scores_of_more_samples_take_little_more_memory():
    from experiments.bench_eval import ROOT, score_with

    less, more = (score_with(ROOT, pairs, "negatives")["memory_gib"] for pairs in (100, 500))
    assert more - less < 0.25  # held between enlarged maps, the scores kept 1.4 MB of memory a sample
