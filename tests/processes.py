"""What tests run on one process and, in one spawn, on two: losses and gradients of one global batch, shared items."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from distributed import average, gather_in_order, gather_rows, local_slice, shard
from model_maxpool import MaxPoolModel
from model_slot import JointSlotModel, TokenMasks
from recipes import PAPER_WEIGHTS
from training.step import Inputs, Optimisation, compile_model

PAIRS = 10  # not a multiple of parts of 3 or 4
WITH_MAPS = PAPER_WEIGHTS | {"share_contrast": 1.0, "foreign_claims": 4.0, "silence": 1.0}
WITHOUT_RECONSTRUCTION = PAPER_WEIGHTS | {"reconstruction": 0.0}
CPU = torch.device("cpu")


def joint_slot(reciprocal_k):
    return JointSlotModel("small", 16, 2, 3, 64, 0.8, mask_ratio=0.3, reciprocal_k=reciprocal_k)


def max_pool(_):
    return MaxPoolModel("small", 16, 64, 0.8)


def gradients(
    micro_batch=None, pairs=PAIRS, reciprocal_k=3, frozen=True, weights=PAPER_WEIGHTS, make=joint_slot, compiled=False
):
    """Losses and gradients in float64 of this process's rows of a batch that NumPy determines; masks are on."""
    torch.manual_seed(0)
    model = make(reciprocal_k).double().train()
    if compiled:
        compile_model(model, CPU)
    if frozen:
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.standard_normal((pairs, 3, 64, 64)))
    spectrogram = torch.from_numpy(rng.standard_normal((pairs, 1, 257, 81)))
    if weights.get("silence"):
        spectrogram = torch.cat([spectrogram, torch.from_numpy(rng.standard_normal((pairs, 1, 257, 81)))], dim=1)
    masks, rows = model.draw_masks(pairs), local_slice(pairs)
    inputs = Inputs(image[rows], spectrogram[rows], TokenMasks(*(mask[rows] for mask in masks)))
    optimisation = Optimisation(model, CPU, 1e-3, micro_batch=micro_batch, all_weights=all(weights.values()))
    losses = optimisation.backward(inputs, weights)
    names = sorted(losses)
    values = average(torch.stack([losses[name] for name in names]))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return dict(zip(names, values.tolist(), strict=True)), found


def gathered_rows():
    """The rows of both processes, and what a loss of each says of the own ones."""
    own = (torch.arange(4.0)[local_slice(4)][:, None] + 1).requires_grad_()
    whole = gather_rows(own)
    (whole.sum(1) @ torch.arange(4.0)).backward()
    return whole.detach(), own.grad


def shared_items():
    items = [f"item {i}" for i in range(7)]
    return list(gather_in_order(iter(shard(items)), len(items)))


CASES = {  # name: what two processes compute
    "whole": gradients,
    "parts of 2": lambda: gradients(micro_batch=2),
    "parts of 3": lambda: gradients(micro_batch=3),
    "maps": lambda: gradients(weights=WITH_MAPS),
    "maps in parts": lambda: gradients(micro_batch=2, weights=WITH_MAPS),
    "max-pooled in parts": lambda: gradients(micro_batch=2, make=max_pool),
    "without reconstruction": lambda: gradients(weights=WITHOUT_RECONSTRUCTION),
    "gathered rows": gathered_rows,
    "shared items": shared_items,
}


def work(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    torch.save({name: case() for name, case in CASES.items()}, folder / f"result_{rank}")
    dist.barrier()
    dist.destroy_process_group()


def spawn_two(folder: Path) -> None:
    """Write result_0 and result_1, {case: what it returned} of either process."""
    mp.spawn(work, (2, folder), 2)
