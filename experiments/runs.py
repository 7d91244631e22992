"""The trainings of a comparison on the built-in data: their commands, which are finished, running several at once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import recipes
from training.step import choose_amp
from utils import ArgumentParser, UserError, write_json

DATA = {1: Path("data/synthetic"), 3: Path("data/synthetic_3")}  # by `objects`; the test splits of both are the same
TEST, DISTRACTOR, INTERACTIVE, OFFSCREEN = SPLITS = (
    "synthetic", "synthetic_distractor", "synthetic_interactive", "synthetic_offscreen",
)  # fmt: skip
OF_OTHER_TRAININGS = ("OBJECTIVE", "ABLATION", "SEEDS", "PROCESSES")  # variables of the user's shell
PYTHON = sys.executable
LAST_LINES = 5  # of a training that failed
POLL_SECONDS = 0.2


class Row(NamedTuple):
    label: str
    flags: str = ""  # of train_slot.py, beside those that every row has
    objects: int = 3  # most objects in a training image; one of them sounds


class Training(NamedTuple):
    row: Row
    seed: int
    folder: Path
    splits: tuple[str, ...] = SPLITS
    flags: tuple[str, ...] = ()  # that every row has
    trainset: str = "synthetic"

    @property
    def output(self) -> Path:
        return self.folder / "train.txt"

    @property
    def asked(self) -> Path:
        return self.folder / "asked.json"

    def results(self, split: str) -> Path:
        return self.folder / "results" / split / "results.json"

    def over_time(self, window: float) -> Path:
        """results.json of the built-in films, with windows of so many s."""
        return self.folder / "over_time" / f"{window:g}" / "synthetic_video" / "results.json"

    def words(self) -> list[str]:
        """The flags that say what is learnt."""
        return [*self.row.flags.split(), *self.flags, "--seed", str(self.seed)]

    def command(self, resume: bool = False) -> list[str]:
        """resume: continue what was begun in the folder but not finished, if that had the wanted settings."""
        begun = resume and not self.is_finished() and (self.folder / "latest.pth").exists()
        begun = begun and self.settings_asked() == self.wanted()
        into = ["--model_dir", str(self.folder.parent), "--experiment_name", self.folder.name]
        into.append("--resume" if begun else "--overwrite")
        return ["bash", "train_script.sh", self.trainset, ",".join(self.splits), "cpu", *self.words(), *into]

    def wanted(self) -> dict[str, Any]:
        """Every setting that says what is learnt or how maps are asked for, also those of the recipe."""
        recipes.add_flags(parser := ArgumentParser())
        words = ["--trainset", self.trainset, *self.words(), "--experiment_name", self.folder.name]
        settings, roles = vars(recipes.parse(parser, words)), recipes.roles()
        matter = {name for name, role in roles.items() if role not in (recipes.RUN, recipes.TESTS)}
        matter |= recipes.INFERENCE | {"train_data_path"}
        weights = {f"weights {loss}": weight for loss, weight in settings["weights"].items()}
        amp = choose_amp(settings["amp"], torch.device("cpu"))  # of `auto` what this CPU takes
        return {name: settings[name] for name in matter - {"weights"}} | weights | {"precision": amp and str(amp)}

    def settings_asked(self) -> dict[str, Any]:
        """What `note` wrote into the folder."""
        return json.loads(self.asked.read_text()) if self.asked.is_file() else {}

    def is_finished(self) -> bool:
        return all(self.results(split).is_file() for split in self.splits)

    def is_there(self) -> bool:
        """Whether this run is finished. UserError for a finished one with other flags."""
        if not self.is_finished():
            return False
        asked = recipes.renamed(json.loads(self.asked.read_text())) if self.asked.is_file() else {}
        wanted = self.wanted()
        different = [
            f"--{name} {asked.get(name)} and not {wanted.get(name)}"
            for name in sorted(asked.keys() | wanted.keys())
            if (asked.get(name) or None) != (wanted.get(name) or None)  # older code knew fewer settings: they are off
        ]
        if different:
            mend = "remove that folder to train it anew, or name another --model_dir"
            raise UserError(f"{self.folder} was trained with {', '.join(different)}: {mend}")
        return True

    def start(self) -> subprocess.Popen:
        """Train in the background, on one thread, from where an earlier attempt ended."""
        command, own = [*self.command(resume=True), "--num_workers", "0"], {"OMP_NUM_THREADS": "1"}
        self.note()
        with open(self.output, "w") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, env=environment() | own)

    def note(self) -> None:
        """Write the wanted settings into the folder of the training."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.asked, self.wanted())

    def configuration(self) -> dict[str, Any]:
        return recipes.renamed(json.loads((self.folder / "configs.json").read_text()))

    def seconds(self) -> float:
        """Of all training steps, as the log has it."""
        batch_size = self.configuration()["batch_size"]
        lines = map(json.loads, (self.folder / "log.jsonl").read_text().splitlines())
        return sum(line["steps"] * batch_size / line["pairs_per_second"] for line in lines)


Rows = Mapping[str, Sequence[Training]]  # {row: a run for each seed}


def environment() -> dict[str, str]:
    """For train_script.sh; variables that the user's shell has set for other trainings are left out."""
    return {name: value for name, value in os.environ.items() if name not in OF_OTHER_TRAININGS} | {"PYTHON": PYTHON}


def call(*command: str) -> None:
    """Run a command that prints for the user; its own message is enough when it fails."""
    shown = " ".join(command)
    print(f"$ {shown}", flush=True)
    if subprocess.run(command, env=environment()).returncode:
        raise UserError(f"the command above failed: {shown}")


def make_data(objects: int) -> None:
    """Make the built-in data with at most `objects` objects per training image, unless this set is there already."""
    call(PYTHON, "prepare_data.py", "synthetic", "--out", str(DATA[objects]), "--train_objects", str(objects))


def train_all(runs: Sequence[Training], jobs: int) -> None:
    """Train `jobs` at once. If one fails, the others continue; at the end its last lines are printed, and UserError.

    SIGTERM interrupts as Ctrl-C does, so that no training is left behind.
    """
    waiting, running, failed = list(runs), {}, []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tqdm(total=len(runs), unit="training", disable=None) as bar:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running[run] = run.start()
                bar.set_postfix_str(", ".join(run.folder.name for run in running))
                time.sleep(POLL_SECONDS)
                for run in [run for run, process in running.items() if process.poll() is not None]:
                    if running.pop(run).returncode or not run.is_finished():
                        failed.append(run)
                    tqdm.write(f"{run.folder}: {'failed' if run in failed else 'trained and scored'}")
                    bar.update()
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)
    for run in failed:
        last = run.output.read_text(errors="replace").splitlines()[-LAST_LINES:]
        print("\n  ".join([f"{run.output} ends in:", *last]), file=sys.stderr)
    if failed:
        names = ", ".join(str(run.output) for run in failed)
        raise UserError(f"{len(failed)} of {len(runs)} trainings failed ({names}); finished ones are kept")
