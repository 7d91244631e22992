"""Silence, noise and off-screen audio: what they are, and that nothing but the seed decides."""

import numpy as np
import pytest
import torch

from audio_io import log_spectrogram
from dataset import TrainingPairs, build_test_set
from scoring.negative_audio import WithNegativeAudio, noise, silence
from utils import UserError

SIZES = {"image_size": 64, "audio_seconds": 0.8}


@pytest.fixture(scope="module")
def dataset(synthetic_root):
    return build_test_set("synthetic", str(synthetic_root), None, "", **SIZES)


def test_silence_is_digital_zero_and_noise_standard_normal():
    assert torch.equal(silence(0.8), log_spectrogram(np.zeros(12800)))
    assert torch.equal(noise(0.8, 3, 4), noise(0.8, 3, 4)) and not torch.equal(noise(0.8, 3, 4), noise(0.8, 3, 5))
    drawn = np.random.default_rng((3, 4)).standard_normal(12800, np.float32)
    assert drawn.std() == pytest.approx(1, abs=0.02)
    assert torch.equal(noise(0.8, 3, 4), log_spectrogram(drawn))


def test_offscreen_audio_is_of_another_class_where_classes_are_known_else_of_another_id(dataset):
    classes = dataset.ground_truth.class_of
    known, unknown = WithNegativeAudio(dataset, 0, classes), WithNegativeAudio(dataset, 0)
    ids = [pair.id for pair in dataset.pairs]
    assert all(classes[i] != classes[ids[j]] for i, j in zip(ids, known.partner, strict=True))
    assert sorted(unknown.partner) == list(range(len(ids))) and (unknown.partner != np.arange(len(ids))).all()
    assert known.offscreen == "another class" and unknown.offscreen == "another id (classes are not known)"
    one_class = WithNegativeAudio(dataset, 0, dict.fromkeys(ids, "x"))
    assert one_class.offscreen == f"another class ({len(ids)} of the same one, for lack of another)"
    sample, _, offscreen = known[3]
    assert sample.id == ids[3]
    assert torch.equal(offscreen, dataset[int(known.partner[3])].spectrogram)


def test_the_order_of_the_pairs_changes_neither_partner_nor_noise(dataset):
    forward, back = (
        WithNegativeAudio(TrainingPairs(pairs, **SIZES, augment="none"), seed=1)
        for pairs in (dataset.pairs, dataset.pairs[::-1])
    )
    (one, *negative), (other, *same) = forward[2], back[len(dataset) - 3]
    assert one.id == other.id
    assert all(torch.equal(a, b) for a, b in zip(negative, same, strict=True))
    another_seed = WithNegativeAudio(TrainingPairs(dataset.pairs, **SIZES, augment="none"), seed=2)[2]
    assert not torch.equal(another_seed[1], negative[0])


def test_one_pair_has_no_offscreen_audio(dataset):
    with pytest.raises(UserError, match="two or more"):
        WithNegativeAudio(TrainingPairs(dataset.pairs[:1], **SIZES, augment="none"))
