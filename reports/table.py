"""Results as text: the printed table, results.json and per_sample.csv."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import SEPARATING_LINE, tabulate

from annotations import GroundTruth, read_ids
from reports.harder import harder_lines, percent
from scoring.evaluate import Evaluation
from scoring.threshold import describe_threshold
from sets import trained_on
from utils import json_text, provenance, write_text, write_together

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
SOMETIMES = [*COLUMNS][[*COLUMNS].index("pointing") + 1 :]  # in a table of their own, where any is defined
MAPS = ("AUD", "AUD_wrong", "AUD_alone", "AUD_share", "IMG_QUERY", "IQR", "OBJ_PRIOR", "OGL", "IQR_OGL")
REFERENCES = {"ceiling": "ceiling", "whole_frame": "whole frame", "centred_disc": "centred disc"}
FIRST_KEYS = (
    "testset", "test_list", "maps", "intervals", "references", "negatives", "snr", "parts", "retrieval", "pairs",
    "notes", "settings", "checkpoint", "maps_file",
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
            span = f" ({percent(intervals[name]['listening'])})" if intervals else ""
            meaning = f"cIoU({name}) - cIoU({name}_wrong); near 0 the map is saliency"
            lines.append(f"listening of {name}: {percent(scores['listening'], sign=True)}{span} = {meaning}")
    lines += ["", *_block(rows, bars, sometimes)] if sometimes else []
    lines += harder_lines(results)
    lines += ["", *_by_size(results.get("by_size", {}), names), *_retrieval(results.get("retrieval", {}))]
    return "\n".join([*lines, *_provenance(results)]) + "\n"


def _block(rows: Mapping[str, Mapping], bars: Mapping[str, Mapping], columns: Sequence[str]) -> list[str]:
    """A table of some columns: the maps above, the references below."""
    of_maps, of_bars = ([[name, *(percent(scores.get(key)) for key in columns)] for name, scores in part.items()]
                        for part in (rows, bars))  # fmt: skip
    head, sides = ["map", *(COLUMNS[key] for key in columns)], ["left", *["right"] * len(columns)]
    lines = of_maps + [SEPARATING_LINE] * bool(bars) + of_bars
    return tabulate(lines, head, colalign=sides, disable_numparse=True).splitlines()


def _by_size(sizes: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    shown = [name for name in ("AUD", "IQR") if name in names] or names[:2]
    return [
        f"size {size:19} {group['samples']:6} samples  "
        + "  ".join(f"{name} cIoU {percent(group['maps'][name].get('cIoU')):>5}" for name in shown)
        for size, group in sizes.items()
    ]


def _defined(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _retrieval(retrieval: Mapping[str, Any]) -> list[str]:
    lines = []
    for by, directions in retrieval.items():
        for direction, recalls in (directions or {}).items():
            cells = "  ".join(f"{k} {percent(value):>5}" for k, value in recalls.items())
            lines.append(f"retrieval {by.replace('_', ' '):8}  {direction.replace('_', ' '):14}  {cells}")
    return lines


def _provenance(results: Mapping[str, Any]) -> list[str]:
    """Pairs, warnings about maps, checkpoint and settings: one line each, as far as known."""
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
        sounding = ", ".join(f"{name} {percent(scores.get('cIoU_sounding'))}" for name, scores in maps.items())
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
        lines.append("AUD_wrong: classes are not known, so some of the wrong audio may be of the right class")
    if shared := results.get("wrong_sounds_of_same_class"):
        lines.append(f"AUD_wrong: {shared} pairs are asked with audio of the right class, for lack of another")
    if checkpoint := results.get("checkpoint"):
        lines.append(f"pairs that were trained on: {_overlap(results)}")
    if checkpoint:
        epoch, selected_by = checkpoint.get("epoch", "?"), checkpoint.get("selected_by", "?")
        lines.append(f"checkpoint: {checkpoint.get('path', '?')}, epoch {epoch}, selected by {selected_by}")
    if warning := results.get("training_warning") or (checkpoint or {}).get("warning"):
        lines.append(f"warning: in training {warning}")
    if last := results.get("last_epoch"):
        lines.append(_last_epoch(last, (checkpoint or {}).get("epoch"), [*maps]))
    if checkpoint and "threshold" in checkpoint:
        lines.append(describe_threshold(checkpoint["threshold"], results.get("settings", {}).get("infer_image_size")))
    lines += [f"note: {note}" for note in results.get("notes", ())]
    if test_list := results.get("test_list"):
        lines.append(f"list: {test_list}, in place of the set's own")
    if maps_file := results.get("maps_file"):
        lines.append(f"maps: {maps_file}")
    if settings := results.get("settings"):
        settings = {key: value for key, value in settings.items() if key != "rules" and value is not None}
        lines.append("settings: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
    return lines


def _overlap(results: Mapping[str, Any]) -> str:
    pairs, parts = results.get("training_test_overlap"), results.get("training_test_overlap_of", {})
    if pairs is None:
        return "unknown, no train_ids.txt beside the checkpoint"
    images, audio, more = (parts.get(name, 0) for name in ("images", "audio", "same_video"))
    told = [f"the image of {images:,}, the audio of {audio:,}"] * (images != audio)
    told += [f"and {more:,} of the same video as a training pair"] * bool(more)
    return f"{pairs:,}" + f" ({', '.join(told)})" * bool(told)


def _last_epoch(last: Mapping[str, Any], chosen: Any, names: Sequence[str]) -> str:
    """The figures of the last epoch, which no choice could favour."""
    if last["epoch"] == chosen:
        return f"last epoch: {chosen}, the selected one"
    cells = [
        f"{name} cIoU {percent(last['maps'][name].get('cIoU'))}, pointing {percent(last['maps'][name].get('pointing'))}"
        for name in names
        if name in last["maps"] and name in ("AUD", "IQR")
    ]
    return f"last epoch: {last['epoch']}, {'; '.join(cells)}"


def publish(evaluation: Evaluation, folder: Path, **about: Any) -> None:
    """Add to a set's figures where they come from, write results.json and per_sample.csv, print the table.

    about: `testset`, and what is known of `checkpoint`, `training_test_overlap`, `last_epoch` and
    `training_warning`.
    """
    results = evaluation.results
    results.update(about, provenance=provenance())
    keys = [key for key in FIRST_KEYS if key in results]
    keys += [key for key in results if key not in FIRST_KEYS + LAST_KEYS] + [key for key in LAST_KEYS if key in results]
    text = io.StringIO()
    writer = csv.DictWriter(text, evaluation.rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(evaluation.rows)
    figures = json_text({key: results[key] for key in keys})
    write_together({folder / "per_sample.csv": text.getvalue(), folder / "results.json": figures})
    left_out = results["pairs"]["left_out"]
    if left_out:
        write_text(folder / "left_out.txt", "".join(f"{name}\n" for name in left_out))
    else:
        (folder / "left_out.txt").unlink(missing_ok=True)
    print(results_table(results))
    print(f"written: {folder / 'results.json'}, {folder / 'per_sample.csv'}\n")


def training_overlap(path: Path, truth: GroundTruth, ids: Sequence[str]) -> dict[str, Any]:
    """`trained_on` of the scored ids; its number of pairs is None where no list of training ids is beside the model."""
    beside = path.with_name("train_ids.txt")
    if not beside.is_file():
        return {"training_test_overlap": None}
    found = trained_on(read_ids(beside), truth, ids)
    return {"training_test_overlap": found.pop("pairs"), "training_test_overlap_of": found}
