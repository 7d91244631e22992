"""Speed against the way the released code works, as ratios within one run.

    python benchmark.py eval

The baselines below stay as the released code does the work; each is timed in alternation with ours, and medians are
compared. After the table comes one JSON object per figure: name, value, baseline, ratio (baseline / value), unit.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from annotations import GroundTruth, box_map
from evaluation import enlarge, evaluate_stored, in_parts
from metrics import area_under_curve, consensus_iou, region_fixed, success_rate
from scores import RESAMPLES
from stored_maps import StoredMaps
from utils import ArgumentParser, number, provenance, run_cli, strict_json

ALPHA = 0.6
SIX_MAPS = ("AUD", "IMG_QUERY", "OBJ_PRIOR", "IQR", "OGL", "IQR_OGL")
VGGSS_PAIRS = 5158
BATCH = 64


class Timing(NamedTuple):
    name: str
    value: float
    baseline: float | None
    unit: str

    def line(self) -> dict:
        ratio = None if self.baseline is None else self.baseline / self.value
        return {"name": self.name, "value": self.value, "baseline": self.baseline, "ratio": ratio, "unit": self.unit}


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alternate(ours: Callable[[], object], baseline: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds of both, timed in turns after one untimed call of each."""
    ours(), baseline()
    pairs = [(seconds(ours), seconds(baseline)) for _ in tqdm(range(rounds), "timing", leave=False, disable=None)]
    return median(pair[0] for pair in pairs), median(pair[1] for pair in pairs)


# ---------------------------------------------------------------- eval


def random_maps(count: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Maps (count, 7, 7) of the three sources, and boxes as truth (count, 224, 224)."""
    rng = np.random.default_rng(seed)
    raw = {name: torch.from_numpy(rng.random((count, 7, 7), dtype=np.float32)) for name in SIX_MAPS[:3]}
    corners = rng.random((count, 2, 2)) / 2
    truth = torch.stack([box_map([[*low, *(low + 0.2 + size / 2)]]) for low, size in corners])
    return raw, truth


def released_scoring(raw: dict[str, torch.Tensor], truth: torch.Tensor) -> dict[str, tuple[float, float]]:
    """cIoU and AUC of the six maps, sample by sample in NumPy: (cIoU, AUC) by map."""

    def rescale(values: np.ndarray) -> np.ndarray:
        return (values - values.min()) / (values.max() - values.min())

    ious = {name: [] for name in SIX_MAPS}
    for start in range(0, len(truth), BATCH):
        large = {
            name: F.interpolate(maps[start : start + BATCH, None], (224, 224), mode="bicubic", align_corners=False)
            for name, maps in raw.items()
        }
        large = {name: maps.numpy() for name, maps in large.items()}
        for i in range(len(large["AUD"])):
            audio, image, prior = (rescale(large[name][i, 0]) for name in SIX_MAPS[:3])
            maps = {
                "AUD": audio,
                "IMG_QUERY": image,
                "OBJ_PRIOR": prior,
                "IQR": rescale(audio * ALPHA + image * (1 - ALPHA)),
                "OGL": rescale(audio * ALPHA + prior * (1 - ALPHA)),
                "IQR_OGL": rescale(audio * ALPHA + image * (1 - ALPHA) / 2 + prior * (1 - ALPHA) / 2),
            }
            ground_truth = truth[start + i].numpy()
            for name, heat in maps.items():
                region = np.zeros((224, 224))
                region[heat >= 0.6] = 1
                inside = np.sum(region * ground_truth)
                ious[name].append(inside / (np.sum(ground_truth) + np.sum(region * (ground_truth == 0))))
    scores = {}
    for name, values in ious.items():
        curve = [np.sum(np.array(values) >= 0.05 * step) / len(values) for step in range(21)]
        scores[name] = (np.mean(np.array(values) >= 0.5), sum(curve[1:-1]) * 0.05 + (curve[0] + curve[-1]) * 0.025)
    return scores


def our_scoring(raw: dict[str, torch.Tensor], truth: torch.Tensor) -> dict[str, tuple[float, float]]:
    """The same by what every evaluation here runs through."""

    def score(rows: slice) -> dict[str, torch.Tensor]:
        maps = enlarge({name: values[rows] for name, values in raw.items()}, "bicubic", ALPHA)
        return {name: consensus_iou(region_fixed(values), truth[rows]) for name, values in maps.items()}

    parts = list(in_parts(score, len(truth)))
    ious = {name: torch.cat([part[name] for part in parts]) for name in SIX_MAPS}
    return {name: (success_rate(values), area_under_curve(values)) for name, values in ious.items()}


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


# ---------------------------------------------------------------- the command line


def main() -> None:
    parser = ArgumentParser(description="Time our way against the released code's.")
    parser.add_argument("what", choices=("eval",), help="what is timed")
    parser.add_argument("--rounds", type=number(int, low=1), default=5, help="alternating pairs of timings")
    parser.add_argument("--pairs", type=number(int, low=2), default=VGGSS_PAIRS, help="samples of the stored set")
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in provenance().items()) + f", {torch.get_num_threads()} threads")
    benches = {"eval": lambda: bench_eval(args.rounds, args.pairs)}
    lines = [timing.line() for timing in benches[args.what]()]
    print(f"\n{'':62} {'ours':>10} {'released':>10} {'ratio':>7}")
    for line in lines:
        baseline, ratio = (f"{line[key]:.3g}" if line[key] is not None else "-" for key in ("baseline", "ratio"))
        print(f"{line['name']:62} {line['value']:>7.3g} {line['unit']:2} {baseline:>10} {ratio:>7}")
    print()
    for line in lines:
        print(strict_json(line))


if __name__ == "__main__":
    run_cli(main)
