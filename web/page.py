"""The page of `make web`: where a sound comes from, in a clip, and in an image under several sounds."""

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

import media
from film.localizer import Localizer, Step
from film.render import SHOWS, Look, Outputs, heat_tokens, paint, render_clip
from utils import UserError
from web.examples import Examples
from web.models import Models

LONGEST = 300.0  # seconds of a film
LONGEST_SOUND = 60.0
PLACES = "Model", "Beside it"  # of the two maps of one image
PRIVATE = {"api_visibility": "private"}  # no interface for programs
POLL_SECONDS = 0.2
KEPT_SECONDS = 3600  # what was made is removed after an hour, and when the page ends
NOTHING = None, gr.update(value=None, visible=False), gr.update(value=None, visible=False)  # film, strip, files
TITLE = "Where does the sound come from?"
INTRO = """# Where does the sound come from?
Heat shows what the model takes for the source of what is heard. Everything stays on this computer."""
THEME = gr.themes.Base(
    primary_hue="orange",
    neutral_hue="stone",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
    radius_size="lg",
)
CSS = """
.gradio-container { max-width: 76rem !important; margin: 0 auto !important; }
#intro h1 { font-size: 1.9rem; letter-spacing: -.02em; margin-bottom: .2rem; }
#intro p { color: var(--neutral-600) !important; }
.note p { color: var(--neutral-600) !important; }
.dark #intro p { color: var(--neutral-300) !important; }
.dark .note p { color: var(--neutral-300) !important; }
#heat video { max-height: 26rem; }
#progress { padding: 0; }
#progress progress { width: 100%; height: .5rem; appearance: none; border: 0; background: var(--border-color-primary); }
#progress progress::-webkit-progress-bar { background: var(--border-color-primary); }
#progress progress::-webkit-progress-value { background: var(--color-accent); }
#progress progress::-moz-progress-bar { background: var(--color-accent); }
#maps img { width: 100%; height: 100%; object-fit: contain !important; }
footer { display: none !important; }
"""
HEAD = '<meta name="referrer" content="no-referrer">'


def message(error: Exception) -> gr.Error:
    """An error for people: no path of this computer, no traceback."""
    if isinstance(error, media.MediaError):
        text = error.reason
    elif isinstance(error, UserError):
        text = str(error)
    else:
        text = "this could not be worked on"
    return gr.Error(text[:1].upper() + text[1:], duration=None, print_exception=False)


# ---------------------------------------------------------------- a clip


def check_film(path: str) -> float:
    """The length of an uploaded film in s. UserError for what is none, or too long."""
    with media.open(path) as film:
        if not film.has_image or not film.has_sound:
            raise UserError(f"this file has no {'sound' if film.has_image else 'image'}: a film with both is needed")
        if film.duration > LONGEST:
            raise UserError(f"this film lasts {film.duration:.0f} s: at most {LONGEST:.0f} s here, longer ones go "
                            "through localize.py")  # fmt: skip
        return film.duration


