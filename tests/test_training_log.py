"""The log of a training run: files of the checkpoint's epochs, and a wandb run that is read back from its disk."""

import json
import os
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import wandb
from conftest import ROOT
from wandb.proto.wandb_internal_pb2 import Record

from reports.pictures import SHEET_SAMPLES, Drawer
from training.log import RunLog, _is_logged_in, best_figures, stuck
from utils import UserError, provenance

LINES = [
    {"epoch": 1, "loss": 2.0, "syn/IQR/cIoU": 0.5, "syn/IQR/mAP": float("nan"), "syn/IQR/samples": 20},
    {"epoch": 2, "loss": 1.0, "syn/IQR/cIoU": 0.25, "syn/IQR/mAP": 0.75, "syn/IQR/samples": 20},
]
STEPS = 3  # per epoch


class Offline(NamedTuple):
    id: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    deprecated: list[str]  # what wandb notes of calls that it will drop


def read_offline(folder) -> Offline:
    """The only wandb run recorded below `folder`; its file is 32 KiB blocks of pieces, each with crc, length, kind."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, at, whole, run = path.read_bytes(), 7, b"", Offline("", {}, [], {}, [])
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
        length, last = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6] in (1, 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if last:
            record, whole = Record.FromString(whole), b""
            run.rows.extend([items(record.history.item)] if record.HasField("history") else [])
            run.summary.update(items(record.summary.update))
            run.config.update(items(record.run.config.update))
            for telemetry in (record.telemetry, record.run.telemetry):
                run.deprecated.extend(field.name for field, _ in telemetry.deprecated.ListFields())
            run = run._replace(id=record.run.run_id or run.id)
    return run


def items(records) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in records}


def train(log: RunLog, folder, epochs) -> None:
    """What the training loop does with a log."""
    for epoch in epochs:
        for step in range(epoch * STEPS + 1, (epoch + 1) * STEPS + 1):
            log.step(step, {"loss": 1 / step, "lr": 1e-3 * step, "grad_norm": 2.0, "data_wait": 0.25})
        cv2.imwrite(str(folder / "sheet.png"), np.full((40, 30, 3), 100 * epoch, dtype=np.uint8))
        log.add_sheet("syn", folder / "sheet.png")
        log.add_rows("syn", rows_of(epoch))
        log.write(LINES[epoch], (epoch + 1) * STEPS)


def rows_of(epoch) -> list[dict[str, Any]]:
    return [{"id": f"s{i}", "class": "", "AUD_pointing": i > epoch, "AUD_iou": 0.25 * i} for i in range(3)]


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """A run of two epochs, and what one that was resumed after the first of them records."""
    whole, half = (tmp_path_factory.mktemp(name) for name in ("whole", "half"))
    log = RunLog(whole, "offline", "mine", {"tau": 0.03, "resume": False})
    train(log, whole, [0, 1])
    log.add_sheet("syn", whole / "sheet.png")
    log.add_rows("syn", rows_of(0))
    log.finish({"syn/IQR/cIoU": 0.5})
    for name in ("log.jsonl", "curves.png"):
        shutil.copy(whole / name, half)
    again = RunLog(half, "offline", "mine", {"tau": 0.03, "resume": True}, log.lines[:1], log.run_id)
    before = epochs_of(half)
    train(again, half, [1])
    again.finish({})
    return whole, log, half, again, before


def epochs_of(folder) -> list[int]:
    return [json.loads(line)["epoch"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_step_is_in_the_wandb_run_with_its_figures(halves):
    rows = [row for row in read_offline(halves[0]).rows if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["train/loss"] for row in rows] == pytest.approx([1 / step for step in range(1, 7)])
    assert [row["train/lr"] for row in rows] == pytest.approx([1e-3 * step for step in range(1, 7)])
    assert {(row["train/grad_norm"], row["train/data_wait"]) for row in rows} == {(2.0, 0.25)}


def test_every_epoch_is_in_the_wandb_run_with_scores_their_best_and_pictures(halves):
    run = read_offline(halves[0])
    rows = [row for row in run.rows if "epoch" in row]
    assert [(row["epoch"], row["step"], row["loss"]) for row in rows] == [(1, 3, 2.0), (2, 6, 1.0)]
    assert [row["syn/IQR/cIoU"] for row in rows] == [0.5, 0.25]
    assert [row["best/syn/IQR/cIoU"] for row in rows] == [0.5, 0.5]
    assert [row.get("best/syn/IQR/mAP") for row in rows] == [None, 0.75]
    for kind, count in (("maps", 2), ("chosen_maps", 1)):
        pictures = [row for row in run.rows if f"syn/{kind}/path" in row]
        assert [row[f"syn/{kind}/_type"] for row in pictures] == ["image-file"] * count
        (files,) = halves[0].glob("wandb/offline-run-*/files")
        assert len({(files / row[f"syn/{kind}/path"]).read_bytes() for row in pictures}) == count
    assert run.summary["syn/IQR/cIoU"] == 0.5, "the chosen checkpoint's score, not the last epoch's"


def test_every_scored_epoch_has_a_table_of_its_samples(halves):
    run = read_offline(halves[0])
    (files,) = halves[0].glob("wandb/offline-run-*/files")
    for kind, epochs in (("samples", [0, 1]), ("chosen_samples", [0])):
        tables = [row for row in run.rows if f"syn/{kind}/path" in row]
        assert [row[f"syn/{kind}/_type"] for row in tables] == ["table-file"] * len(epochs)
        for row, epoch in zip(tables, epochs, strict=True):
            table = json.loads((files / row[f"syn/{kind}/path"]).read_text())
            assert table["columns"] == ["id", "class", "AUD_pointing", "AUD_iou"]
            assert table["data"] == [[*sample.values()] for sample in rows_of(epoch)]


def test_no_call_is_one_that_wandb_will_drop(halves):
    assert read_offline(halves[0]).deprecated == read_offline(halves[2]).deprecated == []


def test_the_wandb_run_knows_its_configuration_and_revision(halves):
    config = read_offline(halves[0]).config
    assert config["tau"] == 0.03 and config["revision"] == provenance()["revision"]


def test_a_resumed_run_goes_on_under_the_same_id_behind_the_rows_of_the_checkpoint(halves):
    whole, log, half, again, _ = halves
    first, second = read_offline(whole), read_offline(half)
    assert first.id == second.id == log.run_id == again.run_id
    assert [row["step"] for row in second.rows if "train/loss" in row] == [4, 5, 6]
    assert [row["best/syn/IQR/cIoU"] for row in second.rows if "epoch" in row] == [0.5]
    of_checkpoint = [row["_step"] for row in first.rows if row["step"] <= STEPS]
    counter = [row["_step"] for row in second.rows]
    assert counter[0] > max(of_checkpoint) and counter == sorted(set(counter))


def test_the_files_are_those_of_the_checkpoint_and_end_as_in_one_go(halves):
    whole, _, half, again, before = halves
    assert before == [1], "a line of an epoch that is trained again is still there"
    assert (half / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    assert epochs_of(half) == [1, 2] and [line["step"] for line in again.lines] == [3, 6]
    assert min(cv2.imread(str(half / "curves.png")).shape[:2]) > 300


def test_a_checkpoint_within_the_first_epoch_leaves_no_files_of_later_ones(tmp_path):
    for name in ("log.jsonl", "curves.png"):
        (tmp_path / name).touch()
    RunLog(tmp_path, "false", "mine", {})
    assert not list(tmp_path.iterdir())


def test_only_figures_of_test_sets_have_a_best():
    line = {"epoch": 3, "loss": 1.0, "val/retrieval_score": 0.5, "a/IQR/cIoU": None, "a/IQR/tied_half": 4}
    assert best_figures([line, line | {"a/AUD/listening": -0.25, "a/AUD/images": 7}]) == {"best/a/AUD/listening": -0.25}


def test_an_empty_variable_counts_as_none_and_what_wandb_refuses_is_one_line(tmp_path, monkeypatch):
    class Refused(Exception):
        pass

    def init(mode, **_):
        raise Refused if mode == "offline" and "WANDB_MODE" not in os.environ else AssertionError(mode)

    monkeypatch.setenv("WANDB_MODE", "")
    monkeypatch.setattr("training.log._is_logged_in", lambda: False)
    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(Refused):
        RunLog(tmp_path, "true", "mine", {})
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(wandb.Error("no\nentry")))
    with pytest.raises(UserError, match=r"wandb does not start \(no entry\): --wandb offline"):
        RunLog(tmp_path, "offline", "mine", {})


def test_a_variable_that_wandb_does_not_take_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("training.log._is_logged_in", lambda: int("soon"))  # as wandb reads its settings
    with pytest.raises(UserError, match="wandb does not start"):
        RunLog(tmp_path, "true", "mine", {})


@pytest.mark.parametrize("key", ["variable", "netrc", None])
def test_a_login_is_known_by_its_key(key, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if key == "variable":
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    if key == "netrc":
        (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {'k' * 40}\n")
    assert _is_logged_in() == (key is not None)


def at_chance(count, loss=8.31, score=0.5, **more):
    return [{"epoch": i + 1, "info_nce": loss, "val/retrieval_score": score, **more} for i in range(count)]


@pytest.mark.parametrize(
    "lines, warns",
    [
        (at_chance(4), True),  # 2 log 64 = 8.318
        (at_chance(3), False),  # the first is of the warm-up
        (at_chance(4, loss=8.0), False),
        (at_chance(4, score=0.56), False),
        (at_chance(4, score=0.0), True),  # collapsed
        (at_chance(4, loss=7.4), False),
        (at_chance(4, loss=7.4, info_nce_chance=7.42), True),  # half of the negatives are left out
        ([*at_chance(3), {**at_chance(4)[3], "info_nce": 5.0}], False),  # it has begun to learn
        ([{"epoch": i + 1, "info_nce": 8.31} for i in range(4)], True),  # no pairs held out
    ],
)
def test_a_training_that_learns_nothing_is_told_from_one_that_does(lines, warns):
    told = stuck(lines, 1, 64, 400)
    assert (told is not None) is warns
    assert not told or ("from epoch 2 to 4" in told and "try another --lr" in told)


def test_a_training_of_few_steps_is_told_to_take_more():
    lines = [line | {"steps": 1} for line in at_chance(4)]
    assert "try a smaller --batch_size, more --epochs or more pairs, as an epoch has 1 steps" in stuck(
        lines, 1, 64, 400
    )


def test_without_wandb_nothing_of_it_is_imported_and_a_resumed_id_is_kept(tmp_path):
    code = f"""
import sys
from pathlib import Path
from training.log import RunLog
log = RunLog(Path({str(tmp_path)!r}), "false", "mine", {{}}, run_id="kept")
log.step(1, {{"loss": 1.0}})
log.add_sheet("syn", Path("unread.png"))
log.write({{"epoch": 1, "loss": 1.0}}, 1)
log.finish({{}})
assert "wandb" not in sys.modules and log.run_id == "kept"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "wandb").exists() and epochs_of(tmp_path) == [1]


def test_every_sheet_shows_the_same_sixteen_samples():
    truth = type("Truth", (), {"name": "syn"})
    chosen = [Drawer(None, truth, count, None).on_sheet for count in (5158, 5158, 16, 3)]
    assert chosen[0] == chosen[1] and len(chosen[0]) == SHEET_SAMPLES == 16 and {0, 5157} <= chosen[0]
    assert chosen[2:] == [set(range(16)), {0, 1, 2}]


def test_wandb_that_is_not_installed_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--wandb offline: .*pip install wandb"):
        RunLog(tmp_path, "offline", "run", {})
