"""The trainings of a comparison: what is asked for, what a user's shell may not change, what a failed command says."""

import pytest

import experiments.runs as runs
import recipes
from experiments.runs import Row, Training
from utils import UserError


def test_what_is_asked_for_is_told_by_its_settings_with_those_of_the_recipe(tmp_path, monkeypatch):
    row = Row("share", "--weights share_contrast=1 lam3=0 --recipe infer_smoothing=0.1")
    run = Training(row, 3, tmp_path / "share_seed_3", flags=("--epochs", "2", "--train_data_path", "data/synthetic_3"))
    wanted = run.wanted()
    ours = {
        "seed": 3,
        "epochs": 2,
        "infer_smoothing": 0.1,
        "infer_sharpening": 0.02,
        "train_data_path": "data/synthetic_3",
    }
    assert ours.items() <= wanted.items()
    assert wanted["weights share_contrast"] == 1 and wanted["weights attention_matching"] == 0
    assert not {"gpu", "experiment_name", "model_dir", "num_workers", "testset"} & wanted.keys()
    monkeypatch.setitem(recipes.RECIPES["small"], "lr", 0.5)
    assert run.wanted() == wanted | {"lr": 0.5}, "a recipe that changed makes another run"
    command = " ".join(run.command())
    assert f"train_script.sh synthetic {','.join(runs.SPLITS)} cpu" in command
    assert f"--model_dir {tmp_path} --experiment_name share_seed_3 --overwrite" in command


def test_variables_of_the_users_shell_train_nothing_else(monkeypatch):
    for name in ("ABLATION", "SEEDS", "OBJECTIVE", "PROCESSES"):
        monkeypatch.setenv(name, "1")
    runs.call("bash", "-c", '[ -z "${ABLATION:-}${SEEDS:-}${OBJECTIVE:-}${PROCESSES:-}" ] && [ -n "$PYTHON" ]')


def test_a_command_that_fails_is_named(capsys):
    with pytest.raises(UserError, match="failed: false --objective listen"):
        runs.call("false", "--objective", "listen")
    assert capsys.readouterr().out == "$ false --objective listen\n"


def test_data_that_cannot_be_made_are_an_error(monkeypatch):
    monkeypatch.setattr(runs, "PYTHON", "false")
    with pytest.raises(UserError, match="synthetic_3 --train_objects 3"):
        runs.make_data(3)
