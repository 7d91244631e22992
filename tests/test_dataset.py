"""Lists, annotations, transforms, data sets."""

import json

import numpy as np
import pytest
import soundfile
import torch
from conftest import GOLDEN, shared_folder
from PIL import Image

import annotations
import dataset
import transforms
from utils import UserError


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_evaluation_picture_matches_the_reference_exactly(name):
    reference = np.load(GOLDEN / "preprocess_public.npz")[f"image_{name}"]
    picture = transforms.load_image(GOLDEN / "preprocess" / f"{name}.png")
    assert np.array_equal(transforms.eval_transform(224)(picture).numpy(), reference)


def test_consensus_and_mask_match_the_reference():
    reference = np.load(GOLDEN / "preprocess_public.npz")
    assert np.array_equal(
        annotations.consensus_map(GOLDEN / "preprocess" / "123.xml").numpy(), reference["consensus_123"]
    )
    assert np.array_equal(annotations.mask_map(GOLDEN / "preprocess" / "mask.png").numpy(), reference["mask"])


# ---------------------------------------------------------------- a miniature data set


def make_pairs(root, ids, frames="frames", audio="audio", size=(60, 40)):
    """Pictures and sounds for the ids, all different, in VGG-Sound's layout."""
    rng = np.random.default_rng(0)
    for folder in (frames, audio):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name in ids:
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(root / frames / f"{name}.jpg")
        soundfile.write(root / audio / f"{name}.wav", rng.uniform(-0.5, 0.5, 16000), 16000)


IDS = ["-a_000001", "b_000002", "c_000003", "d_000004", "e_000005"]


@pytest.fixture
def root(tmp_path):
    make_pairs(tmp_path, IDS)
    (tmp_path / "ids.txt").write_text("\r\n".join(IDS))  # no newline at the end, Windows line ends
    boxes = [
        {"file": name, "class": "dog" if i % 2 else "cat", "bbox": [[0.25, 0.5, 0.75, 1.2]]}
        for i, name in enumerate(IDS)
    ]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    return tmp_path


def custom(root, **more):
    settings = {"gt_path": str(root / "boxes.json"), "metadata": "", "image_size": 32, "audio_seconds": 0.5} | more
    return dataset.build_test_set("custom", str(root), **settings)


def test_an_item_has_the_documented_shapes(root):
    pairs = custom(root)
    sample = pairs[1]
    assert (sample.id, sample.class_name) == (IDS[1], "dog")
    assert sample.image.shape == (3, 32, 32) and sample.spectrogram.shape == (1, 257, 51)
    assert sample.truth.shape == (224, 224)
    assert (pairs.ground_truth.expected, pairs.missing) == (5, [])


def test_boxes_are_clipped_cut_to_whole_pixels_and_united():
    truth = annotations.box_map([[0.25, 0.5, 0.75, 1.2], [-2.9e16, 0.0, 0.01, 0.01]])
    assert truth[112:, 56:168].min() == 1
    assert truth[:2, :2].min() == 1
    assert truth.sum() == 112 * 112 + 4
    assert annotations.box_map([[0.3, 0.3, 0.3, 0.9]]).sum() == 0


def test_missing_pairs_stop_with_their_ids_and_are_counted_when_allowed(root):
    (root / "frames" / f"{IDS[0]}.jpg").unlink()
    (root / "audio" / f"{IDS[3]}.wav").unlink()
    with pytest.raises(UserError, match=f"2 of 5 pairs.*{IDS[0]}, {IDS[3]}"):
        custom(root)
    pairs = custom(root, allow_missing=True)
    assert (len(pairs), pairs.ground_truth.expected, pairs.missing) == (3, 5, [IDS[0], IDS[3]])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("boxes.json", "{", "cannot read the annotation"),
        ("boxes.json", "[]", "holds no list"),
        ("boxes.json", '[{"file": "a"}]', "entry 0"),
        ("boxes.json", '[{"file": "a", "bbox": [[0, 1, "x", 1]]}]', "entry 0"),
        ("boxes.json", '[{"file": "a", "bbox": [[0, 1, 1]]}]', "four numbers"),
        ("boxes.json", '[{"file": "a", "bbox": [[30, 20, 90, 80]]}]', "in 0..1 of the image, a has"),
        ("boxes.json", '[{"file": "a", "bbox": [[0.9, 0.9, 0.1, 0.1]]}]', "a box of a is reversed"),
        ("boxes.json", '[{"file": "a", "bbox": [[0.5, 0.5, 0.5, 0.9]]}]', "covers a pixel"),
        ("ids.txt", "", "is empty"),
        ("ids.txt", "a\na\n", "twice: a"),
        ("ids.txt", "stranger\n", "no box for 1 ids"),
    ],
)
def test_broken_lists_and_annotations_are_named(root, name, content, message):
    (root / name).write_text(content)
    with pytest.raises(UserError, match=message):
        custom(root, test_list=str(root / "ids.txt"))


