"""Train joint slot attention on unlabelled image-audio pairs.

    bash train_script.sh synthetic synthetic cpu          # data, hyper-parameters and this script in one go
    python train_slot.py --trainset custom --train_data_path /path/to/pairs/ --experiment_name mine --gpu 0 --dry_run

Every epoch sees every full batch; best.pth is chosen by retrieval on held-out training pairs, without boxes.
"""

import math
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset import TRAIN_SETS, TrainingPairs, hold_out, make_loader, select_training_pairs
from evaluation import embed_set, evaluate
from inspection import count_undecodable, overlap_with_tests, undecodable
from model_slot import JointSlotModel
from report import Drawer, RunLog, describe_checkpoint, pictures_of, publish, training_overlap
from resnet import RECIPES, load_imagenet_weights
from retrieval import retrieval_recall, retrieval_score
from scores import RESAMPLES
from test_sets import ALL_SETS, add_test_set_flags, build_test_sets, parse_testsets
from utils import (
    ArgumentParser,
    UserError,
    as_user_error,
    bf16_is_fast,
    load_checkpoint,
    number,
    pick_device,
    provenance,
    random_states,
    restore_random_states,
    run_cli,
    save_checkpoint,
    seed_everything,
    write_json,
    write_text,
)

SELECTED_BY = {
    "retrieval": "retrieval on held-out training pairs (no boxes)",
    "test": "cIoU of IQR on test set {first}",
    "last": "last epoch (no pairs were held out)",
}
MAY_CHANGE = {  # on --resume; the other flags belong to the run
    "resume", "dry_run", "overwrite", "gpu", "num_workers", "wandb", "eval_every", "model_dir", "metadata",
    "train_data_path", "test_data_path", "test_gt_path",
}  # fmt: skip


# ---------------------------------------------------------------- one epoch


def loss_weights(args, epoch: int) -> dict[str, float]:
    """Weight of each loss; during the first --warmup epochs only the contrastive one counts."""
    on = float(epoch >= args.warmup)
    return {
        "info_nce": 1.0,
        "reconstruction": args.lam1 * on,
        "slot_divergence": args.lam2 * on,
        "attention_matching": args.lam3 * on,
    }


def train_one_epoch(
    model: JointSlotModel,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    scaler: torch.amp.GradScaler,
    weights: dict[str, float],
    amp_dtype: torch.dtype | None,
    clip: float,
    title: str,
) -> dict[str, float]:
    """One pass over the loader -> averages of the losses, the gradient norm and the pairs per second."""
    model.train()
    device = next(model.parameters()).device
    sums = dict.fromkeys([*weights, "loss", "grad_norm"], 0.0)
    start, seen = time.monotonic(), 0
    bar = tqdm(loader, title, leave=False, unit="batch", disable=None)
    for steps, batch in enumerate(bar, start=1):
        image = batch.image.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        spectrogram = batch.spectrogram.to(device, non_blocking=True)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            losses = model(image, spectrogram)
        loss = sum(weight * losses[name] for name, weight in weights.items() if weight)
        if not torch.isfinite(loss):
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
            raise UserError(
                f"the loss is not finite in step {steps} of {title} ({values}): ids {', '.join(batch.id[:8])} ..."
            )
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip if clip else math.inf)
        if not (torch.isfinite(norm) or scaler.is_enabled()):  # the scaler skips such a step by itself
            raise UserError(f"the gradient is not finite in step {steps} of {title}: ids {', '.join(batch.id[:8])} ...")
        lr = optimizer.param_groups[0]["lr"]
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        seen += len(image)
        for name, value in {**losses, "loss": loss, "grad_norm": norm}.items():
            sums[name] += value.item()
        shown = {name: f"{sums[name] / steps:.3g}" for name in ("loss", *weights)}
        bar.set_postfix(shown | {"pairs/s": f"{seen / (time.monotonic() - start):.0f}"})
    averages = {name: value / len(loader) for name, value in sums.items()}
    return averages | {"lr": lr, "steps": len(loader), "pairs_per_second": seen / (time.monotonic() - start)}


