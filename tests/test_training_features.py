"""Frozen image encoders: features kept on disk, training on them, and checkpoints that refer to the weights."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MEASURED, files_up_to

import utils
from dataset import TrainingPairs, select_training_pairs
from models import load, load_model
from resnet import ImageEncoder
from training import features
from training.features import CachedViews, Store, cache_features, standardise

CPU = torch.device("cpu")
SIZE = 32


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def pairs(synthetic_root, tmp_path):
    """Twelve pairs whose images a test may change."""
    found = select_training_pairs("synthetic", str(synthetic_root), "metadata").pairs[:12]
    (tmp_path / "images").mkdir()
    return [pair._replace(image=shutil.copy2(pair.image, tmp_path / "images")) for pair in found]


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return ImageEncoder("small", 8, standardise=True).eval()


def training_pairs(pairs, augment="plain"):
    return TrainingPairs(pairs, SIZE, 0.8, augment)


def computed(line: str) -> int:
    return int(line.rpartition("; ")[2].split()[0])


def test_kept_features_are_those_of_the_images_as_tests_see_them(cache, pairs, encoder):
    train, held_out = training_pairs(pairs[:9]), training_pairs(pairs[9:], "none")
    assert computed(cache_features(encoder, [(train, 3), (held_out, 1)], CPU, 0)) == 9 * 3 + 3
    plain = TrainingPairs(pairs, SIZE, 0.8, "none")
    with torch.no_grad():
        wanted = encoder.trunk(torch.stack([plain[i].image for i in range(12)])).half()
    found = [train.views.get(i, 0) for i in range(9)] + [held_out.views.get(i, 0) for i in range(3)]
    assert torch.allclose(torch.stack(found).float(), wanted.float(), rtol=2e-3, atol=1e-3)
    assert not any(torch.equal(train.views.get(i, 0), train.views.get(i, 1)) for i in range(9))  # augmented
    assert torch.equal(held_out[1].image, held_out.views.get(1, 0))


def test_every_epoch_draws_a_view_of_each_image_by_seed_epoch_and_index_alone(cache, pairs, encoder):
    train = training_pairs(pairs)
    cache_features(encoder, [(train, 3)], CPU, 0)
    views = [[train.views.get(i, view) for view in range(3)] for i in range(12)]

    def drawn(epoch):
        train.epoch = epoch
        return [[torch.equal(train[i].image, view) for view in views[i]].index(True) for i in range(12)]

    epochs = [drawn(epoch) for epoch in range(8)]
    assert epochs[2] == drawn(2)
    assert {view for epoch in epochs for view in epoch} == {0, 1, 2}
    sounds = TrainingPairs(pairs, SIZE, 0.8, "plain")
    sounds.epoch = train.epoch = 5
    assert torch.equal(sounds[3].spectrogram, train[3].spectrogram)  # what is kept of images changes no sound


def test_only_what_is_not_there_or_has_changed_is_computed(cache, pairs, encoder, monkeypatch):
    def compute(count, views=2, by_contents=False):
        return computed(cache_features(encoder, [(training_pairs(pairs[:count]), views)], CPU, 0, by_contents))

    assert compute(8) == 16
    assert compute(8) == 0
    assert compute(10) == 4  # two more pairs
    assert compute(10, views=3) == 10  # one more view of each
    status = os.stat(pairs[4].image)
    os.utime(pairs[4].image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert compute(10, views=3) == 3
    monkeypatch.delattr("hashlib.file_digest", raising=False)  # Python 3.10 has none
    assert compute(10, views=3, by_contents=True) == 30  # other keys
    os.utime(pairs[4].image, ns=(status.st_atime_ns, status.st_mtime_ns + 2))
    assert compute(10, views=3, by_contents=True) == 0
    with torch.no_grad():
        encoder.bn1.running_mean += 0.1  # other weights: another store
    assert compute(10) == 20
    assert len(list(cache.iterdir())) == 2
    encoder.proj.weight.data += 1  # the head is none of them
    assert compute(10) == 0


def test_networks_that_differ_in_more_than_their_weights_share_no_features(cache, pairs, encoder):
    assert computed(cache_features(encoder, [(training_pairs(pairs), 1)], CPU, 0)) == 12
    encoder.name, encoder.relu = "another", torch.nn.GELU()
    assert computed(cache_features(encoder, [(training_pairs(pairs), 1)], CPU, 0)) == 12


def test_views_are_the_same_whatever_the_files_are_called_and_wherever_they_lie(cache, pairs, encoder, tmp_path):
    train = training_pairs(pairs)
    cache_features(encoder, [(train, 3)], CPU, 0)
    copies = [shutil.copy(pair.image, tmp_path / f"copy_of_{Path(pair.image).name}") for pair in pairs]
    moved = training_pairs([pair._replace(image=copy) for pair, copy in zip(pairs, copies, strict=True)])
    assert computed(cache_features(encoder, [(moved, 3)], CPU, 0)) == 36
    for index in range(12):
        for view in range(3):
            assert torch.equal(train.views.get(index, view), moved.views.get(index, view))


def test_a_run_that_was_killed_continues(cache, pairs, encoder, monkeypatch):
    monkeypatch.setattr(features, "FLUSHED", 4)
    monkeypatch.setattr(features, "BATCH", 2)
    real, calls = features.trunk_features, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 5:  # the first one finds the shape
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(features, "trunk_features", killed)
    with pytest.raises(KeyboardInterrupt):
        cache_features(encoder, [(training_pairs(pairs), 1)], CPU, 0)
    store = next(cache.iterdir())
    with open(store / "keys", "ab") as file:
        file.write(b"half a key")
    monkeypatch.setattr(features, "trunk_features", real)
    train = training_pairs(pairs)
    assert computed(cache_features(encoder, [(train, 1)], CPU, 0)) == 12 - 4  # of 6 computed rows, 4 were marked
    continued = all_views(train)
    shutil.rmtree(cache)
    cache_features(encoder, [(train, 1)], CPU, 0)
    assert torch.equal(continued, all_views(train))


@pytest.mark.parametrize(("name", "left"), [("rows", 5.5), ("rows", 0), ("keys", 3), ("done", 4)])
def test_rows_that_a_damaged_store_has_lost_are_computed_again(cache, pairs, encoder, name, left):
    train = training_pairs(pairs)
    cache_features(encoder, [(train, 1)], CPU, 0)
    whole = all_views(train)
    path = next(cache.iterdir()) / name
    os.truncate(path, int(left * path.stat().st_size / 12))
    backwards = training_pairs(pairs[::-1])
    assert computed(cache_features(encoder, [(backwards, 1)], CPU, 0)) == 12 - int(left)
    assert torch.equal(all_views(backwards).flip(0), whole)


def fill(encoder, pairs, results):
    torch.set_num_threads(1)
    results.put(computed(cache_features(encoder, [(training_pairs(pairs), 2)], CPU, 0)))


def test_two_runs_at_once_share_the_work_and_no_row_is_spoilt(cache, pairs, encoder):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    sets = pairs[:9], pairs[3:], pairs[:9]
    runs = [context.Process(target=fill, args=(encoder, part, results)) for part in sets]
    for run in runs:
        run.start()
    counts = sorted(results.get(timeout=60) for _ in runs)
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert counts[0] == 0 and 24 <= sum(counts) <= 36  # one of two with the same images had nothing to do
    train, alone = training_pairs(pairs), training_pairs(pairs)
    assert computed(cache_features(encoder, [(train, 2)], CPU, 0)) == 0
    of_both = all_views(train)
    shutil.rmtree(cache)
    cache_features(encoder, [(alone, 2)], CPU, 0)
    assert torch.equal(of_both, all_views(alone))


def all_views(pairs):
    return torch.stack([pairs.views.get(i, view) for i in range(len(pairs)) for view in range(pairs.views.count)])


def test_features_travel_to_workers_that_are_started_anew(cache, pairs, encoder):
    import pickle

    train = training_pairs(pairs)
    cache_features(encoder, [(train, 1)], CPU, 0)
    first = train.views.get(0, 0)
    assert torch.equal(pickle.loads(pickle.dumps(train.views)).get(0, 0), first)


def test_every_row_has_its_room_on_disk_before_it_is_computed(cache, pairs, encoder, monkeypatch):
    """Written through memory, a file without room would end the process by a signal."""
    monkeypatch.setattr(features, "compute", lambda *arguments: None)
    cache_features(encoder, [(training_pairs(pairs), 300)], CPU, 0)
    (rows,) = cache.glob("*/rows")
    assert rows.stat().st_blocks * 512 >= rows.stat().st_size > 10**5
    shutil.rmtree(cache)
    with files_up_to(10_000), pytest.raises(utils.UserError, match=r"rows cannot be written \(File too large\)"):
        cache_features(encoder, [(training_pairs(pairs), 300)], CPU, 0)
    assert not list(cache.glob("*/keys")), "a key would claim a row"


def test_what_cannot_be_kept_is_one_line(cache, pairs, encoder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(utils.UserError, match=r"GiB, and .*--cached_views.*CACHE_ROOT"):
            cache_features(encoder, [(training_pairs(pairs), 1)], CPU, 0)
    with monkeypatch.context() as patch:
        real = features.trunk_features
        patch.setattr(features, "trunk_features", lambda *arguments: real(*arguments) + 70000)
        with pytest.raises(utils.UserError, match=r"\.jpg: a feature .* fp16 .*--cached_views 0"):
            cache_features(encoder, [(training_pairs(pairs), 1)], CPU, 0)
    broken = pairs[2].image
    with open(broken, "wb") as file:
        file.write(b"no image")
    with pytest.raises(utils.UserError, match=r"1 of .* pairs cannot be decoded"):
        cache_features(encoder, [(training_pairs(pairs), 1)], CPU, 0)
    with pytest.raises(utils.UserError, match="all of them share"):
        Store({"other": 1}, (1,)).find([b"x" * 32])


def test_the_projection_sees_features_of_mean_0_and_deviation_1(cache, pairs, encoder):
    train = training_pairs(pairs)
    standardise(encoder, train, CPU)
    live = encoder.standardise.mean.clone(), encoder.standardise.std.clone()
    cache_features(encoder, [(train, 2)], CPU, 0)
    standardise(encoder, train, CPU)
    assert torch.allclose(encoder.standardise.mean, live[0], atol=2e-3)
    assert torch.allclose(encoder.standardise.std, live[1], rtol=1e-2, atol=1e-3)
    seen = encoder.standardise(torch.stack([train.views.get(i, 0) for i in range(12)]).float())
    assert seen.mean((0, 2, 3)).abs().max() < 1e-3


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The weights of a small network of timm, in a file."""
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install -r requirements-timm.txt")
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("weights") / "mobilenet.pth"
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), path)
    return path


