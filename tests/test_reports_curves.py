"""Training curves: drawn for any log, each kind of number on an axis of its own."""

import cv2
import pytest

import reports.curves as curves


def log_line(epoch):
    losses = {"loss": 3.0 - epoch, "info_nce": 2.5 - epoch, "attention_matching": 1e-4}
    return {"epoch": epoch, **losses, "lr": 5e-5, "val/retrieval_score": 0.5, "synthetic/AUD/cIoU": 0.1 * epoch}


@pytest.mark.parametrize(
    "lines",
    [[log_line(1)], [log_line(0), {"epoch": 1, "loss": None}, log_line(2)], [{"loss": float("nan")}, {"loss": 1.0}]],
    ids=["one epoch", "missing keys", "not finite"],
)
def test_curves_are_drawn_for_any_log(lines, tmp_path):
    curves.plot_curves(lines, tmp_path / "curves.png")
    picture = cv2.imread(str(tmp_path / "curves.png"))
    assert min(picture.shape[:2]) > 300
    coloured = picture.max(2).astype(int) - picture.min(2) > 60
    grey = (picture == 191).all(2)  # the total, under its summands
    assert coloured.sum() + grey.sum() > 40, "no curve is drawn"
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_each_kind_of_number_has_its_axis():
    axes = curves._sort_keys(
        [log_line(1), {"pairs_per_second": 3.0, "note": "text", "synthetic/IQR/cIoU": 0.5, "synthetic/IQR/samples": 9}]
    )
    assert list(axes) == ["losses", "learning rate", "validation", "pairs per second", "synthetic: cIoU"]
    assert list(axes["losses"]) == ["loss", "info_nce", "attention_matching"]
    assert list(axes["synthetic: cIoU"].values()) == ["AUD", "IQR"]
    with pytest.raises(ValueError, match="log"):
        curves.plot_curves([], "unused.png")
