"""What the page offers to try without files of one's own: a film, an image, and the sounds of both its objects."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from audio_io import write_audio
from synthetic.generate import make_image
from synthetic.kinds import make_sound
from synthetic.video import Task, write_film

KINDS = ("bird", "car")
SEED, FILM = 4, 1


class Examples(NamedTuple):
    film: Path
    image: Path
    sounds: tuple[Path, Path]


def make_examples(folder: Path) -> Examples:
    """Draw them, from a seed, into a folder that is there."""
    film = folder / "clips" / f"{write_film(Task(folder, SEED, FILM))['id']}.mp4"
    rng = np.random.default_rng(SEED)
    pixels, _ = make_image(list(KINDS), rng)
    image = folder / "bird_and_car.png"
    Image.fromarray(pixels).save(image)
    sounds = []
    for kind in KINDS:
        sounds.append(folder / f"{kind}.wav")
        write_audio(sounds[-1], sum(make_sound(kind, rng)))
    return Examples(film, image, tuple(sounds))
