"""`prepare_data.py synthetic`: what it writes once, replaces only when told to, and refuses."""

import json
from functools import partial

import cv2
import pytest

import synthetic.generate as synthetic
import synthetic.kinds as synthetic_kinds
import synthetic.video as synthetic_video

TINY = {"train": 12, "val": 2, "test": 2, "distractor": 11, "interactive": 2, "offscreen": 6}


def ids_of(folder, split):
    return (folder / f"{split}.txt").read_text().split()


@pytest.fixture
def make(cli, monkeypatch):
    """make(flags...) runs `prepare_data.py synthetic`, by default with few images."""
    monkeypatch.setattr(synthetic, "COUNTS", dict(TINY))
    monkeypatch.setattr("synthetic.command.generate_films", partial(synthetic_video.generate_films, films=1))

    def run(*flags):
        done = cli("prepare_data", "synthetic", *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def failure(cli):
    """The one line with which the command fails; exit status 2 and nothing on the standard output."""

    def run(*flags):
        done = cli("prepare_data", "synthetic", *flags)
        lines = [line for line in done.stderr.splitlines() if "image/s" not in line and "film/s" not in line]
        assert done.returncode == 2 and len(lines) == 1 and not done.stdout
        return lines[0]

    return run


def test_the_set_is_written_once_then_there_is_nothing_to_do(tmp_path, make):
    arguments = ["--out", tmp_path / "set", "--seed", "1", "--train", "13"]
    assert "written" in make(*arguments) and len(ids_of(tmp_path / "set", "train")) == 13
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}
    assert "nothing to do" in make(*arguments)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}


def test_other_settings_are_refused_unless_forced(tmp_path, make, failure, monkeypatch):
    out = tmp_path / "set"
    make("--out", out)
    (out / "frames" / "mine.jpg").write_bytes(b"not of the set")
    assert "--force" in failure("--out", out, "--seed", 1)
    assert "--force" in failure("--out", out, "--train", 5, "--probe")
    assert "--force" in failure("--out", out, "--train_objects", 3, "--probe")
    for constant in synthetic_kinds.difficulty():
        with monkeypatch.context() as change:
            change.setattr(synthetic_kinds, constant, 0.9)
            assert "--force" in failure("--out", out), constant
    make("--out", out, "--train", "5", "--force")
    images = {path.stem for path in (out / "frames").glob("*.jpg")}
    assert {name for name in images if name.startswith("train")} == set(ids_of(out, "train")) and "mine" in images
    assert len(ids_of(out, "train")) == 5


def test_a_folder_with_other_things_is_left_alone(tmp_path, failure):
    (tmp_path / "thesis.tex").write_text("words")
    assert "--force" in failure("--out", tmp_path)
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
        (["--video", "--probe"], "--probe"),
        (["--video", "--train", "3", "--train_objects", "2"], "--train, --train_objects"),
        (["--video", "--preview", "sheet.png"], "--preview"),
        (["--preview", "sheet.gif"], ".png"),
        (["--force", "maybe"], "maybe"),
        (["--prob"], "--prob"),
        (["--out"], "--out"),
    ],
)
def test_wrong_flags_end_with_one_line(tmp_path, failure, arguments, named):
    assert named in failure("--out", tmp_path / "set", *arguments)
    assert not list(tmp_path.iterdir())


def test_probe_makes_the_set_prints_a_table_and_writes_the_numbers(tmp_path, make, failure, monkeypatch):
    monkeypatch.setitem(synthetic.COUNTS, "test", 10)
    out, path = tmp_path / "set", tmp_path / "numbers.json"
    table = make("--out", out, "--seed", "2", "--probe", "--json", path)
    numbers = json.loads(path.read_text())
    assert f"{100 * numbers['test']['saliency']['pointing']:.1f}" in table and "by mean colour" in table
    assert f"from silence and noise: {100 * numbers['presence_AP']['ear']:.1f}" in table
    assert make("--out", out, "--probe") in table  # takes the set as it is, whatever its seed
    (out / "frames" / "test_000001.jpg").unlink()
    assert "test_000001.jpg" in failure("--out", out, "--probe")
    (out / "objects.json").write_text("{")
    assert "objects.json" in failure("--out", out, "--probe")


def test_preview_draws_a_sheet_and_no_set(tmp_path, make):
    make("--out", tmp_path / "set", "--preview", tmp_path / "sheet.png")
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    assert cv2.imread(str(tmp_path / "sheet.png")).shape[0] > 500


def test_films_are_written_once_and_never_where_pairs_are(tmp_path, make, failure):
    films, pairs = tmp_path / "films", tmp_path / "pairs"
    assert "written" in make("--video", "--out", films)
    assert sorted(path.name for path in films.rglob("*.*")) == ["synthetic.json", "truth.json", "video_000000.mp4"]
    assert "nothing to do" in make("--video", "--out", films)
    assert "--force" in failure("--video", "--out", films, "--seed", 1)
    assert "written" in make("--video", "--out", films, "--seed", 1, "--force")
    make("--out", pairs)
    assert "another --out" in failure("--video", "--out", pairs, "--force")
    assert "another --out" in failure("--out", films, "--force")
    assert ids_of(pairs, "train") and (films / "truth.json").is_file()
