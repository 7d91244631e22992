"""Several results of one test set side by side: figures of every configuration, paired differences to the first."""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import TextWrapper
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from annotations import first_ids
from recipes import OUR_LOSSES, PAPER_NAMES, RUN, TESTS, modern, roles
from scoring.bootstrap import RESAMPLES, Combined, Ratio, bootstrap, interval
from scoring.metrics import RULES
from scoring.negatives import negative_ratios
from scoring.summary import interactive_groups, ratios_of
from utils import UserError

WIDTH, LABEL = 130, 44  # characters of a line and of a label; columns that do not fit go into a table below
COLUMNS = (
    "cIoU", "AUC", "mAP", "pointing", "cIoU_half", "mIoU", "F", "IIoU", "listening", "class_R@1",
    "both_pointing", "AP", "max_F1", "F_LOC", "F_AUC", "cIoU_u", "pIA_silence", "pIA_noise", "pIA_offscreen",
    "CIoU@0.3", "CAP", "PIAP",
)  # fmt: skip
DIFFERENCES = ("cIoU", "mAP", "pointing", "mIoU", "IIoU", "F_LOC", "pIA")
SETTINGS = ("alpha", "infer_image_size", "infer_sharpening", "infer_smoothing", "interpolation")


class Run(NamedTuple):  # one results.json and the per_sample.csv beside it
    path: Path
    results: Mapping[str, Any]
    columns: Mapping[str, list[str]]  # of per_sample.csv, sorted by id
    checkpoint: Mapping[str, Any]  # empty for maps of other methods
    flags: Mapping[str, Any]  # of the training run; none for released checkpoints and maps of other methods


class Configuration(NamedTuple):  # runs that differ in their seed only
    label: str
    about: str  # the flags and settings in which it differs
    runs: list[Run]
    maps: list[str]

    def values(self, name: str, metric: str) -> list[float]:
        """A metric of one map, run by run; empty where any lacks it. Recall (worse direction) is the first map's."""
        found = [run.results["maps"][name].get(metric) for run in self.runs]
        if metric == "class_R@1" and name == self.maps[0]:
            ways = [((run.results.get("retrieval") or {}).get("by_class") or {}).values() for run in self.runs]
            found = [min((way.get("R@1", np.nan) for way in both), default=None) for both in ways]
        return found if all(map(_defined, found)) else []


def compare(paths: Sequence[str | Path], map_name: str | None = None, common: bool = False) -> str:
    """Markdown tables of two or more results.json of one test set; the first file's configuration is the baseline.

    map_name: this map only; else AUD and IQR, or a file's first two. common: on the samples that all files have, see
    `on_common`. UserError names the files and what differs.
    """
    _require(len(paths) > 1, f"--compare takes two or more results.json, not {len(paths)}")
    places = [Path(path).resolve() for path in paths]
    _require(len({*places}) == len(places), f"--compare names {max(places, key=places.count)} twice")
    runs = [read_run(path) for path in paths]
    if common:
        runs = on_common(runs)
    for run in runs[1:]:
        refuse_different(runs[0], run)
    configurations = configure(runs, map_name)
    results, units = runs[0].results, runs[0].columns["unit"]
    count = f"{len(units)} of {results['pairs'].get('expected')} samples, {len({*units})} images or videos"
    count += f"; those that all {len(runs)} results have, of {results['pairs']['of']}" if common else ""
    wrap = TextWrapper(WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False).fill
    tables = [*figures_table(configurations), *difference_table(configurations)]
    return "\n".join([f"{results['testset']}, in %: {count}", *tables, "", *map(wrap, footer(configurations))])


def _require(truth: Any, otherwise: str) -> None:
    if not truth:
        raise UserError(otherwise)


