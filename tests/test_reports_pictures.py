"""Pictures and tables: written whole, of the right size, showing what they claim."""

import cv2
import numpy as np
import pytest
import torch

import reports.pictures as visualize
import reports.table as report
from dataset import build_test_set
from maps import normalize_maps, smooth_maps, upsample_maps
from model_slot import JointSlotModel
from utils import UserError, save_checkpoint

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
    truth = np.zeros((64, 64), dtype=np.float32)
    truth[10:40, 20:50] = 1
    heat = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(64, axis=0)
    return image, truth, heat


def read(path):
    return cv2.imread(str(path))[..., ::-1]


def test_an_overlay_is_warm_where_the_map_is_and_keeps_the_photo_readable(sample):
    image, _, heat = sample
    blended = visualize.overlay(image, heat)
    assert blended.shape == (64, 64, 3) and blended.dtype == np.uint8
    redness = blended[..., 0].astype(float) - blended[..., 2]
    assert redness[:, 40:60].mean() > redness[:, :20].mean() + 30
    for column in range(64):  # under one colour the photo keeps all its contrast but a factor
        contrast = blended[:, column].std(axis=0) / image[:, column].std(axis=0)
        assert (contrast > 0.3).all() and (contrast < 0.6).all()
    assert (visualize.overlay(image.transpose(2, 0, 1), torch.from_numpy(heat)) == blended).all()
    with pytest.raises(ValueError, match="does not fit"):
        visualize.overlay(image, heat[:10])
    with pytest.raises(ValueError, match="uint8"):
        visualize.overlay(image / 255, heat)


def test_the_outline_surrounds_the_truth_and_leaves_the_rest(sample):
    image, truth, _ = sample
    drawn = visualize.draw_truth(image, truth)
    green = (drawn == visualize.TRUTH_COLOUR).all(2)
    assert green[10, 20:50].all() and green[10:40, 20].all() and green[39, 20:50].all() and green[10:40, 49].all()
    assert (drawn[16:34, 26:44] == image[16:34, 26:44]).all() and (drawn[46:] == image[46:]).all()
    assert (visualize.draw_truth(image, 0.4 * truth) == image).all()  # only G >= 0.5 is outlined


def test_denormalising_returns_the_pixels(sample):
    image = torch.from_numpy(sample[0]).permute(2, 0, 1)
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    assert (visualize.denormalize((image / 255 - mean) / std, MEAN, STD) == sample[0]).all()


def test_a_panel_shows_every_map_and_a_sheet_every_panel(sample, tmp_path):
    image, truth, heat = sample
    panel = visualize.sample_panel(image, truth, {"AUD": heat, "IQR": truth}, title="a dog")
    assert panel.shape == (64 + 58, 72 * 4 + 8, 3)
    assert (panel[26:90, 8:72] == image).all()
    assert (
        panel[26:90, 80 + 144 : 80 + 144 + 64] == visualize.draw_truth(visualize.overlay(image, truth), truth)
    ).all()
    assert (panel[:26] < 128).any(), "the title is missing"
    for left in range(8, 296, 72):
        assert (panel[90:114, left : left + 64] < 160).any(), "a label is missing"
    visualize.contact_sheet([panel, panel[:, :200]], tmp_path / "sheets" / "sheet.png", header="x" * 500)
    sheet = read(tmp_path / "sheets" / "sheet.png")
    assert sheet.shape == (44 + 2 * 122 + 8, 296, 3)
    assert (sheet[44:166] == panel).all()
    assert (sheet[:40, 288:] == 255).all(), "the header runs out of the sheet"
    assert [path.name for path in (tmp_path / "sheets").iterdir()] == ["sheet.png"]
    with pytest.raises(ValueError, match="panel"):
        visualize.contact_sheet([], tmp_path / "none.png")


def test_labels_carry_the_given_iou(sample):
    image, truth, heat = sample
    wide = [np.repeat(np.repeat(x, 4, 0), 4, 1) for x in (image, truth, heat)]
    panels = [
        visualize.sample_panel(wide[0], wide[1], {"AUD": wide[2]}, ious=ious) for ious in ({"AUD": 0.25}, {}, None)
    ]
    rest = [(panel[: 26 + 256] == panels[0][: 26 + 256]).all() for panel in panels]
    assert all(rest) and not (panels[0] == panels[1]).all() and not (panels[0] == panels[2]).all()