def lr_factor(step: int, steps_per_epoch: int, epochs: int, schedule: str, warmup: float, decay: float) -> float:
    """Learning rate of a step as a share of --lr: a linear start over `warmup` of all steps, then the schedule.

    constant stays; step multiplies by `decay` after every epoch; cosine falls to 0 at the end.
    """
    total = steps_per_epoch * epochs
    warm = round(warmup * total)
    if step < warm:
        return (step + 1) / warm
    if schedule == "step":
        return decay ** (step // steps_per_epoch)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))
    return 1.0


# ---------------------------------------------------------------- checkpoints


def restore(path: Path, args, **objects: Any) -> dict[str, Any]:
    """Load `path` into the named objects (with load_state_dict) and the random generators; return the checkpoint.

    Raises UserError when the run that wrote it had other data or hyper-parameters, naming what differs.
    """
    state = load_checkpoint(path)
    if not all(name in state for name in (*objects, "args", "random", "epoch")):
        raise UserError(f"{path} holds weights only and cannot be resumed")
    now, to_the_end = vars(args), args.lr_schedule == "cosine" or args.lr_warmup
    free = MAY_CHANGE | (set() if to_the_end else {"epochs"})
    different = [
        f"--{name} {state['args'].get(name)} -> {now[name]}"
        for name in now
        if name not in free and state["args"].get(name) != now[name]
    ]
    if different:
        raise UserError(f"{path} was trained with other settings: {'; '.join(different)}")
    for name, target in objects.items():
        with as_user_error(RuntimeError, ValueError, KeyError):
            target.load_state_dict(state[name])
    restore_random_states(state["random"])
    return state


# ---------------------------------------------------------------- command line


def add_method_flags(parser: ArgumentParser) -> None:
    """What the paper defines: the model's shape and its losses; the defaults are the paper's."""
    group = parser.add_argument_group("model")
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
    group.add_argument(
        "--warmup", type=number(int, low=0), default=0, help="first epochs with the contrastive loss only"
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
    group.add_argument("--num_workers", type=number(int, low=0), default=2, help="loader processes")
    group.add_argument("--exclude_test_overlap", action="store_true", help="do not train on ids of known test lists")
    add_test_set_flags(parser.add_argument_group("test data"), default=None)
    add_method_flags(parser)
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=number(int, low=1), default=100, help="passes over the training pairs")
    group.add_argument("--batch_size", type=number(int, low=2), default=256, help="pairs per step")
    group.add_argument("--lr", type=number(float, above=0), default=5e-5, help="learning rate of AdamW")
    group.add_argument("--weight_decay", type=number(float, low=0), default=0.01, help="of AdamW")
    group.add_argument(
        "--lr_schedule", choices=("constant", "step", "cosine"), default="constant", help="after the warm-up"
    )
    group.add_argument("--lr_decay", type=number(float, above=0, high=1), default=0.9, help="per epoch, schedule step")
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
    group.add_argument("--gpu", default="0", help="number of a CUDA device, or cpu")
    group.add_argument("--model_dir", default="./checkpoints", help="folder of experiments")
    group.add_argument("--experiment_name", required=True, help="folder of this run below --model_dir")
    group.add_argument("--select", choices=("retrieval", "test"), default="retrieval", help="what chooses best.pth")
    group.add_argument(
        "--eval_every", type=number(int, low=0), default=1, help="epochs between tests; 0: at the end only"
    )
    group.add_argument("--alpha", type=number(float, low=0, high=1), default=0.6, help="weight of AUD in IQR")
    group.add_argument("--infer_sharpening", type=number(float, above=0), default=0.1, help="of the maps in tests")
    group.add_argument("--wandb", choices=("true", "offline", "false"), default="false", help="log to Weights & Biases")
    group.add_argument("--resume", action="store_true", help="go on from latest.pth")
    group.add_argument("--overwrite", action="store_true", help="replace an experiment of the same name")
    group.add_argument(
        "--dry_run", action="store_true", help="one batch, one step, one evaluation batch; writes nothing"
    )
    return parser.parse_args()


def check_args(args) -> None:
    if args.select == "test" and not (args.testset and args.eval_every):
        raise UserError("--select test needs --testset and --eval_every 1 or more")
    if args.select == "test" and args.eval_every > args.epochs:
        raise UserError(f"--select test with --eval_every {args.eval_every} never tests within {args.epochs} epochs")
    if args.testset:
        parse_testsets(args.testset)
    if args.resume and args.overwrite:
        raise UserError("--resume goes on with an experiment, --overwrite replaces it: choose one")
    if "/" in args.experiment_name or args.experiment_name in ("", ".", ".."):
        raise UserError(f"--experiment_name {args.experiment_name!r} must be a plain name: it becomes a folder")


def choose_amp(amp: str, device: torch.device) -> torch.dtype | None:
    """Precision of the encoders: auto is bf16 where the hardware has it, else fp16 on CUDA, fp32 on CPUs."""
    if amp == "auto":
        amp = "bf16" if bf16_is_fast(device) else "fp16" if device.type == "cuda" else "none"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[amp]


def build_model(args, device: torch.device) -> JointSlotModel:
    with as_user_error(ValueError):
        model = JointSlotModel(
            arch=args.arch,
            dim=args.dim,
            num_slots=args.num_slots,
            iterations=args.iterations,
            image_size=args.image_size,
            audio_seconds=args.audio_seconds,
            tau=args.tau,
            mask_ratio=args.mask_ratio,
            reciprocal_k=args.reciprocal_k,
        )
        if args.imagenet_weights != "none":
            if args.arch != "resnet18":
                raise UserError(f"there are no ImageNet weights for --arch {args.arch}: pass --imagenet_weights none")
            load_imagenet_weights(model.imgnet, args.imagenet_weights)
    return model.to(device, memory_format=torch.channels_last)


class TrainingData(NamedTuple):
    train: TrainingPairs
    held_out: TrainingPairs
    counts: dict[str, int]  # expected, left out, train, held_out
    left_out: dict[str, str]  # id: why


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
    sets = TrainingPairs(train, *sizes, args.augment, args.seed), TrainingPairs(held_out, *sizes, "none")
    return TrainingData(*sets, counts, left_out)


def print_start(
    args, model: JointSlotModel, device: torch.device, amp: torch.dtype | None, counts: dict, tests: dict
) -> None:
    for name, value in provenance().items():
        print(f"{name}: {value}")
    for name, value in sorted(vars(args).items()):
        print(f"--{name} {value}")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"parameters: {millions:.2f} M; device: {device}; precision: {amp or 'float32'}")
    print("training pairs: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    for name, dataset in tests.items():
        print(f"test set {name}: {len(dataset)} of {dataset.ground_truth.expected} pairs")


def test_command(args) -> str:
    """The command that scores what was trained, with the roots that came from the environment in front."""
    roots = {ALL_SETS[name].root for name in parse_testsets(args.testset)}
    command = [f"{name}={shlex.quote(os.environ[name])}" for name in sorted(roots) if name in os.environ]
    python = Path(sys.executable)
    here = str(python.relative_to(Path.cwd())) if python.is_relative_to(Path.cwd()) else "python"
    command += [here, "test_model.py", "--save_visualizations", "true"]
    command += ["--imagenet_weights", "none"] * (args.imagenet_weights == "none")
    data = ("testset", "test_data_path", "test_gt_path", "test_list")
    for name in ("model_dir", "experiment_name", *data, "metadata", "alpha", "infer_sharpening", "gpu"):
        if getattr(args, name) is not None:
            command += [f"--{name}", shlex.quote(str(getattr(args, name)))]
    return " ".join(command + ["--allow_missing true"] * args.allow_missing)


# ---------------------------------------------------------------- the run


class Run:
    """One training run: everything that an epoch touches, and the folder that it writes to."""

    def __init__(self, args) -> None:
        self.args, self.device = args, pick_device(args.gpu)
        self.folder = Path(args.model_dir) / args.experiment_name
        if (self.folder / "latest.pth").exists() and not (args.resume or args.overwrite or args.dry_run):
            raise UserError(f"{self.folder} holds a trained model: --resume goes on with it, --overwrite replaces it")
        if args.resume and not (self.folder / "latest.pth").exists():
            raise UserError(f"there is nothing to resume in {self.folder}: no latest.pth")
        seed_everything(args.seed)
        self.train_pairs, self.held_out, self.counts, self.left_out = build_training_data(args)
        self.model = build_model(args, self.device)
        sizes = args.image_size, args.audio_seconds
        self.test_sets = build_test_sets(args, *sizes) if args.testset else {}
        self.amp = choose_amp(args.amp, self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), args.lr, weight_decay=args.weight_decay)
        self.steps_per_epoch = len(self.train_pairs) // args.batch_size
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: lr_factor(
                step, self.steps_per_epoch, args.epochs, args.lr_schedule, args.lr_warmup, args.lr_decay
            ),
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp is torch.float16)
        self.start_epoch, self.best = 0, -math.inf
        self.select = args.select if args.select == "test" or len(self.held_out) else "last"

    def objects(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}

    def resume(self) -> None:
        state = restore(self.folder / "latest.pth", self.args, **self.objects())
        self.start_epoch, self.best = state["epoch"], state["best"]
        print(f"resumed after epoch {self.start_epoch} of {self.args.epochs}")

    def train_epoch(self, epoch: int, max_batches: int | None = None) -> dict[str, float]:
        self.train_pairs.epoch = epoch
        data = (
            torch.utils.data.Subset(self.train_pairs, range(self.args.batch_size)) if max_batches else self.train_pairs
        )
        order_seed = self.args.seed * 100_003 + epoch
        loader = make_loader(data, self.args.batch_size, self.args.num_workers, order_seed, drop_last=True)
        with count_undecodable(self.train_pairs.pairs, self.args.num_workers):
            return train_one_epoch(
                self.model, loader, self.optimizer, self.scheduler, self.scaler, loss_weights(self.args, epoch),
                self.amp, self.args.clip, f"epoch {epoch + 1}/{self.args.epochs}",
            )  # fmt: skip

    def validate(self, count: int | None = None) -> dict[str, float]:
        """Retrieval on the held-out pairs: no boxes, no classes."""
        data = torch.utils.data.Subset(self.held_out, range(min(count or len(self.held_out), len(self.held_out))))
        if not len(data):
            return {}
        loader = make_loader(data, self.args.batch_size, self.args.num_workers)
        with count_undecodable(self.held_out.pairs, self.args.num_workers):
            embeddings = embed_set(self.model, loader, self.device)
        recall = retrieval_recall(*embeddings)
        return {"val/retrieval_score": retrieval_score(*embeddings)} | {
            f"val/{direction}_{k}": value for direction, by_k in recall.items() for k, value in by_k.items()
        }

    def score(
        self, log: RunLog | None = None, max_batches: int | None = None, best: dict[str, Any] | None = None
    ) -> dict[str, float]:
        """Score every test set -> {"set/map/metric": value}; best: a finished run's checkpoint, to be published."""
        scores = {}
        for name, dataset in self.test_sets.items():
            results, picture_of = self.folder / "results" / name, pictures_of(dataset.pairs)
            sheet = results / "contact_sheet.png"
            drawer = Drawer(sheet, dataset.ground_truth, len(dataset), picture_of) if log else None
            evaluation = evaluate(
                self.model,
                dataset,
                self.device,
                batch_size=self.args.batch_size,
                workers=self.args.num_workers,
                alpha=self.args.alpha,
                infer_sharpening=self.args.infer_sharpening,
                resamples=RESAMPLES if best else 0,
                on_batch=[drawer] if drawer else [],
                max_batches=max_batches,
            )
            if drawer:
                drawer.finish()
            if log:
                log.add_sheet(name, drawer.sheet)
            for map_name, figures in evaluation.results["maps"].items():
                scores |= {f"{name}/{map_name}/{metric}": value for metric, value in figures.items()}
            if best:
                path = self.folder / "best.pth"
                overlap = training_overlap(path, [pair.id for pair in dataset.pairs])
                about = describe_checkpoint(path, best)
                publish(evaluation, results, testset=name, checkpoint=about, training_test_overlap=overlap)
        return scores

    def save(self, epoch: int, scores: dict[str, float]) -> None:
        """latest.pth always; best.pth, too, when the scores of this epoch are at least as good as all before."""
        first = next(iter(self.test_sets), "")
        measure = {"retrieval": "val/retrieval_score", "test": f"{first}/IQR/cIoU", "last": "epoch"}[self.select]
        score = scores.get(measure, -math.inf)
        is_best = score >= self.best and score > -math.inf
        self.best = max(self.best, score)
        state = {name: target.state_dict() for name, target in self.objects().items()} | {
            "model_config": self.model.config,
            "args": vars(self.args),
            "epoch": epoch + 1,
            "scores": scores,
            "best": self.best,
            "random": random_states(),
            "selected_by": SELECTED_BY[self.select].format(first=first),
        }
        if is_best:
            save_checkpoint(self.folder / "best.pth", state)
        save_checkpoint(self.folder / "latest.pth", state)

    def dry_run(self) -> None:
        averages = self.train_epoch(0, max_batches=1)
        print(f"one step: loss {averages['loss']:.4f}")
        for name, value in self.validate(self.args.batch_size).items():
            print(f"one batch of held-out pairs: {name} {value:.3f}")
        for name, value in self.score(max_batches=1).items():
            if name.endswith(("AUD/cIoU", "AUD/pointing")):
                print(f"one evaluation batch: {name} {value:.3f}")
        print("dry run: data, model, one step and one evaluation batch work; nothing was written")

    def prepare_folder(self) -> None:
        """What a run leaves behind is of one run: an overwritten one goes first."""
        if self.args.overwrite:
            for name in ("best.pth", "latest.pth", "log.jsonl", "curves.png", "left_out.txt"):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / "results", ignore_errors=True)
        write_json(self.folder / "configs.json", vars(self.args) | self.model.config)
        reasons = "".join(f"{name}\t{why}\n" for name, why in self.left_out.items())
        if reasons:
            write_text(self.folder / "left_out.txt", reasons)
        write_text(self.folder / "train_ids.txt", "".join(f"{pair.id}\n" for pair in self.train_pairs.pairs))

    def run(self) -> None:
        self.prepare_folder()
        log = RunLog(self.folder, self.args.wandb, self.args.experiment_name, vars(self.args), self.start_epoch)
        for epoch in range(self.start_epoch, self.args.epochs):
            line = {"epoch": epoch + 1} | self.train_epoch(epoch)
            self.save(epoch, {})  # a sound that cannot be read while scoring does not cost the epoch
            line |= self.validate()
            if self.args.eval_every and (epoch + 1) % self.args.eval_every == 0:
                line |= self.score(log)
            self.save(epoch, line)
            log.write(line)
            shown = ("loss", "info_nce", "pairs_per_second", "val/retrieval_score")
            figures = ", ".join(f"{name} {line[name]:.4g}" for name in shown if name in line)
            print(f"epoch {epoch + 1}/{self.args.epochs}: {figures}", flush=True)
        best = load_checkpoint(self.folder / "best.pth")
        self.model.load_state_dict(best["model"])
        print(f"best.pth: epoch {best['epoch']}, chosen by {best['selected_by']}")
        log.finish(self.score(log, best=best))
        print(f"in {self.folder}: best.pth, latest.pth, log.jsonl, curves.png" + ", results/" * bool(self.test_sets))
        if self.test_sets:
            print(f"test it again, with a picture of every sample:\n  {test_command(self.args)}")


def main() -> None:
    args = parse_args()
    check_args(args)
    run = Run(args)
    print_start(args, run.model, run.device, run.amp, run.counts, run.test_sets)
    if args.dry_run:
        run.dry_run()
        return
    if args.resume:
        run.resume()
    run.run()


if __name__ == "__main__":
    run_cli(main)
