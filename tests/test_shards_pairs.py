"""Training reads from shards what it reads from loose files, each pair once, whoever shares the work."""

import json
import re
import tarfile
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch
from webserver import served

import shards.addresses as addresses
from dataset import Pair, TrainingPairs, make_loader
from prepare.shards import Settings, write_shards
from shards.index import load_index
from shards.pairs import PairsInShards, ShardedPairs, hold_out_shards, select_from_shards
from training.step import Optimisation
from utils import UserError, load_checkpoint

SIZE, SECONDS = 64, 0.8
SIZES = (17, 3, 21, 21, 8)  # uneven shards


@pytest.fixture(scope="module")
def root(synthetic_root, tmp_path_factory):
    """All 70 training pairs in shards of SIZES."""
    folder = tmp_path_factory.mktemp("uneven")
    pairs, entries = loose(synthetic_root), []
    for number, (start, stop) in enumerate(pairwise(np.cumsum([0, *SIZES]))):
        write_shards(pairs[start:stop], folder / "one", Settings(100, None, 0), overwrite=True)
        (folder / "one" / "pairs-000000.tar").rename(folder / f"pairs-{number:06}.tar")
        index = json.loads((folder / "one" / "index.json").read_text())
        entries.append(index["shards"][0] | {"name": f"pairs-{number:06}.tar"})
    (folder / "index.json").write_text(json.dumps({"format": index["format"], "pairs": 70, "shards": entries}))
    return folder


def loose(root, count=70):
    ids = [f"train_{n:06}" for n in range(count)]
    return [Pair(i, str(root / "frames" / f"{i}.jpg"), str(root / "audio" / f"{i}.wav")) for i in ids]


def sharded(path, seed=0):
    return ShardedPairs(PairsInShards(load_index(str(path))), SIZE, SECONDS, "hard", seed)


def own_rows(pairs, batch_size, lanes, rank, skip=0):
    each = batch_size // lanes[0]
    return [batch[rank * each : (rank + 1) * each] for batch in pairs.batches(batch_size, lanes)][skip:]


