"""The comparison of objectives and the demonstration: what is trained, refused or passed over, what they leave."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import cv2
import pytest
import torch
from conftest import ROOT

import experiments.objectives as objectives
import experiments.runs as runs
import recipes
from experiments.objectives import ROWS
from experiments.runs import SPLITS, Row
from experiments.tables import CLASS_RECALL, TABLES
from model_slot import JointSlotModel
from models import load_model
from synthetic.generate import generate
from synthetic.probe import probe
from utils import ArgumentParser, load_checkpoint, save_checkpoint

STUB = f"""#!{sys.executable}
# In the place of python in train_script.sh: train_slot.py that "trains" at once, or fails where it is told to.
import json, os, pathlib, sys
words = sys.argv[2:]
flags = {{word[2:]: value for word, value in zip(words, [*words[1:], "--"]) if word.startswith("--")}}
folder = pathlib.Path(flags["model_dir"]) / flags["experiment_name"]
(folder / "flags.txt").write_text(" ".join([*words, os.environ.get("OMP_NUM_THREADS", "all")]))
if flags["experiment_name"] in os.environ.get("FAILING", ""):
    sys.exit("line before\\nerror: the disk is full")
if os.environ.get("SLEEPING"):
    pathlib.Path(os.environ["SLEEPING"]).write_text(str(os.getpid()))
    import time; time.sleep(600)
about = {{"batch_size": 64, "image_encoder": flags.get("arch", "small"), "epochs": int(flags.get("epochs", 10))}}
(folder / "configs.json").write_text(json.dumps(about))
line = {{"steps": 62, "pairs_per_second": 248.0}}
(folder / "log.jsonl").write_text((json.dumps(line) + "\\n") * 10)
for split in flags["testset"].split(","):
    place = folder / "results" / split
    place.mkdir(parents=True, exist_ok=True)
    settings = {{"infer_sharpening": 0.02, "infer_smoothing": 0}}
    results = {{"maps": {{"AUD": {{"cIoU": 0.5}}}}, "settings": settings, "provenance": {{"revision": "abc"}}}}
    (place / "results.json").write_text(json.dumps(results))
"""
CHECKPOINT = ROOT / "checkpoints" / "demo.pth"
BARS = {"AUD cIoU": 0.60, "AUD pointing": 0.95, CLASS_RECALL: 0.90}


@pytest.fixture
def stub(tmp_path, monkeypatch, synthetic_root):
    """Trainings of a blink, no data to make, no image; returns the folder of the comparison."""
    python = tmp_path / "python"
    python.write_text(STUB)
    python.chmod(0o755)
    monkeypatch.setattr(runs, "PYTHON", str(python))
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(objectives, "make_data", lambda objects: None)
    monkeypatch.setattr(objectives, "side_by_side_on_synthetic", lambda *_: None)
    monkeypatch.setattr(objectives, "CHECKPOINTS", tmp_path / "demos")
    monkeypatch.setattr(objectives, "DOCS", tmp_path / "docs")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path / "runs"


@pytest.fixture
def compare(cli, stub):
    """compare(flags...) runs the comparison into the folder of `stub`."""
    return lambda *flags: cli("experiments.objectives", "--model_dir", stub, *flags)


def squeezed(text: str) -> str:
    """Without the padding of a table's cells."""
    return re.sub(r" +", " ", text)


# ---------------------------------------------------------------- the comparison


def test_what_is_finished_is_passed_over_and_what_is_not_is_trained_again(stub, compare):
    flags = "--rows", "listen", "published", "--seeds", 0, 1, "--jobs", 2
    done = compare(*flags)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in stub.iterdir()) == [
        f"{key}_seed_{seed}" for key in ("listen", "published") for seed in (0, 1)
    ]
    assert "| published | 1 to 3 | 0.02, 0 | 50.0 (50.0) |" in squeezed(done.stdout)
    assert all(title in done.stdout for title, _ in TABLES.values())
    assert "seeds 0, 1: mean (worst); small, 10 epochs; 160 s of training per run" in done.stdout
    assert done.stdout.index("| published") < done.stdout.index("| share contrast"), "the table keeps its own order"
    given = (stub / "listen_seed_1" / "flags.txt").read_text()
    for piece in ("--objective listen", "--seed 1", "--num_workers 0", "--train_data_path data/synthetic_3"):
        assert piece in given
    assert given.split()[-1] == "1", "a training takes more than one thread"
    times = {path: path.stat().st_mtime_ns for path in stub.glob("*/flags.txt")}
    (stub / "listen_seed_0" / "results" / "synthetic_offscreen" / "results.json").unlink()
    assert compare(*flags).returncode == 0
    again = [path.parent.name for path, then in times.items() if path.stat().st_mtime_ns != then]
    assert again == ["listen_seed_0"]


