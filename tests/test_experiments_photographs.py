"""Scenes of cut-outs on photographs: what is in them, what may be seen where, and the table of trainings on them."""

import json
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import soundfile
from conftest import ROOT
from PIL import Image

from annotations import load_boxes, read_ids
from dataset import build_ground_truth
from experiments import pasted, photographs
from experiments.pasted import Material, make_set, read_kinds, split_photos
from experiments.runs import Training
from utils import UserError

KINDS = {"bell": 2, "cat": 5, "dog": 2, "sea_lion": 1}  # with so many cut-outs
COUNTS = {
    "train": 12, "val": 4, "test": 4, "distractor": 6, "interactive": 3, "offscreen": 8, "unseen": 3,
    "unseen_distractor": 3,
}  # fmt: skip
COLOURS = {"bell": (250, 0, 0), "cat": (0, 250, 0), "dog": (0, 0, 250), "sea_lion": (250, 250, 0)}


@pytest.fixture(scope="module")
def cutouts(tmp_path_factory):
    """A folder of kinds: rectangles of a kind's colour, of which no two have the same shape, in transparent images."""
    folder, rng = tmp_path_factory.mktemp("cutouts"), np.random.default_rng(0)
    for kind, count in KINDS.items():
        (folder / kind).mkdir()
        for i in range(count):
            pixels = np.zeros((80, 80, 4), np.uint8)
            pixels[10 : 40 + 5 * i, 20:60] = (*COLOURS[kind], 255)
            Image.fromarray(pixels).save(folder / kind / f"{i}.png")
        tone = np.sin(np.arange(40000) * rng.uniform(0.1, 0.5)) * np.linspace(0.1, 0.5, 40000)
        soundfile.write(folder / kind / "sound.wav", tone, 16000)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Grey photographs, each of a level of its own: 10, 30, ... 190."""
    folder = tmp_path_factory.mktemp("photos")
    for level in range(10, 200, 20):
        Image.new("RGB", (300, 200), (level,) * 3).save(folder / f"{level:03d}.png")
    return folder


@pytest.fixture(scope="module")
def scenes(cutouts, photos, tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "data"
    assert make_set(root, Material(read_kinds(cutouts), split_photos([photos], 0)), 0, COUNTS, processes=1)
    return root


def objects_of(root):
    return json.loads((root / "objects.json").read_text())


def test_boxes_are_exact_and_apart_and_hold_what_they_say(scenes):
    for name, things in objects_of(scenes).items():
        image = np.array(Image.open(scenes / "frames" / f"{name}.jpg")).astype(int)
        side = len(image)
        for thing in things:
            left, top, right, bottom = (round(side * edge) for edge in thing["bbox"])
            assert 0 <= left < right <= side and 0 <= top < bottom <= side
            inside = image[top + 2 : bottom - 2, left + 2 : right - 2]
            assert np.abs(inside - COLOURS[thing["kind"]]).mean() < 12
            for strip in (
                image[max(top - 6, 0) : max(top - 3, 0), left:right],
                image[top:bottom, right + 3 : right + 6],
            ):
                assert not strip.size or np.abs(strip - COLOURS[thing["kind"]]).mean() > 30
        boxes = [thing["bbox"] for thing in things]
        for i, a in enumerate(boxes):
            assert not any(all(max(a[k], b[k]) < min(a[k + 2], b[k + 2]) for k in (0, 1)) for b in boxes[:i])


def test_splits_have_the_objects_and_sounds_that_their_names_say(scenes):
    things = objects_of(scenes)
    for split, count in COUNTS.items():
        ids = read_ids(scenes / f"{split}.txt")
        assert len(ids) == count * (2 if split == "interactive" else 1)
        in_view = [len(things[i]) for i in ids]
        sounding = [sum(thing["sounding"] for thing in things[i]) for i in ids]
        allowed = {"test": {1}, "unseen": {1}, "interactive": {2}, "distractor": {2, 3}, "unseen_distractor": {2, 3}}
        assert set(in_view) <= allowed.get(split, {1, 2, 3})
        assert sounding == ([1, 0] * (count // 2) if split == "offscreen" else [1] * len(ids))
        for i, (_, boxes) in load_boxes(scenes / f"{split}.json").items():
            assert boxes == [thing["bbox"] for thing in things[i] if thing["sounding"]]
    first, second = read_ids(scenes / "interactive.txt")[:2]
    one, two = ((scenes / "frames" / f"{name}.jpg").read_bytes() for name in (first, second))
    assert one == two and things[first] != things[second]
    for name in read_ids(scenes / "train.txt"):
        wave, rate = soundfile.read(scenes / "audio" / f"{name}.wav")
        assert rate == 16000 and len(wave) == 32000 and np.sqrt(np.mean(wave**2)) > 0.005


def test_both_entries_of_an_interactive_image_are_counted_together_whatever_their_kinds_are_called(scenes):
    truth = build_ground_truth("photographs_interactive", scenes, None, "metadata")
    assert any(i.endswith("_sea_lion") for i in truth.ids)
    assert Counter(truth.unit_of[i] for i in truth.ids) == {f"interactive_{n:06d}": 2 for n in range(3)}


def test_train_val_and_tests_have_photographs_of_their_own(scenes):
    levels = {}
    for split in COUNTS:
        corners = [cv2.imread(str(scenes / "frames" / f"{i}.jpg")) for i in read_ids(scenes / f"{split}.txt")]
        part = split if split in ("train", "val") else "tests"
        levels.setdefault(part, set()).update(int(np.median(image)) // 20 for image in corners)
    assert not levels["train"] & levels["val"] and not (levels["train"] | levels["val"]) & levels["tests"]
    assert len(levels["train"]) > 2


def test_unseen_cutouts_are_in_no_other_split(cutouts):
    material = Material(read_kinds(cutouts), {})
    seen, unseen = material.kinds_of("distractor"), material.kinds_of("unseen_distractor")
    assert [kind.name for kind in unseen] == ["bell", "cat", "dog"]  # a sea lion has one cut-out
    of_seen = {path for kind in seen for path in kind.cutouts}
    of_unseen = {path for kind in unseen for path in kind.cutouts}
    assert not of_seen & of_unseen and len(of_seen | of_unseen) == sum(KINDS.values())
    assert material.kinds_of("train") == seen


def test_the_same_seed_makes_the_same_set_and_another_one_is_not_overwritten(scenes, cutouts, photos, tmp_path):
    material = Material(read_kinds(cutouts), split_photos([photos], 0))
    assert not make_set(scenes, material, 0, COUNTS)
    few = dict.fromkeys(COUNTS, 2)
    assert make_set(tmp_path / "again", material, 0, few, processes=2)
    for name in ("train_000000", "distractor_000001", "interactive_000001_cat"):
        for file in (f"frames/{name}.jpg", f"audio/{name}.wav"):
            if (scenes / file).is_file():
                assert (tmp_path / "again" / file).read_bytes() == (scenes / file).read_bytes(), file
    with pytest.raises(UserError, match="holds another set"):
        make_set(scenes, material, 1, COUNTS)


def test_material_that_will_not_do_is_one_line(cutouts, photos, tmp_path):
    with pytest.raises(UserError, match="no photograph"):
        split_photos([tmp_path / "absent"], 0)
    with pytest.raises(UserError, match="2 photographs"):
        split_photos(sorted(photos.iterdir())[:2], 0)
    (tmp_path / "mute").mkdir()
    with pytest.raises(UserError, match="three kinds or more"):
        read_kinds(tmp_path)
    (tmp_path / "list.csv").write_text("kind,image,sound\na,nothing.png,nothing.wav\n")
    with pytest.raises(UserError, match=r"not there, the first is .*nothing\.png"):
        read_kinds(tmp_path / "list.csv")
    Image.new("RGB", (9, 9)).save(tmp_path / "opaque.png")
    Image.new("RGBA", (9, 9)).save(tmp_path / "empty.png")
    for name, message in [("opaque", "no alpha"), ("empty", "shows nothing")]:
        with pytest.raises(UserError, match=message):
            pasted._cutout(str(tmp_path / f"{name}.png"))
    soundfile.write(tmp_path / "silence.wav", np.zeros(99), 16000)
    with pytest.raises(UserError, match="is silent"):
        pasted._sound(str(tmp_path / "silence.wav"))


def test_files_that_cannot_be_decoded_are_named_in_one_line(photos, tmp_path):
    content = bytearray(_png(tmp_path / "whole.png").read_bytes())
    place = content.index(b"IDAT") - 2
    content[place : place + 4] = b"\xff\xff\xff\xff"  # Pillow: SyntaxError
    (tmp_path / "broken.png").write_bytes(content)
    (tmp_path / "cut.png").write_bytes(content[:60])
    (tmp_path / "text.png").write_text("no image")
    for name in ("broken", "cut", "text"):
        with pytest.raises(UserError, match=f"cannot decode the cut-out .*{name}"):
            pasted._cutout(str(tmp_path / f"{name}.png"))
    soundfile.write(tmp_path / "click.wav", np.array([0.5]), 16000)
    with pytest.raises(UserError, match=r"click\.wav lasts 0\.1 ms"):
        pasted._sound(str(tmp_path / "click.wav"))
    for name, text, message in [
        ("head", "name;image;sound\n", "columns kind, image and sound: no kind"),
        ("latin", "kind,image,sound\nh\xe4h", "no list of kinds"),
        ("path", "kind,image,sound\na/b,x.png,x.wav\n", "'a/b' is not an id"),
        ("word", "kind,image,sound\nnoise,x.png,x.wav\n", "no kind may be called noise"),
    ]:
        (tmp_path / f"{name}.csv").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=message):
            read_kinds(tmp_path / f"{name}.csv")


def _png(path, pixels=((255, 0, 0, 255),)):
    Image.fromarray(np.array([pixels], np.uint8)).save(path)
    return path


def test_thin_cutouts_and_tiny_photographs_make_scenes(tmp_path):
    line = np.zeros((900, 900, 4), np.uint8)
    line[np.arange(900), np.arange(900)] = 0, 0, 255, 255  # a pixel wide: reduced, it is nowhere half opaque
    Image.fromarray(line).save(tmp_path / "line.png")
    photo = str(_png(tmp_path / "photo.png", [(9, 99, 9)]))
    kind = pasted.Kind("line", (str(tmp_path / "line.png"),), ())
    for seed in range(3):
        image, [box] = pasted.make_image([kind], [photo], np.random.default_rng(seed))
        width, height = ((box[i + 2] - box[i]) * len(image) for i in (0, 1))
        assert width == pytest.approx(height, abs=1) and width > 0.27 * len(image)


def test_copies_are_not_held_out_from_themselves(cutouts, photos, tmp_path, capsys):
    shutil.copytree(cutouts, tmp_path / "kinds")
    shutil.copy(tmp_path / "kinds" / "cat" / "0.png", tmp_path / "kinds" / "cat" / "99.png")
    (tmp_path / "kinds" / "cat" / "._0.png").write_text("what a Mac leaves")
    (tmp_path / "kinds" / ".trash").mkdir()
    assert [[Path(file).name for file in kind.cutouts] for kind in read_kinds(tmp_path / "kinds")] == [
        [f"{i}.png" for i in range(count)] for count in KINDS.values()
    ]
    shutil.copy(cutouts / "dog" / "sound.wav", tmp_path / "kinds" / "cat" / "other.wav")
    with pytest.raises(UserError, match="one file of two kinds, cat and dog"):
        read_kinds(tmp_path / "kinds")
    shutil.copy(photos / "010.png", tmp_path / "z.png")
    twice = split_photos([photos, photos / ".." / photos.name, tmp_path / "z.png"], 0)
    assert {part: [Path(file).name for file in files] for part, files in twice.items()} == {
        part: [Path(file).name for file in files] for part, files in split_photos([photos], 0).items()
    }
    assert "copies of others and left out" in capsys.readouterr().out


def test_a_set_of_files_that_have_changed_since_is_another_one(cutouts, photos, tmp_path):
    shutil.copytree(cutouts, tmp_path / "kinds")
    few = dict.fromkeys(COUNTS, 1)

    def make():
        pasted.contents.cache_clear()
        material = Material(read_kinds(tmp_path / "kinds"), split_photos([photos], 0))
        return make_set(tmp_path / "data", material, 0, few, processes=1)

    assert make() and not make()
    _png(tmp_path / "kinds" / "dog" / "0.png")
    with pytest.raises(UserError, match="holds another set"):
        make()


def test_a_list_of_kinds_says_the_same_as_a_folder_of_them(cutouts, tmp_path):
    rows = [f"{kind},{kind}/{i}.png,{kind}/sound.wav,{cutouts}" for kind, n in KINDS.items() for i in range(n)]
    (tmp_path / "list.csv").write_text("\n".join(["kind,image,sound,root", *rows]))
    assert read_kinds(tmp_path / "list.csv") == read_kinds(cutouts)


def test_the_list_of_debians_stamps_names_each_file_once_and_three_kinds_or_more_twice():
    rows = [line.split(",") for line in (ROOT / "experiments" / "tuxpaint.csv").read_text().splitlines()]
    assert rows[0] == ["kind", "image", "sound", "root", "imagenet"]
    images = [row[1] for row in rows[1:]]
    assert len(images) == len({*images}) and len({row[0] for row in rows[1:]}) == 43
    assert {row[4] for row in rows[1:]} == {"yes", "no"}


@pytest.mark.parametrize("key", photographs.ROWS)
def test_the_flags_of_every_row_are_flags_of_the_training(key, tmp_path):
    row = photographs.ROWS[key]
    run = Training(row._replace(flags=row.flags.format(weights="none")), 3, tmp_path / key, (), (), "photographs")
    if "frozen" in row.flags:
        pytest.importorskip("timm")
    wanted = run.wanted()
    assert wanted["seed"] == 3 and wanted["freeze_image"] == ("frozen" in row.flags)


def test_the_table_is_made_of_the_results_of_finished_trainings(scenes, checkpoint, tmp_path, cli):
    rows = {}
    for key in ("listen", "maxpool"):
        run = Training(photographs.ROWS[key], 0, tmp_path / key, photographs.SPLITS, ("--test_data_path", str(scenes)))
        done = cli(
            "test_model", "--checkpoint", checkpoint, "--testset", ",".join(run.splits), "--test_data_path", scenes,
            "--gpu", "cpu", "--num_workers", 0, "--imagenet_weights", "none", "--out_dir", run.folder / "results",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        settings = {"image_size": 64, "epochs": 1, "batch_size": 2, "image_encoder": "small", "freeze_image": False}
        (run.folder / "configs.json").write_text(json.dumps(settings))
        for split in run.splits:
            path = run.results(split)
            results = json.loads(path.read_text())
            results["checkpoint"]["epoch"] = 0  # not the last
            results["last_epoch"] = {"epoch": 1, "maps": {name: {"cIoU": 0.5} for name in ("AUD", "AUD_wrong")}}
            path.write_text(json.dumps(results))
        rows[key] = [run]
    head, _, *lines = photographs.table(rows, [224]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [line[:3] for line in cells] == [
        ["listen", "64", "best"], ["", "64", "last"], ["max-pool contrast", "64", "best"], ["", "64", "last"],
    ]  # fmt: skip
    heads = [cell.strip() for cell in head.split("|")[1:-1]]
    found = json.loads(rows["listen"][0].results("photographs_distractor").read_text())["maps"]
    at = heads.index("distractor: pointing")
    assert cells[0][at : at + 2] == [f"{100 * found[name]['pointing']:.1f}" for name in ("AUD", "AUD_wrong")]
    assert cells[1][heads.index("one object: cIoU")] == "50.0"
    difference = photographs.difference_table(rows["listen"], rows["maxpool"])
    assert difference.count("+0.0 (+0.0 to +0.0)") == 5  # of the same model twice


def test_the_commands_make_a_set_and_say_what_lacks(cutouts, photos, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(photographs, "COUNTS", COUNTS)
    monkeypatch.setattr(pasted, "COUNTS", COUNTS)
    make = "make", "--cutouts", cutouts, "--photos", photos, "--out", tmp_path / "data", "--train", 2
    done = cli("experiments.photographs", *make)
    assert done.returncode == 0 and "4 kinds; written" in done.stdout, done.stderr
    assert "unseen" not in done.stdout
    assert len(read_ids(tmp_path / "data" / "train.txt")) == 2
    assert "there already" in cli("experiments.photographs", *make).stdout
    table = "table", "--data", tmp_path / "data", "--model_dir", tmp_path, "--rows", "small_listen", "--write_docs"
    done = cli("experiments.photographs", *table)
    assert done.returncode == 2 and "small_listen_seed_0" in done.stderr and "--write_docs first" in done.stderr
