"""Train joint slot attention on unlabelled image-audio pairs.

    bash train_script.sh synthetic synthetic cpu          # data, hyper-parameters and this script in one go
    python train_slot.py --trainset custom --train_data_path /path/to/pairs/ --experiment_name mine --gpu 0 --dry_run

Every epoch sees every full batch; best.pth is chosen by retrieval on held-out training pairs, without boxes.
"""

import inspect
import os
import shlex
import sys
from pathlib import Path

import torch

from dataset import TRAIN_SETS, TrainingPairs, hold_out, select_training_pairs
from distributed import own_device, process_group, world_size
from models import OBJECTIVES, Model
from resnet import RECIPES, load_imagenet_weights
from sets import ALL_SETS, add_test_set_flags, build_test_sets, overlap_with_tests, parse_testsets, undecodable
from training.resume import goes_on
from training.run import Run, TrainingData
from training.step import LR_DECAY, MAP_LOSSES, with_sync_bn
from utils import ArgumentParser, UserError, as_user_error, number, provenance, run_cli, seed_everything

# ---------------------------------------------------------------- command line


def add_method_flags(parser: ArgumentParser) -> None:
    """What the paper defines: the model's shape and its losses; the defaults are the paper's."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--objective",
        choices=[*OBJECTIVES],
        default="joint_slot",
        help="joint_slot: the paper's; maxpool_contrastive: EZ-VSL's on the same encoders, where the flags of slots, "
        "masks and losses have no effect but --tau",
    )
    group.add_argument("--arch", choices=sorted(RECIPES), default="resnet18", help="encoder recipe")
    group.add_argument("--dim", type=number(int, low=2), help="embedding channels (default: the recipe's)")
    group.add_argument("--num_slots", type=number(int, low=1), default=2, help="slot 0 is the target")
    group.add_argument("--iterations", type=number(int, low=1), default=5, help="of slot attention")
    group.add_argument("--image_size", type=number(int, low=16), default=224, help="pixels")
    group.add_argument("--audio_seconds", type=number(float, low=0.1), default=5.0, help="length of sound")
    group.add_argument("--imagenet_weights", default="auto", help="start of the image encoder: auto, none, or a file")
    group = parser.add_argument_group("losses")
    group.add_argument("--tau", type=number(float, above=0), default=0.03, help="temperature of the contrastive loss")
    group.add_argument("--mask_ratio", type=number(float, low=0, high=0.99), default=0.1, help="share of masked tokens")
    group.add_argument("--reciprocal_k", type=number(int, low=0), help="false negatives (default: 20 per 256; 0: off)")
    group.add_argument("--lam1", type=number(float, low=0), default=0.1, help="weight of reconstruction")
    group.add_argument("--lam2", type=number(float, low=0), default=0.1, help="weight of slot divergence")
    group.add_argument("--lam3", type=number(float, low=0), default=100.0, help="weight of attention matching")
    weight = number(float, low=0)
    group.add_argument("--map_contrast", type=weight, default=0.0, help="weight of a contrast of best tokens; ours")
    group.add_argument("--share_contrast", type=weight, default=0.0, help="weight of a contrast of token shares; ours")
    group.add_argument(
        "--foreign_claims", type=weight, default=0.0, help="weight of what sounds claim of other pictures; ours"
    )
    group.add_argument(
        "--foreign_tokens",
        type=weight,
        default=0.0,
        help="weight within attention matching of other pictures' tokens; ours",
    )
    group.add_argument("--silence", type=weight, default=0.0, help="weight of what silence and noise claim; ours")
    group.add_argument(
        "--warmup", type=number(int, low=0), default=0, help="first epochs with the contrastive loss only"
    )


def add_run_flags(parser: ArgumentParser) -> None:
    """How the weights are found, and what a run keeps and shows."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=number(int, low=1), default=100, help="passes over the training pairs")
    group.add_argument("--batch_size", type=number(int, low=2), default=256, help="pairs per step, of all processes")
    group.add_argument(
        "--micro_batch", type=number(int, low=1), help="pairs of a process that go through the model at once"
    )
    group.add_argument("--sync_bn", action="store_true", help="batch norm over all processes (CUDA)")
    group.add_argument("--lr", type=number(float, above=0), default=5e-5, help="learning rate of AdamW")
    group.add_argument("--weight_decay", type=number(float, low=0), default=0.01, help="of AdamW")
    group.add_argument(
        "--lr_schedule",
        choices=("constant", "step", "cosine"),
        default="constant",
        help=f"after the warm-up; step: times {LR_DECAY} per epoch",
    )
    group.add_argument(
        "--lr_warmup", type=number(float, low=0, high=1), default=0.0, help="share of steps to reach --lr"
    )
    group.add_argument("--clip", type=number(float, low=0), default=0.0, help="largest gradient norm; 0: no clipping")
    group.add_argument(
        "--amp", choices=("auto", "bf16", "fp16", "none"), default="auto", help="auto: bf16 where it is fast"
    )
    group.add_argument(
        "--seed", type=number(int, low=0, high=2**32 - 1), default=0, help="same seed, same numbers on a CPU"
    )
    group = parser.add_argument_group("run")
    group.add_argument("--gpu", default="0", help="number of a CUDA device, or cpu; torchrun numbers them itself")
    group.add_argument("--model_dir", default="./checkpoints", help="folder of experiments")
    group.add_argument("--experiment_name", required=True, help="folder of this run below --model_dir")
    group.add_argument("--select", choices=("retrieval", "test"), default="retrieval", help="what chooses best.pth")
    group.add_argument(
        "--eval_every", type=number(int, low=0), default=1, help="epochs between tests; 0: at the end only"
    )
    group.add_argument("--alpha", type=number(float, low=0, high=1), default=0.6, help="weight of AUD in IQR")
    group.add_argument("--infer_sharpening", type=number(float, above=0), default=0.1, help="of the maps in tests")
    group.add_argument(
        "--infer_smoothing",
        type=number(float, low=0, high=1 / 3),
        default=0.0,
        help="of the maps in tests: share that flows to each neighbour",
    )
    group.add_argument("--wandb", choices=("true", "offline", "false"), default="false", help="log to Weights & Biases")
    group.add_argument("--resume", action="store_true", help="go on from latest.pth, exactly")
    group.add_argument("--force", action="store_true", help="resume with other data or hyper-parameters")
    group.add_argument(
        "--save_every_steps", type=number(int, low=0), default=0, help="latest.pth within an epoch; 0: at its end"
    )
    group.add_argument("--keep_every", type=number(int, low=0), default=0, help="epochs between checkpoints to keep")
    group.add_argument("--overwrite", action="store_true", help="replace an experiment of the same name")
    group.add_argument(
        "--dry_run", action="store_true", help="one batch, one step, one evaluation batch; writes nothing"
    )


