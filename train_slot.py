"""Train joint slot attention on unlabelled image-audio pairs.

    bash train_script.sh synthetic synthetic cpu          # trains on the built-in data and scores
    python train_slot.py --trainset custom --train_data_path /path/to/pairs/ --experiment_name mine --gpu 0 --dry_run

Every epoch sees every full batch; best.pth is chosen by retrieval on held-out training pairs, without boxes. All flags,
and their defaults by recipe, are in recipes.py.
"""

import inspect
import math
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dataset import TRAIN_SETS, TrainingPairs, hold_out, select_training_pairs
from distributed import barrier, own_device, process_group, world_size
from models import MODELS, Model
from recipes import OUR_LOSSES, add_flags, parse
from resnet import Encoder, load_image_weights, weights_digest
from scoring.threshold import known_classes, universal_threshold
from sets import (
    ALL_SETS,
    SAME_VIDEO,
    build_test_sets,
    overlap_with_tests,
    parse_testsets,
    requests,
    trained_on,
    undecodable,
)
from shards.addresses import are_shards, shown
from shards.pairs import PairsInShards, ShardedPairs, hold_out_shards, select_from_shards
from training.alignment import align
from training.decoded import keep_decoded
from training.features import STANDARDISED, cache_features, standardise
from training.resume import RunFolder, RunState, StopFlag, fingerprints, should_resume
from training.run import score_sets, train_one_epoch, validate
from training.step import Optimisation, choose_amp, compile_model, keep_freed_memory, lr_factor, with_sync_bn
from utils import ArgumentParser, UserError, as_user_error, provenance, run_cli, seed_everything

FEW_HELD_OUT = 30  # pairs, that say little of an epoch or a threshold
SELECTED_BY = {  # --select: (what best.pth is chosen by, the figure that says so)
    "retrieval": (
        "retrieval on held-out training pairs (no boxes): the latest epoch within one standard error of the best",
        "val/retrieval_score",
    ),
    "test": ("cIoU of {map} on test set {first}", "{first}/{map}/cIoU"),
    "last": ("last epoch (no pairs were held out)", "epoch"),
}

# ---------------------------------------------------------------- settings


def parse_args(argv=None):
    parser = ArgumentParser(description="Train joint slot attention on unlabelled image-audio pairs.")
    add_flags(parser)
    return parse(parser, argv)


def check_args(args) -> None:
    if args.select == "test" and not (args.testset and args.eval_every):
        raise UserError("--select test needs --testset and --eval_every 1 or more")
    if args.select == "test" and args.eval_every > args.epochs:
        raise UserError(f"--select test with --eval_every {args.eval_every} never tests within {args.epochs} epochs")
    ours = [name for name in OUR_LOSSES if name in args.weights]
    if args.objective == "maxpool":
        ignored = [f"--weights {name}" for name in args.weights if name != "info_nce"]
        if args.reciprocal_k:
            ignored.append("--reciprocal_k")
        if ignored:
            raise UserError(f"{', '.join(ignored)}: --objective maxpool would ignore it, leave it out")
    if args.num_slots == 1 and ours:
        raise UserError(f"{', '.join(ours)}: one slot has every token to itself, --num_slots 2 or more")
    if args.unfreeze_last and not args.freeze_image:
        raise UserError("--unfreeze_last: without --freeze_image every stage is trained")
    if args.frozen_weights == "reference" and (args.unfreeze_last or args.image_weights == "none"):
        raise UserError("--recipe frozen_weights=reference: only weights of a file or download that stay as they are")
    if args.testset:
        requests(args)
    if args.resume != "false" and args.overwrite:
        raise UserError("--resume continues an experiment, --overwrite replaces it: choose one")
    if "/" in args.experiment_name or args.experiment_name in ("", ".", ".."):
        raise UserError(f"--experiment_name {args.experiment_name!r} must be a plain name: it becomes a folder")
    if args.batch_size % world_size():
        raise UserError(f"--batch_size {args.batch_size} must be a multiple of the {world_size()} processes")


# ---------------------------------------------------------------- model and data


class TrainingData(NamedTuple):
    train: TrainingPairs
    held_out: TrainingPairs
    counts: dict[str, int]  # expected, left out, train, held_out
    left_out: dict[str, str]  # id: why
    class_of: Mapping[str, str] = {}  # as far as `classes.csv` in the root says; the universal threshold alone asks


def build_model(args, device: torch.device) -> Model:
    kind = MODELS.get(args.objective, MODELS["paper"])
    names = inspect.signature(kind).parameters
    with as_user_error(ValueError):
        settings = {name: value for name, value in vars(args).items() if name in names}
        model = kind(**settings, standardise=args.freeze_image)
        if args.image_weights != "none":
            load_image_weights(model.imgnet, args.image_encoder, args.image_weights)
        align(model.imgnet)
        model.infer_image_size = args.infer_image_size or args.image_size
        for size in {args.image_size, model.infer_image_size}:
            model.imgnet.check_size(size)
    if args.sync_bn:
        model = with_sync_bn(model, device)
    model = model.to(device, memory_format=torch.channels_last)
    if args.compile:
        compile_model(model, device)
    return model


