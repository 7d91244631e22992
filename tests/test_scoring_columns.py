"""One sort gives the scores that the definitions give."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import scoring.columns as columns
from maps import normalize_maps, upsample_maps
from scoring.metrics import RULES

CASES = st.tuples(
    st.integers(0, 2**32 - 1),
    st.sampled_from((16, 37)),
    st.sampled_from((1.0, 0.5)),
    st.sampled_from(("smooth", "steps", "binary", "double")),
)


def batch_of(seed, size, weight, kind, count=5):
    """Normalised maps, one of them constant, and truths of boxes, one of them empty and one of the whole frame."""
    rng = np.random.default_rng(seed)
    maps = upsample_maps(torch.from_numpy(rng.random((count, 7, 7), dtype=np.float32)), size)
    if kind == "double":
        maps = maps.double() + 1e-9 * torch.from_numpy(rng.random((count, size, size)))
    maps = normalize_maps(maps)
    maps = {"steps": (5 * maps).round() / 5, "binary": (maps > 0.5).float()}.get(kind, maps)
    maps[0] = 0
    truth = torch.zeros(count, size, size)
    for own in truth[2:]:
        for _ in range(3):
            (top, left), (height, width) = rng.integers(0, size, 2), rng.integers(1, size, 2)
            own[top : top + height, left : left + width] += weight
    truth[1] = 1
    return maps, truth.clamp(max=1)


def same(found, wanted, atol=0.0):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype and found[name].shape == values.shape, name
        ours, theirs = (x.double().numpy() for x in (found[name], values))
        assert np.allclose(ours, theirs, rtol=0, atol=atol, equal_nan=True), name


@settings(max_examples=40, deadline=None)
@given(CASES)
def test_scores_by_rank_are_those_of_the_definitions_to_the_last_bit(case):
    maps, truth = batch_of(*case)
    same(columns.map_columns(maps, truth, True), columns._by_definition(maps, truth, True))


def test_at_full_size_they_are_so_too():
    maps, truth = batch_of(0, 224, 1.0, "smooth", 3)
    same(columns.map_columns(maps, truth, True), columns._by_definition(maps, truth, True))


@settings(max_examples=20, deadline=None)
@given(CASES)
def test_what_a_gpu_runs_gives_the_same_scores(case):
    """Its own sort and sums, run on the CPU here."""
    maps, truth = batch_of(*case)
    counts = columns._count_on_device(maps, columns.half_steps(truth), True)
    found, wanted = columns._from_counts(counts, True), columns.map_columns(maps, truth, True)
    same(found, wanted, 1e-12)
    assert all(
        found[name].equal(wanted[name]) for name in ("pointing", "tied_half", *("iou" + s for s in RULES.values()))
    )


@settings(max_examples=20, deadline=None)
@given(CASES)
def test_references_by_counts_are_those_of_the_definitions(case):
    _, truth = batch_of(*case)
    disc = columns.metrics.centred_disc(*truth.shape[1:]).expand(truth.shape)
    regions = {"ceiling": truth >= 0.5, "whole_frame": torch.ones_like(disc), "centred_disc": disc}
    for name, found in columns.reference_columns(truth, True).items():
        same(found, columns._reference_by_definition(name, regions[name], truth, True))


@pytest.mark.parametrize("off", [0.25, 0.75])
def test_truth_of_other_weights_and_maps_out_of_range_are_scored_by_the_definitions(off, monkeypatch):
    maps, truth = batch_of(1, 16, 1.0, "smooth")
    monkeypatch.setattr(columns, "_count", lambda *_: pytest.fail("counted"))
    same(columns.map_columns(maps, truth * off), columns._by_definition(maps, truth * off, False))
    same(columns.map_columns(maps - off, truth), columns._by_definition(maps - off, truth, False))
    assert columns.half_steps(truth * off) is None
    ceiling = columns.reference_columns(truth * off)["ceiling"]
    assert torch.equal(ceiling["iou"], columns.metrics.ceiling_iou(truth * off, "fixed"))
