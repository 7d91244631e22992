"""What the world gets to see of results: tables, files and pictures."""

import csv
import io
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from annotations import GroundTruth, first_ids, read_ids
from dataset import EvaluationPairs, Pair, build_test_set
from maps import MAP_SIZE
from models import load_model
from reports.pictures import contact_sheet, sample_panel
from scoring.evaluate import Evaluation, evaluate
from scoring.summary import ScoredBatch
from transforms import load_image
from utils import UserError, as_user_error, load_checkpoint, provenance, write_json, write_text

Picture = Callable[[str], np.ndarray]
INTERVAL_KEY = "cIoU interval"
COLUMNS = {  # key of a summary: head of its column
    "cIoU": "cIoU",
    INTERVAL_KEY: "(95 %)",
    "AUC": "AUC",
    "cIoU_half": "cIoU_half",
    "AUC_half": "AUC_half",
    "cIoU_adaptive": "cIoU_adaptive",
    "mean_iou": "mean IoU",
    "mAP": "mAP",
    "pointing": "pointing",
    "mIoU": "mIoU",
    "F": "F",
    "IIoU": "IIoU",
    "IAUC": "IAUC",
    "IIoU_half": "IIoU_half",
    "IAUC_half": "IAUC_half",
    "both_pointing": "both_pointing",
    "AP": "AP",
    "max_F1": "max_F1",
    "max_F1_11": "max_F1_11",
    "presence_AP": "presence_AP",
}
SOMETIMES = [*COLUMNS][[*COLUMNS].index("pointing") + 1 :]  # a table of their own, where anything fills them
MAPS = ("AUD", "AUD_wrong", "IMG_QUERY", "IQR", "OBJ_PRIOR", "OGL", "IQR_OGL")
REFERENCES = {"ceiling": "ceiling", "whole_frame": "whole frame", "centred_disc": "centred disc"}
SHEET_SAMPLES = 16
DRAWN_MAPS = ("AUD", "IMG_QUERY", "IQR")
PAPERS_INFERENCE = {"infer_sharpening": 0.1, "infer_smoothing": 0.0}
FIRST_KEYS = (
    "testset", "test_list", "maps", "intervals", "references", "retrieval", "pairs", "settings", "checkpoint",
    "maps_file",
)  # fmt: skip
LAST_KEYS = ("by_size", "by_class")


# ---------------------------------------------------------------- tables and files


def results_table(results: Mapping[str, Any]) -> str:
    """One test set's results as plain text, in %, `-` where undefined.

    results: as `publish` writes them; `testset`, `maps` {map: {metric: fraction}}, AUD with `listening`, and, as far as
    present, `intervals`, `references`, `retrieval`, `by_size`, `pairs`, `checkpoint` and `settings`. Rules are never
    mixed: columns without suffix follow `fixed`, *_half `half`, *_adaptive `adaptive`, which knows the true area.
    """
    maps, references, intervals = (results.get(key, {}) for key in ("maps", "references", "intervals"))
    names = [name for name in MAPS if name in maps] + [name for name in maps if name not in MAPS]
    rows = {name: maps[name] | {INTERVAL_KEY: intervals.get(name, {}).get("cIoU")} for name in names}
    bars = {title: references[name] for name, title in REFERENCES.items() if name in references}
    always = [key for key in COLUMNS if key not in SOMETIMES and (intervals or key != INTERVAL_KEY)]
    defined = {key for scores in [*rows.values(), *bars.values()] for key, value in scores.items() if _defined(value)}
    sometimes = [key for key in SOMETIMES if key in defined]
    lines = [f"{results.get('testset', '?')}, in %", "", *_block(rows, bars, always)]
    for name, scores in rows.items():
        if "listening" in scores:
            span = f" ({_cell(intervals[name]['listening'])})" if intervals else ""
            meaning = f"cIoU({name}) - cIoU({name}_wrong); near 0 the map is saliency"
            lines.append(f"listening of {name}: {_cell(scores['listening'], sign=True)}{span} = {meaning}")
    lines += ["", *_block(rows, bars, sometimes)] if sometimes else []
    lines += ["", *_by_size(results.get("by_size", {}), names), *_retrieval(results.get("retrieval", {}))]
    return "\n".join([*lines, *_provenance(results)]) + "\n"


