"""A run that stops continues exactly where it was: killed, told to stop, out of disk, on one process or several."""

import errno
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from conftest import MEASURED, ROOT, SHORT, SMALL, files_up_to

import train_slot
import training.resume as resume
import training.run as run
import utils
from training.step import Optimisation
from utils import UserError, load_checkpoint, save_checkpoint

EVERYTHING = [  # strong augmentation, token masks, false negatives; five steps in each of two epochs
    "--batch_size", "14", "--augment", "hard", "--mask_ratio", "0.3", "--reciprocal_k", "2", "--lr_schedule", "cosine",
    "--recipe", "lr_warmup=0.1", "--testset", "synthetic", "--save_every_steps", "2", "--eval_every", "2",
]  # fmt: skip


def command(root, folder, *flags, torchrun=()):
    data = ["--trainset", "synthetic", "--train_data_path", root, "--test_data_path", root]
    python = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    where = ["--model_dir", folder, "--experiment_name", "run"]
    return [sys.executable, *map(str, [*python, ROOT / "train_slot.py", *data, *SMALL, *SHORT, *where, *flags])]


def shell(*arguments, torchrun=()):
    return subprocess.run(command(*arguments, torchrun=torchrun), capture_output=True, text=True, timeout=300)


STATE = ("model", "optimizer", "scaler", "random", "epoch", "step", "best", "best_pairs", "chosen")


def ending(folder):
    """All that must be the same however often a run was stopped."""
    state = load_checkpoint(folder / "run" / "latest.pth")
    best = load_checkpoint(folder / "run" / "best.pth")
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    results = json.loads((folder / "run" / "results" / "synthetic" / "results.json").read_text())
    return {
        **{key: state[key] for key in STATE},
        "best epoch": best["epoch"],
        "best model": best["model"],
        "log": [{key: value for key, value in line.items() if key not in MEASURED} for line in log],
        "figures": results["maps"],
    }


