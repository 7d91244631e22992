"""Detection where some pairs have no source in view: the reference numbers, and by hand."""

import numpy as np
import pytest
from conftest import GOLDEN
from sklearn.metrics import average_precision_score

from scoring.detection import Confidence, detection_scores


def test_detection_matches_the_reference():
    golden = np.load(GOLDEN / "evaluation_public.npz")
    ious, confidence = golden["detection_iou"], golden["detection_confidence"]
    has_source = golden["detection_num_boxes"] > 0
    by_bar = [detection_scores(ious, confidence, has_source, bar) for bar in (0.3, 0.5, 0.75)]
    found = [scores["AP"] for scores in by_bar] + [by_bar[1]["max_F1"], by_bar[1]["max_F1_11"]]
    assert np.allclose(found, golden["detection_summary"], rtol=0, atol=1e-6)


def test_detection_by_hand():
    ious, confidence = np.array([0.9, 0.2, 0.0, 0.8]), np.array([0.9, 0.8, 0.7, 0.1])
    has_source = np.array([True, True, False, True])
    scores = detection_scores(ious, confidence, has_source)
    # confident from 0.9 down: 1 of 1 right; 1 of 2; 1 of 3; 2 of 4. Recall 1/3, 1/2, 1/2, 1
    assert scores["max_F1"] == pytest.approx(2 * 0.5 * 1 / 1.5)
    # cuts are all confidences but the largest: precision 1/2, 1/3, 2/4 -> best from there on 1/2
    assert scores["AP"] == pytest.approx(0.5 * (1 / 2 - 1 / 2) + 0.5 * (1 - 1 / 2))
    with pytest.raises(ValueError, match="confidence"):
        detection_scores(ious, np.full(4, np.nan), has_source)


@pytest.mark.parametrize("decimals", [1, 9])
def test_a_resample_scores_as_the_pairs_written_out(decimals):
    """To the last bit, with and without ties; the presence is scikit-learn's average precision."""
    rng = np.random.default_rng(decimals)
    for count in (1, 2, 37, 450):
        confidence, there = rng.normal(size=count).round(decimals), rng.random(count) < 0.6
        right, drawn = there & (rng.random(count) < 0.5), rng.integers(0, 3, count)
        drawn[0] = 1
        rows = np.repeat(np.arange(count), drawn)
        short, long = Confidence(confidence, there).drawn(drawn), Confidence(confidence[rows], there[rows]).drawn()
        assert short.scores(right) == long.scores(right[rows])
        if there[rows].any():
            assert short.presence() == long.presence() == average_precision_score(there[rows], confidence[rows])
        else:
            assert np.isnan(short.presence())
