"""The universal threshold: what it is, where it is stored, and the command that gives it to old checkpoints."""

import shutil

import numpy as np
import pytest
import torch

import scoring.threshold as threshold
from dataset import TrainingPairs, select_training_pairs
from model_maxpool import MaxPoolModel
from models import load
from scoring.negative_audio import WithNegativeAudio, silence
from utils import UserError, load_checkpoint, save_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pairs(synthetic_root):
    return select_training_pairs("synthetic", str(synthetic_root), "").pairs[:13]


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    torch.manual_seed(0)
    model = MaxPoolModel("small", 16, image_size=64, audio_seconds=0.8)
    path = tmp_path_factory.mktemp("pooled") / "pooled.pth"
    save_checkpoint(path, {"model": model.state_dict(), "model_config": model.config})
    return path


@pytest.mark.parametrize("kind", ["checkpoint", "pooled"])
def test_it_is_the_third_quartile_of_the_maxima_by_hand(kind, request, pairs):
    """3 N largest values: every image with silence, its noise and its off-screen audio, enlarged bilinearly."""
    model = load(request.getfixturevalue(kind)).model
    chosen = threshold.universal_threshold(model, pairs, CPU, "some", batch_size=5, seed=4)
    asked, largest = WithNegativeAudio(TrainingPairs(pairs, 64, 0.8, "none"), seed=4), []
    for sample, noise, offscreen in (asked[i] for i in range(len(pairs))):
        for audio in (silence(0.8), noise, offscreen):
            share = model.localize(sample.image[None], audio[None]).share[:, None]
            big = torch.nn.functional.interpolate(share, (224, 224), mode="bilinear", align_corners=True)
            largest.append(big.max().item())
    assert chosen["value"] == pytest.approx(np.quantile(largest, 0.75), abs=1e-5)
    by_kind = np.quantile(np.reshape(largest, (-1, 3)), 0.75, axis=0)
    assert chosen["quartiles"] == pytest.approx(dict(zip(("silence", "noise", "offscreen"), by_kind)), abs=1e-5)
    assert chosen["pairs"] == 13 and chosen["pairs_from"] == "some" and "not known" in chosen["offscreen"]


def test_neither_batches_nor_the_order_of_pairs_change_it_and_the_model_stays(checkpoint, pairs):
    model = load(checkpoint).model.train()
    state = torch.get_rng_state()
    one = threshold.universal_threshold(model, pairs, CPU, "")
    other = threshold.universal_threshold(model, pairs[::-1], CPU, "", batch_size=3)
    assert other["value"] == pytest.approx(one["value"], abs=1e-5)
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_of_many_pairs_a_seeded_part_is_taken(checkpoint, pairs, monkeypatch):
    monkeypatch.setattr(threshold, "MOST_PAIRS", 4)
    assert threshold.universal_threshold(load(checkpoint).model, pairs, CPU, "")["pairs"] == 4


def test_a_map_that_is_not_finite_gives_no_threshold(checkpoint, pairs):
    model = load(checkpoint).model
    model.slot_attn.slots.data.fill_(np.nan)
    with pytest.raises(UserError, match="not finite"):
        threshold.universal_threshold(model, pairs, CPU, "")


def test_the_command_writes_it_into_an_old_checkpoint_and_load_keeps_it(checkpoint, synthetic_root, cli, tmp_path):
    old = tmp_path / "old.pth"
    shutil.copy(checkpoint, old)
    assert load(old).threshold is None and "threshold" not in load(old).about
    flags = ["--list", synthetic_root / "val.txt", "--gpu", "cpu", "--num_workers", 0]
    done = cli("scoring.threshold", old, synthetic_root, *flags, "--out", tmp_path / "new.pth")
    assert done.returncode == 0, done.stderr
    assert load(old).threshold is None
    trained = load(tmp_path / "new.pth")
    assert f"universal threshold {trained.threshold:.4f}" in done.stdout
    assert trained.about["threshold"]["value"] == trained.threshold and trained.about["threshold"]["pairs"] == 10
    before, after = load_checkpoint(old), load_checkpoint(tmp_path / "new.pth")
    assert after.keys() - before.keys() == {"threshold"}
    assert all(torch.equal(after["model"][name], value) for name, value in before["model"].items())
    assert cli("scoring.threshold", old, synthetic_root, *flags).returncode == 0
    assert load(old).threshold == trained.threshold


def test_classes_beside_the_pairs_choose_the_offscreen_audio(checkpoint, damaged, cli, tmp_path):
    (damaged / "classes.csv").write_text("id,class,split\n" + "".join(f"{i},{i},train\n" for i in "abcdef"))
    flags = ["--gpu", "cpu", "--num_workers", 0, "--out", tmp_path / "new.pth"]
    refused = cli("scoring.threshold", checkpoint, damaged, *flags)
    assert refused.returncode == 2 and "2 of 6 pairs cannot be decoded" in refused.stderr
    done = cli("scoring.threshold", checkpoint, damaged, *flags, "--allow_missing")
    assert done.returncode == 0 and "left out: 2 pairs cannot be decoded" in done.stdout
    assert load(tmp_path / "new.pth").about["threshold"]["offscreen"] == "audio of another class"


def test_bad_input_is_one_line(checkpoint, cli, tmp_path):
    (tmp_path / "frames").mkdir()
    for folder, message in ((tmp_path / "absent", "no folder of pairs"), (tmp_path, "holds no pairs")):
        done = cli("scoring.threshold", checkpoint, folder, "--gpu", "cpu")
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    save_checkpoint(tmp_path / "odd.pth", load_checkpoint(checkpoint) | {"threshold": "high"})
    with pytest.raises(UserError, match="no record"):
        load(tmp_path / "odd.pth")
