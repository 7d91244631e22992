"""Data sets as their authors and downloaders leave them, each as a miniature tree that the check calls complete."""

import json

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from annotations import load_boxes
from dataset import TEST_SETS, TRAIN_SETS, decode_for_evaluation, find_pairs
from utils import UserError

VGG = ("--8puiAGLhs", 30), ("abcdefghij_", 7)  # youtube id and start
FLICKR = ("10000130166", "10007936344")


def image(path, level=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (level, 0, 0)).save(path)


def mask(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((30, 40), 255, np.uint8)).save(path)


def sound(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = np.random.default_rng([seed, *path.name.encode()]).uniform(-0.3, 0.3, 96000)
    if path.suffix == ".mp3":
        with av.open(str(path), "w", format="mp3") as file:
            stream = file.add_stream("libmp3lame", rate=16000, layout="mono")
            frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), "fltp", "mono")
            frame.rate, frame.pts = 16000, 0
            file.mux(stream.encode(frame))
            file.mux(stream.encode())
    else:
        soundfile.write(path, wave, 16000)


def check(cli, root, testset, metadata, **more):
    flags = [part for name, value in more.items() for part in (f"--{name}", value)]
    done = cli("prepare_data", "check", "--testset", testset, "--test_data_path", root, "--metadata", metadata,
               "--workers", 0, *flags)  # fmt: skip
    return done.returncode == 0 and "complete: every pair" in done.stdout, done.stdout + done.stderr


@pytest.fixture(autouse=True)
def small_sets(monkeypatch):
    """Without the published numbers of pairs, which a miniature has not."""
    import dataset_avs

    for table in (TEST_SETS, TRAIN_SETS, dataset_avs.AVS_SETS):
        for name, row in table.items():
            monkeypatch.setitem(table, name, row._replace(expected=0))
    import sets

    monkeypatch.setattr(sets, "ALL_SETS", TEST_SETS | dataset_avs.AVS_SETS)
    monkeypatch.setattr("prepare.check.ALL_SETS", TEST_SETS | dataset_avs.AVS_SETS)


VGG_TREES = {
    "youtube id and start": ("frames/{id}_{s:06d}.jpg", "audio/{id}_{s:06d}.wav"),
    "seconds": ("frames/{id}_{s}_{e}.jpg", "audio/{id}_{s}_{e}.flac"),
    "milliseconds": ("frames/{id}_{ms}.jpg", "audio/Y{id}_{ms}.wav"),
    "out": ("frames/v{id}_{s}_{e}_out.jpg", "audio/v{id}_{s}_{e}_out.wav"),
    "decimals": ("frames/{id}_{s}.000_{e}.000.png", "audio/{id}_{s}.000_{e}.000.mp3"),
    "SSLalignment": (
        "VGGSound_v1/VGGSound_img/{id}_{ms}_{me}/image_{n:03d}.jpg", "VGGSound_v1/VGGSound_aud/{id}_{ms}_{me}.wav",
    ),
}  # fmt: skip


@pytest.mark.parametrize("tree", VGG_TREES)
def test_vggsound_of_several_downloaders(tree, cli, tmp_path):
    image_name, audio_name = VGG_TREES[tree]
    for video, start in VGG:
        names = {"id": video, "s": start, "e": start + 10, "ms": 1000 * start, "me": 1000 * start + 10_000}
        for number in range(1, 101) if "{n" in image_name else (0,):
            image(tmp_path / image_name.format(n=number, **names), number)
        sound(tmp_path / audio_name.format(**names))
    ids = [f"{video}_{start:06d}" for video, start in VGG]
    boxes = [{"file": name, "class": "owl", "bbox": [[0.1, 0.1, 0.5, 0.5]]} for name in ids]
    (tmp_path / "vggss.json").write_text(json.dumps(boxes))
    complete, printed = check(cli, tmp_path, "vggss", tmp_path)
    assert complete, printed
    pairs, _ = find_pairs(tmp_path, "vggsound", ids)
    assert [pair.id for pair in pairs] == ids
    if "{n" in image_name:
        assert abs(int(decode_for_evaluation(pairs[0], 32, 1.0).image[16, 16, 0]) - 50) < 3  # image_050.jpg
    if tree != "milliseconds":  # the form alone does not settle it
        found, _ = find_pairs(tmp_path, "vggsound", None, downloaded=True)
        assert sorted(pair.id for pair in found) == sorted(ids)


