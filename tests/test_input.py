"""What workers send, and what becomes of it: the numbers of every pair by itself, few bytes, workers that stay."""

import gc
import multiprocessing
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import audio_io
import dataset
import utils
from dataset import Heard, Pair, TrainingPairs, bytes_of, collate, finish, make_loader
from experiments.fp32_input import Fp32Pairs

CPU = torch.device("cpu")


def make_pairs(folder: Path, seconds: float, count: int = 5, size=(320, 240)) -> list[Pair]:
    """Photographs of noise, and 16-kHz PCM16 mono audio."""
    rng, found = np.random.default_rng(0), []
    for i in range(count):
        image, audio = str(folder / f"{i}.jpg"), str(folder / f"{i}.wav")
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(image)
        wave = rng.uniform(-1, 1, round(16000 * seconds)) * 10.0 ** -rng.integers(0, 5)
        soundfile.write(audio, wave, 16000, subtype="PCM_16")
        found.append(Pair(str(i), image, audio))
    return found


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> list[Pair]:
    return make_pairs(tmp_path_factory.mktemp("pairs"), 2.0)


@pytest.mark.parametrize("augment", ["hard", "plain"])
def test_the_numbers_are_those_of_fp32_tensors_made_by_workers(pairs, augment):
    ours, before = (kind(pairs, 64, 1.0, augment, seed=5) for kind in (TrainingPairs, Fp32Pairs))
    for epoch in range(3):
        ours.epoch = before.epoch = epoch
        one, other = (next(iter(make_loader(data, len(pairs), 0))) for data in (ours, before))
        assert (one.image - other.image).abs().max() < 1e-6
        assert (one.spectrogram - other.spectrogram).abs().max() < 1e-6
        assert torch.equal(one.spectrogram == 0, other.spectrogram == 0), "other bands are masked"
        assert one.id == other.id


def test_a_pair_has_the_same_numbers_in_every_batch(pairs, monkeypatch):
    data, threads = TrainingPairs(pairs, 64, 1.0, "hard"), torch.get_num_threads()
    alone = [data[i] for i in range(len(pairs))]
    for size, workers, used, at_once in ((1, 0, 1, 9), (3, 2, 1, 9), (5, 0, 3, 9), (5, 0, 1, 2), (5, 0, 1, 0)):
        monkeypatch.setattr(audio_io, "VALUES_AT_ONCE", at_once * 16000)
        torch.set_num_threads(used)
        batches = list(make_loader(data, size, workers))
        torch.set_num_threads(threads)
        for name in ("image", "spectrogram"):
            whole = torch.cat([getattr(batch, name) for batch in batches])
            assert torch.equal(whole, torch.stack([getattr(sample, name) for sample in alone])), (size, workers, used)


def test_a_full_size_pair_is_at_most_320_kb(tmp_path):
    data = TrainingPairs(make_pairs(tmp_path, 10.0, 2, (640, 360)), 224, 5.0, "hard")
    sent = next(iter(make_loader(data, 2, 0).batches))
    assert sent.image.levels.dtype == torch.uint8 and sent.spectrogram[0].clip.dtype == torch.int16
    assert bytes_of(sent) / 2 <= 320_000


def test_images_reach_the_model_with_channels_last(pairs):
    batch = next(iter(make_loader(TrainingPairs(pairs, 64, 1.0), 4, 0)))
    assert batch.image.is_contiguous(memory_format=torch.channels_last) and batch.spectrogram.is_contiguous()


def test_clips_of_several_types_make_one_batch():
    """16-bit levels beside float32, and waveforms beside stored power."""
    levels = torch.randint(-(2**15), 2**15, (16000,), dtype=torch.int16)
    real = torch.rand(16000) - 0.5
    from audio_io import log_spectrogram, power_spectrogram

    wanted = [log_spectrogram(levels.numpy() * np.float32(2**-15)), log_spectrogram(real)]
    for first in (levels, power_spectrogram(levels)):
        batch = finish(collate([(Heard(first),), (Heard(real),)]), CPU)
        assert all(torch.equal(x, y) for x, y in zip(batch, wanted, strict=True))


def test_a_batch_keeps_what_is_not_computed():
    Item = namedtuple("Item", ["name", "number", "nested"])
    sent = collate([Item("a", 1.0, (torch.zeros(2),)), Item("b", 2.0, (torch.ones(2),))])
    found = finish(sent, CPU)
    assert list(found.name) == ["a", "b"] and found.number.tolist() == [1, 2] and found.nested[0].shape == (2, 2)


class Spy(TrainingPairs):
    """Says which worker made an item."""

    def raw(self, index):
        return super().raw(index)._replace(id=f"{index} {self.epoch} {os.getpid()}")


def test_workers_stay_and_the_epoch_reaches_them(pairs):
    data, plain = Spy(pairs, 64, 1.0, "hard"), TrainingPairs(pairs, 64, 1.0, "hard")
    processes = set()
    for epoch in (0, 1, 4):
        data.epoch = plain.epoch = epoch
        batches = list(make_loader(data, 1, 2, [[2], [0], [4]], keep_workers=True))
        told = [batch.id[0].split() for batch in batches]
        assert [(int(i), int(e)) for i, e, _ in told] == [(2, epoch), (0, epoch), (4, epoch)]
        processes |= {process for *_, process in told}
        assert torch.equal(batches[1].image[0], plain[0].image)
    assert len(processes) == 2 and str(os.getpid()) not in processes
    abandoned = iter(make_loader(data, 1, 2, [[0], [1], [2], [3]], keep_workers=True))
    next(abandoned)  # a run that stops within an epoch and starts another
    again = list(make_loader(data, 1, 2, [[3]], keep_workers=True))
    assert len(again) == 1 and again[0].id[0].split()[0] == "3"


def test_workers_end_with_the_pairs_that_they_load(pairs):
    data, others = TrainingPairs(pairs, 64, 1.0), set(multiprocessing.active_children())
    list(make_loader(data, 1, 2, [[0]], keep_workers=True))
    workers = set(multiprocessing.active_children()) - others
    gc.disable()
    try:
        del data
        assert len(workers) == 2 and not workers & set(multiprocessing.active_children())
    finally:
        gc.enable()


Usage = namedtuple("Usage", ["total", "used", "free"])


def test_shared_memory_that_does_not_suffice_is_told_before_the_first_batch(pairs, monkeypatch):
    data = TrainingPairs(pairs * 100, 64, 1.0)
    needed = bytes_of(next(iter(make_loader(data, 100, 0).batches))) * 5  # two of each worker, and one at the run
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**26, 0, needed if path == "/dev/shm" else 2**40))
    iter(make_loader(data, 100, 2))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**26, 0, needed - 1))
    with pytest.raises(utils.UserError, match=r"/dev/shm, 64 MiB,.*--shm-size.*--num_workers 0"):
        iter(make_loader(data, 100, 2))
    iter(make_loader(data, 100, 0))
    iter(make_loader(data, 100, 2, [[0, 1]]))  # no more is in flight than there is
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**26, 0, needed + 1))
    with pytest.raises(utils.UserError, match="/dev/shm"):
        iter(make_loader(data, 100, 2))


def test_a_broken_first_pair_is_named_by_the_worker(pairs, tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"not an image")
    data = TrainingPairs([Pair("x", str(tmp_path / "x.jpg"), pairs[0].audio), *pairs], 64, 1.0)
    with pytest.raises(dataset.Undecodable, match=r"x\.jpg"):
        list(make_loader(data, 2, 1))