def log_line(epoch):
    losses = {"loss": 3.0 - epoch, "info_nce": 2.5 - epoch, "attention_matching": 1e-4}
    return {"epoch": epoch, **losses, "lr": 5e-5, "val/retrieval_score": 0.5, "synthetic/AUD/cIoU": 0.1 * epoch}


@pytest.mark.parametrize(
    "lines",
    [[log_line(1)], [log_line(0), {"epoch": 1, "loss": None}, log_line(2)], [{"loss": float("nan")}, {"loss": 1.0}]],
    ids=["one epoch", "missing keys", "not finite"],
)
def test_curves_are_drawn_for_any_log(lines, tmp_path):
    visualize.plot_curves(lines, tmp_path / "curves.png")
    picture = read(tmp_path / "curves.png")
    assert min(picture.shape[:2]) > 300
    coloured = picture.max(2).astype(int) - picture.min(2) > 60
    grey = (picture == 191).all(2)  # the total, under its summands
    assert coloured.sum() + grey.sum() > 40, "no curve is drawn"
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_each_kind_of_number_has_its_axis():
    axes = visualize._sort_keys(
        [log_line(1), {"pairs_per_second": 3.0, "note": "text", "synthetic/IQR/cIoU": 0.5, "synthetic/IQR/samples": 9}]
    )
    assert list(axes) == ["losses", "learning rate", "validation", "pairs per second", "synthetic: cIoU"]
    assert list(axes["losses"]) == ["loss", "info_nce", "attention_matching"]
    assert list(axes["synthetic: cIoU"].values()) == ["AUD", "IQR"]
    with pytest.raises(ValueError, match="log"):
        visualize.plot_curves([], "unused.png")


# ---------------------------------------------------------------- the table


def results():
    scores = {"cIoU": 0.852, "AUC": 0.6526, "cIoU_half": 0.41, "AUC_half": 0.4, "mean_iou": 0.5, "mAP": float("nan")}
    recalls = {"R@1": 0.125, "R@5": 0.5, "R@10": 1.0}
    return {
        "testset": "vggss",
        "maps": {"IQR": scores, "AUD": scores | {"listening": -0.004, "empty": 2}, "AUD_wrong": scores},
        "references": {"ceiling": {"cIoU": 1.0, "cIoU_half": 0.505}, "centred_disc": {"cIoU": 0.34}},
        "retrieval": {"by_pair": {"image_to_audio": recalls, "audio_to_image": recalls}},
        "pairs": {"scored": 5100, "expected": 5158, "left_out": ["a", "b"]},
        "checkpoint": {"path": "demo.pth", "epoch": 12, "selected_by": "validation recall"},
        "settings": {"alpha": 0.6, "interpolation": "bicubic"},
    }


def test_the_table_orders_maps_and_prints_percent():
    lines = report.results_table(results()).splitlines()
    starts = [line.split("  ")[0] for line in lines]
    order = ["AUD", "AUD_wrong", "IQR", "ceiling", "centred disc"]
    assert [start for start in starts if start in order] == order
    aud = lines[starts.index("AUD")]
    assert aud.split() == ["AUD", "85.2", "65.3", "41.0", "40.0", "-", "50.0", "-", "-"]
    assert "listening of AUD: -0.4" in "\n".join(lines)
    assert len({len(line) for line in lines if line.split("  ")[0] in order}) == 1, "columns are not aligned"
    text = "\n".join(lines)
    assert "IIoU" not in text
    for piece in (
        "R@10 100.0",
        "R@1  12.5",
        "5,100 of 5,158 pairs scored, 2 left out",
        "demo.pth, epoch 12",
        "alpha 0.6",
        "2 pairs",
    ):
        assert piece in text


def test_the_table_shows_interactive_columns_only_where_they_exist():
    with_pairs = results()
    with_pairs["maps"]["AUD"] = with_pairs["maps"]["AUD"] | {"IIoU": 0.2, "both_pointing": 0.3}
    heads = [line for line in report.results_table(with_pairs).splitlines() if line.startswith("map ")]
    assert "IIoU" in heads[1] and "both_pointing" in heads[1] and "IAUC" not in heads[1] and len(heads) == 2


def test_the_table_shows_intervals_where_they_are_known():
    known = results() | {"intervals": {"AUD": {"cIoU": [0.81, 0.89], "listening": [-0.02, 0.01]}}}
    text = report.results_table(known)
    assert "81.0 to 89.0" in text and "listening of AUD: -0.4 (-2.0 to 1.0)" in text


