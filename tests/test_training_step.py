"""One step: gradients of a batch in parts and over processes, schedule, precision."""

import contextlib
import multiprocessing
import platform
import resource
import shutil
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from processes import CPU, PAIRS, WITH_MAPS, WITHOUT_RECONSTRUCTION, gradients, max_pool

from model_slot import JointSlotModel
from recipes import PAPER_WEIGHTS
from training.step import (
    Inputs,
    NotFinite,
    Optimisation,
    choose_amp,
    compile_model,
    keep_freed_memory,
    lr_factor,
)
from utils import UserError


def assert_same(found, expected):
    losses, grads = expected
    assert found[0] == pytest.approx(losses, rel=1e-12)
    assert found[1].keys() == grads.keys()
    largest = max(grad.abs().max() for grad in grads.values())
    assert largest > 0.1
    for name, grad in grads.items():
        assert (found[1][name] - grad).abs().max() <= 1e-9 * largest, name


@pytest.fixture(scope="module")
def with_maps():
    return gradients(weights=WITH_MAPS)


# ---------------------------------------------------------------- parts and processes


@pytest.mark.parametrize("weights", [PAPER_WEIGHTS, WITH_MAPS, PAPER_WEIGHTS | {"share_contrast": 1.0}])
@pytest.mark.parametrize("micro_batch", [1, 3, 5])
def test_parts_of_a_batch_give_the_gradients_of_the_whole(micro_batch, weights):
    assert_same(gradients(micro_batch, weights=weights), gradients(weights=weights))


@pytest.mark.parametrize("case", ["whole", "parts of 2", "parts of 3", "maps", "maps in parts", "max-pooled in parts"])
def test_several_processes_give_the_gradients_of_one(case, two_processes, with_maps):
    expected = with_maps if case.startswith("maps") else gradients(make=max_pool) if "max" in case else gradients()
    for found in two_processes:
        assert_same(found[case], expected)


def test_weights_without_a_gradient_have_none_on_several_processes_either(two_processes):
    expected = gradients(weights=WITHOUT_RECONSTRUCTION)
    assert not any(name.startswith("img_decoder") for name in expected[1])
    for found in two_processes:
        assert_same(found["without reconstruction"], expected)


