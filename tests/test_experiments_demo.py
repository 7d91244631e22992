"""The demonstration: the committed model, the claims of the README about it, and, slowly, the training itself."""

import hashlib
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import experiments.demo as demo
from model_slot import JointSlotModel
from models import load_model
from synthetic.generate import generate
from synthetic.probe import probe
from utils import UserError, load_checkpoint, save_checkpoint

CHECKPOINT = ROOT / "checkpoints" / "demo.pth"


def test_the_committed_model_is_small_loads_and_is_the_one_that_the_readme_names():
    assert CHECKPOINT.stat().st_size <= 4e6
    assert load_model(CHECKPOINT).shape["arch"] == "small"
    assert hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest() in (ROOT / "README.md").read_text()


def test_the_table_shows_mean_worst_bar_and_deaf_oracle(synthetic_root, monkeypatch, capsys):
    monkeypatch.setattr(demo, "DATA", synthetic_root)
    runs = [{("synthetic", "AUD cIoU"): x, ("synthetic_interactive", "AUD both_pointing"): 0.1} for x in (0.7, 0.8)]
    listening = [{key: value / 2 for key, value in run.items()} for run in runs]
    demo.print_table(runs, listening)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| synthetic | AUD cIoU | 75.0 | 70.0 | 60 | 37.5 | 35.0 |  |"
    assert lines[3] == "| synthetic_interactive | AUD both_pointing | 10.0 | 10.0 |  | 5.0 | 5.0 | 25 |"


def test_both_objectives_are_trained_scored_on_the_same_samples_and_drawn(monkeypatch, cli):
    calls, drawn = [], []
    monkeypatch.setattr(demo, "call", lambda *command, **variables: calls.append((" ".join(command), variables)))
    monkeypatch.setattr(demo, "figures", lambda folder: {("synthetic", folder.name): 0.5})
    monkeypatch.setattr(demo, "print_table", lambda *blocks: drawn.append(blocks))
    monkeypatch.setattr(
        demo, "side_by_side_on_synthetic", lambda files, *_: drawn.append([file.parent.name for file in files.values()])
    )
    done = cli("experiments.demo", "--seeds", 0, 1)
    assert done.returncode == 0, done.stderr
    trained = [(variables["OBJECTIVE"], command) for command, variables in calls if "train_script.sh" in command]
    assert [objective for objective, _ in trained] == ["paper"] * 2 + ["listen"] * 2
    for (_, command), name in zip(trained, ("seed_0", "seed_1", "listen_seed_0", "listen_seed_1")):
        assert f"--experiment_name demo_{name} --seed {name[-1]}" in command
    made = [command for command, _ in calls if "synthetic.generate" in command]
    assert made == [f"{sys.executable} -m synthetic.generate --out data/synthetic"]
    (published, listening), names = drawn
    assert [[name for ((_, name),) in block] for block in (published, listening)] == [
        ["demo_seed_0", "demo_seed_1"], ["demo_listen_seed_0", "demo_listen_seed_1"],
    ]  # fmt: skip
    assert names == ["demo_seed_0", "demo_listen_seed_0"]
    assert "checkpoints/demo_objectives.png" in done.stdout.splitlines()[-1]


def test_variables_of_the_users_shell_train_nothing_else(monkeypatch):
    monkeypatch.setenv("ABLATION", "no_div")
    monkeypatch.setenv("SEEDS", "3 4")
    demo.call("bash", "-c", '[ -z "$ABLATION$SEEDS" ] && [ "$OBJECTIVE" = listen ]', OBJECTIVE="listen")


def test_a_command_that_fails_is_named_with_what_stood_in_front(capsys):
    with pytest.raises(UserError, match="OBJECTIVE=listen false"):
        demo.call("false", OBJECTIVE="listen")
    assert capsys.readouterr().out == "$ OBJECTIVE=listen false\n"


def test_an_exported_model_keeps_what_testing_needs_and_nothing_of_resuming(tmp_path):
    model = JointSlotModel("small", 16, image_size=64, audio_seconds=0.8)
    state = {
        "model": model.state_dict(),
        "model_config": model.config,
        "epoch": 3,
        "optimizer": {},
        "random": torch.ones(1),
    }
    save_checkpoint(tmp_path / "best.pth", state)
    demo.export(tmp_path / "best.pth", tmp_path / "demo.pth")
    assert set(load_checkpoint(tmp_path / "demo.pth")) == {"model", "model_config", "epoch"}
    assert load_model(tmp_path / "demo.pth").config == model.config


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_says_so_when_no_fitting_python_is_there(tmp_path):
    for tool in ("make", "sh", "bash", "echo", "touch", "test"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(["make", "setup"], cwd=tmp_path, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2 and "Python 3.10, 3.11 or 3.12" in done.stdout


@pytest.fixture(scope="session")
def default_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("default") / "synthetic"
    generate(root, seed=0)
    return root


@pytest.mark.slow
def test_the_default_data_are_as_hard_as_the_readme_says(default_root):
    numbers = probe(default_root)
    for split in ("distractor", "interactive"):
        for blind in numbers[split].values():
            assert blind["pointing"] <= 0.5 and blind.get("both_pointing", 0) <= 0.25
    assert numbers["class_accuracy"]["colour"] <= 0.95 and numbers["class_accuracy"]["spectrum"] <= 0.8
    readme = (ROOT / "README.md").read_text()
    row = re.search(r"^ *distractor +saliency +([\d.]+)", readme, re.M)
    assert float(row[1]) == pytest.approx(100 * numbers["distractor"]["saliency"]["pointing"], abs=0.06)


def bars_missed(results):
    by_class = results["retrieval"]["by_class"]
    figures = {
        "AUD cIoU": results["maps"]["AUD"]["cIoU"],
        "AUD pointing": results["maps"]["AUD"]["pointing"],
        "class R@1, worse way": min(recalls["R@1"] for recalls in by_class.values()),
    }
    return {name: value for name, value in figures.items() if value < demo.BARS["synthetic", name]}


@pytest.mark.slow
def test_the_committed_model_reaches_the_bars(default_root, tmp_path, cli):
    done = cli(
        "test_model", "--checkpoint", CHECKPOINT, "--testset", "synthetic", "--test_data_path", default_root, "--gpu",
        "cpu", "--imagenet_weights", "none", "--out_dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not bars_missed(json.loads((tmp_path / "synthetic" / "results.json").read_text()))


@pytest.mark.slow
def test_the_demonstration_trains_to_the_bars(default_root, tmp_path):
    data = ["--train_data_path", str(default_root), "--test_data_path", str(default_root)]
    demo.call("bash", "train_script.sh", "synthetic", "synthetic", "cpu", "demo", "--model_dir", str(tmp_path), *data)
    assert not bars_missed(json.loads((tmp_path / "demo" / "results" / "synthetic" / "results.json").read_text()))