def flags_of(weights):
    encoders = ["--image_encoder", "timm:mobilenetv3_small_050", "--audio_encoder", "small"]
    return [*encoders, "--image_weights", weights, "--freeze_image", "--cached_views", "2"]


def test_a_frozen_encoder_stays_as_it_is_and_a_resumed_run_ends_like_one_in_one_go(
    train, synthetic_root, tmp_path, weights, cache
):
    flags = [*flags_of(weights), "--infer_image_size", "96", "--lr_schedule", "constant", "--eval_every", "0"]
    done = train(synthetic_root, tmp_path / "whole", *flags, "--testset", "synthetic")
    assert done.returncode == 0, done.stderr
    assert "150 views" in done.stdout and "150 of them computed now" in done.stdout  # 2 of 70, 1 of 10
    state = utils.load_checkpoint(tmp_path / "whole" / "run" / "latest.pth")
    given = torch.load(weights, weights_only=True)
    kept = {k.removeprefix("imgnet.timm.network."): v for k, v in state["model"].items() if "imgnet.timm.network" in k}
    assert kept and all(torch.equal(value, given[key]) for key, value in kept.items())
    results = tmp_path / "whole" / "run" / "results" / "synthetic" / "results.json"
    assert json.loads(results.read_text())["settings"]["infer_image_size"] == 96
    trained = load(tmp_path / "whole" / "run" / "best.pth")
    assert trained.model.infer_image_size == 96 and trained.model.shape["image_size"] == 64
    for more, computed_now in [(("--epochs", "1"), 0), (("--resume",), 0)]:
        done = train(synthetic_root, tmp_path / "parts", *flags, *more)
        assert done.returncode == 0 and f" {computed_now} of them computed now" in done.stdout
    other = utils.load_checkpoint(tmp_path / "parts" / "run" / "latest.pth")
    assert all(torch.equal(state["model"][key], other["model"][key]) for key in state["model"])
    lines = [[{k: v for k, v in line.items() if k not in MEASURED} for line in run["lines"]] for run in (state, other)]
    assert len(lines[0]) == 2 and lines[0] == lines[1]