def read_run(path: str | Path) -> Run:
    """results.json and the per_sample.csv beside it. UserError where one is missing, unreadable or of another shape."""
    path, table = Path(path), Path(path).with_name("per_sample.csv")
    for file in (path, table):
        _require(
            file.is_file(),
            f"--compare: there is no file {file}: give results.json files, each beside its per_sample.csv",
        )
    texts = [file.read_bytes() for file in (path, table)]
    try:
        results, lines = json.loads(texts[0]), [*csv.reader(texts[1].decode().split("\n"))]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}, or {table.name} beside it, is damaged: {error}") from error
    for key, kind in {"testset": str, "maps": dict, "settings": dict, "pairs": dict}.items():
        fits = isinstance(results, dict) and isinstance(results.get(key), kind) and results[key]
        fits = fits and (key != "maps" or all(isinstance(row, dict) for row in results[key].values()))
        _require(fits, f"{path} is no results.json of test_model.py: see its `{key}`")
    values = [value for row in results["maps"].values() for value in row.values()]
    numeric = all(value is None or isinstance(value, int | float) for value in values)
    _require(numeric, f"{path}: a figure of `maps` is no number")
    shapes = {"checkpoint": dict, "retrieval": dict, "training": dict, "rules": dict, "left_out": list}
    parts = [results, results.get("checkpoint") or {}, results["settings"], results["pairs"]]
    for key, kind in shapes.items():
        fits = all(isinstance(part, dict) and isinstance(part.get(key, kind()) or kind(), kind) for part in parts)
        _require(fits, f"{path}: `{key}` is not what test_model.py writes")
    if results.get("checkpoint"):
        settings = results["settings"]
        settings.setdefault("infer_smoothing", 0.0)  # what older code did
        settings.setdefault("infer_image_size", (results["checkpoint"].get("training") or {}).get("image_size"))
    names, *rows = [row for row in lines if row] or [[]]
    lacking = [name for name in ("id", "unit", "area") if name not in names]
    _require(not lacking, f"{table} has no column {', '.join(lacking)}: test again to write it anew")
    _require(all(len(row) == len(names) for row in rows), f"{table}: its rows are not all of one length")
    scored = results["pairs"].get("scored")
    _require(rows and scored == len(rows), f"{path} counts {scored} pairs, {table} {len(rows)}: not of one run")
    columns = dict(zip(names, map(list, zip(*sorted(rows, key=lambda row: row[names.index("id")])))))
    _require(len({*columns["id"]}) == len(rows), f"{table}: an id occurs twice")
    checkpoint = results.get("checkpoint") or {}
    return Run(path, results, columns, checkpoint, checkpoint.get("training") or {})


def refuse_different(first: Run, other: Run) -> None:
    """UserError unless both runs scored the same samples of the same set by the same rules."""
    facts = []
    for results in (first.results, other.results):
        settings, expected = results["settings"], results["pairs"].get("expected")
        rules = {f"rule of {metric}": rule for metric, rule in (settings.get("rules") or {}).items()}
        numbers = {"threshold of the rule fixed": settings.get("threshold"), "number of pairs in the set": expected}
        facts.append({"test set": results["testset"], **rules, **numbers})
    refused = f"{first.path} and {other.path} cannot be compared:"
    for what in facts[0] | facts[1]:
        one, two = (side.get(what) for side in facts)
        _require(one == two, f"{refused} the {what} is {one} in the first, {two} in the second")
    one, two = first.columns, other.columns
    here, there = sorted({*one["id"]} - {*two["id"]}), sorted({*two["id"]} - {*one["id"]})
    only = [f"only in the {which} {first_ids(ids, 3)}" for which, ids in (("first", here), ("second", there)) if ids]
    _require(not only, f"{refused} {len(one['id'])} and {len(two['id'])} samples, {'; '.join(only)}")
    for column in ("unit", "area", "has_source"):
        for name, x, y in zip(one["id"], one.get(column, ()), two.get(column, ())):
            _require(x == y, f"{refused} the ground truth differs, {column} of {name} is {x} and {y}")


