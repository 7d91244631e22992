"""One epoch of training, and what is measured after it.

All random choices follow from the seed, the epoch and the step, except token masks, which PyTorch's CPU generator
draws: its state is in the checkpoint.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from annotations import check_finite
from dataset import EvaluationPairs, TrainingPairs, make_loader
from distributed import all_gather_object, broadcast_buffers, hidden_bar, local_slice, world_size
from model_slot import TokenMasks
from models import Model, describe_checkpoint
from reports.pictures import Drawer, images_of
from reports.table import publish, training_overlap
from scoring.bootstrap import RESAMPLES
from scoring.evaluate import OnBatch, embed_set, evaluate
from scoring.questions import Negatives
from scoring.retrieval import ranks_both_ways
from sets import count_undecodable
from training.resume import RunFolder, RunState
from training.step import Inputs, NotFinite, Optimisation
from utils import UserError, as_user_error, peak_memory_gib, random_states

TABLE_ROWS = 10_000  # wandb's limit
SHORTEST = 1e-9  # s that a step takes at least, whatever the clock says
UNAVERAGED = ("seconds", "waiting", "skipped_steps", "lost_steps")  # among the sums of an epoch


def train_one_epoch(
    optimisation: Optimisation,
    train: TrainingPairs,
    folder: RunFolder,
    lr_factor: Callable[[int], float],
    weights: Mapping[str, float],
    batch_size: int,
    workers: int,
    title: str = "",
    after_step: Callable[[], None] | None = None,
    max_steps: int | None = None,
) -> dict[str, float]:
    """Take the remaining steps of the current epoch -> its averages: losses by name, speed, memory.

    lr_factor: step of the whole run -> share of the learning rate; weights: {loss: weight}; batch_size: over all
    processes; after_step: called after each; max_steps: for a dry run.
    """
    state, model = folder.state, optimisation.model
    train.epoch = state.epoch
    if not state.step:  # an epoch that was begun with other lanes goes on with the same batches
        state.lanes = world_size(), workers
    batches = train.batches(batch_size, state.lanes)
    first_step = state.epoch * len(batches)
    batches = batches[:max_steps]
    own = [batch[local_slice(batch_size)] for batch in batches[state.step :]]
    model.train()
    with (
        count_undecodable(train.pairs, workers),
        tqdm(
            total=len(batches), initial=state.step, desc=title, leave=False, unit="batch", disable=hidden_bar()
        ) as bar,
    ):
        clock = time.monotonic()
        for batch in make_loader(train, batch_size, workers, own, optimisation.device, keep_workers=True):
            loaded = time.monotonic()
            factor = lr_factor(first_step + state.step)
            figures = train_step(optimisation, batch, folder, weights, factor, batch_size)
            state.step += 1
            seconds = max(time.monotonic() - clock, SHORTEST)
            waiting = min(max(loaded - clock, 0.0), seconds)
            for name, value in {**figures, "waiting": waiting, "seconds": seconds}.items():
                state.sums[name] = state.sums.get(name, 0.0) + value
            if folder.log:
                speed = {"pairs_per_second": batch_size / seconds, "data_wait": waiting / seconds}
                measured = {"lr": optimisation.lr * factor, "memory_gib": peak_memory_gib(optimisation.device)}
                folder.log.step(first_step + state.step, {**figures, **speed, **measured})
            clock = time.monotonic()
            bar.update()
            shown = {name: f"{state.sums[name] / state.step:.3g}" for name in ("loss", *weights) if name in figures}
            bar.set_postfix(shown | {"pairs/s": f"{_speed(state, batch_size)['pairs_per_second']:.0f}"}, refresh=False)
            if after_step:
                after_step()
    broadcast_buffers(model.buffers())
    place = {"lr": optimisation.lr * lr_factor(first_step + state.step - 1), "steps": state.step}
    return _averages(state) | place | _speed(state, batch_size) | {"memory_gib": peak_memory_gib(optimisation.device)}


def _averages(state: RunState) -> dict[str, float]:
    """Losses over the steps that were not lost, the norm over those that were not skipped, and how many were."""
    skipped, lost = (state.sums.get(name, 0.0) for name in ("skipped_steps", "lost_steps"))
    counted = max(state.step - lost, 1)
    averages = {name: value / counted for name, value in state.sums.items() if name not in UNAVERAGED}
    if skipped:
        averages["skipped_steps"] = skipped
        averages["grad_norm"] *= counted / max(state.step - skipped, 1)
    return averages


def _speed(state: RunState, batch_size: int) -> dict[str, float]:
    seconds = state.sums["seconds"]
    return {
        "pairs_per_second": state.step * batch_size / seconds,
        "data_wait": state.sums["waiting"] / seconds,
    }


def train_step(
    optimisation: Optimisation, batch, folder: RunFolder, weights: Mapping[str, float], factor: float, batch_size: int
) -> dict[str, float]:
    """One step on this process's rows of a batch. A loss that is not finite ends the run; its batch is saved."""
    before, device = random_states(), optimisation.device
    rows = local_slice(batch_size)
    inputs = Inputs(
        batch.image.to(device, non_blocking=True),
        batch.spectrogram.to(device, non_blocking=True),
        TokenMasks(*(_sent(mask[rows], device) for mask in optimisation.model.draw_masks(batch_size))),
    )
    try:
        return optimisation.step(inputs, weights, factor)
    except NotFinite as error:
        ids = [name for part in all_gather_object(batch.id) for name in part]
        where = f"step {folder.state.step + 1} of epoch {folder.state.epoch + 1}"
        kept = folder.save_failed(ids, before)
        named = f"ids {', '.join(ids[:8])} ...{kept}"
        raise UserError(f"the loss or its gradient is not finite in {where} ({error}): {named}") from error


