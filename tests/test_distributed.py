"""Gradients of one global batch, in parts and over processes, are those of one process that holds all of it."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import distributed
from distributed import average, gather_in_order, local_slice, shard, shares
from model_maxpool import MaxPoolModel
from model_slot import JointSlotModel, TokenMasks
from training.step import Inputs, Optimisation, weights_of

PAIRS = 10  # not a multiple of 3 processes, nor of parts of 4
WEIGHTS = {"info_nce": 1.0, "reconstruction": 0.1, "slot_divergence": 0.1, "attention_matching": 100.0}
WITH_MAPS = WEIGHTS | {"map_contrast": 1.0, "share_contrast": 1.0, "foreign_claims": 4.0}
WITH_MAPS |= {"foreign_tokens": 200.0, "silence": 1.0}
CPU = torch.device("cpu")


def joint_slot(reciprocal_k):
    return JointSlotModel("small", 16, 2, 3, 64, 0.8, mask_ratio=0.3, reciprocal_k=reciprocal_k)


def max_pool(_):
    return MaxPoolModel("small", 16, 64, 0.8)


def gradients(micro_batch=None, pairs=PAIRS, reciprocal_k=3, frozen=True, weights=WEIGHTS, make=joint_slot):
    """Losses and gradients in float64 of this process's rows of a batch that NumPy determines; masks are on."""
    torch.manual_seed(0)
    model = make(reciprocal_k).double().train()
    if frozen:
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.standard_normal((pairs, 3, 64, 64)))
    spectrogram = torch.from_numpy(rng.standard_normal((pairs, 1, 257, 81)))
    if weights.get("silence"):
        spectrogram = torch.cat([spectrogram, torch.from_numpy(rng.standard_normal((pairs, 1, 257, 81)))], dim=1)
    masks, rows = model.draw_masks(pairs), local_slice(pairs)
    inputs = Inputs(image[rows], spectrogram[rows], TokenMasks(*(mask[rows] for mask in masks)))
    weights = weights_of(model.losses, weights)
    all_weights = all(weights.values())
    optimisation = Optimisation(model, CPU, 1e-3, micro_batch=micro_batch, all_weights=all_weights)
    losses = optimisation.backward(inputs, pairs, weights)
    names = sorted(losses)
    values = average(torch.stack([losses[name] for name in names]))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return dict(zip(names, values.tolist(), strict=True)), found


