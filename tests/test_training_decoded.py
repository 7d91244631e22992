"""Pairs decoded once: the same items as from the files, each file read once, no more kept than there is room for."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import MEASURED
from PIL import Image

import dataset
import utils
from dataset import Decoded, EvaluationPairs, Pair, TrainingPairs, make_loader
from training import decoded
from training.decoded import Store, bytes_needed, keep_decoded

KINDS = [  # suffix, channels, rate, length, subtype
    (".wav", 1, 16000, 24001, "PCM_16"),
    (".wav", 1, 16000, 8000, "PCM_16"),
    (".wav", 1, 16000, 3000, "PCM_16"),
    (".wav", 2, 16000, 24001, "PCM_16"),
    (".wav", 1, 16000, 24001, "FLOAT"),
    (".wav", 2, 22050, 40000, "PCM_24"),
    (".flac", 1, 16000, 20000, "PCM_16"),
    (".npy", 1, 16000, 24000, None),
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> list[Pair]:
    """A pair with audio of each kind; images of several sizes and modes."""
    folder, rng, found = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0), []
    for i, (suffix, channels, rate, length, subtype) in enumerate(KINDS):
        image, audio = str(folder / f"{i}.{'png' if i % 3 else 'jpg'}"), str(folder / f"{i}{suffix}")
        pixels = rng.integers(0, 255, (40 + 37 * i, 150 - 9 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert("L" if i == 4 else "RGB").save(image)
        wave = rng.uniform(-1, 1, (length, channels))
        if suffix == ".npy":
            np.save(audio, dataset_power(wave[:, 0]))
        else:
            soundfile.write(audio, wave, rate, subtype=subtype)
        found.append(Pair(str(i), image, audio))
    return found


def dataset_power(wave):
    from audio_io import power_spectrogram

    return power_spectrogram(wave).numpy()


def sets_of(pairs, augment):
    truth = dataset.GroundTruth("none", [p.id for p in pairs], lambda _: torch.zeros(224, 224), len(pairs), {})
    kinds = {
        "evaluation": lambda: EvaluationPairs(pairs, truth, [], 32, 0.5),
        "silence": lambda: TrainingPairs(pairs, 32, 0.5, "hard", 3, silence=True),
    }
    make = kinds.get(augment) or (lambda: TrainingPairs(pairs, 32, 0.5, augment, 3))
    return make(), make()


@pytest.mark.parametrize("place, workers", [("memory", 2), ("disk", 0)])
@pytest.mark.parametrize("augment", ["hard", "plain", "none", "silence", "evaluation"])
def test_items_are_those_of_the_files_to_the_bit(pairs, augment, workers, place, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path))
    files, kept = sets_of(pairs, augment)
    assert "every pair is decoded once" in keep_decoded([kept], place)
    for epoch in range(2):
        files.epoch = kept.epoch = epoch
        items = list(make_loader(kept, 1, workers))
        assert (kept.store.length > 0).all()
        for one, other in zip(make_loader(files, 1, 0), items, strict=True):
            assert torch.equal(one.image, other.image) and torch.equal(one.spectrogram, other.spectrogram)
            assert one.id == other.id
    if augment == "evaluation":
        assert all(torch.equal(files.heard(i)[0].clip, kept.heard(i)[0].clip) for i in range(len(pairs)))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing stays behind"


def test_a_second_epoch_reads_no_file(pairs, monkeypatch):
    _, kept = sets_of(pairs, "hard")
    keep_decoded([kept], "auto")
    first = [kept[i].image for i in range(len(kept))]
    for reader in ("load_image", "load_sound"):
        monkeypatch.setattr(dataset, reader, lambda *_: pytest.fail("a file was read again"))
    assert all(torch.equal(kept[i].image, first[i]) for i in range(len(kept)))


def test_no_more_is_kept_than_the_store_may_hold(pairs):
    files, kept = sets_of(pairs, "plain")
    kept.store = Store(len(pairs), bytes_needed(kept) // 2)
    for i in range(len(pairs)):
        assert torch.equal(kept[i].image, files[i].image) and torch.equal(kept[i].image, files[i].image)
    assert 0 < (kept.store.length > 0).sum() < len(pairs)
    assert os.fstat(kept.store.file).st_size <= kept.store.capacity


def test_a_full_disk_is_only_slower(pairs, monkeypatch):
    files, kept = sets_of(pairs, "plain")
    keep_decoded([kept], "memory")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoded.os, "pwrite", full)
    for _ in range(2):
        assert all(torch.equal(kept[i].image, files[i].image) for i in range(len(pairs)))


def test_what_does_not_fit_is_told_and_auto_leaves_it(pairs, monkeypatch):
    needed = bytes_needed(sets_of(pairs, "plain")[0])
    monkeypatch.setattr(decoded, "available_memory", lambda: 1.2 * needed)
    _, kept = sets_of(pairs, "plain")
    assert "decoded in every epoch" in keep_decoded([kept], "auto") and kept.store is None
    assert "about 60 % of the pairs" in keep_decoded([kept], "memory") and kept.store.capacity < needed
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each process of a machine keeps pairs of its own
    assert "about 30 % of the pairs" in keep_decoded([kept], "memory")
    assert "decoded in every epoch" in keep_decoded([kept], "false")


def test_a_broken_file_is_named_with_and_without_a_store(pairs, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    kept = TrainingPairs([*pairs, Pair("broken", str(broken), pairs[0].audio)], 32, 0.5)
    keep_decoded([kept], "memory")
    with pytest.raises(utils.Undecodable, match=r"broken\.jpg"):
        kept[len(pairs)]


def test_values_of_every_type_come_back(pairs):
    store = Store(2, 10**6)
    sound = dataset.Sound(np.arange(-3, 3, dtype=np.int16), 7, 99)
    store.put(1, Decoded(np.zeros((2, 3, 3), np.uint8), sound))
    found = store.get(1)
    assert store.get(0) is None and found.sound.values.dtype == np.int16 and found.sound[1:] == (7, 99)
    assert np.array_equal(found.sound.values, sound.values) and found.image.flags.writeable


def test_memory_that_a_control_group_leaves_is_what_is_available(tmp_path, monkeypatch):
    group = tmp_path / "job"
    group.mkdir()
    (group / "memory.max").write_text("3000000\n")
    (group / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.max").write_text("max\n")
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda p, *a, **k: "0::/job\n" if str(p) == "/proc/self/cgroup" else read(p, *a, **k)
    )
    assert utils._left_in_control_groups(tmp_path) == [2_000_000]
    assert utils.available_memory() > 2**20


def test_a_run_learns_the_same_with_and_without(synthetic_root, tmp_path, train):
    logs = []
    for name, workers in (("memory", 2), ("false", 0)):
        done = train(synthetic_root, tmp_path / name, "--decode_once", name, "--num_workers", workers)
        assert done.returncode == 0, done.stderr
        assert ("decoded once" in done.stdout) == (name == "memory")
        lines = (tmp_path / name / "run" / "log.jsonl").read_text().splitlines()
        logs.append([{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines])
    assert logs[0] == logs[1]