def _sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on the device, which the host does not wait for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


# ---------------------------------------------------------------- figures


class HeldOut(NamedTuple):
    """Retrieval on held-out pairs."""

    figures: dict[str, float]  # by name
    scores: torch.Tensor | None = None  # (N,) of each pair, whose mean is val/retrieval_score


def validate(
    model: Model, held_out: TrainingPairs, device: torch.device, batch_size: int, workers: int, count: int | None = None
) -> HeldOut:
    """Retrieval on at most `count` held-out pairs, without boxes or classes; empty except on the first process."""
    if not len(held_out):
        return HeldOut({})
    with count_undecodable(held_out.pairs, workers):
        embeddings = embed_set(model, held_out, device, batch_size, workers, count, keep_workers=True)
    if embeddings is None:
        return HeldOut({})
    with as_user_error(ValueError):
        names = [pair.id for pair in held_out.pairs[:count]]
        check_finite(names, dict(zip(("image embedding", "audio embedding"), embeddings, strict=True)))
    ranks = ranks_both_ways(*embeddings)
    scores = ranks.scores()
    figures = {"val/retrieval_score": scores.mean().item()} | {
        f"val/{direction}_{k}": value for direction, by_k in ranks.recall().items() for k, value in by_k.items()
    }
    return HeldOut(figures, scores)


def score_sets(
    model: Model,
    test_sets: Mapping[str, EvaluationPairs],
    folder: RunFolder,
    device: torch.device,
    on_batch: Iterable[OnBatch] = (),
    chosen: Mapping[str, Any] | None = None,
    last: Mapping[str, float] | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Score every test set -> {"set/map/metric": value}; empty except on the first process.

    settings: of `evaluate`. chosen: the checkpoint of a finished run, whose results are published with intervals and
    with negative audio, and beside them the last epoch's: `last`, as this function returned them; empty where the last
    epoch is the chosen one.
    """
    scores = {}
    if chosen:  # the first process knows its threshold
        threshold = all_gather_object((chosen.get("threshold") or {}).get("value"))[0]
        settings |= {"threshold": threshold, "negatives": None if threshold is None else Negatives()}
    for name, dataset in test_sets.items():
        results = folder.path / "results" / name
        sheet, drawer = results / "contact_sheet.png", None
        if folder.log:
            drawer = Drawer(sheet, dataset.ground_truth, len(dataset), images_of(dataset.pairs))
        resamples, shown = RESAMPLES if chosen else 0, [*on_batch, *([drawer] if drawer else [])]
        evaluation = evaluate(model, dataset, device, resamples=resamples, on_batch=shown, **settings)
        if evaluation is None:
            continue
        if drawer:
            drawer.finish()
            folder.log.add_sheet(name, drawer.sheet)
            folder.log.add_rows(name, evaluation.rows[:TABLE_ROWS])
        for map_name, figures in evaluation.results["maps"].items():
            scores |= {f"{name}/{map_name}/{metric}": value for metric, value in figures.items()}
        if chosen:
            path = folder.path / "best.pth"
            about = training_overlap(path, dataset.ground_truth, [pair.id for pair in dataset.pairs])
            about["checkpoint"] = describe_checkpoint(path, chosen)
            if folder.log.warning:
                about["training_warning"] = folder.log.warning
            about["last_epoch"] = {"epoch": folder.state.epoch, "maps": by_map(last or scores, name)}
            publish(evaluation, results, testset=name, **about)
    return scores


def by_map(scores: Mapping[str, float], name: str) -> dict[str, dict[str, float]]:
    """{"set/map/metric": value} -> {map: {metric: value}} of the set `name`."""
    found: dict[str, dict[str, float]] = {}
    for key, value in scores.items():
        of_set, map_name, metric = key.split("/", 2)
        if of_set == name:
            found.setdefault(map_name, {})[metric] = value
    return found
