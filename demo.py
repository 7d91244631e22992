"""The built-in demonstration: make the synthetic data, train by train_script.sh, score, draw, and say where to look.

python demo.py --seeds 0                                    # make demo
python demo.py --seeds 0 1 2 --export checkpoints/demo.pth  # make demo-table
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
from metrics import interactive_groups
from synthetic_probe import oracle_scores
from transforms import load_image
from utils import ArgumentParser, UserError, load_checkpoint, number, run_cli, save_checkpoint
from visualize import contact_sheet

DATA = Path("data/synthetic")
SPLITS = ("synthetic", "synthetic_distractor", "synthetic_interactive")
BARS = {
    ("synthetic", "AUD cIoU"): 0.60,
    ("synthetic", "AUD pointing"): 0.95,
    ("synthetic", "class R@1, worse way"): 0.90,
}
NOT_IN_EXPORT = ("optimizer", "scaler", "random", "sums", "lines")


def call(*command: str) -> None:
    """Run a command that prints for the user; its own message is enough when it fails."""
    print(f"$ {' '.join(command)}", flush=True)
    if subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}).returncode:
        raise UserError(f"the command above failed: {' '.join(command)}")


def train(seed: int) -> Path:
    name = f"demo_seed_{seed}"
    call("bash", "train_script.sh", "synthetic", ",".join(SPLITS), "cpu", name, "--seed", str(seed), "--overwrite")
    return Path("checkpoints") / name


def figures(folder: Path) -> dict[tuple[str, str], float]:
    """What the demonstration reports of one run: {(split, measure): fraction}."""
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


def deaf_oracle() -> dict[tuple[str, str], float]:
    """What an oracle scores that sees every object and hears nothing, where several are in view."""
    objects = json.loads((DATA / "objects.json").read_text())
    table = {}
    for split in SPLITS[1:]:
        names = read_ids(DATA / f"{split.removeprefix('synthetic_')}.txt")
        groups = interactive_groups(names) if TEST_SETS[split].interactive else {}
        scores = oracle_scores([objects[name] for name in names], groups)
        table |= {(split, f"AUD {metric}"): value for metric, value in scores.items()}
    return table


def print_table(runs: list[dict[tuple[str, str], float]]) -> None:
    """A Markdown table: mean and worst over the runs, the bar and the deaf oracle where there is one."""
    oracle = deaf_oracle()
    print("| split | measure | mean | worst | bar | deaf oracle |\n|---|---|---|---|---|---|")
    for key in runs[0]:
        values = [100 * run[key] for run in runs]
        bar, blind = (f"{100 * table[key]:.0f}" if key in table else "" for table in (BARS, oracle))
        print(f"| {key[0]} | {key[1]} | {sum(values) / len(values):.1f} | {min(values):.1f} | {bar} | {blind} |")


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
        "--seeds", type=number(int, low=0, high=2**32 - 1), nargs="+", default=[0], help="one training each"
    )
    parser.add_argument("--export", help="write the first seed's best model here, and demo.png")
    args = parser.parse_args()
    call(sys.executable, "synthetic.py", "--out", str(DATA))
    folders = [train(seed) for seed in args.seeds]
    print(f"in %, seeds {', '.join(map(str, args.seeds))}; without any learning: synthetic.py --probe\n")
    print_table([figures(folder) for folder in folders])
    if args.export:
        export(folders[0] / "best.pth", Path(args.export))
        draw(Path(args.export), Path("demo.png"))
    print("\nlook at the tables and pictures:")
    for split in SPLITS:
        results = folders[0] / "results" / split
        print(f"  {results / 'results.json'}   {results / 'contact_sheet.png'}")
    print(f"  {folders[0] / 'curves.png'}")


if __name__ == "__main__":
    run_cli(main)
