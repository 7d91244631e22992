"""The report of `benchmark gpu`: a part that fails is a row of it, and the path of all parts works without a GPU."""

import json

import pytest
import torch

import experiments.bench_gpu as bench_gpu
import experiments.gpu_parts as gpu_parts
from experiments.bench_plan import measured_tflops
from experiments.gpu_parts import Row


def failing(setting):
    yield Row("first", 1.5, "ms")
    raise RuntimeError("CUDA error:\n  an illegal\nmemory access")


def one_step(setting):
    assert (setting.data / "train.txt").is_file()
    yield Row("batch 64", 8.0, "ms", {"batch": 64, "ms": 8.0, "pairs_per_second": 8000.0, "tflops": 323.0})
    yield Row("batch 256", 24.0, "ms", {"batch": 256, "ms": 24.0, "pairs_per_second": 10667.0, "tflops": 430.0})
    yield Row("note", "of words")


@pytest.fixture
def two_parts(monkeypatch):
    def generate(root, counts):
        root.mkdir()
        (root / "train.txt").write_text("\n".join(counts))

    monkeypatch.setattr(bench_gpu, "generate", generate)
    monkeypatch.setattr(bench_gpu, "PARTS", {"breaks": failing, "works": one_step})


def test_without_a_gpu_it_is_refused_in_one_line(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, words in (([], "--device cpu --quick"), (["--device", "cpu"], "needs --quick")):
        done = cli("experiments.benchmark", "gpu", "--out", tmp_path / "report", *flags)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not [*tmp_path.iterdir()]


def test_a_part_that_fails_is_a_row_and_the_next_one_follows(cli, two_parts, tmp_path):
    done = cli("experiments.benchmark", "gpu", "--device", "cpu", "--quick", "--out", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    found = [(row["part"], row["what"], row["value"]) for row in report["rows"] if row["unit"] != "s"]
    failure = "RuntimeError: CUDA error: an illegal memory access"
    assert found == [
        ("breaks", "first", 1.5),
        ("breaks", "FAILED", failure),
        ("works", "batch 64", 8.0),
        ("works", "batch 256", 24.0),
        ("works", "note", "of words"),
    ]
    assert report["failed"] == ["breaks"] and report["about"]["quick"] is True and "revision" in report["about"]
    page = (tmp_path / "report.txt").read_text()
    assert page in done.stdout and failure in page and "parts that failed or were left out: breaks" in page
    assert len(page.splitlines()) < 70
    assert [measured_tflops(tmp_path / "report.json", batch) for batch in (4, 100, 150, 1024)] == [323, 323, 430, 430]


def test_parts_that_would_begin_too_late_are_left_out_and_named(two_parts, monkeypatch):
    monkeypatch.setattr(bench_gpu, "LIMIT", -1.0)
    *_, report = bench_gpu.reports(torch.device("cpu"), True)
    assert report["failed"] == ["breaks", "works"] and {row["what"] for row in report["rows"]} == {"LEFT OUT"}


def test_what_ends_the_program_leaves_the_report_of_the_parts_before_it(cli, two_parts, monkeypatch, tmp_path):
    def interrupted(setting):
        raise KeyboardInterrupt
        yield

    monkeypatch.setitem(bench_gpu.PARTS, "interrupted", interrupted)
    done = cli("experiments.benchmark", "gpu", "--device", "cpu", "--quick", "--out", tmp_path / "of.today")
    assert done.returncode == 130
    report = json.loads((tmp_path / "of.today.json").read_text())
    assert {row["part"] for row in report["rows"]} == {"breaks", "works"} and (tmp_path / "of.today.txt").is_file()


def test_differences_of_figures_are_found_at_any_depth():
    ours = {"maps": {"AUD": {"cIoU": 0.5, "interval": [0.25, float("nan")]}}, "name": "x"}
    assert gpu_parts.largest_difference(ours, ours) == 0
    other = {"maps": {"AUD": {"cIoU": 0.5, "interval": [0.5, float("nan")]}}, "name": "x"}
    assert gpu_parts.largest_difference(ours, other) == 0.25
    assert gpu_parts.largest_difference(ours, {"maps": {}, "name": "x"}) == float("inf")


@pytest.mark.slow
def test_the_whole_path_works_without_a_gpu(monkeypatch):
    monkeypatch.setattr(bench_gpu, "LIMIT", 3600.0)
    *_, report = bench_gpu.reports(torch.device("cpu"), True)
    assert not report["failed"], [row for row in report["rows"] if row["what"] == "FAILED"]
    assert {row["part"] for row in report["rows"]} == gpu_parts.PARTS.keys()
    value = {row["what"]: row["value"] for row in report["rows"]}
    assert value["killed while it ran"] == "yes"
    assert value["largest difference of a weight, resumed against uninterrupted"] == 0
    for what in ("the set", "a class", "a size"):
        assert value[f"largest difference of a figure of {what}, device against CPU"] == 0
    assert value["loss in fp32: largest difference from the CPU's over all steps"] == 0
    assert value["slots, TF32 off: furthest from the reference"] < 1e-5
    assert [step["batch"] for step in report["steps"]] == [4, 8]
