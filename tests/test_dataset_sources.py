"""Sets of several sources and frames of videos: lists, boxes, which image and which audio make an item."""

import json

import numpy as np
import pytest
import soundfile
import torch
from conftest import shared_folder
from PIL import Image

from annotations import load_avatar, load_music, read_duets, read_labels
from dataset import finish_one
from dataset_avs import build_frame_set, build_source_set, build_source_truth, pair_up, read_frames
from scoring.summary import images_by_id
from utils import Absent, UserError

RATE = 16000


def write_image(path, colour=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (colour, colour, colour)).save(path)


def write_tone(path, hertz, seconds=2.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.2 * np.sin(2 * np.pi * hertz * np.arange(int(RATE * seconds)) / RATE), RATE)


def loudest(spectrogram):
    """Hz of the loudest bin of (1, F, L)."""
    return spectrogram[0].mean(1).argmax().item() * RATE / 512


# ---------------------------------------------------------------- MUSIC


@pytest.fixture
def music(tmp_path):
    """Two frames of one video and one of another, each with two sources; annotation and list."""
    frames = ["-_a_b_000_00000", "-_a_b_000_00007", "xyz_001_00003"]
    entries = [
        {"file": name, "class_src1": "cello", "bbox_src1": [0.1, 0.2, 0.3, 0.4]}
        | {"class_src2": "guitar", "bbox_src2": [0.6, 0.5, 0.25, 0.25]}
        for name in frames
    ]
    (tmp_path / "music_duet.json").write_text(json.dumps(entries))
    (tmp_path / "music_duet_test.csv").write_text("\n".join(frames))
    for name in frames:
        write_image(tmp_path / "data" / "frames" / f"{name}.jpg")
    write_tone(tmp_path / "data" / "audio" / "-_a_b.wav", 440)
    write_tone(tmp_path / "data" / "audio" / "xyz.wav", 880)
    return tmp_path


def test_boxes_of_music_are_corner_and_size_and_each_source_is_an_item(music):
    dataset = build_source_set("music_duet", music / "data", None, music, 32, 0.5)
    truth = dataset.ground_truth
    assert truth.ids == [
        f"{name}_{k}" for name in ("-_a_b_000_00000", "-_a_b_000_00007", "xyz_001_00003") for k in (1, 2)
    ]
    drawn = truth.truth_of("xyz_001_00003_2")
    rows, columns = (torch.nonzero(drawn.any(dim)).flatten() for dim in (1, 0))
    assert (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1) == (134, 190, 112, 168)  # 0.6 .. 0.85, 0.5 .. 0.75
    assert truth.class_of["xyz_001_00003_2"] == "guitar" and truth.heard["xyz_001_00003_2"] == {"cello", "guitar"}
    assert {truth.unit_of[i] for i in truth.ids} == {"-_a_b", "xyz"}  # the video
    assert truth.siblings["xyz_001_00003_2"] == ["xyz_001_00003_1", "xyz_001_00003_2"]
    assert truth.expected == 2040 and not dataset.missing
    assert "1 of 6 are empty" not in truth.notes[0] and "0 of 6" not in truth.notes[0]


def test_frames_of_music_hear_the_sound_of_their_video_or_one_of_their_own(music):
    dataset = build_source_set("music_duet", music / "data", None, music, 32, 0.5)
    heard = {sample.id: loudest(sample.spectrogram) for sample in (dataset[i] for i in range(len(dataset)))}
    assert heard["-_a_b_000_00007_1"] == pytest.approx(440, abs=32) == heard["-_a_b_000_00000_2"]
    assert heard["xyz_001_00003_1"] == pytest.approx(880, abs=32)
    write_tone(music / "data" / "audio" / "-_a_b_000_00007.wav", 2000)
    dataset = build_source_set("music_duet", music / "data", None, music, 32, 0.5)
    assert loudest(finish_one(dataset.heard(2))) == pytest.approx(2000, abs=32)


def test_a_frame_of_music_without_its_file_is_named_or_counted(music):
    (music / "data" / "frames" / "xyz_001_00003.jpg").unlink()
    with pytest.raises(UserError, match="xyz_001_00003"):
        build_source_set("music_duet", music / "data", None, music, 32, 0.5)
    dataset = build_source_set("music_duet", music / "data", None, music, 32, 0.5, allow_missing=True)
    assert dataset.missing == ["xyz_001_00003_1", "xyz_001_00003_2"] and len(dataset) == 4