def difference(one, other, where="") -> str:
    """The first place where two nested values differ; empty when they are the same to the bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{where}: {sorted(one.keys() ^ other.keys(), key=str)}"
        return next((d for key in one if (d := difference(one[key], other[key], f"{where}/{key}"))), "")
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return f"{where}: {len(one)} and {len(other)} items"
        return next((d for i, pair in enumerate(zip(one, other)) if (d := difference(*pair, f"{where}/{i}"))), "")
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other or (one != one and other != other)
    return "" if same else f"{where}: {one} and {other}"


def test_a_difference_is_seen_wherever_it_is():
    state = {"a": [torch.zeros(2), {"b": 1.0}], "c": float("nan")}
    assert not difference(state, {"a": [torch.zeros(2), {"b": 1.0}], "c": float("nan")})
    for other in ({"a": [torch.zeros(2), {"b": 1.1}], "c": float("nan")}, {"a": [torch.ones(2), {"b": 1.0}], "c": 0}):
        assert difference(state, other)


# ---------------------------------------------------------------- which epoch best.pth is of


def chosen_epochs(scores, state=None):
    """The epoch of best.pth after each one, from the scores of the held-out pairs, (epochs, N)."""
    state, found = state or resume.RunState(), []
    for of_pairs in scores:
        state.end_epoch(of_pairs.mean().item(), of_pairs)
        found.append(state.chosen)
    return found


def test_a_level_score_chooses_the_latest_epoch_and_a_fall_keeps_the_one_before():
    generator = torch.Generator().manual_seed(0)
    hard = torch.rand(200, generator=generator)
    jump, noise = torch.zeros(200), 0.02 * torch.randn(6, 200, generator=generator)
    level = (hard + noise - noise.mean(1, keepdim=True)).add(1e-4 * torch.tensor([0.0, 5, 0, 0, 0, 0])[:, None])
    assert chosen_epochs(level) == [1, 2, 3, 4, 5, 6], "the second is the best by a tenth of an error"
    fallen = torch.cat([level[:3], level[3:] - 0.01])
    assert chosen_epochs(fallen) == [1, 2, 3, 3, 3, 3]
    assert chosen_epochs(torch.cat([fallen, fallen[:1] + 0.05 + jump])) == [1, 2, 3, 3, 3, 3, 7]


def test_the_choice_is_the_same_however_often_a_run_was_stopped():
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(1, 50, generator=generator) + 0.02 * torch.randn(30, 50, generator=generator)
    state, found = resume.RunState(), []
    for of_pairs in scores:
        again = resume.RunState()
        again.load_state_dict(state.state_dict() | {"other": 1})
        found += chosen_epochs([of_pairs], state := again)
    assert found == chosen_epochs(scores) and len({*found}) > 3 and found != list(range(1, 31))


def test_without_scores_of_pairs_the_best_is_chosen_and_of_equals_the_latest():
    state = resume.RunState()
    assert [state.end_epoch(score) for score in (0.5, 0.4, 0.5, 0.6, 0.59)] == [True, False, True, True, False]
    assert state.chosen == 4
    assert not resume.RunState().end_epoch(-math.inf), "no figure at all"


@pytest.fixture(scope="module")
def whole(synthetic_root, tmp_path_factory, train):
    """Two epochs in one go."""
    folder = tmp_path_factory.mktemp("whole")
    done = train(synthetic_root, folder, *EVERYTHING)
    assert done.returncode == 0, done.stderr
    return ending(folder)


def stop_in_step(monkeypatch, number):
    """SIGTERM while the optimisation step of this number, counted from now, is under way."""
    count, step = iter(range(1, 1000)), Optimisation.step

    def interrupted(self, *arguments):
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    monkeypatch.setattr(Optimisation, "step", interrupted)


def test_a_run_that_is_told_to_stop_saves_within_a_step_and_continues_exactly(
    synthetic_root, tmp_path, train, monkeypatch, whole
):
    stop_in_step(monkeypatch, 8)
    done = train(synthetic_root, tmp_path, *EVERYTHING)
    assert done.returncode == 0 and "--resume" in done.stdout, done.stderr
    state = load_checkpoint(tmp_path / "run" / "latest.pth")
    assert (state["epoch"], state["step"]) == (1, 3)
    done = train(synthetic_root, tmp_path, *EVERYTHING, "--resume")
    assert done.returncode == 0, done.stderr
    assert not difference(whole, ending(tmp_path))


def test_one_epoch_and_one_are_two(synthetic_root, tmp_path, train, monkeypatch, whole):
    """Interrupted as soon as the end of the first epoch is on disk."""
    write = utils.save_checkpoint

    def keep(path, state, also):
        write(path, state, also)
        if (state["epoch"], state["step"]) == (1, 0) and path.name == "latest.pth":
            raise KeyboardInterrupt

    monkeypatch.setattr(resume, "save_checkpoint", keep)
    assert train(synthetic_root, tmp_path, *EVERYTHING).returncode == 130
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "run" / "latest.pth")["epoch"] == 1
    assert train(synthetic_root, tmp_path, *EVERYTHING, "--resume").returncode == 0
    assert not difference(whole, ending(tmp_path))


def test_a_random_state_that_is_not_restored_is_noticed(synthetic_root, tmp_path, train, monkeypatch, whole):
    """The comparison of these tests would find it out: what they compare depends on that state."""
    stop_in_step(monkeypatch, 8)
    train(synthetic_root, tmp_path, *EVERYTHING)
    monkeypatch.undo()
    monkeypatch.setattr(resume, "restore_random_states", lambda states: None)
    assert train(synthetic_root, tmp_path, *EVERYTHING, "--resume").returncode == 0
    assert difference(whole, ending(tmp_path))


def wait_for(process, folder, epoch, step):
    """Until the run has saved that place, or ended."""
    path = folder / "run" / "latest.pth"
    while process.poll() is None:
        if path.exists():
            state = load_checkpoint(path)
            if (state["epoch"], state["step"]) >= (epoch, step):
                return
        time.sleep(0.02)


KILLS_ITSELF = """
import os, runpy, signal, sys
from training.step import Optimisation

step, count = Optimisation.step, iter(range(1, 1000))

