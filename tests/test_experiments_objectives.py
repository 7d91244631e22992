"""The table of objectives: its figures, which runs are trained, refused or passed over, what a failed one leaves."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import cv2
import pytest
from conftest import ROOT, SMALL

import experiments.objectives as compare_objectives
import train_slot
from experiments.objectives import ROWS, SPLITS, TABLES, Row, Training
from utils import UserError

STUB = f"""#!{sys.executable}
# In the place of python in train_script.sh: train_slot.py that "trains" at once, or fails where it is told to.
import json, os, pathlib, sys
words = sys.argv[2:]
flags = {{word[2:]: value for word, value in zip(words, [*words[1:], "--"]) if word.startswith("--")}}
print(*words, os.environ["OMP_NUM_THREADS"], flush=True)
if flags["experiment_name"] in os.environ.get("FAILING", ""):
    sys.exit("line before\\nerror: the disk is full")
if os.environ.get("SLEEPING"):
    pathlib.Path(os.environ["SLEEPING"]).write_text(str(os.getpid()))
    import time; time.sleep(60)
folder = pathlib.Path(flags["model_dir"]) / flags["experiment_name"]
def number(text):
    try:
        return float(text)
    except ValueError:
        return text
(folder / "configs.json").write_text(json.dumps({{name: number(value) for name, value in flags.items()}}))
line = {{"steps": 62, "pairs_per_second": 248.0}}
(folder / "log.jsonl").write_text((json.dumps(line) + "\\n") * 10)
for split in flags["testset"].split(","):
    place = folder / "results" / split
    place.mkdir(parents=True, exist_ok=True)
    asked = {{name: number(flags.get(name, "0")) for name in ("infer_sharpening", "infer_smoothing")}}
    results = {{"maps": {{"AUD": {{"cIoU": 0.5}}}}, "settings": asked, "provenance": {{"revision": "abc"}}}}
    (place / "results.json").write_text(json.dumps(results))
