"""Which epoch to keep: what a rule that chooses best.pth without boxes gains or loses, on the built-in data.

    python -m experiments.choice --seeds 0 1 2                  # an hour or more; what is finished is kept
    python -m experiments.choice --rows listen --schedules cosine --epochs 3
    python -m experiments.choice --seeds 0 1 2 --write_docs     # trains nothing: the table of finished runs into docs/

Every training scores its test sets after every epoch, so its log holds the figures of whatever epoch a rule names. The
trainings with the recipe's schedule are those of experiments.objectives, in the same folders.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import experiments.objectives as objectives
from experiments.runs import DATA, SPLITS, TEST, Row, Rows, Training, make_data, train_all
from experiments.tables import TABLES, markdown, mean_and_worst, provenance_line, read_results, write_tables
from utils import ArgumentParser, UserError, add_boolean, number, run_cli

TRAINED = {"published": "published_one", "listen": "listen_one"}  # rows of experiments.objectives
SCHEDULES = {"cosine": "", "constant": "--lr_schedule constant"}  # the first is the recipe's
FIGURES = tuple(column for column in TABLES["fixed"][1] if column[2] in ("cIoU", "pointing", "both_pointing"))
DECIDES = "val/retrieval_score"
Line = Mapping[str, Any]  # an epoch, as log.jsonl has it


def mean_figure(line: Line) -> float:
    return fmean(line[f"{split}/AUD/{metric}"] for _, split, metric in FIGURES)


def first_maximum(lines: Sequence[Line], _: int) -> Line:
    return max(lines, key=lambda line: line[DECIDES])  # of equals the first


def latest_maximum(lines: Sequence[Line], _: int) -> Line:
    return max(reversed(lines), key=lambda line: line[DECIDES])


def within_one_error(lines: Sequence[Line], chosen: int) -> Line:
    return lines[chosen - 1]


def last_epoch(lines: Sequence[Line], _: int) -> Line:
    return lines[-1]


def best_by_boxes(lines: Sequence[Line], _: int) -> Line:
    return max(lines, key=mean_figure)


RULES: dict[str, Callable[[Sequence[Line], int], Line]] = {  # (lines, epoch of best.pth) -> line of the epoch to keep
    "first maximum of held-out retrieval": first_maximum,
    "latest maximum": latest_maximum,
    "latest within one standard error of the maximum (best.pth)": within_one_error,
    "last epoch": last_epoch,
    "oracle: best mean of these figures, by boxes": best_by_boxes,
}

# ---------------------------------------------------------------- the trainings


def choice_rows(
    keys: Sequence[str], schedules: Sequence[str], seeds: Sequence[int], folder: Path, epochs: int | None = None
) -> Rows:
    """The runs by "objective, schedule". epochs: those of the recipe if None."""
    rows = {}
    for key in TRAINED:
        for schedule, flags in SCHEDULES.items():
            if key not in keys or schedule not in schedules:
                continue
            whole = objectives.ROWS[TRAINED[key]]
            row = whole._replace(flags=f"{whole.flags} {flags}".strip())
            name = TRAINED[key] + f"_{schedule}" * bool(flags)
            rows[f"{key}, {schedule}"] = [training(row, seed, folder / f"{name}_seed_{seed}", epochs) for seed in seeds]
    return rows


def training(row: Row, seed: int, folder: Path, epochs: int | None) -> Training:
    data = "--train_data_path", str(DATA[row.objects]), "--test_data_path", str(DATA[1])
    given = () if epochs is None else ("--epochs", str(epochs))
    return Training(row, seed, folder, SPLITS, (*data, *given, "--eval_every", "1"))


def read_lines(run: Training) -> list[dict[str, Any]]:
    log = run.folder / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def is_there(run: Training) -> bool:
    """Whether the run is finished and scored after every epoch. UserError for a finished one with other flags."""
    finished, lines = run.is_there(), read_lines(run)
    if all(f"{TEST}/AUD/cIoU" in line for line in lines):
        return finished
    run.asked.unlink(missing_ok=True)  # then it starts anew and does not continue
    return False


# ---------------------------------------------------------------- the table


def choice_table(rows: Rows) -> str:
    """For each row and rule the epochs that the seeds keep, and the figures of AUD in them: mean (worst), in %."""
    table = []
    for label, runs in rows.items():
        lines_of = [read_lines(run) for run in runs]
        chosen = [read_results(run, TEST)["checkpoint"]["epoch"] for run in runs]
        for rule, pick in RULES.items():
            kept = [pick(lines, epoch) for lines, epoch in zip(lines_of, chosen, strict=True)]
            epochs = ", ".join(str(line["epoch"]) for line in kept)
            cells = [mean_and_worst([line[f"{split}/AUD/{metric}"] for line in kept]) for _, split, metric in FIGURES]
            table.append([label, rule, epochs, *cells])
    return markdown(["trained with", "kept", "epochs", *(head for head, _, _ in FIGURES)], table)


def main() -> None:
    parser = ArgumentParser(description="Compare rules that choose the epoch of best.pth, on the built-in data.")
    seed = number(int, low=0, high=2**32 - 1)
    parser.add_argument("--seeds", type=seed, nargs="+", default=[0], help="random seeds; each is trained once")
    parser.add_argument("--rows", nargs="+", choices=TRAINED, default=[*TRAINED], help="objectives")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=[*SCHEDULES], help="of the learning rate")
    parser.add_argument("--epochs", type=number(int, low=1), help="epochs of every training (default: the recipe's)")
    parser.add_argument("--jobs", type=number(int, low=1), help="trainings at the same time (default: one per core)")
    parser.add_argument("--model_dir", type=Path, default=Path("checkpoints/objectives"), help="folder to train into")
    add_boolean(parser, "--write_docs", "train nothing, write the table of finished trainings into docs/training.md")
    args = parser.parse_args()
    seeds = list(dict.fromkeys(args.seeds))
    rows = choice_rows(args.rows, args.schedules, seeds, args.model_dir, args.epochs)
    missing = [run for of_seed in zip(*rows.values()) for run in of_seed if not is_there(run)]
    if args.write_docs:
        if missing:
            raise UserError(
                f"{len(missing)} trainings are not finished: {', '.join(str(run.folder) for run in missing)}"
            )
        write_tables(
            {(objectives.DOCS / "training.md", "choice"): f"{choice_table(rows)}\n\n*{provenance_line(rows)}*"}
        )
        print(f"{objectives.DOCS / 'training.md'}: table choice written")
        return
    if missing:
        make_data(1)
    train_all(missing, args.jobs or os.cpu_count() or 1)
    print(f"{choice_table(rows)}\n\n{provenance_line(rows)}")


if __name__ == "__main__":
    run_cli(main)
