"""The synthetic set: reproducible, balanced, and not to be had without hearing."""

import collections
import hashlib
import itertools
import json

import cv2
import numpy as np
import pytest
import soundfile
import torch
from scipy import stats

import dataset
import synthetic
import synthetic_kinds
import synthetic_probe
from metrics import MAP_SIZE
from synthetic import SIDE, SPLITS
from synthetic_kinds import KINDS
from utils import run_cli

COUNTS = {"train": 100, "val": 20, "test": 150, "distractor": 200, "interactive": 60}
TINY = {"train": 12, "val": 2, "test": 2, "distractor": 11, "interactive": 2}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors on a busy machine: waiting for a second thread would cost more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A set large enough to measure something on; tests only read it."""
    folder = tmp_path_factory.mktemp("synthetic") / "set"
    synthetic.generate(folder, seed=3, counts=COUNTS)
    return folder


@pytest.fixture(scope="module")
def other_root(tmp_path_factory):
    """A tiny set of another seed, made by one process; tests only read it."""
    folder = tmp_path_factory.mktemp("synthetic") / "other"
    assert synthetic.generate(folder, seed=5, counts=TINY, processes=1)
    return folder


@pytest.fixture(scope="module")
def objects(root):
    return json.loads((root / "objects.json").read_text())


@pytest.fixture(scope="module")
def numbers(root):
    return synthetic_probe.probe(root)


def digests(folder):
    """{path below the folder: SHA-256 of its bytes}"""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def ids_of(folder, split):
    return (folder / f"{split}.txt").read_text().split()


def kinds_by_role(objects, split):
    """How often each kind sounds, and how often it is in view and silent."""
    things = [thing for name, view in objects.items() if name.startswith(split) for thing in view]
    return [
        collections.Counter(thing["kind"] for thing in things if thing["sounding"] == role) for role in (True, False)
    ]


def failure(capsys, *arguments):
    """The one line with which the command line fails; exit status 2 and nothing on the standard output."""
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: synthetic.main([str(argument) for argument in arguments]))
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if "picture/s" not in line]
    assert stop.value.code == 2 and len(lines) == 1 and not printed.out
    return lines[0]


# ---------------------------------------------------------------- reproducible, and apart


def test_same_seed_same_bytes_for_any_number_of_processes(other_root, tmp_path):
    synthetic.generate(tmp_path, seed=5, counts=TINY, processes=3)
    assert digests(tmp_path) == digests(other_root)


def test_other_seed_shares_no_picture_and_no_sound(root, other_root):
    made = [
        {digest for path, digest in digests(folder).items() if path.startswith(("frames", "audio"))}
        for folder in (root, other_root)
    ]
    assert all(made) and not made[0] & made[1]


def test_a_sample_does_not_depend_on_how_many_there_are(root, tmp_path):
    synthetic.generate(tmp_path, seed=3, counts=TINY, processes=1)
    for name in ("frames/test_000001.jpg", "audio/distractor_000000.wav"):
        assert (tmp_path / name).read_bytes() == (root / name).read_bytes()


def test_no_id_picture_or_sound_is_in_two_splits(root):
    ids = [ids_of(root, split) for split in SPLITS]
    every = list(itertools.chain(*ids))
    assert len(set(every)) == len(every) == sum(COUNTS.values()) + COUNTS["interactive"]
    splits_of = collections.defaultdict(set)
    for path, digest in digests(root).items():
        if path.startswith(("frames", "audio")):
            splits_of[digest].add(path.split("/")[1].split("_")[0])
    assert all(len(splits) == 1 for splits in splits_of.values())
    sounds = [digest for path, digest in digests(root).items() if path.startswith("audio")]
    assert len(set(sounds)) == len(sounds) == len(every)


# ---------------------------------------------------------------- objects


def test_boxes_are_inside_and_of_25_to_50_percent(objects):
    boxes = np.array([thing["bbox"] for view in objects.values() for thing in view])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    longer = np.maximum(width, height)
    assert boxes.min() >= 0 and boxes.max() <= 1
    assert longer.min() >= 0.25 and longer.max() <= 0.5 and np.minimum(width, height).min() >= 0.1
    assert longer.min() < 0.27 and longer.max() > 0.48


def test_objects_in_view_never_overlap(objects):
    pairs = [(a["bbox"], b["bbox"]) for view in objects.values() for a, b in itertools.combinations(view, 2)]
    assert len(pairs) >= COUNTS["distractor"] + COUNTS["interactive"]
    for a, b in pairs:
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.mark.parametrize("kind", KINDS)
def test_box_is_tight_around_what_is_drawn(kind):
    for size in (32, 51):
        rgb, opacity = synthetic_kinds.draw_object(kind, size, np.random.default_rng(size))
        assert max(opacity.shape) == size and rgb.shape == (*opacity.shape, 3)
        edges = opacity[0], opacity[-1], opacity[:, 0], opacity[:, -1]
        assert all(edge.max() > 0.01 for edge in edges) and opacity.max() < 1 + 1e-6


def test_picture_shows_the_object_in_its_box_and_nowhere_else(monkeypatch):
    monkeypatch.setattr(synthetic, "draw_background", lambda rng: np.zeros((SIDE, SIDE, 3)))
    picture, (box,) = synthetic.make_picture(["clock"], np.random.default_rng(0))
    left, top, right, bottom = (round(SIDE * edge) for edge in box)
    inside = picture[top:bottom, left:right].astype(int).copy()
    picture[top:bottom, left:right] = 0
    assert inside.mean() > 60 and picture.max() < 25


def test_kinds_are_many_and_named_for_ids():
    assert 8 <= len(KINDS) <= 10 and all(kind.isascii() and kind.isalnum() for kind in KINDS)


@pytest.mark.parametrize("split", SPLITS)
def test_every_kind_sounds_and_stays_silent_equally_often(objects, split):
    sounding, silent = kinds_by_role(objects, split)
    assert set(sounding) == set(KINDS) and len(set(sounding.values())) == 1
    if split in ("distractor", "interactive"):
        assert set(silent) == set(KINDS) and len(set(silent.values())) == 1
    else:
        assert not silent
    if split == "interactive":
        assert sounding == silent


def test_views_hold_the_promised_objects(objects):
    counts = collections.defaultdict(collections.Counter)
    for name, view in objects.items():
        assert len({thing["kind"] for thing in view}) == len(view) and sum(thing["sounding"] for thing in view) == 1
        counts[name.split("_")[0]][len(view)] += 1
    assert counts["train"] == {1: 100} and counts["interactive"] == {2: 120}
    assert counts["distractor"] == {2: 100, 3: 100}


def test_place_and_size_tell_nothing_about_the_kind_or_who_sounds(objects):
    things = [thing for view in objects.values() for thing in view]
    boxes = np.array([thing["bbox"] for thing in things])
    centre_x, centre_y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    longer = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    kinds = np.array([thing["kind"] for thing in things])
    several = np.array([len(view) > 1 for view in objects.values() for _ in view])
    sounding = np.array([thing["sounding"] for thing in things])
    for value in (centre_x, centre_y, longer):
        assert stats.kruskal(*(value[kinds == kind] for kind in KINDS)).pvalue > 1e-3
        assert stats.kruskal(value[several & sounding], value[several & ~sounding]).pvalue > 1e-3


# ---------------------------------------------------------------- sounds


def test_sounds_are_16_khz_mono_16_bit_and_not_clipped(root):
    for path in (root / "audio").iterdir():
        sound = soundfile.info(path)
        assert (sound.samplerate, sound.channels, sound.subtype, sound.frames) == (16000, 1, "PCM_16", 25600)
        assert np.abs(soundfile.read(path)[0]).max() < 0.99


def test_loudness_tells_nothing_about_the_kind(root, objects):
    levels = collections.defaultdict(list)
    for name, view in objects.items():
        waveform, _ = soundfile.read(root / "audio" / f"{name}.wav")
        levels[next(thing["kind"] for thing in view if thing["sounding"])].append(20 * np.log10(waveform.std()))
    assert stats.kruskal(*levels.values()).pvalue > 1e-3
    low, high = np.percentile(list(itertools.chain(*levels.values())), (1, 99))
    assert -37 < low < -33 and -23 < high < -19


@pytest.mark.parametrize("kind", KINDS)
def test_noise_lies_10_to_20_db_below_and_sounds_vary(kind):
    sounds, noises = zip(*(synthetic_kinds.make_sound(kind, np.random.default_rng(i)) for i in range(8)))
    ratios = [10 * np.log10(np.mean(a**2) / np.mean(b**2)) for a, b in zip(sounds, noises)]
    assert min(ratios) > 9.99 and max(ratios) < 20.01 and np.ptp(ratios) > 2
    correlation = np.corrcoef(np.stack(sounds))
    assert np.isfinite(correlation).all() and np.abs(correlation[np.triu_indices(8, 1)]).max() < 0.9


def test_interactive_entries_share_the_picture_and_hear_their_own_kind(tmp_path, monkeypatch):
    loudness = {kind: (i + 1) / 20 for i, kind in enumerate(KINDS)}
    monkeypatch.setattr(synthetic, "make_sound", lambda kind, rng: (np.full(100, loudness[kind]), np.zeros(100)))
    for folder in ("frames", "audio"):
        (tmp_path / folder).mkdir()
    entries = synthetic.write_sample((tmp_path, 0, "interactive", 4))
    pictures = {(tmp_path / "frames" / f"{name}.jpg").read_bytes() for name, _ in entries}
    assert len(entries) == 2 and len(pictures) == 1
    for name, view in entries:
        kind = name.removeprefix("interactive_000004_")
        assert [thing["kind"] for thing in view if thing["sounding"]] == [kind]
        assert soundfile.read(tmp_path / "audio" / f"{name}.wav")[0][0] == pytest.approx(loudness[kind], abs=1e-3)


# ---------------------------------------------------------------- the loaders of the real sets


@pytest.mark.parametrize("split", ["test", "distractor", "interactive"])
def test_the_loader_of_the_real_sets_reads_it(root, objects, split):
    name = "synthetic" if split == "test" else f"synthetic_{split}"
    pairs = dataset.build_test_set(name, str(root), None, "metadata", 112, synthetic_kinds.AUDIO_SECONDS)
    assert [pair.id for pair in pairs.pairs] == ids_of(root, split) and not pairs.missing
    sample = pairs[1]
    (thing,) = [thing for thing in objects[sample.id] if thing["sounding"]]
    left, top, right, bottom = thing["bbox"]
    assert sample.class_name == thing["kind"] and sample.image.shape == (3, 112, 112)
    assert sample.truth.mean().item() == pytest.approx((right - left) * (bottom - top), rel=0.1)


def test_the_training_loader_reads_it(root):
    pairs = dataset.select_training_pairs("synthetic", str(root), "metadata").pairs
    train, held_out = dataset.hold_out("synthetic", pairs, str(root), None, 0.1, 0)
    assert (len(train), len(held_out)) == (COUNTS["train"], COUNTS["val"])


# ---------------------------------------------------------------- how hard it is


def test_what_does_not_hear_points_wrong_at_least_half_the_time(numbers):
    for split in ("distractor", "interactive"):
        for pointer, scores in numbers[split].items():
            assert scores["pointing"] <= 0.5, (split, pointer)
            assert scores.get("both_pointing", 0) <= 0.25, (split, pointer)
    assert set(numbers["interactive"]["saliency"]) == {"pointing", "cIoU", "both_pointing", "IIoU"}


def test_the_deaf_oracle_guesses_among_the_objects_in_view(numbers):
    assert numbers["test"]["oracle"] == pytest.approx({"pointing": 1, "cIoU": 1})
    assert numbers["distractor"]["oracle"]["pointing"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert numbers["interactive"]["oracle"] == pytest.approx(
        {"pointing": 0.5, "cIoU": 0.5, "both_pointing": 0.25, "IIoU": 0.25}
    )


def test_neither_colour_nor_spectrum_alone_gives_the_kind_away(numbers):
    accuracy = numbers["class_accuracy"]
    assert 0.5 < accuracy["colour"] <= 0.95 and 0.15 < accuracy["spectrum"] <= 0.8


def test_probe_scores_a_right_and_a_wrong_map():
    boxes = [[[0.25, 0.25, 0.75, 0.75]]] * 2
    right = np.zeros((MAP_SIZE, MAP_SIZE))
    right[56:168, 56:168] = 1
    wrong = synthetic_probe.blob(0.05, 0.95)
    assert synthetic_probe.score_maps([right, right], boxes, {"a": [0, 1]}) == {
        "pointing": 1,
        "cIoU": 1,
        "both_pointing": 1,
        "IIoU": 1,
    }
    assert synthetic_probe.score_maps([right, wrong], boxes, {"a": [0, 1]}) == {
        "pointing": 0.5,
        "cIoU": 0.5,
        "both_pointing": 0,
        "IIoU": 0,
    }


def test_saliency_finds_a_patch_on_a_plain_ground():
    picture = np.full((SIDE, SIDE, 3), 120, np.uint8)
    picture[20:60, 70:110] = np.random.default_rng(0).integers(0, 255, (40, 40, 3))
    box = [70 / SIDE, 20 / SIDE, 110 / SIDE, 60 / SIDE]
    assert synthetic_probe.score_maps([synthetic_probe.contrast_saliency(picture)], [[box]], {})["pointing"] == 1


# ---------------------------------------------------------------- command line


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(synthetic, "COUNTS", TINY)


def test_main_writes_once_then_has_nothing_to_do(tmp_path, capsys, tiny):
    arguments = ["--out", str(tmp_path / "set"), "--seed", "1", "--train", "13"]
    synthetic.main(arguments)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}
    assert "written" in capsys.readouterr().out and len(ids_of(tmp_path / "set", "train")) == 13
    synthetic.main(arguments)
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}


def test_other_settings_are_refused_unless_forced(tmp_path, capsys, tiny, monkeypatch):
    out = tmp_path / "set"
    synthetic.main(["--out", str(out)])
    (out / "frames" / "mine.jpg").write_bytes(b"not of the set")
    capsys.readouterr()
    assert "--force" in failure(capsys, "--out", out, "--seed", 1)
    assert "--force" in failure(capsys, "--out", out, "--train", 5, "--probe")
    for constant in synthetic_kinds.difficulty():
        with monkeypatch.context() as change:
            change.setattr(synthetic_kinds, constant, 0.9)
            assert "--force" in failure(capsys, "--out", out), constant
    synthetic.main(["--out", str(out), "--train", "5", "--force"])
    pictures = {path.stem for path in (out / "frames").glob("*.jpg")}
    assert {name for name in pictures if name.startswith("train")} == set(ids_of(out, "train")) and "mine" in pictures
    assert len(ids_of(out, "train")) == 5


def test_a_folder_with_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("words")
    assert "--force" in failure(capsys, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--seed", "-1"], "--seed"),
        (["--seed", "one"], "--seed"),
        (["--train", "0"], "--train"),
        (["--train", "2.5"], "--train"),
        (["--json", "numbers.json"], "--probe"),
        (["--preview", "sheet.gif"], ".png"),
        (["--prob"], "--prob"),
        (["--out"], "--out"),
    ],
)
def test_wrong_flags_end_with_one_line(tmp_path, capsys, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    assert named in failure(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_probe_makes_the_set_prints_a_table_and_writes_the_numbers(tmp_path, capsys, tiny, monkeypatch):
    monkeypatch.setitem(TINY, "test", 10)
    synthetic.main(["--out", str(tmp_path / "set"), "--seed", "2", "--probe", "--json", str(tmp_path / "numbers.json")])
    table, numbers = capsys.readouterr().out, json.loads((tmp_path / "numbers.json").read_text())
    assert f"{100 * numbers['test']['saliency']['pointing']:.1f}" in table and "by mean colour" in table
    synthetic.main(["--out", str(tmp_path / "set"), "--probe"])  # takes the set as it is, whatever its seed
    assert capsys.readouterr().out in table
    (tmp_path / "set" / "frames" / "test_000001.jpg").unlink()
    assert "test_000001.jpg" in failure(capsys, "--out", tmp_path / "set", "--probe")
    (tmp_path / "set" / "objects.json").write_text("{")
    assert "objects.json" in failure(capsys, "--out", tmp_path / "set", "--probe")


def test_preview_draws_a_sheet_and_no_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    synthetic.main(["--preview", "sheet.png"])
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    assert cv2.imread("sheet.png").shape[0] > 500


def test_generate_refuses_unknown_and_empty_splits(tmp_path):
    for counts in ({"valid": 3}, {"test": 0}):
        with pytest.raises(ValueError, match="counts"):
            synthetic.generate(tmp_path / "set", counts=counts)


def test_an_interrupted_set_is_made_anew(tmp_path):
    counts = dict.fromkeys(("train", "val", "test", "distractor", "interactive"), 1)
    synthetic.generate(tmp_path / "whole", counts=counts)
    synthetic.generate(tmp_path / "broken", counts=counts)
    (tmp_path / "broken" / "unfinished").touch()
    (tmp_path / "broken" / "frames" / "train_000000.jpg").write_bytes(b"half")
    assert synthetic.generate(tmp_path / "broken", counts=counts)
    for path in (tmp_path / "whole").rglob("*.*"):
        assert (tmp_path / "broken" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