def test_the_full_size_shapes_have_folders_of_their_own_and_say_so(stub, compare):
    assert compare("--rows", "listen").returncode == 0
    done = compare("--rows", "listen", "--arch", "resnet18", "--epochs", 2)
    assert done.returncode == 0, done.stderr
    assert "seeds 0; resnet18, 2 epochs" in done.stdout and "objectives_resnet18.png" in done.stdout
    small, full = ((stub / f"listen{arch}_seed_0" / "flags.txt").read_text() for arch in ("", "_resnet18"))
    assert "--arch resnet18 --image_size 224" in full and "resnet18" not in small


def test_a_finished_run_with_other_flags_is_refused_before_anything_is_trained(stub, compare, monkeypatch):
    assert compare("--rows", "published").returncode == 0
    done = compare("--rows", "maxpool", "published", "--epochs", 3)
    assert done.returncode == 2
    assert "published_seed_0 was trained with --epochs 10 and not 3: remove that folder" in done.stderr
    assert not (stub / "maxpool_seed_0").exists()
    with monkeypatch.context() as other_cpu:
        other_cpu.setattr("experiments.runs.choose_amp", lambda *_: "another")
        assert "and not another: remove" in compare("--rows", "published").stderr, "one table has one precision"
    monkeypatch.setitem(ROWS, "published", Row("published", "--weights lam2=0.5 lam3=0"))
    done = compare("--rows", "published")
    assert "--weights attention_matching 100.0 and not 0.0, --weights slot_divergence 0.1 and not 0.5" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    monkeypatch.setitem(ROWS, "published", Row("published", "--tau 5"))
    assert compare("--rows", "published", "--model_dir", stub / "less").returncode == 0
    monkeypatch.setitem(ROWS, "published", Row("published"))
    less = compare("--rows", "published", "--model_dir", stub / "less")
    assert less.returncode == 2 and "--tau 5.0 and not 0.05" in less.stderr, "a flag that a row no longer has"


