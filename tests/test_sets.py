"""What is in the files: broken, silent, short and repeated pairs, problems of boxes, overlap with test lists."""

import json
import shutil

import numpy as np
import pytest
import soundfile
from conftest import shared_folder
from PIL import Image

import inspection
from annotations import read_ids
from dataset import TEST_SETS, find_pairs
from model_slot import JointSlotModel
from utils import UserError, save_checkpoint


@pytest.fixture
def root(tmp_path):
    """Six pairs: whole, a broken picture, a broken sound, silence, 1 s of sound, a copy of the first."""
    rng = np.random.default_rng(0)
    for folder in ("frames", "audio"):
        (tmp_path / folder).mkdir()
    for name in "abcdef":
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(tmp_path / "frames" / f"{name}.png")
        length = 16000 if name == "e" else 80000
        wave = np.zeros(length) if name == "d" else rng.uniform(-0.5, 0.5, length)
        soundfile.write(tmp_path / "audio" / f"{name}.wav", wave, 16000)
    (tmp_path / "frames" / "b.png").write_bytes(b"")
    (tmp_path / "audio" / "c.wav").write_bytes(b"RIFF")
    with Image.open(tmp_path / "frames" / "a.png") as picture:
        picture.save(tmp_path / "frames" / "f.png", compress_level=1)  # the same picture in another file
    shutil.copy(tmp_path / "audio" / "a.wav", tmp_path / "audio" / "f.wav")
    boxes = [{"file": i, "class": "x", "bbox": [[0.1, 0.1, 0.5, 0.5]]} for i in "abcdefg"]
    boxes[1]["bbox"] = [[-2.9e16, 0, 0.5, 1], [0.5, 0.5, 0.5, 0.9]]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_every_pair_is_decoded_and_told_apart(root, workers):
    pairs, _ = find_pairs(root, "vggsound", None)
    facts = dict(zip("abcdef", inspection.inspect_pairs(pairs, workers), strict=True))
    assert "b.png" in facts["b"].error and "c.wav" in facts["c"].error and not facts["a"].error
    assert [i for i in "abcdef" if facts[i].silent] == ["d"]
    assert facts["e"].seconds == 1 and facts["a"].digest == facts["f"].digest != facts["e"].digest
    assert list(inspection.undecodable(pairs, workers)) == ["b", "c"]


def test_the_check_prints_one_table_of_all_that_is_wrong(root, cli):
    flags = ("--test_data_path", root, "--test_gt_path", root / "boxes.json", "--workers", 0)
    done = cli("prepare_data", "check", "--testset", "custom", *flags)
    assert done.returncode == 1 and "not complete" in done.stdout, done.stderr
    counts = {
        "expected": 7, "present": 6, "missing": 1, "decodable": 4, "not decodable": 2, "silent (digital zero)": 1,
        "shorter than 5 s": 1, "same content as another": 2, "boxes outside the picture": 1,
        "boxes beyond a million": 1, "boxes without area": 1,
    }  # fmt: skip
    for what, count in counts.items():
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{what} ")]
        assert int(line[len(what) :].split()[0]) == count, what
    assert "b.png" in done.stdout and "c.wav" in done.stdout
    of_training = ("--train_data_path", root, "--metadata", root, "--workers", 0)
    done = cli("prepare_data", "check", "--trainset", "custom", *of_training)
    assert done.returncode == 1 and "not decodable" in done.stdout
    (root / "boxes.json").write_text('[{"file": "a", "class": "x", "bbox": [[0, 0, NaN, 1]]}]')
    done = cli("prepare_data", "check", "--testset", "custom", *flags)
    assert done.returncode == 2 and "1 boxes not a number" in done.stdout and "boxes.json" in done.stderr
    for wrong in ([], ["--trainset", "custom", "--testset", "custom"], ["--testset", "x"]):
        assert cli("prepare_data", "check", *wrong).returncode == 2


@pytest.fixture
def checkpoint(tmp_path):
    model = JointSlotModel("small", 16, image_size=64, audio_seconds=0.8)
    save_checkpoint(tmp_path / "m.pth", {"model": model.state_dict(), "model_config": model.config})
    return tmp_path / "m.pth"


