"""The synthetic set's pairs without a source in view, and its pictures to train on with silent objects."""

import collections
import json

import numpy as np
import pytest
import soundfile
from test_synthetic_generate import digests, heard_in, ids_of, kinds_by_role

import dataset
import synthetic.generate as synthetic
import synthetic.kinds as synthetic_kinds
from audio_io import log_spectrogram
from synthetic.generate import SPLITS
from synthetic.kinds import KINDS


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A set of which one whole turn of the plan is off-screen; tests only read it."""
    folder = tmp_path_factory.mktemp("offscreen") / "set"
    synthetic.generate(folder, seed=3, counts={**dict.fromkeys(SPLITS, 1), "offscreen": 180})
    return folder


@pytest.fixture(scope="module")
def objects(root):
    return json.loads((root / "objects.json").read_text())


# ---------------------------------------------------------------- source in view or not


def test_half_have_their_source_in_view_and_the_others_a_third_each_whatever_the_number_of_objects(root, objects):
    reasons = collections.Counter()
    for name, heard in heard_in(root, "offscreen").items():
        sounding = [thing["kind"] for thing in objects[name] if thing["sounding"]]
        assert sounding in ([heard], []) and (sounding or heard not in {thing["kind"] for thing in objects[name]})
        reasons["in view" if sounding else "absent" if heard in KINDS else heard, len(objects[name])] += 1
    assert reasons == {
        (reason, count): 30 if reason == "in view" else 10
        for reason in ("in view", "absent", "silence", "noise")
        for count in (1, 2, 3)
    }


def test_what_is_in_view_tells_nothing_about_presence(root, objects):
    names = ids_of(root, "offscreen")
    views = [[thing["kind"] for thing in objects[name]] for name in names]
    assert views[::2] == views[1::2]
    there = [any(thing["sounding"] for thing in objects[name]) for name in names]
    assert there == [True, False] * 90
    absent = [heard for heard, source in zip(heard_in(root, "offscreen").values(), there) if not source]
    assert {absent.count(kind) for kind in KINDS} == {3}


def test_silence_is_digital_zero_and_noise_is_no_kind(root):
    heard = heard_in(root, "offscreen")
    for name, sound in heard.items():
        waveform, _ = soundfile.read(root / "audio" / f"{name}.wav", dtype="int16")
        assert len(waveform) == synthetic_kinds.SAMPLES and waveform.any() == (sound != synthetic.SILENCE)
    spread = collections.defaultdict(list)
    for name, sound in heard.items():
        spectrogram = log_spectrogram(soundfile.read(root / "audio" / f"{name}.wav")[0])[0]
        spread["kind" if sound in KINDS else sound].append(spectrogram.std().item())
    assert max(spread["silence"]) < 1e-5 and max(spread["noise"]) < np.median(spread["kind"])


def test_pairs_without_a_source_have_no_box_and_are_told_to_the_metrics(root, objects):
    truth = dataset.build_ground_truth("synthetic_offscreen", str(root), None, "metadata")
    names = ids_of(root, "offscreen")
    assert truth.ids == names and truth.silent == set(names[1::2])
    for name in names[:6]:
        assert truth.truth_of(name).any() == (name not in truth.silent)


# ---------------------------------------------------------------- silent objects in training


@pytest.mark.parametrize("most", [2, 3])
def test_pictures_to_train_on_hold_as_many_objects_as_asked_for_and_nothing_else_changes(tmp_path, most):
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