def test_a_checkpoint_may_refer_to_frozen_weights_and_never_lacks_them_silently(
    train, synthetic_root, tmp_path, weights, cache
):
    here = shutil.copy(weights, tmp_path / "weights.pth")
    flags = [*flags_of(here), "--epochs", "1", "--recipe", "frozen_weights=reference"]
    assert train(synthetic_root, tmp_path, *flags).returncode == 0
    assert train(synthetic_root, tmp_path, *flags, "--epochs", "2", "--resume").returncode == 0
    path = tmp_path / "run" / "best.pth"
    assert not any(key.startswith("imgnet.timm") for key in utils.load_checkpoint(path)["model"])
    weight = load_model(path).imgnet.timm.network.state_dict()["conv_stem.weight"]
    assert torch.equal(weight, torch.load(weights, weights_only=True)["conv_stem.weight"])
    shutil.move(here, path.with_name("weights.pth"))
    load_model(path)  # beside the checkpoint
    path.with_name("weights.pth").unlink()
    with pytest.raises(utils.UserError, match=r"refers to the frozen weights .*weights\.pth.*sha256"):
        load_model(path)
    other = {k: v + 1 if v.is_floating_point() else v for k, v in torch.load(weights, weights_only=True).items()}
    torch.save(other, here)
    with pytest.raises(utils.UserError, match="holds other weights than those"):
        load_model(path)
    shutil.copy(weights, path.with_name("weights.pth"))
    load_model(path)  # the right ones, though others lie where they were


