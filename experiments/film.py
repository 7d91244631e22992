"""A built-in film under several models side by side: an MP4 with its sound, and a small animated picture."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image

from film.localizer import Localizer, opened
from film.render import Track, heat_tokens, paint
from film.writer import FilmWriter
from reports.pictures import write_label
from utils import atomic_path

GIF_EVERY, GIF_SIDE, GIF_COLOURS = 2, 160, 64  # of the steps, pixels per model, colours: under 2 MB


def draw_film(film: Path, checkpoints: Mapping[str, Path], target: Path, gif: Path | None = None) -> None:
    """One panel for the film and one for each model, {label: checkpoint}; ten frames per second."""
    models = {label: Localizer(path) for label, path in checkpoints.items()}
    steps = {label: list(model.clip(film)) for label, model in models.items()}
    small = []
    with ExitStack() as stack:
        shown, heard = stack.enter_context(opened(film))
        temporary, track = stack.enter_context(atomic_path(target)), Track(heard)
        (width, height), count = shown.size, 1 + len(models)
        writer = FilmWriter(temporary, (count * width, height), 10.0, track.channels)
        stack.callback(writer.abandon)
        for i, own in enumerate(zip(*steps.values(), strict=True)):
            panels = [own[0].image, *(paint(step.image, heat_tokens(step, "share")) for step in own)]
            labels = ["film", *models]
            frame = np.hstack([write_label(panel, label) for panel, label in zip(panels, labels, strict=True)])
            writer.frame(own[0].time, frame)
            track.until(own[0].time + 0.1, writer)
            if i % GIF_EVERY == 0:
                small.append(Image.fromarray(frame).resize((count * GIF_SIDE, round(GIF_SIDE * height / width))))
        writer.close(shown.duration)
    if gif:
        flat = [image.quantize(GIF_COLOURS) for image in small]
        with atomic_path(gif) as temporary:
            flat[0].save(
                temporary, format="GIF", save_all=True, append_images=flat[1:], duration=100 * GIF_EVERY, loop=0
            )
