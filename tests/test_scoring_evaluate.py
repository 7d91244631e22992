"""Scoring: one path for training and testing, result files, the command line of test_model.py."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import shared_folder
from torchvision.models import resnet18

import scoring.evaluate as evaluation
from dataset import EvaluationPairs, build_test_set
from maps import smooth_maps
from model_slot import JointSlotModel
from utils import save_checkpoint

SIZES = {"image_size": 64, "audio_seconds": 0.8}
SMALL = {"arch": "small", "dim": 16, **SIZES}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = JointSlotModel(**SMALL)
    path = tmp_path_factory.mktemp("model") / "untrained.pth"
    save_checkpoint(
        path, {"model": model.state_dict(), "model_config": model.config, "epoch": 0, "selected_by": "nothing"}
    )
    return path


@pytest.fixture
def run(cli):
    return lambda *arguments: cli("test_model", "--gpu", "cpu", "--num_workers", "0", *arguments)


def build(synthetic_root, name="synthetic"):
    return build_test_set(name, str(synthetic_root), None, "", **SIZES)


def test_evaluation_leaves_weights_buffers_mode_and_random_state_untouched(checkpoint, synthetic_root):
    model = JointSlotModel.from_checkpoint(checkpoint).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    evaluation.evaluate(model, build(synthetic_root), torch.device("cpu"))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_batch_size_changes_no_figure(checkpoint, synthetic_root):
    model = JointSlotModel.from_checkpoint(checkpoint)
    one, other = (
        evaluation.evaluate(model, build(synthetic_root), torch.device("cpu"), batch_size=size).results["maps"]
        for size in (3, 64)
    )
    for name, figures in one.items():
        assert figures == pytest.approx(other[name], abs=1e-3, nan_ok=True), name


def test_figures_are_those_of_the_maps_that_localize_gives(checkpoint, synthetic_root):
    """The whole path once more, by hand: localize, enlarge, threshold, intersect."""
    model, dataset = JointSlotModel.from_checkpoint(checkpoint), build(synthetic_root)
    scored = evaluation.evaluate(model, dataset, torch.device("cpu"))
    for i in (0, 3):
        sample = dataset[i]
        maps = model.localize(sample.image[None], sample.spectrogram[None])
        big = torch.nn.functional.interpolate(maps.audio_map[:, None], (224, 224), mode="bicubic")[0, 0]
        region = (big - big.min()) / (big.max() - big.min()) >= 0.6
        union = sample.truth.sum() + (region & (sample.truth == 0)).sum()
        assert scored.rows[i]["AUD_iou"] == pytest.approx(((region * sample.truth).sum() / union).item(), abs=1e-3)
        assert scored.rows[i]["id"] == sample.id


def test_the_models_own_maps_are_smoothed_and_nothing_else(checkpoint, synthetic_root):
    model, sample = JointSlotModel.from_checkpoint(checkpoint), build(synthetic_root)[0]
    pair = sample.image[None], sample.spectrogram[None], -sample.spectrogram[None]
    with torch.no_grad():
        raw, smooth = (evaluation.localize_batch(model, *pair, 0.1, s, lambda image: image[:, 0]) for s in (0.0, 0.1))
    for name, values in raw.raw.items():
        expected = values if name == "OBJ_PRIOR" else smooth_maps(values, 0.1)
        assert torch.equal(smooth.raw[name], expected), name
    assert raw.raw.keys() == {"AUD", "AUD_wrong", "IMG_QUERY", "OBJ_PRIOR"}
    assert all(torch.equal(smooth.scalars[name], values) for name, values in raw.scalars.items())
    assert torch.equal(raw.audio_embedding, smooth.audio_embedding)


def test_wrong_sounds_are_of_another_class_whatever_the_order_of_the_list(synthetic_root):
    dataset = build(synthetic_root)
    paired = evaluation.WithWrongAudio(dataset, seed=0)
    assert sorted(paired.partner) == list(range(len(dataset)))
    assert all(dataset.class_names[i] != dataset.class_names[j] for i, j in enumerate(paired.partner))
    assert torch.equal(paired[2][1], dataset.spectrogram(int(paired.partner[2])))
    other = EvaluationPairs(dataset.pairs[::-1], dataset.ground_truth, [], **SIZES)
    partner = evaluation.WithWrongAudio(other, seed=0).partner
    assert other.pairs[partner[-1]] == dataset.pairs[paired.partner[0]]


def test_the_command_writes_results_rows_and_pictures(checkpoint, synthetic_root, tmp_path, run):
    names = "synthetic,synthetic_interactive"
    done = run(
        "--checkpoint", checkpoint, "--testset", names, "--test_data_path", synthetic_root, "--out_dir", tmp_path,
        "--save_visualizations", "true", "--imagenet_weights", "none", "--alpha", "0.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
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
    assert len(list((tmp_path / "synthetic" / "samples").glob("*.png"))) == 20
    assert "listening" in done.stdout and "ceiling" in done.stdout


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
        "--test_gt_path", clips / "annotations.json", "--out_dir", tmp_path, "--save_visualizations", "true",
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
