"""Both input pipelines end at what the model takes."""

import json

import torch

import experiments.bench_input as bench_input


def test_both_input_pipelines_give_what_the_model_takes(tmp_path):
    ours, baseline = bench_input.make_input_files(tmp_path, 2)
    ours = bench_input.TrainingPairs(ours, bench_input.IMAGE_SIZE, bench_input.AUDIO_SECONDS, "hard")[1]
    baseline = bench_input.ReleasedPairs(baseline)[1]
    for one, other in zip(ours, baseline, strict=True):
        assert type(one) is type(other)
        if isinstance(one, torch.Tensor):
            assert one.shape == other.shape and one.dtype == other.dtype
    heard = ours.spectrogram.ne(0) & baseline.spectrogram.ne(0)
    assert heard.float().mean() > 0.9  # up to 9 bins and 9 frames are masked in each


def test_the_input_figures_are_costs_of_both_pipelines(cli, monkeypatch):
    monkeypatch.setattr(bench_input, "INPUT_FILES", 2)
    done = cli("experiments.benchmark", "input", "--rounds", "1", "--train_pairs", "4")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["unit"] for line in lines] == ["ms"] * 4 + ["kB", "ms", "ms"] and all(
        line["baseline"] > 0 for line in lines
    )
