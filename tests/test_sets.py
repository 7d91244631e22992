"""What is in the files: broken, silent, short and repeated pairs, problems of boxes, overlap with test lists."""

import itertools
import json
import shutil
from argparse import Namespace

import numpy as np
import pytest
import soundfile
from conftest import shared_folder
from PIL import Image

import sets
from annotations import GroundTruth, read_ids
from dataset import EvaluationPairs, Pair, build_ground_truth, check_copies, find_pairs
from dataset_avs import build_source_truth, read_videos
from model_slot import JointSlotModel
from scoring.negative_audio import WithNegativeAudio
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
    truth = build_source_truth("vggsound_duet", None, None, str(folder))
    assert sets.trained_on(train_ids, truth, truth.ids)["pairs"] == 9456
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


def test_a_duet_was_trained_on_where_either_of_its_two_pairs_was(tmp_path):
    ids = ["aaaaaaaaaaa_000010", "bbbbbbbbbbb_000020", "ccccccccccc_000030", "ddddddddddd_000040"]
    boxes = [{"file": i, "class": i[0], "bbox": [[0, 0, 0.5, 0.5]]} for i in ids]
    (tmp_path / "vggss.json").write_text(json.dumps(boxes))
    lines = [f"{one},{one[0]},{other},{other[0]}\n" for one, other in itertools.pairwise(ids)]
    (tmp_path / "vggsound_duet_test.csv").write_text("".join(lines))
    truth = build_source_truth("vggsound_duet", None, None, tmp_path)  # a with b, b with c, c with d
    found = sets.trained_on([ids[1], "ddddddddddd_000090"], truth, truth.ids)
    assert found == {"pairs": 4, "images": 4, "audio": 4, "same_video": 2}


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


# ---------------------------------------------------------------- sets of one's own


@pytest.fixture
def scenes(tmp_path):
    """Two images, each with the sound of either object; each scene is also there as a pair of copies of its image."""
    rng = np.random.default_rng(1)
    for folder in ("frames", "audio"):
        (tmp_path / folder).mkdir()
    named, plain = [], []
    for scene in "ab":
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "frames" / f"scene-{scene}.png")
        for number, sound in enumerate(("dog", "cat")):
            wave = rng.uniform(-0.5, 0.5, 20000)
            box = [[0.5 * number, 0.1, 0.5 * number + 0.5, 0.9]]
            for name in (f"{sound}-{scene}", f"{scene}_{sound}"):
                soundfile.write(tmp_path / "audio" / f"{name}.wav", wave, 16000)
            Image.fromarray(pixels).save(tmp_path / "frames" / f"{scene}_{sound}.png")
            named.append({"file": f"scene-{scene}", "audio": f"{sound}-{scene}.wav", "class": sound, "bbox": box})
            plain.append({"file": f"{scene}_{sound}", "class": sound, "bbox": box})
    for name, entries in (("named", named), ("plain", plain)):
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    return tmp_path


