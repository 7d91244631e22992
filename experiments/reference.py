"""The reference numbers of the released code: weights and inputs that NumPy draws, and how far a device is from them.

The numbers stand in tests/golden, with what they are and how close anybody gets to them.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from model_slot import PAPER_LOSSES, JointSlotModel
from recipes import PAPER_WEIGHTS
from training.step import weighted

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"


def reference_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    weights = {}
    for key, shape in shapes.items():
        n = np.random.default_rng(zlib.crc32(f"public/{key}".encode())).standard_normal(shape)
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.zeros((), dtype=torch.long)
            continue
        if key.endswith("running_var"):
            value = 1 + 0.1 * abs(n)
        elif key.endswith("running_mean"):
            value = 0.1 * n
        elif len(shape) <= 1:
            value = 0.1 * n + key.endswith("weight")
        elif key.endswith(("slots", "mask_token_img", "mask_token_aud")) or "embed" in key:
            value = n
        else:
            value = 1.4142135 * n / np.sqrt(np.prod(shape[1:]))
        weights[key] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    return weights


def reference_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (8, 3, 224, 224) and spectrograms (8, 1, 257, 501)."""
    rng = np.random.default_rng(zlib.crc32(b"public/inputs"))
    image = rng.standard_normal((8, 3, 224, 224)).astype(np.float32)
    return torch.from_numpy(image), torch.from_numpy(rng.standard_normal((8, 1, 257, 501)).astype(np.float32))


def reference_numbers() -> tuple[dict, Mapping[str, np.ndarray]]:
    """Shapes of the weights and names of gradients; the arrays."""
    return json.loads((GOLDEN / "jsa_public.json").read_text()), np.load(GOLDEN / "jsa_public.npz")


def deviations(device: torch.device) -> dict[str, float]:
    """Of slots, maps and losses: the largest difference as a share of the array's largest value; of gradient norms:
    the largest relative one."""
    about, arrays = reference_numbers()
    model = JointSlotModel(tau=0.03, mask_ratio=0.0, reciprocal_k=3)
    model.load_state_dict(reference_weights(about["shapes"]))
    model = model.to(device).eval()
    inputs = [x.to(device) for x in reference_inputs()]

    def furthest(ours: torch.Tensor | Sequence[float], name: str) -> float:
        ours = np.asarray(torch.as_tensor(ours).detach().cpu(), dtype=np.float64)
        return float(np.abs(ours - arrays[name]).max() / np.abs(arrays[name]).max())

    slots, maps = model.embed(*inputs), model.localize(*inputs, infer_sharpening=1.0)
    losses = model.train()(*inputs)
    total = weighted(losses, PAPER_WEIGHTS)
    total.backward()
    parameters = dict(model.named_parameters())
    norms = np.array([parameters[name].grad.norm().item() for name in about["grad_norm_names"]])
    return {
        "slots": max(furthest(slots.image_slots, "image_slots"), furthest(slots.audio_slots, "audio_slots")),
        "maps": max(furthest(maps.audio_map, "audio_map_1.0"), furthest(maps.image_map, "image_map_1.0")),
        "losses": furthest([*(losses[name].item() for name in PAPER_LOSSES), total.item()], "losses_train_mode"),
        "gradient norms": float(np.abs(norms / arrays["grad_norms"] - 1).max()),
    }
