"""A step asks the device nothing but one vector: counted on a stand-in for a GPU, whose tensors hold no values."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import training.step as step
from model_slot import JointSlotModel
from recipes import OUR_LOSSES, PAPER_WEIGHTS
from training.step import Inputs, Optimisation


class Copies(TorchDispatchMode):
    """Counts copies between devices and operators whose result has a size that only the device knows."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        result = function(*arguments, **(settings or {}))
        name = function.name()
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        if isinstance(result, torch.Tensor) and any(x.device != result.device and x.ndim for x in tensors):
            self.found.append(name)
        if name.startswith(("aten::nonzero", "aten::masked_select", "aten::_local_scalar_dense", "aten::equal")):
            self.found.append(name)
        if name.startswith("aten::index") and "index_select" not in name:
            indices = arguments[1] if isinstance(arguments[1], list | tuple) else []
            if any(x is not None and x.dtype == torch.bool for x in indices):
                self.found.append(f"{name} by a mask")
        return result


def steps(monkeypatch, device, micro_batch, clip=5.0):
    """What a step fetches and what it copies, all losses on."""
    weights = PAPER_WEIGHTS | dict.fromkeys(OUR_LOSSES, 1.0)
    fetched = []
    monkeypatch.setattr(step, "fetch", lambda vector: fetched.append(vector.shape) or [1.0] * len(vector))
    with device:
        model = JointSlotModel("small", dim=16, image_size=32, audio_seconds=0.4, reciprocal_k=2).train()
    optimisation = Optimisation(model, device, 1e-3, clip=clip, micro_batch=micro_batch)
    masks = type(model.draw_masks(4))(*(mask.to(device) for mask in model.draw_masks(4)))
    inputs = Inputs(torch.randn(4, 3, 32, 32, device=device), torch.randn(4, 2, 257, 41, device=device), masks)
    copies = Copies()
    with copies:
        optimisation.step(inputs, weights, 1.0)
    return fetched, copies.found


@pytest.mark.parametrize("micro_batch", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_the_host_waits_once_in_a_step(monkeypatch, micro_batch):
    fetched, copies = steps(monkeypatch, torch.device("cpu"), micro_batch)
    assert len(fetched) == 1 and fetched[0].numel() > len(PAPER_WEIGHTS) + len(OUR_LOSSES)  # a vector of all losses
    assert not copies
    with FakeTensorMode():  # an operator that needs a value of the device raises an error here
        fetched, copies = steps(monkeypatch, torch.device("cpu"), micro_batch)
        assert len(fetched) == 1 and not copies


def test_indexing_by_a_mask_and_a_value_that_is_asked_for_would_be_noticed():
    copies, values = Copies(), torch.arange(3.0)
    with copies:
        values[values > 1].sum().item()
    assert any("by a mask" in name for name in copies.found) and "aten::_local_scalar_dense" in copies.found