def run_clip(models: Models, work: Path, path: str | None, name: str, show: str) -> Iterator[tuple]:
    """How far it is, then heat-map film, strip with the curve of presence, and files; ends early when it is closed."""
    if not path:
        raise gr.Error("Choose a clip first, or take the built-in one", duration=None, print_exception=False)
    try:
        length, localizer = check_film(path), models.load(name)
    except UserError as error:
        raise message(error) from None
    clear_old(work)
    folder = Path(tempfile.mkdtemp(dir=work))
    outputs, stop, count, failed = Outputs(folder / "heat_map"), threading.Event(), [0], []

    def stopped() -> bool:
        count[0] += 1
        return stop.is_set()

    def render() -> None:
        try:
            look = Look(show if show in SHOWS else SHOWS[0])
            render_clip(localizer, Path(path), None, outputs, look, {}, stopped, hide_bar=True)
        except Exception as error:  # told to the user below, whatever it is
            failed.append(error)

    thread = threading.Thread(target=render, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            yield bar(min(count[0] / localizer.map_fps, length), length), *NOTHING
            time.sleep(POLL_SECONDS)
    finally:
        stop.set()
        thread.join()
    if failed:
        yield "", *NOTHING
        raise message(failed[0])
    film, strip, table = (str(outputs.file(suffix)) for suffix in (".mp4", ".png", ".csv"))
    yield "", film, gr.update(value=strip, visible=True), gr.update(value=[film, table], visible=True)


def bar(done: float, length: float) -> str:
    """HTML of how far a film is, in s."""
    return (
        f'<progress max="1" value="{done / max(length, 0.1):.3f}"></progress>'
        f"<small>{done:.0f} of {length:.0f} s of the film</small>"
    )


def clear_old(work: Path) -> None:
    """Remove what was made more than an hour ago."""
    for path in work.iterdir():
        if path.is_dir() and time.time() - path.stat().st_mtime > KEPT_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------- an image under several sounds


def ask(localizer: Localizer, image: np.ndarray, sound: str) -> Step:
    """UserError for a sound that cannot be read, or is too long."""
    with media.open(sound) as file:
        if not file.has_sound:
            raise UserError("this file has no sound")
        if file.duration > LONGEST_SOUND:
            raise UserError(f"this sound lasts {file.duration:.0f} s: at most {LONGEST_SOUND:.0f} s here")
    return localizer.image(image, sound)


def run_image(models: Models, image: Any, first: Any, second: Any, names: tuple[str, str]) -> dict[str, list]:
    """{sound: [(painted image, caption) of either model]} of the sounds that are given."""
    if image is None or not (first or second):
        raise gr.Error("An image and at least one sound are needed", duration=None, print_exception=False)
    try:
        found = {}
        for label, sound in (("A", first), ("B", second)):
            if sound:
                steps = [(name, ask(models.load(name), image, sound)) for name in names]
                found[label] = [
                    (paint(step.image, heat_tokens(step, "relative")), f"{name}: presence {step.presence:.2f}")
                    for name, step in steps
                ]
        return found
    except UserError as error:
        raise message(error) from None


def choose(found: dict[str, list] | None, label: str) -> list:
    """What both places show: the images painted under a sound, labelled; empty before anything is found."""
    drawn = (found or {}).get(label) or [(None, label) for label in PLACES]
    return [gr.update(value=image, label=caption) for image, caption in drawn]


# ---------------------------------------------------------------- the page


def clip_tab(models: Models, work: Path, examples: Examples) -> None:
    with gr.Row():
        with gr.Column(scale=2):
            film = gr.File(label=f"A film with its sound, at most {LONGEST:.0f} s", elem_id="film", height=170)
            model = gr.Dropdown(models.names, value=models.names[0], label="Model", elem_id="clip-model")
            show = gr.Radio(
                [("Dark where nothing in view sounds", "share"), ("Stretched to each map's range", "relative")],
                value="share", label="Heat",
            )  # fmt: skip
            with gr.Row():
                run = gr.Button("Show me", variant="primary", elem_id="run-clip")
                cancel = gr.Button("Cancel", elem_id="cancel-clip")
            example = gr.Button("Take the built-in film", size="sm", elem_id="example-clip")
            note = gr.Markdown(models.describe(models.names[0]), elem_classes="note", elem_id="clip-note")
        with gr.Column(scale=3):
            progress = gr.HTML("", elem_id="progress")
            shown = gr.Video(label="Heat map", interactive=False, elem_id="heat", autoplay=False, buttons=["download"])
            strip = gr.Image(label="Presence over time", interactive=False, elem_id="strip", type="filepath",
                             format="png", buttons=["fullscreen"], visible=False)  # fmt: skip
            files = gr.File(label="To take away: film and table", interactive=False, file_count="multiple",
                            elem_id="clip-files", visible=False)  # fmt: skip

    def work_on(path, name, chosen):
        yield from run_clip(models, work, path, name, chosen)

    event = run.click(work_on, [film, model, show], [progress, shown, strip, files], concurrency_id="model",
                      show_progress_on=shown, **PRIVATE)  # fmt: skip
    ended = cancel.click(None, cancels=[event], **PRIVATE)
    ended.then(lambda: "", None, progress, queue=False, **PRIVATE)
    example.click(lambda: str(examples.film), None, film, queue=False, **PRIVATE)
    model.change(lambda name: describe(models, name), model, note, queue=False, **PRIVATE)


def image_tab(models: Models, examples: Examples) -> None:
    other = next((name for name in models.names if "listen" in name), models.names[-1])
    with gr.Row():
        with gr.Column(scale=2):
            image = gr.Image(
                label="An image", type="numpy", sources=["upload", "clipboard"], elem_id="image", height=260
            )
            sounds = [
                gr.Audio(
                    label=f"Sound {label}",
                    type="filepath",
                    sources=["upload", "microphone"],
                    editable=False,
                    elem_id=f"sound-{label}",
                    buttons=[],
                )
                for label in "AB"
            ]
            names = [
                gr.Dropdown(models.names, value=value, label=label)
                for value, label in zip((models.names[0], other), PLACES, strict=True)
            ]
            run = gr.Button("Show me", variant="primary", elem_id="run-image")
            example = gr.Button("Take the built-in image and sounds", size="sm", elem_id="example-image")
        with gr.Column(scale=3):
            which = gr.Radio(["A", "B"], value="A", label="Sound under the image: swap it", elem_id="which")
            with gr.Row(elem_id="maps"):
                maps = [gr.Image(label=label, interactive=False, buttons=["fullscreen"], min_width=260, height=320)
                        for label in PLACES]  # fmt: skip
            gr.Markdown(
                "A map that follows the sound moves when the sound is swapped; one that shows what is "
                "salient stays. Heat is stretched to each map's own range.",
                elem_classes="note",
            )
    found = gr.State(None)

    def work_on(pixels, first, second, one, two, label):
        painted = run_image(models, pixels, first, second, (one, two))
        label = label if label in painted else next(iter(painted))
        return painted, label, *choose(painted, label)

    run.click(work_on, [image, *sounds, *names, which], [found, which, *maps], concurrency_id="model", **PRIVATE)
    which.change(choose, [found, which], maps, queue=False, **PRIVATE)
    example.click(lambda: (str(examples.image), *map(str, examples.sounds)), None, [image, *sounds], queue=False,
                  **PRIVATE)  # fmt: skip


def describe(models: Models, name: str) -> str:
    try:
        return models.describe(name)
    except UserError as error:
        raise message(error) from None


def build_page(models: Models, work: Path, examples: Examples) -> gr.Blocks:
    """Both tabs; one model runs at a time, the others wait."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as page:
        gr.Markdown(INTRO, elem_id="intro")
        with gr.Tab("Clip"):
            clip_tab(models, work, examples)
        with gr.Tab("Image and sounds"):
            image_tab(models, examples)
    return page.queue(max_size=8, default_concurrency_limit=1, api_open=False)