def parse_args():
    parser = ArgumentParser(description="Train joint slot attention on unlabelled image-audio pairs.")
    group = parser.add_argument_group("training data")
    group.add_argument(
        "--trainset", choices=sorted(TRAIN_SETS), default="synthetic", help="row of the table in dataset.py"
    )
    group.add_argument("--train_data_path", help="root of the training data (default: the set's environment variable)")
    group.add_argument("--train_list", help="list of training ids in the place of the set's own")
    group.add_argument("--val_list", help="list of held-out ids that choose best.pth")
    group.add_argument(
        "--val_fraction", type=number(float, low=0, high=0.5), default=0.02, help="held out without a list"
    )
    group.add_argument(
        "--augment", choices=("hard", "plain"), default="hard", help="hard: the paper's; plain: crop, flip"
    )
    group.add_argument("--num_workers", type=number(int, low=0), default=2, help="loader processes, of each process")
    group.add_argument("--exclude_test_overlap", action="store_true", help="do not train on ids of known test lists")
    add_test_set_flags(parser.add_argument_group("test data"), default=None)
    add_method_flags(parser)
    add_run_flags(parser)
    return parser.parse_args()


def check_args(args) -> None:
    if args.select == "test" and not (args.testset and args.eval_every):
        raise UserError("--select test needs --testset and --eval_every 1 or more")
    if args.select == "test" and args.eval_every > args.epochs:
        raise UserError(f"--select test with --eval_every {args.eval_every} never tests within {args.epochs} epochs")
    of_slots = sorted(f"--{name}" for name in (*MAP_LOSSES, "silence", "reciprocal_k") if getattr(args, name))
    if args.objective != "joint_slot" and of_slots:
        raise UserError(f"{', '.join(of_slots)}: --objective {args.objective} would ignore it, leave it out")
    if args.foreign_tokens and not args.lam3:
        raise UserError("--foreign_tokens is a weight within attention matching, which --lam3 0 leaves out")
    shared = ("share_contrast", "foreign_claims", "foreign_tokens", "silence")  # between slots
    of_shares = [f"--{name}" for name in shared if getattr(args, name)]
    if args.num_slots == 1 and of_shares:
        raise UserError(f"{', '.join(of_shares)}: one slot has every token to itself, --num_slots 2 or more")
    if args.testset:
        parse_testsets(args.testset)
    if args.resume and args.overwrite:
        raise UserError("--resume goes on with an experiment, --overwrite replaces it: choose one")
    if args.force and not args.resume:
        raise UserError("--force belongs to --resume")
    if "/" in args.experiment_name or args.experiment_name in ("", ".", ".."):
        raise UserError(f"--experiment_name {args.experiment_name!r} must be a plain name: it becomes a folder")


