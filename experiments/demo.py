"""The built-in demonstration: make the synthetic data, train by train_script.sh, score, draw, and say where to look.

Trained are the published objective and the listening one, whose map follows the sound, on the same pairs, equally long.

python -m experiments.demo --seeds 0                                    # make demo
python -m experiments.demo --seeds 0 1 2 --export checkpoints/demo.pth  # make demo-table
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from annotations import read_ids
from dataset import TEST_SETS
from reports.pictures import contact_sheet
from reports.table import side_by_side_on_synthetic
from scoring.metrics import interactive_groups
from synthetic.probe import oracle_scores
from transforms import load_image
from utils import ArgumentParser, UserError, load_checkpoint, number, run_cli, save_checkpoint

DATA = Path("data/synthetic")
SPLITS = ("synthetic", "synthetic_distractor", "synthetic_interactive")
BARS = {
    ("synthetic", "AUD cIoU"): 0.60,
    ("synthetic", "AUD pointing"): 0.95,
    ("synthetic", "class R@1, worse way"): 0.90,
}
SIDE_BY_SIDE = Path("checkpoints/demo_objectives.png")
OWN = {
    "PYTHON": sys.executable,
    "ABLATION": "",
    "SEEDS": "",
    "PROCESSES": "",
}  # a shell's are meant for other trainings
Figures = dict[tuple[str, str], float]  # {(split, measure): fraction}
NOT_IN_EXPORT = ("optimizer", "scaler", "random", "sums", "lines")


def call(*command: str, **variables: str) -> None:
    """Run a command that prints for the user; its own message is enough when it fails."""
    shown = " ".join([*(f"{name}={value}" for name, value in variables.items()), *command])
    print(f"$ {shown}", flush=True)
    if subprocess.run(command, env=os.environ | OWN | variables).returncode:
        raise UserError(f"the command above failed: {shown}")


def train(seed: int, name: str, **variables: str) -> Path:
    """One training through train_script.sh -> its folder, NAME_seed_SEED."""
    name = f"{name}_seed_{seed}"
    own = ["--experiment_name", name, "--seed", str(seed), "--overwrite"]
    call("bash", "train_script.sh", "synthetic", ",".join(SPLITS), "cpu", *own, **variables)
    return Path("checkpoints") / name


def figures(folder: Path) -> Figures:
    """What the demonstration reports of one run."""
    table = {}
    for split in SPLITS:
        results: dict[str, Any] = json.loads((folder / "results" / split / "results.json").read_text())
        maps = results["maps"]
        for name in ("AUD", "IQR"):
            for metric in ("cIoU", "pointing", "IIoU", "both_pointing"):
                if metric in maps[name]:
                    table[split, f"{name} {metric}"] = maps[name][metric]
        table[split, "AUD_wrong pointing"] = maps["AUD_wrong"]["pointing"]
        table[split, "listening"] = maps["AUD"]["listening"]
        if not TEST_SETS[split].interactive:
            by_class = results["retrieval"]["by_class"]
            table[split, "class R@1, worse way"] = min(recalls["R@1"] for recalls in by_class.values())
    return table


def deaf_oracle() -> Figures:
    """What an oracle scores that sees every object and hears nothing, where several are in view."""
    objects = json.loads((DATA / "objects.json").read_text())
    table = {}
    for split in SPLITS[1:]:
        names = read_ids(DATA / f"{split.removeprefix('synthetic_')}.txt")
        groups = interactive_groups(names) if TEST_SETS[split].interactive else {}
        scores = oracle_scores([objects[name] for name in names], groups)
        table |= {(split, f"AUD {metric}"): value for metric, value in scores.items()}
    return table


def print_table(published: list[Figures], listening: list[Figures]) -> None:
    """A Markdown table: mean and worst over the runs of either objective, its bar, the deaf oracle where there is one.

    The bars are the published objective's.
    """
    oracle = deaf_oracle()
    print("| split | measure | published: mean | worst | bar | listening: mean | worst | deaf oracle |")
    print("|---|---|---|---|---|---|---|---|")
    for key in published[0]:
        blocks = [[100 * run[key] for run in runs] for runs in (published, listening)]
        first, second = (f"{sum(values) / len(values):.1f} | {min(values):.1f}" for values in blocks)
        bar, blind = (f"{100 * table[key]:.0f}" if key in table else "" for table in (BARS, oracle))
        print(f"| {key[0]} | {key[1]} | {first} | {bar} | {second} | {blind} |")


def export(source: Path, target: Path) -> None:
    """A checkpoint without what only resuming needs, small enough to be committed."""
    state = {name: value for name, value in load_checkpoint(source).items() if name not in NOT_IN_EXPORT}
    save_checkpoint(target, state)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB, sha256 {digest}")


def draw(checkpoint: Path, target: Path, each: int = 2) -> None:
    """A sheet of the first samples of every split, as the exported model scores them."""
    folder = Path("checkpoints") / "demo_results"
    flags = ["--imagenet_weights", "none", "--save_visualizations", "true", "--out_dir", str(folder)]
    call(
        sys.executable,
        "test_model.py",
        "--checkpoint",
        str(checkpoint),
        "--testset",
        ",".join(SPLITS),
        "--gpu",
        "cpu",
        *flags,
    )
    samples = [path for split in SPLITS for path in sorted((folder / split / "samples").glob("*.png"))[:each]]
    contact_sheet([np.array(load_image(path)) for path in samples], target)
    print(f"{target}: {len(samples)} samples")


def main() -> None:
    parser = ArgumentParser(description="Make the synthetic data, train, score, draw.")
    parser.add_argument(
        "--seeds", type=number(int, low=0, high=2**32 - 1), nargs="+", default=[0], help="two trainings each"
    )
    parser.add_argument("--export", help="write the first seed's best published model here, and docs/demo.png")
    args = parser.parse_args()
    call(sys.executable, "-m", "synthetic.generate", "--out", str(DATA))
    folders = [train(seed, "demo", OBJECTIVE="paper") for seed in args.seeds]
    listening = [train(seed, "demo_listen", OBJECTIVE="listen") for seed in args.seeds]
    print(f"in %, seeds {', '.join(map(str, args.seeds))}; without learning: python -m synthetic.generate --probe\n")
    print_table(*([figures(folder) for folder in objective] for objective in (folders, listening)))
    checkpoints = {"published": folders[0] / "best.pth", "listening": listening[0] / "best.pth"}
    side_by_side_on_synthetic(checkpoints, DATA, SIDE_BY_SIDE)
    if args.export:
        export(folders[0] / "best.pth", Path(args.export))
        draw(Path(args.export), Path("docs/demo.png"))
    print("\nlook at the tables and pictures:")
    for folder in (folders[0], listening[0]):
        for split in SPLITS:
            results = folder / "results" / split
            print(f"  {results / 'results.json'}   {results / 'contact_sheet.png'}")
        print(f"  {folder / 'curves.png'}")
    print(f"  {SIDE_BY_SIDE}: one picture, the sound of each of its objects: which map moves with it?")


if __name__ == "__main__":
    run_cli(main)