def test_a_failed_training_is_shown_with_its_last_lines_and_stops_no_other(stub, compare, monkeypatch):
    monkeypatch.setenv("FAILING", "published_seed_0")
    flags = "--rows", "published", "maxpool", "share", "--jobs", 1
    done = compare(*flags)
    assert done.returncode == 2 and "|" not in done.stdout
    ending = r"published_seed_0/train.txt ends in:\n(.*\n)?  line before\n  error: the disk is full\n"
    assert re.search(ending, done.stderr)
    assert "1 of 3 trainings failed" in done.stderr.splitlines()[-1]
    times = {key: (stub / f"{key}_seed_0" / "flags.txt").stat().st_mtime_ns for key in ("maxpool", "share")}
    monkeypatch.delenv("FAILING")
    done = compare(*flags)
    assert done.returncode == 0 and "| share contrast |" in squeezed(done.stdout)
    assert all((stub / f"{key}_seed_0" / "flags.txt").stat().st_mtime_ns == then for key, then in times.items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_comparison_leaves_no_training_behind(compare, monkeypatch, tmp_path, number):
    monkeypatch.setenv("SLEEPING", str(tmp_path / "pid"))
    pause = time.sleep

    def interrupt(_):
        if (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text():
            if number == signal.SIGINT:  # which a shell's background jobs ignore
                raise KeyboardInterrupt
            os.kill(os.getpid(), number)
        pause(0.01)

    monkeypatch.setattr(runs.time, "sleep", interrupt)
    assert compare("--rows", "maxpool").returncode == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)


@pytest.mark.parametrize(("key", "arch"), [*((key, "small") for key in ROWS), ("listen", "resnet18")])
def test_the_flags_of_every_row_are_flags_of_the_training(key, arch, tmp_path):
    ((run,),) = objectives.objective_rows([key], [3], tmp_path, arch, 7).values()
    words = ["--trainset", "synthetic", *run.words(), "--experiment_name", run.folder.name]
    recipes.add_flags(parser := ArgumentParser())
    args = recipes.parse(parser, words)
    assert (args.recipe, args.image_encoder, args.epochs, args.seed) == ("small", arch, 7, 3)
    assert args.train_data_path == ("data/synthetic" if "_one" in key else "data/synthetic_3")
    inference = args.infer_sharpening, args.infer_smoothing
    assert inference == ((0.02, 0) if key.startswith("published") else (0.1, 0.1))
    assert args.objective == ("maxpool" if key == "maxpool" else "listen" if "listen" in key else "paper")
    ours = {name for name in ("share_contrast", "foreign_claims", "silence") if args.weights.get(name)}
    wanted = {"share": {"share_contrast"}, "listen": {"share_contrast", "foreign_claims"}}.get(key.split("_")[0], set())
    assert ours == wanted | ({"silence"} if "silence" in key else set())
    assert bool(args.weights.get("attention_matching")) == (not ours and key != "maxpool")


@pytest.mark.slow
def test_a_real_training_ends_in_table_and_image(synthetic_root, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(objectives, "make_data", lambda objects: None)
    for most in (1, 3):
        monkeypatch.setitem(runs.DATA, most, synthetic_root)
    done = cli("experiments.objectives", "--rows", "listen", "--epochs", 1, "--model_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    row = f"| {ROWS['listen'].label} | 1 to 3 | 0.1, 0.1 |"
    assert squeezed(done.stdout).count(row) == len(TABLES) and "| - |" not in squeezed(done.stdout)
    assert cv2.imread(str(tmp_path / "objectives.png")).shape == (44 + 6 * 282 + 8, 3 * 232 + 8, 3)


# ---------------------------------------------------------------- the demonstration


@pytest.fixture
def demo(cli, stub, monkeypatch, synthetic_root):
    """demo(flags...) runs the demonstration with the trainings of `stub`."""
    monkeypatch.setitem(runs.DATA, 1, synthetic_root)
    monkeypatch.setattr(objectives, "write_demo_film", lambda checkpoints, for_docs: f"a film by {[*checkpoints]}")
    return lambda *flags: cli("experiments.objectives", "--demo", *flags)


def test_both_objectives_are_trained_tabulated_and_drawn(demo, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(objectives, "side_by_side_on_synthetic", lambda files, *_: drawn.append(files))
    done = demo("--seeds", 0, 1)
    assert done.returncode == 0, done.stderr
    folders = [f"demo_{name}" for name in ("listen_seed_0", "listen_seed_1", "seed_0", "seed_1")]
    assert sorted(path.name for path in (tmp_path / "demos").iterdir()) == folders
    for name in folders:
        given = (tmp_path / "demos" / name / "flags.txt").read_text()
        assert f"--testset {','.join(SPLITS[:3])} " in given and f"--seed {name[-1]}" in given
        assert ("--objective listen" in given) == ("listen" in name) and "data_path" not in given
        assert given.split()[-1] == "all" and "--num_workers" not in given, "as a user's own training"
    assert "| test cIoU | 50.0 (50.0) | 50.0 (50.0) | |" in squeezed(done.stdout)
    assert [{label: path.parent.name for label, path in files.items()} for files in drawn] == [
        {"published": "demo_seed_0", "listening": "demo_listen_seed_0"}
    ]
    looked_at = done.stdout[done.stdout.index("look at") :]
    assert "demo_seed_0/results/synthetic/results.json" in looked_at and "demo_objectives.png" in looked_at
    assert "a film by ['published', 'listening']" in looked_at
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("demos/*/flags.txt")}
    assert demo("--seeds", 0, 1).returncode == 0
    assert all(path.stat().st_mtime_ns != then for path, then in times.items()), "always trained anew"


def test_the_demonstration_exports_both_models_and_draws_the_published_one(demo, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(objectives, "export", lambda *paths: made.append(paths))
    monkeypatch.setattr(objectives, "draw_samples", lambda *paths: made.append(paths))
    assert demo("--export", tmp_path / "demo.pth").returncode == 0
    published, listening = (tmp_path / "demos" / f"demo_{name}seed_0" / "best.pth" for name in ("", "listen_"))
    assert made == [
        (published, tmp_path / "demo.pth"),
        (listening, tmp_path / "listen.pth"),
        (tmp_path / "demo.pth", tmp_path / "docs" / "demo.png"),
    ]


def test_a_demonstration_that_fails_says_which_command(demo, monkeypatch):
    monkeypatch.setenv("FAILING", "demo_listen_seed_0")
    done = demo()
    assert done.returncode == 2 and "failed: bash train_script.sh" in done.stderr and "|" not in done.stdout


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
    objectives.export(tmp_path / "best.pth", tmp_path / "demo.pth")
    assert set(load_checkpoint(tmp_path / "demo.pth")) == {"model", "model_config", "epoch"}
    assert load_model(tmp_path / "demo.pth").config == model.config


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--demo", "--rows", "listen", "--jobs", "2"), "--rows, --jobs"),
        (("--write_docs", "--epochs", "2"), "--epochs"),
        (("--demo", "--over_time"), "--over_time"),
        (("--export", "x.pth"), "--demo"),
        (("--rows", "map"), "map"),
        (("--demo", "maybe"), "maybe"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(compare, stub, flags, says):
    done = compare(*flags)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1
    assert not stub.exists()


# ---------------------------------------------------------------- docs/


@pytest.fixture
def films(monkeypatch):
    """Films asked by nobody: each call of test_model.py leaves a result at once; returns the commands."""
    asked = []

    def call(*command):
        asked.append(command)
        flags = dict(pairwise(command))
        lit = float(flags["--window"]) / 100
        figures = {"pointing": 0.9, "lit_pauses": lit, "lit_sounding": 0.2, "false_peaks": 0.5, "delay": 0.1}
        results = {"maps": {"AUD": figures}, "references": {"deaf_oracle": figures | {"pointing": 0.5}}}
        place = Path(flags["--out_dir"]) / "synthetic_video"
        place.mkdir(parents=True)
        (place / "results.json").write_text(json.dumps(results))

    monkeypatch.setattr(objectives, "call", call)
    monkeypatch.setattr(objectives, "VIDEO", ROOT)
    return asked


def test_models_are_asked_over_time_once_with_every_window(compare, films):
    flags = "--rows", "published", "share", "listen", "--seeds", 0, 1, "--over_time"
    done = compare(*flags)
    assert done.returncode == 0, done.stderr
    shown = squeezed(done.stdout)
    assert (
        f"| {ROWS['listen'].label} | 0.6 s | 90.0 (90.0) | 0.6 (0.6) | 20.0 (20.0) | 50.0 (50.0) | 0.10 (0.10) s |"
        in shown
    )
    assert "| published | 1.6 s |" in shown and "| share contrast | 1.6 s" not in shown
    assert "| deaf oracle | | 50.0 | 0.6 | 20.0 | 50.0 | 0.10 s |" in shown
    assert len(films) == 8 and all("best.pth" in command[3] for command in films)
    assert compare(*flags).returncode == 0 and len(films) == 8, "what is there is not asked again"


def test_tables_of_finished_trainings_go_into_the_pages(compare, films, stub, tmp_path, monkeypatch, synthetic_root):
    monkeypatch.setitem(runs.DATA, 1, synthetic_root)
    pages = {"listening.md": ("fixed", "half", "negatives", "over_time"), "results.md": ("demo",)}
    (tmp_path / "docs").mkdir()
    for page, names in pages.items():
        text = "".join(f"<!-- table: {name} -->\nold\n<!-- end: {name} -->\n" for name in names)
        (tmp_path / "docs" / page).write_text(f"# Page\n{text}")
    done = compare("--write_docs")
    assert done.returncode == 2 and "no table has all its trainings" in done.stderr
    assert compare("--rows", "published_one", "listen_one").returncode == 0
    before = (tmp_path / "docs" / "listening.md").read_text()
    done = compare("--write_docs")
    assert done.returncode == 0, done.stderr
    assert "table fixed stays as it is" in done.stdout and "maxpool_seed_0" in done.stdout
    assert (tmp_path / "docs" / "listening.md").read_text() == before
    results = squeezed((tmp_path / "docs" / "results.md").read_text())
    assert "| test cIoU | 50.0 | 50.0 | |" in results and "old" not in results
    assert "*seeds 0; small, 10 epochs; 160 s of training per run (median); revision abc*" in results
    assert compare().returncode == 0
    done = compare("--write_docs")
    assert done.returncode == 0 and "table over_time stays as it is: not finished: " in done.stdout
    assert compare("--over_time").returncode == 0
    assert compare("--write_docs").returncode == 0
    listening = squeezed((tmp_path / "docs" / "listening.md").read_text())
    assert "old" not in listening and listening.count(f"| {ROWS['listen_silence'].label} |") == 5
    assert compare("--write_docs", "--rows", "published", "share").returncode == 0
    fewer = squeezed((tmp_path / "docs" / "listening.md").read_text())
    assert ROWS["listen_silence"].label not in fewer and fewer.count("| share contrast |") == 3
    (stub / "share_seed_0" / "results" / SPLITS[0] / "results.json").unlink()
    (tmp_path / "docs" / "results.md").write_text("no lines")
    done = compare("--write_docs")
    assert done.returncode == 2 and "<!-- table: demo -->" in done.stderr and len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------- the committed model, and the claims about it


def test_the_committed_model_is_small_loads_and_is_the_one_that_the_readme_names():
    assert CHECKPOINT.stat().st_size <= 4e6
    assert load_model(CHECKPOINT).shape["image_encoder"] == "small"
    assert hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest() in (ROOT / "README.md").read_text()


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
def test_the_default_data_are_as_hard_as_the_pages_say(default_root):
    numbers = probe(default_root)
    for split in ("distractor", "interactive"):
        for blind in numbers[split].values():
            assert blind["pointing"] <= 0.5 and blind.get("both_pointing", 0) <= 0.25
    assert numbers["class_accuracy"]["colour"] <= 0.95 and numbers["class_accuracy"]["spectrum"] <= 0.8
    pages = "".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    row = re.search(r"^ *distractor +saliency +([\d.]+)", pages, re.M)
    assert float(row[1]) == pytest.approx(100 * numbers["distractor"]["saliency"]["pointing"], abs=0.06)


def bars_missed(results):
    by_class = results["retrieval"]["by_class"]
    figures = {
        "AUD cIoU": results["maps"]["AUD"]["cIoU"],
        "AUD pointing": results["maps"]["AUD"]["pointing"],
        CLASS_RECALL: min(recalls["R@1"] for recalls in by_class.values()),
    }
    return {name: value for name, value in figures.items() if value < BARS[name]}


@pytest.mark.slow
def test_the_committed_model_reaches_the_bars(default_root, tmp_path, cli):
    done = cli(
        "test_model", "--checkpoint", CHECKPOINT, "--testset", "synthetic", "--test_data_path", default_root, "--gpu",
        "cpu", "--imagenet_weights", "none", "--out_dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not bars_missed(json.loads((tmp_path / "synthetic" / "results.json").read_text()))


@pytest.mark.slow
def test_the_listening_objective_follows_the_sound_in_its_last_epoch(default_root, tmp_path, cli):
    """The headline of the README: one seed, the built-in data, one object in a training image."""
    data = ["--train_data_path", str(default_root), "--test_data_path", str(default_root)]
    listen = "bash", "train_script.sh", "synthetic", "synthetic_distractor", "cpu", "ears", "--model_dir", str(tmp_path)
    subprocess.run([*listen, *data], cwd=ROOT, env=runs.environment() | {"OBJECTIVE": "listen"}, check=True)
    done = cli(
        "test_model", "--checkpoint", tmp_path / "ears_listen" / "latest.pth", "--testset", "synthetic_distractor",
        "--test_data_path", default_root, "--gpu", "cpu", "--imagenet_weights", "none", "--out_dir", tmp_path / "last",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "last" / "synthetic_distractor" / "results.json").read_text())["maps"]["AUD"]
    assert figures["pointing"] >= 0.90 and figures["cIoU"] >= 0.65, figures


@pytest.mark.slow
def test_the_demonstration_trains_to_the_bars(default_root, tmp_path):
    data = ["--train_data_path", str(default_root), "--test_data_path", str(default_root)]
    runs.call("bash", "train_script.sh", "synthetic", "synthetic", "cpu", "demo", "--model_dir", str(tmp_path), *data)
    assert not bars_missed(json.loads((tmp_path / "demo" / "results" / "synthetic" / "results.json").read_text()))