def build_model(args, device: torch.device) -> Model:
    kind = OBJECTIVES[args.objective]
    settings = {
        "arch": args.arch,
        "dim": args.dim,
        "num_slots": args.num_slots,
        "iterations": args.iterations,
        "image_size": args.image_size,
        "audio_seconds": args.audio_seconds,
        "tau": args.tau,
        "mask_ratio": args.mask_ratio,
        "reciprocal_k": args.reciprocal_k,
    }
    with as_user_error(ValueError):
        model = kind(**{name: settings[name] for name in inspect.signature(kind).parameters})
        if args.imagenet_weights != "none":
            if args.arch != "resnet18":
                raise UserError(f"there are no ImageNet weights for --arch {args.arch}: pass --imagenet_weights none")
            load_imagenet_weights(model.imgnet, args.imagenet_weights)
    if args.sync_bn:
        model = with_sync_bn(model, device)
    return model.to(device, memory_format=torch.channels_last)


def build_training_data(args) -> TrainingData:
    """Pairs to train on and held-out ones; says which training ids are also test ids, as far as lists are there."""
    selection = select_training_pairs(
        args.trainset, args.train_data_path, args.metadata, args.train_list, args.allow_missing
    )
    pairs, left_out = selection.pairs, dict.fromkeys(selection.missing, "picture or sound not found")
    if args.allow_missing:
        left_out |= undecodable(pairs, args.num_workers)
    overlap = overlap_with_tests([p.id for p in pairs], args.metadata)
    if not overlap:
        print(f"overlap with test sets: not known, {args.metadata} holds no list of one")
        if args.exclude_test_overlap:
            raise UserError(f"--exclude_test_overlap: {args.metadata} holds no test list (prepare_data.py metadata)")
    overlap = {name: ids for name, ids in overlap.items() if ids}
    for name, ids in overlap.items():
        removed = "removed" if args.exclude_test_overlap else "--exclude_test_overlap removes them"
        print(f"{len(ids)} of the {len(pairs)} training ids are test ids of {name} ({removed})")
    excluded = set(left_out).union(*overlap.values() if args.exclude_test_overlap else ())
    pairs = [pair for pair in pairs if pair.id not in excluded]
    train, held_out = hold_out(
        args.trainset,
        pairs,
        args.train_data_path,
        args.val_list,
        args.val_fraction,
        args.seed,
        args.allow_missing,
    )
    if len(train) < args.batch_size:
        raise UserError(f"--batch_size {args.batch_size} is larger than the {len(train)} training pairs: lower it")
    k = args.reciprocal_k
    if k is not None and k >= args.batch_size:
        raise UserError(f"--reciprocal_k {k} leaves no negative in a batch of {args.batch_size}: lower it")
    sizes = (args.image_size, args.audio_seconds)
    if args.allow_missing and args.val_list:
        excluded |= set(undecodable(held_out, args.num_workers))
    held_out = [pair for pair in held_out if pair.id not in excluded]
    counts = {
        "expected": selection.expected,
        "left out": selection.expected - len(pairs),
        "train": len(train),
        "held_out": len(held_out),
    }
    training_pairs = TrainingPairs(train, *sizes, args.augment, args.seed, sourceless=bool(args.silence))
    return TrainingData(training_pairs, TrainingPairs(held_out, *sizes, "none"), counts, left_out)