@pytest.mark.parametrize(
    ("box", "says"), [([0.5, 0.1, 0.7, 0.2], "leaves its image"), ([0.1, 0.1, 0.2], "four numbers"), (None, "not")]
)
def test_boxes_of_music_that_cannot_be_are_refused(tmp_path, box, says):
    (tmp_path / "music_solo.json").write_text(json.dumps([{"file": "a_0_1", "class": "x", "bbox": box}]))
    with pytest.raises(UserError, match=says):
        load_music(tmp_path / "music_solo.json")


def test_the_published_lists_of_music_and_the_boxes_that_corners_lose():
    folder = shared_folder("metadata")
    solo, lost_solo = load_music(folder / "music_solo.json")
    duet, lost_duet = load_music(folder / "music_duet.json")
    assert (len(solo), lost_solo, len(duet), lost_duet) == (2124, 1647, 1020, 1027)
    truth = build_source_truth("music_solo", None, None, folder)
    assert len(truth.ids) == 2124 and len({*truth.unit_of.values()}) == 20
    truth = build_source_truth("music_duet", None, None, folder)
    assert len(truth.ids) == 2040 and len({*truth.unit_of.values()}) == 6
    assert all(truth.truth_of(i).any() for i in truth.ids[::100])
    assert "1,027 of 2,040" in truth.notes[0]
    assert len({*images_by_id(truth, truth.ids).values()}) == 1020  # an image is a frame, though the unit is its video


# ---------------------------------------------------------------- duets


@pytest.fixture
def duets(tmp_path):
    boxes = {"a": [[0.0, 0.0, 0.5, 0.5]], "b": [[0.5, 0.5, 1.0, 1.0]], "c": [[0.25, 0.25, 0.75, 0.75]]}
    entries = [{"file": i, "class": f"class {i}", "bbox": drawn} for i, drawn in boxes.items()]
    (tmp_path / "vggss.json").write_text(json.dumps(entries))
    (tmp_path / "vggsound_duet_test.csv").write_text("a,class a,b,class b\nc,class c,a,class a\n")
    for i, hertz, colour in (("a", 500, 10), ("b", 1500, 240), ("c", 3000, 120)):
        write_image(tmp_path / "data" / "frames" / f"{i}.png", colour)
        write_tone(tmp_path / "data" / "audio" / f"{i}.wav", hertz)
    return tmp_path


def test_a_duet_is_two_images_side_by_side_and_both_sounds(duets):
    dataset = build_source_set("vggsound_duet", duets / "data", None, duets, 32, 0.5)
    assert [pair.id for pair in dataset.pairs] == ["a_1", "a_2", "c_1", "c_2"]
    sample = dataset[1]
    assert sample.image.shape == (3, 32, 64) and sample.truth.shape == (224, 448)
    assert sample.image[:, :, :32].mean() < -1 and sample.image[:, :, 32:].mean() > 1  # a is dark, b is bright
    assert sample.class_name == "class b"
    rows, columns = (torch.nonzero(sample.truth.any(dim)).flatten() for dim in (1, 0))
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == (112, 224, 336, 448)  # b, in the right half
    strength = finish_one(dataset.heard(1))[0].mean(1)
    assert strength[[16, 48]].min() > strength[96] + 0.2  # 500 and 1500 Hz, and not 3000
    alone = finish_one(dataset.heard_alone(1))
    assert loudest(alone) == pytest.approx(1500, abs=32) and alone[0].mean(1)[16] < strength[16] - 0.2
    assert torch.equal(finish_one(dataset.heard(0)), finish_one(dataset.heard(1)))


def test_the_built_in_duets_pair_every_test_image_with_one_of_another_class(synthetic_root):
    dataset = build_source_set("synthetic_duet", synthetic_root, None, "metadata", 32, 0.5)
    truth = dataset.ground_truth
    assert len(truth.ids) == 40 and truth.expected == 40 and truth.interactive
    for first in truth.ids[::2]:
        one, other = truth.siblings[first]
        assert truth.class_of[one] != truth.class_of[other]
    assert len({dataset.alone[i] for i in truth.ids[::2]}) == 20 == len({dataset.alone[i] for i in truth.ids[1::2]})


