"""The plan multiplies unit costs as people would by hand, and counts what a step really computes."""

import json
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import experiments.bench_input as bench_input
import experiments.bench_plan as bench_plan
import experiments.bench_step as bench_step
from experiments.bench_plan import Costs, Counted, Wanted, assumptions, count_step, plan
from model_slot import JointSlotModel
from recipes import PAPER_WEIGHTS
from training.step import weighted

COSTS = Costs(
    input_ms=4.0,
    view_ms=6.0,
    sent_bytes=300e3,
    stored_bytes=400e3,
    feature_bytes=50e3,
    step=Counted(gflop=40.0, kept_bytes=45e6, trained=20_000_000, parameters=30_000_000),
    view_gflop=4.0,
    step_ms=196.0,
    features_ms=24.0,
    scoring_ms=16.0,
)


def figures(wanted: Wanted, costs: Costs = COSTS) -> dict[str, float]:
    return {timing.name.removeprefix("plan: "): timing.value for timing in plan(costs, wanted)}


@pytest.fixture
def small(monkeypatch):
    """The plan of a small network, which measures in a second."""
    for module in (bench_input, bench_step, bench_plan):
        for name, value in {"IMAGE_SIZE": 64, "AUDIO_SECONDS": 1.0, "FILES": 2, "SCORED": 2}.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(bench_step, "JointSlotModel", partial(JointSlotModel, "small", dim=16))


def test_hours_on_gpus_are_those_of_what_is_slower_input_or_steps(capsys):
    """96 cores read 24,000 pairs a second; 8 GPUs of 100 and 200 TFLOP/s take 20,000 and 40,000."""
    found = figures(Wanted(2_000_000, 8, 96, 256, 50, 0, (100.0, 200.0)))
    slow, fast = ", at 100 TFLOP/s a GPU", ", at 200 TFLOP/s a GPU"
    assert found[f"an epoch{slow}"] == pytest.approx(2e6 / 20_000 / 3600)
    assert found[f"50 epochs{fast}"] == pytest.approx(50 * 2e6 / 24_000 / 3600)
    assert found[f"cores that feed the GPUs{fast}"] == pytest.approx(160)
    assert found[f"read from storage{slow}"] == pytest.approx(8000)  # MB/s
    assert found[f"network, gradients out of each GPU{slow}"] == pytest.approx(2 * 80 * 7 / 8 * 20_000 / 256)
    assert found["disk, pairs"] == pytest.approx(800) and found["disk, a checkpoint"] == pytest.approx(280)
    assert found["/dev/shm, 12 workers a process"] == pytest.approx(25 * 256 * 300e3 / 1e9)
    assert found["memory of a GPU, at least"] == pytest.approx((32 * 45e6 + 16 * 30e6) / 1e9)
    assert capsys.readouterr().out == f"limited by the GPUs{slow}\nlimited by the input{fast}\n"


def test_hours_on_cpus_are_features_once_and_input_and_steps_in_every_epoch(capsys):
    found = figures(Wanted(10_000, 0, 2, 256, 100, 4, (100.0,)))
    once, epoch = 40_000 * 0.030 / 2 / 3600, 10_000 * 0.200 / 2 / 3600
    assert found["features of 4 views, once"] == pytest.approx(once)
    assert found["an epoch"] == pytest.approx(epoch) and found["100 epochs"] == pytest.approx(once + 100 * epoch)
    assert found["disk, kept features"] == pytest.approx(2.0)
    assert found["network, gradients out of each GPU"] == 0 and "98% of the cores' time" in capsys.readouterr().out


def test_one_gpu_exchanges_nothing_and_what_is_assumed_is_said(capsys):
    assumed, measured = Wanted(1000, 1, 4, 256, 1, 0, (70.0, 160.0)), Wanted(1000, 1, 4, 256, 1, 0, (90.0,), True)
    assert figures(measured)["network, gradients out of each GPU"] == 0
    assert "70 to 160 TFLOP/s (not measured)" in " ".join(assumptions(COSTS, assumed))
    assert "90 TFLOP/s (as measured)" in " ".join(assumptions(COSTS, measured))


@pytest.mark.slow
def test_the_operations_of_a_step_are_counted_as_a_real_step_has_them(small):
    model = bench_step.full_model()
    with FlopCounterMode(display=False) as counter:
        weighted(model(*bench_step.random_inputs(model, 32)), PAPER_WEIGHTS).backward()
    counted = count_step(batch=32)
    assert counted.gflop == pytest.approx(counter.get_total_flops() / 32 / 1e9)
    assert counted.trained == counted.parameters == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        features = model.imgnet.trunk(torch.zeros(1, 3, 64, 64))[0]
    frozen = count_step(features.shape, batch=32)
    assert frozen.gflop < counted.gflop and frozen.kept_bytes < counted.kept_bytes
    assert frozen.trained < frozen.parameters == counted.parameters


def test_the_command_measures_and_prints_the_plan(cli, small, monkeypatch):
    monkeypatch.setattr(bench_plan, "count_step", lambda *_: COSTS.step)  # the test above counts
    done = cli("experiments.benchmark", "plan", "--pairs", "10000", "--gpus", "0", "--cores", "2", "--freeze_image")
    assert done.returncode == 0, done.stderr
    assert "10,000 pairs, 100 epochs, batch 256" in done.stdout and "limited by the step" in done.stdout
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {line["name"]: line["value"] for line in lines}
    assert found.pop("plan: network, gradients out of each GPU") == 0 and all(value > 0 for value in found.values())


def test_epochs_are_those_of_the_papers_recipe_for_so_many_pairs(cli, monkeypatch):
    monkeypatch.setattr(bench_plan, "measure", lambda *_, **__: COSTS)
    for pairs, epochs in (("10000", 100), ("144000", 50)):
        done = cli("experiments.benchmark", "plan", "--pairs", pairs, "--gpus", "8", "--cores", "96")
        assert done.returncode == 0 and f"plan: {epochs} epochs" in done.stdout


def test_what_makes_no_plan_is_refused_in_one_line(cli, tmp_path):
    for flags, words in (
        (["--gpus", "3"], "--batch_size 256 must be a multiple of --gpus 3"),
        (["--measured", tmp_path / "no.json"], "is not what benchmark gpu writes"),
    ):
        done = cli("experiments.benchmark", "plan", *flags)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
