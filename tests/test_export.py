"""Models taken elsewhere: the safetensors file and what is wrong with others, and programs that equal the model."""

import json

import numpy as np
import pytest
import torch
from conftest import files_up_to

import export
import models
from film.localizer import Localizer
from model_maxpool import MaxPoolModel
from model_slot import JointSlotModel
from utils import UserError, is_safetensors, save_checkpoint

SMALL = {"image_encoder": "small", "dim": 16, "image_size": 64, "audio_seconds": 0.8}
THRESHOLD = {"value": 0.25, "rule": "third quartile", "pairs": 3}
LISTEN = {"infer_sharpening": 0.2, "infer_smoothing": 0.1, "infer_image_size": 96, "trainset": "synthetic"}
INSTALL = "pip install -r requirements-export.txt"


def save(path, model, **more):
    save_checkpoint(path, {"model": model.state_dict(), "model_config": model.config} | more)
    return path


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """{objective: checkpoint} of untrained models; "listen" is asked at another size, sharpened and smoothed."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("kept")
    slots = JointSlotModel(**SMALL, iterations=1)
    said = {"args": LISTEN, "threshold": THRESHOLD, "epoch": 4, "selected_by": "retrieval", "chosen": 3}
    said["lines"] = [{"score": 0.5, "warning": "the slots are alike"}]
    return {
        "paper": save(folder / "paper.pth", slots),
        "listen": save(folder / "listen.pth", slots, **said),
        "maxpool": save(folder / "maxpool.pth", MaxPoolModel(**SMALL), epoch=2),
    }


def exported(cli, checkpoint, kind, out):
    done = cli("export", checkpoint, "--format", kind, "--out", out)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------- safetensors


@pytest.fixture(scope="module")
def safe():
    return pytest.importorskip("safetensors.torch", reason=f"safetensors is not installed: {INSTALL}")


@pytest.mark.parametrize("objective", ["paper", "listen", "maxpool"])
def test_a_safetensors_file_brings_back_all_that_the_checkpoint_says(safe, objective, kept, tmp_path, cli):
    out = tmp_path / "a.safetensors"
    exported(cli, kept[objective], "safetensors", out)
    before, after = models.load(kept[objective]), models.load(out)
    assert type(after.model) is type(before.model) and after.model.config == before.model.config
    assert after.inference == before.inference and after.threshold == before.threshold
    assert after.about == before.about | {"path": str(out)}
    assert after.model.infer_image_size == before.model.infer_image_size
    assert not after.model.training
    weights = before.model.state_dict()
    assert weights.keys() == after.model.state_dict().keys()
    assert all(torch.equal(value, weights[key]) for key, value in after.model.state_dict().items())


def test_the_header_says_everything_to_any_reader(safe, kept, tmp_path, cli):
    from safetensors import safe_open

    exported(cli, kept["listen"], "safetensors", tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        header = file.metadata()
    assert header.pop("format") == "pt"
    said = {name: json.loads(value) for name, value in header.items()}
    assert said["model_config"] == {"objective": "paper"} | models.load_model(kept["listen"]).config
    assert said["inference"] == {name: LISTEN[name] for name in said["inference"]} and len(said["inference"]) == 3
    assert said["threshold"] == THRESHOLD and said["training"] == LISTEN and said["epoch"] == 4
    assert said["selected_by"].startswith("nothing: the last epoch") and "revision" in said["written_by"]


def test_the_command_for_thresholds_keeps_a_safetensors_file_one(safe, kept, tmp_path, cli, synthetic_root):
    out = tmp_path / "a.safetensors"
    exported(cli, kept["maxpool"], "safetensors", out)
    done = cli("scoring.threshold", out, synthetic_root, "--gpu", "cpu", "--num_workers", 0)
    assert done.returncode == 0, done.stderr
    after = models.load(out)
    assert is_safetensors(out) and after.about["epoch"] == 2
    assert f"universal threshold {after.threshold:.4f} " in done.stdout


def spoil(path, safe, **header):
    """The file again with other entries in its header; None takes one away."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        said = file.metadata() | header
    weights = safe.load_file(path)
    safe.save_file(weights, path, metadata={name: value for name, value in said.items() if value is not None})


