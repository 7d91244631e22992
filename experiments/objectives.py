"""The table of training objectives on the built-in data: trains what is missing, prints the table, draws a picture.

    python -m experiments.objectives --seeds 0 1 2                                  # make objectives: every row
    python -m experiments.objectives --seeds 0 1 2 --rows published listen --epochs 10 --jobs 2
    python -m experiments.objectives --rows published listen --arch resnet18 --epochs 8     # the full-size encoders

Every training goes through train_script.sh, one thread each, into a folder for each row, seed and architecture; a run
that is there is not trained again. All figures come from the runs' results.json, a row's mean over seeds (and its worst
seed).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from tqdm import tqdm

from reports.pictures import side_by_side_on_synthetic
from scoring.compare import NO_EFFECT
from utils import ArgumentParser, UserError, number, run_cli, write_json

# How the recipe of listen asks for maps; so do the other rows but published, which keeps its own way.
LISTEN_INFERENCE = "--infer_sharpening 0.1 --infer_smoothing 0.1"
SHARE = f"--share_contrast 1 --lam3 0 {LISTEN_INFERENCE}"


class Row(NamedTuple):
    label: str
    objective: str = "paper"  # OBJECTIVE of train_script.sh
    flags: str = ""  # beside the recipe's
    objects: int = 3  # at most so many in a training picture, of which one sounds


ROWS = {
    "published": Row("published"),
    "maxpool": Row("max-pool contrast", flags=f"--objective maxpool_contrastive {LISTEN_INFERENCE}"),
    "map": Row("map contrast", flags=f"--map_contrast 1 {LISTEN_INFERENCE}"),
    "foreign": Row("foreign tokens", flags=f"--foreign_tokens 2 {LISTEN_INFERENCE}"),
    "map_foreign": Row(
        "map contrast + foreign tokens", flags=f"--map_contrast 1 --foreign_tokens 2 {LISTEN_INFERENCE}"
    ),
    "share": Row("share contrast", flags=SHARE),
    "listen": Row("share contrast + foreign claims (listen)", "listen"),
    "listen_silence": Row("the same + silence", "listen", "--silence 1"),
    "published_one": Row("published", objects=1),
    "share_one": Row("share contrast", flags=SHARE, objects=1),
    "listen_one": Row("share contrast + foreign claims (listen)", "listen", objects=1),
}
PICTURED = ("published", "maxpool", "listen")
DATA = {1: Path("data/synthetic"), 3: Path("data/synthetic_3")}  # by `objects`; their test splits are the same
TEST_DATA = 1
TEST, DISTRACTOR, INTERACTIVE, OFFSCREEN = SPLITS = (
    "synthetic", "synthetic_distractor", "synthetic_interactive", "synthetic_offscreen",
)  # fmt: skip
CLASS_RECALL = "class R@1, worse way"
TABLES = {  # title: (head of a column, split, metric of AUD or CLASS_RECALL)
    "Fixed rule, in %": (
        ("test cIoU", TEST, "cIoU"),
        ("distractor pointing", DISTRACTOR, "pointing"),
        ("distractor cIoU", DISTRACTOR, "cIoU"),
        ("distractor listening", DISTRACTOR, "listening"),
        ("interactive both_pointing", INTERACTIVE, "both_pointing"),
        ("interactive IIoU", INTERACTIVE, "IIoU"),
    ),
    "Half rule, retrieval and presence, in %": (
        ("test cIoU_half", TEST, "cIoU_half"),
        ("distractor cIoU_half", DISTRACTOR, "cIoU_half"),
        ("interactive IIoU_half", INTERACTIVE, "IIoU_half"),
        ("test class R@1, worse way", TEST, CLASS_RECALL),
        ("offscreen presence_AP", OFFSCREEN, "presence_AP"),
        ("by the map", OFFSCREEN, "presence_AP@presence"),
    ),
}
# The full-size encoders, 7 x 7 tokens of 512 channels; all else is the synthetic recipe's, but for rate and batch, with
# which share contrast fell further in its first epochs than with the small model's.
ARCHITECTURES = {"small": "", "resnet18": "--arch resnet18 --image_size 224 --lr 3e-4 --batch_size 32"}
PYTHON = sys.executable
LAST_LINES = 5  # of a training that failed
POLL_SECONDS = 0.2


# ---------------------------------------------------------------- the runs


class Training(NamedTuple):
    row: Row
    seed: int
    epochs: int
    folder: Path
    arch: str = "small"

    @property
    def output(self) -> Path:
        return self.folder / "train.txt"

    @property
    def asked(self) -> Path:
        return self.folder / "asked.json"

    def results(self, split: str) -> Path:
        return self.folder / "results" / split / "results.json"

    def command(self) -> list[str]:
        data = ["--train_data_path", str(DATA[self.row.objects]), "--test_data_path", str(DATA[TEST_DATA])]
        flags = [*self.row.flags.split(), *ARCHITECTURES[self.arch].split(), *data]
        flags += ["--epochs", str(self.epochs), "--seed", str(self.seed)]
        return ["bash", "train_script.sh", "synthetic", ",".join(SPLITS), "cpu", *flags]

    def environment(self, python: str) -> dict[str, str]:
        """For train_script.sh; what a user's shell has set for other runs is switched off."""
        own = {"OBJECTIVE": self.row.objective, "ABLATION": "", "SEEDS": "", "PROCESSES": "", "PYTHON": python}
        return os.environ | own | {"OMP_NUM_THREADS": "1"}

    def wanted(self) -> dict[str, str]:
        """The flags that train_script.sh hands to train_slot.py, the last of each, but for those without effect."""
        asked = subprocess.run(self.command(), env=self.environment("echo"), capture_output=True, text=True)
        if asked.returncode:
            raise UserError(f"train_script.sh refuses {self.folder.name}: {asked.stderr.strip()}")
        words = asked.stdout.split()
        flags = {word.removeprefix("--"): value for word, value in pairwise(words) if word.startswith("--")}
        return {name: value for name, value in flags.items() if name not in NO_EFFECT - {"seed"}}

    def is_finished(self) -> bool:
        return all(self.results(split).is_file() for split in SPLITS)

    def is_there(self) -> bool:
        """Whether this very run is finished. UserError for a finished one with other flags."""
        if not self.is_finished():
            return False
        asked, wanted = json.loads(self.asked.read_text()) if self.asked.is_file() else {}, self.wanted()
        different = [
            f"--{name} {asked.get(name)} and not {wanted.get(name)}"
            for name in sorted(asked.keys() | wanted.keys())
            if asked.get(name) != wanted.get(name)
        ]
        if different:
            mend = "remove that folder to train it anew, or name another --model_dir"
            raise UserError(f"{self.folder} was trained with {', '.join(different)}: {mend}")
        return True

    def start(self) -> subprocess.Popen:
        self.folder.mkdir(parents=True, exist_ok=True)
        into = ["--model_dir", str(self.folder.parent), "--experiment_name", self.folder.name]
        command = [*self.command(), "--num_workers", "0", *into, "--overwrite"]
        write_json(self.asked, self.wanted())
        with open(self.output, "w") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, env=self.environment(PYTHON))

    def seconds(self) -> float:
        """Of all training steps, as the log has it."""
        batch_size = json.loads((self.folder / "configs.json").read_text())["batch_size"]
        lines = map(json.loads, (self.folder / "log.jsonl").read_text().splitlines())
        return sum(line["steps"] * batch_size / line["pairs_per_second"] for line in lines)


