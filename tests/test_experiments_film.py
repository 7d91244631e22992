"""The film that ends the demonstration: a panel per model, with the film's sound, and a small animated picture."""

import pytest
from PIL import Image

import media
from experiments.film import GIF_SIDE, draw_film


@pytest.mark.slow
def test_the_film_has_a_panel_per_model_and_its_sound(film_root, checkpoint, tmp_path):
    clip = next((film_root / "clips").glob("*.mp4"))
    models = {"one": checkpoint, "other": checkpoint}
    draw_film(clip, models, tmp_path / "film.mp4", tmp_path / "film.gif")
    with media.open(tmp_path / "film.mp4") as film:
        assert film.size == (3 * 256, 256) and film.has_sound and abs(film.duration - 10) < 0.3
    with Image.open(tmp_path / "film.gif") as picture:
        assert picture.size == (3 * GIF_SIDE, GIF_SIDE) and picture.n_frames > 20
    assert (tmp_path / "film.gif").stat().st_size < 2e6
