"""The log of a training run: `log.jsonl`, `curves.png`, and Weights & Biases where wanted."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from requests.utils import get_netrc_auth

from reports.curves import plot_curves
from utils import UserError, provenance, strict_json, write_text

COUNTS = ("samples", "empty", "images", "tied_half", "tied_adaptive")  # counts of a test set, which are not scores


STUCK_EPOCHS = 3
FEW_STEPS = 10  # of an epoch: too few to learn in
AT_CHANCE = 0.99  # of the loss of a model that knows nothing
CHANCE_SPREAD = 12**-0.5  # standard deviation of a percentile rank that is drawn at random


def stuck(lines: Sequence[Mapping[str, Any]], warm: float, batch_size: int, held_out: int) -> str | None:
    """A warning where the last epochs after the warm-up have learnt nothing: one line; else None.

    That is: the contrastive loss is at chance, for the negatives that were used, and retrieval on the held-out pairs
    no better than chance by two standard errors, in each of STUCK_EPOCHS epochs. warm: epochs of the warm-up.
    """
    last = lines[-STUCK_EPOCHS:]
    if len(last) < STUCK_EPOCHS or last[0]["epoch"] <= warm or any("info_nce" not in line for line in last):
        return None
    chances = [line.get("info_nce_chance", 2 * math.log(batch_size)) for line in last]
    limit = 0.5 + 2 * CHANCE_SPREAD / max(held_out, 1) ** 0.5
    at_chance = all(line["info_nce"] >= AT_CHANCE * chance for line, chance in zip(last, chances, strict=True))
    if not at_chance or any(line.get("val/retrieval_score", 0.0) > limit for line in last):
        return None
    found = f", held-out retrieval {last[-1]['val/retrieval_score']:.2f}" if "val/retrieval_score" in last[-1] else ""
    steps = last[-1].get("steps", FEW_STEPS)
    advice = "another --lr, a larger --batch_size or --tau, and check that images and audio of an id belong together"
    if steps < FEW_STEPS:
        advice = f"a smaller --batch_size, more --epochs or more pairs, as an epoch has {steps} steps"
    return (
        f"nothing is learnt: from epoch {last[0]['epoch']} to {last[-1]['epoch']} the contrastive loss is at chance "
        f"({last[-1]['info_nce']:.3f}, chance {chances[-1]:.3f}){found}; try {advice}"
    )


class RunLog:
    """The log of a run: log.jsonl, curves.png and, if wanted, wandb.

    wandb: "true" (offline, with a line that says so, where nobody is logged in), "offline" or "false".
    lines: those of the epochs before the resumed checkpoint, as `write` left them in `self.lines`. log.jsonl and
    curves.png are rewritten from them at once, so they never show epochs after the checkpoint.
    run_id: wandb's id of the run that is resumed, its `self.run_id`; None starts another. Online the run continues;
    offline every start writes a folder of its own under the same id, which `wandb sync` sends as one run.

    In wandb the x axis of everything is `step`, the number of optimisation steps done, which every row contains. The
    counter of wandb itself can only grow and would drop the steps that a resumed run repeats; here it only numbers the
    rows. After a resume it starts above the checkpoint's rows, as an offline folder does not know the one before it.
    """

    def __init__(
        self,
        folder: Path,
        wandb: str,
        name: str,
        config: Mapping[str, Any],
        lines: Sequence[dict[str, Any]] = (),
        run_id: str | None = None,
    ) -> None:
        self.folder, self.lines, self.run_id = folder, list(lines), run_id
        self.sheets: dict[str, Path] = {}
        self.rows: dict[str, Sequence[Mapping[str, Any]]] = {}
        self.logged = False
        self._write_files()
        self.wandb = None if wandb == "false" else _start_wandb(folder, wandb, name, config, run_id)
        if self.wandb:
            self.run_id = self.wandb.id

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """One optimisation step, for wandb alone; step: how many are done."""
        self._log({f"train/{name}": value for name, value in figures.items()}, step)

    def write(self, line: dict[str, Any], step: int) -> None:
        """One epoch's numbers; a figure of a test set is `set/map/metric`, and more of it is better."""
        self.lines.append(line | {"step": step})
        self._write_files()
        self._log(line | best_figures(self.lines) | self._shown("maps", "samples"), step)
        self.sheets, self.rows = {}, {}

    @property
    def warning(self) -> str | None:
        """That of the last epoch."""
        return self.lines[-1].get("warning") if self.lines else None

    def add_sheet(self, name: str, path: Path) -> None:
        """Add heat maps of a test set's fixed samples, which go to wandb with the next line or at the end."""
        self.sheets[name] = path

    def add_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a test set's results by sample, as per_sample.csv has them: a table that goes where its heat maps go."""
        self.rows[name] = rows

    def finish(self, scores: Mapping[str, float], last: Mapping[str, float] = {}) -> None:
        """The chosen checkpoint's scores, which become wandb's summary, and the pictures drawn with it.

        last: the scores of the last epoch, where another one was chosen; they stand there as `last/set/map/metric`.
        """
        if self.wandb:
            scores = {**scores, **({"warning": self.warning} if self.warning else {})}
            self._log(self._shown("chosen_maps", "chosen_samples"), self.lines[-1]["step"] if self.lines else 0)
            self.wandb.summary.update({**scores, **{f"last/{name}": value for name, value in last.items()}})
            self.wandb.finish()

    def _write_files(self) -> None:
        log, curves = self.folder / "log.jsonl", self.folder / "curves.png"
        if self.lines:
            write_text(log, "".join(strict_json(line) + "\n" for line in self.lines))
            plot_curves(self.lines, curves)
        else:
            log.unlink(missing_ok=True)
            curves.unlink(missing_ok=True)

    def _log(self, row: dict[str, Any], step: int) -> None:
        if self.wandb:
            first = {} if self.logged else {"step": max(self.wandb.step, step + len(self.lines)), "commit": True}
            self.wandb.log(row | {"step": step}, **first)
            self.logged = True

    def _shown(self, maps: str, samples: str) -> dict[str, Any]:
        """Heat maps and tables of the sets that were scored, as SET/maps and SET/samples by these names."""
        if not self.wandb:
            return {}
        import wandb

        sheets = {name: wandb.Image(Image.open(path), file_type="jpg") for name, path in self.sheets.items()}
        tables = {
            name: wandb.Table([*rows[0]], [[*row.values()] for row in rows], allow_mixed_types=True)
            for name, rows in self.rows.items()
        }
        return {f"{name}/{maps}": sheet for name, sheet in sheets.items()} | {
            f"{name}/{samples}": table for name, table in tables.items()
        }