def build_optimisation(args, model: Model, device: torch.device) -> Optimisation:
    """Freezes the image encoder first, where that is asked for."""
    with as_user_error(ValueError):
        unfrozen = model.imgnet.freeze(args.unfreeze_last) if args.freeze_image else []
    return Optimisation(
        model,
        device,
        args.lr,
        args.weight_decay,
        args.clip,
        choose_amp(args.amp, device),
        args.micro_batch,
        all_weights=bool(args.mask_ratio and args.weights.get("reconstruction") and not args.warmup),
        slower=unfrozen,
        slower_by=args.unfrozen_lr,
    )


def build_training_data(args) -> TrainingData:
    """Pairs to train on and held-out ones; prints how many training ids are also test ids, as far as is known."""
    root = args.train_data_path or os.environ.get(TRAIN_SETS[args.trainset].root)
    sharded = are_shards(root)
    select = select_from_shards if sharded else select_training_pairs
    selection = select(args.trainset, root, args.metadata, args.train_list, args.allow_missing)
    pairs, left_out = selection.pairs, dict.fromkeys(selection.missing, "image or audio not found")
    if args.allow_missing:
        left_out |= undecodable(pairs, args.num_workers)
    excluded = set(left_out) | tested(args, [pair.id for pair in pairs], "training")
    pairs = leave_out(pairs, excluded)
    rule = args.val_list, args.val_fraction, args.seed, args.allow_missing
    train, held_out = hold_out_shards(pairs, *rule) if sharded else hold_out(args.trainset, pairs, root, *rule)
    known = {pair.id for pair in selection.pairs}
    if listed := [pair.id for pair in held_out if pair.id not in known]:
        excluded |= tested(args, listed, "held-out")
    if len(train) < args.batch_size:
        raise UserError(f"--batch_size {args.batch_size} is larger than the {len(train)} training pairs: lower it")
    k = args.reciprocal_k
    if k is not None and k >= args.batch_size:
        raise UserError(f"--reciprocal_k {k} leaves no negative in a batch of {args.batch_size}: lower it")
    sizes = args.image_size, args.audio_seconds
    if args.allow_missing and args.val_list:
        excluded |= set(undecodable(held_out, args.num_workers))
    held_out = leave_out(held_out, excluded)
    counts = {
        "expected": selection.expected,
        "left out": selection.expected - len(pairs),
        "train": len(train),
        "held_out": len(held_out),
    }
    if sharded and args.train_data_path:
        args.train_data_path = shown(root)  # what is printed and stored holds no signature
    kind = ShardedPairs if sharded else TrainingPairs
    training_pairs = kind(train, *sizes, args.augment, args.seed, silence="silence" in args.weights)
    classes = {} if sharded else known_classes(Path(root or TRAIN_SETS[args.trainset].root))
    return TrainingData(training_pairs, kind(held_out, *sizes, "none"), counts, left_out, classes)


def leave_out(pairs: Sequence, ids: Collection[str]) -> Sequence:
    """The pairs whose id is not among them."""
    return pairs.without(ids) if isinstance(pairs, PairsInShards) else [pair for pair in pairs if pair.id not in ids]


def tested(args, ids: Sequence[str], what: str) -> set[str]:
    """The ids that are to be left out because they are test ids; prints how many are, as far as is known."""
    overlap = overlap_with_tests(ids, args.metadata)
    if not overlap and args.exclude_test_overlap:
        raise UserError(f"--exclude_test_overlap: {args.metadata} holds no test list (prepare_data.py metadata)")
    if not overlap and not TRAIN_SETS[args.trainset].lists_in_root:  # which brings its own tests
        print(f"overlap with published test sets: not known, {args.metadata} holds no list of one")
    removed = "removed" if args.exclude_test_overlap else "--exclude_test_overlap removes them"
    for name, shared in overlap.items():
        are = "of the same video as a test id" if name.endswith(SAME_VIDEO) else "test ids"
        if shared:
            print(
                f"{len(shared)} of the {len(ids)} {what} ids are {are} of {name.removesuffix(SAME_VIDEO)} ({removed})"
            )
    return {i for shared in overlap.values() for i in shared} if args.exclude_test_overlap else set()