def test_broken_pairs_stop_a_test_with_their_count_and_are_counted_when_allowed(root, checkpoint, tmp_path, cli):
    test = (
        "--checkpoint", checkpoint, "--gpu", "cpu", "--num_workers", 0, "--imagenet_weights", "none", "--testset",
        "custom", "--test_data_path", root, "--test_gt_path", root / "boxes.json", "--out_dir", tmp_path / "out",
    )  # fmt: skip
    (root / "ids.txt").write_text("\n".join("abcdef"))
    done = cli("test_model", *test, "--test_list", root / "ids.txt")
    assert done.returncode == 2 and "2 of 6 pairs cannot be decoded: b, c" in done.stderr.splitlines()[-1]
    done = cli("test_model", *test, "--allow_missing", "true")
    assert done.returncode == 0, done.stderr
    assert "4 of 7 pairs scored" in done.stdout
    assert (tmp_path / "out" / "custom" / "left_out.txt").read_text().split() == ["g", "b", "c"]


def test_broken_pairs_stop_a_training_with_their_count_and_are_left_out_when_allowed(root, tmp_path, cli):
    train = (
        "--trainset", "custom", "--train_data_path", root, "--gpu", "cpu", "--num_workers", 0, "--arch", "small",
        "--dim", 16, "--image_size", 32, "--audio_seconds", 0.8, "--imagenet_weights", "none", "--batch_size", 4,
        "--epochs", 1, "--reciprocal_k", 1, "--val_fraction", 0, "--model_dir", tmp_path, "--experiment_name", "run",
    )  # fmt: skip
    done = cli("train_slot", *train)
    assert done.returncode == 2 and "2 of 6 pairs cannot be decoded: b, c" in done.stderr.splitlines()[-1]
    done = cli("train_slot", *train, "--allow_missing", "true", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert "6 expected, 2 left out, 4 train" in done.stdout
    assert read_ids(tmp_path / "run" / "train_ids.txt") == list("adef")
    assert [line.split("\t")[0] for line in (tmp_path / "run" / "left_out.txt").read_text().splitlines()] == ["b", "c"]


def test_the_overlap_with_test_lists_is_told_and_removed_on_request(root, tmp_path, cli):
    shutil.copy(root / "audio" / "a.wav", root / "audio" / "c.wav")
    shutil.copy(root / "frames" / "a.png", root / "frames" / "b.png")
    (root / "vggss_heard_test.csv").write_text("a\nd\nz\n")
    train = (
        "--trainset", "custom", "--train_data_path", root, "--metadata", root, "--gpu", "cpu", "--num_workers", 0,
        "--arch", "small", "--dim", 16, "--image_size", 32, "--audio_seconds", 0.8, "--imagenet_weights", "none",
        "--batch_size", 4, "--epochs", 1, "--reciprocal_k", 1, "--val_fraction", 0, "--model_dir", tmp_path,
    )  # fmt: skip
    done = cli("train_slot", *train, "--experiment_name", "with")
    assert "2 of the 6 training ids are test ids of vggss_heard (--exclude_test_overlap removes" in done.stdout
    assert len(read_ids(tmp_path / "with" / "train_ids.txt")) == 6
    done = cli("train_slot", *train, "--experiment_name", "without", "--exclude_test_overlap")
    assert done.returncode == 0, done.stderr
    assert read_ids(tmp_path / "without" / "train_ids.txt") == list("bcef")


def test_the_overlaps_of_the_public_lists_are_the_known_ones():
    folder = shared_folder("metadata")
    for name, tested, count in (
        ("vggss_10k", "vggss", 238), ("vggss_144k", "vggss", 3709), ("vggss_heard", "vggss", 0),
        ("flickr_10k", "flickr", 1), ("flickr_144k", "flickr", 20),
    ):  # fmt: skip
        assert len(inspection.overlap_with_tests(read_ids(folder / f"{name}.txt"), folder)[tested]) == count, name
    for name, count in (("vggss_10k", 38), ("vggss_144k", 564), ("vggss_heard", 372)):
        shared = inspection.overlap_with_tests(read_ids(folder / f"{name}.txt"), folder)[inspection.SAME_VIDEO]
        assert len({i.rpartition("_")[0] for i in shared}) == count, name
    problems = inspection.annotation_problems(TEST_SETS["vggss"], folder / "vggss.json")
    assert problems["beyond a million"] == 12 and problems["without area"] == 18


def test_an_error_that_no_pair_explains_stays_what_it_is(root):
    pairs, _ = find_pairs(root, "vggsound", None)
    with pytest.raises(UserError, match="2 of 6"), inspection.count_undecodable(pairs):
        raise inspection.Undecodable("b.png")
    with pytest.raises(inspection.Undecodable, match="gone"), inspection.count_undecodable(pairs[:1]):
        raise inspection.Undecodable("gone")
