"""Pictures: written whole, of the right size, showing what they claim."""

import cv2
import numpy as np
import pytest
import torch

import reports.pictures as pictures
from dataset import build_test_set
from maps import normalize_maps, smooth_maps, upsample_maps
from model_slot import JointSlotModel
from models import load
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
    blended = pictures.overlay(image, heat)
    assert blended.shape == (64, 64, 3) and blended.dtype == np.uint8
    redness = blended[..., 0].astype(float) - blended[..., 2]
    assert redness[:, 40:60].mean() > redness[:, :20].mean() + 30
    for column in range(64):  # under one colour the photo keeps all its contrast but a factor
        contrast = blended[:, column].std(axis=0) / image[:, column].std(axis=0)
        assert (contrast > 0.3).all() and (contrast < 0.6).all()
    assert (pictures.overlay(image.transpose(2, 0, 1), torch.from_numpy(heat)) == blended).all()
    with pytest.raises(ValueError, match="does not fit"):
        pictures.overlay(image, heat[:10])
    with pytest.raises(ValueError, match="uint8"):
        pictures.overlay(image / 255, heat)


def test_the_outline_surrounds_the_truth_and_leaves_the_rest(sample):
    image, truth, _ = sample
    drawn = pictures.draw_truth(image, truth)
    green = (drawn == pictures.TRUTH_COLOUR).all(2)
    assert green[10, 20:50].all() and green[10:40, 20].all() and green[39, 20:50].all() and green[10:40, 49].all()
    assert (drawn[16:34, 26:44] == image[16:34, 26:44]).all() and (drawn[46:] == image[46:]).all()
    assert (pictures.draw_truth(image, 0.4 * truth) == image).all()  # only G >= 0.5 is outlined


def test_denormalising_returns_the_pixels(sample):
    image = torch.from_numpy(sample[0]).permute(2, 0, 1)
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    assert (pictures.denormalize((image / 255 - mean) / std, MEAN, STD) == sample[0]).all()


def test_a_panel_shows_every_map_and_a_sheet_every_panel(sample, tmp_path):
    image, truth, heat = sample
    panel = pictures.sample_panel(image, truth, {"AUD": heat, "IQR": truth}, title="a dog")
    assert panel.shape == (64 + 58, 72 * 4 + 8, 3)
    assert (panel[26:90, 8:72] == image).all()
    assert (panel[26:90, 80 + 144 : 80 + 144 + 64] == pictures.draw_truth(pictures.overlay(image, truth), truth)).all()
    assert (panel[:26] < 128).any(), "the title is missing"
    for left in range(8, 296, 72):
        assert (panel[90:114, left : left + 64] < 160).any(), "a label is missing"
    pictures.contact_sheet([panel, panel[:, :200]], tmp_path / "sheets" / "sheet.png", header="x" * 500)
    sheet = read(tmp_path / "sheets" / "sheet.png")
    assert sheet.shape == (44 + 2 * 122 + 8, 296, 3)
    assert (sheet[44:166] == panel).all()
    assert (sheet[:40, 288:] == 255).all(), "the header runs out of the sheet"
    assert [path.name for path in (tmp_path / "sheets").iterdir()] == ["sheet.png"]
    with pytest.raises(ValueError, match="panel"):
        pictures.contact_sheet([], tmp_path / "none.png")


def test_labels_carry_the_given_iou(sample):
    image, truth, heat = sample
    wide = [np.repeat(np.repeat(x, 4, 0), 4, 1) for x in (image, truth, heat)]
    panels = [
        pictures.sample_panel(wide[0], wide[1], {"AUD": wide[2]}, ious=ious) for ious in ({"AUD": 0.25}, {}, None)
    ]
    rest = [(panel[: 26 + 256] == panels[0][: 26 + 256]).all() for panel in panels]
    assert all(rest) and not (panels[0] == panels[1]).all() and not (panels[0] == panels[2]).all()


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
def trained(checkpoints):
    return {label: load(file) for label, file in checkpoints.items()}


@pytest.fixture
def pairs(synthetic_root):
    return build_test_set("synthetic_interactive", str(synthetic_root), None, "metadata", 64, 0.8)


def test_models_stand_side_by_side_with_the_map_that_each_draws_of_each_sound(trained, pairs, tmp_path):
    places = [3, 2, 9]  # both sounds of one image, the second first, and one of another
    ids = [pairs.pairs[i].id for i in places]
    pictures.side_by_side(trained, pairs, ids, tmp_path / "sheet.png")
    sheet = read(tmp_path / "sheet.png")
    assert sheet.shape == (44 + 3 * (224 + 58) + 8, 4 * 232 + 8, 3)
    shown = set()
    for row, place in enumerate(places):
        sample, top = pairs[place], 44 + 282 * row + 26
        image = pictures.images_of(pairs.pairs)(sample.id)
        assert (sheet[top : top + 224, 8:232] == image).all()
        for column, ((model, *_), (sharpening, smoothing)) in enumerate(zip(trained.values(), ASKED), start=2):
            raw = model.localize(sample.image[None], sample.spectrogram[None], sharpening).audio_map
            heat = normalize_maps(upsample_maps(smooth_maps(raw, smoothing)))[0]
            drawn = pictures.draw_truth(pictures.overlay(image, heat), sample.truth)
            tile = sheet[top : top + 224, 8 + 232 * column :][:, :224]
            assert np.abs(tile.astype(int) - drawn).max() <= 3  # a batch rounds otherwise
            shown.add(tile.tobytes())
    assert len(shown) == 6, "two of the maps are one"


def test_the_images_of_the_built_in_data_are_shown_with_both_their_sounds_and_each_file_is_read_once(
    checkpoints, trained, pairs, synthetic_root, tmp_path, reads
):
    pictures.side_by_side_on_synthetic(checkpoints, synthetic_root, tmp_path / "both.png", images=2)
    assert reads == [*checkpoints.values()]
    pictures.side_by_side(trained, pairs, [pair.id for pair in pairs.pairs[:4]], tmp_path / "expected.png")
    assert (read(tmp_path / "both.png") == read(tmp_path / "expected.png")).all()


def test_what_cannot_stand_side_by_side_is_named(trained, pairs, synthetic_root, tmp_path):
    ids, sheet = [pair.id for pair in pairs.pairs[:2]], tmp_path / "sheet.png"
    with pytest.raises(UserError, match="1 ids are not of synthetic_interactive: nobody"):
        pictures.side_by_side(trained, pairs, [*ids, "nobody"], sheet)
    with pytest.raises(UserError, match="two or more"):
        pictures.side_by_side(trained, pairs, ids[:1], sheet)
    larger = build_test_set("synthetic_interactive", str(synthetic_root), None, "metadata", 112, 0.8)
    with pytest.raises(UserError, match=r"0\.pth cannot be drawn .* image_size 64 and not 112"):
        pictures.side_by_side(trained, larger, ids, sheet)
    assert not sheet.exists()
