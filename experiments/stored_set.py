"""Score a stored set of random maps with the code that Python finds first: what experiments.bench_eval times.

    python experiments/stored_set.py PAIRS RESAMPLES OUT.json [negatives]

A file of its own, so that it also runs on the code of another revision (`bench_eval`, --against): it asks only for what
has been there since revision 903abd7.
"""

import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from annotations import GroundTruth, box_map
from scoring.evaluate import evaluate_stored
from scoring.maps_file import StoredMaps
from utils import peak_memory_gib

NEGATIVES = ("silence", "noise", "offscreen")  # of a name that older code does not have
ALPHA, BATCH, CLASSES = 0.6, 64, 220  # as many classes as VGG-SS has
SOURCES = ("AUD", "IMG_QUERY", "OBJ_PRIOR")  # from which IQR, OGL and IQR_OGL are formed


def random_maps(count: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    """Maps (count, 7, 7) of the three sources, and as many boxes in 0..1: their truth, drawn, is 0.2 MB a sample."""
    rng = np.random.default_rng(seed)
    raw = {name: torch.from_numpy(rng.random((count, 7, 7), dtype=np.float32)) for name in SOURCES}
    corners = rng.random((count, 2, 2)) / 2
    return raw, [[*low, *(low + 0.2 + size / 2)] for low, size in corners]


def score_stored_set(pairs: int, resamples: int, negatives: bool = False) -> dict:
    """Stored maps of `pairs` samples, six kinds, scored with every metric there is and with intervals.

    negatives: AUD was also asked with silence, noise and off-screen audio, one seed. -> seconds on the clock, seconds
    of CPU, memory_gib (the most that this process held), maps (how many were scored), and results and rows as they are
    written.
    """
    raw, boxes = random_maps(pairs)
    asked = random_maps(pairs, seed=1)[0] if negatives else {}
    more = {f"AUD_{kind}": maps.numpy() ** 3 for kind, maps in zip(NEGATIVES, asked.values())}
    more |= {"AUD_threshold": 0.5} if negatives else {}
    ids = [f"clip_{i}" for i in range(pairs)]
    box_of = dict(zip(ids, boxes, strict=True))

    def truth_of(name: str) -> torch.Tensor:
        return box_map([box_of[name]])

    classes = {name: f"class {i % CLASSES}" for i, name in enumerate(ids)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "maps.npz"
        scalars = {"alpha": ALPHA, "confidence": np.linspace(0, 1, pairs)}
        np.savez(path, id=ids, **scalars, **{name: maps.numpy() for name, maps in raw.items()}, **more)
        silent = frozenset(ids[::2])
        wanted = GroundTruth("benchmark", ids, truth_of, pairs, classes, silent=silent, masks=True)
        clock, cpu = time.perf_counter(), time.process_time()
        scored = evaluate_stored(StoredMaps(path), wanted, BATCH, resamples=resamples)
        spent = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}
    scored.results.pop("maps_file")
    spent["memory_gib"] = peak_memory_gib(torch.device("cpu"))
    return {**spent, "maps": pairs * len(scored.results["maps"]), "results": scored.results, "rows": scored.rows}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    Path(sys.argv[3]).write_text(
        json.dumps(score_stored_set(int(sys.argv[1]), int(sys.argv[2]), "negatives" in sys.argv))
    )
