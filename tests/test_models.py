"""Loading a checkpoint of any kind: the model, what the file says of itself, and what is refused."""

import argparse
import json

import pytest
import torch

import models
from model_maxpool import MaxPoolModel
from model_slot import JointSlotModel
from utils import UserError, save_checkpoint

SMALL = {"image_encoder": "small", "dim": 16, "image_size": 64, "audio_seconds": 0.8}
KINDS = {"slots": JointSlotModel, "max pooling": MaxPoolModel}


def save(path, model, **more):
    save_checkpoint(path, {"model": model.state_dict(), "model_config": model.config} | more)
    return path


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_checkpoint_brings_back_model_and_settings_and_is_read_once(kind, tmp_path, reads):
    torch.manual_seed(0)
    own = {"mask_ratio": 0.2, "reciprocal_k": 2} if kind is JointSlotModel else {}
    model = kind(**SMALL, tau=0.05, **own).eval()
    path = save(tmp_path / "a.pth", model)
    loaded = models.load_model(path)
    assert reads == [path]
    assert type(loaded) is kind and loaded.config == model.config and not loaded.training
    inputs = torch.randn(2, 3, 64, 64), torch.randn(2, 1, 257, 81)
    assert torch.equal(loaded.localize(*inputs).audio_map, model.localize(*inputs).audio_map)


def test_what_a_file_says_of_itself_comes_with_the_model(tmp_path):
    flags = {"trainset": "vggss_10k", "infer_sharpening": 0.02, "infer_smoothing": None}
    known = {"args": flags, "epoch": 7, "selected_by": "retrieval"}
    trained = models.load(save(tmp_path / "best.pth", JointSlotModel(**SMALL), **known))
    assert trained.about == {
        "path": str(tmp_path / "best.pth"),
        "epoch": 7,
        "selected_by": "retrieval",
        "trained_on": "vggss_10k",
        "training": flags,
    }
    assert trained.inference == {"infer_sharpening": 0.02, "infer_smoothing": 0.0}


@pytest.mark.parametrize(
    "state, said",
    [
        ({"chosen": 7}, "retrieval"),
        ({"chosen": 5}, "nothing: the last epoch trained when it was written"),
        ({"chosen": 7, "step": 3}, "nothing: the state after 3 steps of epoch 8"),
        ({"chosen": 7, "step": 3, "failed": True}, "nothing: the state before step 4 of epoch 8, which failed"),
        ({"best": 0.9, "lines": [{"score": 0.9}, {"score": 0.8}]}, "nothing: the last epoch trained when it was"),
        ({"best": 0.9, "lines": [{"score": 0.8}, {"score": 0.9}]}, "retrieval"),  # of older code
        ({}, "retrieval"),  # older code, without what only resuming needs
    ],
)
@pytest.mark.parametrize("name", ["best", "latest", "epoch_0007", "copied"])
def test_a_file_says_how_it_came_about_whatever_its_name(state, said, name, tmp_path):
    held = {"epoch": 7, "selected_by": "retrieval"} | state
    assert models.describe_checkpoint(tmp_path / f"{name}.pth", held)["selected_by"].startswith(said)


def test_the_objective_is_that_of_the_file_and_an_unknown_one_is_named(tmp_path):
    assert "objective" not in JointSlotModel(**SMALL).config  # as in every checkpoint so far
    pooled = MaxPoolModel(**SMALL)
    assert pooled.config["objective"] == "maxpool"
    old = {"model": pooled.state_dict(), "model_config": pooled.config | {"objective": "maxpool_contrastive"}}
    save_checkpoint(tmp_path / "old.pth", old)
    assert isinstance(models.load_model(tmp_path / "old.pth"), MaxPoolModel)
    save_checkpoint(tmp_path / "a.pth", {"model": {}, "model_config": SMALL | {"objective": "none"}})
    with pytest.raises(UserError, match=r"objective 'none'.* paper, maxpool"):
        models.load(tmp_path / "a.pth")


def test_a_released_checkpoint_takes_the_settings_beside_it_or_the_defaults_aloud(tmp_path, capsys):
    torch.save({"model": JointSlotModel().state_dict(), "epoch": 3}, tmp_path / "released.pth")
    assert models.load_model(tmp_path / "released.pth").config == JointSlotModel().config
    assert "defaults" in capsys.readouterr().out
    weights = {f"module.{key}": value for key, value in JointSlotModel(**SMALL).state_dict().items()}
    torch.save({"model": weights}, tmp_path / "released.pth")
    (tmp_path / "configs.json").write_text(json.dumps(SMALL | {"gpu": 7}))
    trained = models.load(tmp_path / "released.pth")
    assert trained.model.config == JointSlotModel(**SMALL).config
    assert "configs.json" in capsys.readouterr().out
    assert trained.about["training"] == {} and trained.about["epoch"] == "unknown"
    assert trained.inference == {"infer_sharpening": 0.1, "infer_smoothing": 0.0}


def test_weights_that_do_not_fit_are_all_listed(tmp_path):
    weights = JointSlotModel(**SMALL).state_dict()
    weights["slot_attn.slots"] = torch.zeros(1, 5, 16)
    del weights["imgnet.conv1.weight"]
    weights["stranger"] = torch.zeros(1)
    torch.save({"model": weights, "model_config": JointSlotModel(**SMALL).config}, tmp_path / "a.pth")
    with pytest.raises(UserError) as caught:
        models.load(tmp_path / "a.pth")
    for piece in ("a.pth", "1 missing: imgnet.conv1.weight", "1 unexpected: stranger", "slot_attn.slots (1, 5, 16)"):
        assert piece in str(caught.value)


@pytest.mark.parametrize(
    "config, message",
    [({"arch": "none"}, "build no model"), ({"stranger": 1}, "build no model"), ([1], "not a dict")],
    ids=["unknown recipe", "unknown setting", "not a dict"],
)
def test_settings_that_build_no_model_are_refused_with_the_file(config, message, tmp_path):
    torch.save({"model": {}, "model_config": config}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=rf"a\.pth.*{message}"):
        models.load(tmp_path / "a.pth")


def test_a_checkpoint_that_runs_code_or_is_broken_is_refused(tmp_path):
    torch.save({"model": {}, "args": argparse.Namespace(a=1)}, tmp_path / "code.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut")
    for name in ("code.pth", "cut.pth", "absent.pth"):
        with pytest.raises(UserError, match=name):
            models.load(tmp_path / name)