def prepare_features(args, encoder: Encoder, data: TrainingData, device: torch.device) -> None:
    """Features of a frozen image encoder, and the mean and deviation that its projection sees them with."""
    if not args.freeze_image:
        return
    if args.cached_views and not (args.unfreeze_last or args.dry_run):
        sets = [(data.train, args.cached_views), (data.held_out, 1)]
        print(cache_features(encoder, sets, device, args.num_workers, args.cache_by == "contents"))
    standardise(encoder, data.train, device, args.batch_size if args.dry_run else STANDARDISED)


def describe_run(args, data: TrainingData, optimisation: Optimisation, selected_by: str) -> dict[str, Any]:
    """What every checkpoint of the run says about it, with a reference to the frozen weights that it is not to hold."""
    model = optimisation.model
    marks = fingerprints(data.train.pairs, data.held_out.pairs, optimisation.amp)
    about = {"model_config": model.config, "args": vars(args), "marks": marks, "selected_by": selected_by}
    if args.freeze_image:
        digest = weights_digest(model.imgnet.trunk_state())
        marks["frozen weights"] = digest[:12]
        if args.frozen_weights == "reference":
            source = args.image_weights if args.image_weights == "auto" else str(Path(args.image_weights).absolute())
            about["frozen_weights"] = {"encoder": args.image_encoder, "source": source, "sha256": digest}
    return about


# ---------------------------------------------------------------- what is printed


def print_start(args, data: TrainingData, test_sets, optimisation: Optimisation) -> None:
    for name, value in provenance().items():
        print(f"{name}: {value}")
    settings = "settings: " + ", ".join(f"{name} {value}" for name, value in sorted(vars(args).items()))
    print(textwrap.fill(settings, 120, break_long_words=False, break_on_hyphens=False))
    millions = sum(p.numel() for p in optimisation.model.parameters()) / 1e6
    device, precision = optimisation.device, optimisation.amp or "float32"
    print(f"parameters: {millions:.2f} M; device: {device}; processes: {world_size()}; precision: {precision}")
    print("training pairs: " + ", ".join(f"{count} {name}" for name, count in data.counts.items()))
    if 0 < len(data.held_out) < FEW_HELD_OUT and args.select == "retrieval":
        print(
            f"warning: {len(data.held_out)} held-out pairs choose the epoch and the universal threshold, nearly by "
            "chance; a larger --val_fraction holds out more"
        )
    ids = [pair.id for pair in data.train.pairs] if test_sets else []
    for name, dataset in test_sets.items():
        known = trained_on(ids, dataset.ground_truth, [pair.id for pair in dataset.pairs])["pairs"]
        print(f"test set {name}: {len(dataset)} of {dataset.ground_truth.expected} pairs")
        if known:
            print(f"  {known} of them are trained on, so say nothing of new data: --train_list FILE can leave them out")
    if device.type == "cpu" and args.image_encoder == "resnet18" and not args.freeze_image:
        print("the full-size network is made for GPUs: on a CPU, --recipe small trains a small one")


def print_epoch(args, line) -> None:
    ours = [name for name in OUR_LOSSES if args.weights.get(name)]
    shown = ("loss", "info_nce", *ours, "pairs_per_second", "data_wait", "val/retrieval_score")
    figures = ", ".join(f"{name} {line[name]:.4g}" for name in shown if name in line)
    print(f"epoch {line['epoch']}/{args.epochs}: {figures}", flush=True)


def test_command(args) -> str:
    """The command that scores what was trained, preceded by the data roots that came from the environment."""
    roots = {ALL_SETS[name].root for name in parse_testsets(args.testset)}
    command = [f"{name}={shlex.quote(os.environ[name])}" for name in sorted(roots) if name in os.environ]
    python = Path(sys.executable)
    here = str(python.relative_to(Path.cwd())) if python.is_relative_to(Path.cwd()) else "python"
    command += [here, "test_model.py", "--save_overlays", "true"]
    has_prior = args.image_encoder == "resnet18" and args.image_weights != "none"
    command += ["--imagenet_weights", "none"] * (not has_prior)
    data = "testset", "test_data_path", "test_gt_path", "test_list", "metadata"
    for name in ("model_dir", "experiment_name", *data, "gpu"):
        if getattr(args, name) is not None:
            command += [f"--{name}", shlex.quote(str(getattr(args, name)))]
    return " ".join(command + ["--allow_missing true"] * args.allow_missing)


def print_end(args, path: Path, warning: str | None = None) -> None:
    if warning:
        print(f"warning: {warning}")
    print(f"in {path}: best.pth, latest.pth, log.jsonl, curves.png" + ", results/" * bool(args.testset))
    if args.testset:
        print(f"test it again, with a picture of every sample:\n  {test_command(args)}")


# ---------------------------------------------------------------- from start to end


def chosen_by(args, data: TrainingData, model: Model, test_sets: Mapping) -> tuple[str, str]:
    """What best.pth is chosen by, in words, and the name of the number that decides."""
    select = args.select if args.select == "test" or len(data.held_out) else "last"
    return tuple(text.format(map=model.primary_map, first=next(iter(test_sets), "")) for text in SELECTED_BY[select])


