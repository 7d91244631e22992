"""The index over all results: what it shows, and that no name can inject anything."""

import os
import re

from film.page import write_index
from utils import write_json


def entry(folder, name, kind, **more):
    about = {"made_by": "localize.py", "kind": kind, "width": 64, "height": 48, **more}
    write_json(folder / f"{name}.json", {"about": about, "steps": [], "presence": 0.5, "complete": True})


def test_the_page_shows_films_and_images_with_links_to_their_files(tmp_path):
    (tmp_path / "sub").mkdir()
    entry(tmp_path / "sub", "film", "film", duration=2.0)
    entry(tmp_path, "photo", "image")
    write_json(tmp_path / "other.json", {"a": 1})
    for name in ("sub/film.mp4", "sub/film.png", "sub/film.csv", "photo.png"):
        (tmp_path / name).write_bytes(b"")
    text = write_index(tmp_path).read_text()
    assert '<video controls preload="metadata" src="sub/film.mp4">' in text and 'src="photo.png"' in text
    assert '<a href="sub/film.csv">csv</a>' in text and "other" not in text and "2 results" in text
    assert not re.search(r"https?:|src=\"//|@import|<script", text)


def test_names_cannot_inject(tmp_path):
    name = '"><img src=x onerror=alert(1)>&#?%'
    entry(tmp_path, name, "film", duration=1.0)
    (tmp_path / f"{name}.mp4").write_bytes(b"")
    text = write_index(tmp_path).read_text()
    assert "<img src=x" not in text and "%22%3E%3Cimg%20src%3Dx" in text and "&lt;img" in text


def test_a_name_that_is_no_utf8_is_shown_and_linked_by_its_bytes(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    entry(tmp_path, name, "film", duration=1.0)
    (tmp_path / f"{name}.mp4").write_bytes(b"")
    text = write_index(tmp_path).read_text(encoding="utf-8")
    assert 'src="caf%E9.mp4"' in text and "caf\\udce9</h2>" in text