def work(rank, world, store, make, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    torch.save(make(), f"{results}_{rank}")
    dist.barrier()
    dist.destroy_process_group()


def on_processes(world, make, folder):
    """What `make` returns on each of so many processes."""
    mp.spawn(work, (world, folder / "store", make, folder / "result"), world)
    return [torch.load(f"{folder / 'result'}_{rank}", weights_only=True) for rank in range(world)]


def assert_same(found, expected):
    losses, grads = expected
    assert found[0] == pytest.approx(losses, rel=1e-12)
    assert found[1].keys() == grads.keys()
    largest = max(grad.abs().max() for grad in grads.values())
    assert largest > 0.1
    for name, grad in grads.items():
        assert (found[1][name] - grad).abs().max() <= 1e-9 * largest, name


def in_parts_of_two():
    return gradients(micro_batch=2)


def in_parts_on_one_process_only():
    """Of 9 pairs one process holds 5 and the other 4, which are one part of 4: both must take the same way."""
    return gradients(micro_batch=4, pairs=9)


def with_maps():
    return gradients(weights=WITH_MAPS)


def with_maps_in_parts():
    return gradients(micro_batch=2, weights=WITH_MAPS)


def max_pooled():
    return gradients(make=max_pool)


def max_pooled_in_parts():
    return gradients(micro_batch=2, make=max_pool)


def without_reconstruction():
    return gradients(weights=WEIGHTS | {"reconstruction": 0.0})


@pytest.mark.parametrize("weights", [WEIGHTS, WITH_MAPS, WEIGHTS | {"map_contrast": 1.0}])
@pytest.mark.parametrize("micro_batch", [1, 3, 5])
def test_parts_of_a_batch_give_the_gradients_of_the_whole(micro_batch, weights):
    assert_same(gradients(micro_batch, weights=weights), gradients(weights=weights))


@pytest.mark.parametrize(
    "loss, difference",
    [
        ("info_nce", 1e-3),
        ("map_contrast", 1e-3),
        ("share_contrast", 1e-3),
        ("foreign_claims", 1e-4),
        ("foreign_tokens", 1e-8),
    ],
)
def test_the_reference_leaves_false_negatives_out_and_feels_the_whole_batch(loss, difference):
    """Else the equalities here would hold for losses that never look beyond a part."""
    losses, _ = with_maps()
    assert abs(losses[loss] - gradients(reciprocal_k=0, weights=WITH_MAPS)[0][loss]) > difference
    assert abs(losses[loss] - gradients(pairs=5, weights=WITH_MAPS)[0][loss]) > difference


def test_losses_of_the_map_without_weight_change_no_gradient():
    plain, off = gradients(), gradients(weights=WEIGHTS | dict.fromkeys(WITH_MAPS.keys() - WEIGHTS.keys(), 0.0))
    assert plain[0].items() <= off[0].items()
    assert plain[1].keys() == off[1].keys() and all(torch.equal(off[1][name], plain[1][name]) for name in plain[1])


def test_losses_of_the_map_have_a_part_in_the_gradient():
    plain, more = gradients()[1], with_maps()[1]
    for name in ("audnet.proj.0.weight", "imgnet.proj.weight", "slot_attn.aud_to_q.weight"):
        assert (more[name] - plain[name]).abs().max() > 1e-3 * plain[name].abs().max(), name


def test_parts_normalise_by_themselves_in_training_mode():
    """The difference that the documentation speaks of: batch norm in training mode sees a part."""
    whole, parts = gradients(frozen=False), gradients(micro_batch=5, frozen=False)
    assert abs(whole[0]["reconstruction"] - parts[0]["reconstruction"]) > 1e-6


@pytest.mark.parametrize(
    "world, make, alone",
    [
        (2, gradients, gradients), (3, gradients, gradients), (2, in_parts_of_two, gradients),
        (3, with_maps, with_maps), (2, with_maps_in_parts, with_maps), (2, max_pooled_in_parts, max_pooled),
    ],
)  # fmt: skip
def test_several_processes_give_the_gradients_of_one(world, make, alone, tmp_path):
    expected = alone()
    for found in on_processes(world, make, tmp_path):
        assert_same(found, expected)


def test_processes_with_different_numbers_of_parts_do_not_wait_for_each_other(tmp_path):
    expected = gradients(pairs=9)
    for found in on_processes(2, in_parts_on_one_process_only, tmp_path):
        assert_same(found, expected)


def test_weights_without_a_gradient_have_none_on_several_processes_either(tmp_path):
    expected = without_reconstruction()
    assert not any(name.startswith("img_decoder") for name in expected[1])
    for found in on_processes(2, without_reconstruction, tmp_path):
        assert_same(found, expected)


def shared_items():
    items = [f"item {i}" for i in range(7)]
    return list(gather_in_order(iter(shard(items)), len(items)))


def test_shared_items_come_back_once_each_and_in_order(tmp_path):
    first, second, third = on_processes(3, shared_items, tmp_path)
    assert first == [f"item {i}" for i in range(7)] == shared_items()
    assert second == third == []


@pytest.mark.parametrize("total, world", [(256, 3), (7, 2), (8, 4), (2, 2)])
def test_rows_are_shared_without_overlap_or_gap(total, world, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    rows = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        rows += range(total)[local_slice(total)]
    assert rows == list(range(total)) and max(shares(total)) - min(shares(total)) <= 1


def test_a_step_leaves_the_statistics_of_one_pass_not_of_two():
    """The first pass over the parts, which caches, must not move the running statistics."""
    torch.manual_seed(0)
    model = JointSlotModel("small", 16, 2, 3, 64, 0.8, reciprocal_k=0).train()
    inputs = Inputs(torch.randn(4, 3, 64, 64), torch.randn(4, 1, 257, 81), model.draw_masks(4))
    Optimisation(model, CPU, 1e-3, micro_batch=2).step(inputs, 4, WEIGHTS, 1.0)
    counts = {int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {2}


def test_nobody_is_launched_without_torchrun(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):  # some schedulers set them for every job
        monkeypatch.setitem(os.environ, name, "1")
    assert not distributed.under_torchrun() and distributed.is_main()
    assert distributed.own_device("cpu") == CPU