def test_a_picture_without_a_sound_does_not_vanish_where_there_is_no_list(root):
    (root / "audio" / f"{IDS[3]}.wav").unlink()
    with pytest.raises(UserError, match=f"1 of 5 pairs.*{IDS[3]}"):
        dataset.select_training_pairs("custom", str(root), "")


def test_a_broken_picture_is_named_when_it_is_read(root):
    (root / "frames" / f"{IDS[2]}.jpg").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=IDS[2]):
        custom(root)[2]


def test_absent_folders_are_named(root, monkeypatch):
    monkeypatch.delenv("VGGSOUND_ROOT", raising=False)
    with pytest.raises(UserError, match="VGGSOUND_ROOT"):
        dataset.select_training_pairs("vggss_10k", None, "")
    with pytest.raises(UserError, match="does not exist"):
        dataset.select_training_pairs("custom", str(root / "absent"), "")
    (root / "empty").mkdir()
    with pytest.raises(UserError, match="no folders frames/ and audio/"):
        dataset.select_training_pairs("custom", str(root / "empty"), "")


def test_the_root_comes_from_the_environment_when_none_is_given(root, monkeypatch):
    monkeypatch.setenv("VGGSOUND_ROOT", str(root))
    (root / "vggss_10k.txt").write_text("\n".join(IDS[:2]))
    assert [p.id for p in dataset.select_training_pairs("vggss_10k", None, str(root)).pairs] == IDS[:2]


def test_flickr_reads_both_layouts_and_its_xml(tmp_path):
    make_pairs(tmp_path, ["11"], "Data", "Data")
    make_pairs(tmp_path, ["22"])
    (tmp_path / "Annotations").mkdir()
    box = "<bbox><n>x</n><xmin>0</xmin><ymin>0</ymin><xmax>128</xmax><ymax>256</ymax></bbox>"
    for name in ("11", "22"):
        (tmp_path / "Annotations" / f"{name}.xml").write_text(
            f"<a><filename>f</filename><who>{box}</who><who>{box}</who></a>"
        )
    (tmp_path / "flickr_test.csv").write_text("11,202\n22,0\n")
    pairs = dataset.build_test_set("flickr", str(tmp_path), None, str(tmp_path), 32, 0.5)
    assert pairs.ground_truth.expected == 250  # the published number, so that a short list shows
    assert pairs[1].truth[:, :112].min() == 1 and pairs[1].truth[:, 112:].max() == 0
    (tmp_path / "Annotations" / "22.xml").write_text("<a><b></a>")
    with pytest.raises(UserError, match=r"22\.xml"):
        pairs[1]


def test_xml_that_expands_entities_is_refused(tmp_path):
    (tmp_path / "a.xml").write_text('<!DOCTYPE a [<!ENTITY b "c">]><a><who><bbox>&b;</bbox></who></a>')
    with pytest.raises(UserError, match=r"a\.xml"):
        annotations.consensus_map(tmp_path / "a.xml")


# ---------------------------------------------------------------- training pairs