@pytest.mark.parametrize(
    "header, message",
    [
        ({"model_config": None}, "no model of this project: its header lacks model_config"),
        ({"inference": "{"}, "inference in its header is not JSON"),
        ({"training": "[]"}, "training in its header is"),
        ({"inference": '{"infer_sharpening": 0, "infer_smoothing": 0, "infer_image_size": 64}'}, "infer_sharpening"),
        ({"inference": '{"infer_sharpening": 1, "infer_smoothing": 0}'}, "infer_image_size"),
        ({"threshold": '{"value": "high"}'}, "threshold"),
        ({"model_config": json.dumps(SMALL)}, "lacks settings of the model: audio_encoder, iterations, mask_ratio"),
        ({"model_config": json.dumps(SMALL | {"num_slots": -1})}, "build no model"),
        ({"model_config": json.dumps(SMALL | {"stranger": 1})}, "build no model.*stranger"),
        ({"model_config": json.dumps(SMALL | {"objective": "none"})}, "objective 'none'"),
    ],
)
def test_a_header_that_lacks_something_or_holds_nonsense_is_one_line(header, message, safe, kept, tmp_path):
    out = tmp_path / "a.safetensors"
    models.write_safetensors(out, models.load(kept["listen"]))
    spoil(out, safe, **header)
    with pytest.raises(UserError, match=message) as caught:
        models.load(out)
    assert "\n" not in str(caught.value)


def test_files_that_are_cut_empty_foreign_or_of_other_weights_are_one_line(safe, kept, tmp_path, cli):
    whole = tmp_path / "whole.safetensors"
    models.write_safetensors(whole, models.load(kept["paper"]))
    content, files = whole.read_bytes(), {}
    files["cut"], files["empty"], files["text"] = content[:-50], b"", b"not weights at all"
    files["header"] = content[:40]
    for name, held in files.items():
        (tmp_path / f"{name}.safetensors").write_bytes(held)
    safe.save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    weights = safe.load_file(whole)
    del weights["imgnet.conv1.weight"]
    header = {name: json.dumps(value) for name, value in models.settings_of(models.load(kept["paper"])).items()}
    safe.save_file(weights, tmp_path / "lacking.safetensors", metadata=header)
    for name, message in dict.fromkeys(files, "not a safetensors file, or a damaged").items() | {
        ("foreign", "no model of this project"),
        ("lacking", "1 missing: imgnet.conv1.weight"),
    }:
        done = cli("export", tmp_path / f"{name}.safetensors", "--format", "torch", "--out", tmp_path / "a.pt2")
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, (name, done.stderr)
    assert not (tmp_path / "a.pt2").exists()


def test_a_safetensors_file_of_another_name_loads_and_a_checkpoint_that_is_called_one_is_refused(safe, kept, tmp_path):
    models.write_safetensors(tmp_path / "a.pth", models.load(kept["maxpool"]))
    first, second = (models.load(path).model.state_dict() for path in (tmp_path / "a.pth", kept["maxpool"]))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    (tmp_path / "b.safetensors").write_bytes(kept["maxpool"].read_bytes())
    with pytest.raises(UserError, match=r"b\.safetensors is not a safetensors file"):
        models.load(tmp_path / "b.safetensors")


# ---------------------------------------------------------------- programs


def expected_of(checkpoint, pairs):
    """By the model's own methods."""
    from maps import smooth_maps

    trained = models.load(checkpoint)
    model, sharpening = trained.model, trained.inference["infer_sharpening"]
    with torch.no_grad():
        maps = model.localize(*pairs, sharpening)
        (seen, _), heard = model.attend_image(pairs[0]), model.attend_audio(pairs[1])
        confidences = model.confidences(seen, heard, sharpening)
    presence = confidences.get("presence", confidences["confidence"])
    return smooth_maps(maps.audio_map, trained.inference["infer_smoothing"]), maps.share, presence


@torch.no_grad()
def assert_equal(run, checkpoint, size):
    torch.manual_seed(1)
    for count in (1, 2, 5):
        pairs = torch.randn(count, 3, size, size), torch.randn(count, 1, 257, 81)
        wanted = expected_of(checkpoint, pairs)
        for found, expected in zip(run(*pairs), wanted, strict=True):
            assert found.shape == expected.shape
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("objective, size", [("listen", 96), pytest.param("maxpool", 64, marks=pytest.mark.slow)])
def test_the_program_of_torch_equals_the_model_for_any_number_of_pairs(objective, size, kept, tmp_path, cli):
    said = exported(cli, kept[objective], "torch", tmp_path / "a.pt2")
    assert "from the model" in said
    more = {"settings.json": ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=more).module()
    assert_equal(program, kept[objective], size)
    assert json.loads(more["settings.json"])["inference"]["infer_image_size"] == size


