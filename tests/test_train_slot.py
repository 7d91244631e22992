"""Training: steps per epoch, schedule, selection, resume, flags, a whole small run."""

import ast
import csv
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import soundfile
import torch
from conftest import MEASURED, ROOT, SHORT, SMALL, shared_folder

import recipes
import train_slot
from annotations import read_ids
from dataset import TrainingPairs, find_pairs
from model_slot import JointSlotModel
from models import MODELS, load, load_model
from scoring.threshold import universal_threshold
from utils import load_checkpoint


@pytest.fixture(scope="module")
def finished(synthetic_root, tmp_path_factory, train):
    """Two epochs on 70 pairs with everything on, resumable, scored."""
    folder = tmp_path_factory.mktemp("checkpoints")
    done = train(
        synthetic_root, folder, "--testset", "synthetic,synthetic_interactive", "--wandb", "offline", drawn=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "run", done


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_small_training_ends_in_a_table_and_pictures(finished):
    folder, done = finished
    for name in ("best.pth", "latest.pth", "configs.json", "train_ids.txt", "curves.png"):
        assert (folder / name).stat().st_size > 0
    for name in ("synthetic", "synthetic_interactive"):
        results = json.loads((folder / "results" / name / "results.json").read_text())
        assert results["training_test_overlap"] == 0
        assert "held-out" in results["checkpoint"]["selected_by"]
        assert len(list(csv.DictReader((folder / "results" / name / "per_sample.csv").open()))) == 20
        assert (folder / "results" / name / "contact_sheet.png").stat().st_size > 10_000
    assert "IIoU" in done.stdout and "retrieval by class" in done.stdout
    said = " ".join(done.stdout.split())  # settings are wrapped
    for piece in ("revision:", "torch:", " tau 0.03,", "parameters:", "70 train", "10 held_out", "20 of 20 pairs"):
        assert piece in said


def test_an_epoch_sees_every_full_batch(finished):
    state = load_checkpoint(finished[0] / "latest.pth")
    steps = {int(entry["step"]) for entry in state["optimizer"]["state"].values()}
    assert steps == {2 * (70 // 16)}
    assert [line["steps"] for line in log_of(finished[0])] == [70 // 16] * 2
    assert (state["epoch"], state["step"]) == (2, 0)


def test_the_log_has_a_line_per_epoch_with_losses_rate_speed_and_scores(finished):
    lines = log_of(finished[0])
    assert [line["epoch"] for line in lines] == [1, 2]
    wanted = {"info_nce", "reconstruction", "slot_divergence", "attention_matching", "loss", "lr", "grad_norm"}
    assert wanted | {"pairs_per_second", "val/retrieval_score", "synthetic/IQR/cIoU"} <= lines[1].keys()
    line = lines[0]
    total = line["info_nce"] + 0.1 * line["reconstruction"] + 0.1 * line["slot_divergence"]
    assert line["loss"] == pytest.approx(total + 100 * line["attention_matching"], rel=1e-4)


def test_an_offline_wandb_run_is_recorded(finished):
    assert list(finished[0].glob("wandb/offline-run-*/run-*.wandb"))


def test_the_checkpoint_says_how_it_was_chosen_and_loads_by_itself(finished):
    state = load_checkpoint(finished[0] / "best.pth")
    settings, place = {"model_config", "args", "marks", "selected_by"}, {"epoch", "step", "sums", "lines", "random"}
    assert settings | place | {"model", "optimizer", "scaler"} <= state.keys()
    model = load_model(finished[0] / "best.pth")
    assert model.config["image_encoder"] == "small" and model.config["image_size"] == 64


def test_both_checkpoints_carry_the_universal_threshold_of_their_weights_and_results_name_it(finished, synthetic_root):
    folder, done = finished
    pairs = find_pairs(synthetic_root, "vggsound", read_ids(synthetic_root / "val.txt"))[0]
    for name in ("best", "latest"):
        trained = load(folder / f"{name}.pth")
        model = trained.model.to(memory_format=torch.channels_last)
        again = universal_threshold(model, pairs, torch.device("cpu"), "held-out training pairs")
        assert trained.threshold == pytest.approx(again["value"], abs=1e-5)
        assert trained.about["threshold"]["pairs"] == 10
        assert trained.about["threshold"]["pairs_from"] == "held-out training pairs"
    results = json.loads((folder / "results" / "synthetic" / "results.json").read_text())
    assert results["checkpoint"]["threshold"] == load(folder / "best.pth").about["threshold"]
    assert f"universal threshold {results['checkpoint']['threshold']['value']:.4f}" in done.stdout


def test_without_held_out_pairs_training_pairs_choose_the_threshold_and_it_says_so(synthetic_root):
    pairs = find_pairs(synthetic_root, "vggsound", None)[0]
    data = train_slot.TrainingData(*(TrainingPairs(p, 64, 0.8, "none") for p in (pairs[1:6], pairs[:1])), {}, {})
    model = JointSlotModel("small", 16, image_size=64, audio_seconds=0.8)
    chosen = train_slot.choose_threshold(model, data, torch.device("cpu"))
    assert chosen["pairs"] == 5 and chosen["pairs_from"] == "training pairs, as none were held out"


def test_classes_beside_the_training_pairs_choose_the_off_screen_sounds_of_the_threshold(damaged, tmp_path):
    ids = "adef"  # whole ones
    (damaged / "classes.csv").write_text("id,class\n" + "".join(f"{i},class {i}\n" for i in ids))
    (damaged / "train.txt").write_text("\n".join(ids))
    where = ["--train_data_path", damaged, "--train_list", damaged / "train.txt", "--metadata", tmp_path]
    fixed = ["--trainset", "custom", "--experiment_name", "x", "--batch_size", 2, "--reciprocal_k", 1, "--gpu", "cpu"]
    data = train_slot.build_training_data(train_slot.parse_args([*map(str, [*fixed, *where, *SMALL])]))
    model = JointSlotModel("small", 16, image_size=64, audio_seconds=0.8)
    chosen = train_slot.choose_threshold(model, data, torch.device("cpu"))
    assert chosen["offscreen"] == "audio of another class" and chosen["infer_image_size"] == 64


def test_the_test_script_gives_the_figures_of_the_training_run(finished, synthetic_root, tmp_path, cli):
    done = cli(
        "test_model", "--model_dir", finished[0].parent, "--experiment_name", "run", "--testset", "synthetic",
        "--gpu", "cpu", "--test_data_path", synthetic_root, "--out_dir", tmp_path, "--imagenet_weights", "none",
        "--negatives", "silence,noise,offscreen",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "synthetic" / "results.json").read_text())
    before = json.loads((finished[0] / "results" / "synthetic" / "results.json").read_text())
    for name, figures in before["maps"].items():
        assert figures == pytest.approx(again["maps"][name], abs=1e-3, nan_ok=True)
    assert again["training_test_overlap"] == 0


def test_the_test_script_asks_for_maps_as_the_training_did_unless_told_otherwise(synthetic_root, tmp_path, train, cli):
    asked = ["--recipe", "infer_sharpening=0.5", "infer_smoothing=0.2"]
    done = train(synthetic_root, tmp_path, "--epochs", "1", "--testset", "synthetic", *asked)
    assert done.returncode == 0, done.stderr
    others = ["--infer_sharpening", "0.3", "--infer_smoothing", "0"]
    in_training = json.loads((tmp_path / "run" / "results" / "synthetic" / "results.json").read_text())
    assert in_training["settings"]["infer_smoothing"] == 0.2
    precisions = []
    for flags, expected in (([], (0.5, 0.2)), (others[:2], (0.3, 0.2)), (others, (0.3, 0))):
        test = "--model_dir", tmp_path, "--experiment_name", "run", "--gpu", "cpu", "--imagenet_weights", "none", *flags
        done = cli("test_model", *test, "--test_data_path", synthetic_root, "--num_workers", "0")
        assert done.returncode == 0, done.stderr
        results = json.loads((tmp_path / "run" / "results" / "synthetic" / "results.json").read_text())
        assert tuple(results["settings"][name] for name in ("infer_sharpening", "infer_smoothing")) == expected
        precisions.append(results["maps"]["AUD"]["mAP"])
    assert len({*precisions}) == 3, "a setting changes no score"


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_a_resumed_run_ends_like_one_in_one_go_and_so_does_the_same_seed(synthetic_root, tmp_path, train):
    for name in ("whole", "halves"):
        (tmp_path / name).mkdir()
    constant = ["--lr_schedule", "step", "--eval_every", "0"]  # the others look at the number of epochs
    assert train(synthetic_root, tmp_path / "whole", *constant).returncode == 0
    assert train(synthetic_root, tmp_path / "halves", *constant, "--epochs", "1").returncode == 0
    assert len(log_of(tmp_path / "halves" / "run")) == 1
    done = train(synthetic_root, tmp_path / "halves", *constant, "--resume")
    assert done.returncode == 0, done.stderr
    whole, halves = (load_checkpoint(tmp_path / name / "run" / "latest.pth") for name in ("whole", "halves"))
    for key in ("model", "optimizer", "scaler", "random", "epoch", "step", "best"):
        assert same(whole[key], halves[key]), key
    lines = [
        [{k: v for k, v in line.items() if k not in MEASURED} for line in log_of(tmp_path / name / "run")]
        for name in ("whole", "halves")
    ]
    assert lines[0] == lines[1]


def test_an_overwritten_run_leaves_nothing_of_the_old_one(synthetic_root, tmp_path, train):
    assert train(synthetic_root, tmp_path, "--testset", "synthetic", "--epochs", "1").returncode == 0
    done = train(synthetic_root, tmp_path, "--overwrite", "--epochs", "1", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run" / "results").exists()
    assert load_checkpoint(tmp_path / "run" / "best.pth")["args"]["seed"] == 1


def test_a_sound_that_breaks_the_scoring_does_not_cost_the_epoch(synthetic_root, tmp_path, train):
    shutil.copytree(synthetic_root, tmp_path / "data")
    (tmp_path / "data" / "audio" / "val_000003.wav").write_bytes(b"RIFF")
    done = train(tmp_path / "data", tmp_path)
    assert done.returncode == 2 and "val_000003" in done.stderr
    assert load_checkpoint(tmp_path / "run" / "latest.pth")["step"] == 70 // 16


def test_a_resume_with_other_settings_says_which_and_stops(finished, synthetic_root, train):
    done = train(
        synthetic_root, finished[0].parent, "--resume", "--tau", "0.1", "--lr_schedule", "cosine", "--epochs", "3"
    )
    assert done.returncode == 2
    assert "--tau 0.03 -> 0.1" in done.stderr and "--epochs 2 -> 3" in done.stderr


def test_finished_work_is_not_replaced_unless_asked(finished, synthetic_root, train):
    before = (finished[0] / "best.pth").read_bytes()
    done = train(synthetic_root, finished[0].parent)
    assert done.returncode == 2 and "--overwrite" in done.stderr
    assert (finished[0] / "best.pth").read_bytes() == before


def test_results_that_could_not_be_written_are_told_before_the_training(synthetic_root, tmp_path, train):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results").write_text("a file in the place of the folder")
    done = train(synthetic_root, tmp_path, "--experiment_name", "run", "--testset", "synthetic")
    assert done.returncode == 2 and "results cannot be written into" in done.stderr and "epoch 1" not in done.stdout


def test_a_dry_run_touches_every_set_and_writes_nothing(synthetic_root, tmp_path, train):
    done = train(synthetic_root, tmp_path, "--testset", "synthetic", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "one step: loss" in done.stdout and "one evaluation batch" in done.stdout and "held-out" in done.stdout
    assert not list(tmp_path.iterdir())


def test_selection_on_the_test_set_is_written_into_the_result(synthetic_root, tmp_path, train):
    done = train(synthetic_root, tmp_path, "--testset", "synthetic", "--select", "test", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results" / "synthetic" / "results.json").read_text())
    assert "IQR on test set synthetic" in results["checkpoint"]["selected_by"]


def test_real_pairs_train_a_step(tmp_path, cli):
    clips = shared_folder("clips")
    done = cli(
        "train_slot", "--trainset", "custom", "--train_data_path", clips, *SMALL, *SHORT, "--batch_size", "4",
        "--epochs", "1", "--model_dir", tmp_path, "--experiment_name", "clips", "--val_fraction", "0.2", "--testset",
        "custom", "--test_data_path", clips, "--test_gt_path", clips / "annotations.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert math.isfinite(log_of(tmp_path / "clips")[0]["loss"])
    assert re.search(r"test set custom: \d+ of \d+ pairs\n  \d+ of them are trained on", done.stdout)


# ---------------------------------------------------------------- weights, flags


def test_only_the_contrastive_loss_counts_during_the_warm_up():
    args = train_slot.parse_args(["--experiment_name", "x", "--recipe", "warmup=2"])
    assert train_slot.weights_in(1, args) == dict.fromkeys(args.weights, 0.0) | {"info_nce": 1.0}
    assert train_slot.weights_in(2, args) == args.weights == recipes.PAPER_WEIGHTS


def test_a_training_with_silence_logs_its_loss(synthetic_root, tmp_path, train):
    done = train(synthetic_root, tmp_path, "--weights", "silence=2", "share_contrast=1", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    line = log_of(tmp_path / "run")[-1]
    assert line["silence"] > 0 and line["share_contrast"] > 0
    weights = recipes.PAPER_WEIGHTS | {"share_contrast": 1, "silence": 2}
    assert line["loss"] == pytest.approx(sum(weight * line[name] for name, weight in weights.items()), rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_with_the_ids(synthetic_root, tmp_path, train):
    done = train(synthetic_root, tmp_path, "--lr", "1e30", "--amp", "none")
    assert done.returncode == 2
    assert "not finite" in done.stderr and "train_0000" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "script, readers",
    [
        ("recipes.py", ("train_slot.py", "training/resume.py", "sets.py")),
        *((name, ()) for name in ("test_model.py", "sets.py", "experiments/objectives.py")),
        *((f"experiments/bench_{name}.py", ()) for name in ("step", "input", "eval")),
        ("experiments/timing.py", ("experiments/bench_step.py", "experiments/benchmark.py")),
        ("synthetic/command.py", ()),
    ],
)
def test_every_flag_is_read(script, readers):
    """A flag that nothing reads is a lie: each one is read, as args.<flag>, in the file that adds it or the run's."""
    text = (ROOT / script).read_text()
    flags = {
        next((k.value.value for k in node.keywords if k.arg == "dest"), node.args[0].value.removeprefix("--"))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", "") == "add_argument"
        and isinstance(node.args[0], ast.Constant)
    }
    text += "".join((ROOT / reader).read_text() for reader in readers)
    of_models = {name for kind in MODELS.values() for name in inspect.signature(kind).parameters}
    unread = {flag for flag in flags - of_models if not re.search(rf"\b(args|early)\.{flag}\b", text)}
    assert flags and not unread


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--trainset", "nonsense"], "vggss_10k"),
        (["--testset", "nonsense"], "unknown test set nonsense"),
        (["--batch_size", "71"], "larger than the 70 training pairs"),
        (["--reciprocal_k", "16"], "leaves no negative"),
        (["--train_list", "absent.txt"], "absent.txt"),
        (["--train_data_path", "absent"], "absent"),
        (["--imagenet_weights", "absent.pth"], "no ImageNet weights for the encoder small"),
        (["--recipe", "dim=7"], "must be even"),
        (["--mask_ratio", "nan"], "nan"),
        (["--lr", "-1"], "-1"),
        (["--select", "test"], "--testset"),
        (["--select", "test", "--testset", "synthetic", "--eval_every", "3"], "never tests"),
        (["--seed", "4294967296"], "--seed"),
        (["--audio_seconds", "0.1"], "no token"),
        (["--experiment_name", "../x"], "plain name"),
        (["--resume"], "latest.pth"),
        (["--wandb", "maybe"], "maybe"),
        (["--recipe", "small"], "--recipe paper and small: one of them"),
        (["--recipe", "lr=1"], "--lr 1"),
        (["--recipe", "clip=x"], "clip=x"),
        (["--weights", "luck=1"], "share_contrast"),
        (["--weights", "silence=-1"], "at least 0"),
        (["--weights", "silence=1", "--num_slots", "1"], "one slot"),
        (["--overwrite", "perhaps"], "neither true nor false"),
    ],
)
def test_junk_is_one_clear_line_and_status_2(arguments, message, synthetic_root, tmp_path, train):
    done = train(synthetic_root, tmp_path, *arguments)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2
    assert len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.rglob("*.pth"))


def test_the_shell_script_shows_its_usage_and_passes_errors_on(tmp_path):
    usage = subprocess.run(["bash", ROOT / "train_script.sh"], capture_output=True, text=True)
    assert usage.returncode == 2 and "TRAINSET" in usage.stderr and "vggss_144k" in usage.stderr
    asked = subprocess.run(["bash", ROOT / "train_script.sh", "--help"], capture_output=True, text=True)
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, usage.stderr, "")
    command = ["bash", ROOT / "train_script.sh", "nonsense", "synthetic", "cpu"]
    unknown = subprocess.run(
        command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    )
    assert unknown.returncode == 2 and "synthetic" in unknown.stderr and "flickr_144k" in unknown.stderr


def shell(*arguments, **environment):
    """The commands that the script would run: echo stands in for python."""
    return subprocess.run(
        ["bash", ROOT / "train_script.sh", *arguments], capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": "echo", **environment},
    )  # fmt: skip


def test_ablations_and_seeds_are_one_training_each_under_a_name_of_its_own():
    commands = shell("synthetic", "synthetic", "cpu", "mine", "--epochs", "3", ABLATION="no_match", SEEDS="0 7").stdout
    first, second = commands.strip().splitlines()
    assert "--lam3 0" in first and first.endswith("--experiment_name mine_no_match_seed0 --epochs 3 --seed 0")
    assert second.endswith("--experiment_name mine_no_match_seed7 --epochs 3 --seed 7")
    plain = shell("synthetic", "synthetic", "cpu").stdout.strip()
    assert plain == "train_slot.py --trainset synthetic --testset synthetic --gpu cpu --experiment_name synthetic"
    wrong = shell("synthetic", "synthetic", "cpu", ABLATION="no_luck")
    assert wrong.returncode == 2 and "no_false_negatives" in wrong.stderr and not wrong.stdout


def test_several_processes_are_started_by_torchrun():
    words = shell("synthetic", "synthetic", "cpu", PROCESSES="2").stdout.split()
    assert words[:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train_slot.py"]


@pytest.mark.parametrize(
    "ablation, name, value",
    [
        ("no_match", "attention_matching", 0), ("no_div", "slot_divergence", 0), ("no_recon", "reconstruction", 0),
        ("no_mask", "mask_ratio", 0), ("no_false_negatives", "reciprocal_k", 0), ("one_slot", "num_slots", 1),
    ],
)  # fmt: skip
def test_an_ablation_changes_one_setting_and_no_other(ablation, name, value):
    def settings(**environment):
        words = shell("vggss_10k", "vggss", "0", "run", **environment).stdout.split()
        args = vars(train_slot.parse_args(words[1:])) | {"experiment_name": ""}
        return args | args.pop("weights")

    whole, less = settings(), settings(ABLATION=ablation)
    assert {key for key in whole if whole[key] != less[key]} == {name} and less[name] == value


@pytest.mark.parametrize("trainset", ["synthetic", "vggss_144k", "flickr_10k", "custom"])
def test_the_listening_objective_has_its_two_losses_in_place_of_attention_matching(trainset):
    def settings(**environment):
        words = shell(trainset, "vggss", "0", "run", **environment).stdout.split()
        return vars(train_slot.parse_args(words[1:]))

    paper, listen = settings(), settings(OBJECTIVE="listen")
    assert paper == settings(OBJECTIVE="paper") and paper["weights"] == recipes.PAPER_WEIGHTS
    changed = {key for key in paper if paper[key] != listen[key]}
    assert changed - {"infer_sharpening", "infer_smoothing"} == {"weights", "objective", "experiment_name"}
    ours = {"share_contrast": 1, "foreign_claims": 4, "attention_matching": 0}
    assert listen["weights"] == recipes.PAPER_WEIGHTS | ours
    assert (listen["infer_sharpening"], listen["infer_smoothing"]) == (0.1, 0.1)
    assert listen["experiment_name"] == "run_listen"


@pytest.mark.parametrize(
    "environment",
    [
        {"OBJECTIVE": "luck"},
        {"OBJECTIVE": "listen", "ABLATION": "no_match"},
        {"OBJECTIVE": "maxpool", "ABLATION": "one_slot"},
        {"ABLATION": "no_false_negatives"},
    ],
)
def test_an_objective_that_is_unknown_or_lacks_what_an_ablation_leaves_out_trains_nothing(environment):
    wrong = shell("synthetic", "synthetic", "cpu", **environment)
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and not wrong.stdout


def test_the_run_ends_with_the_command_that_tests_it(finished):
    command = finished[1].stdout.strip().splitlines()[-1].split()
    assert command[0].endswith("python") and command[1] == "test_model.py"
    assert "--experiment_name" in command and "synthetic,synthetic_interactive" in command and "cpu" in command


@pytest.mark.slow
def test_wandb_without_a_login_records_offline_and_says_so(synthetic_root, tmp_path):
    """In a process of its own: there the loader processes are the first to resample, while wandb watches imports."""
    shutil.copytree(synthetic_root, tmp_path / "data")
    for path in (tmp_path / "data" / "audio").glob("train_0000*.wav"):
        soundfile.write(path, soundfile.read(path)[0], 22050)
    data = ["--trainset", "synthetic", "--train_data_path", tmp_path / "data", "--model_dir", tmp_path]
    run = ["--experiment_name", "run", "--wandb", "true", "--num_workers", "2", "--epochs", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        list(map(str, [sys.executable, "train_slot.py", *data, *SMALL, *SHORT, *run])),
        cwd=ROOT, env=environment | {"NETRC": str(tmp_path / "nobody")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "recorded offline" in done.stdout
    assert list((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.parametrize("flags", [["--lam3", "100"], ["--weights=foreign_claims=0"], ["--objective", "paper"]])
def test_flags_that_would_undo_the_listening_objective_are_refused(flags):
    wrong = shell("synthetic", "synthetic", "cpu", "run", *flags, OBJECTIVE="listen")
    assert wrong.returncode == 2 and f"{flags[0]} do not go together" in wrong.stderr
