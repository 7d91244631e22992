"""AVSBench: both layouts, masks, frames that share a sound."""

import json

import numpy as np
import pytest
import soundfile
from conftest import shared_folder
from PIL import Image

import dataset_avs
from utils import UserError

VIDEOS = {"s4": [("vid_a", "dog"), ("vid_b", "cat")], "ms3": [("vid_a", ""), ("vid_b", "")]}


@pytest.fixture(params=[("s4", True), ("s4", False), ("ms3", True), ("ms3", False)], ids=str)
def avs(request, tmp_path):
    """A miniature tree of one subset in one layout, with its list."""
    subset, official = request.param
    for video, category in VIDEOS[subset]:
        for number in range(1, 6):
            if official:
                base = tmp_path / f"{subset}_data"
                image = base / "visual_frames" / "test" / category / video / f"{video}_{number}.png"
                if subset == "ms3":
                    image = base / "visual_frames" / video / f"{video}.mp4_{number}.png"
                mask = base / "gt_masks" / "test" / category / video / f"{video}_{number}.png"
                sound = base / "audio_wav" / "test" / category / f"{video}.wav"
            else:
                base = tmp_path / subset
                image, mask = (base / kind / f"{video}_{number}.png" for kind in ("visual_frames", "gt_masks"))
                sound = base / "audio_wav" / f"{video}.wav"
            for path in (image, mask, sound):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 20), (9 * number, 0, 0)).save(image)
            drawn = np.zeros((20, 30), np.uint8)
            drawn[:, : 6 * (number - 1)] = 1
            Image.fromarray(drawn).convert("P" if number % 2 else "L").save(mask)
            soundfile.write(sound, np.full(8000, 0.1), 16000)
    head = "name,start,category,split" if subset == "s4" else "video_id,split"
    lines = [f"{v},0,{c},test" if subset == "s4" else f"{v},test" for v, c in VIDEOS[subset]]
    extra = "vid_c,0,cat,train" if subset == "s4" else "vid_c,train"
    (tmp_path / f"{subset}_meta_data.csv").write_text("\n".join([head, *lines, extra]))
    return subset, tmp_path


def build(avs, **more):
    subset, root = avs
    return dataset_avs.build_avs_set(subset, str(root), None, str(root), 32, 0.5, **more)


def test_every_frame_of_the_test_split_is_an_item(avs):
    dataset = build(avs)
    assert len(dataset) == 10 and dataset.pairs[4].id == "vid_a_5"
    assert len({pair.audio for pair in dataset.pairs}) == 2
    assert dataset[7].truth.mean().item() == pytest.approx(12 / 30, abs=0.01)
    assert dataset[0].truth.sum() == 0  # an empty mask stays in the set
    assert dataset.class_names[9] == VIDEOS[avs[0]][1][1]
    assert dataset.ground_truth.expected == dataset_avs.AVS_SETS[avs[0]].expected


def test_frames_and_sounds_may_have_any_format(avs):
    image = next(avs[1].rglob("visual_frames/**/vid_a*_2.png"))
    Image.open(image).save(image.with_suffix(".jpg"))
    sound = next(avs[1].rglob("vid_a.wav"))
    soundfile.write(sound.with_suffix(".flac"), *soundfile.read(sound))
    image.unlink()
    sound.unlink()
    dataset = build(avs)
    assert dataset.pairs[1].image.endswith(".jpg") and dataset[1].spectrogram.shape[1] == 257


def test_missing_frames_stop_and_are_counted_when_allowed(avs):
    next(avs[1].rglob("gt_masks/**/vid_b_3.png")).unlink()
    with pytest.raises(UserError, match=r"1 of 10 frames.*vid_b_3"):
        build(avs)
    dataset = build(avs, allow_missing=True)
    assert len(dataset) == 9 and dataset.missing == ["vid_b_3"]


@pytest.mark.filterwarnings("ignore:.*tie at the cut")
def test_maps_are_scored_against_masks_and_boxes_with_frames_of_a_video_as_one_unit(avs, tmp_path, cli):
    subset, root = avs
    frames = [f"{video}_{n}" for video, _ in VIDEOS[subset] for n in range(1, 6)]
    maps = np.random.default_rng(0).random((10, 8, 8))
    np.savez(tmp_path / "m.npz", id=frames, peer=maps, interpolation="bilinear")
    boxes = [{"image": f"/x/{frame}.png", "audio": "/x/y.wav", "gt_box": [0, 0, 100, 224]} for frame in frames]
    (tmp_path / f"{subset}_box.json").write_text(json.dumps(boxes))
    where = ("--test_data_path", root, "--metadata", root, "--test_list", root / f"{subset}_meta_data.csv")
    for name, has_masks in ((subset, True), (f"{subset}_box", False)):
        done = cli("test_model", "--maps", tmp_path / "m.npz", "--testset", name, *where)
        assert done.returncode == 0, done.stderr
        results = json.loads((tmp_path / "m_results" / name / "results.json").read_text())
        assert ("mIoU" in results["maps"]["peer"]) == ("F" in results["maps"]["peer"]) == has_masks
        rows = (tmp_path / "m_results" / name / "per_sample.csv").read_text().splitlines()
        assert sum(",vid_a," in row for row in rows) == 5 and ("peer_jaccard" in rows[0]) == has_masks
    assert results["references"]["ceiling"]["cIoU"] == 1


@pytest.mark.slow
def test_counts_of_the_real_lists():
    folder = shared_folder("metadata")
    assert len(dataset_avs.read_videos(folder / "s4_meta_data.csv")) == 740
    assert len(dataset_avs.read_videos(folder / "ms3_meta_data.csv")) == 64


def test_a_list_of_other_columns_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"x\.csv"):
        dataset_avs.read_videos(tmp_path / "x.csv")