@pytest.mark.parametrize("frames", ["frames/{}.jpg", "frames/{}.mp4/{:04d}.jpg", "frames/{}/{:04d}.jpg"])
@pytest.mark.parametrize("audio", ["audio/{}.mp4.mp3", "mp3/{}.mp4.mp3", "audio/{}.wav"])
def test_flickr_soundnet_as_released(frames, audio, cli, tmp_path):
    for name in FLICKR:
        for number in (1, 2, 3):
            image(tmp_path / frames.format(name, number))
        sound(tmp_path / audio.format(name))
        (tmp_path / "Annotations").mkdir(exist_ok=True)
        box = "<bbox><label/><x>10</x><y>10</y><x>90</x><y>90</y></bbox>"
        (tmp_path / f"Annotations/{name}.xml").write_text(f"<a><b>{box}</b></a>")
    (tmp_path / "flickr_test.csv").write_text("10000130166,202\n10007936344,0\n")
    complete, printed = check(cli, tmp_path, "flickr", tmp_path)
    assert complete, printed


@pytest.mark.parametrize("subset", ["s4", "ms3"])
@pytest.mark.parametrize("folder", ["", "AVSBench/"])
def test_avsbench_in_its_authors_folders_with_its_lists(subset, folder, cli, tmp_path):
    home = tmp_path / folder / ("Single-source" if subset == "s4" else "Multi-sources")
    base = home / f"{subset}_data"
    for video in ("vid_a", "vid_b_1"):
        below = "test/dog" if subset == "s4" else "test"
        for number in range(1, 6):
            name = f"{video}_{number}.png"
            shown = f"{below}/{video}/{name}" if subset == "s4" else f"{video}/{video}.mp4_{number}.png"
            image(base / "visual_frames" / shown, 10 * number)
            mask(base / "gt_masks" / below / video / name)
        sound(base / "audio_wav" / below / f"{video}.wav")
    lines = ["name,start,category,split", "vid_a,0,dog,test", "vid_b_1,0,dog,test"]
    if subset == "ms3":
        lines = ["video_id,split", "vid_a,test", "vid_b_1,test"]
    (home / f"{subset}_meta_data.csv").write_text("\n".join(lines))
    complete, printed = check(cli, tmp_path, subset, tmp_path / "nowhere")
    assert complete, printed


@pytest.mark.parametrize(
    ("testset", "layout", "masks", "annotation"),
    [
        ("is3", "", "", "synthetic3240_bbox.json"),
        ("is3", "synthetic3241/", "", "synthetic3240_bbox.json"),
        ("is3_seg", "synthetic3241/", "gt_masks", "synthetic3240_seg.json"),
        ("vpo_ss", "SSL_COCO/COCO_AV/", "", "vpo_ss_bbox.json"),
        ("vpo_ss_seg", "SSL_COCO/COCO_AV/", "gray_masks", "vpo_ss_seg.json"),
        ("vpo_ms", "COCO_AV_MS/", "", "vpo_ms_bbox.json"),
    ],
)
def test_is3_and_vpo_in_the_folders_of_sslalignment(testset, layout, masks, annotation, cli, tmp_path):
    home, author = tmp_path / layout, "/elsewhere/" + layout
    entries = []
    for name in ("parrot_ukulele_1635_parrot", "parrot_ukulele_1635_ukulele"):
        image(home / "visual_frames" / f"{name}.jpg")
        sound(home / "audio_wav" / f"{name}.wav")
        drawn = f"{author}{masks}/{name}.jpg" if masks else [10.0, 10.0, 90.0, 90.0]
        if masks:
            mask(home / masks / f"{name}.jpg")
        files = {"image": f"{author}visual_frames/{name}.jpg", "audio": f"{author}audio_wav/{name}.wav"}
        entries.append(files | {"gt_box": drawn})
    (tmp_path / annotation).write_text(json.dumps(entries))
    complete, printed = check(cli, tmp_path, testset, tmp_path)
    assert complete, printed


def coco():
    images = [
        {"id": n, "file_name": f"some/folder/{name}.jpg", "width": 200, "height": 100} for n, name in enumerate("ab")
    ]
    drawn = [{"id": 7, "image_id": 0, "category_id": 3, "bbox": [20, 10, 100, 50]}]
    return {"images": images, "annotations": drawn, "categories": [{"id": 3, "name": "dog"}]}


def test_boxes_of_coco_are_read_for_own_pairs(cli, tmp_path):
    for name in "ab":
        image(tmp_path / f"frames/{name}.bmp")
        sound(tmp_path / f"audio/{name}.wav")
    (tmp_path / "frames/notes.txt").write_text("a note")
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(coco()))
    boxes = load_boxes(path)
    assert boxes["a"][0] == "dog" and np.allclose(boxes["a"][1], [[0.1, 0.1, 0.6, 0.6]]) and boxes["b"] == ("", [])
    complete, printed = check(cli, tmp_path, "custom", tmp_path, test_gt_path=path)
    assert complete and "other files" in printed and ".txt" in printed, printed
    broken = coco()
    del broken["images"][0]["width"]
    path.write_text(json.dumps(broken))
    with pytest.raises(UserError, match=r"coco\.json is not COCO's format: KeyError 'width'"):
        load_boxes(path)