def test_what_is_drawn_depends_on_seed_epoch_and_index_alone(root):
    pairs, _ = dataset.find_pairs(root, "vggsound", None)

    def batches(workers, epoch=0, seed=0):
        data = dataset.TrainingPairs(pairs, 32, 0.5, "hard", seed)
        data.epoch = epoch
        return torch.cat([batch.image for batch in dataset.make_loader(data, 2, workers)])

    first = batches(0)
    assert torch.equal(first, batches(0)) and torch.equal(first, batches(2))
    assert not torch.equal(first, batches(0, epoch=1)) and not torch.equal(first, batches(0, seed=1))
    state = torch.get_rng_state()
    batches(0)
    assert torch.equal(state, torch.get_rng_state())


def test_sounds_of_nothing_come_second_and_change_nothing_else(root):
    pairs, _ = dataset.find_pairs(root, "vggsound", None)
    plain, more = (dataset.TrainingPairs(pairs, 32, 0.5, "hard", 0, silence) for silence in (False, True))
    for i in range(len(pairs)):
        assert torch.equal(plain[i].image, more[i].image)
        assert torch.equal(plain[i].spectrogram, more[i].spectrogram[:1])
        assert torch.equal(more[i].spectrogram, more[i].spectrogram) and more[i].spectrogram.shape[0] == 2
    assert len({more[i].spectrogram[1].sum().item() for i in range(len(pairs))}) > 1


def test_held_out_pairs_are_not_trained_on(root):
    selection = dataset.select_training_pairs("custom", str(root), "", str(root / "ids.txt"))
    train, held_out = dataset.hold_out("custom", selection.pairs, str(root), None, 0.4, seed=1)
    assert sorted(p.id for p in train + held_out) == sorted(IDS) and len(held_out) == 2
    assert len(dataset.hold_out("custom", selection.pairs, str(root), None, 0.2, seed=1)[1]) == 2  # and not one
    (root / "val.txt").write_text("b_000002\n")
    train, held_out = dataset.hold_out("custom", selection.pairs, str(root), str(root / "val.txt"), 0.4, seed=1)
    assert [p.id for p in held_out] == ["b_000002"] and len(train) == 4


def test_spectrogram_masks_are_up_to_nine_wide_anywhere_on_their_own_axis():
    torch.manual_seed(0)
    bands = torch.stack([transforms.draw_bands(40, 25) for _ in range(3000)])
    widths, starts = [set(), set()], [set(), set()]
    for masked in transforms.mask_bands(torch.ones(3000, 1, 40, 25), bands)[:, 0] == 0:
        for axis, lines in enumerate((masked.all(1), masked.all(0))):
            found = lines.nonzero()[:, 0].tolist()
            widths[axis].add(len(found))
            starts[axis].update(found[:1])
    assert widths == [set(range(10))] * 2
    assert max(starts[0]) >= 36 and max(starts[1]) >= 22 and min(starts[0]) == min(starts[1]) == 0


def test_hard_augmentation_changes_colour_and_plain_only_place():
    grey = Image.new("RGB", (50, 50), (200, 60, 60))
    plain = {transforms.train_transform(32, "plain")(grey)[:, 0, 0].numpy().tobytes() for _ in range(20)}
    hard = {transforms.train_transform(32, "hard")(grey)[:, 0, 0].numpy().tobytes() for _ in range(20)}
    assert len(plain) == 1 and len(hard) > 10


@pytest.mark.slow
def test_lists_of_the_field_have_their_known_counts():
    folder = shared_folder("metadata")
    for name, row in dataset.TRAIN_SETS.items():
        if row.expected:
            assert len(annotations.read_ids(folder / row.ids)) == row.expected, name
    for name, row in dataset.TEST_SETS.items():
        if row.expected and row.kind in ("boxes", "pixels"):
            truth = dataset.build_ground_truth(name, None, None, str(folder))
            assert len(truth.ids) == truth.expected == row.expected, name
    extended = dataset.build_ground_truth("vggss_plus_silent", None, None, str(folder))
    assert len(extended.silent) == 5158 and sum(a == b for a, b in extended.sources.values()) == 379
    assert extended.truth_of(next(iter(extended.sources))).sum() == 0
    several = dataset.build_ground_truth("vpo_ms", None, None, str(folder))
    assert sum(several.truth_of(i).sum() == 0 for i in several.ids) == 2
    assert {len(set(several.unit_of.values())), len(several.ids)} == {len({i[:12] for i in several.ids}), 2157}