def _block(rows: Mapping[str, Mapping], bars: Mapping[str, Mapping], columns: Sequence[str]) -> list[str]:
    """A table of some columns: the maps above, the references below."""
    width = max([len("reference"), *map(len, rows), *map(len, bars)])
    head = _line("map", [COLUMNS[key] for key in columns], columns, width)
    lines = [head, "-" * len(head)]
    for part in (rows, bars):
        lines += [
            _line(name, [_cell(scores.get(key)) for key in columns], columns, width) for name, scores in part.items()
        ]
        lines += ["-" * len(head)] if part is rows and bars else []
    return lines


def _by_size(sizes: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    shown = [name for name in ("AUD", "IQR") if name in names] or names[:2]
    return [
        f"size {size:19} {group['samples']:6} samples  "
        + "  ".join(f"{name} cIoU {_cell(group['maps'][name].get('cIoU')):>5}" for name in shown)
        for size, group in sizes.items()
    ]


def _defined(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _cell(value: Any, sign: bool = False) -> str:
    """A fraction, or a pair of them, in percent."""
    if isinstance(value, list | tuple):
        return f"{_cell(value[0])} to {_cell(value[1])}"
    return f"{100 * value:{'+' if sign else ''}.1f}" if _defined(value) else "-"


def _line(name: str, cells: Sequence[str], columns: Sequence[str], width: int) -> str:
    return "  ".join([name.ljust(width), *(c.rjust(_width(key)) for c, key in zip(cells, columns, strict=True))])


def _width(key: str) -> int:
    return len("100.0 to 100.0") if key == INTERVAL_KEY else max(6, len(COLUMNS[key]))


def _retrieval(retrieval: Mapping[str, Any]) -> list[str]:
    lines = []
    for by, directions in retrieval.items():
        for direction, recalls in (directions or {}).items():
            cells = "  ".join(f"{k} {_cell(value):>5}" for k, value in recalls.items())
            lines.append(f"retrieval {by.replace('_', ' '):8}  {direction.replace('_', ' '):14}  {cells}")
    return lines


def _provenance(results: Mapping[str, Any]) -> list[str]:
    """Which pairs, which maps to distrust, which checkpoint, which settings: one line each, as far as known."""
    maps, lines = results.get("maps", {}), []
    if pairs := results.get("pairs"):
        left_out, because = len(pairs.get("left_out") or ()), pairs.get("left_out_because")
        because = f" ({because}; all in left_out.txt)" if because else ""
        lines.append(
            f"pairs: {pairs['scored']:,} of {pairs['expected']:,} pairs scored, {left_out:,} left out{because}"
        )
        if unknown := pairs.get("unknown_ids_in_file"):
            lines.append(f"ids: {len(unknown)} of the file are not of this set and were passed over")
    if empty := max((scores.get("empty", 0) for scores in maps.values()), default=0):
        sounding = ", ".join(f"{name} {_cell(scores.get('cIoU_sounding'))}" for name, scores in maps.items())
        lines.append(
            f"empty: {empty} pairs have an empty ground truth, a miss in cIoU; without them cIoU is {sounding}"
        )
    for rule in ("half", "adaptive"):
        if tied := {name: scores[f"tied_{rule}"] for name, scores in maps.items() if scores.get(f"tied_{rule}")}:
            counts = ", ".join(f"{name} {count}" for name, count in tied.items())
            lines.append(
                f"ties: more than 1 % of the pixels tie at the cut of rule {rule} in {counts} maps: no fair figures"
            )
    if results.get("wrong_sounds_of_same_class", 0) is None:
        lines.append("AUD_wrong: classes are not known, so some of the other sounds may be of the right class")
    if shared := results.get("wrong_sounds_of_same_class"):
        lines.append(f"AUD_wrong: {shared} of the wrong sounds are of the right class, for lack of others")
    if checkpoint := results.get("checkpoint"):
        overlap = results.get("training_test_overlap")
        known = "unknown, no train_ids.txt beside the checkpoint" if overlap is None else f"{overlap:,}"
        lines.append(f"pairs that were trained on: {known}")
    if checkpoint:
        epoch, selected_by = checkpoint.get("epoch", "?"), checkpoint.get("selected_by", "?")
        lines.append(f"checkpoint: {checkpoint.get('path', '?')}, epoch {epoch}, selected by {selected_by}")
    if test_list := results.get("test_list"):
        lines.append(f"list: {test_list}, in the place of the set's own")
    if maps_file := results.get("maps_file"):
        lines.append(f"maps: {maps_file}")
    if settings := results.get("settings"):
        settings = {key: value for key, value in settings.items() if key != "rules" and value is not None}
        lines.append("settings: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
    return lines


def publish(evaluation: Evaluation, folder: Path, **about: Any) -> None:
    """Add to a set's figures where they come from, write results.json and per_sample.csv, print the table.

    about: `testset`, and what is known of `checkpoint` and `training_test_overlap`.
    """
    results = evaluation.results
    results.update(about, provenance=provenance())
    keys = [key for key in FIRST_KEYS if key in results]
    keys += [key for key in results if key not in FIRST_KEYS + LAST_KEYS] + [key for key in LAST_KEYS if key in results]
    text = io.StringIO()
    writer = csv.DictWriter(text, evaluation.rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(evaluation.rows)
    write_text(folder / "per_sample.csv", text.getvalue())
    write_json(folder / "results.json", {key: results[key] for key in keys})
    left_out = results["pairs"]["left_out"]
    if left_out:
        write_text(folder / "left_out.txt", "".join(f"{name}\n" for name in left_out))
    else:
        (folder / "left_out.txt").unlink(missing_ok=True)
    print(results_table(results))
    print(f"written: {folder / 'results.json'}, {folder / 'per_sample.csv'}\n")


def describe_checkpoint(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Where the weights come from, how they were chosen and trained, as far as the checkpoint's content says."""
    chosen = "last epoch trained" if path.name == "latest.pth" else state.get("selected_by", "unknown")
    training = trained_with(state)
    return {
        "path": str(path),
        "epoch": state.get("epoch", "unknown"),
        "selected_by": chosen,
        "trained_on": training.get("trainset", "unknown"),
        "training": training,
    }


def trained_with(state: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of the training run, where a checkpoint carries them; released ones do not."""
    args = state.get("args")
    return args if isinstance(args, dict) else {}


def own_inference(state: Mapping[str, Any]) -> dict[str, float]:
    """The sharpening and smoothing of maps that a model was trained to be asked with, else the paper's."""
    flags = trained_with(state)
    return {name: flags[name] if flags.get(name) is not None else paper for name, paper in PAPERS_INFERENCE.items()}


def training_overlap(path: Path, ids: Sequence[str]) -> int | None:
    """How many test ids the model was trained on; None where the list of training ids is not beside the checkpoint."""
    beside = path.with_name("train_ids.txt")
    return len(set(read_ids(beside)) & set(ids)) if beside.is_file() else None


# ---------------------------------------------------------------- pictures


class Drawer:
    """Draws while a set is scored: a contact sheet of some samples spread over it, an overlay of each if wanted.

    picture_of: id -> (224, 224, 3) uint8. Nothing stands in its place before `finish`: a run that breaks off leaves no
    half set of pictures.
    """

    def __init__(
        self, sheet: Path, ground_truth: GroundTruth, count: int, picture_of: Picture, overlays: Path | None = None
    ):
        self.sheet, self.truth, self.picture_of, self.overlays = sheet, ground_truth, picture_of, overlays
        self.seen, self.panels = 0, []
        self.drafts = tempfile.TemporaryDirectory()
        self.on_sheet = {round(i * (count - 1) / (SHEET_SAMPLES - 1)) for i in range(SHEET_SAMPLES)}

    def __call__(self, batch: ScoredBatch) -> None:
        drawn = [name for name in DRAWN_MAPS if name in batch.maps] or list(batch.maps)[:3]
        for i, name in enumerate(batch.ids):
            if self.overlays or self.seen in self.on_sheet:
                maps = {m: batch.maps[m][i].cpu().numpy() for m in drawn}
                title = f"{name}   {self.truth.class_of.get(name, '')}".strip()
                panel = sample_panel(self.picture_of(name), batch.truth[i].numpy(), maps, title)
                if self.overlays:
                    contact_sheet([panel], Path(self.drafts.name) / f"{name}.png")
                if self.seen in self.on_sheet:
                    self.panels.append(panel)
            self.seen += 1

    def finish(self) -> Path:
        header = f"{self.truth.name}: {len(self.panels)} of {self.seen} samples, outline = ground truth"
        contact_sheet(self.panels, self.sheet, header)
        if self.overlays:
            shutil.rmtree(self.overlays, ignore_errors=True)
            shutil.copytree(self.drafts.name, self.overlays)
        self.drafts.cleanup()
        return self.sheet


def pictures_of(pairs: Sequence[Pair]) -> Picture:
    """id -> the pair's picture as a model sees it, squeezed to (224, 224, 3) uint8."""
    files = {pair.id: pair.image for pair in pairs}

    def picture(name: str) -> np.ndarray:
        with as_user_error(ValueError):
            return np.asarray(load_image(files[name]).resize((MAP_SIZE, MAP_SIZE)))

    return picture


def side_by_side(checkpoints: Mapping[str, Path], dataset: EvaluationPairs, ids: Sequence[str], path: Path) -> None:
    """Several models on the same samples: a row for each id with picture, ground truth and every model's AUD map.

    checkpoints: {name under its maps: file}, each asked with the inference settings that it was trained with;
    dataset: with pictures and sounds of the models' size; ids: two or more of its ids, in the order of the rows.
    Writes a PNG, whole or not at all. UserError for ids that the set does not hold or are fewer than two, a checkpoint
    that cannot be read, and a model that takes pictures or sounds of another size.
    """
    known = {pair.id for pair in dataset.pairs}
    if unknown := [name for name in ids if name not in known]:
        raise UserError(f"{len(unknown)} ids are not of {dataset.ground_truth.name}: {first_ids(unknown)}")
    if len({*ids}) < 2:
        raise UserError(f"{len({*ids})} id of {dataset.ground_truth.name} to be drawn: name two or more")
    drawn = dataset.without(dict.fromkeys(known.difference(ids), "not drawn"))
    maps: dict[str, dict[str, np.ndarray]] = {name: {} for name in ids}
    for label, file in checkpoints.items():
        model = load_model(file).to(memory_format=torch.channels_last)  # rounds as in training
        size = {key: model.shape[key] for key in ("image_size", "audio_seconds")}
        if different := [key for key, value in size.items() if value != getattr(dataset, key)]:
            listed = ", ".join(f"{key} {size[key]} and not {getattr(dataset, key)}" for key in different)
            raise UserError(f"{file} cannot stand beside the others: its model takes {listed}")

        def keep(batch: ScoredBatch, label: str = label) -> None:
            for i, name in enumerate(batch.ids):
                maps[name][label] = batch.maps["AUD"][i].numpy()

        evaluate(model, drawn, torch.device("cpu"), **own_inference(load_checkpoint(file)), on_batch=[keep])
    truth, picture_of = dataset.ground_truth, pictures_of(drawn.pairs)
    titles = {name: f"{name}   heard: {truth.class_of.get(name) or 'unknown'}" for name in ids}
    panels = [sample_panel(picture_of(name), truth.truth_of(name).numpy(), maps[name], titles[name]) for name in ids]
    contact_sheet(panels, path, "where each model hears the sound; outline = ground truth")


def side_by_side_on_synthetic(checkpoints: Mapping[str, Path], root: Path, path: Path, pictures: int = 3) -> None:
    """`side_by_side` on the first pictures of the built-in interactive split, with the sounds of both objects each."""
    shape = load_model(next(iter(checkpoints.values()))).shape
    size = shape["image_size"], shape["audio_seconds"]
    dataset = build_test_set("synthetic_interactive", str(root), None, "metadata", *size)
    side_by_side(checkpoints, dataset, [pair.id for pair in dataset.pairs[: 2 * pictures]], path)