def test_pairs_of_one_class_cannot_be_paired():
    assert pair_up({"a": "x", "b": "y", "c": "x", "d": "y"}) == {
        "a": ("a", "b"),
        "b": ("b", "a"),
        "c": ("c", "d"),
        "d": ("d", "c"),
    }
    with pytest.raises(UserError, match="2 of 3"):
        pair_up({"a": "x", "b": "x", "c": "y"})


def test_the_published_list_of_duets():
    folder = shared_folder("metadata")
    rows = read_duets(folder / "vggsound_duet_test.csv")
    assert len(rows) == 5158 and rows["zpWuikVorYg_000032"] == ("zpWuikVorYg_000032", "Rtg1SUrxOPY_000130")
    truth = build_source_truth("vggsound_duet", None, None, folder)
    assert len(truth.ids) == 10316 == truth.expected and truth.truth_of(truth.ids[0]).shape == (224, 448)
    assert len(build_source_truth("vggsound_single", None, None, folder).ids) == 5158


@pytest.mark.parametrize("text", ["", "a,x,b\n", "a,x,b,y\na,x,c,y\n", "../a,x,b,y\n"])
def test_lists_of_duets_that_are_none_are_refused(tmp_path, text):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=r"list\.csv"):
        read_duets(tmp_path / "list.csv")


# ---------------------------------------------------------------- VGGSounder


def test_labels_are_told_apart_by_sense(tmp_path):
    rows = ["video_id,label,modality", 'v,"dog, barking",AV', "v,man,A", "v,car,V", "w,man,V"]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    labels = read_labels(tmp_path / "labels.csv")
    assert labels["v"].seen == {"dog, barking", "car"} and labels["v"].heard == {"dog, barking", "man"}
    assert labels["w"].heard == frozenset()
    (tmp_path / "labels.csv").write_text("video_id,label,modality\nv,dog,AVX")
    with pytest.raises(UserError, match="AVX"):
        read_labels(tmp_path / "labels.csv")


# ---------------------------------------------------------------- AVATAR


def write_frame(root, video, frame, *notes, size=(200, 100), **more):
    path = root / "metadata" / video / f"{frame}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = [dict(zip(("task", "bbox", "segmentation"), note, strict=False)) for note in notes]
    entry = {"original_width": size[0], "original_height": size[1], "annotations": notes} | more
    path.write_text(json.dumps(entry))
    write_image(root / "frames" / video / f"{frame}.jpg")


@pytest.fixture
def avatar(tmp_path):
    """Two videos of 4 s whose sound changes its pitch at 2 s; 10 frames per second."""
    write_frame(tmp_path, "one", "00010", ("Single-sound", [20, 10, 100, 50]))
    write_frame(tmp_path, "one", "00035", ("Off-Screen", []))
    write_frame(tmp_path, "two", "00005", ("Mixed-sound", [0, 0, 50, 50]), ("Mixed-sound", [150, 50, 50, 50]))
    write_frame(tmp_path, "two", "00039", ("Mixed-sound", [10, 0, 50, 100]), ("Multi-entity", [100, 0, 100, 20]))
    for video, low in (("one", 500), ("two", 1000)):
        sound = [0.2 * np.sin(2 * np.pi * hertz * np.arange(2 * RATE) / RATE) for hertz in (low, low + 2000)]
        path = tmp_path / "audio" / f"{video}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, np.concatenate(sound), RATE)
    (tmp_path / "fps.csv").write_text("video,fps\none,10\ntwo,10\n")
    return tmp_path


