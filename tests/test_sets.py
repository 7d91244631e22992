"""What is in the files: broken, silent, short and repeated pairs, problems of boxes, overlap with test lists."""

import shutil

import pytest
from conftest import shared_folder

import sets
from annotations import GroundTruth, read_ids
from dataset import build_ground_truth, find_pairs
from dataset_avs import read_videos
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
        shared = sets.overlap_with_tests(read_ids(folder / f"{name}.txt"), folder)["s4" + sets.SAME_VIDEO]
        assert len({i.rpartition("_")[0] for i in shared}) == count, name
    train_ids = read_ids(folder / "vggss_144k.txt")
    for name, found in (("vggss", (3709, 3709, 75)), ("vggss_plus_silent", (8096, 3709 + 3448, 375))):
        truth = build_ground_truth(name, None, None, str(folder))
        shared = sets.trained_on(train_ids, truth, truth.ids)
        assert (shared["pairs"], shared["images"], shared["same_video"]) == found, name
    truth = avs_truth([video.name for video in read_videos(folder / "s4_meta_data.csv")])
    assert sets.trained_on(train_ids, truth, truth.ids)["pairs"] == 5 * 564


def avs_truth(videos):
    """S4's, without its files."""
    frames = {f"{video}_{number}": video for video in videos for number in range(1, 6)}
    return GroundTruth("s4", list(frames), None, len(frames), unit_of=frames)


def test_what_was_trained_on_is_counted_by_image_audio_and_video():
    trained = ["aaaaaaaaaaa_000010", "ccccccccccc_000030", "10000130166"]
    ids = ["aaaaaaaaaaa_000010", "aaaaaaaaaaa_000070", "bbbbbbbbbbb_000020", "10000130166"]
    plain = GroundTruth("vggss", ids, None, 4)
    assert sets.trained_on(trained, plain, ids) == {"pairs": 2, "images": 2, "audio": 2, "same_video": 1}
    silent = {"bbbbbbbbbbb_000020+ccccccccccc_000030": ("bbbbbbbbbbb_000020", "ccccccccccc_000030")}
    silent["ccccccccccc_000030+x"] = ("ccccccccccc_000030", "x")
    extended = GroundTruth("vggss_plus_silent", [*ids, *silent], None, 6, sources=silent)
    found = sets.trained_on(trained, extended, extended.ids)
    assert found == {"pairs": 4, "images": 3, "audio": 3, "same_video": 1}
    frames = avs_truth(["aaaaaaaaaaa", "bbbbbbbbbbb"])
    assert sets.trained_on(trained, frames, frames.ids)["pairs"] == 5


def test_every_way_to_the_overlap_follows_one_rule(tmp_path):
    (tmp_path / "vggss_heard_test.csv").write_text("aaaaaaaaaaa_000010\nbbbbbbbbbbb_000020\n")
    (tmp_path / "s4_meta_data.csv").write_text("name,start,category,split\nccccccccccc,0,dog,test\n")
    ids = ["aaaaaaaaaaa_000010", "aaaaaaaaaaa_000070", "ccccccccccc_000030", "ddddddddddd_000040"]
    found = {name: shared for name, shared in sets.overlap_with_tests(ids, tmp_path).items() if shared}
    assert found == {
        "vggss_heard": ids[:1],
        "vggss_heard (same video, perhaps another part)": ids[1:2],
        "s4 (same video, perhaps another part)": ids[2:3],
    }


def test_held_out_pairs_that_are_test_pairs_are_told_and_removed_with_the_training_pairs(damaged, tmp_path, cli):
    shutil.copy(damaged / "audio" / "a.wav", damaged / "audio" / "c.wav")
    shutil.copy(damaged / "frames" / "a.png", damaged / "frames" / "b.png")
    (damaged / "vggss_heard_test.csv").write_text("e\nf\nz\n")
    (damaged / "train.txt").write_text("a\nb\nc\nd\n")
    (damaged / "val.txt").write_text("d\ne\nf\n")
    train = (
        "--trainset", "custom", "--train_data_path", damaged, "--metadata", damaged, "--gpu", "cpu", "--num_workers", 0,
        "--arch", "small", "--recipe", "dim=16", "--image_size", 32, "--audio_seconds", 0.8, "--reciprocal_k", 1,
        "--imagenet_weights", "none", "--batch_size", 3, "--model_dir", tmp_path, "--experiment_name", "x",
        "--train_list", damaged / "train.txt", "--val_list", damaged / "val.txt", "--dry_run",
    )  # fmt: skip
    done = cli("train_slot", *train)
    assert "2 of the 2 held-out ids are test ids of vggss_heard (--exclude_test_overlap removes" in done.stdout
    assert "3 train, 3 held_out" in done.stdout, done.stderr
    done = cli("train_slot", *train, "--exclude_test_overlap")
    assert "2 of the 2 held-out ids are test ids of vggss_heard (removed)" in done.stdout
    assert "3 train, 1 held_out" in done.stdout, done.stderr


def test_an_error_that_no_pair_explains_stays_what_it_is(damaged):
    pairs, _ = find_pairs(damaged, "vggsound", None)
    with pytest.raises(UserError, match="2 of 6"), sets.count_undecodable(pairs):
        raise sets.Undecodable("b.png")
    with pytest.raises(sets.Undecodable, match="gone"), sets.count_undecodable(pairs[:1]):
        raise sets.Undecodable("gone")
