"""The built-in data: reproducible, balanced, apart; sources in view or not; what the sub-command writes and refuses."""

import collections
import hashlib
import itertools
import json

import cv2
import numpy as np
import pytest
import soundfile
from conftest import MEASURED_COUNTS
from scipy import stats

import dataset
import synthetic.generate as synthetic
import synthetic.kinds as synthetic_kinds
from audio_io import log_spectrogram
from synthetic.generate import SIDE, SPLITS
from synthetic.kinds import KINDS

TINY = {"train": 12, "val": 2, "test": 2, "distractor": 11, "interactive": 2, "offscreen": 6}


@pytest.fixture(scope="module")
def other_root(tmp_path_factory):
    """A tiny set of another seed, made by one process; tests only read it."""
    folder = tmp_path_factory.mktemp("synthetic") / "other"
    assert synthetic.generate(folder, seed=5, counts=TINY, processes=1)
    return folder


@pytest.fixture(scope="module")
def objects(measured_root):
    return json.loads((measured_root / "objects.json").read_text())


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


def test_other_seed_shares_no_image_and_no_sound(measured_root, other_root):
    made = [
        {digest for path, digest in digests(folder).items() if path.startswith(("frames", "audio"))}
        for folder in (measured_root, other_root)
    ]
    assert all(made) and len(made[0] & made[1]) == 1  # digital silence


def test_a_sample_does_not_depend_on_how_many_there_are(measured_root, tmp_path):
    synthetic.generate(tmp_path, seed=3, counts=TINY, processes=1)
    for name in ("frames/test_000001.jpg", "audio/distractor_000000.wav", "audio/offscreen_000005.wav"):
        assert (tmp_path / name).read_bytes() == (measured_root / name).read_bytes()


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
    sound = sorted((other_root / "audio").glob(f"{split}_*.wav"))[-1].read_bytes()  # drawn after the image
    assert hashlib.sha256(drawn + sound).hexdigest()[:16] == digest
    image = cv2.imread(str(sorted((other_root / "frames").glob(f"{split}_*.jpg"))[-1]))
    assert image.mean() == pytest.approx(grey, abs=0.05)  # another OpenCV may round otherwise


def test_no_id_image_or_sound_is_in_two_splits(measured_root):
    ids = [ids_of(measured_root, split) for split in SPLITS]
    every = list(itertools.chain(*ids))
    assert len(set(every)) == len(every) == sum(MEASURED_COUNTS.values()) + MEASURED_COUNTS["interactive"]
    splits_of = collections.defaultdict(set)
    for path, digest in digests(measured_root).items():
        if path.startswith(("frames", "audio")):
            splits_of[digest].add(path.split("/")[1].split("_")[0])
    assert all(len(splits) == 1 for splits in splits_of.values())
    sounds = [digest for path, digest in digests(measured_root).items() if path.startswith("audio")]
    silent = list(heard_in(measured_root, "offscreen").values()).count(synthetic.SILENCE)
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
    assert len(pairs) >= MEASURED_COUNTS["distractor"] + MEASURED_COUNTS["interactive"]
    for a, b in pairs:
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_image_shows_the_object_in_its_box_and_nowhere_else(monkeypatch):
    monkeypatch.setattr(synthetic, "draw_background", lambda rng: np.zeros((SIDE, SIDE, 3)))
    image, (box,) = synthetic.make_image(["clock"], np.random.default_rng(0))
    left, top, right, bottom = (round(SIDE * edge) for edge in box)
    inside = image[top:bottom, left:right].astype(int).copy()
    image[top:bottom, left:right] = 0
    assert inside.mean() > 60 and image.max() < 25


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
    assert counts["distractor"] == {2: 100, 3: 100} and counts["offscreen"] == {1: 60, 2: 60, 3: 60}


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


