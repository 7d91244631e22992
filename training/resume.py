"""The folder of a run: its lock, what is saved, and how a run continues exactly where it stopped."""

import hashlib
import math
import os
import shutil
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from dataset import Pair
from distributed import all_gather_object, any_rank, is_main, under_torchrun, world_size
from models import TRUNK
from recipes import DATA, INFERENCE, RUN, TESTS, modern, roles
from scoring.retrieval import within_one_error
from training.log import RunLog, stuck
from training.step import Optimisation
from utils import (
    UserError,
    as_user_error,
    check_writable,
    load_checkpoint,
    random_states,
    remove_unfinished,
    restore_random_states,
    save_checkpoint,
    write_json,
    write_text,
)

LOCK_SECONDS = 10  # after a kill the data-loading workers hold the lock for some seconds more
STATE = {
    "model", "optimizer", "scaler", "args", "marks", "processes", "epoch", "step", "sums", "best", "lines", "wandb_run",
    "random", "selected_by",
}  # fmt: skip


@dataclass
class RunState:
    """Where a run is: epochs finished, steps done in the epoch under way and their sums, and what chooses best.pth.

    best: the highest score of an epoch so far, and `best_pairs` its scores of the held-out pairs, (N,), where pairs
    were scored; chosen: the epoch of best.pth, 0 before the first; lanes: processes and data-loading workers with
    which the epoch under way was begun.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    best: float = -math.inf
    best_pairs: torch.Tensor | None = None
    chosen: int = 0
    lanes: tuple[int, int] = (1, 0)

    def state_dict(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.step, self.sums, self.best = (state[name] for name in ("epoch", "step", "sums", "best"))
        self.best_pairs, self.chosen = state.get("best_pairs"), state.get("chosen", 0)  # older code kept neither
        self.lanes = tuple(state.get("lanes", (1, 0)))

    def forget_best(self) -> None:
        self.best, self.best_pairs = -math.inf, None

    def end_epoch(self, score: float, pairs: torch.Tensor | None = None) -> bool:
        """Count the epoch under way as finished; whether it is the one to choose so far.

        score: of the epoch; pairs: its scores of the held-out pairs, of which it is the mean. Chosen is the latest
        epoch whose pairs are less than one standard error below those of the best epoch: held-out retrieval is often
        level, within its noise, long before the maps are, and its maximum is a draw. Without pairs the best is chosen,
        of equals the latest.
        """
        is_best = score >= self.best and score > -math.inf
        is_chosen = is_best or (
            pairs is not None and self.best_pairs is not None and within_one_error(pairs, self.best_pairs)
        )
        if is_best:
            self.best, self.best_pairs = score, pairs
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        if is_chosen:
            self.chosen = self.epoch
        return is_chosen


# ---------------------------------------------------------------- the same run


def fingerprint(pairs: Sequence[Pair]) -> str:
    """The number of ids and a hash of them in order; where their files are does not matter."""
    return f"{len(pairs)} ids {hashlib.sha256('/'.join(pair.id for pair in pairs).encode()).hexdigest()[:12]}"


def fingerprints(train: Sequence[Pair], held_out: Sequence[Pair], amp: torch.dtype | None) -> dict[str, str]:
    """What must agree between a run and its continuation but is not in the settings."""
    return {
        "training pairs": fingerprint(train),
        "held-out pairs": fingerprint(held_out),
        "precision": str(amp),
    }


def differences(state: Mapping[str, Any], args, marks: Mapping[str, str]) -> dict[str, str]:
    """Settings and fingerprints in which this run differs from the one that wrote the checkpoint.

    The fingerprints stand for the data that are trained on. A setting that older code did not know makes no difference
    where it is off.
    """
    free = {name for name, role in roles().items() if role in (RUN, DATA)}
    if args.select != "test":
        free |= {name for name, role in roles().items() if role == TESTS}
    if args.lr_schedule != "cosine" and not args.lr_warmup:
        free.add("epochs")
    then, now = modern(state["args"]) | state["marks"], modern(vars(args)) | marks
    found = {}
    for name in dict.fromkeys([*now, *then]):
        old, new = then.get(name), now.get(name)
        known_to_both = name in then and name in now
        if name not in free and old != new and (known_to_both or old or new):
            found[name] = f"{name if name in marks else f'--{name}'} {old} -> {new}"
    return found


def launch_name() -> str:
    """A name that all processes of one start of torchrun share, restarts included; "" without torchrun."""
    if not under_torchrun():
        return ""
    name = os.environ["TORCHELASTIC_RUN_ID"]
    return f"{socket.gethostname()} {os.getppid()}" if name == "none" else name


def _written_by_this_start(path: Path) -> bool:
    try:
        return load_checkpoint(path).get("launch") == launch_name()
    except UserError:  # damaged: of no use to anybody
        return False


def should_resume(folder: Path, args) -> bool:
    """Whether to continue from latest.pth: --resume asks for it, or this same start of torchrun wrote it.

    The first process decides for all. UserError where a finished run would be replaced without --overwrite, or there
    is nothing to resume.
    """
    path = folder / "latest.pth"
    there = path.exists()
    own = there and under_torchrun() and is_main() and _written_by_this_start(path)
    there, own = all_gather_object((there, own))[0]
    asked = args.resume != "false"
    if asked and not there:
        raise UserError(f"there is nothing to resume in {folder}: no latest.pth")
    if there and not (own or asked or args.overwrite or args.dry_run):
        raise UserError(f"{folder} holds a trained model: --resume continues it, --overwrite replaces it")
    return own or asked


# ---------------------------------------------------------------- told to stop


class Stopped(Exception):
    """The run was told to stop, and what was finished is saved."""


class StopFlag:
    """Set by SIGTERM, which schedulers send before they kill; checked between steps and batches, which raise Stopped.

    As a context manager it ends the block on Stopped, with a line that says so.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.is_set = device, False

    def __enter__(self) -> "StopFlag":
        self.before = signal.signal(signal.SIGTERM, self._set)
        return self

    def __exit__(self, kind: type | None, *_: Any) -> bool:
        signal.signal(signal.SIGTERM, self.before)
        if kind is Stopped:
            print("stopped by SIGTERM; what was finished is kept, and --resume continues", flush=True)
        return kind is Stopped

    def _set(self, *_: Any) -> None:
        self.is_set = True

    def is_set_anywhere(self) -> bool:
        """Whether any process was told to stop; every process has to call it."""
        return any_rank(self.is_set, self.device)

    def leave_together(self) -> None:
        if self.is_set_anywhere():
            raise Stopped

    def leave_alone(self, *_: Any) -> None:
        """For work that a resumed run repeats; with several processes none stops, as the others would wait for it."""
        if self.is_set and world_size() == 1:
            raise Stopped


