"""What goes between processes: rows with their gradient, items in order."""

import os

import pytest
import torch
from processes import CPU, shared_items

import distributed
from distributed import local_slice


def test_rows_of_all_processes_are_gathered_and_their_gradient_comes_back(two_processes):
    weights = torch.arange(4.0)
    for rank, found in enumerate(two_processes):
        rows, gradient = found["gathered rows"]
        assert torch.equal(rows, torch.arange(4.0)[:, None] + 1)
        assert torch.equal(gradient[:, 0], 2 * weights[2 * rank : 2 * rank + 2])  # of two losses


def test_shared_items_come_back_once_each_and_in_order(two_processes):
    first, second = (found["shared items"] for found in two_processes)
    assert first == [f"item {i}" for i in range(7)] == shared_items()
    assert second == []


@pytest.mark.parametrize("total, world", [(256, 4), (8, 4), (2, 2)])
def test_rows_are_shared_without_overlap_or_gap(total, world, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    rows = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        rows += range(total)[local_slice(total)]
    assert rows == list(range(total))


def test_nobody_is_launched_without_torchrun(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):  # some schedulers set them for every job
        monkeypatch.setitem(os.environ, name, "1")
    assert not distributed.under_torchrun() and distributed.is_main()
    assert distributed.own_device("cpu") == CPU