def test_avatar_has_an_item_for_each_frame_and_task_with_the_sound_around_it(avatar):
    dataset = build_frame_set("avatar", avatar, None, "metadata", 32, 0.5)
    truth = dataset.ground_truth
    assert truth.ids == ["one_00010", "one_00035", "two_00005", "two_00039_mixed-sound", "two_00039_multi-entity"]
    assert truth.silent == {"one_00035"} and not truth.truth_of("one_00035").any()
    assert truth.parts["mixed-sound"] == {"two_00005", "two_00039_mixed-sound"}
    assert truth.parts["cross-event"] == set(truth.ids)  # what sounds changes in either video
    assert truth.unit_of["two_00005"] == "two"
    both = truth.truth_of("two_00005")
    assert both[:112, :56].all() and both[112:, 168:].all() and both.sum() == 2 * 112 * 56
    heard = {sample.id: loudest(sample.spectrogram) for sample in (dataset[i] for i in range(len(dataset)))}
    wanted = {"one_00010": 500, "one_00035": 2500, "two_00005": 1000, "two_00039_mixed-sound": 3000}
    assert all(heard[name] == pytest.approx(hertz, abs=32) for name, hertz in wanted.items())
    assert "[x, y, width, height]" in truth.notes[0]


def test_frames_of_one_video_that_all_hear_the_same_are_no_cross_event(avatar):
    both = ("Mixed-sound", [0, 0, 50, 50]), ("Multi-entity", [150, 50, 50, 50])
    for frame in ("00001", "00002"):
        write_frame(avatar, "three", frame, *both)
    _, truth = read_frames("avatar", avatar, None, None)
    assert not any(i.startswith("three") for i in truth.parts["cross-event"])
    write_frame(avatar, "three", "00003", both[0])
    _, truth = read_frames("avatar", avatar, None, None)
    assert sum(i.startswith("three") for i in truth.parts["cross-event"]) == 5


def test_boxes_of_avatar_are_read_as_what_fits_their_images_and_polygons(avatar):
    write_frame(avatar, "one", "00011", ("Single-sound", [150, 60, 190, 90]))  # leaves the image as a size
    with pytest.raises(UserError, match="leave their images"):  # [20, 10, 100, 50] fits both, [150, 50, 50, 50] one
        load_avatar(avatar / "metadata")
    for frame in ("00005", "00039"):
        (avatar / "metadata" / "two" / f"{frame}.json").unlink()
    frames, notes = load_avatar(avatar / "metadata")
    assert "corners" in notes[0] and frames["one_00010"].boxes == [[0.1, 0.1, 0.5, 0.5]]
    outline = [[20, 10, 120, 10, 120, 60, 20, 60]]
    write_frame(avatar, "one", "00010", ("Single-sound", [20, 10, 100, 50], outline))
    write_frame(avatar, "one", "00011", ("Single-sound", [60, 10, 90, 50], [[60, 10, 150, 10, 150, 60]]))
    frames, notes = load_avatar(avatar / "metadata")
    assert "[x, y, width, height]" in notes[0] and frames["one_00010"].boxes == [[0.1, 0.1, 0.6, 0.6]]


def test_the_time_of_a_frame_is_never_guessed(avatar):
    (avatar / "fps.csv").write_text("video,fps\none,10\n")
    with pytest.raises(UserError, match="two"):
        build_frame_set("avatar", avatar, None, "metadata", 32, 0.5)
    (avatar / "fps.csv").write_text("video,fps\none,10\ntwo,fast\n")
    with pytest.raises(UserError, match="fast"):
        build_frame_set("avatar", avatar, None, "metadata", 32, 0.5)
    write_frame(avatar, "two", "00005", ("Mixed-sound", [0, 0, 50, 50]), time=3.5)
    (avatar / "metadata" / "two" / "00039.json").unlink()
    (avatar / "fps.csv").write_text("video,fps\none,10\n")
    dataset = build_frame_set("avatar", avatar, None, "metadata", 32, 0.5)
    assert dataset.at["two_00005"] == 3.5 and dataset.at["one_00035"] == 3.5


def test_damaged_and_missing_parts_of_avatar_are_named(avatar):
    with pytest.raises(Absent, match="no AVATAR annotation"):
        load_avatar(avatar / "frames")
    (avatar / "frames" / "one" / "00010.jpg").unlink()
    with pytest.raises(UserError, match="one_00010"):
        build_frame_set("avatar", avatar, None, "metadata", 32, 0.5)
    dataset = build_frame_set("avatar", avatar, None, "metadata", 32, 0.5, allow_missing=True)
    assert dataset.missing == ["one_00010"]
    (avatar / "metadata" / "one" / "00010.json").write_text('{"original_width": 3}')
    with pytest.raises(UserError, match=r"00010\.json"):
        load_avatar(avatar / "metadata")