def print_start(args, run: Run) -> None:
    for name, value in provenance().items():
        print(f"{name}: {value}")
    for name, value in sorted(vars(args).items()):
        print(f"--{name} {value}")
    millions = sum(p.numel() for p in run.model.parameters()) / 1e6
    precision = run.optimisation.amp or "float32"
    print(f"parameters: {millions:.2f} M; device: {run.device}; processes: {world_size()}; precision: {precision}")
    print("training pairs: " + ", ".join(f"{count} {name}" for name, count in run.data.counts.items()))
    for name, dataset in run.test_sets.items():
        print(f"test set {name}: {len(dataset)} of {dataset.ground_truth.expected} pairs")


def test_command(args) -> str:
    """The command that scores what was trained, with the roots that came from the environment in front."""
    roots = {ALL_SETS[name].root for name in parse_testsets(args.testset)}
    command = [f"{name}={shlex.quote(os.environ[name])}" for name in sorted(roots) if name in os.environ]
    python = Path(sys.executable)
    here = str(python.relative_to(Path.cwd())) if python.is_relative_to(Path.cwd()) else "python"
    command += [here, "test_model.py", "--save_visualizations", "true"]
    command += ["--imagenet_weights", "none"] * (args.imagenet_weights == "none")
    data = "testset", "test_data_path", "test_gt_path", "test_list", "metadata"
    for name in ("model_dir", "experiment_name", *data, "alpha", "infer_sharpening", "infer_smoothing", "gpu"):
        if getattr(args, name) is not None:
            command += [f"--{name}", shlex.quote(str(getattr(args, name)))]
    return " ".join(command + ["--allow_missing true"] * args.allow_missing)


def main() -> None:
    args = parse_args()
    check_args(args)
    device = own_device(args.gpu)
    with process_group(device):
        if args.batch_size < world_size():
            raise UserError(f"--batch_size {args.batch_size} leaves some of {world_size()} processes without a pair")
        if args.sync_bn and args.micro_batch and args.batch_size % world_size():
            raise UserError(
                f"--sync_bn with --micro_batch needs a --batch_size that {world_size()} processes share evenly"
            )
        resume = goes_on(Path(args.model_dir) / args.experiment_name, args)
        seed_everything(args.seed)
        data = build_training_data(args)
        model = build_model(args, device)
        test_sets = build_test_sets(args, args.image_size, args.audio_seconds) if args.testset else {}
        run = Run(args, device, model, data, test_sets)
        print_start(args, run)
        if args.dry_run:
            run.dry_run()
            return
        run.run(resume)
        print(f"in {run.folder}: best.pth, latest.pth, log.jsonl, curves.png" + ", results/" * bool(test_sets))
        if test_sets:
            print(f"test it again, with a picture of every sample:\n  {test_command(args)}")


if __name__ == "__main__":
    run_cli(main)
