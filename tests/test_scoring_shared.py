"""Several processes share the scoring of a set, and the figures are those of one to the last bit."""

import json
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT

sys.path.insert(0, str(ROOT))

from models import load
from scoring.evaluate import evaluate
from sets import build_test_set


def work(rank, world, folder, checkpoint, root):
    """One process of several: the first one writes the figures, and the maps that it was shown."""
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store_{world}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    model = load(checkpoint).model
    dataset = build_test_set("synthetic", root, None, "metadata", 64, 0.8)
    shown = {}

    def keep(batch):
        shown.update({name: batch.maps["IQR"][i].clone() for i, name in enumerate(batch.ids)})

    found = evaluate(model, dataset, torch.device("cpu"), 3, seed=1, resamples=50, on_batch=[keep])
    assert (found is None) == (rank > 0) and (rank == 0 or not shown)
    if rank == 0:
        torch.save({"figures": json.dumps([found.results, found.rows]), "shown": shown}, f"{folder}/found_{world}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def figures_of(world, folder, *where):
    if world == 1:
        work(0, 1, folder, *where)
    else:
        mp.spawn(work, (world, folder, *where), world)
    return torch.load(folder / f"found_{world}", weights_only=True)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_processes_gives_the_same_figures_and_shows_the_same_maps(
    world, tmp_path, checkpoint, synthetic_root
):
    one, several = (figures_of(count, tmp_path, checkpoint, str(synthetic_root)) for count in (1, world))
    assert several["figures"] == one["figures"]
    assert [*several["shown"]] == [*one["shown"]] and len(one["shown"]) == 20
    assert all(maps.equal(one["shown"][name]) for name, maps in several["shown"].items())
