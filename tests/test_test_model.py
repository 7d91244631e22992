"""The command line of test_model.py: the result files that it writes, and what it refuses."""

import csv
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import files_up_to, shared_folder
from torchvision.models import resnet18

import test_model as command


@pytest.fixture
def run(cli):
    return lambda *arguments: cli("test_model", "--gpu", "cpu", "--num_workers", "0", *arguments)


def test_there_are_at_most_33_flags_and_each_boolean_may_stand_alone(monkeypatch):
    booleans = "--allow_missing", "--save_visualizations", "--save_maps", "--report", "--diagnose"
    monkeypatch.setattr(sys, "argv", ["test_model.py", *booleans, "--save_maps", "false"])
    args = vars(command.parse_args())
    assert len(args) <= 33
    assert [args[flag.removeprefix("--")] for flag in booleans] == [True, True, False, True, True]


def test_the_command_writes_results_rows_and_pictures_and_reads_the_checkpoint_once(
    checkpoint, synthetic_root, tmp_path, run, reads
):
    names = "synthetic,synthetic_interactive"
    done = run(
        "--checkpoint", checkpoint, "--testset", names, "--test_data_path", synthetic_root, "--out_dir", tmp_path,
        "--save_visualizations", "--imagenet_weights", "none", "--alpha", "0.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert reads == [checkpoint]
    results = json.loads((tmp_path / "synthetic" / "results.json").read_text())
    for name in ("AUD", "AUD_wrong", "IMG_QUERY", "IQR"):
        assert {"cIoU", "AUC", "cIoU_half", "AUC_half", "mean_iou", "mAP", "pointing"} <= results["maps"][name].keys()
        assert all(0 <= results["maps"][name][m] <= 1 for m in ("cIoU", "AUC", "mAP", "pointing"))
    difference = results["maps"]["AUD"]["cIoU"] - results["maps"]["AUD_wrong"]["cIoU"]
    assert results["maps"]["AUD"]["listening"] == pytest.approx(difference)
    assert results["settings"]["alpha"] == 0.5 and results["settings"]["infer_sharpening"] == 0.1
    assert results["pairs"] == {"scored": 20, "expected": 20, "left_out": [], "left_out_because": ""}
    assert results["checkpoint"]["epoch"] == 0 and results["provenance"]["torch"] == torch.__version__
    assert results["references"]["ceiling"]["cIoU"] == 1
    assert set(results["retrieval"]) == {"by_class", "by_pair"}
    rows = list(csv.DictReader((tmp_path / "synthetic" / "per_sample.csv").open()))
    assert len(rows) == 20 and {"id", "class", "AUD_iou", "IQR_iou_half", "area", "confidence"} <= rows[0].keys()
    share = np.mean([float(row["AUD_iou"]) >= 0.5 for row in rows])
    assert share == pytest.approx(results["maps"]["AUD"]["cIoU"])
    interactive = json.loads((tmp_path / "synthetic_interactive" / "results.json").read_text())
    assert {"IIoU", "IAUC", "both_pointing"} <= interactive["maps"]["AUD"].keys()
    assert interactive["retrieval"] == {}  # a picture stands there twice, with a sound of another class each time
    assert (tmp_path / "synthetic" / "contact_sheet.png").stat().st_size > 10_000
    assert not (tmp_path / "synthetic" / "samples").exists(), "overlays of all samples are asked for apart"
    assert "listening" in done.stdout and "ceiling" in done.stdout


def test_a_test_removes_what_an_earlier_one_wrote_and_nothing_else(checkpoint, synthetic_root, tmp_path, run):
    """Folders of the user's may have the names of ours; what is written has the mode that the umask asks for."""
    folder = tmp_path / "out" / "synthetic"
    theirs = [folder / name for name in ("samples/mine.png", "diagnosis/notes.txt", "report_files/a.jpg", "maps.npz")]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    test = (
        "--checkpoint", checkpoint, "--testset", "synthetic", "--test_data_path", synthetic_root,
        "--out_dir", tmp_path / "out", "--imagenet_weights", "none",
    )  # fmt: skip
    before = os.umask(0o027)
    try:
        done = run(*test, "--save_overlays", "--report")
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    ours = [path for path in folder.rglob("*") if path.is_file() and path not in theirs]
    assert {path.stat().st_mode & 0o777 for path in ours} == {0o640}
    names = {path.relative_to(folder).as_posix() for path in ours}
    assert {"contact_sheet.png", "samples/test_000007.png", "report.html", "report_files/00019.jpg"} <= names
    assert run(*test).returncode == 0
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert left == {"results.json", "per_sample.csv", ".written", *(p.relative_to(folder).as_posix() for p in theirs)}
    assert all(path.read_bytes() == b"mine" for path in theirs)


def test_results_that_cannot_be_written_leave_all_of_the_earlier_ones(checkpoint, synthetic_root, tmp_path, run):
    test = (
        "--checkpoint", checkpoint, "--testset", "synthetic", "--test_data_path", synthetic_root,
        "--out_dir", tmp_path, "--imagenet_weights", "none",
    )  # fmt: skip
    assert run(*test, "--save_maps").returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "synthetic").iterdir()}
    room = len(before[tmp_path / "synthetic" / "per_sample.csv"]) + 4096
    with files_up_to(room):
        done = run(*test, "--seed", 1)
    assert done.returncode == 2 and "results.json cannot be written" in done.stderr, done.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "synthetic").iterdir()} == before