def on_common(runs: Sequence[Run]) -> list[Run]:
    """The runs on the samples that all of them scored, with their figures anew from per_sample.csv.

    Figures that it does not hold, such as retrieval, are left out.
    """
    shared = set.intersection(*({*run.columns["id"]} for run in runs))
    _require(shared, f"--common: no sample is in all of {', '.join(str(run.path) for run in runs)}")
    counts = ", ".join(f"{len(run.columns['id']):,}" for run in runs)
    expected = max(run.results["pairs"].get("expected") or 0 for run in runs)
    found = []
    for run in runs:
        for name in run.results["maps"]:
            ratios(run, name)  # refuses what is not of one run
        kept = [name in shared for name in run.columns["id"]]
        columns = {name: [v for v, keep in zip(values, kept) if keep] for name, values in run.columns.items()}
        left_out = [name for name in run.columns["id"] if name not in shared]
        left_out += run.results["pairs"].get("left_out") or []
        pairs = {
            **run.results["pairs"],
            "scored": len(shared),
            "left_out": left_out,
            "images_of_left_out": image_of(run),
            "expected": expected,
            "of": counts,
        }
        given = {name: {"IIoU": None} if "IIoU" in row else {} for name, row in run.results["maps"].items()}
        results = {**run.results, "pairs": pairs, "retrieval": None, "maps": given}
        part = run._replace(results=results, columns=columns)
        figures = {name: {key: ratio.value() for key, ratio in ratios(part, name).items()} for name in given}
        found.append(part._replace(results={**results, "maps": figures}))
    return found


def image_of(run: Run) -> dict[str, str]:
    """{id: image} of an interactive set, as `images_by_id` has it; of what was left out as far as the results tell."""
    ids, units = run.columns["id"], run.columns.get("image", run.columns["unit"])
    in_view = run.columns.get("has_source", ["True"] * len(ids))
    scored = {i: unit if seen == "True" else i for i, unit, seen in zip(ids, units, in_view, strict=True)}
    return (run.results["pairs"].get("images_of_left_out") or {}) | scored


def ratios(run: Run, name: str) -> dict[str, Ratio | Combined]:
    """The metrics of one map, from per_sample.csv. UserError where they disagree with results.json."""
    table, given, columns = run.path.with_name("per_sample.csv"), run.results["maps"][name], {}
    for column in ("area", *("iou" + suffix for suffix in RULES.values()), "average_precision", "pointing"):
        title = column if column == "area" else f"{name}_{column}"
        _require(title in run.columns or column.startswith("iou_"), f"{table} has no column `{title}`")
        try:
            numbers = [float({"True": 1, "False": 0, "": "nan"}.get(text, text)) for text in run.columns.get(title, ())]
        except ValueError as error:
            raise UserError(f"{table}, column {title}: {error}") from error
        columns |= {column: np.array(numbers) == 1 if column == "pointing" else np.array(numbers)} if numbers else {}
    whole = [*run.columns["id"], *(run.results["pairs"].get("left_out") or ())]
    groups = interactive_groups(run.columns["id"], whole, image_of(run)) if "IIoU" in given else None
    found = ratios_of(columns, columns["area"] == 0, groups)
    found |= _negatives(run, name)
    if f"{name}_jaccard" in run.columns:  # of masks
        frames = np.array(run.columns[f"{name}_jaccard"], float)
        found["mIoU"] = Ratio(frames, np.ones(len(frames)))
    for metric, stored in given.items():
        if metric in found and _defined(stored) and not abs(stored - found[metric].value()) < 1e-6:
            says = f"{metric} of {name} is {100 * stored:.4f} in {run.path}, {100 * found[metric].value():.4f}"
            raise UserError(f"{says} in {table}: they are not of one run")
    return found