def make_data(objects: int) -> None:
    """The built-in data with pictures of so many objects to train on, unless this very set is there already."""
    command = [PYTHON, "-m", "synthetic.generate", "--out", str(DATA[objects]), "--train_objects", str(objects)]
    if subprocess.run(command).returncode:
        raise UserError(f"the data could not be made: {' '.join(command)}")


def train_all(runs: Sequence[Training], jobs: int) -> None:
    """Train so many at once. One that fails stops no other; UserError at the end, after its file and last lines."""
    waiting, running, failed = list(runs), {}, []
    try:
        with tqdm(total=len(runs), unit="training", disable=None) as bar:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running[run] = run.start()
                bar.set_postfix_str(", ".join(run.folder.name for run in running))
                time.sleep(POLL_SECONDS)
                for run in [run for run, process in running.items() if process.poll() is not None]:
                    failed += [] if running.pop(run).returncode == 0 and run.is_finished() else [run]
                    tqdm.write(f"{run.folder}: {'failed' if run in failed else 'trained and scored'}")
                    bar.update()
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    for run in failed:
        last = run.output.read_text(errors="replace").splitlines()[-LAST_LINES:]
        print("\n  ".join([f"{run.output} ends in:", *last]), file=sys.stderr)
    if failed:
        names = ", ".join(str(run.output) for run in failed)
        raise UserError(f"{len(failed)} of {len(runs)} trainings failed ({names}); what is finished is not done again")


# ---------------------------------------------------------------- table and picture


