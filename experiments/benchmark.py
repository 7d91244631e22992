"""Speed against the way the released code works, as ratios within one run.

    python -m experiments.benchmark step|scaling|frozen|input|shards|clips|localize|eval|all
    python -m experiments.benchmark plan --pairs 2000000 --gpus 8 --cores 96
    python -m experiments.benchmark gpu

The baselines do the work as the released code does; each is timed in alternation with ours, and medians are compared.
After the table comes one JSON object per figure: name, value, baseline, ratio (baseline / value), unit.
Where nothing of the released code compares, the baseline is what the name says, or null. `--help` after a name lists
its flags.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train_script.sh and localize.py set it

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

import experiments.bench_clips as bench_clips
import experiments.bench_eval as bench_eval
import experiments.bench_frozen as bench_frozen
import experiments.bench_gpu as bench_gpu
import experiments.bench_input as bench_input
import experiments.bench_localize as bench_localize
import experiments.bench_plan as bench_plan
import experiments.bench_shards as bench_shards
import experiments.bench_step as bench_step
from experiments.timing import Timing, add_rounds, results_table
from utils import ArgumentParser, provenance, run_cli, strict_json


class Bench(NamedTuple):
    what: str
    add_flags: Callable
    run: Callable[..., Iterator[Timing]]
    in_all: bool = True


BENCHES = {
    "step": Bench("a training step of the full-size model", bench_step.add_flags, bench_step.run),
    "scaling": Bench(
        "the step by batch size, in parts, and of two processes", bench_step.add_scaling_flags, bench_step.run_scaling
    ),
    "frozen": Bench("a step from kept features of a frozen image encoder", bench_frozen.add_flags, bench_frozen.run),
    "input": Bench("reading, decoding and augmenting pairs", bench_input.add_flags, bench_input.run),
    "shards": Bench("reading pairs from shards and from loose files", bench_shards.add_flags, bench_shards.run),
    "clips": Bench("films to pairs", bench_clips.add_flags, bench_clips.run),
    "localize": Bench("maps over a film, from the file to the film", bench_localize.add_flags, bench_localize.run),
    "eval": Bench("scoring stored maps", bench_eval.add_flags, bench_eval.run),
    "gpu": Bench("what only a GPU can say: a report", bench_gpu.add_flags, bench_gpu.run, in_all=False),
    "plan": Bench("what so many pairs take, from unit costs", bench_plan.add_flags, bench_plan.run, in_all=False),
}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Time our way against the released code's.")
    commands = parser.add_subparsers(dest="bench", required=True, metavar="WHAT")
    for name, bench in BENCHES.items():
        bench.add_flags(commands.add_parser(name, help=bench.what, description=f"Time {bench.what}."))
    add_rounds(commands.add_parser("all", help="each of these", description="Run all of them at their defaults."))
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in provenance().items()) + f", {torch.get_num_threads()} threads")
    chosen = {args.bench: args}
    if args.bench == "all":
        in_all = [name for name, bench in BENCHES.items() if bench.in_all]
        chosen = {name: parser.parse_args([name, "--rounds", str(args.rounds)]) for name in in_all}
    timings = [timing.figures() for name, given in chosen.items() for timing in BENCHES[name].run(given)]
    if timings:
        print(f"\n{results_table(timings)}\n")
    for line in timings:
        print(strict_json(line))


if __name__ == "__main__":
    run_cli(main)
