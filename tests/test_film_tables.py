"""Rows of what is found, in both files, and what is not ours."""

import csv
import json

import numpy as np
import pytest

from film.localizer import Box, Peak, Step
from film.tables import Rows, read_about, write_failures
from utils import UserError

BOX = Box(1.04, 2, 3, 4.06)


def step(time, box=BOX):
    nothing = np.zeros((1, 1), np.float32)
    return Step(time, np.zeros((1, 1, 3), np.uint8), nothing, nothing, 0.25, 0.0, Peak(5.55, 6, 1 / 3), box)


def test_both_files_hold_the_same_rows_and_the_json_says_where_they_come_from(tmp_path):
    with Rows(tmp_path / "a.csv", tmp_path / "a.json", {"made_by": "x"}) as rows:
        rows.add(step(0.1))
        rows.add(step(0.2, None))
        time, left = rows.columns("time", "box_left")
        assert time.tolist() == [0.1, 0.2] and left[0] == 1.0 and np.isnan(left[1])
        rows.end = {"presence": 0.25, "complete": True}
        assert not (tmp_path / "a.csv").exists()
    content = json.loads((tmp_path / "a.json").read_text())
    table = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [{key: float(value) if value else None for key, value in row.items()} for row in table] == content["steps"]
    assert table[0]["box_bottom"] == "4.1" and table[0]["peak_value"] == "0.333333" and table[1]["box_left"] == ""
    assert read_about(tmp_path / "a.json") == {"made_by": "x", "presence": 0.25, "complete": True}


def test_after_an_error_no_file_is_left_and_no_row_is_a_table_too(tmp_path):
    with pytest.raises(UserError), Rows(tmp_path / "a.csv", tmp_path / "a.json", {}) as rows:
        rows.add(step(0.1))
        raise OSError
    assert not list(tmp_path.iterdir())
    with Rows(tmp_path / "a.csv", tmp_path / "a.json", {}) as rows:
        assert [column.size for column in rows.columns("time", "presence")] == [0, 0]
    assert json.loads((tmp_path / "a.json").read_text())["steps"] == []


def test_other_files_are_not_ours(tmp_path):
    for text in ("", "[]", "3", '{"steps": []}', "{"):
        (tmp_path / "other.json").write_text(text)
        assert read_about(tmp_path / "other.json") is None
    assert read_about(tmp_path / "absent.json") is None


def test_failures_are_listed_and_an_old_list_goes(tmp_path):
    path = tmp_path / "failures.csv"
    write_failures(path, [('odd,"name.mp4', "why"), ("bad\udcff.mp4", "who knows")])
    assert [row["reason"] for row in csv.DictReader(path.open())] == ["why", "who knows"]
    write_failures(path, [])
    assert not path.exists()