def _negatives(run: Run, name: str) -> dict[str, Ratio | Combined]:
    """The figures of negative audio that follow from the rows, where seeds are averaged: not AUC_N, nor F_AUC."""
    columns = {title.removeprefix(f"{name}_"): values for title, values in run.columns.items()}
    wanted = [column for column in columns if column == "iou_u" or column.startswith(("lit_", "change_"))]
    try:
        numbers = {column: np.array([float(text or "nan") for text in columns[column]]) for column in wanted}
    except ValueError as error:
        raise UserError(f"{run.path.with_name('per_sample.csv')}, columns of {name}: {error}") from error
    seeds = {
        column: values if column in ("iou_u", "lit_own") else values[:, None] for column, values in numbers.items()
    }
    found = negative_ratios(seeds, np.zeros(len(run.columns["id"]), dtype=bool))
    return {metric: ratio for metric, ratio in found.items() if not metric.startswith("AUC_N") and metric != "F_AUC"}


def configure(runs: Sequence[Run], map_name: str | None = None) -> list[Configuration]:
    """Group the seeds of one configuration; where a seed occurs twice, names and finally paths tell runs apart."""
    groups, traits_of = [[*runs]], lambda run: json.dumps(_traits(run), sort_keys=True)
    for key in (traits_of, _name, lambda run: str(run.path)):
        parts: dict[tuple, list[Run]] = {}
        for i, group in enumerate(groups):
            whole = key is not traits_of and len({run.flags.get("seed") for run in group}) == len(group)
            for run in group:
                parts.setdefault((i, "" if whole else key(run)), []).append(run)
        groups = [*parts.values()]
    traits, found = [_traits(group[0]) for group in groups], []
    keys = dict.fromkeys(
        key for trait in traits for key in trait if key not in ("file", "selected by", "interpolation")
    )
    changed = [key for key in keys if len({_word(trait[key]) for trait in traits if key in trait}) > 1]
    for trait, group in zip(traits, groups):
        own = [key for key in changed if key in trait and (len(changed) <= 2 or trait[key] != traits[0].get(key))]
        about = ", ".join(f"{key} {_word(trait[key])}" for key in own).replace("|", "/")
        name = " and ".join(dict.fromkeys(map(_name, group))).replace("|", "/")[:LABEL]
        label = f"{name}: {about}" if about and len(f"{name}: {about}") <= LABEL else name
        label += f" #{len(found) + 1}" if label in [other.label for other in found] else ""
        found.append(Configuration(label, about, group, _choose_maps(group, map_name)))
    return found


def _traits(run: Run) -> dict[str, Any]:
    """What makes a configuration: the flags that can change a number, and the settings of the test."""
    flags, no_effect = modern(run.flags), {RUN} if run.flags.get("select") == "test" else {RUN, TESTS}
    ignored = {"seed", "weights", "alpha", *(name for name, role in roles().items() if role in no_effect)}
    if flags.get("trainset") == "custom":
        ignored.discard("train_data_path")  # here it is the training set
    short = {loss: name for name, loss in PAPER_NAMES.items()}
    weights = dict.fromkeys(OUR_LOSSES, 0.0) | flags["weights"] if "weights" in flags else {}
    weights = {short.get(loss, loss): weight for loss, weight in weights.items()}
    traits = {key: value for key, value in flags.items() if key not in ignored} | weights or {"file": str(run.path)}
    settings = {key: run.results["settings"][key] for key in SETTINGS if run.results["settings"].get(key) is not None}
    return traits | {"selected by": run.checkpoint.get("selected_by")} | settings


def _name(run: Run) -> str:
    """The experiment without the end that names its seed, else the checkpoint, the file of maps, or the folder."""
    path = Path(run.checkpoint.get("path") or run.results.get("maps_file") or run.path.absolute().parent)
    if name := run.flags.get("experiment_name"):
        name = re.sub(rf"([_\-.]+(seed|s)?|seed)[_\-.]?{run.flags.get('seed')}$", "", name) or name
        return f"{name}/latest" if path.stem == "latest" else name
    return "/".join(path.with_suffix("").parts[-2 if path.stem in ("best", "latest", "maps") else -1 :])