def test_pairs_whose_source_is_not_in_view_join_the_test_list(tmp_path):
    make_pairs(tmp_path, ["a_000001", "b_000002"])
    make_pairs(tmp_path, ["x_000003"], "extend_frames", "extend_audio")
    boxes = [{"file": i, "class": "dog", "bbox": [[0, 0, 1, 0.5]]} for i in ("a_000001", "b_000002")]
    (tmp_path / "vggss.json").write_text(json.dumps(boxes))
    listed = "video,audio,label\na_000001,x_000003,non-sounding\nx_000003,x_000003,non-sounding\n"
    (tmp_path / "vggss_test_plus_silent.csv").write_text(listed)
    pairs = dataset.build_test_set("vggss_plus_silent", str(tmp_path), None, str(tmp_path), 32, 0.5)
    assert [p.id for p in pairs.pairs][2:] == ["a_000001+x_000003", "x_000003+x_000003"]
    assert pairs.pairs[2].image.endswith("a_000001.jpg") and pairs.pairs[2].audio.endswith("x_000003.wav")
    assert pairs[2].truth.sum() == 0 < pairs[0].truth.sum() and len(pairs.ground_truth.silent) == 2
    of_image = {i: pairs.ground_truth.unit_of.get(i, i) for i in pairs.ground_truth.ids}
    assert [*of_image.values()] == ["a_000001", "b_000002", "a_000001", "x_000003"], "intervals are over images"
    (tmp_path / "vggss_test_plus_silent.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="columns video, audio"):
        dataset.build_test_set("vggss_plus_silent", str(tmp_path), None, str(tmp_path), 32, 0.5)


@pytest.mark.parametrize("name, below", [("is3", ""), ("vpo_ss", ""), ("vpo_ms", "COCO_AV_MS")])
def test_boxes_and_masks_of_one_set_are_two_rows(name, below, tmp_path):
    ids = ["cat_bell_12_cat", "cat_bell_12_bell"]
    folder = tmp_path / below
    make_pairs(folder, ids, "visual_frames", "audio_wav")
    (folder / "gray_masks").mkdir()
    for i in ids:
        grey = np.full((50, 50), 100, np.uint8)  # 127 and less is silent, as JPEG leaves it
        grey[:, :25] = 200
        Image.fromarray(grey).save(folder / "gray_masks" / f"{i}.jpg", quality=95)
    entries = [
        {"image": f"/far/away/{i}.jpg", "audio": f"/far/{i}.wav", "gt_box": [0.0, 0.0, 224.0, 56.0]} for i in ids
    ]
    masks = [entry | {"gt_box": f"/far/masks/{i}.jpg"} for entry, i in zip(entries, ids, strict=True)]
    (tmp_path / dataset.TEST_SETS[name].annotation).write_text(json.dumps(entries))
    (tmp_path / dataset.TEST_SETS[f"{name}_seg"].annotation).write_text(json.dumps(masks))
    boxes, seg = (dataset.build_test_set(n, str(tmp_path), None, str(tmp_path), 32, 0.5) for n in (name, f"{name}_seg"))
    assert boxes[0].truth[:56].min() == 1 and boxes[0].truth[56:].max() == 0
    assert seg[0].truth[:, :110].min() == 1 and seg[0].truth[:, 114:].max() == 0
    assert seg.ground_truth.masks and not boxes.ground_truth.masks
    assert boxes.ground_truth.interactive == (name != "vpo_ss")
    known = dict(zip(ids, ("cat", "bell"))) if name == "is3" else {}  # IS3 has the class in its names
    assert boxes.ground_truth.class_of == seg.ground_truth.class_of == known
    assert boxes.ground_truth.seen == {i: {"cat", "bell"} for i in known}
    for wrong, other in ((name, f"{name}_seg"), (f"{name}_seg", name)):
        with pytest.raises(UserError, match="this set needs"):
            path = str(tmp_path / dataset.TEST_SETS[other].annotation)
            dataset.build_ground_truth(wrong, str(tmp_path), path, str(tmp_path))
    (folder / "gray_masks" / f"{ids[1]}.jpg").unlink()
    with pytest.raises(UserError, match=f"the mask of {ids[1]}"):
        dataset.build_test_set(f"{name}_seg", str(tmp_path), None, str(tmp_path), 32, 0.5)[1]


def test_a_mask_without_compression_counts_from_its_first_level(tmp_path):
    Image.fromarray(np.tile(np.array([0, 1], np.uint8), (4, 2))).save(tmp_path / "m.png")
    assert annotations.mask_map(tmp_path / "m.png").mean() == 0.5


def test_a_list_that_is_not_there_is_answered_with_where_it_comes_from_and_a_like_name(tmp_path):
    (tmp_path / "vggss_10k.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"--only vggss_144k\.txt` fetches .*like name there is .*vggss_10k\.txt"):
        annotations.read_ids(tmp_path / "vggss_144k.txt")
    for name in ("no.csv", "odd.**", "nowhere/ids.txt"):
        with pytest.raises(UserError, match=r"does not exist: `python [^;]*$"):
            annotations.read_ids(tmp_path / name)


def test_all_leaves_out_what_is_absent_and_stops_at_what_is_broken(synthetic_root, tmp_path, cli, monkeypatch):
    make_pairs(tmp_path, IDS[:2])
    boxes = [{"file": i, "class": "dog", "bbox": [[0, 0, 1, 0.5]]} for i in IDS[:3]]
    (tmp_path / "vggss.json").write_text(json.dumps(boxes))
    monkeypatch.setenv("VGGSOUND_ROOT", str(tmp_path))
    check = ("prepare_data", "check", "--testset", "all", "--metadata", tmp_path, "--workers", 0)
    done = cli(*check)  # it accounts for what is missing, and names what is not there
    assert done.returncode == 1 and "test set vggss\n" in done.stdout and "left out: is3" in done.stdout, done.stderr
    (tmp_path / "vggss.json").write_text("{")
    done = cli(*check)
    assert done.returncode == 2 and "vggss.json" in done.stderr


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "a\\b"])
def test_an_id_that_leads_out_of_its_folder_is_refused(name, root):
    (root / "ids.txt").write_text(f"{IDS[0]}\n{name}\n")
    with pytest.raises(UserError, match="is not an id"):
        custom(root, test_list=str(root / "ids.txt"))
    (root / "boxes.json").write_text(json.dumps([{"file": name, "bbox": [[0, 0, 1, 1]]}]))
    with pytest.raises(UserError, match="is not an id"):
        custom(root)


