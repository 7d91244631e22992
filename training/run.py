"""One training run: its epochs, what it leaves on disk, and how it goes on exactly where it stopped.

A run's place is (epochs finished, steps done in the epoch under way). All that is drawn follows from the seed and that
place, but for token masks, which PyTorch's CPU generator draws: its state lies in the checkpoint.
"""

import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Subset
from tqdm import tqdm

from dataset import EvaluationPairs, TrainingPairs, make_loader, training_batches
from distributed import (
    all_gather_object,
    any_rank,
    barrier,
    broadcast_buffers,
    hidden_bar,
    is_main,
    local_slice,
    world_size,
)
from model_slot import TokenMasks
from models import Model, describe_checkpoint
from reports.pictures import Drawer, images_of
from reports.table import publish, training_overlap
from scoring.bootstrap import RESAMPLES
from scoring.evaluate import embed_set, evaluate
from scoring.retrieval import retrieval_recall, retrieval_score
from sets import count_undecodable
from training.log import RunLog
from training.resume import INFERENCE, LAUNCH, StopSignal, differences, fingerprint, hold, launch_name
from training.step import Inputs, NotFinite, Optimisation, choose_amp, loss_weights, lr_factor, weights_of
from utils import (
    UserError,
    as_user_error,
    load_checkpoint,
    peak_memory_gib,
    random_states,
    remove_unfinished,
    restore_random_states,
    save_checkpoint,
    write_json,
    write_text,
)

SELECTED_BY = {
    "retrieval": "retrieval on held-out training pairs (no boxes)",
    "test": "cIoU of {primary_map} on test set {first}",
    "last": "last epoch (no pairs were held out)",
}
UNAVERAGED = ("seconds", "waiting", "skipped_steps")  # among the sums of an epoch
STATE = {
    "model", "optimizer", "scaler", "args", "marks", "processes", "epoch", "step", "sums", "best", "lines", "wandb_run",
    "random", "selected_by",
}  # fmt: skip


class TrainingData(NamedTuple):
    train: TrainingPairs
    held_out: TrainingPairs
    counts: dict[str, int]  # expected, left out, train, held_out
    left_out: dict[str, str]  # id: why


# ---------------------------------------------------------------- the run