def test_sounds_are_16_khz_mono_16_bit_and_not_clipped(measured_root):
    for path in (measured_root / "audio").iterdir():
        sound = soundfile.info(path)
        assert (sound.samplerate, sound.channels, sound.subtype, sound.frames) == (16000, 1, "PCM_16", 25600)
        assert np.abs(soundfile.read(path)[0]).max() < 0.99


def test_loudness_tells_nothing_about_the_kind(measured_root):
    levels = collections.defaultdict(list)
    for name, heard in itertools.chain.from_iterable(heard_in(measured_root, split).items() for split in SPLITS):
        if heard != synthetic.SILENCE:
            waveform, _ = soundfile.read(measured_root / "audio" / f"{name}.wav")
            levels[heard].append(20 * np.log10(waveform.std()))
    assert len(levels) == len(KINDS) + 1  # and noise
    assert stats.kruskal(*levels.values()).pvalue > 1e-3
    low, high = np.percentile(list(itertools.chain(*levels.values())), (1, 99))
    assert -37 < low < -33 and -23 < high < -19


def test_interactive_entries_share_the_image_and_hear_their_own_kind(tmp_path, monkeypatch):
    loudness = {kind: (i + 1) / 20 for i, kind in enumerate(KINDS)}
    monkeypatch.setattr(synthetic, "make_sound", lambda kind, rng: (np.full(100, loudness[kind]), np.zeros(100)))
    for folder in ("frames", "audio"):
        (tmp_path / folder).mkdir()
    entries = synthetic.write_sample(synthetic.Task(tmp_path, 0, "interactive", 4))
    images = {(tmp_path / "frames" / f"{entry.name}.jpg").read_bytes() for entry in entries}
    assert len(entries) == 2 and len(images) == 1
    for name, heard, view in entries:
        kind = name.removeprefix("interactive_000004_")
        assert heard == kind and [thing["kind"] for thing in view if thing["sounding"]] == [kind]
        assert soundfile.read(tmp_path / "audio" / f"{name}.wav")[0][0] == pytest.approx(loudness[kind], abs=1e-3)


# ---------------------------------------------------------------- source in view or not


def test_half_have_their_source_in_view_and_the_others_a_third_each_for_any_number_of_objects(measured_root, objects):
    reasons = collections.Counter()
    for name, heard in heard_in(measured_root, "offscreen").items():
        sounding = [thing["kind"] for thing in objects[name] if thing["sounding"]]
        assert sounding in ([heard], []) and (sounding or heard not in {thing["kind"] for thing in objects[name]})
        reasons["in view" if sounding else "absent" if heard in KINDS else heard, len(objects[name])] += 1
    assert reasons == {
        (reason, count): 30 if reason == "in view" else 10
        for reason in ("in view", "absent", "silence", "noise")
        for count in (1, 2, 3)
    }


def test_what_is_in_view_tells_nothing_about_presence(measured_root, objects):
    names = ids_of(measured_root, "offscreen")
    views = [[thing["kind"] for thing in objects[name]] for name in names]
    assert views[::2] == views[1::2]
    there = [any(thing["sounding"] for thing in objects[name]) for name in names]
    assert there == [True, False] * 90
    absent = [heard for heard, source in zip(heard_in(measured_root, "offscreen").values(), there) if not source]
    assert {absent.count(kind) for kind in KINDS} == {3}


def test_silence_is_digital_zero_and_noise_is_no_kind(measured_root):
    heard = heard_in(measured_root, "offscreen")
    for name, sound in heard.items():
        waveform, _ = soundfile.read(measured_root / "audio" / f"{name}.wav", dtype="int16")
        assert len(waveform) == synthetic_kinds.SAMPLES and waveform.any() == (sound != synthetic.SILENCE)
    spread = collections.defaultdict(list)
    for name, sound in heard.items():
        spectrogram = log_spectrogram(soundfile.read(measured_root / "audio" / f"{name}.wav")[0])[0]
        spread["kind" if sound in KINDS else sound].append(spectrogram.std().item())
    assert max(spread["silence"]) < 1e-5 and max(spread["noise"]) < np.median(spread["kind"])