@pytest.mark.parametrize("place", ["a file", "a file/below", "out"])
def test_a_place_that_cannot_be_written_into_is_told_before_anything_is_scored(
    place, checkpoint, synthetic_root, tmp_path, run, monkeypatch
):
    (tmp_path / "a file").write_text("here already")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "synthetic").write_text("a file in the place of a set's folder")
    monkeypatch.setattr("test_model.evaluate", lambda *_, **__: pytest.fail("scored first"))
    done = run(
        "--checkpoint", checkpoint, "--testset", "synthetic", "--test_data_path", synthetic_root,
        "--out_dir", tmp_path / place, "--imagenet_weights", "none",
    )  # fmt: skip
    assert done.returncode == 2 and f"{tmp_path / place / 'synthetic'} cannot be written into" in done.stderr


@pytest.mark.slow
def test_overlays_are_the_same_from_several_processes(checkpoint, synthetic_root, tmp_path, cli):
    drawn = []
    for workers in (0, 2):
        done = cli(
            "test_model", "--checkpoint", checkpoint, "--testset", "synthetic", "--test_data_path", synthetic_root,
            "--out_dir", tmp_path / str(workers), "--imagenet_weights", "none", "--gpu", "cpu", "--save_overlays",
            "--num_workers", workers,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        samples = tmp_path / str(workers) / "synthetic" / "samples"
        drawn.append({path.name: path.read_bytes() for path in samples.iterdir()})
    assert drawn[0] == drawn[1] and len(drawn[0]) == 20


def test_the_object_prior_adds_its_three_maps(checkpoint, synthetic_root, tmp_path, run):
    torch.save(resnet18().state_dict(), tmp_path / "imagenet.pth")
    done = run(
        "--checkpoint", checkpoint, "--testset", "synthetic", "--test_data_path", synthetic_root, "--out_dir", tmp_path,
        "--imagenet_weights", tmp_path / "imagenet.pth",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    maps = json.loads((tmp_path / "synthetic" / "results.json").read_text())["maps"]
    assert {"OBJ_PRIOR", "OGL", "IQR_OGL"} <= maps.keys()


def test_saved_maps_score_exactly_as_they_did(checkpoint, synthetic_root, tmp_path, run):
    torch.save(resnet18().state_dict(), tmp_path / "imagenet.pth")
    where = ("--testset", "synthetic_interactive", "--test_data_path", synthetic_root)
    done = run(
        "--checkpoint", checkpoint, *where, "--out_dir", tmp_path / "model", "--save_maps", "true",
        "--imagenet_weights", tmp_path / "imagenet.pth",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "model" / "synthetic_interactive"
    stored = np.load(folder / "maps.npz")
    assert stored["AUD"].shape == (20, 4, 4) and {"AUD_wrong", "IMG_QUERY", "OBJ_PRIOR", "id"} <= set(stored)
    done = run("--maps", folder / "maps.npz", *where, "--out_dir", tmp_path / "file", "--batch_size", "3")
    assert done.returncode == 0, done.stderr
    own, again = (
        json.loads((tmp_path / side / "synthetic_interactive" / "results.json").read_text())
        for side in ("model", "file")
    )
    for key in ("maps", "intervals", "references", "by_class", "by_size"):
        assert own[key] == again[key], key
    again = run("--maps", folder / "maps.npz", *where, "--out_dir", tmp_path / "model")  # into the folder it lies in
    assert again.returncode == 0 and (folder / "maps.npz").is_file()
    run("--checkpoint", checkpoint, *where, "--out_dir", tmp_path / "model", "--imagenet_weights", "none")
    assert not (folder / "maps.npz").exists()  # maps of other settings do not stay beside new figures
    assert "confidence_map" in (tmp_path / "file" / "synthetic_interactive" / "per_sample.csv").read_text()


def test_the_tested_size_is_apart_from_the_trained_one_and_recorded(checkpoint, synthetic_root, tmp_path, run):
    """checkpoint: of 64 px, whose tokens have 16."""
    where = ("--checkpoint", checkpoint, "--testset", "synthetic", "--test_data_path", synthetic_root)
    where += ("--imagenet_weights", "none", "--save_maps")
    for name, flags, side in [("own", (), 4), ("larger", ("--infer_image_size", "128"), 8)]:
        done = run(*where, *flags, "--out_dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / name / "synthetic"
        assert json.loads((folder / "results.json").read_text())["settings"]["infer_image_size"] == 16 * side
        assert np.load(folder / "maps.npz")["AUD"].shape == (20, side, side)
    compared = run("--compare", *(tmp_path / name / "synthetic" / "results.json" for name in ("own", "larger")))
    assert "NOTE infer_image_size: 64" in compared.stdout and "128" in compared.stdout
    done = run("--checkpoint", checkpoint, "--testset", "synthetic", "--infer_image_size", "15")
    assert done.returncode == 2 and "at least 16" in done.stderr


def test_the_page_and_the_diagnosis_are_written_for_a_model_and_the_page_for_stored_maps(
    checkpoint, synthetic_root, tmp_path, run
):
    where = ("--testset", "synthetic", "--test_data_path", synthetic_root, "--report", "true")
    done = run(
        "--checkpoint", checkpoint, *where, "--out_dir", tmp_path / "model", "--diagnose", "true",
        "--save_maps", "true", "--imagenet_weights", "none",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "model" / "synthetic"
    assert "test_000003" in (folder / "report.html").read_text() and (folder / "report_files" / "00019.jpg").is_file()
    assert len(list((folder / "diagnosis").iterdir())) == 6
    done = run("--maps", folder / "maps.npz", *where, "--out_dir", tmp_path / "file")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file" / "synthetic" / "report.html").is_file()


def test_real_pairs_are_scored_and_drawn(checkpoint, tmp_path, run):
    clips = shared_folder("clips")
    done = run(
        "--checkpoint", checkpoint, "--testset", "custom", "--test_data_path", clips, "--test_list", clips / "test.csv",
        "--test_gt_path", clips / "annotations.json", "--out_dir", tmp_path, "--save_overlays", "true",
        "--imagenet_weights", "none",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "custom" / "results.json").read_text())
    assert results["pairs"]["scored"] == 9
    assert len(list((tmp_path / "custom" / "samples").glob("farm_*.png"))) == 9


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--testset", "nonsense"], "unknown test set nonsense"),
        (["--testset", "synthetic", "--test_data_path", "absent"], "absent does not exist"),
        (["--testset", "custom", "--test_data_path", "."], "needs --test_gt_path"),
        (["--alpha", "1.5"], "1.5"),
        (["--alpha", "nan"], "nan"),
        (["--save_visualizations", "maybe"], "maybe"),
        (["--batch_size", "0"], "batch_size"),
        (["--checkpoint", "absent.pth"], "absent.pth"),
        (["--checkpoint", "best"], "--experiment_name"),
        (["--gpu", "x"], "--gpu"),
        (["--imagenet_weights", "absent.pth", "--testset", "synthetic"], "absent.pth"),
        (["--alph", "0.5"], "unrecognized"),
        (["--out_dir", "Makefile"], "Makefile"),
        (["--checkpoint", "README.md"], "README.md"),
        (["--maps", "m.npz", "--alpha", "0", "--infer_smoothing", "0"], "--alpha, --infer_smoothing"),
    ],
)
def test_junk_is_one_clear_line_and_status_2(arguments, message, checkpoint, synthetic_root, tmp_path, run):
    base = ["--out_dir", tmp_path / "out", "--imagenet_weights", "none"]
    if "--checkpoint" not in arguments:
        base += ["--checkpoint", checkpoint]
    if "--test_data_path" not in arguments:
        base += ["--test_data_path", synthetic_root]
    done = run(*base, *arguments)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2
    assert message in lines[-1] and len(lines) == 1
    assert not (tmp_path / "out").exists()


def test_an_unreadable_sound_ends_with_its_name_and_writes_nothing(checkpoint, synthetic_root, tmp_path, run):
    shutil.copytree(synthetic_root, tmp_path / "data")
    (tmp_path / "data" / "audio" / "test_000004.wav").write_bytes(b"RIFF")
    done = run(
        "--checkpoint", checkpoint, "--testset", "synthetic", "--test_data_path", tmp_path / "data",
        "--out_dir", tmp_path / "out", "--imagenet_weights", "none", "--save_visualizations", "true",
        "--batch_size", "3",
    )  # fmt: skip
    assert done.returncode == 2
    assert "test_000004.wav" in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
