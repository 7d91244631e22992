"""Results as text: one table per test set, maps above, references below, and where the numbers come from."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from audio_io import load_resampler
from utils import strict_json, write_text
from visualize import plot_curves

COLUMNS = {  # key of a summary: head of its column
    "cIoU": "cIoU",
    "AUC": "AUC",
    "cIoU_half": "cIoU_half",
    "AUC_half": "AUC_half",
    "mean_iou": "mean IoU",
    "mAP": "mAP",
    "pointing": "pointing",
    "IIoU": "IIoU",
    "IAUC": "IAUC",
    "IIoU_half": "IIoU_half",
    "IAUC_half": "IAUC_half",
    "both_pointing": "both_pointing",
}
ALWAYS = 7  # columns that stand even where nothing fills them; the interactive ones need a value
MAPS = ("AUD", "AUD_wrong", "IMG_QUERY", "IQR", "OBJ_PRIOR", "OGL", "IQR_OGL")
REFERENCES = {"ceiling": "ceiling", "whole_frame": "whole frame", "centred_disc": "centred disc"}


def results_table(results: Mapping[str, Any]) -> str:
    """One test set's results as plain text, in %, `-` where undefined.

    results: `testset`; `maps` {map: {metric: fraction}}, AUD with `listening`; and, as far as present, `references`,
    `retrieval` {"by_class" | "by_pair": {direction: {"R@1": fraction}}}, `pairs` (scored, expected, left_out),
    `checkpoint` (path, epoch, selected_by) and `settings`. Rules are never mixed: columns without suffix follow
    `fixed`, *_half `half`.
    """
    maps, references = results.get("maps", {}), results.get("references", {})
    names = [name for name in MAPS if name in maps] + [name for name in maps if name not in MAPS]
    rows = [(name, maps[name]) for name in names]
    bars = [(title, references[name]) for name, title in REFERENCES.items() if name in references]
    columns = [
        key
        for index, key in enumerate(COLUMNS)
        if index < ALWAYS or any(_defined(scores.get(key)) for _, scores in rows + bars)
    ]
    width = max([len("reference"), *(len(name) for name, _ in rows + bars)])
    head = _line("map", [COLUMNS[key] for key in columns], columns, width)
    lines = [f"{results.get('testset', '?')}, in %", "", head, "-" * len(head)]
    for name, scores in rows:
        lines.append(_line(name, [_percent(scores.get(key)) for key in columns], columns, width))
        if name == "AUD" and "listening" in scores:
            listening = _percent(scores["listening"], sign=True)
            lines.append(f"  listening {listening} = cIoU(AUD) - cIoU(AUD_wrong); near 0 the map is saliency")
    if bars:
        lines.append("-" * len(head))
        lines += [_line(name, [_percent(scores.get(key)) for key in columns], columns, width) for name, scores in bars]
    return "\n".join([*lines, "", *_retrieval(results.get("retrieval", {})), *_provenance(results)]) + "\n"


def _defined(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _percent(value: Any, sign: bool = False) -> str:
    return f"{100 * value:{'+' if sign else ''}.1f}" if _defined(value) else "-"


def _line(name: str, cells: Sequence[str], columns: Sequence[str], width: int) -> str:
    return "  ".join(
        [name.ljust(width), *(c.rjust(max(6, len(COLUMNS[key]))) for c, key in zip(cells, columns, strict=True))]
    )


def _retrieval(retrieval: Mapping[str, Any]) -> list[str]:
    lines = []
    for by, directions in retrieval.items():
        for direction, recalls in (directions or {}).items():
            cells = "  ".join(f"{k} {_percent(value):>5}" for k, value in recalls.items())
            lines.append(f"retrieval {by.replace('_', ' '):8}  {direction.replace('_', ' '):14}  {cells}")
    return lines


def _provenance(results: Mapping[str, Any]) -> list[str]:
    """Which pairs, which maps to distrust, which checkpoint, which settings: one line each, as far as known."""
    maps, lines = results.get("maps", {}), []
    if pairs := results.get("pairs"):
        left_out = pairs.get("left_out") or 0
        left_out = left_out if isinstance(left_out, int) else len(left_out)
        lines.append(f"pairs: {pairs.get('scored', '?')} scored of {pairs.get('expected', '?')}, {left_out} left out")
    if empty := max((scores.get("empty", 0) for scores in maps.values()), default=0):
        lines.append(f"empty: {empty} pairs have an empty ground truth, a miss in cIoU")
    if tied := {name: scores["tied_half"] for name, scores in maps.items() if scores.get("tied_half")}:
        counts = ", ".join(f"{name} {count}" for name, count in tied.items())
        lines.append(f"ties: more than 1 % of the pixels tie at the cut of rule half in {counts} maps")
    if shared := results.get("wrong_sounds_of_same_class"):
        lines.append(f"AUD_wrong: {shared} of the wrong sounds are of the right class, for lack of others")
    if overlap := results.get("training_test_overlap"):
        lines.append(f"overlap: {overlap} of these pairs were trained on")
    if checkpoint := results.get("checkpoint"):
        epoch, selected_by = checkpoint.get("epoch", "?"), checkpoint.get("selected_by", "?")
        lines.append(f"checkpoint: {checkpoint.get('path', '?')}, epoch {epoch}, selected by {selected_by}")
    if settings := results.get("settings"):
        settings = {key: value for key, value in settings.items() if key != "rules"}
        lines.append("settings: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
    return lines


class RunLog:
    """What a training run tells the world: log.jsonl, curves.png, sheets of heat maps, and Weights & Biases if wanted.

    wandb: "true" (offline, with a line that says so, where nobody is logged in), "offline" or "false".
    A resumed run drops the lines of epochs that it trains again.
    """

    def __init__(self, folder: Path, wandb: str, name: str, config: Mapping[str, Any], start_epoch: int) -> None:
        self.folder, self.lines, self.sheets = folder, [], {}
        path = folder / "log.jsonl"
        if start_epoch and path.is_file():
            old = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            self.lines = [line for line in old if line["epoch"] <= start_epoch]
        self.wandb = None if wandb == "false" else _start_wandb(folder, wandb, name, config)

    def write(self, line: dict[str, Any]) -> None:
        """One epoch's numbers."""
        self.lines.append(line)
        write_text(self.folder / "log.jsonl", "".join(strict_json(entry) + "\n" for entry in self.lines))
        plot_curves(self.lines, self.folder / "curves.png")
        if self.wandb:
            self.wandb.log(line | self._pictures(), step=line["epoch"])
        self.sheets = {}

    def add_sheet(self, name: str, path: Path) -> None:
        """Heat maps of fixed samples of a test set, drawn in this epoch."""
        self.sheets[name] = path

    def finish(self, scores: dict[str, float]) -> None:
        """The chosen checkpoint's scores, and the pictures drawn with it."""
        if self.wandb:
            self.wandb.log(self._pictures())
            self.wandb.summary.update(scores)
            self.wandb.finish()

    def _pictures(self) -> dict[str, Any]:
        import wandb

        return {f"{name}/maps": wandb.Image(str(path)) for name, path in self.sheets.items()}


def _start_wandb(folder: Path, mode: str, name: str, config: Mapping[str, Any]):
    load_resampler()  # wandb watches imports, and that breaks in the loader processes
    import wandb

    if mode == "true" and not wandb.api.api_key and os.environ.get("WANDB_MODE") is None:
        print("wandb: nobody is logged in, so the run is recorded offline (wandb login, then wandb sync sends it)")
        mode = "offline"
    run = wandb.init(
        project="joint-slot-attention",
        name=name,
        dir=str(folder),
        config=dict(config),
        mode="offline" if mode == "offline" else None,
        settings=wandb.Settings(silent=True),
    )
    return run