@pytest.mark.parametrize("objective, size", [pytest.param("listen", 96, marks=pytest.mark.slow), ("maxpool", 64)])
def test_the_onnx_program_equals_the_model_for_any_number_of_pairs(objective, size, kept, tmp_path, cli):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: {INSTALL}")
    import onnxruntime

    exported(cli, kept[objective], "onnx", tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    assert [held.name for held in session.get_inputs()] == ["image", "spectrogram"]
    assert [held.name for held in session.get_outputs()] == ["aud", "share", "presence"]
    assert all(held.shape[0] == "batch" for held in session.get_inputs())
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["inference"])["infer_image_size"] == size
    assert_equal(lambda *pairs: session.run(None, dict(zip(export.INPUTS, (p.numpy() for p in pairs), strict=True))),
                 kept[objective], size)  # fmt: skip


def test_a_program_that_differs_from_the_model_is_not_written(kept, tmp_path):
    trained = models.load(kept["maxpool"])

    def wrong(path, trained):
        path.write_bytes(b"a program")
        own = export.Exported(trained)
        return lambda pairs: [output + 1e-4 for output in own(*pairs)]

    with pytest.raises(UserError, match=r"not written: the program differs from the model by 1\.0e-04"):
        export.write_program(tmp_path / "a.onnx", trained, wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_full_disk_is_one_line_whatever_the_format_and_keeps_the_file_before(kind, kept, tmp_path):
    if kind == "safetensors":
        pytest.importorskip("safetensors", reason=f"safetensors is not installed: {INSTALL}")
    out, trained = tmp_path / f"a{export.SUFFIXES[kind]}", models.load(kept["maxpool"])
    out.write_bytes(b"before")
    with files_up_to(4_000), pytest.raises(UserError, match=rf"{out.name} cannot be written \(File too large\)"):
        if kind == "safetensors":
            models.write_safetensors(out, trained)
        else:
            export.write_program(out, trained, export.write_torch)
    assert [path.name for path in tmp_path.iterdir()] == [out.name] and out.read_bytes() == b"before"


def test_a_model_that_pytorch_cannot_follow_is_one_line(kept, tmp_path, monkeypatch, cli):
    class Deciding(torch.nn.Module):
        def forward(self, image):
            return image[:, :1] if image.sum() > 0 else image[:, 1:2]  # depends on values: no graph

    trained = models.load(kept["maxpool"])
    monkeypatch.setattr(trained.model.imgnet, "conv1", Deciding())
    monkeypatch.setattr(export, "load", lambda path: trained)
    done = cli("export", kept["maxpool"], "--format", "torch", "--out", tmp_path / "a.pt2")
    assert done.returncode == 2 and "torch.export cannot follow this model" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "a.pt2").exists()


def test_a_name_of_another_format_or_the_checkpoint_itself_is_refused(kept, tmp_path, cli):
    for out, message in (("a.onnx", "ends in .pt2"), ("a", "ends in .pt2")):
        done = cli("export", kept["paper"], "--format", "torch", "--out", tmp_path / out)
        assert done.returncode == 2 and message in done.stderr
    done = cli("export", tmp_path / "none.pth", "--format", "torch")
    assert done.returncode == 2 and "no checkpoint file" in done.stderr


# ---------------------------------------------------------------- the size in use


def test_films_are_seen_at_the_size_that_the_checkpoint_is_tested_with(kept):
    image, sound = np.zeros((50, 80, 3), np.uint8), np.zeros(16000, np.float32)
    sides = {name: Localizer(kept[name]).image(image, sound).share.shape for name in ("paper", "listen")}
    model = models.load_model(kept["paper"])
    assert sides == {name: (model.imgnet.tokens_along(size),) * 2 for name, size in (("paper", 64), ("listen", 96))}
    assert sides["paper"] != sides["listen"]
