"""What lets a run go on: that it is the same run, that it was started anew by torchrun, that it was told to stop."""

import fcntl
import hashlib
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dataset import Pair
from distributed import all_gather_object, under_torchrun, world_size
from utils import UserError

MAY_CHANGE = {  # when a run goes on; its other flags belong to it
    "resume", "force", "dry_run", "overwrite", "gpu", "num_workers", "wandb", "eval_every", "save_every_steps",
    "keep_every", "model_dir", "experiment_name", "metadata", "train_data_path", "train_list", "val_list",
    "test_data_path", "test_gt_path",
}  # fmt: skip
INFERENCE = {"alpha", "infer_sharpening", "infer_smoothing"}  # how tests ask for maps, which --select test goes by
LAUNCH = "launch.txt"  # in the folder of a run: which start of torchrun it is of


# ---------------------------------------------------------------- the same run


def fingerprint(pairs: Sequence[Pair]) -> str:
    """How many ids there are and which, in their order, wherever their files lie."""
    return f"{len(pairs)} ids {hashlib.sha256('/'.join(pair.id for pair in pairs).encode()).hexdigest()[:12]}"


def differences(state: Mapping[str, Any], args, marks: Mapping[str, str]) -> list[str]:
    """What the run that wrote a checkpoint had else than this one: flags that belong to a run, and its marks.

    A flag that the older code did not know makes no difference where it is off.
    """
    to_the_end = args.lr_schedule == "cosine" or args.lr_warmup
    free = MAY_CHANGE | (set() if to_the_end else {"epochs"}) | (set() if args.select == "test" else INFERENCE)
    then, now = state["args"] | state["marks"], vars(args) | marks
    return [
        f"{name if name in marks else f'--{name}'} {then.get(name)} -> {value}"
        for name, value in now.items()
        if name not in free and then.get(name) != value and (name in then or value)
    ]


# ---------------------------------------------------------------- started anew


def launch_name() -> str:
    """What all processes that one start of torchrun brings up have in common, those of its restarts too, else ""."""
    if not under_torchrun():
        return ""
    name = os.environ["TORCHELASTIC_RUN_ID"]
    return f"{socket.gethostname()} {os.getppid()}" if name == "none" else name


def goes_on(folder: Path, args) -> bool:
    """Whether to take up latest.pth: asked by --resume, or left there by this very start of torchrun.

    Decided by the first process for all. Raises UserError where a finished run would be replaced unasked, or there is
    nothing to resume.
    """
    there, launch = (folder / "latest.pth").exists(), folder / LAUNCH
    own = there and under_torchrun() and launch.is_file() and launch.read_text(encoding="utf-8") == launch_name()
    there, own = all_gather_object((there, own))[0]
    if args.resume and not there:
        raise UserError(f"there is nothing to resume in {folder}: no latest.pth")
    if there and not (own or args.resume or args.overwrite or args.dry_run):
        raise UserError(f"{folder} holds a trained model: --resume goes on with it, --overwrite replaces it")
    return own or args.resume


def hold(folder: Path):
    """Take the run's folder for this process, as long as the file that is returned stays open.

    Raises UserError when another process holds it. Where the file system knows no locks, nobody is held back.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")  # noqa: SIM115  (the run closes it by ending)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by loader workers, which may outlive a kill
    except (BlockingIOError, PermissionError) as error:
        raise UserError(f"another process is training in {folder}: stop it, or take another name") from error
    except OSError:
        pass
    return lock


# ---------------------------------------------------------------- told to stop


class StopSignal:
    """SIGTERM, as it comes before a kill: `asked` turns True, and within `anywhere` one process ends at once."""

    def __init__(self) -> None:
        self.asked, self.may_leave = False, False

    @contextmanager
    def listening(self):
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def anywhere(self):
        """Work that a resumed run does again. Of several processes each would leave the others waiting."""
        self.may_leave = world_size() == 1
        try:
            if self.asked and self.may_leave:
                self.leave()
            yield
        finally:
            self.may_leave = False

    def _ask(self, *_: Any) -> None:
        self.asked = True
        if self.may_leave:
            self.leave()

    def leave(self) -> None:
        print("stopped by SIGTERM; what was finished is kept, and --resume goes on", flush=True)
        sys.exit(0)
