"""One optimisation step: precision, micro-batches, many processes, and the learning rate.

B pairs of the global batch, of which each process holds its rows. A step gives the gradients of one loss over all B,
however they are divided: into processes (`distributed.gather_rows`) or into parts that memory holds (`_cache`).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distributed import average, gather_rows, local_slice, shares, world_size
from model_slot import TokenMasks
from models import Model
from utils import UserError, bf16_is_fast

LR_DECAY = 0.9  # of schedule `step`, per epoch (paper)


class Inputs(NamedTuple):
    """This process's rows of a batch."""

    image: torch.Tensor  # (B, 3, H, W)
    spectrogram: torch.Tensor  # (B, 1, F, L), or (B, 2, F, L): see `represent`
    masks: TokenMasks

    def parts(self, size: int) -> Iterator["Inputs"]:
        """Successive parts of `size` rows, the last one as large as what is left."""
        for image, spectrogram, *masks in zip(*(x.split(size) for x in (*self[:2], *self.masks)), strict=True):
            yield Inputs(image, spectrogram, TokenMasks(*masks))


class NotFinite(Exception):
    """The loss or the gradient of a step is not finite; weights and batch-norm statistics are those before it."""


# ---------------------------------------------------------------- schedules


MAP_LOSSES = {"map_contrast", "share_contrast", "foreign_claims", "foreign_tokens"}  # ours, not the paper's


def loss_weights(
    epoch: int,
    warmup: int,
    lam1: float,
    lam2: float,
    lam3: float,
    map_contrast: float = 0.0,
    share_contrast: float = 0.0,
    foreign_claims: float = 0.0,
    foreign_tokens: float = 0.0,
    silence: float = 0.0,
) -> dict[str, float]:
    """Weight of each loss; during the first `warmup` epochs only the contrastive one counts.

    foreign_tokens: within attention matching, so times lam3. Losses that are not the paper's are named where they are
    on; those of the map all where one is.
    """
    on = float(epoch >= warmup)
    weights = {
        "info_nce": 1.0,
        "reconstruction": lam1 * on,
        "slot_divergence": lam2 * on,
        "attention_matching": lam3 * on,
    }
    of_the_map = {
        "map_contrast": map_contrast * on,
        "share_contrast": share_contrast * on,
        "foreign_claims": foreign_claims * on,
        "foreign_tokens": lam3 * foreign_tokens * on,
    }
    if map_contrast or share_contrast or foreign_claims or foreign_tokens:
        weights |= of_the_map
    return weights | ({"silence": silence * on} if silence else {})


