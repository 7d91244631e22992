"""Negative audio, several sources, frames of videos: from the command line to the figures."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_dataset_sources import avatar, write_image, write_tone  # noqa: F401  (a fixture)
from test_scoring_negatives import reference

from annotations import load_boxes
from dataset import build_test_set
from maps import enlarge_absolute
from scoring.negative_audio import WithNegativeAudio
from utils import load_checkpoint, save_checkpoint


@pytest.fixture
def run(cli):
    return lambda *arguments: cli("test_model", "--gpu", "cpu", "--num_workers", "0", *arguments)


@pytest.fixture(scope="session")
def thresholded(checkpoint):
    """The small untrained model, with a universal threshold near the middle of its shares."""
    path = checkpoint.with_name("thresholded.pth")
    chosen = {"value": 0.5, "rule": "by hand", "pairs": 2, "pairs_from": "nowhere", "offscreen": "none", "seed": 0}
    save_checkpoint(path, load_checkpoint(checkpoint) | {"threshold": chosen})
    return path


def read(folder, name):
    return json.loads((folder / name / "results.json").read_text())


def test_a_model_is_asked_with_negative_audio_and_its_saved_maps_score_the_same(
    thresholded, synthetic_root, tmp_path, run
):
    name = "synthetic_distractor"
    where = ("--testset", name, "--test_data_path", synthetic_root)
    done = run(
        "--checkpoint", thresholded, *where, "--imagenet_weights", "none", "--out_dir", tmp_path / "one", "--save_maps",
        "--negatives", "offscreen,silence,noise", "--negative_seeds", "2", "--batch_size", "7",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = read(tmp_path / "one", name)
    figures = results["maps"]["AUD_share"]
    assert results["negatives"]["kinds"] == ["silence", "noise", "offscreen"] and results["negatives"]["seeds"] == [
        0,
        1,
    ]
    assert results["negatives"]["thresholds"]["AUD_share"]["value"] == 0.5
    assert {"F_LOC", "F_AUC", "pIA", "change_noise_offscreen"} <= results["intervals"]["AUD_share"].keys()
    assert len(results["negatives"]["over_seeds"]["AUD_share"]["pIA_noise"]) == 2
    assert "F_LOC" in results["by_class"][next(iter(results["by_class"]))]["maps"]["AUD_share"]
    assert "Negative audio" in done.stdout and "F_LOC" not in results["maps"]["AUD"]

    stored = dict(np.load(tmp_path / "one" / name / "maps.npz"))
    assert stored["AUD_share_noise"].shape[:2] == (20, 2) and stored["AUD_share_silence"].shape[1] == 1
    order = np.argsort(stored["id"])
    own, *asked = (
        enlarge_absolute(torch.from_numpy(stored[f"AUD_share{end}"][order]).flatten(0, -3)).numpy()
        for end in ("", "_silence", "_noise", "_offscreen")
    )
    asked = {kind: maps.reshape(20, -1, 224, 224) for kind, maps in zip(("silence", "noise", "offscreen"), asked)}
    dataset = build_test_set(name, str(synthetic_root), None, "", 64, 0.8)
    truth = np.stack([dataset.ground_truth.truth_of(i).numpy() for i in stored["id"][order]])
    few = slice(0, 20, 4)  # the second computation goes pixel by pixel
    part = reference(own[few, ::8, ::8], {k: v[few, :, ::8, ::8] for k, v in asked.items()}, truth[few, ::8, ::8], 0.5)
    assert part.keys() <= figures.keys()
    exact = {kind: (maps > np.float32(0.5)).mean((2, 3)) for kind, maps in asked.items()}
    assert all(figures[f"pIA_{kind}"] == pytest.approx(lit.mean(), abs=1e-9) for kind, lit in exact.items())
    same = [(a & b).sum() / max((a | b).sum(), 1) if (a | b).any() else 1.0 for a, b in
            zip(own > np.float32(0.5), asked["silence"][:, 0] > np.float32(0.5), strict=True)]  # fmt: skip
    assert figures["change_own_silence"] == pytest.approx(np.mean(same), abs=1e-9)

    again = run("--maps", tmp_path / "one" / name / "maps.npz", *where, "--out_dir", tmp_path / "two")
    assert again.returncode == 0, again.stderr
    other = read(tmp_path / "two", name)
    assert other["maps"]["AUD_share"]["F_LOC"] == pytest.approx(figures["F_LOC"], abs=1e-12)
    assert other["negatives"]["thresholds"] == {"AUD_share": {"value": 0.5, "from": "the file"}}
    compared = run("--compare", *(tmp_path / part / name / "results.json" for part in ("one", "two")))
    assert compared.returncode == 0, compared.stderr
    assert "F_LOC" in compared.stdout and "NOTE negative audio" in compared.stdout
    share = next(line for line in compared.stdout.splitlines() if "AUD_share | AUD_share" in line)
    assert "+0.0 [+0.0, +0.0]" in share or "0.0 [0.0, 0.0]" in share
    rows = list(csv.DictReader((tmp_path / "two" / name / "per_sample.csv").open()))
    assert np.mean([float(row["AUD_share_lit_noise"]) for row in rows]) == pytest.approx(figures["pIA_noise"])


def test_off_screen_sounds_are_never_of_what_the_image_shows(synthetic_root):
    dataset = build_test_set("synthetic_distractor", str(synthetic_root), None, "", 64, 0.8)
    objects = json.loads((synthetic_root / "objects.json").read_text())
    classes = dataset.ground_truth.class_of
    for seed in range(4):
        asked = WithNegativeAudio(dataset, seed, classes)
        for i, j in enumerate(asked.partner):
            shown = {thing["kind"] for thing in objects[dataset.pairs[i].id]}
            assert classes[dataset.pairs[j].id] not in shown
        assert asked.offscreen == "another class"


def test_the_size_of_a_batch_changes_no_figure_of_negative_audio(thresholded, synthetic_root, tmp_path, run):
    found = []
    for size in ("3", "64"):
        flags = "--imagenet_weights", "none", "--negatives", "noise", "--batch_size", size
        done = run("--checkpoint", thresholded, "--testset", "synthetic", "--test_data_path", synthetic_root, *flags,
                   "--out_dir", tmp_path / size)  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(read(tmp_path / size, "synthetic")["maps"]["AUD_share"])
    assert found[0] == pytest.approx(found[1], abs=1e-3, nan_ok=True)
    assert found[0]["pIA"] == found[0]["pIA_noise"] and "pIA_silence" not in found[0]


def test_a_model_without_a_threshold_says_how_to_get_one(checkpoint, synthetic_root, tmp_path, run):
    where = ("--checkpoint", checkpoint, "--testset", "synthetic", "--test_data_path", synthetic_root)
    done = run(*where, "--imagenet_weights", "none", "--out_dir", tmp_path, "--negatives", "silence")
    assert done.returncode == 2 and "python -m scoring.threshold" in done.stderr.splitlines()[-1]
    done = run(*where, "--negatives", "silence,thunder")
    assert done.returncode == 2 and "thunder" in done.stderr.splitlines()[-1]


# ---------------------------------------------------------------- maps of any method


@pytest.fixture
def stored(synthetic_root, tmp_path):
    """A function that writes a file of random maps for the test split, with more arrays."""
    ids = list(load_boxes(synthetic_root / "test.json"))

    def write(**more):
        rng = np.random.default_rng(0)
        arrays = {"mine": rng.random((20, 7, 7)), "mine_silence": rng.random((20, 7, 7)) ** 3}
        arrays |= {"mine_noise": rng.random((20, 3, 7, 7)) ** 2, "mine_offscreen": rng.random((20, 3, 5, 6))}
        arrays = {name: values for name, values in (arrays | more).items() if values is not None}
        np.savez(tmp_path / "mine.npz", id=ids, **arrays)
        return tmp_path / "mine.npz", ids

    return write


def test_maps_of_any_method_have_the_figures_of_the_definitions(stored, synthetic_root, tmp_path, run):
    path, ids = stored(mine_threshold=0.7, deaf=np.random.default_rng(1).random((20, 7, 7)))
    done = run("--maps", path, "--testset", "synthetic", "--test_data_path", synthetic_root, "--out_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    results = read(tmp_path, "synthetic")
    assert [*results["maps"]] == ["mine", "deaf"] and "F_LOC" not in results["maps"]["deaf"]
    arrays = np.load(path)
    asked = {kind: arrays[f"mine_{kind}"] for kind in ("silence", "noise", "offscreen")}
    asked = {kind: maps[:, None] if maps.ndim == 3 else maps for kind, maps in asked.items()}
    large = {k: torch.nn.functional.interpolate(torch.from_numpy(v), (224, 224), mode="bilinear", align_corners=True)
             for k, v in asked.items()}  # fmt: skip
    lit = {kind: (maps > 0.7).double().mean((2, 3)).numpy() for kind, maps in large.items()}
    figures = results["maps"]["mine"]
    for kind, shares in lit.items():
        assert figures[f"pIA_{kind}"] == pytest.approx(shares.mean(), abs=1e-9)
        curve = [(shares <= i / 20).mean() for i in range(21)]
        assert figures[f"AUC_N_{kind}"] == pytest.approx(np.trapezoid(curve, dx=0.05), abs=1e-9)
    own = torch.nn.functional.interpolate(
        torch.from_numpy(arrays["mine"])[:, None], (224, 224), mode="bilinear", align_corners=True
    )[:, 0]
    boxes = build_test_set("synthetic", str(synthetic_root), None, "", 64, 0.8).ground_truth
    ious = []
    for region, name in zip(own >= 0.7, ids, strict=True):
        truth = boxes.truth_of(name)
        ious.append(((region * truth).sum() / (truth.sum() + (region & (truth == 0)).sum())).item())
    assert figures["cIoU_u"] == pytest.approx(np.mean(ious), abs=1e-6)
    dark = 1 - np.mean([shares.mean() for shares in lit.values()])
    assert figures["F_LOC"] == pytest.approx(2 * np.mean(ious) * dark / (np.mean(ious) + dark), abs=1e-6)


def test_a_threshold_that_no_file_gives_comes_from_its_negatives_and_says_so(stored, synthetic_root, tmp_path, run):
    path, _ = stored()
    where = ("--testset", "synthetic", "--test_data_path", synthetic_root, "--out_dir", tmp_path)
    done = run("--maps", path, *where)
    assert done.returncode == 0, done.stderr
    arrays = np.load(path)
    largest = []
    for kind in ("silence", "noise", "offscreen"):
        maps = torch.from_numpy(arrays[f"mine_{kind}"])
        largest.append(enlarge_absolute(maps.reshape(-1, *maps.shape[-2:])).flatten(1).amax(1).numpy())
    chosen = read(tmp_path, "synthetic")["negatives"]["thresholds"]["mine"]
    assert chosen["value"] == pytest.approx(np.quantile(np.concatenate(largest), 0.75))
    assert "not universal" in chosen["from"] and "not universal" in done.stdout
    path, _ = stored(threshold=0.25, mine_noise=None)
    assert run("--maps", path, *where).returncode == 0
    results = read(tmp_path, "synthetic")["negatives"]
    assert results["thresholds"]["mine"]["value"] == 0.25 and results["kinds"] == ["silence", "offscreen"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"mine_noise": np.zeros((20, 7))}, "mine_noise"),
        ({"mine_noise": np.zeros((19, 7, 7))}, "mine_noise"),
        ({"mine_noise": np.zeros((20, 2, 7, 7))}, "equally many seeds"),
        ({"mine_noise": np.full((20, 7, 7), np.nan)}, "not finite"),
        ({"mine_threshold": np.nan}, "mine_threshold"),
        ({"mine_threshold": np.zeros(3)}, "mine_threshold"),
    ],
)
def test_negatives_that_cannot_be_scored_are_named(stored, synthetic_root, tmp_path, run, more, says):
    path, _ = stored(**more)
    done = run("--maps", path, "--testset", "synthetic", "--test_data_path", synthetic_root, "--out_dir", tmp_path)
    assert done.returncode == 2 and says in done.stderr.splitlines()[-1], done.stderr


# ---------------------------------------------------------------- several sources, frames of videos


def test_the_built_in_duet_is_asked_with_the_mixture_and_with_each_sound(thresholded, synthetic_root, tmp_path, run):
    few = tmp_path / "few.txt"
    few.write_text("".join(f"test_{i:06}\n" for i in range(5)))
    where = ("--testset", "synthetic_duet", "--test_data_path", synthetic_root, "--test_list", few)
    done = run(
        "--checkpoint", thresholded, *where, "--save_maps", "--imagenet_weights", "none", "--out_dir", tmp_path,
        "--save_visualizations", "--report",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = read(tmp_path, "synthetic_duet")
    assert {"CIoU@0.3", "IoU@0.5", "CAP", "PIAP", "CAP_median", "CAP_swapped"} <= results["maps"]["AUD"].keys()
    assert results["maps"]["AUD"]["PIAP"] == pytest.approx(results["maps"]["AUD"]["CAP"])  # one map for both
    assert {"AUD", "AUD_alone", "AUD_wrong"} <= results["maps"].keys() and results["pairs"]["scored"] == 10
    assert results["maps"]["AUD_alone"]["PIAP"] >= results["maps"]["AUD_alone"]["CAP"] - 0.05
    assert "Several sources" in done.stdout and (tmp_path / "synthetic_duet" / "report.html").is_file()
    maps = np.load(tmp_path / "synthetic_duet" / "maps.npz")
    first, second = maps["AUD"][maps["id"] == maps["id"][0]][0], maps["AUD"][maps["id"] == maps["id"][1]][0]
    assert first.shape[1] == 2 * first.shape[0] and (first == second).all()
    again = run("--maps", tmp_path / "synthetic_duet" / "maps.npz", *where, "--out_dir", tmp_path / "two")
    assert again.returncode == 0, again.stderr
    assert read(tmp_path / "two", "synthetic_duet")["maps"]["AUD"] == pytest.approx(results["maps"]["AUD"], nan_ok=True)


def test_avatar_has_figures_by_task_and_a_share_of_frames_that_stay_dark(thresholded, avatar, tmp_path, run):  # noqa: F811
    done = run(
        "--checkpoint", thresholded, "--testset", "avatar", "--test_data_path", avatar, "--imagenet_weights", "none",
        "--out_dir", tmp_path / "out", "--negatives", "silence",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = read(tmp_path / "out", "avatar")
    assert set(results["parts"]) == {"single-sound", "mixed-sound", "multi-entity", "off-screen", "cross-event"}
    assert results["parts"]["mixed-sound"]["samples"] == 2 and results["parts"]["off-screen"]["samples"] == 1
    assert results["parts"]["off-screen"]["maps"]["AUD_share"]["TN_u"] in (0, 1)
    assert "TN_u" not in results["parts"]["mixed-sound"]["maps"]["AUD_share"]
    assert "[x, y, width, height]" in results["notes"][0] and "mixed-sound" in done.stdout


# ---------------------------------------------------------------- noise in the audio, the page, masks


def test_noise_in_the_audio_gives_the_same_figures_again_at_every_level(thresholded, synthetic_root, tmp_path, run):
    few = tmp_path / "few.txt"
    few.write_text("".join(f"test_{i:06}\n" for i in range(6)))
    where = ("--testset", "synthetic", "--test_data_path", synthetic_root, "--test_list", few)
    flags = ("--imagenet_weights", "none", "--out_dir", tmp_path, "--snr", "0,120", "--report")
    done = run("--checkpoint", thresholded, *where, *flags)
    assert done.returncode == 0, done.stderr
    results = read(tmp_path, "synthetic")
    assert [*results["snr"]] == ["120", "0"] and "signal to noise" in done.stdout
    clean, faint, loud = (found["maps"]["AUD"]["mean_iou"] for found in (results, *results["snr"].values()))
    assert faint == pytest.approx(clean, abs=1e-3) and abs(loud - clean) > abs(faint - clean)
    assert {"maps", "intervals", "retrieval"} == results["snr"]["0"].keys()
    assert "F_LOC" in results["snr"]["0"]["maps"]["AUD_share"]  # the page has negative audio by itself
    text = (tmp_path / "synthetic" / "report.html").read_text()
    data = json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert data["shown"][:5] == [
        "AUD",
        "AUD_share",
        *(f"AUD_share_{kind}" for kind in ("silence", "noise", "offscreen")),
    ]
    assert len(data["samples"]["lit"]["AUD_share_noise"]) == 6 and len(data["harder"]) == 3
    done = run("--checkpoint", thresholded, *where, "--snr", "5,loud")
    assert done.returncode == 2 and "loud" in done.stderr.splitlines()[-1]


def test_noise_where_spectrograms_are_stored_is_refused_before_anything_is_scored(checkpoint, damaged, tmp_path, run):
    boxes = [{"file": i, "class": "x", "bbox": [[0, 0, 0.5, 0.5]]} for i in "ad"]
    (damaged / "two.json").write_text(json.dumps(boxes))
    (damaged / "audio" / "d.wav").unlink()
    np.save(damaged / "audio" / "d.npy", np.ones((1, 257, 81), np.float32))
    where = ("--testset", "custom", "--test_data_path", damaged, "--test_gt_path", damaged / "two.json")
    done = run(
        "--checkpoint", checkpoint, *where, "--imagenet_weights", "none", "--out_dir", tmp_path / "x", "--snr", "5"
    )
    assert done.returncode == 2 and "1 of 2 pairs of custom is a stored spectrogram (.npy): d" in done.stderr
    assert "scored" not in done.stdout


def test_the_noise_is_as_far_below_each_sound_as_asked(synthetic_root):
    clean = build_test_set("synthetic", str(synthetic_root), None, "", 64, 0.8)
    noisy = clean.noisy(10.0)
    name = clean.pairs[0].id
    sound, mixed = clean.waveform(name).astype(float), noisy.waveform(name).astype(float)
    ratio = 10 * np.log10(np.mean(sound**2) / np.mean((mixed - sound) ** 2))
    assert ratio == pytest.approx(10, abs=0.3) and (noisy.waveform(name) == mixed).all()
    assert np.corrcoef(sound, mixed - sound)[0, 1] == pytest.approx(0, abs=0.05)
    assert clean.snr is None


def test_masks_of_avsbench_robust_are_always_asked_with_negative_audio(thresholded, checkpoint, tmp_path, run):
    root = tmp_path / "avs"
    for video in ("vid_a", "vid_b"):
        write_tone(root / "ms3" / "audio_wav" / f"{video}.wav", 500)
        for number in range(1, 6):
            write_image(root / "ms3" / "visual_frames" / f"{video}_{number}.png", 40 * number)
            mask = np.zeros((20, 30), np.uint8)
            mask[:, : 5 * number] = 255
            (root / "ms3" / "gt_masks").mkdir(exist_ok=True)
            Image.fromarray(mask).save(root / "ms3" / "gt_masks" / f"{video}_{number}.png")
    (tmp_path / "ms3_meta_data.csv").write_text("video_id,split\nvid_a,test\nvid_b,test\n")
    where = ("--testset", "ms3_robust", "--test_data_path", root, "--metadata", tmp_path, "--imagenet_weights", "none")
    done = run("--checkpoint", thresholded, *where, "--out_dir", tmp_path / "out", "--save_maps")
    assert done.returncode == 0, done.stderr
    figures = read(tmp_path / "out", "ms3_robust")["maps"]["AUD_share"]
    wanted = {f"{name}_{kind}" for name in ("mIoU", "F", "FPR") for kind in ("own", "silence", "noise", "offscreen")}
    assert wanted <= figures.keys() and "AVSBench-Robust" in done.stdout
    old = run("--checkpoint", checkpoint, "--testset", "ms3,ms3_robust", *where[2:], "--out_dir", tmp_path / "old")
    assert old.returncode == 2 and "python -m scoring.threshold" in old.stderr and not (tmp_path / "old").exists()
    old = run("--checkpoint", checkpoint, "--testset", "all", *where[2:], "--out_dir", tmp_path / "old")
    assert old.returncode == 0 and "left out: ms3_robust (" in old.stdout, old.stderr
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["ms3"]
    maps = np.load(tmp_path / "out" / "ms3_robust" / "maps.npz")
    large = enlarge_absolute(torch.from_numpy(maps["AUD_share_noise"][:, 0]))
    assert figures["FPR_noise"] == pytest.approx((large > 0.5).double().mean().item(), abs=1e-9)
