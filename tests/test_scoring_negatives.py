"""Negative audio: every figure against a second computation by loops from the definitions, and the edge cases."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scoring.bootstrap import Ratio, bootstrap, interval
from scoring.metrics import region_change, share_above
from scoring.negatives import NEGATIVES, harmonic_mean, negative_columns, negative_ratios, over_seeds, third_quartile

SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=15, deadline=None)


def random_maps(seed, count=5, seeds=3, size=12, masks=False):
    """Own maps (N, H, W), negatives (N, S, H, W), truth with fractions (or masks), one of them empty, and u."""
    rng = np.random.default_rng(seed)
    own = rng.random((count, size, size)).astype(np.float32)
    negatives = {kind: rng.random((count, 1 if kind == "silence" else seeds, size, size)) for kind in NEGATIVES}
    negatives = {kind: (maps ** rng.integers(1, 6)).astype(np.float32) for kind, maps in negatives.items()}
    truth = np.zeros((count, size, size), np.float32)
    for i in range(count - 1):
        top, left = rng.integers(0, size - 4, 2)
        truth[i, top : top + rng.integers(2, 5), left : left + rng.integers(2, 5)] = 1
        if not masks:
            truth[i, : size // 3, left:] += 0.5
    return own, negatives, np.minimum(truth, 1), float(rng.uniform(0.2, 0.9))


def as_tensors(own, negatives, truth):
    return torch.from_numpy(own), {k: torch.from_numpy(v) for k, v in negatives.items()}, torch.from_numpy(truth)


def figures(own, negatives, truth, u, masks=False):
    columns = negative_columns(*as_tensors(own, negatives, truth), u, masks)
    columns = {name: np.asarray(values) for name, values in columns.items()}
    return {k: v.value() for k, v in negative_ratios(columns, (truth == 0).all((1, 2))).items()}


# ---------------------------------------------------------------- the second computation: loops, one sample at a time


def trapezoids(heights):
    return sum((heights[i] + heights[i + 1]) / 2 * 0.05 for i in range(20))


def reference(own, negatives, truth, u):
    count, n = len(own), own[0].size
    u = np.float32(u)
    pia = {c: [[sum(1 for x in a.ravel() if x > u) / n for a in maps[i]] for i in range(count)]
           for c, maps in negatives.items()}  # fmt: skip
    found = {f"pIA_{c}": sum(sum(s) / len(s) for s in shares) / count for c, shares in pia.items()}
    for c, shares in pia.items():
        per_seed = []
        for s in range(len(shares[0])):
            curve = [sum(1 for sample in shares if sample[s] <= i / 20) / count for i in range(21)]
            per_seed.append(trapezoids(curve))
        found[f"AUC_N_{c}"] = sum(per_seed) / len(per_seed)
    ious = []
    for a, g in zip(own, truth, strict=True):
        top = sum(float(w) for x, w in zip(a.ravel(), g.ravel()) if x >= u)
        bottom = float(g.sum()) + sum(1 for x, w in zip(a.ravel(), g.ravel()) if x >= u and w == 0)
        ious.append(top / bottom if bottom else 0.0)
    found["cIoU_u"] = sum(ious) / count
    found["AUC_u"] = trapezoids([sum(1 for x in ious if x >= i / 20) / count for i in range(21)])
    kinds = list(negatives)
    for name in ("pIA", "AUC_N"):
        found[name] = sum(found[f"{name}_{c}"] for c in kinds) / len(kinds)
    dark = sum(100 - 100 * found[f"pIA_{c}"] for c in kinds) / len(kinds)
    inside = 100 * found["cIoU_u"]
    found["F_LOC"] = 2 * inside * dark / (inside + dark) / 100 if inside + dark else 0.0
    a, b = found["AUC_u"], found["AUC_N"]
    found["F_AUC"] = 2 * a * b / (a + b) if a + b else 0.0
    lit = {"own": own[:, None] > u} | {c: maps > u for c, maps in negatives.items()}
    names = list(lit)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            values = []
            for x, y in zip(lit[one], lit[other], strict=True):
                for s in range(max(len(x), len(y))):
                    p, q = x[min(s, len(x) - 1)], y[min(s, len(y) - 1)]
                    either = (p | q).sum()
                    values.append((p & q).sum() / either if either else 1.0)
            found[f"change_{one}_{other}"] = sum(values) / len(values)
    return found


@few
@given(SEEDS)
def test_every_figure_is_that_of_the_definitions(seed):
    own, negatives, truth, u = random_maps(seed)
    ours, theirs = figures(own, negatives, truth, u), reference(own, negatives, truth, u)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == pytest.approx(theirs[name], abs=1e-9) for name in theirs), (ours, theirs)


@few
@given(SEEDS, st.sampled_from([-1.0, 0.0, 1.0, 7.0]))
def test_a_threshold_outside_of_the_range_lights_all_or_nothing(seed, u):
    own, negatives, truth, _ = random_maps(seed)
    negatives["noise"][0] = 0  # pixels exactly at a threshold of 0 are not lit, though they belong to {A >= u}
    ours, theirs = figures(own, negatives, truth, u), reference(own, negatives, truth, u)
    assert all(ours[name] == pytest.approx(theirs[name], abs=1e-9) for name in theirs)
    if u >= 1:
        assert ours["pIA"] == ours["cIoU_u"] == ours["F_LOC"] == 0 and ours["AUC_N"] == 1
        assert all(ours[name] == 1 for name in ours if name.startswith("change"))  # both empty
    if u < 0:
        assert ours["pIA"] == 1 and ours["F_LOC"] == 0 and ours["AUC_N"] == pytest.approx(0.025)
        assert ours["cIoU_u"] == pytest.approx(np.mean([g.sum() / (g.sum() + (g == 0).sum()) for g in truth]))


def test_one_empty_region_and_two():
    dark, lit = torch.zeros(1, 4, 4, dtype=torch.bool), torch.ones(1, 4, 4, dtype=torch.bool)
    assert [region_change(a, b).item() for a, b in ((dark, dark), (dark, lit), (lit, lit))] == [1, 0, 1]
    assert share_above(lit.float(), 1.0).item() == 0 and share_above(lit.float(), 0.999).item() == 1


def test_a_map_that_hears_nothing_has_its_figures_from_its_region_alone():
    own, negatives, truth, u = random_maps(3)
    deaf = {kind: np.repeat(own[:, None], maps.shape[1], 1) for kind, maps in negatives.items()}
    found = figures(own, deaf, truth, u)
    share = (own > np.float32(u)).mean()
    assert all(found[f"pIA_{kind}"] == pytest.approx(share) for kind in NEGATIVES)
    assert all(found[name] == 1 for name in found if name.startswith("change"))
    assert found["F_LOC"] == pytest.approx(harmonic_mean(found["cIoU_u"], 1 - share))


def test_kinds_that_are_not_there_do_not_count():
    own, negatives, truth, u = random_maps(4)
    one = {"noise": negatives["noise"]}
    found = figures(own, one, truth, u)
    assert found["pIA"] == found["pIA_noise"] and "pIA_silence" not in found and "change_own_noise" in found
    assert found == pytest.approx(reference(own, one, truth, u), abs=1e-9)
    assert negative_ratios({}, np.zeros(3, bool)) == {}
    assert figures(own, {}, truth, u) == pytest.approx({name: found[name] for name in ("cIoU_u", "AUC_u")})


def test_pairs_whose_source_is_not_in_view_count_for_the_negatives_only():
    own, negatives, truth, u = random_maps(5)
    columns = negative_columns(*as_tensors(own, negatives, truth), u)
    columns = {name: np.asarray(values, float) for name, values in columns.items()}
    whole = {k: v.value() for k, v in negative_ratios(columns, np.zeros(5, bool)).items()}
    columns["iou_u"][-1] = np.nan  # its truth is empty: 0 before
    part = {k: v.value() for k, v in negative_ratios(columns, np.zeros(5, bool)).items()}
    assert part["cIoU_u"] == pytest.approx(whole["cIoU_u"] * 5 / 4) and part["pIA"] == whole["pIA"]
    assert part["AUC_u"] > whole["AUC_u"] * 1.2 and "TN_u" not in whole
    columns["lit_own"][-1] = 0
    assert part["TN_u"] == 0 and negative_ratios(columns, np.zeros(5, bool))["TN_u"].value() == 1


def test_intervals_resample_the_harmonic_mean_as_a_whole():
    own, negatives, truth, u = random_maps(6, count=40)
    columns = negative_columns(*as_tensors(own, negatives, truth), u)
    columns = {name: np.asarray(values) for name, values in columns.items()}
    found = negative_ratios(columns, np.zeros(40, bool))
    drawn = bootstrap({name: found[name] for name in ("cIoU_u", "pIA", "F_LOC")}, range(40), 200)
    assert drawn["F_LOC"] == pytest.approx(harmonic_mean(drawn["cIoU_u"], 1 - drawn["pIA"]))
    low, high = interval(drawn["F_LOC"])
    assert low < found["F_LOC"].value() < high
    alone = bootstrap({"F_LOC": found["F_LOC"]}, range(40), 200)["F_LOC"]
    assert (alone == drawn["F_LOC"]).all()
    assert isinstance(found["pIA"], Ratio)


def test_every_seed_of_a_negative_is_told():
    own, negatives, truth, u = random_maps(7, seeds=4)
    columns = {k: np.asarray(v) for k, v in negative_columns(*as_tensors(own, negatives, truth), u).items()}
    told = over_seeds(columns)
    assert set(told) == {"pIA_noise", "pIA_offscreen"} and all(len(values) == 4 for values in told.values())
    assert np.mean(told["pIA_noise"]) == pytest.approx(negative_ratios(columns, np.zeros(5, bool))["pIA_noise"].value())


# ---------------------------------------------------------------- AVSBench-Robust


def reference_masks(maps, masks):
    """mIoU, F (beta^2 = 0.3) and FPR of maps (N, S, H, W) at 0.5, by loops."""
    jaccards, curves, lit = [], [], []
    for of_seeds, mask in zip(maps, masks, strict=True):
        m, per_seed = mask != 0, []
        for a in of_seeds:
            p = a > 0.5
            jaccards.append(((p & m).sum() / (p | m).sum()) if m.any() else (~p).sum() / p.size)
            lit.append(p.sum() / p.size)
            curve = []
            for t in np.linspace(0, 1 - 1e-10, 255):
                p = a >= t
                hit = (p & m).sum()
                precision, recall = hit / max(p.sum(), 1), hit / max(m.sum(), 1)
                bottom = 0.3 * precision + recall
                curve.append(1.3 * precision * recall / bottom if bottom else 0.0)
            per_seed.append(curve)
        if m.any():
            curves.append(np.mean(per_seed, 0))
    return np.mean(jaccards), np.mean(curves, 0).max(), np.mean(lit)


def test_masks_have_the_figures_of_avsbench_under_every_sound():
    own, negatives, truth, u = random_maps(8, masks=True)
    found = figures(own, negatives, truth, u, masks=True)
    for kind, maps in {"own": own[:, None], **negatives}.items():
        wanted = reference_masks(maps.astype(float), truth)
        assert [found[f"{name}_{kind}"] for name in ("mIoU", "F", "FPR")] == pytest.approx(wanted, abs=1e-6)
    assert found["FPR_noise"] == pytest.approx(figures(own, negatives, truth, 0.5)["pIA_noise"], abs=1e-12)


def test_the_threshold_of_a_method_is_the_third_quartile():
    assert third_quartile([0.0, 1.0, 2.0, 3.0, 4.0]) == 3.0