def best_figures(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The largest value so far of each figure of a test set -> {"best/set/map/metric": value}."""
    best = {}
    for line in lines:
        for name, value in line.items():
            if name.count("/") == 2 and name.rpartition("/")[2] not in COUNTS and _is_number(value):
                best[f"best/{name}"] = max(value, best.get(f"best/{name}", value))
    return best


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_logged_in() -> bool:
    """Whether there is a key where wandb looks for one; asking wandb itself is deprecated, or waits for the network."""
    variables = "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"
    server = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    return any(map(os.environ.get, variables)) or get_netrc_auth(server) is not None


def _start_wandb(folder: Path, mode: str, name: str, config: Mapping[str, Any], run_id: str | None):
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"--wandb {mode}: it cannot be imported ({error}): pip install wandb, or --wandb false"
        ) from error
    if os.environ.get("WANDB_MODE") == "":
        del os.environ["WANDB_MODE"]  # wandb takes it for a mode of no name
    try:
        if mode == "true" and os.environ.get("WANDB_MODE") is None and not _is_logged_in():
            print("wandb: nobody is logged in, so the run is recorded offline (wandb login, then wandb sync sends it)")
            mode = "offline"
        run = wandb.init(
            project="joint-slot-attention",
            name=name,
            id=run_id,
            resume="allow" if run_id else None,
            dir=str(folder),
            config={**config, **provenance()},
            mode="offline" if mode == "offline" else None,
            settings=wandb.Settings(silent=True),
        )
    except (wandb.Error, ValueError) as error:  # the second: a setting or a variable of the environment
        reason = " ".join(str(error).split())
        raise UserError(f"wandb does not start ({reason:.200}): --wandb offline records here, false without") from error
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run
