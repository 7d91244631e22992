"""What is in the files: broken, silent, short and repeated pairs, problems of boxes, overlap with test lists."""

import shutil

import pytest
from conftest import shared_folder

import sets
from annotations import read_ids
from dataset import find_pairs
from model_slot import JointSlotModel
from utils import UserError, save_checkpoint


@pytest.mark.parametrize("workers", [0, 2])
def test_every_pair_is_decoded_and_told_apart(damaged, workers):
    pairs, _ = find_pairs(damaged, "vggsound", None)
    facts = dict(zip("abcdef", sets.inspect_pairs(pairs, workers), strict=True))
    assert "b.png" in facts["b"].error and "c.wav" in facts["c"].error and not facts["a"].error
    assert [i for i in "abcdef" if facts[i].silent] == ["d"]
    assert facts["e"].seconds == 1 and facts["a"].digest == facts["f"].digest != facts["e"].digest
    assert list(sets.undecodable(pairs, workers)) == ["b", "c"]


@pytest.fixture
def checkpoint(tmp_path):
    model = JointSlotModel("small", 16, image_size=64, audio_seconds=0.8)
    save_checkpoint(tmp_path / "m.pth", {"model": model.state_dict(), "model_config": model.config})
    return tmp_path / "m.pth"


def test_broken_pairs_stop_a_test_with_their_count_and_are_counted_when_allowed(damaged, checkpoint, tmp_path, cli):
    test = (
        "--checkpoint", checkpoint, "--gpu", "cpu", "--num_workers", 0, "--imagenet_weights", "none", "--testset",
        "custom", "--test_data_path", damaged, "--test_gt_path", damaged / "boxes.json", "--out_dir", tmp_path / "out",
    )  # fmt: skip
    (damaged / "ids.txt").write_text("\n".join("abcdef"))
    done = cli("test_model", *test, "--test_list", damaged / "ids.txt")
    assert done.returncode == 2 and "2 of 6 pairs cannot be decoded: b, c" in done.stderr.splitlines()[-1]
    done = cli("test_model", *test, "--allow_missing", "true")
    assert done.returncode == 0, done.stderr
    assert "4 of 7 pairs scored" in done.stdout
    assert (tmp_path / "out" / "custom" / "left_out.txt").read_text().split() == ["g", "b", "c"]


def test_broken_pairs_stop_a_training_with_their_count_and_are_left_out_when_allowed(damaged, tmp_path, cli):
    train = (
        "--trainset", "custom", "--train_data_path", damaged, "--gpu", "cpu", "--num_workers", 0, "--arch", "small",
        "--recipe", "dim=16", "--image_size", 32, "--audio_seconds", 0.8, "--imagenet_weights", "none",
        "--batch_size", 4, "--epochs", 1, "--reciprocal_k", 1, "--val_fraction", 0, "--model_dir", tmp_path,
        "--experiment_name", "run",
    )  # fmt: skip
    done = cli("train_slot", *train)
    assert done.returncode == 2 and "2 of 6 pairs cannot be decoded: b, c" in done.stderr.splitlines()[-1]
    done = cli("train_slot", *train, "--allow_missing", "true", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert "6 expected, 2 left out, 4 train" in done.stdout
    assert read_ids(tmp_path / "run" / "train_ids.txt") == list("adef")
    assert [line.split("\t")[0] for line in (tmp_path / "run" / "left_out.txt").read_text().splitlines()] == ["b", "c"]


def test_the_overlap_with_test_lists_is_told_and_removed_on_request(damaged, tmp_path, cli):
    shutil.copy(damaged / "audio" / "a.wav", damaged / "audio" / "c.wav")
    shutil.copy(damaged / "frames" / "a.png", damaged / "frames" / "b.png")
    (damaged / "vggss_heard_test.csv").write_text("a\nd\nz\n")
    train = (
        "--trainset", "custom", "--train_data_path", damaged, "--metadata", damaged, "--gpu", "cpu", "--num_workers", 0,
        "--arch", "small", "--recipe", "dim=16", "--image_size", 32, "--audio_seconds", 0.8,
        "--imagenet_weights", "none", "--batch_size", 4, "--epochs", 1, "--reciprocal_k", 1, "--val_fraction", 0,
        "--model_dir", tmp_path,
    )  # fmt: skip
    done = cli("train_slot", *train, "--experiment_name", "with")
    assert "2 of the 6 training ids are test ids of vggss_heard (--exclude_test_overlap removes" in done.stdout
    assert len(read_ids(tmp_path / "with" / "train_ids.txt")) == 6
    done = cli("train_slot", *train, "--experiment_name", "without", "--exclude_test_overlap")
    assert done.returncode == 0, done.stderr
    assert read_ids(tmp_path / "without" / "train_ids.txt") == list("bcef")


@pytest.mark.slow
def test_the_overlaps_of_the_public_lists_are_the_known_ones():
    folder = shared_folder("metadata")
    for name, tested, count in (
        ("vggss_10k", "vggss", 238), ("vggss_144k", "vggss", 3709), ("vggss_heard", "vggss", 0),
        ("flickr_10k", "flickr", 1), ("flickr_144k", "flickr", 20),
    ):  # fmt: skip
        assert len(sets.overlap_with_tests(read_ids(folder / f"{name}.txt"), folder)[tested]) == count, name
    for name, count in (("vggss_10k", 38), ("vggss_144k", 564), ("vggss_heard", 372)):
        shared = sets.overlap_with_tests(read_ids(folder / f"{name}.txt"), folder)[sets.SAME_VIDEO]
        assert len({i.rpartition("_")[0] for i in shared}) == count, name


def test_an_error_that_no_pair_explains_stays_what_it_is(damaged):
    pairs, _ = find_pairs(damaged, "vggsound", None)
    with pytest.raises(UserError, match="2 of 6"), sets.count_undecodable(pairs):
        raise sets.Undecodable("b.png")
    with pytest.raises(sets.Undecodable, match="gone"), sets.count_undecodable(pairs[:1]):
        raise sets.Undecodable("gone")