def test_pairs_without_a_source_have_no_box_and_are_told_to_the_metrics(measured_root, objects):
    truth = dataset.build_ground_truth("synthetic_offscreen", str(measured_root), None, "metadata")
    names = ids_of(measured_root, "offscreen")
    assert truth.ids == names and truth.silent == set(names[1::2])
    for name in names[:6]:
        assert truth.truth_of(name).any() == (name not in truth.silent)


# ---------------------------------------------------------------- silent objects in training


@pytest.mark.parametrize("most", [2, 3])
def test_images_to_train_on_hold_as_many_objects_as_asked_for_and_nothing_else_changes(tmp_path, most):
    counts = {**dict.fromkeys(SPLITS, 2), "train": 10 * most, "val": 10 * most}
    one, several = tmp_path / "one", tmp_path / "several"
    synthetic.generate(one, counts=counts)
    synthetic.generate(several, counts=counts, train_objects=most)
    objects = json.loads((several / "objects.json").read_text())
    for split in ("train", "val"):
        views = [view for name, view in objects.items() if name.startswith(split)]
        assert collections.Counter(map(len, views)) == dict.fromkeys(range(1, most + 1), 10)
        assert all([thing["sounding"] for thing in view] == [True] + [False] * (len(view) - 1) for view in views)
        for kinds in kinds_by_role(objects, split):
            assert set(kinds) == set(KINDS) and len(set(kinds.values())) == 1
    changed = {path for path, digest in digests(several).items() if digests(one)[path] != digest}
    assert all(path.split("/")[-1].startswith(("train", "val", "objects", "synthetic")) for path in changed)
    assert "frames/train_000010.jpg" in changed and "frames/train_000009.jpg" not in changed


# ---------------------------------------------------------------- the loaders of the real sets


@pytest.mark.parametrize("split", ["test", "distractor", "interactive", "offscreen"])
def test_the_loader_of_the_real_sets_reads_it(measured_root, objects, split):
    name = "synthetic" if split == "test" else f"synthetic_{split}"
    pairs = dataset.build_test_set(name, str(measured_root), None, "metadata", 112, synthetic_kinds.AUDIO_SECONDS)
    assert [pair.id for pair in pairs.pairs] == ids_of(measured_root, split) and not pairs.missing
    sample = pairs[2]
    (thing,) = [thing for thing in objects[sample.id] if thing["sounding"]]
    left, top, right, bottom = thing["bbox"]
    assert sample.class_name == thing["kind"] and sample.image.shape == (3, 112, 112)
    assert sample.truth.mean().item() == pytest.approx((right - left) * (bottom - top), rel=0.1)


def test_the_training_loader_reads_it(measured_root):
    pairs = dataset.select_training_pairs("synthetic", str(measured_root), "metadata").pairs
    train, held_out = dataset.hold_out("synthetic", pairs, str(measured_root), None, 0.1, 0)
    assert (len(train), len(held_out)) == (MEASURED_COUNTS["train"], MEASURED_COUNTS["val"])


# ---------------------------------------------------------------- what is refused, and made anew


def test_generate_refuses_unknown_and_empty_splits(tmp_path):
    for counts in ({"valid": 3}, {"test": 0}):
        with pytest.raises(ValueError, match="counts"):
            synthetic.generate(tmp_path / "set", counts=counts)


def test_an_interrupted_set_is_made_anew(tmp_path):
    counts = dict.fromkeys(SPLITS, 1)
    synthetic.generate(tmp_path / "whole", counts=counts)
    synthetic.generate(tmp_path / "broken", counts=counts)
    (tmp_path / "broken" / "unfinished").touch()
    (tmp_path / "broken" / "frames" / "train_000000.jpg").write_bytes(b"half")
    assert synthetic.generate(tmp_path / "broken", counts=counts)
    for path in (tmp_path / "whole").rglob("*.*"):
        assert (tmp_path / "broken" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
