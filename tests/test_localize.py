"""The command: images, films and folders of them, what is bad, what is done already, and how it is stopped."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time

import moving_films as films
import pytest
import soundfile
from conftest import ROOT, files_up_to
from PIL import Image

import film.jobs as jobs
import media
from film.tables import Rows, read_about


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two films, a photo with its sound, and what is none of these."""
    root = tmp_path_factory.mktemp("folder")
    films.write_film(root / "film.mp4", 1)
    (root / "sub").mkdir()
    films.write_film(root / "sub" / "film.mov", 0.6, size=(48, 64))
    Image.fromarray(films.moving_square(1, (80, 60))).save(root / "photo.jpg")
    soundfile.write(root / "photo.wav", films.tone(0, 1), 16000)
    (root / "empty.mp4").write_bytes(b"")
    (root / "text.mp4").write_text("no film at all\n" * 50)
    (root / "cut.mp4").write_bytes((root / "film.mp4").read_bytes()[:3000])
    films.write_film(root / "mute.mp4", 1, sound=None)
    films.write_film(root / "sound.m4a", 1, picture=None)
    (root / "gone.mp4").symlink_to("nowhere.mp4")
    return root


BAD = {"empty.mp4", "text.mp4", "cut.mp4", "mute.mp4", "sound.m4a", "gone.mp4"}


@pytest.fixture
def localize(cli, checkpoint, tmp_path):
    def run(*arguments, out=None):
        where = "--checkpoint", checkpoint, "--out", out or tmp_path / "out", "--gpu", "cpu", "--workers", 1
        return cli("localize", *arguments, *where)

    return run


def test_a_folder_is_done_but_for_what_is_bad_which_is_named_and_a_second_run_does_nothing(localize, folder, tmp_path):
    done = localize(folder)
    assert done.returncode == 0, done.stderr
    assert "3 made, 0 there already, 6 failed" in done.stdout and "no universal threshold" in done.stdout
    out = tmp_path / "out"
    for name in ("film.mp4", "film.csv", "film.json", "film.png", "sub/film.mp4", "photo.png", "photo.csv"):
        assert (out / name).stat().st_size > 0
    with open(out / "failures.csv") as file:
        failures = {row["file"].rpartition("/")[2]: row["reason"] for row in csv.DictReader(file)}
    assert failures.keys() == BAD and all(failures.values())
    assert "sound" in failures["mute.mp4"] and "image" in failures["sound.m4a"] and "empty" in failures["empty.mp4"]
    assert failures["gone.mp4"] == "No such file or directory"
    assert not [path for path in out.rglob("*") if path.stem.split("_")[0] in ("empty", "text", "cut", "mute", "sound")]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    again = localize(folder)
    assert "0 made, 3 there already, 6 failed" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    other = localize(folder / "film.mp4", "--show", "relative")
    assert other.returncode == 0 and (out / "film.mp4").stat().st_mtime_ns > before[out / "film.mp4"]
    os.utime(folder / "sub" / "film.mov", (1, 1))
    assert "2 made, 1 there already, 6 failed" in localize(folder, "--show", "relative").stdout


@pytest.mark.parametrize("name", sorted(BAD))
def test_what_is_bad_is_one_line_and_status_2(name, localize, folder):
    done = localize(folder / name)
    assert done.returncode == 2 and name in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_an_image_needs_a_sound(localize, folder, tmp_path):
    alone = shutil.copy(folder / "photo.jpg", tmp_path / "alone.jpg")
    done = localize(alone)
    assert done.returncode == 2 and "--sound FILE" in done.stderr
    done = localize(folder / "photo.jpg", "--sound", folder / "film.mp4")
    assert done.returncode == 0 and read_about(tmp_path / "out" / "photo.json")["complete"]
    done = localize(folder / "photo.jpg", "--sound", folder / "film.mp4")
    assert done.returncode == 0 and "0 made, 1 there already" in done.stdout
    done = localize(folder / "photo.jpg", "--sound", folder / "text.mp4")
    assert done.returncode == 2 and "text.mp4" in done.stderr
    done = localize(folder / "mute.mp4", "--sound", folder / "photo.wav")
    assert done.returncode == 0 and (tmp_path / "out" / "mute.mp4").is_file()


def test_a_film_of_a_millisecond_and_a_name_that_is_no_utf8(localize, tmp_path):
    film = films.write_film(tmp_path / "film.mp4", 0.001, fps=1000, times=[0.0])
    done = localize(film.rename(tmp_path / os.fsdecode(b"caf\xe9.mp4")))
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "out" / os.fsdecode(b"caf\xe9.csv")).read_text().splitlines()
    assert len(rows) == 2 and rows[1].startswith("0.0,") and (tmp_path / "out" / "index.html").is_file()