def test_unfrozen_stages_are_trained_at_a_rate_of_their_own(train, synthetic_root, tmp_path, weights, cache):
    flags = [
        *flags_of(weights),
        "--cached_views",
        "0",
        "--epochs",
        "1",
        "--unfreeze_last",
        "1",
        "--recipe",
        "unfrozen_lr=0.5",
    ]
    done = train(synthetic_root, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert "views" not in done.stdout.partition("held_out")[2]
    state, given = utils.load_checkpoint(tmp_path / "run" / "latest.pth"), torch.load(weights, weights_only=True)
    own, slower = state["optimizer"]["param_groups"]
    assert slower["lr"] == pytest.approx(0.5 * own["lr"])
    names = {k.removeprefix("imgnet.timm.network."): v for k, v in state["model"].items() if "imgnet.timm.network" in k}
    moved = {name.split(".")[1] for name, value in names.items() if not torch.equal(value, given[name])}
    assert moved == {"5"}  # the last of its blocks


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--unfreeze_last", "1"], "without --freeze_image"),
        (["--cached_views", "2"], "without --freeze_image"),
        (["--freeze_image", "--cached_views", "2", "--unfreeze_last", "1"], "with --unfreeze_last no features"),
        (["--freeze_image", "--recipe", "frozen_weights=reference"], "only weights of a file or download"),
        (["--freeze_image", "--unfreeze_last", "9"], "9: the trunk has 3 stages"),
        (["--infer_image_size", "16", "--image_encoder", "resnet18", "--recipe", "frozen_weights=maybe"], "stored or"),
    ],
)
def test_settings_of_frozen_encoders_that_make_no_sense_are_one_line(flags, message, train, synthetic_root, tmp_path):
    done = train(synthetic_root, tmp_path, *flags)
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_a_dry_run_keeps_no_features(train, synthetic_root, tmp_path, weights, cache):
    done = train(synthetic_root, tmp_path, *flags_of(weights), "--dry_run")
    assert done.returncode == 0, done.stderr
    assert not cache.exists()


def test_rows_of_one_file_in_several_pairs_are_computed_once(cache, pairs, encoder):
    twice = training_pairs([*pairs, *(pair._replace(id=f"{pair.id}_again") for pair in pairs)])
    assert computed(cache_features(encoder, [(twice, 1)], CPU, 0)) == 12
    assert np.array_equal(twice.views.rows[:12], twice.views.rows[12:])
    assert isinstance(twice.views, CachedViews)


def test_views_of_a_folder_of_frames_show_other_frames_than_the_middle_one(cache, pairs, encoder, tmp_path):
    folder = tmp_path / "film"
    folder.mkdir()
    for number, pair in enumerate(pairs[:5]):
        shutil.copy(pair.image, folder / f"{number:03d}.jpg")
    film = pairs[0]._replace(image=str(folder))
    assert features.frame_of(film, 0).endswith("002.jpg")
    assert len({features.frame_of(film, view) for view in range(8)}) > 2
    train = training_pairs([film, *pairs[1:]])
    assert computed(cache_features(encoder, [(train, 3)], CPU, 0)) == 36
    shutil.copy(pairs[7].image, folder / "002.jpg")
    assert computed(cache_features(encoder, [(train, 3)], CPU, 0)) in (1, 2, 3)  # as many as show that frame