def lr_factor(step: int, steps_per_epoch: int, epochs: int, schedule: str, warmup: float) -> float:
    """Learning rate of a step as a share of --lr: a linear start over `warmup` of all steps, then the schedule.

    constant stays; step multiplies by LR_DECAY after every epoch; cosine falls to 0 at the end.
    """
    total = steps_per_epoch * epochs
    warm = round(warmup * total)
    if step < warm:
        return (step + 1) / warm
    if schedule == "step":
        return LR_DECAY ** (step // steps_per_epoch)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))
    return 1.0


def choose_amp(amp: str, device: torch.device) -> torch.dtype | None:
    """Precision of the encoders: auto is bf16 where the hardware has it, else fp16 on CUDA, fp32 on CPUs."""
    if amp == "auto":
        amp = "bf16" if bf16_is_fast(device) else "fp16" if device.type == "cuda" else "none"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[amp]


# ---------------------------------------------------------------- the step


class Objective(nn.Module):
    """The model and the loss that training minimises as one module: what DistributedDataParallel has to wrap."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs: Inputs, weights: Mapping[str, float], total: int, cached: Iterable[torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Losses of some rows of a batch of `total`, each loss's part of the batch's; only "objective" has a gradient.

        cached: what the batch losses' gradient says of these rows; without it they are computed from all rows.
        """
        pairs = self.model.represent(*inputs)
        own = self.model.contrasted(pairs, wants_maps(weights))
        share = len(inputs.image) * world_size() / total  # DistributedDataParallel divides by the processes
        losses = {name: share * loss for name, loss in self.model.pair_losses(pairs).items()}
        if cached is None:
            everyones = type(own)(*(gather_rows(x, total) for x in present(own)))
            losses = self.model.batch_losses(everyones) | losses
        objective = weighted(losses, weights if cached is None else weights_of(losses, weights))
        if cached is not None:
            objective = objective + sum((x * gradient).sum() for x, gradient in zip(present(own), cached, strict=True))
        return {name: loss.detach() for name, loss in losses.items()} | {"objective": objective}


def present(contrasted: Iterable[torch.Tensor | None]) -> list[torch.Tensor]:
    """What is there of the tuple that a model's batch losses take; they are its first ones."""
    return [x for x in contrasted if x is not None]


def weighted(losses: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    """Sum of the losses times their weights; those of weight 0 send no gradient."""
    return sum(weight * losses[name] for name, weight in weights.items() if weight)


def weights_of(losses: Iterable[str], weights: Mapping[str, float]) -> dict[str, float]:
    """The weights of these losses alone, where a pass knows only a part of them."""
    return {name: weight for name, weight in weights.items() if name in losses}


def wants_maps(weights: Mapping[str, float]) -> bool:
    """Whether a loss of the map is among the weights."""
    return bool(MAP_LOSSES & weights.keys())


class Optimisation:
    """Model, AdamW and gradient scaler, and the step that they take together with all processes.

    micro_batch: rows of a process that go through the model at once. The batch losses still see the whole batch: a
    first pass without gradient caches what they need, their gradient is taken at that, and a second pass sends it
    through the model part by part (GradCache, Gao et al. 2021). Gradients are those of the whole batch, but for batch
    norm in training mode, which normalises each part by itself (as it does in each process without sync_bn), and
    whose running statistics move once per part.
    """

    def __init__(
        self,
        model: Model,
        device: torch.device,
        lr: float,
        weight_decay: float = 0.01,
        clip: float = 0.0,
        amp: torch.dtype | None = None,
        micro_batch: int | None = None,
        all_weights: bool = True,
    ) -> None:
        """all_weights: whether every step sends a gradient to every weight, which spares the processes a search."""
        self.model, self.device, self.lr, self.clip, self.amp = model, device, lr, clip, amp
        self.micro_batch = micro_batch
        self.optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        self.objective: nn.Module = Objective(model)
        if world_size() > 1:
            devices = [device.index] if device.type == "cuda" else None
            self.objective = DistributedDataParallel(
                self.objective, device_ids=devices, find_unused_parameters=not all_weights
            )

    def step(self, inputs: Inputs, total: int, weights: Mapping[str, float], lr_factor: float) -> dict[str, float]:
        """One step on a batch of `total` pairs -> its losses by name, `loss`, `grad_norm`, `skipped_steps`.

        The fp16 scaler leaves out a step whose scaled gradient overflows, which counts as skipped and has no norm.
        Raises NotFinite, on every process alike, also when no scale above 1 helps.
        """
        before = self._what_a_forward_changes()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.backward(inputs, total, weights)
        self.scaler.unscale_(self.optimizer)
        trained = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in trained])
        if self.clip:
            nn.utils.clip_grads_with_norm_(trained, self.clip, norm)
        figures = losses | {"loss": weighted(losses, weights)}
        values = dict(zip(figures, average(torch.stack([*figures.values()])).tolist(), strict=True))
        norm = norm.item()
        overflow = self.scaler.is_enabled() and not math.isfinite(norm) and self.scaler.get_scale() > 1
        if not (math.isfinite(values["loss"]) and (math.isfinite(norm) or overflow)):
            before()
            raise NotFinite(", ".join(f"{name} {value:.4g}" for name, value in {**values, "grad_norm": norm}.items()))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return values | {"grad_norm": 0.0 if overflow else norm, "skipped_steps": float(overflow)}

    def backward(self, inputs: Inputs, total: int, weights: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """Add the batch's gradients to the weights' and return its losses, of which the mean over processes counts."""
        losses: dict[str, torch.Tensor] = {}
        parts, caches = [inputs], [None]
        if self.micro_batch and self.micro_batch < max(shares(total)):  # on all processes or on none
            parts = list(inputs.parts(self.micro_batch))
            losses, caches = self._cache(parts, total, weights)
        for part, cached in zip(parts, caches, strict=True):
            more_to_come = world_size() > 1 and part is not parts[-1]
            with self.objective.no_sync() if more_to_come else nullcontext():
                with self._autocast():
                    found = self.objective(part, weights, total, cached)
                self.scaler.scale(found.pop("objective")).backward()
            for name, value in found.items():
                losses[name] = losses[name] + value if name in losses else value
        return losses

    def _cache(
        self, parts: list[Inputs], total: int, weights: Mapping[str, float]
    ) -> tuple[dict[str, torch.Tensor], list[tuple[torch.Tensor, ...]]]:
        """The batch losses over all parts of all processes, and their gradient at the rows of each part of ours."""
        rewind, rows = self._what_a_forward_changes(), []
        with torch.no_grad():
            for part in parts:
                with self._autocast():
                    contrasted = self.model.contrasted(self.model.represent(*part), wants_maps(weights))
                rows.append(present(contrasted))
            whole = [gather_rows(torch.cat(columns), total).requires_grad_() for columns in zip(*rows, strict=True)]
        rewind()
        losses = self.model.batch_losses(type(contrasted)(*whole))
        gradients = torch.autograd.grad(weighted(losses, weights_of(losses, weights)), whole, materialize_grads=True)
        own = (world_size() * gradient[local_slice(total)] for gradient in gradients)
        sizes = [len(part.image) for part in parts]
        caches = list(zip(*(gradient.split(sizes) for gradient in own), strict=True))
        return {name: loss.detach() for name, loss in losses.items()}, caches

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)

    def _what_a_forward_changes(self) -> Callable[[], None]:
        """A function that puts the batch-norm statistics back to what they are now."""
        kept = [buffer.clone() for buffer in self.model.buffers()]

        def rewind() -> None:
            for buffer, value in zip(self.model.buffers(), kept, strict=True):
                buffer.copy_(value)

        return rewind

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises RuntimeError, ValueError or KeyError where the state is not of this model and optimizer."""
        weight_decay = self.optimizer.param_groups[0]["weight_decay"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        for group in self.optimizer.param_groups:  # the command line's, which --force may have changed
            group["weight_decay"] = weight_decay


def with_sync_bn(model: Model, device: torch.device) -> Model:
    """The model with batch norm over the rows of all processes. UserError on CPUs, where PyTorch has none."""
    if device.type != "cuda":
        raise UserError("--sync_bn: PyTorch synchronises batch norm on CUDA devices only")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