def figure(results: Mapping[str, Any], metric: str) -> float | None:
    """One figure of AUD; None where a result does not define it."""
    if metric != CLASS_RECALL:
        return results["maps"]["AUD"].get(metric)
    recalls = [way["R@1"] for way in ((results.get("retrieval") or {}).get("by_class") or {}).values()]
    return min(recalls) if recalls and None not in recalls else None


def cell(values: Sequence[float | None]) -> str:
    """Mean over seeds and, of several, the worst in brackets, in %."""
    if None in values:
        return "-"
    worst = f" ({100 * min(values):.1f})" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{worst}"


def table(rows: Mapping[str, Sequence[Training]]) -> str:
    """Markdown of finished runs, {row: a run for each seed}, from their results.json; below it what was done."""
    read = {run: {s: json.loads(run.results(s).read_text()) for s in SPLITS} for runs in rows.values() for run in runs}
    lines = []
    for title, columns in TABLES.items():
        lines += [
            title,
            "",
            f"| trained with | objects | sharpening, smoothing | {' | '.join(head for head, _, _ in columns)} |",
        ]
        lines.append("|---|---|---|" + "---|" * len(columns))
        for runs in rows.values():
            row, settings = runs[0].row, read[runs[0]][TEST]["settings"]
            inference = f"{settings['infer_sharpening']:g}, {settings.get('infer_smoothing', 0):g}"
            cells = [cell([figure(read[run][split], metric) for run in runs]) for _, split, metric in columns]
            objects = "1" if row.objects == 1 else f"1 to {row.objects}"
            lines.append(f"| {' | '.join([row.label, objects, inference, *cells])} |")
        lines.append("")
    first = next(iter(read))
    seeds = ", ".join(str(run.seed) for run in next(iter(rows.values())))
    revisions = {results[TEST].get("provenance", {}).get("revision", "unknown") for results in read.values()}
    return "\n".join(lines) + (
        f"seeds {seeds}" + ": mean (worst)" * ("," in seeds) + f"; {first.arch}, {first.epochs} epochs; "
        f"{median(run.seconds() for run in read):.0f} s of training per run (median, one thread); "
        f"revision {', '.join(sorted(revisions))}; built-in data, not VGG-Sound; no box is used in training or in "
        "choosing checkpoints (the sharpening of the published rows, the weights of our losses and the smoothing were "
        "chosen with the boxes of other data)"
    )


def main() -> None:
    parser = ArgumentParser(description="Train the objectives on the built-in data, tabulate and draw them.")
    about = f"of {', '.join(ROWS)} (default: all)"
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=about)
    whole = number(int, low=0, high=2**32 - 1)
    parser.add_argument("--seeds", type=whole, nargs="+", default=[0], help="one training of each row for each")
    parser.add_argument("--epochs", type=number(int, low=1), default=10, help="of every training")
    about = "of every training; resnet18: 224 pixels, 7 x 7 tokens of 512 channels"
    parser.add_argument("--arch", choices=ARCHITECTURES, default="small", help=about)
    cores = os.cpu_count() or 1
    parser.add_argument("--jobs", type=number(int, low=1), default=cores, help="trainings at once (default: cores)")
    parser.add_argument("--model_dir", type=Path, default=Path("checkpoints/objectives"), help="folder of the runs")
    parser.add_argument("--picture", type=Path, help="default: objectives[_resnet18].png in --model_dir")
    args = parser.parse_args()
    seeds = list(dict.fromkeys(args.seeds))
    arch_name = "" if args.arch == "small" else f"_{args.arch}"

    def training(key: str, seed: int) -> Training:
        return Training(ROWS[key], seed, args.epochs, args.model_dir / f"{key}{arch_name}_seed_{seed}", args.arch)

    rows = {key: [training(key, seed) for seed in seeds] for key in ROWS if key in args.rows}
    first_seeds_first = [run for of_seed in zip(*rows.values()) for run in of_seed]
    missing = [run for run in first_seeds_first if not run.is_there()]
    for objects in sorted({TEST_DATA, *(run.row.objects for run in missing)}):
        make_data(objects)
    train_all(missing, args.jobs)
    print(table(rows))
    if pictured := {key: rows[key][0] for key in PICTURED if key in rows}:
        picture = args.picture or args.model_dir / f"objectives{arch_name}.png"
        checkpoints = {key: run.folder / "best.pth" for key, run in pictured.items()}
        side_by_side_on_synthetic(checkpoints, DATA[TEST_DATA], picture)
        print(f"\n{picture}: {', '.join(pictured)}")


if __name__ == "__main__":
    run_cli(main)