def weights_in(epoch: int, args) -> dict[str, float]:
    """The weights of the losses; in the first `warmup` epochs only the contrastive loss has one."""
    return args.weights if epoch >= args.warmup else dict.fromkeys(args.weights, 0.0) | {"info_nce": 1.0}


def choose_threshold(model: Model, data: TrainingData, device: torch.device, **settings) -> dict | None:
    """The model's universal threshold on held-out pairs; on training pairs where fewer than two were held out."""
    if len(data.held_out) > 1:
        pairs, source = data.held_out.pairs, "held-out training pairs"
    else:
        pairs, source = data.train.pairs, "training pairs, as none were held out"
    return universal_threshold(model, pairs, device, source, class_of=data.class_of, **settings)


def dry_run(train: Callable, validate: Callable, test: Callable) -> None:
    print(f"one step: loss {train(max_steps=1)['loss']:.4f}")
    for name, value in validate().figures.items():
        print(f"one batch of held-out pairs: {name} {value:.3f}")
    for name, value in test(max_batches=1).items():
        if name.endswith(("AUD/cIoU", "AUD/pointing")):
            print(f"one evaluation batch: {name} {value:.3f}")
    print("dry run: data, model, one step and one evaluation batch work; nothing was written")


def main() -> None:
    args = parse_args()
    device = own_device(args.gpu)
    if device.type == "cpu":
        keep_freed_memory()
    with process_group(device):
        check_args(args)
        torch.backends.cudnn.benchmark = True  # for the training, whose sizes stay
        path = Path(args.model_dir) / args.experiment_name
        resume = should_resume(path, args)
        seed_everything(args.seed)
        data = build_training_data(args)
        model = build_model(args, device)
        test_sets = build_test_sets(args, model.infer_image_size, args.audio_seconds) if args.testset else {}
        optimisation, state = build_optimisation(args, model, device), RunState()
        selected_by, measure = chosen_by(args, data, model, test_sets)
        folder = RunFolder(path, optimisation, state, describe_run(args, data, optimisation, selected_by))
        print_start(args, data, test_sets, optimisation)
        prepare_features(args, model.imgnet, data, device)
        often = [data.train, data.held_out, *(test_sets.values() if args.eval_every else ())]
        print(keep_decoded(often, "false" if args.dry_run else args.decode_once))

        steps = len(data.train) // args.batch_size
        factor = partial(lr_factor, steps, args.epochs, args.lr_schedule, args.lr_warmup)
        loading = {"batch_size": args.batch_size, "workers": args.num_workers}
        inference = {"infer_sharpening": args.infer_sharpening, "infer_smoothing": args.infer_smoothing}
        train = partial(train_one_epoch, optimisation, data.train, folder, factor, **loading)
        held_out = partial(validate, model, data.held_out, device, **loading)
        test = partial(score_sets, model, test_sets, folder, device, **loading, **inference)
        if args.dry_run:
            return dry_run(partial(train, args.weights), partial(held_out, count=args.batch_size), test)

        resumed = folder.resume(args) if resume else {}
        with folder.opened(args, data.left_out, data.train.pairs, resumed), StopFlag(device) as stop:
            save_between = partial(folder.save_between_steps, every=args.save_every_steps, stop=stop)
            for epoch in range(state.epoch, args.epochs):
                line, title = {"epoch": epoch + 1}, f"epoch {epoch + 1}/{args.epochs}"
                line |= train(weights_in(epoch, args), title=title, after_step=save_between)
                with folder.kept():
                    validation = held_out()
                    line |= validation.figures
                    if args.eval_every and (epoch + 1) % args.eval_every == 0:
                        line |= test(on_batch=[stop.leave_alone])
                scores = validation.scores if measure in validation.figures else None
                is_chosen = state.end_epoch(line.get(measure, -math.inf), scores)
                folder.write(line, step=state.epoch * steps)
                also = ["best"] if is_chosen else []
                if args.keep_every and state.epoch % args.keep_every == 0:
                    also.append(f"epoch_{state.epoch:04d}")
                folder.save("latest", *also)
                print_epoch(args, line)
                stop.leave_together()
            barrier()
            last = {} if folder.last_is_chosen() else test(on_batch=[stop.leave_alone])
            settings = {"seed": args.seed, "between": stop.leave_alone, **loading}
            best = folder.end(partial(choose_threshold, model, data, device, **settings))
            print(f"best.pth: epoch {best['epoch']} of {state.epoch}, chosen by {best['selected_by']}")
            folder.finish(test(on_batch=[stop.leave_alone], chosen=best, last=last), last)
            print_end(args, path, folder.log.warning if folder.log else None)


if __name__ == "__main__":
    run_cli(main)
