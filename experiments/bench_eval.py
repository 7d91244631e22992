"""Scoring stored maps: our code against the released code's, and every metric of a whole set.

With --against REVISION every metric of the set is scored by this code and by that of the revision, in turns: the time
is that of the processor, and the figures of both are compared.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from annotations import box_map
from experiments.released import SIX_MAPS, released_scoring
from experiments.stored_set import ALPHA, BATCH, random_maps
from experiments.timing import Timing, add_rounds, alternate
from maps import enlarge
from scoring.bootstrap import RESAMPLES
from scoring.metrics import area_under_success, consensus_iou, region_fixed, success
from scoring.parts import in_parts
from utils import UserError, number

VGGSS_PAIRS = 5158
ROOT = Path(__file__).resolve().parents[1]


def add_flags(parser) -> None:
    add_rounds(parser)
    parser.add_argument(
        "--pairs", type=number(int, low=2), default=VGGSS_PAIRS, help="number of samples whose stored maps are scored"
    )
    parser.add_argument(
        "--against", metavar="REVISION", help="instead compare with the code of this revision: CPU time and figures"
    )


def run(args) -> Iterator[Timing]:
    if args.against:
        with code_of(args.against) as tree:  # first, so that a wrong name shows at once
            yield from bench_against(tree, args.against, args.rounds, args.pairs)
        return
    yield from bench_figures(args.rounds)
    scored = score_with(ROOT, args.pairs)
    yield Timing(f"eval: every metric and interval, {args.pairs} samples, six maps", scored["seconds"], None, "s")
    yield Timing("eval: every metric, per map", 1000 * scored["seconds"] / scored["maps"], None, "ms")
    asked = score_with(ROOT, args.pairs, "negatives")
    name = f"eval: the same with negative audio of one map, one seed, {args.pairs} samples (baseline: without)"
    yield Timing(name, asked["seconds"], scored["seconds"], "s")
    yield Timing("eval: its peak memory (baseline: without)", asked["memory_gib"], scored["memory_gib"], "GiB")


# ---------------------------------------------------------------- against the released code


def our_scoring(raw: dict[str, torch.Tensor], truth: torch.Tensor) -> dict[str, tuple[float, float]]:
    """cIoU and AUC of the six maps, as `released_scoring` gives them, by the code that every evaluation here uses."""

    def score(rows: slice) -> dict[str, torch.Tensor]:
        maps = enlarge({name: values[rows] for name, values in raw.items()}, "bicubic", ALPHA)
        return {name: consensus_iou(region_fixed(values), truth[rows]) for name, values in maps.items()}

    parts = list(in_parts(score, len(truth)))
    ious = {name: torch.cat([part[name] for part in parts]).numpy() for name in SIX_MAPS}
    return {name: (success(values).mean(), area_under_success(values).mean()) for name, values in ious.items()}


def bench_figures(rounds: int) -> Iterator[Timing]:
    raw, boxes = random_maps(8 * BATCH)
    truth = torch.stack([box_map([box]) for box in boxes])
    theirs, ours = released_scoring(raw, truth), our_scoring(raw, truth)
    worst = max(abs(a - b) for name in SIX_MAPS for a, b in zip(theirs[name], ours[name], strict=True))
    assert worst < 0.005, f"the two ways of scoring disagree by {worst}: the timing would compare different work"
    scale = 1000 / len(truth)
    times = alternate(lambda: our_scoring(raw, truth), lambda: released_scoring(raw, truth), rounds)
    yield Timing("eval: cIoU and AUC of six maps, per sample", *(scale * t for t in times), "ms")


# ---------------------------------------------------------------- against another revision


def score_with(tree: Path, pairs: int, *more: str) -> dict[str, Any]:
    """What `stored_set` gives in a process of its own, with the code of a tree; more: words of its command line."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            ROOT / "experiments" / "stored_set.py",
            pairs,
            RESAMPLES,
            f"{folder}/out.json",
            *more,
        ]
        environment = os.environ | {"PYTHONPATH": str(tree)}
        done = subprocess.run([*map(str, command)], env=environment, cwd=tree, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"scoring with the code in {tree} failed: {(done.stderr.splitlines() or ['killed'])[-1]}")
        return json.loads(Path(folder, "out.json").read_text())


@contextmanager
def code_of(revision: str) -> Iterator[Path]:
    """A folder with the files of a revision. UserError where this is no git checkout or does not know it."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", revision], capture_output=True)
        if archive.returncode:
            reason = archive.stderr.decode(errors="replace").strip().splitlines()[-1]
            raise UserError(f"--against {revision}: git has no such revision here ({reason})")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def different_figures(ours: Any, theirs: Any) -> int:
    """Of all figures that the other revision gives: how many ours gives otherwise, to the last bit, or not at all."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return sum(different_figures(ours.get(name), value) for name, value in theirs.items())
    if isinstance(theirs, list) and isinstance(ours, list) and len(ours) == len(theirs):
        return sum(map(different_figures, ours, theirs))
    both_undefined = ours != ours and theirs != theirs  # NaN
    return int(ours != theirs and not both_undefined)


def bench_against(tree: Path, revision: str, rounds: int, pairs: int) -> Iterator[Timing]:
    found = [(score_with(ROOT, pairs), score_with(tree, pairs)) for _ in range(rounds)]
    times = (median(scored[side]["cpu_seconds"] for scored in found) for side in (0, 1))
    name = f"eval: every metric and interval, {pairs} samples, six maps, CPU time (baseline: {revision})"
    yield Timing(name, *times, "s")
    ours, theirs = found[0]
    differing = sum(different_figures(ours[part], theirs[part]) for part in ("results", "rows"))
    yield Timing(f"eval: figures and rows that differ from those of {revision}", differing, None, "")
