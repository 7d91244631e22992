"""The reference without slots: its loss, and that it goes through all that the joint-slot model goes through."""

import json
import math

import numpy as np
import pytest
import torch
from processes import gradients, max_pool
from test_training_step import assert_same
from torchvision.models import resnet18

import models
from dataset import build_test_set
from model_maxpool import MaxPoolModel, max_pool_contrast_loss, max_pool_scores
from reports.diagnose import diagnose
from scoring.evaluate import embed_set
from utils import UserError, load_checkpoint

SIZES = {"image_size": 64, "audio_seconds": 0.8}
SMALL = {"image_encoder": "small", "dim": 16, **SIZES}
CPU = torch.device("cpu")
OBJECTIVE = "maxpool"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MaxPoolModel(**SMALL)


@pytest.fixture(scope="module")
def trained(synthetic_root, tmp_path_factory, train):
    """One epoch on 70 pairs, in parts of the batch, chosen by the test set."""
    folder = tmp_path_factory.mktemp("checkpoints")
    done = train(
        synthetic_root, folder, "--objective", OBJECTIVE, "--testset", "synthetic", "--select", "test",
        "--micro_batch", "6", "--epochs", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "run", done


def pairs(count):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 64, 64, generator=generator), torch.randn(count, 1, 257, 81, generator=generator)


# ---------------------------------------------------------------- the loss


def test_the_loss_by_hand():
    """Two pictures of two tokens in the plane: scores [[1, 0.6], [0, 0.8]]."""
    tokens = torch.tensor([[[1.0, 0.0], [0.0, -1.0]], [[0.0, 1.0], [-1.0, 0.0]]])
    sounds = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    assert max_pool_scores(tokens, sounds).flatten().tolist() == pytest.approx([1, 0.6, 0, 0.8])

    def entropy(right, wrong):
        return math.log(1 + math.exp((wrong - right) / 0.5))

    by_picture = (entropy(1, 0.6) + entropy(0.8, 0)) / 2
    by_sound = (entropy(1, 0) + entropy(0.8, 0.6)) / 2
    assert max_pool_contrast_loss(tokens, sounds, 0.5).item() == pytest.approx(by_picture + by_sound)


def test_the_order_of_the_pairs_does_not_count_but_the_pairing_does(model):
    image, spectrogram = pairs(5)
    model.eval()
    order = torch.tensor([3, 0, 4, 1, 2])
    loss = model(image, spectrogram)["info_nce"].item()
    assert model(image[order], spectrogram[order])["info_nce"].item() == pytest.approx(loss, rel=1e-5)
    assert abs(model(image[order], spectrogram)["info_nce"].item() - loss) > 1e-3


def test_the_loss_reaches_every_weight_of_both_encoders(model):
    model(*pairs(4))["info_nce"].backward()
    assert all(p.grad is not None for p in model.parameters())
    for encoder in (model.imgnet, model.audnet):
        assert next(encoder.proj.parameters()).grad.abs().max() > 1e-4


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_parts_of_a_batch_give_the_gradients_of_the_whole(micro_batch):
    losses, found = gradients(make=max_pool)
    fewer, _ = gradients(pairs=5, make=max_pool)
    assert losses.keys() == {"info_nce"} and abs(losses["info_nce"] - fewer["info_nce"]) > 1e-3
    assert_same(gradients(micro_batch, make=max_pool), (losses, found))


# ---------------------------------------------------------------- maps


def test_map_confidence_and_retrieval_agree_with_the_score_of_training(model):
    model.eval()
    image, spectrogram = pairs(3)
    tokens, sounds = model.embed(image, spectrogram)
    assert torch.allclose(tokens.norm(dim=2), torch.ones(3, 16)) and torch.allclose(sounds.norm(dim=1), torch.ones(3))
    found = model.localize(image, spectrogram)
    assert found.audio_map.shape == (3, 4, 4) and found.image_map is None
    assert found.audio_map[1, 2, 3].item() == pytest.approx((tokens[1, 2 * 4 + 3] @ sounds[1]).item(), abs=1e-6)
    scores = max_pool_scores(tokens, sounds).diagonal()
    assert torch.allclose(found.audio_map.flatten(1).amax(1), scores, atol=1e-6)
    assert torch.allclose(model.confidences(tokens, sounds)["confidence"], scores, atol=1e-6)
    longer = model.attend_audio(torch.cat([spectrogram, spectrogram], 3))
    assert longer.shape == (3, 16)  # one vector, however long the sound


# ---------------------------------------------------------------- through the scripts


def test_a_training_run_is_scored_by_the_map_that_there_is(trained):
    folder, done = trained
    line = json.loads((folder / "log.jsonl").read_text())
    assert line["loss"] == pytest.approx(line["info_nce"], rel=1e-5)
    assert not {"reconstruction", "slot_divergence", "synthetic/IQR/cIoU"} & line.keys()
    assert {"synthetic/AUD/cIoU", "synthetic/AUD/listening", "val/retrieval_score"} <= line.keys()
    state = load_checkpoint(folder / "best.pth")
    assert state["selected_by"] == "cIoU of AUD on test set synthetic" in done.stdout
    assert state["best"] == line["synthetic/AUD/cIoU"]
    assert state["model_config"]["objective"] == OBJECTIVE
    assert (folder / "curves.png").stat().st_size > 0