"""


OURS = {"infer_sharpening": 0.1, "infer_smoothing": 0.1}


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Trainings of a blink, no data, no picture; returns the folder of the runs."""
    python = tmp_path / "python"
    python.write_text(STUB)
    python.chmod(0o755)
    monkeypatch.setattr(compare_objectives, "PYTHON", str(python))
    monkeypatch.setattr(compare_objectives, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(compare_objectives, "make_data", lambda objects: None)
    monkeypatch.setattr(compare_objectives, "side_by_side_on_synthetic", lambda *_: None)
    return tmp_path / "runs"


def write_run(root, key, seed, maps, recalls=(0.9, 0.8)):
    """A finished run from its figures of AUD, {split: {metric: fraction}}."""
    run = Training(ROWS[key], seed, 10, root / f"{key}_seed_{seed}")
    for split in SPLITS:
        ways = dict(zip(("image_to_audio", "audio_to_image"), ({"R@1": recall} for recall in recalls)))
        results = {
            "maps": {"AUD": maps.get(split, {})},
            "retrieval": {"by_class": ways} if recalls else {},
            "settings": {"infer_sharpening": 0.02} if key == "published" else OURS,  # published: of older code
            "provenance": {"revision": "abc-dirty" if seed else "abc"},
        }
        run.results(split).parent.mkdir(parents=True)
        run.results(split).write_text(json.dumps(results))
    (run.folder / "configs.json").write_text(json.dumps({"batch_size": 64}))
    (run.folder / "log.jsonl").write_text(json.dumps({"steps": 62, "pairs_per_second": 62 * 6.4 + seed}) + "\n")
    return run


def test_the_table_has_mean_and_worst_seed_and_a_dash_where_nothing_is_defined(tmp_path):
    figures = {
        "synthetic": {"cIoU": 0.8, "cIoU_half": 0.01},
        "synthetic_distractor": {"pointing": 0.5, "cIoU": 0.25, "cIoU_half": None, "listening": -0.02},
        "synthetic_interactive": {"both_pointing": 0.2, "IIoU": 0.1, "IIoU_half": 0.0},
        "synthetic_offscreen": {"presence_AP": 0.62, "presence_AP@presence": 0.5},
    }
    better = figures | {"synthetic": {"cIoU": 0.9, "cIoU_half": 0.02}}
    rows = {
        "published": [write_run(tmp_path, "published", 0, figures), write_run(tmp_path, "published", 1, better)],
        "maxpool": [write_run(tmp_path, "maxpool", seed, figures, recalls=()) for seed in (0, 1)],
    }
    lines = compare_objectives.table(rows).splitlines()
    assert lines[2].startswith("| trained with | objects | sharpening, smoothing | test cIoU | distractor pointing |")
    assert lines[4] == (
        "| published | 1 to 3 | 0.02, 0 | 85.0 (80.0) | 50.0 (50.0) | 25.0 (25.0) | -2.0 (-2.0) | 20.0 (20.0) "
        "| 10.0 (10.0) |"
    )
    assert (
        "| published | 1 to 3 | 0.02, 0 | 1.5 (1.0) | - | 0.0 (0.0) | 80.0 (80.0) | 62.0 (62.0) | 50.0 (50.0) |"
        in lines
    )
    assert (
        "| max-pool contrast | 1 to 3 | 0.1, 0.1 | 1.0 (1.0) | - | 0.0 (0.0) | - | 62.0 (62.0) | 50.0 (50.0) |" in lines
    )
    assert lines[-1] == (
        "seeds 0, 1: mean (worst); small, 10 epochs; 10 s of training per run (median, one thread); revision abc, "
        "abc-dirty; built-in data, not VGG-Sound; no box is used in training or in choosing checkpoints (the "
        "sharpening of the published rows, the weights of our losses and the smoothing were chosen with the boxes of "
        "other data)"
    )
    single = compare_objectives.table({"published": rows["published"][:1]})
    assert "| 80.0 | 50.0 |" in single and "seeds 0; small, 10 epochs" in single
    for columns in TABLES.values():
        assert all(split in SPLITS for _, split, _ in columns)


def test_what_is_finished_is_passed_over_and_what_is_not_is_trained_again(stub, cli):
    flags = "--rows", "listen", "published", "--seeds", 0, 1, "--model_dir", stub, "--jobs", 2
    done = cli("experiments.objectives", *flags)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in stub.iterdir()) == [
        f"{key}_seed_{seed}" for key in ("listen", "published") for seed in (0, 1)
    ]
    assert (
        "| published | 1 to 3 | 0.02, 0 | 50.0 (50.0) |" in done.stdout and "; 160 s of training per run" in done.stdout
    )
    assert done.stdout.index("| published") < done.stdout.index("| share contrast"), "the table keeps its own order"
    given = (stub / "listen_seed_1" / "train.txt").read_text()
    for piece in (
        "--share_contrast 1 --foreign_claims 4 --lam3 0",
        "--seed 1",
        "--num_workers 0",
        "--train_data_path data/synthetic_3",
    ):
        assert piece in given
    assert given.split()[-1] == "1", "a training takes more than one thread"
    times = {path: path.stat().st_mtime_ns for path in stub.glob("*/train.txt")}
    (stub / "listen_seed_0" / "results" / "synthetic_offscreen" / "results.json").unlink()
    assert cli("experiments.objectives", *flags).returncode == 0
    again = [path.parent.name for path, then in times.items() if path.stat().st_mtime_ns != then]
    assert again == ["listen_seed_0"]


def test_the_full_size_shapes_have_folders_of_their_own_and_say_so(stub, cli):
    flags = "--rows", "listen", "--model_dir", stub
    assert cli("experiments.objectives", *flags).returncode == 0
    done = cli("experiments.objectives", *flags, "--arch", "resnet18", "--epochs", 2)
    assert done.returncode == 0, done.stderr
    assert "seeds 0; resnet18, 2 epochs" in done.stdout and "objectives_resnet18.png" in done.stdout
    small, full = ((stub / f"listen{arch}_seed_0" / "train.txt").read_text() for arch in ("", "_resnet18"))
    assert "--arch resnet18 --image_size 224" in full and "resnet18" not in small


