"""One optimisation step: precision, micro-batches, many processes, and the learning rate.

B pairs of the global batch, of which each process holds an equal share. The gradients are those of one loss over all
of them, however they are divided: over processes (`distributed.gather_rows`), or in parts that fit memory (GradCache).
"""

import ctypes
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distributed import average, gather_rows, local_slice, world_size
from model_slot import TokenMasks
from models import Model
from utils import UserError, bf16_is_fast

LOST_IN_A_ROW = 5  # steps whose loss overflows in fp16: more of them are no accident
LR_DECAY = 0.9  # of schedule `step`, per epoch (paper)
SURROGATE = "surrogate"  # what sends the gradient of the losses over a batch through a part of it
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


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
    """The loss or gradient of a step is not finite; weights and batch-norm statistics are as before the step."""


# ---------------------------------------------------------------- schedules


def lr_factor(steps_per_epoch: int, epochs: int, schedule: str, warmup: float, step: int) -> float:
    """Learning rate of a step of the run as a share of --lr: a linear start over `warmup` of all steps, then schedule.

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
    """Precision of the encoders: auto is bf16 where the hardware makes it the faster one, else fp16 on CUDA, fp32 on
    CPUs."""
    if amp == "auto":
        amp = "bf16" if bf16_is_fast(device) else "fp16" if device.type == "cuda" else "none"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[amp]


def keep_freed_memory() -> None:
    """Let this process, and those forked from it, keep the memory of freed tensors for those to come, where glibc gives
    it out. Otherwise a step on a CPU returns its large tensors to the system and takes every page anew.
    """
    with suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25):  # an old glibc allows no more
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
            mallopt(M_TOP_PAD, 2**26)


# ---------------------------------------------------------------- the step


def weighted(losses: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    """Sum of the computed losses times their weights; those of weight 0 send no gradient."""
    return sum(weight * losses[name] for name, weight in weights.items() if weight and name in losses)


def fetch(vector: torch.Tensor) -> list[float]:
    """The values on the host, which waits for them: once in a step."""
    return vector.tolist()


def surrogate(gradients: Mapping[str, torch.Tensor], compared: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replaces a model's `batch_losses`: {SURROGATE: scalar} whose gradient at `compared` is `gradients`."""
    return {SURROGATE: sum((value * gradients[name]).sum() for name, value in compared.items())}


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
        slower: Collection[nn.Parameter] = (),
        slower_by: float = 1.0,
    ) -> None:
        """all_weights: whether every step gives every weight a gradient; then DDP need not search for unused ones.

        Weights that are frozen are left out. slower: those whose rate is slower_by times --lr.
        """
        self.model, self.device, self.lr, self.clip, self.amp = model, device, lr, clip, amp
        self.micro_batch = micro_batch
        own = {id(parameter) for parameter in slower}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [{"params": [p for p in trained if id(p) not in own], "share": 1.0}]
        groups += [{"params": [p for p in trained if id(p) in own], "share": slower_by}] * bool(own)
        self.optimizer = torch.optim.AdamW(groups, lr, weight_decay=weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        self.lost_in_a_row = 0  # steps up to now whose loss overflowed
        self.parallel: nn.Module = model
        if world_size() > 1:
            devices = [device.index] if device.type == "cuda" else None
            self.parallel = DistributedDataParallel(
                model,
                device_ids=devices,
                find_unused_parameters=not all_weights,
                broadcast_buffers=False,  # training mode reads none, and an epoch ends with those of the first process
            )

    def step(self, inputs: Inputs, weights: Mapping[str, float], lr_factor: float) -> dict[str, float]:
        """One step on this process's rows of a batch -> losses by name, `loss`, `grad_norm`, `skipped_steps`.

        weights: of the losses by name. In fp16 a step whose scaled gradient overflows is left out: it counts as skipped
        and has no norm. So is one whose loss overflows, LOST_IN_A_ROW times in a row: it has no losses either, and
        counts as `lost_steps` as well. Raises NotFinite, on every process alike, also when no scale above 1 helps. The
        host waits for the device once, in `fetch`.
        """
        before = self._what_a_forward_changes()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor * group.get("share", 1.0)  # older checkpoints bring no share
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.backward(inputs, weights)
        self.scaler.unscale_(self.optimizer)
        trained = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in trained])
        if self.clip:
            nn.utils.clip_grads_with_norm_(trained, self.clip, norm)
        if absent := [name for name, weight in weights.items() if weight and name not in losses]:
            raise UserError(f"{', '.join(absent)}: has a weight, but the model computes no such loss")
        figures = losses | {"loss": weighted(losses, weights)}
        scale = self.scaler._get_scale_async() if self.scaler.is_enabled() else None  # get_scale() would wait
        of_host = [norm, norm.new_ones(()) if scale is None else scale.squeeze()]
        *values, norm, scale = fetch(torch.cat([average(torch.stack([*figures.values()])), torch.stack(of_host)]))
        values = dict(zip(figures, values, strict=True))
        lost = not math.isfinite(values["loss"])
        lost_in_a_row = self.lost_in_a_row + 1 if lost else 0
        overflow = lost or not math.isfinite(norm)
        bearable = lost_in_a_row <= LOST_IN_A_ROW if lost else scale > 1
        if overflow:
            before()
        if overflow and not (self.scaler.is_enabled() and bearable):
            raise NotFinite(", ".join(f"{name} {value:.4g}" for name, value in {**values, "grad_norm": norm}.items()))
        self.lost_in_a_row = lost_in_a_row
        if not lost:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        counts = {"skipped_steps": float(overflow), "lost_steps": float(lost)}
        return ({} if lost else values) | {"grad_norm": 0.0 if overflow else norm} | counts

    def backward(self, inputs: Inputs, weights: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """Add the batch's gradients to the weights' and return its losses, of which the mean over processes counts."""
        if self.micro_batch and self.micro_batch < len(inputs.image):
            return self._backward_in_parts(list(inputs.parts(self.micro_batch)), weights)
        with self._autocast():
            losses = self.parallel(*inputs, wanted=weights, compare=self._compare_all)
        self.scaler.scale(weighted(losses, weights)).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _compare_all(self, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's `batch_losses` over the rows of all processes."""
        return self.model.batch_losses({name: gather_rows(rows) for name, rows in own.items()})

    def _backward_in_parts(self, parts: list[Inputs], weights: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """GradCache: the losses over the batch are taken once, their gradient goes through the model part by part."""
        losses, gradients = self._batch_losses_of(parts, weights)
        own = sum(len(part.image) for part in parts)
        for part, at_rows in zip(parts, gradients, strict=True):
            share = len(part.image) / own
            more_to_come = world_size() > 1 and part is not parts[-1]
            with self.parallel.no_sync() if more_to_come else nullcontext():
                with self._autocast():
                    found = self.parallel(*part, wanted=weights, compare=partial(surrogate, at_rows))
                at_batch = found.pop(SURROGATE)
                found = {name: share * loss for name, loss in found.items()}
                self.scaler.scale(weighted(found, weights) + at_batch).backward()
            for name, loss in found.items():
                losses[name] = losses[name] + loss.detach() if name in losses else loss.detach()
        return losses

    def _batch_losses_of(
        self, parts: list[Inputs], weights: Mapping[str, float]
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
        """The losses over all parts of all processes, and for each part of ours their gradient at its rows, by name."""
        rewind, compared = self._what_a_forward_changes(), []
        with torch.no_grad():
            for part in parts:
                with self._autocast():
                    compared.append(self.model.compared(self.model.represent(*part), weights))
            whole = {name: gather_rows(torch.cat([rows[name] for rows in compared])) for name in compared[0]}
        rewind()
        whole = {name: rows.requires_grad_() for name, rows in whole.items()}
        losses = self.model.batch_losses(whole)
        at_all = torch.autograd.grad(weighted(losses, weights), [*whole.values()], materialize_grads=True)
        sizes, gradients = [len(part.image) for part in parts], [{} for _ in parts]
        for name, gradient in zip(whole, at_all, strict=True):
            # times the processes, by whose number DistributedDataParallel divides
            own = world_size() * gradient[local_slice(len(gradient))]
            for at_rows, rows in zip(gradients, own.split(sizes), strict=True):
                at_rows[name] = rows
        return {name: loss.detach() for name, loss in losses.items()}, gradients

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)

    def _what_a_forward_changes(self) -> Callable[[], None]:
        """A function that puts the batch-norm statistics back to what they are now."""
        by_type: dict[torch.dtype, list[torch.Tensor]] = {}
        for buffer in self.model.buffers():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        kept = {dtype: [torch.empty_like(buffer) for buffer in buffers] for dtype, buffers in by_type.items()}

        def copy(to: Mapping, what: Mapping) -> None:
            for dtype, values in what.items():
                torch._foreach_copy_(to[dtype], values)  # one kernel for all of a type

        copy(kept, by_type)
        return partial(copy, by_type, kept)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "lost_in_a_row": self.lost_in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises RuntimeError, ValueError or KeyError where the state is not of this model and optimizer."""
        weight_decay = self.optimizer.param_groups[0]["weight_decay"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.lost_in_a_row = state.get("lost_in_a_row", 0)  # older code had none
        for group in self.optimizer.param_groups:  # the command line's, which --resume force may have changed
            group["weight_decay"], group["fused"] = weight_decay, True


# Not the encoders: their compiled gradients in bf16 were not finite on an H200 with PyTorch 2.11
COMPILED_ON_CUDA = ("represent_tokens", "batch_losses", "pair_losses")


def compile_model(model: Model, device: torch.device) -> None:
    """torch.compile of what training calls: the whole model on CPUs, slots and losses on CUDA devices.

    The first step, and the first of every other batch size, takes minutes longer; evaluation stays as it is. UserError
    where nothing can be compiled: PyTorch needs a C++ compiler on CPUs, Triton and a C compiler on CUDA devices.
    """
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds: each back end has its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--compile: PyTorch cannot compile on this machine: {reason}") from error
    if device.type == "cpu":
        model.compile()
        return
    for name in COMPILED_ON_CUDA:
        if hasattr(model, name):
            setattr(model, name, torch.compile(getattr(model, name)))


def with_sync_bn(model: Model, device: torch.device) -> Model:
    """The model with batch norm over the rows of all processes. UserError on CPUs, where PyTorch has none."""
    if device.type != "cuda":
        raise UserError("--sync_bn: PyTorch synchronises batch norm on CUDA devices only")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
