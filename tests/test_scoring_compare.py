"""Comparing results: figures and differences by hand, what is one configuration, what is refused."""

import csv
import json
import re

import numpy as np
import pytest

from scoring.bootstrap import Ratio, bootstrap, interval
from scoring.compare import compare, configure, ratios, read_run, seed_means
from scoring.summary import interactive_groups, ratios_of
from utils import UserError

FLAGS = {"trainset": "synthetic", "experiment_name": "full_seed0", "seed": 0, "lam3": 100.0, "lam1": 0.1, "epochs": 10}
RULES = {"cIoU": "fixed", "cIoU_half": "half"}


def write(folder, ious, ids=None, shuffle=False, interactive=False, maps_of_others=False, units=None, **changes):
    """results.json and per_sample.csv of made-up IoUs {map: (N,)}; changes: flags, settings, pairs, or results."""
    ious = {name: np.asarray(values, dtype=float) for name, values in ious.items()}
    count = len(next(iter(ious.values())))
    ids = ids or [f"id{i // 2}_{i % 2}" for i in range(count)]
    units = units or ([i.rpartition("_")[0] for i in ids] if interactive else ids)
    rows = [{"id": i, "class": "dog", "unit": units[k], "area": 900} for k, i in enumerate(ids)]
    maps = {}
    for name, values in ious.items():
        columns = {"iou": values, "iou_half": values / 2, "average_precision": values, "pointing": values > 0.3}
        groups = interactive_groups(ids) if interactive else None
        found = ratios_of(columns, np.zeros(count, dtype=bool), groups)
        maps[name] = {metric: ratio.value() for metric, ratio in found.items()} | {"samples": count}
        for key, column in columns.items():
            for row, value in zip(rows, column.tolist()):
                row[f"{name}_{key}"] = value
    settings = {"alpha": 0.6, "infer_sharpening": 0.1, "interpolation": "bicubic", "threshold": 0.6, "rules": RULES}
    results = {
        "testset": "synthetic",
        "maps": maps,
        "settings": settings | {"seed": 0} | changes.pop("settings", {}),
        "pairs": {"scored": count, "expected": count, "left_out": []} | changes.pop("pairs", {}),
        "training_test_overlap": 0,
    }
    flags = FLAGS | changes.pop("flags", {})
    if maps_of_others:
        results["maps_file"] = f"{folder.name}.npz"
    else:
        results["checkpoint"] = {"path": "x/best.pth", "selected_by": "retrieval", "training": flags}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results | changes))
    with (folder / "per_sample.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows[::-1] if shuffle else rows)
    return folder / "results.json"


def seeds(root, name, all_ious, **flags):
    """One run for each seed, named NAME_seedS."""
    return [
        write(root / f"{name}_seed{s}", ious, flags={"experiment_name": f"{name}_seed{s}", "seed": s} | flags)
        for s, ious in enumerate(all_ious)
    ]


def tables(text):
    """The cells of every Markdown table: [[{head: cell}, ...], ...]."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            found.append([dict(zip(rows[0], row, strict=True)) for row in rows[2:]])
            rows = []
    return found


# ---------------------------------------------------------------- figures


def test_figures_and_differences_are_those_by_hand(tmp_path):
    a = write(tmp_path / "a", {"AUD": [0.9, 0.9, 0.1, 0.1], "IQR": [0.9, 0.9, 0.9, 0.1]})
    b = write(tmp_path / "b", {"AUD": [0.9, 0.1, 0.1, 0.1], "IQR": [0.9, 0.9, 0.9, 0.9]}, flags={"lam3": 0.0})
    figures_of_both, differences = tables(compare([a, b]))
    assert [row["configuration"] for row in figures_of_both] == ["full: lam3 100"] * 2 + ["full: lam3 0"] * 2
    assert [(row["map"], row["cIoU"], row["pointing"], row["mAP"]) for row in figures_of_both] == [
        ("AUD", "50.0", "50.0", "50.0"),
        ("IQR", "75.0", "75.0", "70.0"),
        ("AUD", "25.0", "25.0", "30.0"),
        ("IQR", "100.0", "100.0", "90.0"),
    ]
    assert [row["cIoU"].split(" [")[0] for row in differences] == ["-25.0", "+25.0"]
    assert [(row["map"], row["minus"], row["over"]) for row in differences] == [
        ("AUD", "AUD", "samples"),
        ("IQR", "IQR", "samples"),
    ]


def test_an_interval_is_that_of_the_differences_and_marked_where_it_excludes_zero(tmp_path):
    rng = np.random.default_rng(0)
    worse, better = np.zeros(50), np.zeros(50)
    better[:30] = 0.9
    noise = rng.choice([0.0, 0.9], 50)
    a = write(tmp_path / "a", {"AUD": worse, "IQR": noise})
    b = write(tmp_path / "b", {"AUD": better, "IQR": noise[::-1]}, flags={"lam3": 0.0})
    rows = tables(compare([a, b]))[1]
    ids = read_run(a).columns["id"]
    order = np.argsort([f"id{i // 2}_{i % 2}" for i in range(50)])
    low, high = interval(bootstrap({"x": Ratio((better >= 0.5)[order] * 1.0, np.ones(50))}, ids)["x"])
    assert rows[0]["cIoU"] == f"+60.0 [{100 * low:+.1f}, {100 * high:+.1f}] *"
    assert "*" not in rows[1]["cIoU"]


def test_equal_results_differ_by_nothing(tmp_path):
    ious = {"AUD": np.random.default_rng(1).random(30)}
    a, b = write(tmp_path / "a", ious), write(tmp_path / "b", ious, flags={"lam3": 0.0})
    assert tables(compare([a, b]))[1][0]["cIoU"] == "0.0 [0.0, 0.0]"
    several = seeds(tmp_path, "one", [ious] * 3) + seeds(tmp_path, "two", [ious] * 3, lam3=0.0)
    assert [row["mAP"] for row in tables(compare(several))[1]] == ["0.0 [0.0, 0.0]", "[0.0, 0.0]"]


def test_the_order_of_the_rows_changes_nothing(tmp_path):
    rng = np.random.default_rng(2)
    a = write(tmp_path / "a", {"AUD": rng.random(30)})
    ious = {"AUD": rng.random(30)}
    b = write(tmp_path / "b", ious, flags={"lam3": 0.0})
    c = write(tmp_path / "c", ious, flags={"lam3": 0.0}, shuffle=True)
    assert compare([a, b]).replace(str(b.parent), "") == compare([a, c]).replace(str(c.parent), "")


def test_pairing_makes_the_interval_tighter_on_the_same_samples(tmp_path):
    rng = np.random.default_rng(3)
    hardness = rng.random(200)
    a = write(tmp_path / "a", {"AUD": hardness})
    b = write(tmp_path / "b", {"AUD": np.clip(hardness + rng.normal(0, 0.05, 200), 0, 1)}, flags={"lam3": 0.0})
    printed = tables(compare([a, b]))[1][0]["mAP"]
    low, high = (float(x) for x in re.search(r"\[(.*), (.*)\]", printed).groups())
    one, two = (ratios(read_run(path), "AUD")["mAP"] for path in (a, b))
    ids = read_run(a).columns["id"]
    apart = bootstrap({"x": two}, ids, seed=0)["x"] - bootstrap({"x": one}, ids, seed=1)["x"]
    assert high - low < 0.5 * 100 * np.diff(interval(apart))[0]


def test_a_resample_draws_whole_units(tmp_path):
    half = np.repeat([0.9, 0.0], 20)
    units = [f"video{i // 20}" for i in range(40)]
    a = write(tmp_path / "a", {"AUD": np.zeros(40)}, units=units)
    b = write(tmp_path / "b", {"AUD": half}, units=units, flags={"lam3": 0.0})
    text = compare([a, b])
    assert tables(text)[1][0]["cIoU"] == "+50.0 [0.0, +100.0]"
    assert "40 of 40 samples, 2 images or videos" in text


def test_seeds_are_averaged_per_sample_and_their_spread_is_given(tmp_path):
    full = [{"AUD": [0.9, 0.9, 0.1, 0.1]}, {"AUD": [0.9, 0.9, 0.9, 0.1]}, {"AUD": [0.9, 0.9, 0.9, 0.9]}]
    other = [{"AUD": [0.9, 0.1, 0.1, 0.1]}, {"AUD": [0.9, 0.1, 0.9, 0.1]}]
    paths = seeds(tmp_path, "full", full) + seeds(tmp_path, "no_match", other, lam3=0.0)
    text = compare(paths)
    figures_of_both, differences = tables(text)
    assert [(row["configuration"], row["runs"], row["cIoU"]) for row in figures_of_both] == [
        ("full: lam3 100", "3", "75.0±25.0"),
        ("no_match: lam3 0", "2", "37.5±17.7"),
    ]
    assert differences[0]["cIoU"].startswith("-37.5 [")
    assert differences[1] | {"mAP": ""} == {
        "configuration": "",
        "map": "",
        "minus": "",
        "over": "seeds",
        "cIoU": "[-75.0, 0.0]",
        "mAP": "",
        "pointing": "[-75.0, 0.0]",
    }
    assert "seed 0, 1, 2" in text and "not the noise of training" in text
    means = seed_means(configure([read_run(path) for path in paths])[0], "AUD")
    np.testing.assert_allclose(means["cIoU"].numerator, [1, 1, 2 / 3, 1 / 3])


def test_interactive_sets_count_an_image_only_if_every_sound_is_right(tmp_path):
    a = write(tmp_path / "a", {"AUD": [0.9, 0.9, 0.9, 0.1]}, interactive=True)
    b = write(tmp_path / "b", {"AUD": [0.9, 0.1, 0.9, 0.1]}, interactive=True, flags={"lam3": 0.0})
    figures_of_both, *_, differences = tables(compare([a, b]))
    assert [row["IIoU"] for row in figures_of_both] == ["50.0", "0.0"]
    assert differences[0]["IIoU"].startswith("-50.0 [")


def test_retrieval_is_the_worse_direction_and_listening_that_of_the_results(tmp_path):
    ways = {"by_class": {"image_to_audio": {"R@1": 0.7}, "audio_to_image": {"R@1": 0.8}}}
    a = write(tmp_path / "a", {"AUD": [0.9, 0.1], "IQR": [0.9, 0.1]}, retrieval=ways)
    results = json.loads(a.read_text())
    results["maps"]["AUD"]["listening"] = -0.0001
    a.write_text(json.dumps(results))
    b = write(tmp_path / "b", {"AUD": [0.9, 0.1], "IQR": [0.9, 0.1]}, flags={"lam3": 0.0})
    rows = tables(compare([a, b]))[0]
    assert [row["class_R@1"] for row in rows] == ["70.0", "-", "-", "-"]
    assert [row["listening"] for row in rows] == ["0.0", "-", "-", "-"]


def test_no_line_is_wider_than_a_terminal(tmp_path):
    rng = np.random.default_rng(4)
    runs = [{"AUD": rng.random(40), "IQR": rng.random(40)} for _ in range(4)]
    names = ["a_long_name_of_an_experiment", "a_long_name_of_an_experiment", "other", "other"]
    paths = [
        write(
            tmp_path / str(i), ious, flags={"experiment_name": name, "seed": i, "lam3": float(i // 2)}, interactive=True
        )
        for i, (name, ious) in enumerate(zip(names, runs))
    ]
    text = compare(paths)
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 130
    first, *below = tables(text.split("Difference")[0])
    assert all([row["configuration"] for row in block] == [row["configuration"] for row in first] for block in below)
    assert "cIoU" in first[0] and "both_pointing" in below[-1][0]


# ---------------------------------------------------------------- configurations


def grouped(paths, map_name=None):
    return [(c.label, len(c.runs)) for c in configure([read_run(path) for path in paths], map_name)]


def test_what_cannot_change_a_number_makes_no_configuration(tmp_path):
    ious = {"AUD": [0.9, 0.1]}
    other = {"seed": 1, "experiment_name": "full_seed1", "gpu": "3", "num_workers": 8, "train_data_path": "/b"}
    other |= {"testset": "vggss", "test_gt_path": "b.json", "eval_every": 0, "resume": True, "model_dir": "/b"}
    paths = [write(tmp_path / "a", ious), write(tmp_path / "b", ious, flags=other)]
    assert grouped(paths) == [("full", 2)]
    assert "Difference" not in compare(paths)


@pytest.mark.parametrize("flag, value, word", [("lam3", 0.0, "lam3 0"), ("epochs", 50, "epochs 50")])
def test_a_flag_that_matters_makes_a_configuration_and_labels_it(tmp_path, flag, value, word):
    ious = {"AUD": [0.9, 0.1]}
    paths = [write(tmp_path / "a", ious), write(tmp_path / "b", ious, flags={"seed": 1, flag: value})]
    assert grouped(paths)[1] == (f"full_seed0: {word}", 1)


def test_the_folder_of_custom_pairs_is_the_training_set(tmp_path):
    ious, custom = {"AUD": [0.9, 0.1]}, {"trainset": "custom", "train_data_path": "/a"}
    a = write(tmp_path / "a", ious, flags=custom)
    b = write(tmp_path / "b", ious, flags=custom | {"train_data_path": "/b", "seed": 1})
    assert len(grouped([a, b])) == 2


def test_settings_of_the_test_make_a_configuration(tmp_path):
    ious = {"AUD": [0.9, 0.1]}
    paths = [write(tmp_path / "a", ious), write(tmp_path / "b", ious, flags={"seed": 1}, settings={"alpha": 0.4})]
    assert grouped(paths) == [("full: alpha 0.6", 1), ("full_seed0: alpha 0.4", 1)]
    assert "NOTE alpha: 0.6 (full: alpha 0.6); 0.4 (full_seed0: alpha 0.4)" in compare(paths)


def test_a_seed_that_stands_twice_is_no_other_seed(tmp_path):
    """The same flags and seeds under other names are other code, or another machine: not three more seeds."""
    runs = [{"AUD": [0.9, 0.1]}] * 2
    assert grouped(seeds(tmp_path, "old", runs) + seeds(tmp_path, "new", runs)) == [("old", 2), ("new", 2)]
    again = [write(tmp_path / "x", runs[0]), write(tmp_path / "y", runs[0])]
    assert grouped(again) == [("full", 1), ("full #2", 1)]


def test_only_the_seed_at_the_end_of_a_name_is_cut_off(tmp_path):
    ious = {"AUD": [0.9, 0.1]}
    names = ["demo_seed_1", "demo_1", "demo-s1", "demoseed1", "demo_11", "vggss_10k", "demo1"]
    paths = [
        write(tmp_path / name, ious, flags={"experiment_name": name, "seed": 1, "epochs": i})
        for i, name in enumerate(names)
    ]
    cut = [label.split(":")[0] for label, _ in grouped(paths)]
    assert cut == ["demo", "demo", "demo", "demo", "demo_11", "vggss_10k", "demo1"]


def test_results_without_training_flags_stand_alone(tmp_path):
    ious = {"AUD": [0.9, 0.1]}
    maps = write(tmp_path / "x" / "c", ious, maps_of_others=True, maps_file="ezvsl/maps.npz")
    released = {"path": "checkpoints/released.pth", "selected_by": "unknown", "training": {}}
    paths = [write(tmp_path / name, ious, checkpoint=released) for name in "ab"]
    assert grouped([*paths, maps]) == [("released", 1), ("released #2", 1), ("ezvsl/maps", 1)]


def test_many_differences_leave_a_short_label_and_stand_below(tmp_path):
    ious = {"AUD": [0.9, 0.1]}
    flags = {"trainset": "vggss_144k", "lam1": 0.0, "lam3": 0.0, "epochs": 50}
    text = compare([write(tmp_path / "a", ious), write(tmp_path / "b", ious, flags=flags | {"experiment_name": "big"})])
    assert [row["configuration"] for row in tables(text)[0]] == ["full", "big"]
    assert "- big: trainset vggss_144k, epochs 50, lam1 0, lam3 0; seed 0" in text


# ---------------------------------------------------------------- maps


def test_maps_of_another_method_are_compared_with_the_first_of_the_baseline(tmp_path):
    a = write(tmp_path / "a", {"AUD": [0.9, 0.9], "AUD_wrong": [0.1, 0.1], "IQR": [0.1, 0.1], "OGL": [0.9, 0.1]})
    other = {"ezvsl": [0.9, 0.1], "OGL": [0.9, 0.9], "third": [0.1, 0.1]}
    b = write(tmp_path / "ezvsl", other, maps_of_others=True, settings={"interpolation": "bilinear"})
    text = compare([a, b])
    shown, differences = tables(text)
    assert [(row["configuration"], row["map"]) for row in shown] == [
        ("full", "AUD"),
        ("full", "IQR"),
        ("ezvsl", "ezvsl"),
        ("ezvsl", "OGL"),
    ]
    assert [(row["map"], row["minus"], row["cIoU"].split(" [")[0]) for row in differences] == [
        ("ezvsl", "AUD", "-50.0"),
        ("OGL", "OGL", "+50.0"),  # of the same name, though the baseline does not show it
    ]
    assert "NOTE interpolation: bicubic (full); bilinear (ezvsl)" in text


def test_one_map_only(tmp_path):
    paths = [
        write(tmp_path / "a", {"AUD": [0.9, 0.1], "OGL": [0.9, 0.1]}),
        write(tmp_path / "b", {"AUD": [0.9, 0.1], "OGL": [0.9, 0.1]}, flags={"lam3": 0.0}),
    ]
    assert {row["map"] for table in tables(compare(paths, "OGL")) for row in table} == {"OGL"}
    with pytest.raises(UserError, match=r"a/results\.json has no map XYZ: it has AUD, OGL"):
        compare(paths, "XYZ")


# ---------------------------------------------------------------- refused, noted


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"testset": "vggss"}, "the test set is synthetic in the first, vggss in the second"),
        ({"settings": {"rules": {"cIoU": "half"}}}, "the rule of cIoU is fixed in the first, half in the second"),
        ({"settings": {"threshold": 0.5}}, "the threshold of the rule fixed is 0.6 in the first, 0.5 in the second"),
        ({"pairs": {"expected": 9}}, "the number of pairs in the set is 2 in the first, 9 in the second"),
        ({"ids": ["id0_0", "other"]}, "2 and 2 samples, only in the first id0_1; only in the second other"),
        ({"units": ["id0", "id0"]}, "the ground truth differs, unit of id0_0 is id0_0 and id0"),
    ],
)
def test_unlike_results_are_refused_by_name(tmp_path, changes, message):
    paths = [write(tmp_path / "a", {"AUD": [0.9, 0.1]}), write(tmp_path / "b", {"AUD": [0.9, 0.1]}, **changes)]
    with pytest.raises(UserError) as caught:
        compare(paths)
    assert str(caught.value) == f"{paths[0]} and {paths[1]} cannot be compared: {message}"


def test_another_number_of_samples_is_refused(tmp_path):
    paths = [
        write(tmp_path / "a", {"AUD": [0.9, 0.1]}, pairs={"expected": 2}),
        write(tmp_path / "b", {"AUD": [0.9]}, pairs={"expected": 2}),
    ]
    with pytest.raises(UserError, match="2 and 1 samples, only in the first id0_1"):
        compare(paths)


def test_on_the_samples_that_all_have_the_figures_are_those_by_hand(tmp_path):
    a = write(tmp_path / "a", {"AUD": [0.9, 0.9, 0.1, 0.1]}, ids=["p", "q", "r", "s"], pairs={"expected": 6})
    b = write(tmp_path / "b", {"AUD": [0.1, 0.9, 0.9]}, ids=["q", "r", "t"], flags={"lam3": 0.0}, pairs={"expected": 6})
    with pytest.raises(UserError, match="4 and 3 samples"):
        compare([a, b])
    text = compare([a, b], common=True)
    assert text.startswith("synthetic, in %: 2 of 6 samples, 2 images or videos; those that all 2 results have, of 4, ")
    figures_of_both, differences = tables(text)
    assert [(row["cIoU"], row["mAP"]) for row in figures_of_both] == [("50.0", "50.0"), ("50.0", "50.0")]
    assert differences[0]["cIoU"].startswith("0.0 [")
    c = write(tmp_path / "c", {"AUD": [0.9]}, ids=["z"])
    with pytest.raises(UserError, match="no sample is in all of"):
        compare([a, c], common=True)


def test_one_file_or_the_same_twice_is_refused(tmp_path):
    path = write(tmp_path / "a", {"AUD": [0.9, 0.1]})
    with pytest.raises(UserError, match="two or more"):
        compare([path])
    with pytest.raises(UserError, match="twice"):
        compare([path, path.parent / ".." / "a" / "results.json"])


def edit(path, change):
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("results.json", lambda text: "{", "is damaged"),
        ("results.json", lambda text: "[]", "is no results.json of test_model.py"),
        ("results.json", lambda text: '{"testset": "x", "maps": {"AUD": 1}}', "see its `maps`"),
        (
            "results.json",
            lambda text: text.replace('"cIoU": 0.5', '"cIoU": 0.6'),
            "cIoU of AUD is 60.0000 in .* 50.0000",
        ),
        ("per_sample.csv", lambda text: text.replace("unit", "video", 1), "has no column unit"),
        ("per_sample.csv", lambda text: text.replace("AUD_pointing", "pointing"), "has no column `AUD_pointing`"),
        ("per_sample.csv", lambda text: text + "id7,dog\n", "not all of one length"),
        ("per_sample.csv", lambda text: "".join(text.splitlines(True)[:-1]), "counts 2 pairs, .* 1: not of one run"),
        ("per_sample.csv", lambda text: text.replace("id0_1", "id0_0"), "an id occurs twice"),
        ("per_sample.csv", lambda text: text.replace("True", "perhaps"), "AUD_pointing: could not convert"),
        ("per_sample.csv", lambda text: "", "has no column id, unit, area"),
    ],
)
def test_broken_files_are_refused_with_their_name(tmp_path, name, change, message):
    paths = [write(tmp_path / part, {"AUD": [0.9, 0.1]}) for part in "ab"]
    edit(paths[1].with_name(name), change)
    with pytest.raises(UserError, match=message) as caught:
        compare(paths)
    assert str(paths[1].parent) in str(caught.value)


@pytest.mark.parametrize("name", ["results.json", "per_sample.csv"])
def test_a_missing_file_is_named(tmp_path, name):
    paths = [write(tmp_path / part, {"AUD": [0.9, 0.1]}) for part in "ab"]
    paths[1].with_name(name).unlink()
    with pytest.raises(UserError, match=f"b/{name}"):
        compare(paths)


def test_what_flatters_or_differs_is_noted(tmp_path):
    ious = {"AUD": [0.9, 0.1]}
    chosen = {"path": "x/best.pth", "selected_by": "cIoU of IQR on test set synthetic", "training": FLAGS}
    a = write(tmp_path / "a", ious)
    b = write(tmp_path / "b", ious, checkpoint=chosen, training_test_overlap=12, settings={"infer_sharpening": 0.02})
    text = compare([a, b])
    label = "(full: infer_sharpening 0.02)"
    assert f"cIoU of IQR on test set synthetic {label} - what has seen the test set scores too high" in " ".join(
        text.split()
    )
    assert f"NOTE test pairs trained on: 0 (full: infer_sharpening 0.1); 12 {label} - what has seen" in text
    assert "NOTE infer_sharpening" in text
    c = write(tmp_path / "c", ious, flags={"lam3": 0.0})
    assert "NOTE" not in compare([a, c])


def test_results_from_before_maps_were_smoothed_are_those_of_maps_that_are_not(tmp_path):
    ious = {"AUD": [0.9, 0.1]}
    old, new, smooth = (
        write(tmp_path / name, ious, flags={"seed": seed, "experiment_name": f"full_seed{seed}"}, settings=settings)
        for seed, (name, settings) in enumerate(
            {"old": {}, "new": {"infer_smoothing": 0.0}, "smooth": {"infer_smoothing": 0.1}}.items()
        )
    )
    assert [len(of_one.runs) for of_one in configure([*map(read_run, (old, new))])] == [2]
    assert "NOTE" not in compare([old, new])
    assert "infer_smoothing 0.1" in compare([old, smooth]) and "infer_smoothing 0 " in compare([old, smooth])