def test_the_table_tolerates_missing_parts():
    for missing in ("references", "retrieval", "pairs", "checkpoint", "settings"):
        partial = {key: value for key, value in results().items() if key != missing}
        assert "85.2" in report.results_table(partial)
    assert "tie at the cut" in report.results_table({"testset": "x", "maps": {"AUD": {"tied_half": 3}}})


# ---------------------------------------------------------------- several models side by side


ASKED = (0.1, 0.0), (3.0, 0.25)  # sharpening and smoothing; the first is of older code, which did not smooth


@pytest.fixture
def checkpoints(tmp_path):
    """Two untrained models, each with a way of its own to be asked for maps."""
    files = {}
    for seed, (sharpening, smoothing) in enumerate(ASKED):
        torch.manual_seed(seed)
        model = JointSlotModel("small", 16, image_size=64, audio_seconds=0.8)
        files[f"model {seed}"] = tmp_path / f"{seed}.pth"
        asked = {"infer_sharpening": sharpening} | ({"infer_smoothing": smoothing} if smoothing else {})
        state = {"model": model.state_dict(), "model_config": model.config, "args": asked}
        save_checkpoint(files[f"model {seed}"], state)
    return files


@pytest.fixture
def pairs(synthetic_root):
    return build_test_set("synthetic_interactive", str(synthetic_root), None, "metadata", 64, 0.8)


def test_models_stand_side_by_side_with_the_map_that_each_draws_of_each_sound(checkpoints, pairs, tmp_path):
    places = [3, 2, 9]  # both sounds of one picture, the second first, and one of another
    ids = [pairs.pairs[i].id for i in places]
    report.side_by_side(checkpoints, pairs, ids, tmp_path / "sheet.png")
    sheet = read(tmp_path / "sheet.png")
    assert sheet.shape == (44 + 3 * (224 + 58) + 8, 4 * 232 + 8, 3)
    shown = set()
    for row, place in enumerate(places):
        sample, top = pairs[place], 44 + 282 * row + 26
        picture = report.pictures_of(pairs.pairs)(sample.id)
        assert (sheet[top : top + 224, 8:232] == picture).all()
        for column, (file, (sharpening, smoothing)) in enumerate(zip(checkpoints.values(), ASKED), start=2):
            model = JointSlotModel.from_checkpoint(file)
            raw = model.localize(sample.image[None], sample.spectrogram[None], sharpening).audio_map
            heat = normalize_maps(upsample_maps(smooth_maps(raw, smoothing)))[0]
            drawn = visualize.draw_truth(visualize.overlay(picture, heat), sample.truth)
            tile = sheet[top : top + 224, 8 + 232 * column :][:, :224]
            assert np.abs(tile.astype(int) - drawn).max() <= 3  # a batch rounds otherwise
            shown.add(tile.tobytes())
    assert len(shown) == 6, "two of the maps are one"


def test_the_pictures_of_the_built_in_data_are_shown_with_both_their_sounds(
    checkpoints, pairs, synthetic_root, tmp_path
):
    report.side_by_side_on_synthetic(checkpoints, synthetic_root, tmp_path / "both.png", pictures=2)
    report.side_by_side(checkpoints, pairs, [pair.id for pair in pairs.pairs[:4]], tmp_path / "expected.png")
    assert (read(tmp_path / "both.png") == read(tmp_path / "expected.png")).all()


def test_what_cannot_stand_side_by_side_is_named(checkpoints, pairs, synthetic_root, tmp_path):
    ids, sheet = [pair.id for pair in pairs.pairs[:2]], tmp_path / "sheet.png"
    with pytest.raises(UserError, match="1 ids are not of synthetic_interactive: nobody"):
        report.side_by_side(checkpoints, pairs, [*ids, "nobody"], sheet)
    with pytest.raises(UserError, match="two or more"):
        report.side_by_side(checkpoints, pairs, ids[:1], sheet)
    larger = build_test_set("synthetic_interactive", str(synthetic_root), None, "metadata", 112, 0.8)
    with pytest.raises(UserError, match=r"0\.pth cannot stand .* image_size 64 and not 112"):
        report.side_by_side(checkpoints, larger, ids, sheet)
    assert not sheet.exists()
