"""The synthetic set: reproducible, balanced, and not to be had without hearing."""

import collections
import hashlib
import itertools
import json

import cv2
import numpy as np
import pytest
import soundfile
from scipy import stats

import dataset
import synthetic.generate as synthetic
import synthetic.kinds as synthetic_kinds
import synthetic.probe as synthetic_probe
from maps import MAP_SIZE
from synthetic.generate import SIDE, SPLITS
from synthetic.kinds import KINDS

COUNTS = {"train": 100, "val": 20, "test": 150, "distractor": 200, "interactive": 60, "offscreen": 60}
TINY = {"train": 12, "val": 2, "test": 2, "distractor": 11, "interactive": 2, "offscreen": 6}


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


def heard_in(folder, split):
    """{id: what is heard, by the annotation}"""
    return {entry["file"]: entry["class"] for entry in json.loads((folder / f"{split}.json").read_text())}


# ---------------------------------------------------------------- reproducible, and apart


def test_same_seed_same_bytes_for_any_number_of_processes(other_root, tmp_path):
    synthetic.generate(tmp_path, seed=5, counts=TINY, processes=3)
    assert digests(tmp_path) == digests(other_root)


def test_other_seed_shares_no_picture_and_no_sound(root, other_root):
    made = [
        {digest for path, digest in digests(folder).items() if path.startswith(("frames", "audio"))}
        for folder in (root, other_root)
    ]
    assert all(made) and len(made[0] & made[1]) == 1  # digital silence


def test_a_sample_does_not_depend_on_how_many_there_are(root, tmp_path):
    synthetic.generate(tmp_path, seed=3, counts=TINY, processes=1)
    for name in ("frames/test_000001.jpg", "audio/distractor_000000.wav", "audio/offscreen_000005.wav"):
        assert (tmp_path / name).read_bytes() == (root / name).read_bytes()


@pytest.mark.parametrize(
    "split, digest, grey",
    [
        ("train", "3304e5fa33b44083", 124.03),
        ("val", "39145f6ac21a176e", 158.34),
        ("test", "16976c7894e78876", 113.08),
        ("distractor", "63c7c25103353605", 114.13),
        ("interactive", "f9cec9fa879b0bf4", 110.23),
    ],
)
def test_a_new_split_or_flag_leaves_the_other_splits_as_they_were(other_root, split, digest, grey):
    drawn = (other_root / f"{split}.json").read_bytes()  # kinds and boxes, in whole pixels
    sound = sorted((other_root / "audio").glob(f"{split}_*.wav"))[-1].read_bytes()  # drawn after the picture
    assert hashlib.sha256(drawn + sound).hexdigest()[:16] == digest
    picture = cv2.imread(str(sorted((other_root / "frames").glob(f"{split}_*.jpg"))[-1]))
    assert picture.mean() == pytest.approx(grey, abs=0.05)  # another OpenCV may round otherwise


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
    silent = list(heard_in(root, "offscreen").values()).count(synthetic.SILENCE)
    assert len(sounds) == len(every) and len(set(sounds)) == len(sounds) - silent + 1


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
    if split in ("distractor", "interactive", "offscreen"):
        assert set(silent) == set(KINDS) and len(set(silent.values())) == 1
    else:
        assert not silent
    if split == "interactive":
        assert sounding == silent


def test_views_hold_the_promised_objects(objects):
    counts = collections.defaultdict(collections.Counter)
    for name, view in objects.items():
        assert len({thing["kind"] for thing in view}) == len(view)
        assert sum(thing["sounding"] for thing in view) == 1 or name.startswith("offscreen")
        counts[name.split("_")[0]][len(view)] += 1
    assert counts["train"] == {1: 100} and counts["interactive"] == {2: 120}
    assert counts["distractor"] == {2: 100, 3: 100} and counts["offscreen"] == {1: 20, 2: 20, 3: 20}


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


def test_loudness_tells_nothing_about_the_kind(root):
    levels = collections.defaultdict(list)
    for name, heard in itertools.chain.from_iterable(heard_in(root, split).items() for split in SPLITS):
        if heard != synthetic.SILENCE:
            waveform, _ = soundfile.read(root / "audio" / f"{name}.wav")
            levels[heard].append(20 * np.log10(waveform.std()))
    assert len(levels) == len(KINDS) + 1  # and noise
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
    entries = synthetic.write_sample(synthetic.Task(tmp_path, 0, "interactive", 4))
    pictures = {(tmp_path / "frames" / f"{entry.name}.jpg").read_bytes() for entry in entries}
    assert len(entries) == 2 and len(pictures) == 1
    for name, heard, view in entries:
        kind = name.removeprefix("interactive_000004_")
        assert heard == kind and [thing["kind"] for thing in view if thing["sounding"]] == [kind]
        assert soundfile.read(tmp_path / "audio" / f"{name}.wav")[0][0] == pytest.approx(loudness[kind], abs=1e-3)


# ---------------------------------------------------------------- the loaders of the real sets


@pytest.mark.parametrize("split", ["test", "distractor", "interactive", "offscreen"])
def test_the_loader_of_the_real_sets_reads_it(root, objects, split):
    name = "synthetic" if split == "test" else f"synthetic_{split}"
    pairs = dataset.build_test_set(name, str(root), None, "metadata", 112, synthetic_kinds.AUDIO_SECONDS)
    assert [pair.id for pair in pairs.pairs] == ids_of(root, split) and not pairs.missing
    sample = pairs[2]
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
    assert numbers["offscreen"]["saliency"]["pointing"] <= 0.35
    assert set(numbers["interactive"]["saliency"]) == {"pointing", "cIoU", "both_pointing", "IIoU"}


def test_the_deaf_oracle_guesses_among_the_objects_in_view(numbers):
    assert numbers["test"]["oracle"] == pytest.approx({"pointing": 1, "cIoU": 1})
    assert numbers["distractor"]["oracle"]["pointing"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert numbers["offscreen"]["oracle"]["pointing"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3 / 2)
    assert numbers["interactive"]["oracle"] == pytest.approx(
        {"pointing": 0.5, "cIoU": 0.5, "both_pointing": 0.25, "IIoU": 0.25}
    )


def test_neither_colour_nor_spectrum_alone_gives_the_kind_away(numbers):
    accuracy = numbers["class_accuracy"]
    assert 0.5 < accuracy["colour"] <= 0.95 and 0.15 < accuracy["spectrum"] <= 0.8


def test_neither_sense_alone_tells_whether_the_source_is_in_view(numbers):
    presence = numbers["presence_AP"]
    assert presence["objects"] == pytest.approx(0.5) and 0.4 < presence["saliency"] < 0.6
    assert presence["ear"] == pytest.approx(0.75) and presence["loudness"] < 0.75 and presence["peaks"] < 0.85


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