# ---------------------------------------------------------------- the folder


@contextmanager
def lock_folder(folder: Path):
    """Hold the run's folder for this process. UserError when another process holds it.

    Where the file system knows no locks, nobody is held back.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        raise UserError(f"another process is training in {folder}: stop it, or take another name") from error
    except (OSError, NotImplementedError) as error:
        print(f"{folder} cannot be locked ({error}): do not start another training in it")
    try:
        yield
    finally:
        lock.release()


class RunFolder:
    """What a run writes to disk and resumes from. Only the first process writes, and a dry run writes nothing.

    about: what else a checkpoint says about its run: `model_config`, `args`, `marks`, `selected_by`, and, where it is
    to hold no weights of the frozen image encoder, `frozen_weights`, which says where they are (models.py).
    """

    def __init__(self, path: Path, optimisation: Optimisation, state: RunState, about: Mapping[str, Any]) -> None:
        self.path, self.optimisation, self.state, self.about = path, optimisation, state, about
        self.log: RunLog | None = None

    @contextmanager
    def opened(self, args, left_out: Mapping[str, str], train: Sequence[Pair], resumed: Mapping[str, Any]):
        """Lock the folder, remove a run that is overwritten, and begin the run's files and log."""
        if is_main():
            with lock_folder(self.path):
                if not (resumed or args.overwrite) and (self.path / "latest.pth").exists():
                    raise UserError(f"another process has trained in {self.path} meanwhile: take another name")
                self._begin(args, left_out, train, resumed)
                yield
        else:
            yield

    def _begin(self, args, left_out: Mapping[str, str], train: Sequence[Pair], resumed: Mapping[str, Any]) -> None:
        remove_unfinished(self.path)
        if args.overwrite and not resumed:
            for old in [*self.path.glob("*.pth"), self.path / "left_out.txt", self.path / "failed_ids.txt"]:
                old.unlink(missing_ok=True)
            for results in ("results", "results_last"):
                shutil.rmtree(self.path / results, ignore_errors=True)
        if args.testset:
            check_writable(self.path / "results")  # before the training and not after it
        write_json(self.path / "configs.json", vars(args) | self.about["model_config"])
        if left_out:
            write_text(self.path / "left_out.txt", "".join(f"{name}\t{why}\n" for name, why in left_out.items()))
        write_text(self.path / "train_ids.txt", "".join(f"{pair.id}\n" for pair in train))
        self.log = RunLog(self.path, args.wandb, args.experiment_name, vars(args), **resumed)

    def save(self, name: str, *also: str, **more: Any) -> None:
        """Write all that resuming needs to NAME.pth, in types that `weights_only` loading allows.

        also: further names of the same file, which is written once.
        """
        if not self.log:
            return
        state = self.optimisation.state_dict() | self.state.state_dict() | self.about
        state |= {"processes": world_size(), "launch": launch_name(), "random": random_states()}
        state |= {"lines": self.log.lines, "wandb_run": self.log.run_id} | more
        if "frozen_weights" in self.about:
            frozen = self._frozen()
            state["model"] = {key: value for key, value in state["model"].items() if key not in frozen}
        save_checkpoint(self.path / f"{name}.pth", state, [self.path / f"{other}.pth" for other in also])

    @contextmanager
    def kept(self):
        """What the epoch's steps have changed is saved where the block, which measures, fails or is told to stop."""
        try:
            yield
        except Stopped:
            self.save("latest")
            raise
        except BaseException:
            with suppress(Exception):  # the first error is the one to be told
                self.save("latest")
            raise

    def _frozen(self) -> dict[str, torch.Tensor]:
        """The weights that checkpoints only refer to; their sha256 is among the marks, so no attempt has others."""
        if "frozen_weights" not in self.about:
            return {}
        return {f"{TRUNK}{name}": value for name, value in self.optimisation.model.imgnet.trunk_state().items()}

    def end(self, choose_threshold: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        """Load best.pth into the model -> what the file holds; latest.pth and best.pth get their universal threshold.

        choose_threshold: of the model as it is; every process calls it, the first one gets the record.
        """
        best, model = load_checkpoint(self.path / "best.pth"), self.optimisation.model
        about = {"threshold": choose_threshold(), "chosen_among": self.state.epoch}
        is_last = best["epoch"] == self.state.epoch
        self.save("latest", *(["best"] if is_last else []), **about)
        if is_last:
            return best | about
        model.load_state_dict(self._frozen() | best["model"])
        best |= about | {"threshold": choose_threshold()}
        if self.log:
            save_checkpoint(self.path / "best.pth", best)
        return best

    def save_between_steps(self, every: int, stop: StopFlag) -> None:
        """Save after every `every` steps, 0 for never; where the run is told to stop, save, and raise Stopped."""
        stopping = stop.is_set_anywhere()
        if stopping or (every and self.state.step % every == 0):
            self.save("latest")
        if stopping:
            raise Stopped
        stop.leave_alone()  # told to while the file was written

    def write(self, line: dict[str, Any], step: int) -> None:
        """One epoch's numbers; step: optimisation steps of the run so far. A run that is stuck is told so."""
        if self.log:
            args, held_out = self.about["args"], int(self.about["marks"]["held-out pairs"].split()[0])
            warm = max(args["warmup"], args["lr_warmup"] * args["epochs"])
            if warning := stuck([*self.log.lines, line], warm, args["batch_size"], held_out):
                if not self.log.warning:  # told once, not in every epoch
                    print(f"warning: {warning}", flush=True)
                line = line | {"warning": warning}
            self.log.write(line, step)

    def last_is_chosen(self) -> bool:
        """Whether best.pth is of the last epoch; every process has to ask, as the first one alone chooses."""
        return all_gather_object(self.state.chosen)[0] == self.state.epoch

    def finish(self, scores: Mapping[str, float], last: Mapping[str, float]) -> None:
        """The figures of the chosen checkpoint, and of the last epoch, where it is another."""
        if self.log:
            self.log.finish(scores, last)

    def save_failed(self, ids: Sequence[str], random: Mapping[str, Any]) -> str:
        """Save the state before a step that failed, and the ids of its batch -> where they are, for a message."""
        if not self.log:
            return ""
        restore_random_states(random)
        write_text(self.path / "failed_ids.txt", "".join(f"{name}\n" for name in ids))
        self.save("failed", failed=True)
        return f"; all in {self.path / 'failed_ids.txt'}, the state before the step in failed.pth"

    def resume(self, args) -> dict[str, Any]:
        """Continue from latest.pth -> what the log continues from. UserError where the run differs, unless forced."""
        path = self.path / "latest.pth"
        state = load_checkpoint(path)
        if not state.keys() >= STATE:
            raise UserError(f"{path} holds weights only, or is of another version, and cannot be resumed")
        marks = self.about["marks"]
        different = differences(state, args, marks)
        listed = "; ".join(different.values())
        if different and args.resume != "force":
            mend = "give the old ones to continue as before, or --resume force to continue with these"
            raise UserError(f"{path} was trained with other settings: {listed} ({mend})")
        with as_user_error(RuntimeError, ValueError, KeyError):
            self.optimisation.load_state_dict(state | {"model": self._frozen() | state["model"]})
        restore_random_states(state["random"])
        self.state.load_state_dict(state)
        if different:
            self.state.step, self.state.sums = 0, {}
            measured = state["selected_by"] == self.about["selected_by"]
            measured &= state["marks"]["held-out pairs"] == marks["held-out pairs"]
            if not measured or INFERENCE & different.keys():
                self.state.forget_best()  # another measure: the old best says nothing about it
            print(f"--resume force: other settings, from the start of epoch {self.state.epoch + 1}: {listed}")
        if state["processes"] != world_size():
            print(f"{world_size()} processes continue what {state['processes']} began: batches of batch norm differ")
        print(f"resumed after epoch {self.state.epoch} and {self.state.step} steps of {args.epochs} epochs")
        return {"lines": state["lines"], "run_id": state["wandb_run"]}
