"""Where the sound comes from, in images and films of one's own, without a box.

    python localize.py film.mp4 --checkpoint checkpoints/listen.pth --out maps
    python localize.py photo.jpg --sound dog.wav --checkpoint checkpoints/listen.pth --out maps
    python localize.py /path/to/folder --checkpoint checkpoints/listen.pth --out maps

From Python: `from localize import Localizer`.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read with torch: threads that wait soon leave drawing the processor

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from film.inputs import Task, find_tasks
from film.jobs import Outcome, Settings, describe_settings, is_done, run_all
from film.localizer import Box, Localizer, Peak, Step, add_window
from film.page import write_index
from film.render import SHOWS, Look, Outputs
from film.tables import FAILURES, PAGE, read_about, write_failures
from utils import ArgumentParser, UserError, add_boolean, number, pick_device, run_cli

__all__ = ["Box", "Localizer", "Peak", "Step"]

MOST_WORKERS = 16


def parse_args():
    parser = ArgumentParser(description="Show where the sound comes from, in images and films, over time.")
    parser.add_argument(
        "inputs", type=Path, nargs="+", metavar="INPUT",
        help="a film, an image, or a folder of them; an image takes the sound of its name beside it (photo.jpg, "
        "photo.wav)",
    )  # fmt: skip
    parser.add_argument("--checkpoint", required=True, help="the model's checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of what is written")
    parser.add_argument(
        "--sound", type=Path, metavar="FILE", help="the sound of an image; of a film, in place of its own"
    )
    add_window(parser)
    parser.add_argument(
        "--map_fps", type=number(float, low=0.1, high=120), default=10.0,
        help="maps per second of a film; between them the heat map is interpolated",
    )  # fmt: skip
    parser.add_argument(
        "--show", choices=SHOWS, default="share",
        help="share: what the audio claims, dark where nothing in view sounds; relative: stretched to each map's range",
    )  # fmt: skip
    add_boolean(parser, "--mask", "also write a film, or an image, that is white where the map is above the threshold")
    parser.add_argument(
        "--workers", type=number(int, low=1), help="files that are worked on at once (default: one per core)"
    )
    parser.add_argument("--gpu", help="number of a CUDA device, or cpu (default: the first one, where there is one)")
    return parser.parse_args()


def report(done: Sequence[tuple[Task, Outcome]], skipped: int, out: Path) -> None:
    """Say what was made; UserError where something that was asked for failed, or all did."""
    failed = [(task, outcome.reason) for task, outcome in done if outcome.reason]
    write_failures(out / FAILURES, sorted((str(task.source), reason) for task, reason in failed))
    made = [task for task, outcome in done if not outcome.reason]
    if len(made) == 1:
        about = read_about(Outputs(made[0].stem).file(".json")) or {}
        for decision in about.get("decisions", ()):
            print(f"{made[0].source}: {decision}")
        print(f"presence up to {about.get('presence', 0):.3f}; written: {made[0].stem}.*")
    if skipped or len(done) > 1:
        print(f"{len(made)} made, {skipped} there already, {len(failed)} failed; to look at: {out / PAGE}")
    if failed and (any(task.asked_for for task, _ in failed) or not (made or skipped)):
        source, reason = failed[0][0].source, failed[0][1]
        more = f" (and {len(failed) - 1} more: {out / FAILURES})" if len(failed) > 1 else ""
        raise UserError(f"{source}: {reason}{more}")
    if failed:
        print(f"which, and why: {out / FAILURES}")


def main() -> None:
    args = parse_args()
    gpu = args.gpu or ("0" if torch.cuda.is_available() else "cpu")
    settings = Settings(args.checkpoint, str(pick_device(gpu)), args.window, args.map_fps, Look(args.show, args.mask))
    tasks = find_tasks(args.inputs, args.out, args.sound)
    localizer = settings.localizer()
    if not localizer.has_threshold:
        print(
            f"{args.checkpoint} has no universal threshold: what is above {localizer.threshold} counts as lit. This "
            f"gives it one: python -m scoring.threshold {shlex.quote(args.checkpoint)} FOLDER_OF_PAIRS --gpu {gpu}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    described = describe_settings(settings, localizer)
    todo = [task for task in tasks if not is_done(task, described)]
    workers = args.workers or min(os.cpu_count() or 1, MOST_WORKERS)
    done: list[tuple[Task, Outcome]] = []
    try:
        for task, outcome in run_all(todo, settings, localizer, described, workers):
            done.append((task, outcome))
    finally:
        write_index(args.out)
    report(done, len(tasks) - len(todo), args.out)


if __name__ == "__main__":
    run_cli(main)