def killed(self, *arguments):
    if next(count) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments)

Optimisation.step = killed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_killed_within_an_epoch_ends_like_one_in_one_go(synthetic_root, tmp_path, train, whole):
    """Killed with two data-loading workers, continued without."""
    python, *arguments = command(synthetic_root, tmp_path, *EVERYTHING, "--num_workers", 2)
    killed = subprocess.run([python, "-c", KILLS_ITSELF, *arguments], capture_output=True, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    state = load_checkpoint(tmp_path / "run" / "latest.pth")
    assert (state["epoch"], state["step"]) == (1, 2)  # the last multiple of two before the fourth step
    (tmp_path / "run" / ".latest.abc.pth").write_bytes(b"half written")
    done = train(synthetic_root, tmp_path, *EVERYTHING, "--resume")
    assert done.returncode == 0, done.stderr
    assert not difference(whole, ending(tmp_path))
    assert not list((tmp_path / "run").glob(".*.pth"))


def test_a_run_told_to_stop_while_it_writes_finishes_writing(synthetic_root, tmp_path, train, monkeypatch, whole):
    """At the end of the first epoch, when nothing else is on disk yet."""
    write, flags = utils.save_checkpoint, [*EVERYTHING, "--save_every_steps", "5"]

    def interrupted(path, state, also):
        if (state["epoch"], state["step"]) == (0, 5):
            os.kill(os.getpid(), signal.SIGTERM)
        write(path, state, also)

    monkeypatch.setattr(resume, "save_checkpoint", interrupted)
    assert train(synthetic_root, tmp_path, *flags).returncode == 0
    monkeypatch.undo()
    state = load_checkpoint(tmp_path / "run" / "latest.pth")
    assert (state["epoch"], state["step"], state["lines"]) == (0, 5, [])
    assert train(synthetic_root, tmp_path, *flags, "--resume").returncode == 0
    assert not difference(whole, ending(tmp_path))


def test_a_run_told_to_stop_while_it_scores_leaves_after_the_batch(synthetic_root, tmp_path, train, monkeypatch, whole):
    evaluate, seen = run.evaluate, []

    def interrupted(*arguments, on_batch, **settings):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, on_batch=[*on_batch, seen.append], **settings)

    monkeypatch.setattr(run, "evaluate", interrupted)
    assert train(synthetic_root, tmp_path, *EVERYTHING).returncode == 0
    assert not seen, "it went on"
    monkeypatch.undo()
    assert train(synthetic_root, tmp_path, *EVERYTHING, "--resume").returncode == 0
    assert not difference(whole, ending(tmp_path))


def test_an_error_while_an_epoch_is_scored_does_not_lose_it(synthetic_root, tmp_path, train, monkeypatch, whole):
    def broken(*_, **__):
        raise UserError("a broken test image")

    monkeypatch.setattr(run, "evaluate", broken)
    assert train(synthetic_root, tmp_path, *EVERYTHING, "--save_every_steps", "0").returncode == 2
    monkeypatch.undo()
    state = load_checkpoint(tmp_path / "run" / "latest.pth")
    assert (state["epoch"], state["step"]) == (1, 5)
    assert train(synthetic_root, tmp_path, *EVERYTHING, "--resume").returncode == 0
    assert not difference(whole, ending(tmp_path))