def test_a_resumed_run_ends_with_the_weights_of_one_in_one_go_and_takes_no_other_objective(
    synthetic_root, tmp_path, train
):
    own = "--objective", OBJECTIVE
    assert train(synthetic_root, tmp_path / "whole", *own).returncode == 0
    assert train(synthetic_root, tmp_path, *own, "--epochs", "1").returncode == 0
    done = train(synthetic_root, tmp_path, "--resume")
    assert done.returncode == 2 and f"--objective {OBJECTIVE} -> paper" in done.stderr
    done = train(synthetic_root, tmp_path, "--resume", "force")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert train(synthetic_root, tmp_path, *own, "--resume").returncode == 0
    whole, halves = (load_checkpoint(tmp_path / folder / "latest.pth")["model"] for folder in ("whole/run", "run"))
    assert all(torch.equal(halves[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--weights", "silence=1", "share_contrast=1"], "--weights silence, --weights share_contrast"),
        (["--reciprocal_k", "3"], "--reciprocal_k"),
    ],
)
def test_losses_that_would_be_ignored_are_refused_and_flags_of_recipes_are_not(
    flags, named, synthetic_root, tmp_path, train
):
    done = train(synthetic_root, tmp_path, "--objective", OBJECTIVE, *flags)
    assert done.returncode == 2 and f"{named}: --objective {OBJECTIVE} would ignore" in done.stderr
    recipe = ["--iterations", "3", "--reciprocal_k", "0", "--num_slots", "1", "--lam3", "0", "--dry_run"]
    done = train(synthetic_root, tmp_path, "--objective", OBJECTIVE, *recipe)
    assert done.returncode == 0, done.stderr


def test_it_is_tested_drawn_kept_and_compared_by_aud_alone(trained, synthetic_root, tmp_path, cli):
    torch.save(resnet18().state_dict(), tmp_path / "imagenet.pth")
    where = "--testset", "synthetic_offscreen", "--test_data_path", synthetic_root, "--gpu", "cpu", "--num_workers", "0"
    test = "test_model", "--checkpoint", trained[0] / "best.pth", *where
    done = cli(
        *test, "--out_dir", tmp_path / "model", "--imagenet_weights", tmp_path / "imagenet.pth", "--save_maps", "true",
        "--save_visualizations", "true", "--report", "true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "model" / "synthetic_offscreen"
    own = json.loads((folder / "results.json").read_text())
    assert own["maps"].keys() == {"AUD", "AUD_wrong", "AUD_share", "OBJ_PRIOR", "OGL"}
    assert "presence_AP" in own["maps"]["AUD"]
    assert (folder / "contact_sheet.png").is_file() and (folder / "report.html").is_file()
    assert set(np.load(folder / "maps.npz")) >= {"AUD", "AUD_wrong", "OBJ_PRIOR", "confidence"}
    done = cli("test_model", "--maps", folder / "maps.npz", *where, "--out_dir", tmp_path / "file")
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "file" / "synthetic_offscreen" / "results.json").read_text())
    assert again["maps"] == own["maps"]
    asked = "--negatives", "silence,noise,offscreen"  # as the page does
    done = cli(*test, "--out_dir", tmp_path / "plain", "--imagenet_weights", "none", "--infer_sharpening", "7", *asked)
    plain = json.loads((tmp_path / "plain" / "synthetic_offscreen" / "results.json").read_text())["maps"]
    assert plain == {name: own["maps"][name] for name in ("AUD", "AUD_wrong", "AUD_share")}  # sharpening has no effect
    assert -1 < own["checkpoint"]["threshold"]["value"] < 1
    done = cli("test_model", "--compare", *(tmp_path.glob("*/synthetic_offscreen/results.json")))
    assert done.returncode == 0 and "AUD" in done.stdout and "IQR" not in done.stdout


def test_retrieval_takes_the_best_token(trained, synthetic_root):
    model = models.load_model(trained[0] / "best.pth")
    dataset = build_test_set("synthetic", str(synthetic_root), None, "", **SIZES)
    image, audio = embed_set(model, dataset, CPU, batch_size=7)
    assert image.shape == (20, 16, 16) and audio.shape == (20, 16)
    expected = model.eval().embed(*(torch.stack([x[i] for x in dataset]) for i in (0, 1)))
    assert torch.allclose(image, expected.image_tokens, atol=1e-5)
    assert torch.allclose(audio, expected.audio_vectors, atol=1e-5)


def test_the_diagnosis_of_slots_is_refused_before_anything_is_written(model, trained, synthetic_root, tmp_path, cli):
    with pytest.raises(UserError, match=f"--objective {OBJECTIVE} has none"):
        diagnose(model, [], CPU, tmp_path)
    done = cli(
        "test_model", "--checkpoint", trained[0] / "best.pth", "--testset", "synthetic", "--gpu", "cpu",
        "--test_data_path", synthetic_root, "--imagenet_weights", "none", "--diagnose", "true",
        "--out_dir", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 2 and "--diagnose looks at slots" in done.stderr and not (tmp_path / "out").exists()
