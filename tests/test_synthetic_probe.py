"""How far one gets on the built-in data without learning: not far without hearing."""

import numpy as np
import pytest

import synthetic.probe as synthetic_probe
from maps import MAP_SIZE
from synthetic.generate import SIDE


@pytest.fixture(scope="module")
def numbers(measured_root):
    return synthetic_probe.probe(measured_root)


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
    image = np.full((SIDE, SIDE, 3), 120, np.uint8)
    image[20:60, 70:110] = np.random.default_rng(0).integers(0, 255, (40, 40, 3))
    box = [70 / SIDE, 20 / SIDE, 110 / SIDE, 60 / SIDE]
    assert synthetic_probe.score_maps([synthetic_probe.contrast_saliency(image)], [[box]], {})["pointing"] == 1