def test_files_of_others_are_not_replaced(localize, folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "film.csv").write_text("mine")
    done = localize(folder / "film.mp4")
    assert done.returncode == 2 and "not made by localize.py" in done.stderr
    assert (tmp_path / "out" / "film.csv").read_text() == "mine" and not (tmp_path / "out" / "film.mp4").exists()


def test_a_decoder_that_fails_costs_its_file_only(localize, folder, tmp_path, monkeypatch):
    render = jobs.render_clip

    def fail(localizer, film, *rest):
        if film.suffix == ".mp4":
            raise RuntimeError("out of\nmemory")
        return render(localizer, film, *rest)

    monkeypatch.setattr(jobs, "render_clip", fail)
    done = localize(folder / "sub", folder / "film.mp4")
    assert done.returncode == 2 and "film.mp4: RuntimeError: out of memory" in done.stderr
    assert (tmp_path / "out" / "film.mov").parent.is_dir() and "1 made" in done.stdout


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_what_was_made(localize, folder, tmp_path):
    assert localize(folder / "photo.jpg", "--sound", folder / "photo.wav").returncode == 0
    photo = (tmp_path / "out" / "photo.png").read_bytes()
    with files_up_to(4_000):  # room for a row, none for a film
        done = localize(folder / "sub", folder / "film.mp4")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "cannot be written (File too large)" in done.stderr
    out = tmp_path / "out"
    assert (out / "photo.png").read_bytes() == photo
    assert not list(out.rglob("film*")), "nothing half made is left"


@pytest.mark.parametrize("script", ["localize.py", "web/app.py", "experiments/benchmark.py"])
def test_waiting_threads_are_told_to_soon_leave_the_processor_before_torch_reads_it(script):
    """A film is drawn beside the model: on two cores, threads that spin take twice the time."""
    lines = (ROOT / script).read_text().splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    told = next(i for i, line in enumerate(lines) if line.startswith('os.environ.setdefault("GOMP_SPINCOUNT"'))
    assert imports[0] == "import os" and told < lines.index(imports[1])


def start(checkpoint, *arguments):
    command = [sys.executable, "localize.py", *map(str, arguments), "--checkpoint", str(checkpoint), "--gpu", "cpu"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)


def test_ctrl_c_leaves_a_film_that_plays_and_the_next_run_makes_it_whole(localize, folder, tmp_path, monkeypatch):
    film, out, add = films.write_film(tmp_path / "long.mp4", 6), tmp_path / "out", Rows.add

    def interrupt(rows, step):
        add(rows, step)
        if rows.count == 12:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "add", interrupt)
        done = localize(film, folder / "film.mp4")
    assert done.returncode == 130 and "interrupted" in done.stderr
    assert read_about(out / "long.json")["complete"] is False and not (out / "film.mp4").exists()
    with media.open(out / "long.mp4") as opened:
        assert opened.duration == pytest.approx(1.2, abs=0.05) and opened.frame_at(1).image.any()
        assert len(opened.sound()) == pytest.approx(19200, abs=700)
    assert 'src="long.mp4"' in (out / "index.html").read_text()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert "2 made" in localize(film, folder / "film.mp4").stdout and read_about(out / "long.json")["complete"]


@pytest.mark.slow
def test_several_processes_give_the_same_and_are_stopped_together(checkpoint, folder, tmp_path, localize):
    """Told by a signal to the first process alone, as a scheduler sends it."""
    process = start(checkpoint, folder, "--out", tmp_path / "two", "--workers", 2)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and "3 made, 0 there already, 6 failed" in said, errors
    localize(folder, out=tmp_path / "one")
    for name in ("film.csv", "sub/film.csv", "photo.csv", "failures.csv"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text(), name
    for i in range(3):
        films.write_film(tmp_path / "long" / f"{i}.mp4", 300, fps=2) if i else (tmp_path / "long").mkdir()
    process = start(checkpoint, tmp_path / "long", "--out", tmp_path / "cut", "--workers", 2)
    wait_for(lambda: len([*(tmp_path / "cut").glob(".*.csv")]) == 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors
    for i in (1, 2):
        assert read_about(tmp_path / "cut" / f"{i}.json")["complete"] is False
        with media.open(tmp_path / "cut" / f"{i}.mp4") as opened:
            assert opened.frame_at(0).image.any()
