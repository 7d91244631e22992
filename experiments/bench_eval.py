"""Scoring stored maps: our code against the released code's, and every metric of a whole set."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from annotations import GroundTruth, box_map
from experiments.released import ALPHA, BATCH, SIX_MAPS, released_scoring
from experiments.timing import Timing, add_rounds, alternate
from maps import enlarge
from scoring.bootstrap import RESAMPLES
from scoring.evaluate import evaluate_stored
from scoring.maps_file import StoredMaps
from scoring.metrics import area_under_success, consensus_iou, region_fixed, success
from scoring.summary import in_parts
from utils import number

VGGSS_PAIRS = 5158


def add_flags(parser) -> None:
    add_rounds(parser)
    parser.add_argument(
        "--pairs", type=number(int, low=2), default=VGGSS_PAIRS, help="number of samples whose stored maps are scored"
    )


def run(args) -> Iterator[Timing]:
    return bench_eval(args.rounds, args.pairs)


def random_maps(count: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Maps (count, 7, 7) of the three sources, and boxes as truth (count, 224, 224)."""
    rng = np.random.default_rng(seed)
    raw = {name: torch.from_numpy(rng.random((count, 7, 7), dtype=np.float32)) for name in SIX_MAPS[:3]}
    corners = rng.random((count, 2, 2)) / 2
    truth = torch.stack([box_map([[*low, *(low + 0.2 + size / 2)]]) for low, size in corners])
    return raw, truth


def our_scoring(raw: dict[str, torch.Tensor], truth: torch.Tensor) -> dict[str, tuple[float, float]]:
    """The same figures by the code that every evaluation here uses."""

    def score(rows: slice) -> dict[str, torch.Tensor]:
        maps = enlarge({name: values[rows] for name, values in raw.items()}, "bicubic", ALPHA)
        return {name: consensus_iou(region_fixed(values), truth[rows]) for name, values in maps.items()}

    parts = list(in_parts(score, len(truth)))
    ious = {name: torch.cat([part[name] for part in parts]).numpy() for name in SIX_MAPS}
    return {name: (success(values).mean(), area_under_success(values).mean()) for name, values in ious.items()}


def score_stored_set(pairs: int) -> tuple[float, int]:
    """Seconds for stored maps of `pairs` samples, six kinds, with every metric there is, intervals, and maps scored."""
    raw, truth = random_maps(pairs)
    ids = [f"clip_{i}" for i in range(pairs)]
    rows = dict(zip(ids, truth, strict=True))
    classes = {name: f"class {i % 220}" for i, name in enumerate(ids)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "maps.npz"
        np.savez(
            path,
            id=ids,
            alpha=ALPHA,
            confidence=np.linspace(0, 1, pairs),
            **{name: maps.numpy() for name, maps in raw.items()},
        )
        silent = frozenset(ids[::2])
        wanted = GroundTruth("benchmark", ids, rows.__getitem__, pairs, classes, silent=silent, masks=True)
        start = time.perf_counter()
        scored = evaluate_stored(StoredMaps(path), wanted, BATCH, resamples=RESAMPLES)
        return time.perf_counter() - start, pairs * len(scored.results["maps"])


def bench_eval(rounds: int, pairs: int) -> Iterator[Timing]:
    raw, truth = random_maps(8 * BATCH)
    theirs, ours = released_scoring(raw, truth), our_scoring(raw, truth)
    worst = max(abs(a - b) for name in SIX_MAPS for a, b in zip(theirs[name], ours[name], strict=True))
    assert worst < 0.005, f"the two ways of scoring disagree by {worst}: the timing would compare different work"
    scale = 1000 / len(truth)
    times = alternate(lambda: our_scoring(raw, truth), lambda: released_scoring(raw, truth), rounds)
    yield Timing("eval: cIoU and AUC of six maps, per sample", *(scale * t for t in times), "ms")
    spent, maps = score_stored_set(pairs)
    yield Timing(f"eval: every metric and interval, {pairs} samples, six maps", spent, None, "s")
    yield Timing("eval: every metric, per map", 1000 * spent / maps, None, "ms")
