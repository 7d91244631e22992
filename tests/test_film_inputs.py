"""Which files are inputs, which sounds belong to them, and what their outputs are called."""

import os
from pathlib import Path

import pytest

from film.inputs import find_tasks, name_outputs
from utils import UserError, write_json, write_text


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def test_a_folder_is_searched_but_for_hidden_files_and_the_outputs(tmp_path):
    root = touch(tmp_path / "in", "b.mp4", "sub/a.mov", ".hidden.mp4", ".git/c.mp4", "out/b.mp4", "notes.txt")
    tasks = find_tasks([root], root / "out", None)
    assert [str(task.source.relative_to(root)) for task in tasks] == ["b.mp4", "notes.txt", "sub/a.mov"]
    assert [str(task.stem.relative_to(root / "out")) for task in tasks] == ["b", "notes", "sub/a"]
    assert not any(task.asked_for for task in tasks)


def test_a_file_that_is_named_twice_is_one_input_and_a_sound_that_is_not_there_is_told_once(tmp_path, monkeypatch):
    monkeypatch.chdir(touch(tmp_path, "in/a.mp4", "in/b.mp4"))
    given = [Path("in"), Path("in/a.mp4"), tmp_path / "in" / "a.mp4", Path("in/../in/a.mp4")]
    tasks = find_tasks(given, Path("out"), None)
    assert [(task.source.name, task.stem.name, task.asked_for) for task in tasks] == [
        ("a.mp4", "a", True),
        ("b.mp4", "b", False),
    ]
    with pytest.raises(UserError, match=r"no file absent\.wav for --sound"):
        find_tasks(given, Path("out"), Path("absent.wav"))


def test_what_an_earlier_run_made_beside_its_inputs_is_no_input(tmp_path):
    root = touch(tmp_path, "sub/photo.jpg", "sub/photo.wav", "sub/photo.png", "sub/photo.csv", "index.html", "x.json")
    before = find_tasks([root], root / "out", None)
    about = {"made_by": "localize.py", "kind": "image"}
    write_json(root / "sub" / "photo.json", {"about": about, "steps": []})
    (other, task) = find_tasks([root], root / "out", None)
    assert task.source == root / "sub" / "photo.jpg" and task.stem == root / "out" / "sub" / "photo"
    assert other.source == root / "x.json" and len(before) == 4
    assert find_tasks([root / "sub" / "photo.png"], root / "out", None)[0].asked_for


def test_an_image_takes_the_sound_of_its_name_beside_it_or_in_the_folder_of_sounds(tmp_path):
    root = touch(tmp_path, "photo.jpg", "photo.WAV", "alone.png", "only.mp3", "frames/x.jpg", "audio/x.flac")
    tasks = {task.source.name: task for task in find_tasks([root], tmp_path / "out", None)}
    assert tasks.keys() == {"photo.jpg", "alone.png", "only.mp3", "x.jpg"}
    assert tasks["photo.jpg"].sound == root / "photo.WAV" and tasks["x.jpg"].sound == root / "audio" / "x.flac"
    assert tasks["alone.png"].sound is None
    touch(tmp_path, "film.mp4", "film.wav")
    named = [root / "photo.jpg", root / "frames" / "x.jpg", root / "film.mp4"]
    sounds = [task.sound for task in find_tasks(named, tmp_path / "out", None)]
    assert sounds == [root / "photo.WAV", root / "audio" / "x.flac", None], "a film has a sound of its own"
    given = find_tasks([root / "photo.jpg"], tmp_path / "out", root / "only.mp3")
    assert [task.sound for task in given] == [root / "only.mp3"] and given[0].asked_for


def test_an_input_that_is_not_there_and_an_output_over_an_input_are_refused(tmp_path):
    root = touch(tmp_path, "a.mp4", "b_mask.mp4", "b.avi")
    with pytest.raises(UserError, match=r"no file or folder .*absent"):
        find_tasks([root / "absent"], root / "out", None)
    (root / "empty" / "below").mkdir(parents=True)
    with pytest.raises(UserError, match=r"empty holds no files"):
        find_tasks([root / "a.mp4", root / "empty"], root / "out", None)
    with pytest.raises(UserError, match=r"would replace the input .*a\.mp4"):
        find_tasks([root / "a.mp4"], root, None)
    with pytest.raises(UserError, match="would replace the input"):
        find_tasks([root], root, None)


def test_no_two_inputs_write_the_same_file():
    names = ["a.mp4", "a.mov", "A.avi", "a_mov.mkv", "sub/a.mp4", "b.png", "b_mask.png", "failures.mp4", "c", "c.d.mp4"]
    stems = name_outputs([Path(name) for name in names])
    written = [f"{stem}{suffix}".casefold() for stem in stems for suffix in (".png", "_mask.png", ".csv")]
    assert len(set(written)) == len(written) and "failures.csv" not in written
    assert [str(stem) for stem in stems][4:6] == ["sub/a", "b"] and str(stems[9]) == "c.d"
    assert name_outputs([Path("x.mp4"), Path("y.mp4")]) == [Path("x"), Path("y")]


@pytest.mark.parametrize("letter", ["y", "夏", os.fsdecode(b"\xe9")])
def test_names_of_any_length_leave_room_for_what_is_added_to_them(letter, tmp_path):
    longest = letter * (250 // len(os.fsencode(letter)))
    root = touch(tmp_path / "in", f"{longest}.mp4", f"{longest[:-1]}.mp4", "short.mp4")
    tasks = find_tasks([root], tmp_path / "out", None)
    (tmp_path / "out").mkdir()
    for path in [path for task in tasks for path in task.files()]:
        write_text(path, "")
    assert len({task.stem for task in tasks}) == 3 and tmp_path / "out" / "short" in {task.stem for task in tasks}