def test_a_finished_run_with_other_flags_is_refused_before_anything_is_trained(stub, cli, monkeypatch):
    flags = "--rows", "published", "--model_dir", stub
    assert cli("experiments.objectives", *flags).returncode == 0
    done = cli("experiments.objectives", "--rows", "map", "published", "--model_dir", stub, "--epochs", 3)
    assert done.returncode == 2
    assert "published_seed_0 was trained with --epochs 10 and not 3: remove that folder" in done.stderr
    assert not (stub / "map_seed_0").exists()
    monkeypatch.setitem(ROWS, "published", Row("published", flags="--lam2 0.5"))
    assert "--lam2 None and not 0.5" in cli("experiments.objectives", *flags).stderr
    monkeypatch.setitem(ROWS, "published", Row("published", flags="--lam3 5"))
    assert cli("experiments.objectives", *flags, "--model_dir", stub / "less").returncode == 0
    monkeypatch.setitem(ROWS, "published", Row("published", flags=""))
    less = cli("experiments.objectives", *flags, "--model_dir", stub / "less")
    assert less.returncode == 2 and "--lam3 5 and not None" in less.stderr, "a flag that a row no longer has"
    assert len(less.stderr.splitlines()) == 1


def test_a_failed_training_is_shown_with_its_last_lines_and_stops_no_other(stub, cli, monkeypatch):
    monkeypatch.setenv("FAILING", "published_seed_0")
    flags = "--rows", "published", "map", "foreign", "--model_dir", stub, "--jobs", 1
    done = cli("experiments.objectives", *flags)
    assert done.returncode == 2 and "|" not in done.stdout
    assert re.search(
        r"published_seed_0/train.txt ends in:\n(.*\n)?  line before\n  error: the disk is full\n", done.stderr
    )
    assert "1 of 3 trainings failed" in done.stderr.splitlines()[-1]
    times = {key: (stub / f"{key}_seed_0" / "train.txt").stat().st_mtime_ns for key in ("map", "foreign")}
    monkeypatch.delenv("FAILING")
    done = cli("experiments.objectives", *flags)
    assert done.returncode == 0 and "| foreign tokens |" in done.stdout
    assert all((stub / f"{key}_seed_0" / "train.txt").stat().st_mtime_ns == then for key, then in times.items())


def test_an_interrupted_comparison_leaves_no_training_behind(stub, cli, monkeypatch, tmp_path):
    monkeypatch.setenv("SLEEPING", str(tmp_path / "pid"))

    pause = time.sleep

    def interrupt(_):
        if (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt
        pause(0.01)

    monkeypatch.setattr(compare_objectives.time, "sleep", interrupt)
    assert cli("experiments.objectives", "--rows", "map", "--model_dir", stub).returncode == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)


@pytest.mark.parametrize(("key", "arch"), [*((key, "small") for key in ROWS), ("listen", "resnet18")])
def test_the_flags_of_every_row_are_flags_of_the_training(key, arch, monkeypatch, tmp_path):
    run = Training(ROWS[key], 0, 10, tmp_path / key, arch)
    monkeypatch.chdir(ROOT)
    asked = subprocess.run(run.command(), env=run.environment("echo"), capture_output=True, text=True, check=True)
    monkeypatch.setattr(sys, "argv", asked.stdout.split())
    args = train_slot.parse_args()
    train_slot.check_args(args)
    assert args.arch == arch and args.epochs == 10
    assert args.train_data_path == ("data/synthetic" if "_one" in key else "data/synthetic_3")
    asked = args.infer_sharpening, args.infer_smoothing
    assert asked == ((0.02, 0) if key.startswith("published") else (0.1, 0.1))
    assert bool(args.foreign_claims) == key.startswith("listen")
    assert bool(args.share_contrast) == (args.lam3 == 0)


@pytest.mark.slow
def test_a_real_training_ends_in_table_and_picture(synthetic_root, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(compare_objectives, "make_data", lambda objects: None)
    monkeypatch.setattr(compare_objectives, "DATA", {1: synthetic_root, 3: synthetic_root})
    monkeypatch.setitem(ROWS, "listen", Row("share contrast", "listen", " ".join(SMALL)))
    done = cli("experiments.objectives", "--rows", "listen", "--epochs", 1, "--model_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| share contrast | 1 to 3 | 0.1, 0.1 |") == 2 and "| - |" not in done.stdout
    assert cv2.imread(str(tmp_path / "objectives.png")).shape == (44 + 6 * 282 + 8, 3 * 232 + 8, 3)


def test_data_that_cannot_be_made_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_objectives, "PYTHON", "false")
    with pytest.raises(UserError, match="synthetic_3 --train_objects 3"):
        compare_objectives.make_data(3)