@pytest.mark.parametrize("loss, least", [("info_nce", 1e-3), ("share_contrast", 1e-3), ("foreign_claims", 1e-4)])
def test_the_reference_leaves_false_negatives_out_and_feels_the_whole_batch(loss, least, with_maps):
    """Else the equalities here would hold for losses that never look beyond a part."""
    losses, _ = with_maps
    assert abs(losses[loss] - gradients(reciprocal_k=0, weights=WITH_MAPS)[0][loss]) > least
    assert abs(losses[loss] - gradients(pairs=PAIRS // 2, weights=WITH_MAPS)[0][loss]) > least


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler: g++")
@pytest.mark.parametrize("parts", [{}, {"weights": WITH_MAPS, "micro_batch": 5}])
def test_a_compiled_model_has_the_gradients_of_the_plain_one(parts):
    plain, compiled = gradients(**parts), gradients(**parts, compiled=True)
    assert compiled[0] == pytest.approx(plain[0], rel=1e-6)  # info_nce_chance is taken in fp32
    assert compiled[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(compiled[1][name], gradient, rtol=1e-7, atol=1e-10, msg=name)


def test_what_cannot_be_compiled_here_is_said_in_one_line(monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("no working C++ compiler found\nsearched: g++")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(UserError, match=r"--compile: .*no working C.. compiler found$"):
        compile_model(max_pool(None), CPU)


def test_losses_of_the_map_without_weight_change_no_gradient():
    plain, off = gradients(), gradients(weights=dict.fromkeys(WITH_MAPS, 0.0) | PAPER_WEIGHTS)
    assert plain[0].items() <= off[0].items() and "share_contrast" in off[0]
    assert plain[1].keys() == off[1].keys() and all(torch.equal(off[1][name], plain[1][name]) for name in plain[1])


def test_losses_of_the_map_have_a_part_in_the_gradient(with_maps):
    plain, more = gradients()[1], with_maps[1]
    for name in ("audnet.proj.0.weight", "imgnet.proj.weight", "slot_attn.aud_to_q.weight"):
        assert (more[name] - plain[name]).abs().max() > 1e-3 * plain[name].abs().max(), name


def test_parts_normalise_by_themselves_in_training_mode():
    """The difference that the documentation speaks of: batch norm in training mode sees a part."""
    whole, parts = gradients(frozen=False), gradients(micro_batch=5, frozen=False)
    assert abs(whole[0]["reconstruction"] - parts[0]["reconstruction"]) > 1e-6


def test_a_step_leaves_the_statistics_of_one_pass_not_of_two():
    """The first pass over the parts, which caches, must not move the running statistics."""
    torch.manual_seed(0)
    model = JointSlotModel("small", 16, 2, 3, 64, 0.8, reciprocal_k=0).train()
    inputs = Inputs(torch.randn(4, 3, 64, 64), torch.randn(4, 1, 257, 81), model.draw_masks(4))
    Optimisation(model, CPU, 1e-3, micro_batch=2).step(inputs, PAPER_WEIGHTS, 1.0)
    counts = {int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {2}


def test_a_weight_of_a_loss_that_no_model_computes_stops_the_run():
    model = JointSlotModel("small", 16, 2, 3, 32, 0.4, reciprocal_k=0).train()
    inputs = Inputs(torch.randn(2, 3, 32, 32), torch.randn(2, 1, 257, 41), model.draw_masks(2))
    with pytest.raises(UserError, match="slot_norm"):
        Optimisation(model, CPU, 1e-3).step(inputs, PAPER_WEIGHTS | {"slot_norm": 1.0}, 1.0)


# ---------------------------------------------------------------- schedule, precision


def test_the_learning_rate_warms_up_then_follows_the_schedule():
    def factor(step, schedule="constant", warmup=0.0):
        return lr_factor(10, 10, schedule, warmup, step)

    assert factor(57) == 1
    assert [factor(s, "step") for s in (9, 10, 25)] == pytest.approx([1, 0.9, 0.81])
    assert [factor(s, "cosine") for s in (0, 50, 100)] == pytest.approx([1, 0.5, 0], abs=1e-9)
    assert [factor(s, "cosine", 0.1) for s in (0, 9, 10)] == pytest.approx([0.1, 1, 1])


def test_a_scaler_that_finds_no_scale_ends_the_run(monkeypatch):
    """fp16: a step whose scaled gradient overflows is left out and counted; one that no scale helps is an error."""
    model = JointSlotModel("small", 16, 2, 3, 32, 0.4, reciprocal_k=0).train()
    inputs = Inputs(torch.randn(2, 3, 32, 32), torch.randn(2, 1, 257, 41), model.draw_masks(2))
    optimisation = Optimisation(model, CPU, 1e-3, amp=torch.float16)
    before = model.slot_attn.slots.clone()

    def overflowing(*arguments):
        losses = Optimisation.backward(optimisation, *arguments)
        model.slot_attn.slots.grad.fill_(float("inf"))
        return losses

    monkeypatch.setattr(optimisation, "backward", overflowing)
    found = optimisation.step(inputs, PAPER_WEIGHTS, 1.0)
    assert (found["grad_norm"], found["skipped_steps"]) == (0.0, 1.0) and torch.equal(model.slot_attn.slots, before)
    with pytest.raises(NotFinite, match="grad_norm inf"):
        for _ in range(20):
            optimisation.step(inputs, PAPER_WEIGHTS, 1.0)


def test_a_loss_that_overflows_in_fp16_skips_the_step_a_few_times_in_a_row(monkeypatch):
    """Nothing of the step stays: weights, batch-norm statistics and moments are as before, and training goes on."""
    model = JointSlotModel("small", 16, 2, 3, 32, 0.4, reciprocal_k=0).train()
    inputs = Inputs(torch.randn(2, 3, 32, 32), torch.randn(2, 1, 257, 41), model.draw_masks(2))
    optimisation = Optimisation(model, CPU, 1e-3, amp=torch.float16)
    optimisation.step(inputs, PAPER_WEIGHTS, 1.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(optimisation, "_autocast", lambda: contextlib.nullcontext())
    loud = inputs._replace(image=inputs.image * float("inf"))
    for _ in range(2):
        found = optimisation.step(loud, PAPER_WEIGHTS, 1.0)
        assert found == {"grad_norm": 0.0, "skipped_steps": 1.0, "lost_steps": 1.0}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert optimisation.step(inputs, PAPER_WEIGHTS, 1.0)["skipped_steps"] == 0
    for _ in range(4):
        optimisation.step(loud, PAPER_WEIGHTS, 1.0)
    again = Optimisation(model, CPU, 1e-3, amp=torch.float16)
    again.load_state_dict(optimisation.state_dict())
    again.step(loud, PAPER_WEIGHTS, 1.0)
    with pytest.raises(NotFinite, match="info_nce nan"):
        again.step(loud, PAPER_WEIGHTS, 1.0)
    with pytest.raises(NotFinite):
        Optimisation(model, CPU, 1e-3).step(loud, PAPER_WEIGHTS, 1.0)  # not in fp32: there it is no accident


@pytest.mark.parametrize(
    "has, expected",
    [
        ((), None),
        (("_is_avx512_bf16_supported",), torch.bfloat16),
        (("_is_avx512_bf16_supported", "_is_amx_tile_supported"), torch.bfloat16),
    ],
)
def test_auto_takes_bf16_on_cpus_that_make_it_faster(has, expected, monkeypatch):
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda probe=probe: probe in has)
    assert choose_amp("auto", CPU) is expected
    assert choose_amp("bf16", CPU) is torch.bfloat16 and choose_amp("none", CPU) is None


def pages_taken() -> int:
    """How many pages come with four tensors of 64 MiB, of which each is freed before the next."""
    for tensor in range(8):
        if tensor == 4:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def pages_before_and_after() -> tuple[int, int]:
    before = pages_taken()
    keep_freed_memory()
    return before, pages_taken()


def libc_version() -> list[int]:
    name, version = platform.libc_ver()
    return [int(part) for part in version.split(".")] if name == "glibc" else []


@pytest.mark.skipif(libc_version() < [2, 35], reason="no glibc, or one that keeps blocks of 32 MiB at most")
def test_memory_of_freed_tensors_is_kept_for_those_to_come():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        before, after = pool.submit(pages_before_and_after).result()
    assert after < 100 < before
