"""Everything about this code that only a GPU can say, in one command of under ten minutes.

    python -m experiments.benchmark gpu
    python -m experiments.benchmark gpu --device cpu --quick      # the same path, small, without a GPU

Writes OUT.json and OUT.txt, one page that can be sent to whoever asks. A part that fails is a row that says so, and the
next one follows. `benchmark plan --measured OUT.json` takes the speed of the step from it.
"""

import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from experiments.gpu_parts import PARTS, QUICK_SPLITS, SPLITS, Row, Setting
from experiments.timing import Timing
from synthetic.generate import generate
from utils import UserError, add_boolean, provenance, strict_json, write_text

LIMIT = 9.5 * 60  # seconds; a part that would begin later is left out, and says so
FAILED, LEFT_OUT = "FAILED", "LEFT OUT"  # what a row says of such a part
MESSAGE = 160  # characters of an error


def add_flags(parser) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only with --quick")
    add_boolean(parser, "--quick", "the same parts, small: whether they work, no figures to keep")
    parser.add_argument("--out", type=Path, default=Path("gpu_report"), help="what is written, without .json and .txt")


def run(args) -> Iterator[Timing]:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "benchmark gpu needs a CUDA GPU, and PyTorch finds none here; --device cpu --quick tries its parts without"
        )
    if args.device == "cpu" and not args.quick:
        raise UserError("benchmark gpu --device cpu needs --quick: the parts in full are made for a GPU")
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    json_file, text_file = (args.out.with_name(f"{args.out.name}.{suffix}") for suffix in ("json", "txt"))
    for report in reports(device, args.quick):  # after each part: what ends the program leaves those before it
        write_text(json_file, strict_json(report, indent=1) + "\n")
        write_text(text_file, page_of(report))
    print(f"{page_of(report)}\nwritten: {json_file} and {text_file}")
    yield from ()


def reports(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """After every part the report up to then, {about, rows, steps, failed}.

    rows: with part, what, value, unit; steps: figures of the timed ones; failed: names of parts.
    """
    start, rows, steps, failed = time.monotonic(), [], [], []
    torch.backends.cudnn.benchmark = True  # as in training
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        setting = Setting(device, quick, Path(folder), start + LIMIT)
        generate(setting.data, counts=QUICK_SPLITS if quick else SPLITS)
        for part in PARTS:
            print(f"{part} ...", flush=True)
            for row in rows_of(part, setting):
                rows.append({"part": part, "what": row.what, "value": row.value, "unit": row.unit})
                steps += [dict(row.step)] if row.step else []
                if row.what in (FAILED, LEFT_OUT):
                    failed.append(part)
            known = about(device, quick, time.monotonic() - start)
            yield {"about": known, "rows": rows, "steps": steps, "failed": failed}


def rows_of(part: str, setting: Setting) -> Iterator[Row]:
    """The rows of a part; where it fails, those up to then and one that says why."""
    if time.monotonic() > setting.ends:
        yield Row(LEFT_OUT, "the time was up")
        return
    start = time.monotonic()
    try:
        yield from PARTS[part](setting)
    except Exception as error:  # whatever it is: the report says it, and the other parts follow
        said = " ".join(str(error).split())
        yield Row(FAILED, f"{type(error).__name__}: {said}"[:MESSAGE])
    yield Row("this part took", time.monotonic() - start, "s")


def about(device: torch.device, quick: bool, seconds: float) -> dict[str, Any]:
    known = provenance() | {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if device.type == "cuda":
        shape = torch.cuda.get_device_properties(device)
        known |= {
            "GPU": shape.name,
            "GPUs": torch.cuda.device_count(),
            "GPU memory, GiB": round(shape.total_memory / 2**30, 1),
            "compute capability": f"{shape.major}.{shape.minor}",
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
        }
    return known | {"quick": quick, "seconds": round(seconds)}


def page_of(report: dict[str, Any]) -> str:
    """The report as a page of text."""
    lines = [f"{name}: {value}" for name, value in report["about"].items()]
    failed = ", ".join(report["failed"]) or "none"
    for part in dict.fromkeys(row["part"] for row in report["rows"]):
        rows = [[row["what"], shown(row["value"]), row["unit"]] for row in report["rows"] if row["part"] == part]
        lines += ["", part, "-" * len(part), tabulate(rows, tablefmt="plain", disable_numparse=True)]
    return "\n".join([*lines, "", f"parts that failed or were left out: {failed}", ""])


def shown(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
