"""The command line of the synthetic set: what is written, left alone and refused."""

import json

import cv2
import pytest
from test_synthetic_generate import TINY, ids_of

import synthetic.generate as synthetic
import synthetic.kinds as synthetic_kinds
from synthetic.generate import SPLITS
from utils import run_cli


def failure(capsys, *arguments):
    """The one line with which the command line fails; exit status 2 and nothing on the standard output."""
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: synthetic.main([str(argument) for argument in arguments]))
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if "picture/s" not in line]
    assert stop.value.code == 2 and len(lines) == 1 and not printed.out
    return lines[0]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(synthetic, "COUNTS", TINY)


def test_main_writes_once_then_has_nothing_to_do(tmp_path, capsys, tiny):
    arguments = ["--out", str(tmp_path / "set"), "--seed", "1", "--train", "13"]
    synthetic.main(arguments)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}
    assert "written" in capsys.readouterr().out and len(ids_of(tmp_path / "set", "train")) == 13
    synthetic.main(arguments)
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}


def test_other_settings_are_refused_unless_forced(tmp_path, capsys, tiny, monkeypatch):
    out = tmp_path / "set"
    synthetic.main(["--out", str(out)])
    (out / "frames" / "mine.jpg").write_bytes(b"not of the set")
    capsys.readouterr()
    assert "--force" in failure(capsys, "--out", out, "--seed", 1)
    assert "--force" in failure(capsys, "--out", out, "--train", 5, "--probe")
    assert "--force" in failure(capsys, "--out", out, "--train_objects", 3, "--probe")
    for constant in synthetic_kinds.difficulty():
        with monkeypatch.context() as change:
            change.setattr(synthetic_kinds, constant, 0.9)
            assert "--force" in failure(capsys, "--out", out), constant
    synthetic.main(["--out", str(out), "--train", "5", "--force"])
    pictures = {path.stem for path in (out / "frames").glob("*.jpg")}
    assert {name for name in pictures if name.startswith("train")} == set(ids_of(out, "train")) and "mine" in pictures
    assert len(ids_of(out, "train")) == 5


def test_a_folder_with_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("words")
    assert "--force" in failure(capsys, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--seed", "-1"], "--seed"),
        (["--seed", "one"], "--seed"),
        (["--train", "0"], "--train"),
        (["--train", "2.5"], "--train"),
        (["--train_objects", "0"], "--train_objects"),
        (["--train_objects", "4"], "--train_objects"),
        (["--json", "numbers.json"], "--probe"),
        (["--preview", "sheet.gif"], ".png"),
        (["--prob"], "--prob"),
        (["--out"], "--out"),
    ],
)
def test_wrong_flags_end_with_one_line(tmp_path, capsys, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    assert named in failure(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_probe_makes_the_set_prints_a_table_and_writes_the_numbers(tmp_path, capsys, tiny, monkeypatch):
    monkeypatch.setitem(TINY, "test", 10)
    synthetic.main(["--out", str(tmp_path / "set"), "--seed", "2", "--probe", "--json", str(tmp_path / "numbers.json")])
    table, numbers = capsys.readouterr().out, json.loads((tmp_path / "numbers.json").read_text())
    assert f"{100 * numbers['test']['saliency']['pointing']:.1f}" in table and "by mean colour" in table
    assert f"from silence and noise: {100 * numbers['presence_AP']['ear']:.1f}" in table
    synthetic.main(["--out", str(tmp_path / "set"), "--probe"])  # takes the set as it is, whatever its seed
    assert capsys.readouterr().out in table
    (tmp_path / "set" / "frames" / "test_000001.jpg").unlink()
    assert "test_000001.jpg" in failure(capsys, "--out", tmp_path / "set", "--probe")
    (tmp_path / "set" / "objects.json").write_text("{")
    assert "objects.json" in failure(capsys, "--out", tmp_path / "set", "--probe")


def test_preview_draws_a_sheet_and_no_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    synthetic.main(["--preview", "sheet.png"])
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    assert cv2.imread("sheet.png").shape[0] > 500


def test_generate_refuses_unknown_and_empty_splits(tmp_path):
    for counts in ({"valid": 3}, {"test": 0}):
        with pytest.raises(ValueError, match="counts"):
            synthetic.generate(tmp_path / "set", counts=counts)


def test_an_interrupted_set_is_made_anew(tmp_path):
    counts = dict.fromkeys(SPLITS, 1)
    synthetic.generate(tmp_path / "whole", counts=counts)
    synthetic.generate(tmp_path / "broken", counts=counts)
    (tmp_path / "broken" / "unfinished").touch()
    (tmp_path / "broken" / "frames" / "train_000000.jpg").write_bytes(b"half")
    assert synthetic.generate(tmp_path / "broken", counts=counts)
    for path in (tmp_path / "whole").rglob("*.*"):
        assert (tmp_path / "broken" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
