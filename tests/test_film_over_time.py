"""`test_model.py --testset synthetic_video`: what it writes, prints and refuses."""

import csv
import json
import shutil

import pytest

from utils import load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def scored(film_root, checkpoint, cli, tmp_path_factory):
    folder = tmp_path_factory.mktemp("over_time")
    state = load_checkpoint(checkpoint) | {"threshold": {"value": 0.5}}
    save_checkpoint(folder / "model.pth", state)
    flags = ["--testset", "synthetic_video", "--test_data_path", film_root, "--gpu", "cpu", "--out_dir", folder]
    done = cli("test_model", "--checkpoint", folder / "model.pth", *flags)
    assert done.returncode == 0, done.stderr
    return folder / "synthetic_video", done.stdout


def test_the_films_are_scored_at_every_step_with_intervals_and_baselines(scored):
    folder, printed = scored
    results = json.loads((folder / "results.json").read_text())
    assert (results["films"], results["steps"], results["testset"]) == (3, 300, "synthetic_video")
    assert set(results["maps"]) == {"AUD", "AUD_held", "AUD_share", "AUD_share_held"} == set(results["intervals"])
    figures = {"pointing", "false_peaks", "delay", "followed", "on_time", "lit_sounding", "lit_pauses", "lit_outside"}
    assert all(set(row) == figures for row in [*results["maps"].values(), results["references"]["deaf_oracle"]])
    assert 0.3 < results["references"]["deaf_oracle"]["pointing"] < 0.6
    assert results["settings"]["threshold"] == 0.5 and results["settings"]["on_time"] == pytest.approx(0.5)
    assert "deaf oracle" in printed and "lit, pauses, %" in printed and "3 films, 300 steps" in printed


def test_the_rows_give_the_figures_again(scored):
    folder, _ = scored
    with open(folder / "per_step.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    results = json.loads((folder / "results.json").read_text())
    pauses = [float(row["lit"]) for row in rows if row["state"] == "pause"]
    assert sum(pauses) / len(pauses) == pytest.approx(results["maps"]["AUD"]["lit_pauses"])
    sounding = [row for row in rows if row["state"] == "sounding"]
    hits = [
        float(row["xmin"]) <= float(row["peak_x"]) < float(row["xmax"])
        and float(row["ymin"]) <= float(row["peak_y"]) < float(row["ymax"])
        for row in sounding
    ]
    assert sum(hits) / len(hits) == pytest.approx(results["maps"]["AUD"]["pointing"])


def test_asked_size_and_window_hold_for_films_and_flags_of_pairs_are_refused(film_root, checkpoint, cli, tmp_path):
    truth = json.loads((film_root / "truth.json").read_text())
    (tmp_path / "truth.json").write_text(json.dumps(truth | {"films": truth["films"][:1]}))
    (tmp_path / "clips").symlink_to(film_root / "clips")
    out = tmp_path / "out"
    flags = ["--testset", "synthetic_video", "--gpu", "cpu", "--test_data_path", tmp_path, "--out_dir", out]
    done = cli("test_model", "--checkpoint", checkpoint, *flags, "--infer_image_size", 48, "--window", 0.4)
    assert done.returncode == 0, done.stderr
    settings = json.loads((out / "synthetic_video" / "results.json").read_text())["settings"]
    assert (settings["infer_image_size"], settings["window"]) == (48, 0.4)
    assert settings["on_time"] == pytest.approx(0.3)
    done = cli("test_model", "--checkpoint", checkpoint, *flags, "--report", "--alpha", 0, "--snr", 10)
    assert done.returncode == 2 and "--alpha, --snr, --report: not with synthetic_video" in done.stderr
    done = cli("test_model", "--checkpoint", checkpoint, "--testset", "synthetic", "--window", 0.4, "--gpu", "cpu")
    assert done.returncode == 2 and "--window is for films" in done.stderr


def test_missing_films_and_their_truth_are_named_in_one_line(film_root, checkpoint, cli, tmp_path):
    flags = ["--checkpoint", checkpoint, "--testset", "synthetic_video", "--gpu", "cpu", "--out_dir", tmp_path / "out"]
    done = cli("test_model", *flags, "--test_data_path", tmp_path)
    assert done.returncode == 2 and "--video" in done.stderr and len(done.stderr.splitlines()) == 1
    shutil.copy(film_root / "truth.json", tmp_path)
    done = cli("test_model", *flags, "--test_data_path", tmp_path)
    assert done.returncode == 2 and "3 of 3 films are missing" in done.stderr