def test_lists_of_other_encodings_are_named_and_json_cannot_exhaust_the_stack(root):
    (root / "ids.txt").write_bytes("é_000001".encode("latin-1"))
    with pytest.raises(UserError, match=r"ids\.txt"):
        custom(root, test_list=str(root / "ids.txt"))
    (root / "boxes.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"boxes\.json"):
        custom(root)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1", "I;16"])
def test_pictures_of_every_mode_load_as_a_viewer_shows_them(mode, tmp_path):
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    if mode == "I;16":
        Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "x.png")
    else:
        picture = Image.fromarray(ramp).convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
        picture.save(tmp_path / "x.png", format="TIFF" if mode == "CMYK" else "PNG")  # the content counts, not the name
    loaded = np.asarray(transforms.load_image(tmp_path / "x.png")).astype(int)
    assert loaded.shape == (48, 64, 3)
    if mode != "1":
        assert np.abs(loaded.mean(2) - ramp).mean() < 8


def test_a_picture_is_turned_as_its_exif_data_say(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (40, 20)).save(tmp_path / "x.jpg", exif=exif)
    assert transforms.load_image(tmp_path / "x.jpg").size == (20, 40)


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0" + bytes(20), b"<svg/>"])
def test_a_picture_that_is_none_is_named(content, tmp_path):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.jpg"):
        transforms.load_image(tmp_path / "x.jpg")


def test_a_truncated_picture_is_named(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)).save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:-900])
    with pytest.raises(ValueError, match=r"x\.jpg"):
        transforms.load_image(tmp_path / "x.jpg")