def test_items_are_those_of_loose_files_to_the_last_bit(root, synthetic_root):
    ours = sharded(root)
    files = {pair.id: pair for pair in loose(synthetic_root)}
    theirs = TrainingPairs([files[name] for name in ours.pairs.ids], SIZE, SECONDS, "hard")
    for number in (0, 5, 69):
        for one, other in zip(ours[number], theirs[number], strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("web", [False, True])
def test_two_processes_of_two_workers_give_every_pair_once_and_open_shards_not_pairs(root, web, tmp_path, monkeypatch):
    """Both processes run one after the other here; opened files are counted where the workers open them."""
    opened, opens = tmp_path / "opened", addresses.Files._file

    def count(self, address):
        if address not in self._open:
            with opened.open("a") as file:
                file.write(f"{address}\n")
        return opens(self, address)

    monkeypatch.setattr(addresses.Files, "_file", count)
    with served(root) as (base, asked):
        path = base + "/pairs-{000000..000004}.tar" if web else root
        for epoch in (0, 1):
            seen = []
            for rank in range(2):
                pairs = sharded(path)
                pairs.epoch = epoch
                for batch in make_loader(pairs, 8, 2, own_rows(pairs, 8, (2, 2), rank)):
                    seen += batch.id
            assert len(seen) == len({*seen}) == 70 // 8 * 8
        parts = 2 * (len(SIZES) + 4 - 1)  # a cut between two workers goes through a shard
        runs = [name for name, _ in asked if name.endswith(".tar")]
        lines = opened.read_text().splitlines() if opened.exists() else []
    # 4 times a process looks at one pair before its workers begin
    assert len(lines) == 0 and len(runs) <= 2 * parts + 8 if web else len(lines) <= parts + 4


def test_workers_that_outlive_an_epoch_follow_the_next_plan(root):
    pairs, seen = sharded(root), []
    for epoch in (0, 1):
        pairs.epoch = epoch
        rows = own_rows(pairs, 8, (1, 2), 0)
        seen.append([name for batch in make_loader(pairs, 8, 2, rows, keep_workers=True) for name in batch.id])
        assert seen[-1] == [pairs.pairs.ids[number] for batch in rows for number in batch]
    assert seen[0] != seen[1]


def test_every_pair_is_announced_to_the_system_once_and_before_it_is_read(root, monkeypatch):
    told, read = [], []
    announce, part = addresses.Files.announce, addresses.Files.read
    monkeypatch.setattr(addresses.Files, "announce", lambda *call: (told.append(call[1:]), announce(*call))[1])
    monkeypatch.setattr(addresses.Files, "read", lambda *call: (read.append((len(told), *call[1:])), part(*call))[1])
    pairs = sharded(root)
    for number in (number for batch in pairs.batches(8, (1, 0)) for number in batch):
        pairs.raw(number)
    for known, address, start, size in read:
        assert any(at <= start and start + size <= at + much for path, at, much in told[:known] if path == address)
    spans = sorted((path, at, at + size) for path, at, size in told)
    assert len(read) == 4 * 64 and all(a[0] < b[0] or a[2] <= b[1] for a, b in pairwise(spans))


def test_sound_that_only_paths_open_is_read_from_a_shard_of_others(synthetic_root, tmp_path):
    image, sound = synthetic_root / "frames" / "train_000000.jpg", tmp_path / "a.mp3"
    soundfile.write(sound, *soundfile.read(synthetic_root / "audio" / "train_000000.wav"), format="MP3")
    with tarfile.open(tmp_path / "of_others.tar", "w") as archive:
        archive.add(image, "a.jpg")
        archive.add(sound, "a.mp3")
    theirs = TrainingPairs([Pair("a", str(image), str(sound))], SIZE, SECONDS, "hard")
    assert torch.equal(sharded(tmp_path)[0].spectrogram, theirs[0].spectrogram)


@pytest.mark.parametrize("lanes", [(1, 2), (1, 3), (2, 1)])
def test_a_resumed_epoch_goes_on_with_the_same_batches_whoever_reads_them(root, lanes):
    """Its first 3 batches were taken with these lanes; one process with 2 workers, or none, reads the others."""
    pairs = sharded(root)
    wanted = [[pairs.pairs.ids[number] for number in batch] for batch in pairs.batches(6, lanes)][3:]
    for workers in (0, 2):
        loader = make_loader(pairs, 6, workers, pairs.batches(6, lanes)[3:])
        assert [[*batch.id] for batch in loader] == wanted


def test_a_shard_that_dies_midway_is_asked_for_again_and_then_named(root, monkeypatch):
    monkeypatch.setattr(addresses, "WAITS", (0, 0))
    for breaks, dies in ((1, False), (99, True)):
        with served(root, breaks={"pairs-000002.tar": breaks}) as (base, _):
            pairs = sharded(base + "/pairs-{000000..000004}.tar?signature=secret")
            loader = make_loader(pairs, 7, 2, pairs.batches(7, (1, 2)))
            if not dies:
                assert sum(len(batch.id) for batch in loader) == 70
                continue
            with pytest.raises(UserError, match=r"pairs-000002.tar cannot be read beyond byte \d+") as error:
                list(loader)
            assert "secret" not in str(error.value)
            del error  # it holds this frame, and with it the workers


@pytest.mark.parametrize("harm, wanted", [
    (lambda content: content[: len(content) // 3], r"pairs-000000.tar is cut short"),
    (lambda content: content[512:] + bytes(512), r"pairs-000000.tar is broken, or not the one"),
])  # fmt: skip
def test_a_cut_or_another_shard_is_named(root, tmp_path, harm, wanted):
    for path in root.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "pairs-000000.tar").write_bytes(harm((root / "pairs-000000.tar").read_bytes()))
    pairs = sharded(tmp_path)
    with pytest.raises(UserError, match=wanted):
        list(make_loader(pairs, 7, 0, pairs.batches(7, (1, 0))))


def test_a_pair_that_does_not_decode_is_named_with_its_shard(root, tmp_path, cli):
    for path in root.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    place = load_index(str(root)).files[0]
    content = bytearray((root / "pairs-000000.tar").read_bytes())
    content[place[0] : place[0] + place[1]] = bytes(int(place[1]))
    (tmp_path / "pairs-000000.tar").write_bytes(content)
    name = load_index(str(root)).ids[0].decode()
    with pytest.raises(UserError, match=rf"pairs-000000.tar/{name}\.jpg: (?!.*BytesIO)"):
        sharded(tmp_path)[0]
    done = cli("prepare_data", "check", "--trainset", "custom", "--train_data_path", tmp_path, "--workers", 0)
    assert done.returncode == 1 and f"pairs-000000.tar/{name}.jpg" in done.stdout
    assert "pairs-000000.tar has another sha256" in done.stdout
    assert re.search(r"not decodable +1 ", done.stdout)


def test_check_reads_shards_from_the_web_once(root, cli):
    pytest.importorskip("braceexpand", reason="pip install -r requirements-shards.txt")
    with served(root) as (base, asked):
        path = base + "/pairs-{000000..000004}.tar"
        done = cli("prepare_data", "check", "--trainset", "custom", "--train_data_path", path, "--workers", 0)
    assert done.returncode == 0 and "decodable                               70" in done.stdout, done.stderr
    assert len([name for name, _ in asked if name.endswith(".tar")]) == len(SIZES)


def test_lists_and_held_out_pairs(root, tmp_path):
    (tmp_path / "ids.txt").write_text("train_000003\ntrain_000069\nabsent\n")
    selection = select_from_shards("custom", str(root), "metadata", str(tmp_path / "ids.txt"))
    assert sorted(selection.pairs.ids) == ["train_000003", "train_000069"] and selection.missing == ["absent"]
    pairs = select_from_shards("custom", str(root), "metadata").pairs
    train, held_out = hold_out_shards(pairs, None, 0.2, 3)
    assert len(held_out) == 14 and not {*train.ids} & {*held_out.ids} and len(train) == 56
    assert len({*held_out.index.shard_of[held_out.rows]}) <= 3
    (tmp_path / "val.txt").write_text("train_000003\n")
    train, held_out = hold_out_shards(pairs, str(tmp_path / "val.txt"), 0.2, 3)
    assert held_out.ids == ["train_000003"] and len(train) == 69
    with pytest.raises(UserError, match=r"1 of 3 ids .* are not in the shards: absent"):
        hold_out_shards(pairs, str(tmp_path / "ids.txt"), 0.2, 3)


def test_training_from_the_web_resumes_exactly_and_hides_signatures(root, synthetic_root, tmp_path, train, monkeypatch):
    pytest.importorskip("braceexpand", reason="pip install -r requirements-shards.txt")
    with served(root, token="signature=secret") as (base, _):
        path = base + "/pairs-{000000..000004}.tar?signature=secret"
        flags = "--train_data_path", path, "--val_fraction", "0.1", "--batch_size", "12"
        done = train(synthetic_root, tmp_path / "whole", *flags, "--num_workers", "1")
        assert done.returncode == 0, done.stderr
        assert "secret" not in done.stdout + (tmp_path / "whole" / "run" / "configs.json").read_text()
        count, step = iter(range(1, 99)), Optimisation.step

        def interrupted(self, *arguments):
            if next(count) == 9:  # the fourth step of the second epoch
                raise KeyboardInterrupt
            return step(self, *arguments)

        monkeypatch.setattr(Optimisation, "step", interrupted)
        stopped = "--num_workers", "1", "--save_every_steps", "3"
        assert train(synthetic_root, tmp_path / "half", *flags, *stopped).returncode == 130
        monkeypatch.undo()
        state = load_checkpoint(tmp_path / "half" / "run" / "latest.pth")
        assert (state["epoch"], state["step"], tuple(state["lanes"])) == (1, 3, (1, 1))
        done = train(synthetic_root, tmp_path / "half", *flags, "--num_workers", "0", "--resume")
        assert done.returncode == 0, done.stderr
    whole, half = (load_checkpoint(tmp_path / name / "run" / "latest.pth") for name in ("whole", "half"))
    assert whole["epoch"] == half["epoch"] == 2
    assert all(torch.equal(value, half["model"][name]) for name, value in whole["model"].items())


def test_features_of_a_frozen_encoder_are_those_of_loose_files(root, synthetic_root, tmp_path, monkeypatch):
    from training.features import ViewImages, _views_of

    ours = sharded(root).pairs
    files = {pair.id: pair for pair in loose(synthetic_root)}
    views = [_views_of(pairs, 2, True) for pairs in (ours, [files[name] for name in ours.ids])]
    assert [key for *_, key in views[0]] == [key for *_, key in views[1]]
    one, other = (ViewImages([view[:2] for view in of], SIZE, "hard")[7][0].levels for of in views)
    assert torch.equal(one, other)