@pytest.fixture
def score(cli, checkpoint, scenes, tmp_path):
    """score(flags...) -> {folder: its results.json}."""

    def run(*flags, testset="custom", out="out"):
        done = cli(
            "test_model", "--checkpoint", checkpoint, "--testset", testset, "--test_data_path", scenes, "--out_dir",
            tmp_path / out, "--imagenet_weights", "none", "--gpu", "cpu", "--num_workers", 0, *flags,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        paths = sorted((tmp_path / out).glob("*/results.json"))
        return {path.parent.name: json.loads(path.read_text()) for path in paths}

    return run


def test_an_image_that_entries_name_with_different_audio_makes_a_set_interactive(scenes, score, tmp_path):
    told = score("--test_gt_path", scenes / "named.json")["custom"]
    flagged = score("--test_gt_path", scenes / "plain.json", "--interactive", "true", out="flagged")["custom"]
    assert {"IIoU", "IAUC", "both_pointing"} <= told["maps"]["AUD"].keys() and told["maps"]["AUD"]["images"] == 2
    assert told["retrieval"] == flagged["retrieval"] == {}
    for metric in ("cIoU", "AUC", "pointing", "IIoU", "IAUC", "both_pointing", "IIoU_half", "images"):
        assert told["maps"]["AUD"][metric] == flagged["maps"]["AUD"][metric], metric
    rows = (tmp_path / "out" / "custom" / "per_sample.csv").read_text()
    assert "scene-a+dog-a,dog,scene-a," in rows
    plain = score("--test_gt_path", scenes / "plain.json", out="plain")["custom"]
    assert "IIoU" not in plain["maps"]["AUD"] and plain["retrieval"].keys() == {"by_class", "by_pair"}
    named = score("--test_gt_path", scenes / "named.json", "--interactive", "false", out="no")["custom"]
    assert "IIoU" not in named["maps"]["AUD"] and named["retrieval"] == {}, "an image has two classes"


def test_names_that_happen_to_begin_alike_make_no_image_of_several_sources(scenes, score, tmp_path):
    entries = json.loads((scenes / "named.json").read_text())
    for number, scene in enumerate("ab"):  # as the frames of one video: the same name up to the number, other images
        for folder, suffix, source in (("frames", "png", f"scene-{scene}"), ("audio", "wav", f"dog-{scene}")):
            content = (scenes / folder / f"{source}.{suffix}").read_bytes()
            (scenes / folder / f"video_{number}.{suffix}").write_bytes(content)
        entries.append({"file": f"video_{number}", "class": "dog", "bbox": [[0, 0, 0.5, 1]]})
    (scenes / "mixed.json").write_text(json.dumps(entries))
    assert score("--test_gt_path", scenes / "mixed.json")["custom"]["maps"]["AUD"]["images"] == 2
    with pytest.raises(AssertionError, match="video_0 and video_1 would be sources of one image, video"):
        score("--test_gt_path", scenes / "mixed.json", "--interactive", "true", out="flagged")
    told = build_ground_truth("custom", None, scenes / "plain.json", "", interactive=True).notes
    assert told == ["2 images by the names of their entries, as a of a_dog, a_cat"]


def test_folders_of_frames_are_copies_only_where_they_show_one_image(tmp_path):
    pairs = []
    for name, grey in (("a_1", 0), ("a_2", 0), ("a_3", 200)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40), (grey, grey, grey)).save(tmp_path / name / "0.png")
        pairs.append(Pair(name, str(tmp_path / name), f"{name}.wav"))
    units = dict.fromkeys(("a_1", "a_2", "a_3"), "a")
    check_copies(pairs[:2], units, ())
    with pytest.raises(UserError, match="a_1 and a_3 would be sources of one image, a"):
        check_copies(pairs, units, ())
    (tmp_path / "a_1" / "0.png").unlink()
    check_copies(pairs[:1], units, ())  # alone it is named when its turn comes
    with pytest.raises(UserError, match=r"folder of frames .*a_1 is empty"):
        check_copies(pairs[:2], units, ())


def test_off_screen_sounds_of_an_own_set_are_of_no_source_in_the_image(tmp_path):
    kinds = {"one": "dog cat", "two": "cat bird", "three": "bird horse", "four": "horse dog", "five": "cow hen"}
    entries = [
        {"image": image, "audio": f"{image}-{kind}", "class": kind, "bbox": [[0, 0, 1, 1]]}
        for image, shown in kinds.items()
        for kind in shown.split()
    ]
    entries.append({"image": "five", "audio": "one-dog", "class": "dog", "bbox": []})  # the dog is not in view
    (tmp_path / "boxes.json").write_text(json.dumps(entries))
    for interactive in (None, False):
        truth = build_ground_truth("custom", None, tmp_path / "boxes.json", "", interactive=interactive)
        pairs = [Pair(i, image, audio) for i, (image, audio) in truth.sources.items()]
        assert truth.seen["five+one-dog"] == {"cow", "hen"}
        for seed in range(6):
            asked = WithNegativeAudio(EvaluationPairs(pairs, truth, [], 32, 0.8), seed, truth.class_of)
            assert asked.offscreen == "another class"
            for pair, partner in zip(pairs, asked.partner, strict=True):
                image, _ = truth.sources[pair.id]
                assert truth.class_of[pairs[partner].id] not in kinds[image].split(), (seed, pair.id)