class Run:
    """Everything that an epoch touches, and the folder that the run writes to."""

    def __init__(
        self,
        args,
        device: torch.device,
        model: Model,
        data: TrainingData,
        test_sets: Mapping[str, EvaluationPairs],
    ) -> None:
        self.args, self.device, self.model, self.data, self.test_sets = args, device, model, data, test_sets
        self.folder = Path(args.model_dir) / args.experiment_name
        self.optimisation = Optimisation(
            model,
            device,
            args.lr,
            args.weight_decay,
            args.clip,
            choose_amp(args.amp, device),
            args.micro_batch,
            all_weights=bool(args.mask_ratio and args.lam1 and not args.warmup),
        )
        self.steps_per_epoch = len(data.train) // args.batch_size
        self.epoch, self.step, self.sums = 0, 0, {}
        self.best = -math.inf
        self.select = args.select if args.select == "test" or len(data.held_out) else "last"
        self.first_set = next(iter(test_sets), "")
        self.stop = StopSignal()
        self.log: RunLog | None = None  # of the first process, and of no dry run
        self.resumed: dict[str, Any] = {}  # what the log goes on from
        self.selected_by = SELECTED_BY[self.select].format(first=self.first_set, primary_map=model.primary_map)

    # ------------------------------------------------------------ what is kept

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on, in types that `weights_only` loading allows."""
        return self.optimisation.state_dict() | {
            "model_config": self.model.config,
            "args": vars(self.args),
            "marks": self.marks(),
            "processes": world_size(),
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.sums,
            "best": self.best,
            "lines": self.log.lines,
            "wandb_run": self.log.run_id,
            "random": random_states(),
            "selected_by": self.selected_by,
        }

    def marks(self) -> dict[str, str]:
        """What the flags do not say of a run and yet belongs to it."""
        pairs = {"training pairs": self.data.train.pairs, "held-out pairs": self.data.held_out.pairs}
        return {name: fingerprint(ids) for name, ids in pairs.items()} | {"precision": str(self.optimisation.amp)}

    def save(self, *names: str) -> None:
        """Write the state under these names; only the first process does, and no dry run."""
        if self.log:
            state = self.state()
            for name in names:
                save_checkpoint(self.folder / f"{name}.pth", state)

    def resume(self) -> None:
        """Take up latest.pth. UserError when it is of another run, saying what differs, unless --force."""
        path = self.folder / "latest.pth"
        state = load_checkpoint(path)
        if not state.keys() >= STATE:
            raise UserError(f"{path} holds weights only, or is of another version, and cannot be resumed")
        different = differences(state, self.args, self.marks())
        listed = "; ".join(different)
        if different and not self.args.force:
            mend = "give the old ones to go on as before, or --force to go on with these"
            raise UserError(f"{path} was trained with other settings: {listed} ({mend})")
        with as_user_error(RuntimeError, ValueError, KeyError):
            self.optimisation.load_state_dict(state)
        restore_random_states(state["random"])
        self.epoch, self.step, self.sums = state["epoch"], state["step"], state["sums"]
        self.best, self.resumed = state["best"], {"lines": state["lines"], "run_id": state["wandb_run"]}
        if different:
            self.step, self.sums = 0, {}
            held_out = self.marks()["held-out pairs"]
            measured = (state["selected_by"], state["marks"]["held-out pairs"]) == (self.selected_by, held_out)
            if not measured or any(f"--{name} " in listed for name in INFERENCE):
                self.best = -math.inf  # another measure: the old best says nothing about it
            print(f"--force: goes on with other settings, from the start of epoch {self.epoch + 1}: {listed}")
        if state["processes"] != world_size():
            print(f"{world_size()} processes go on with what {state['processes']} began: batches of batch norm differ")
        print(f"resumed after epoch {self.epoch} and {self.step} steps of {self.args.epochs} epochs")

    def prepare_folder(self) -> None:
        """What a run leaves behind is of one run: an overwritten one goes first."""
        remove_unfinished(self.folder)
        if self.args.overwrite and not self.resumed:
            for path in [*self.folder.glob("*.pth"), self.folder / "left_out.txt", self.folder / "failed_ids.txt"]:
                path.unlink(missing_ok=True)
            shutil.rmtree(self.folder / "results", ignore_errors=True)
        write_json(self.folder / "configs.json", vars(self.args) | self.model.config)
        reasons = "".join(f"{name}\t{why}\n" for name, why in self.data.left_out.items())
        if reasons:
            write_text(self.folder / "left_out.txt", reasons)
        write_text(self.folder / LAUNCH, launch_name())
        write_text(self.folder / "train_ids.txt", "".join(f"{pair.id}\n" for pair in self.data.train.pairs))

    # ------------------------------------------------------------ one epoch

    def train_epoch(self, max_steps: int | None = None) -> dict[str, float]:
        """The steps of the epoch under way that are not done -> its averages, losses by name, speed and memory."""
        args, train = self.args, self.data.train
        train.epoch = self.epoch
        batches = training_batches(len(train), args.batch_size, args.seed, self.epoch)[:max_steps]
        own = [batch[local_slice(args.batch_size)] for batch in batches[self.step :]]
        loader = make_loader(train, args.batch_size, args.num_workers, own)
        all_weights = loss_weights(
            self.epoch,
            args.warmup,
            args.lam1,
            args.lam2,
            args.lam3,
            map_contrast=args.map_contrast,
            share_contrast=args.share_contrast,
            foreign_claims=args.foreign_claims,
            foreign_tokens=args.foreign_tokens,
            silence=args.silence,
        )
        weights = weights_of(self.model.losses, all_weights)
        self.model.train()
        title = f"epoch {self.epoch + 1}/{args.epochs}"
        look = {"leave": False, "unit": "batch", "disable": hidden_bar()}
        with (
            count_undecodable(train.pairs, args.num_workers),
            tqdm(total=len(batches), initial=self.step, desc=title, **look) as bar,
        ):
            clock = time.monotonic()
            for batch in loader:
                loaded = time.monotonic()
                figures = self.train_step(batch, weights)
                self.count(figures, loaded - clock, time.monotonic() - clock)
                clock = time.monotonic()
                bar.update()
                names = [name for name in ("loss", *weights) if name in self.sums]  # not every model has every loss
                shown = {name: f"{self.sums[name] / self.step:.3g}" for name in names}
                bar.set_postfix(shown | {"pairs/s": f"{self.speed()['pairs_per_second']:.0f}"}, refresh=False)
                self.save_between_steps(len(batches))
        broadcast_buffers(self.model.buffers())
        sums = {name: value / self.step for name, value in self.sums.items() if name not in UNAVERAGED}
        if self.sums["skipped_steps"]:
            sums |= {"skipped_steps": self.sums["skipped_steps"]}
            sums["grad_norm"] *= self.step / max(self.step - self.sums["skipped_steps"], 1)
        place = {"lr": args.lr * self.lr_factor(self.step - 1), "steps": self.step}
        return sums | place | self.speed() | {"memory_gib": peak_memory_gib(self.device)}

    def train_step(self, batch, weights: Mapping[str, float]) -> dict[str, float]:
        """One step on this process's rows of a batch. A loss that is not finite is kept for study and ends the run."""
        before = random_states()
        rows = local_slice(self.args.batch_size)
        inputs = Inputs(
            batch.image.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last),
            batch.spectrogram.to(self.device, non_blocking=True),
            TokenMasks(*(mask[rows] for mask in self.model.draw_masks(self.args.batch_size))),
        )
        try:
            return self.optimisation.step(inputs, self.args.batch_size, weights, self.lr_factor(self.step))
        except NotFinite as error:
            ids = [name for part in all_gather_object(batch.id) for name in part]
            where = f"step {self.step + 1} of epoch {self.epoch + 1}"
            message = f"the loss or its gradient is not finite in {where} ({error}): ids {', '.join(ids[:8])} ..."
            if self.log:
                restore_random_states(before)
                write_text(self.folder / "failed_ids.txt", "".join(f"{name}\n" for name in ids))
                self.save("failed")
                message += f"; all in {self.folder / 'failed_ids.txt'}, the state before the step in failed.pth"
            raise UserError(message) from error

    def lr_factor(self, step: int) -> float:
        args, done = self.args, self.epoch * self.steps_per_epoch
        return lr_factor(done + step, self.steps_per_epoch, args.epochs, args.lr_schedule, args.lr_warmup)

    def count(self, figures: Mapping[str, float], waiting: float, seconds: float) -> None:
        """Add a step to the sums of the epoch."""
        lr = self.args.lr * self.lr_factor(self.step)
        self.step += 1
        for name, value in {**figures, "waiting": waiting, "seconds": seconds}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if self.log:
            speed = {"pairs_per_second": self.args.batch_size / seconds, "data_wait": waiting / seconds}
            measured = speed | {"lr": lr, "memory_gib": peak_memory_gib(self.device)}
            self.log.step(self.epoch * self.steps_per_epoch + self.step, {**figures, **measured})

    def speed(self) -> dict[str, float]:
        seconds = self.sums["seconds"]
        return {
            "pairs_per_second": self.step * self.args.batch_size / seconds,
            "data_wait": self.sums["waiting"] / seconds,
        }

    def save_between_steps(self, steps: int) -> None:
        """Save every so many steps and after the last one; end the run, saved, if it was asked to."""
        stop = any_rank(self.stop.asked, self.device)
        every = self.args.save_every_steps
        if stop or self.step == steps or (every and self.step % every == 0):
            self.save("latest")  # at the end: a sound that cannot be read while scoring does not cost the epoch
        if stop:
            self.stop.leave()

    # ------------------------------------------------------------ figures

    def validate(self, count: int | None = None) -> dict[str, float]:
        """Retrieval on at most `count` held-out pairs, without boxes or classes; empty but on the first process."""
        held_out, args = self.data.held_out, self.args
        pairs = Subset(held_out, range(min(count or len(held_out), len(held_out))))
        if not len(pairs):
            return {}
        with count_undecodable(held_out.pairs, args.num_workers):
            embeddings = embed_set(self.model, pairs, self.device, args.batch_size, args.num_workers)
        if embeddings is None:
            return {}
        with as_user_error(ValueError):  # embeddings that are not finite
            recall, score = retrieval_recall(*embeddings), retrieval_score(*embeddings)
        return {"val/retrieval_score": score} | {
            f"val/{direction}_{k}": value for direction, by_k in recall.items() for k, value in by_k.items()
        }

    def score(self, max_batches: int | None = None, best: dict[str, Any] | None = None) -> dict[str, float]:
        """Score every test set -> {"set/map/metric": value}; best: a finished run's checkpoint, to be published."""
        scores = {}
        for name, dataset in self.test_sets.items():
            results, picture_of = self.folder / "results" / name, images_of(dataset.pairs)
            sheet = results / "contact_sheet.png"
            drawer = Drawer(sheet, dataset.ground_truth, len(dataset), picture_of) if self.log else None
            evaluation = evaluate(
                self.model,
                dataset,
                self.device,
                batch_size=self.args.batch_size,
                workers=self.args.num_workers,
                alpha=self.args.alpha,
                infer_sharpening=self.args.infer_sharpening,
                infer_smoothing=self.args.infer_smoothing,
                resamples=RESAMPLES if best else 0,
                on_batch=[drawer] if drawer else [],
                max_batches=max_batches,
            )
            if evaluation is None:
                continue
            if drawer:
                drawer.finish()
                self.log.add_sheet(name, drawer.sheet)
            for map_name, figures in evaluation.results["maps"].items():
                scores |= {f"{name}/{map_name}/{metric}": value for metric, value in figures.items()}
            if best:
                path = self.folder / "best.pth"
                overlap = training_overlap(path, [pair.id for pair in dataset.pairs])
                about = describe_checkpoint(path, best)
                publish(evaluation, results, testset=name, checkpoint=about, training_test_overlap=overlap)
        return scores

    # ------------------------------------------------------------ from start to end

    def dry_run(self) -> None:
        averages = self.train_epoch(max_steps=1)
        print(f"one step: loss {averages['loss']:.4f}")
        for name, value in self.validate(self.args.batch_size).items():
            print(f"one batch of held-out pairs: {name} {value:.3f}")
        for name, value in self.score(max_batches=1).items():
            if name.endswith(("AUD/cIoU", "AUD/pointing")):
                print(f"one evaluation batch: {name} {value:.3f}")
        print("dry run: data, model, one step and one evaluation batch work; nothing was written")

    def run(self, resume: bool) -> None:
        """Train what is left of the run, then score and publish the chosen checkpoint."""
        args = self.args
        if resume:
            self.resume()
        if is_main():
            self.lock = hold(self.folder)
            self.prepare_folder()
            self.log = RunLog(self.folder, args.wandb, args.experiment_name, vars(args), **self.resumed)
        with self.stop.listening():
            while self.epoch < args.epochs:
                self.whole_epoch()
            barrier()
            with self.stop.anywhere():
                best = load_checkpoint(self.folder / "best.pth")
                self.model.load_state_dict(best["model"])
                print(f"best.pth: epoch {best['epoch']}, chosen by {best['selected_by']}")
                scores = self.score(best=best)
            if self.log:
                self.log.finish(scores)

    def whole_epoch(self) -> None:
        """Train and score one epoch, write its line, and keep latest.pth, and best.pth when none was better before."""
        args, number = self.args, self.epoch + 1
        line = {"epoch": number} | self.train_epoch()
        with self.stop.anywhere():
            line |= self.validate()
            if args.eval_every and number % args.eval_every == 0:
                line |= self.score()
        on_test = f"{self.first_set}/{self.model.primary_map}/cIoU"
        measures = {"retrieval": "val/retrieval_score", "test": on_test, "last": "epoch"}
        score = line.get(measures[self.select], -math.inf)
        is_best = score >= self.best and score > -math.inf
        self.best = max(self.best, score)
        self.epoch, self.step, self.sums = number, 0, {}
        if self.log:
            self.log.write(line, number * self.steps_per_epoch)
        kept = [f"epoch_{number:04d}"] if args.keep_every and number % args.keep_every == 0 else []
        self.save(*["best"] * is_best, *kept, "latest")
        ours = ("map_contrast", "share_contrast", "foreign_claims", "foreign_tokens", "silence")
        weighed = [name for name in ours if getattr(args, name)]
        shown = ("loss", "info_nce", *weighed, "pairs_per_second", "data_wait", "val/retrieval_score")
        figures = ", ".join(f"{name} {line[name]:.4g}" for name in shown if name in line)
        print(f"epoch {number}/{args.epochs}: {figures}", flush=True)
        if any_rank(self.stop.asked, self.device):
            self.stop.leave()