def _choose_maps(group: Sequence[Run], map_name: str | None) -> list[str]:
    for run in group:
        has = run.results["maps"]
        _require(map_name is None or map_name in has, f"{run.path} has no map {map_name}: it has {', '.join(has)}")
    own = [name for name in group[0].results["maps"] if all(name in run.results["maps"] for run in group)]
    _require(own, f"{group[0].path} and {group[-1].path} are runs of one configuration without a map in common")
    asked = [name for name in own if "F_LOC" in group[0].results["maps"][name] and name not in ("AUD", "IQR")]
    known = [name for name in ("AUD", "IQR") if name in own] or [name for name in own if name not in asked][:2]
    return [map_name] if map_name else [*known, *asked]


def figures_table(configurations: Sequence[Configuration]) -> list[str]:
    """A row for each map of each configuration: mean over its runs, and their standard deviation."""

    def cell(values: Sequence[float]) -> str:
        spread = f"±{_percent(np.std(values, ddof=1))}" if len(values) > 1 else ""
        return _percent(np.mean(values)) + spread if values else "-"

    rows = [(c, name) for c in configurations for name in c.maps]
    metrics = [key for key in COLUMNS if any(c.values(name, key) for c, name in rows)]
    cells = [[c.label, str(len(c.runs)), name, *(cell(c.values(name, key)) for key in metrics)] for c, name in rows]
    return _tables(["configuration", "runs", "map", *metrics], cells, fixed=3)


def difference_table(configurations: Sequence[Configuration]) -> list[str]:
    """Every map minus the baseline's of the same name, else minus the baseline's first, on the same samples."""
    base, *others = configurations
    known = set(base.runs[0].results["maps"]).intersection(*(run.results["maps"] for run in base.runs))
    own = {(c.label, name): seed_means(c, name) for c in configurations for name in c.maps}
    metrics = [key for key in DIFFERENCES if any(key in means for means in own.values())]
    rows, cells = [(c, name, name if name in known else base.maps[0]) for c in others for name in c.maps], []
    for c, name, of in rows:
        a, b = own[c.label, name], own.get((base.label, of)) or seed_means(base, of)
        differences = {key: difference(a[key], b[key]) for key in metrics if key in a and key in b}
        drawn = bootstrap(differences, base.runs[0].columns["unit"])  # the same resamples every time
        spans = {key: interval(drawn[key]) for key in differences}
        marks = {key: " *" if low > 1e-12 or high < -1e-12 else "" for key, (low, high) in spans.items()}
        texts = {
            key: f"{_percent(differences[key].value(), '+')} {_span(*spans[key])}{marks[key]}" for key in differences
        }
        found = [texts.get(key, "-") for key in metrics]
        cells.append([c.label, name, of, "samples", *found])
        if len(c.runs) + len(base.runs) > 2:
            sides = [(c.values(name, key), base.values(of, key)) for key in metrics]
            found = [_span(min(a) - max(b), max(a) - min(b)) if a and b else "-" for a, b in sides]
            cells.append(["", "", "", "seeds", *found])
    table = _tables(["configuration", "map", "minus", "over", *metrics], cells, fixed=4, align="left")
    return ["", f"Difference to {base.label}; `minus` is its map that is subtracted", *table] if others else []


def difference(one: Ratio | Combined, other: Ratio | Combined) -> Ratio | Combined:
    """One figure minus another of the same samples."""
    if isinstance(one, Ratio):
        return Ratio(one.numerator - other.numerator, other.denominator)
    count = len(one.parts)
    return Combined((*one.parts, *other.parts), lambda *parts: one.form(*parts[:count]) - other.form(*parts[count:]))


def seed_means(configuration: Configuration, name: str) -> dict[str, Ratio | Combined]:
    """Figures of one map with every sample's numerator averaged over the runs."""
    of_runs = [ratios(run, name) for run in configuration.runs]
    return {key: _mean([own[key] for own in of_runs]) for key in of_runs[0] if all(key in own for own in of_runs)}


def _mean(figures: Sequence[Ratio | Combined]) -> Ratio | Combined:
    first = figures[0]
    if isinstance(first, Combined):
        return Combined(tuple(map(_mean, zip(*(figure.parts for figure in figures), strict=True))), first.form)
    return Ratio(np.mean([figure.numerator for figure in figures], axis=0, dtype=float), first.denominator)