def test_a_clock_that_jumps_back_changes_nothing(synthetic_root, tmp_path, train, monkeypatch, whole):
    """The log's speeds stay what they can be: above 0 and finite."""
    readings = iter(range(10**6, 0, -1))

    class Backwards:
        time = monotonic = perf_counter = staticmethod(lambda: float(next(readings)))

    monkeypatch.setattr(run, "time", Backwards)
    monkeypatch.setattr("tqdm.std.time", Backwards.time)
    assert train(synthetic_root, tmp_path, *EVERYTHING).returncode == 0
    assert not difference(whole, ending(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(line["pairs_per_second"] > 0 and 0 <= line["data_wait"] <= 1 for line in lines)


@pytest.mark.slow
def test_twenty_kills_at_random_points_change_nothing(synthetic_root, tmp_path, whole):
    chance, kills = random.Random(0), 0
    flags = [*EVERYTHING, "--save_every_steps", "1"]
    while kills < 20:
        resume = ["--resume"] if (tmp_path / "run" / "latest.pth").exists() else []
        process = subprocess.Popen(
            command(synthetic_root, tmp_path, *flags, *resume),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in process.stdout:
            if line.startswith(("training pairs", "resumed")):
                break
        time.sleep(chance.uniform(0, 2.5))
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read()
            shutil.rmtree(tmp_path / "run")  # it reached the end: again from the start
            continue
        process.kill()
        process.wait()
        kills += 1
        for path in (tmp_path / "run").glob("[!.]*.pth"):
            assert load_checkpoint(path)["model"]
    resume = ["--resume"] if (tmp_path / "run" / "latest.pth").exists() else []
    done = shell(synthetic_root, tmp_path, *flags, *resume)
    assert done.returncode == 0, done.stderr
    assert not difference(whole, ending(tmp_path))


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "latest.pth"
    save_checkpoint(path, {"model": {"w": torch.zeros(3)}})
    told = r"latest.pth cannot be written \(File too large\); the one before is kept"
    with files_up_to(200_000), pytest.raises(UserError, match=told):
        save_checkpoint(path, {"model": {"w": torch.ones(1_000_000)}})
    assert torch.equal(load_checkpoint(path)["model"]["w"], torch.zeros(3))
    assert [p.name for p in tmp_path.iterdir()] == ["latest.pth"]


def test_a_second_name_is_a_link_or_where_there_are_none_a_copy(tmp_path, monkeypatch):
    latest, best = tmp_path / "latest.pth", tmp_path / "best.pth"
    save_checkpoint(latest, {"model": {"w": torch.zeros(3)}}, [best])
    assert latest.samefile(best)
    save_checkpoint(latest, {"model": {"w": torch.ones(3)}})
    assert torch.equal(load_checkpoint(best)["model"]["w"], torch.zeros(3)), "the other name keeps what it names"

    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    save_checkpoint(latest, {"model": {"w": torch.ones(3)}}, [best])
    assert not latest.samefile(best) and latest.read_bytes() == best.read_bytes()
    assert not [*tmp_path.glob(".*")]


def test_an_epoch_is_written_once_whatever_its_names(synthetic_root, tmp_path, train, monkeypatch):
    writes, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: writes.append(state["epoch"]) or save(state, file))
    flags = ["--epochs", "3", "--keep_every", "2", "--select", "test", "--testset", "synthetic"]
    done = train(synthetic_root, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    best = load_checkpoint(tmp_path / "run" / "best.pth")["epoch"]
    assert writes == [1, 2, 3, 3] + [best] * (best != 3)  # at the end once more, with the universal threshold
    assert load_checkpoint(tmp_path / "run" / "epoch_0002.pth")["epoch"] == 2


def test_two_runs_do_not_write_into_one_folder(synthetic_root, tmp_path, train, monkeypatch):
    monkeypatch.setattr(resume, "LOCK_SECONDS", 0.2)
    lock = f"training.resume.lock_folder(pathlib.Path({str(tmp_path / 'run')!r}))"
    holding = f"import pathlib, training.resume\nwith {lock}: input(1)"
    with subprocess.Popen(
        [sys.executable, "-c", holding], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        other.stdout.read(1)
        done = train(synthetic_root, tmp_path, "--epochs", "1")
        other.communicate("\n")
    assert done.returncode == 2 and "another process is training" in done.stderr
    assert train(synthetic_root, tmp_path, "--epochs", "1").returncode == 0


def test_every_kth_epoch_is_kept(synthetic_root, tmp_path, train):
    assert train(synthetic_root, tmp_path, "--epochs", "4", "--keep_every", "2").returncode == 0
    kept = sorted(path.name for path in (tmp_path / "run").glob("*.pth"))
    assert kept == ["best.pth", "epoch_0002.pth", "epoch_0004.pth", "latest.pth"]
    assert load_checkpoint(tmp_path / "run" / "epoch_0002.pth")["epoch"] == 2


def test_the_last_epoch_stands_beside_the_chosen_one(synthetic_root, tmp_path, train, cli, monkeypatch):
    end_epoch = resume.RunState.end_epoch
    monkeypatch.setattr(resume.RunState, "end_epoch", lambda self, score, _: end_epoch(self, -self.epoch))
    done = train(synthetic_root, tmp_path, "--testset", "synthetic", "--eval_every", "0")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results" / "synthetic" / "results.json").read_text())
    best, latest = (load_checkpoint(tmp_path / "run" / f"{name}.pth") for name in ("best", "latest"))
    assert (best["epoch"], latest["epoch"]) == (1, 2) and best["chosen_among"] == 2
    assert "retrieval" in results["checkpoint"]["selected_by"] and results["last_epoch"]["epoch"] == 2
    assert "last epoch: 2, AUD cIoU" in done.stdout
    where = "--model_dir", tmp_path, "--experiment_name", "run", "--testset", "synthetic", "--gpu", "cpu"
    flags = "--test_data_path", synthetic_root, "--imagenet_weights", "none", "--checkpoint", "latest"
    assert cli("test_model", *where, *flags, "--num_workers", "0").returncode == 0
    again = json.loads((tmp_path / "run" / "results_last" / "synthetic" / "results.json").read_text())
    assert again["checkpoint"]["selected_by"].startswith("nothing: the last epoch")
    assert results["last_epoch"]["maps"]["AUD"] == pytest.approx(again["maps"]["AUD"], abs=1e-6, nan_ok=True)
    assert results["maps"]["AUD"]["mAP"] != pytest.approx(again["maps"]["AUD"]["mAP"], abs=1e-6)


def test_a_resume_with_other_data_or_settings_needs_force(synthetic_root, tmp_path, train):
    data = tmp_path / "data"
    shutil.copytree(synthetic_root, data)
    assert train(data, tmp_path, "--epochs", "1").returncode == 0
    ids = (data / "train.txt").read_text().splitlines()
    (data / "train.txt").write_text("\n".join(ids[:-1]) + "\n")
    done = train(data, tmp_path, "--resume", "--lr", "2e-3")
    assert done.returncode == 2 and "--resume force" in done.stderr
    assert (
        "training pairs 70 ids" in done.stderr and "-> 69 ids" in done.stderr and "--lr 0.001 -> 0.002" in done.stderr
    )
    done = train(data, tmp_path, "--resume", "force", "--lr", "2e-3")
    assert done.returncode == 0 and "other settings" in done.stdout, done.stderr
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in log] == pytest.approx([1e-3, 2e-3])


def test_a_run_of_older_code_continues_where_what_it_did_not_know_is_off():
    """Weights had a flag each, objectives other names; smoothing and silence did not exist."""
    args = train_slot.parse_args(["--experiment_name", "run"])
    old = {key: value for key, value in vars(args).items() if key not in ("weights", "infer_smoothing", "recipe")}
    old |= {"lam1": 0.1, "lam2": 0.1, "lam3": 100.0, "map_contrast": 0.0, "objective": "joint_slot", "force": False}
    args.infer_sharpening, args.infer_smoothing = 1.0, 0.1  # tests do not change what is trained
    assert not resume.differences({"args": old, "marks": {}}, args, {})
    assert [*resume.differences({"args": old | {"map_contrast": 4.0}, "marks": {}}, args, {})] == ["map_contrast"]
    args.weights, args.select = args.weights | {"silence": 1.0}, "test"
    found = resume.differences({"args": old, "marks": {}}, args, {})
    assert found.keys() == {"select", "infer_sharpening", "infer_smoothing", "weights"}


@pytest.mark.slow
def test_a_forced_resume_with_another_way_of_testing_forgets_the_best_that_tests_chose(synthetic_root, tmp_path, train):
    flags = ["--testset", "synthetic", "--select", "test"]
    assert train(synthetic_root, tmp_path, *flags, "--epochs", "1").returncode == 0
    path = tmp_path / "run" / "latest.pth"
    save_checkpoint(path, load_checkpoint(path) | {"best": 2.0})  # better than any
    done = train(synthetic_root, tmp_path, *flags, "--resume", "force", "--recipe", "infer_smoothing=0.1")
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(tmp_path / "run" / "best.pth")["epoch"] == 2


@pytest.mark.slow
def test_a_forced_resume_with_another_measure_forgets_the_old_best(synthetic_root, tmp_path, train):
    flags = ["--testset", "synthetic"]
    assert train(synthetic_root, tmp_path, *flags, "--epochs", "1").returncode == 0
    done = train(synthetic_root, tmp_path, *flags, "--resume", "force", "--select", "test")
    assert done.returncode == 0, done.stderr
    best = load_checkpoint(tmp_path / "run" / "best.pth")
    assert best["epoch"] == 2 and "test set synthetic" in best["selected_by"]


def test_micro_batches_train_and_continue_exactly(synthetic_root, tmp_path, train, monkeypatch):
    flags = ["--micro_batch", "5", "--recipe", "clip=1"]
    for name in ("whole", "halves"):
        (tmp_path / name).mkdir()
    assert train(synthetic_root, tmp_path / "whole", *flags).returncode == 0
    stop_in_step(monkeypatch, 6)
    assert train(synthetic_root, tmp_path / "halves", *flags).returncode == 0
    monkeypatch.undo()
    assert train(synthetic_root, tmp_path / "halves", *flags, "--resume").returncode == 0
    whole, halves = (load_checkpoint(tmp_path / name / "run" / "latest.pth") for name in ("whole", "halves"))
    for key in ("model", "optimizer", "random"):
        assert not difference(whole[key], halves[key], key)


def test_a_resumed_run_goes_on_in_its_wandb_run(synthetic_root, tmp_path, train):
    assert train(synthetic_root, tmp_path, "--epochs", "1", "--wandb", "offline").returncode == 0
    before = load_checkpoint(tmp_path / "run" / "latest.pth")["wandb_run"]
    assert train(synthetic_root, tmp_path, "--resume", "--wandb", "offline").returncode == 0
    folders = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(folders) == 2 and all(f"-{before}" in name for name in folders), "two of one second end in -1"


# ---------------------------------------------------------------- several processes


SHARED = ["--batch_size", "14", "--testset", "synthetic", "--save_every_steps", "1"]  # 7 pairs a process


def torchrun(count, *more):
    return ["--standalone", "--nproc_per_node", count, *more]


def test_only_the_same_start_of_torchrun_resumes_by_itself(synthetic_root, tmp_path, train, monkeypatch):
    """Not one that was refused, or that was asked to overwrite and was stopped before it began, however often."""
    assert train(synthetic_root, tmp_path, "--epochs", "1").returncode == 0
    args = Namespace(resume="false", overwrite=False, dry_run=False)
    monkeypatch.setattr(resume, "under_torchrun", lambda: True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="--overwrite replaces it"):
        resume.should_resume(tmp_path / "run", args)
    assert not resume.should_resume(tmp_path / "run", Namespace(**vars(args) | {"overwrite": True}))
    path = tmp_path / "run" / "latest.pth"
    save_checkpoint(path, load_checkpoint(path) | {"launch": resume.launch_name()})
    assert resume.should_resume(tmp_path / "run", args)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert str(os.getppid()) in resume.launch_name()


@pytest.mark.slow
def test_two_processes_train_on_one_global_batch_and_score_every_pair_once(synthetic_root, tmp_path, cli):
    done = shell(synthetic_root, tmp_path, *SHARED, torchrun=torchrun(2))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("processes: 2") == 1 and done.stdout.count("20 of 20 pairs scored") == 1
    state = load_checkpoint(tmp_path / "run" / "latest.pth")
    assert {int(entry["step"]) for entry in state["optimizer"]["state"].values()} == {2 * (70 // 14)}
    one = json.loads((tmp_path / "run" / "results" / "synthetic" / "results.json").read_text())
    again = cli(
        "test_model", "--model_dir", tmp_path, "--experiment_name", "run", "--testset", "synthetic", "--gpu", "cpu",
        "--test_data_path", synthetic_root, "--out_dir", tmp_path / "one", "--imagenet_weights", "none",
        "--batch_size", "14", "--num_workers", "0", "--negatives", "silence,noise,offscreen",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    two = json.loads((tmp_path / "one" / "synthetic" / "results.json").read_text())
    for part in ("maps", "intervals", "references", "retrieval", "by_class", "by_size", "pairs"):
        assert not difference(two[part], one[part], part)
    rows = (tmp_path / "run" / "results" / "synthetic" / "per_sample.csv").read_text().splitlines()
    assert len(rows) == 21 and len(set(rows)) == 21


@pytest.mark.slow
def test_a_killed_worker_comes_back_from_the_last_checkpoint(synthetic_root, tmp_path):
    flags = [*SHARED, "--epochs", "6"]
    process = subprocess.Popen(
        command(synthetic_root, tmp_path, *flags, torchrun=torchrun(2, "--max-restarts", "2")),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(process, tmp_path, 1, 2)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "resumed after epoch" in stdout
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2, 3, 4, 5, 6]
    (tmp_path / "whole").mkdir()
    assert shell(synthetic_root, tmp_path / "whole", *flags, torchrun=torchrun(2)).returncode == 0
    assert not difference(ending(tmp_path / "whole"), ending(tmp_path))


@pytest.mark.slow
def test_two_nodes_on_one_machine_train_like_one_node_of_two(synthetic_root, tmp_path):
    (tmp_path / "nodes").mkdir()
    (tmp_path / "node").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for number in (0, 1):
        node = ["--nnodes", 2, "--node_rank", number, "--nproc_per_node", 1]
        node += ["--master_addr", "127.0.0.1", "--master_port", port]
        processes.append(
            subprocess.Popen(
                command(synthetic_root, tmp_path / "nodes", *SHARED, torchrun=node),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    assert shell(synthetic_root, tmp_path / "node", *SHARED, torchrun=torchrun(2)).returncode == 0
    assert not difference(ending(tmp_path / "node"), ending(tmp_path / "nodes"))


@pytest.mark.slow
def test_several_processes_told_to_stop_save_and_go_on(synthetic_root, tmp_path):
    flags = [*SHARED, "--epochs", "6", "--save_every_steps", "0", "--testset", "synthetic"]
    (tmp_path / "whole").mkdir()
    assert shell(synthetic_root, tmp_path / "whole", *flags, torchrun=torchrun(2)).returncode == 0
    process = subprocess.Popen(
        command(synthetic_root, tmp_path, *flags, "--eval_every", "0", torchrun=torchrun(2)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(process, tmp_path, 1, 0)
    process.terminate()
    stdout, stderr = process.communicate(timeout=120)
    assert "stopped by SIGTERM" in stdout, stderr
    state = load_checkpoint(tmp_path / "run" / "latest.pth")
    assert (1, 0) <= (state["epoch"], state["step"]) < (6, 0)
    done = shell(synthetic_root, tmp_path, *flags, "--resume", torchrun=torchrun(2))
    assert done.returncode == 0, done.stderr
    weights = (load_checkpoint(folder / "run" / "latest.pth") for folder in (tmp_path / "whole", tmp_path))
    whole, halves = ({key: state[key] for key in ("model", "optimizer", "random")} for state in weights)
    assert not difference(whole, halves)


def test_a_batch_that_the_processes_cannot_share_evenly_is_refused(synthetic_root, tmp_path, monkeypatch, train):
    monkeypatch.setattr("train_slot.world_size", lambda: 3)
    done = train(synthetic_root, tmp_path)
    assert done.returncode == 2 and "multiple of the 3 processes" in done.stderr


def test_batch_norm_over_processes_is_refused_where_there_is_none(synthetic_root, tmp_path, train):
    done = train(synthetic_root, tmp_path, "--sync_bn")
    assert done.returncode == 2 and "CUDA" in done.stderr