def test_an_image_counts_only_with_all_its_sources_and_comparing_knows_it(scenes, score, cli, tmp_path):
    entries = json.loads((scenes / "named.json").read_text())
    entries.append({"file": "scene-b", "audio": "dog-a", "class": "dog", "bbox": []})  # heard off screen
    (scenes / "more.json").write_text(json.dumps(entries))
    (scenes / "audio" / "cat-a.wav").unlink()
    found = score("--test_gt_path", scenes / "more.json", "--allow_missing")["custom"]
    assert found["maps"]["AUD"]["images"] == 1 and found["pairs"]["left_out"] == ["scene-a+cat-a"]
    path = tmp_path / "out" / "custom" / "results.json"
    shutil.copytree(path.parent, tmp_path / "copy")
    for common in ("false", "true"):
        done = cli("test_model", "--compare", path, tmp_path / "copy" / "results.json", "--common", common)
        assert done.returncode == 0 and "IIoU" in done.stdout, done.stderr


def test_lists_of_one_set_have_folders_and_names_of_their_own(scenes, score, tmp_path):
    (scenes / "first.txt").write_text("a_dog\na_cat\n")
    (scenes / "other.txt").write_text("b_dog\nb_cat\na_cat\n")
    boxes, lists = ("--test_gt_path", scenes / "plain.json"), [scenes / "first.txt", scenes / "other.txt"]
    together = score(*boxes, "--test_list", *lists, testset="custom,custom")
    assert {name: found["pairs"]["scored"] for name, found in together.items()} == {
        "custom_first": 2,
        "custom_other": 3,
    }
    assert together["custom_first"]["test_list"] == str(lists[0])
    assert [found["testset"] for found in together.values()] == [*together]
    commas = score(*boxes, "--test_list", ",".join(map(str, lists)), out="commas")
    for name, path in zip(together, lists, strict=True):
        alone = score(*boxes, "--test_list", path, out=path.stem)["custom"]
        assert alone["maps"] == together[name]["maps"] == commas[name]["maps"]


@pytest.mark.parametrize(
    ("testset", "flags", "says"),
    [
        ("custom,custom", ["--test_gt_path", "a.json", "--test_list", "a", "b", "c"], "3 paths for 2 test sets"),
        ("custom", ["--test_gt_path", "a.json", "a.json"], "asks for custom twice"),
        ("synthetic,custom,is3", ["--test_list", "a", "b"], "2 paths for 3 test sets"),
        ("synthetic", ["--interactive"], "--interactive is for custom"),
        ("synthetic_video", ["--interactive", "false"], "--interactive is for custom"),
    ],
)
def test_paths_that_do_not_fit_the_sets_are_one_line(cli, checkpoint, testset, flags, says):
    done = cli("test_model", "--checkpoint", checkpoint, "--gpu", "cpu", "--testset", testset, *flags)
    assert done.returncode == 2 and says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_files_of_one_name_are_counted(tmp_path):
    args = Namespace(testset="custom,vggss,custom", test_gt_path="x/b.json,v.json,y/b.json", test_list=None)
    asked = sets.requests(args)
    assert {key: one.gt_path for key, one in asked.items()} == {
        "custom_b": "x/b.json", "vggss": "v.json", "custom_b#2": "y/b.json",
    }  # fmt: skip


def test_an_interactive_set_without_two_entries_of_an_image_is_refused(scenes, cli, checkpoint):
    (scenes / "one.json").write_text(json.dumps([{"file": "a_dog", "bbox": [[0, 0, 1, 1]]}]))
    done = cli(
        "test_model", "--checkpoint", checkpoint, "--gpu", "cpu", "--testset", "custom", "--test_data_path", scenes,
        "--test_gt_path", scenes / "one.json", "--interactive",
    )  # fmt: skip
    assert done.returncode == 2 and "no image of" in done.stderr and "two entries" in done.stderr