def footer(configurations: Sequence[Configuration]) -> list[str]:
    """What the signs mean, which files each row is from, and differences that are allowed but may favour a row."""
    several = any(len(c.runs) > 1 for c in configurations)
    lines = ["±: standard deviation (n - 1) over runs that differ in their seed."] * several
    lines += ["class_R@1: the worse direction."] * any(c.values(c.maps[0], "class_R@1") for c in configurations)
    if len(configurations) > 1:
        how = f"95 % interval of {RESAMPLES} paired bootstrap resamples, runs averaged per sample; * excludes 0."
        seeds = "Over seeds: smallest and largest difference between a run of the one and a run of the other."
        lines.append(f"Over samples: {how} It covers the choice of test samples, not the noise of training.")
        lines.append(seeds if several else "With one run each it is unknown how much another seed would change.")
    for c in configurations:
        seeds = ", ".join(str(run.flags["seed"]) for run in c.runs if "seed" in run.flags)
        about = [c.about] * (c.about not in c.label) + [f"seed {seeds}"] * bool(seeds)
        lines.append(f"- {c.label}: {'; '.join([*about, ', '.join(str(run.path.parent) for run in c.runs)])}")
    told = {key: lambda run, key=key: run.results["settings"].get(key) for key in SETTINGS}
    told["seed of the wrong audio (listening)"] = lambda run: run.results["settings"].get("seed")
    told["negative audio"] = lambda run: _asked(run.results.get("negatives"))
    told["checkpoint selected by"] = lambda run: run.checkpoint.get("selected_by")
    told["test pairs trained on"] = lambda run: run.results.get("training_test_overlap")
    for title, of in told.items():
        labels: dict[str, list[str]] = {}
        for c in configurations:
            values = sorted({"unknown" if of(run) is None else _word(of(run)) for run in c.runs})
            labels.setdefault(", ".join(values), []).append(c.label)
        flattered = any("test set" in v or (title.startswith("test pairs") and re.search("[1-9]", v)) for v in labels)
        if len(labels) > 1 or flattered:
            sides = "; ".join(f"{value} ({', '.join(names)})" for value, names in labels.items())
            lines.append(f"NOTE {title}: {sides}" + " - what has seen the test set scores too high" * flattered)
    return lines


def _asked(negatives: Mapping[str, Any] | None) -> str:
    """Kinds and number of seeds of negative audio, in words."""
    about = negatives or {}
    seeds = f", {len(about['seeds'])} seeds" if len(about.get("seeds", ())) > 1 else ""
    return f"{' and '.join(about.get('kinds', ())) or 'none'}{seeds}"


def _word(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _defined(value: Any) -> bool:
    return isinstance(value, int | float) and np.isfinite(value)


def _percent(value: float, sign: str = "") -> str:
    rounded = round(100 * value, 1)
    return f"{rounded:{sign}.1f}" if rounded else "0.0"  # never -0.0


def _span(low: float, high: float) -> str:
    return f"[{_percent(low, '+')}, {_percent(high, '+')}]"


def _tables(head: Sequence[str], rows: Sequence[Sequence[str]], fixed: int, align: str = "right") -> list[str]:
    """Markdown; columns that do not fit follow in further tables, which repeat the first `fixed` ones.

    align: of all columns but these.
    """

    def markdown(columns: Sequence[int]) -> list[str]:
        cells = [[row[i] for i in columns] for row in (head, *rows)]
        sides = ["left" if i < fixed else align for i in columns]
        return tabulate(cells, "firstrow", "pipe", colalign=sides, disable_numparse=True).splitlines()

    lines, labels, rest = [], [*range(fixed)], [*range(fixed, len(head))]
    while rest or not lines:
        fitting = [n for n in range(1, len(rest) + 1) if len(markdown(labels + rest[:n])[0]) <= WIDTH]
        count = max(fitting, default=1)
        lines += ["", *markdown(labels + rest[:count])]
        rest = rest[count:]
    return lines
