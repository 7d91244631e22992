"""One test result as a static page: figures with their intervals, the success curve, every sample with its audio.

    gallery = Gallery(folder)
    gallery.add(id, image, truth, maps, audio)  # once per sample, while its maps are there
    gallery.finish(results, rows)               # folder/report.html; its images and audio in folder/report_files/

The page needs neither server nor network. `page.html` is its layout and receives everything as JSON.
"""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from audio_io import crop_or_tile, load_audio, num_samples, write_audio
from reports.harder import blocks
from reports.pictures import draw_truth, overlay
from scoring.metrics import RULES, success_steps
from scoring.negatives import NEGATIVES
from utils import as_user_error, strict_json, write_text, writing

PAGE, FILES = "report.html", "report_files"
TEMPLATE = Path(__file__).with_name("page.html")
ENDS = tuple(f"_{kind}" for kind in NEGATIVES)  # of a map that was asked with negative audio
SHOWN_BY_DEFAULT = ("AUD", "AUD_share", "IQR")
JPEG_QUALITY = 82
SCORES = (*(f"iou{suffix}" for suffix in RULES.values()), "average_precision", "pointing")  # of a sample, per map

Files = Mapping[str, tuple[str, str | None]]  # id: names of its strip and of its audio, None where it has none


class Gallery:
    """Draws samples one by one; the page and its files appear only at `finish`.

    folder: where the page goes; maps: names of those to draw, see `shown_maps`;
    seconds: length of audio that the model hears. A run that breaks off leaves an older page and its files untouched.
    """

    def __init__(self, folder: Path, maps: Sequence[str] | None = None, seconds: float = 5.0) -> None:
        self.folder, self.maps, self.seconds = Path(folder), maps, seconds
        self.shown: list[str] = []
        self.wide = 1.0  # width of an image by its height: 2 where two stand side by side
        self.files: dict[str, tuple[str, str | None]] = {}
        self.written: list[Path] = []
        self.draft = self.folder / f"{FILES}.part"
        shutil.rmtree(self.draft, ignore_errors=True)
        self.draft.mkdir(parents=True)

    def add(
        self,
        id: str,
        image: np.ndarray,
        truth: np.ndarray,
        maps: Mapping[str, np.ndarray],
        audio: Path | np.ndarray | None,
    ) -> None:
        """Draw one sample: image (H, W, 3) uint8 of any shape, truth and every map (224, 224) in 0..1.

        audio: an audio file, or (samples,) at 16 kHz as heard; a stored spectrogram (.npy) or None cannot be played.
        ValueError for an id that was there before or a map that is missing, UserError for audio that cannot be decoded.
        """
        if id in self.files:
            raise ValueError(f"{id} is in the gallery already")
        self.shown, self.wide = self.shown or shown_maps(maps, self.maps), truth.shape[1] / truth.shape[0]
        name = f"{len(self.files):05d}"  # an id may hold anything, a file name may not
        strip = Image.fromarray(sample_strip(image, truth, {m: maps[m] for m in self.shown}))
        with writing(self.draft / f"{name}.jpg"):
            strip.save(self.draft / f"{name}.jpg", quality=JPEG_QUALITY)
        self.files[id] = (f"{name}.jpg", self._write_audio(name, audio))

    def _write_audio(self, name: str, audio: Path | np.ndarray | None) -> str | None:
        if audio is None or (not isinstance(audio, np.ndarray) and Path(audio).suffix == ".npy"):
            return None
        with as_user_error(ValueError):
            heard = audio if isinstance(audio, np.ndarray) else load_audio(audio)
            heard = crop_or_tile(heard, num_samples(self.seconds))
        kind = audio_format()
        name = f"{name}.{kind.lower()}"
        write_audio(self.draft / name, heard, kind)
        return name

    def finish(self, results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Path:
        """Write the page; it and its files, which `written` then names, replace older ones of the same names.

        results, rows: see `page_data`. The old page is removed first, so that a page never shows files of two runs.
        """
        page, files = self.folder / PAGE, self.folder / FILES
        write_page(results, rows, self.draft / PAGE, self.shown, self.files, self.wide)
        before = page.read_text(encoding="utf-8", errors="ignore") if page.is_file() else ""
        page.unlink(missing_ok=True)
        files.mkdir(exist_ok=True)
        for file in list(files.iterdir()):
            if f'"{file.name}"' in before:  # of the old page, and nobody else's
                file.unlink()
        drawn = [file for file in self.draft.iterdir() if file.name != PAGE]
        for file in drawn:
            os.replace(file, files / file.name)
        os.replace(self.draft / PAGE, page)
        self.draft.rmdir()
        self.written = [page, *(files / file.name for file in drawn)]
        return page


def shown_maps(given: Mapping[str, Any], wanted: Sequence[str] | None = None) -> list[str]:
    """Which maps a gallery draws: the wanted ones, else AUD, AUD_share, IQR as far as given, else the first two."""
    if missing := [name for name in wanted or () if name not in given]:
        raise ValueError(f"no map {', '.join(missing)} to draw: there are {', '.join(given)}")
    plain = [name for name in given if not name.endswith(ENDS)]
    own = list(wanted or [name for name in SHOWN_BY_DEFAULT if name in given] or plain[:2])
    asked = {name: [f"{name}{end}" for end in ENDS if f"{name}{end}" in given] for name in own}
    return own if wanted else [tile for name in own for tile in (name, *asked[name])]


def sample_strip(image: np.ndarray, truth: np.ndarray, maps: Mapping[str, np.ndarray]) -> np.ndarray:
    """Side by side the image and each map over it, all with the outline of G.

    image (H, W, 3) uint8, squeezed to the size of truth and maps, (224, 224) in 0..1, as the model sees it ->
    (224, 224 (1 + maps), 3) uint8.
    """
    square = np.asarray(Image.fromarray(image).resize(truth.shape[::-1], Image.Resampling.BICUBIC))
    return np.hstack([draw_truth(tile, truth) for tile in (square, *(overlay(square, heat) for heat in maps.values()))])


@cache
def audio_format() -> str:
    """MP3 where libsndfile writes it (since 1.1), else WAV of 16 bits, eight times as large; browsers play both."""
    return "MP3" if "MP3" in soundfile.available_formats() else "WAV"


# ---------------------------------------------------------------- the page


def write_page(
    results: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    shown: Sequence[str],
    files: Files,
    wide: float = 1.0,
) -> None:
    """Write the page of `page_data` to `path`, whole or not at all; the files are in report_files/ beside it."""
    data = strict_json(page_data(results, rows, shown, files, wide)).replace("<", "\\u003c")  # no </script> in any text
    write_text(path, TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", data, 1))


def page_data(
    results: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    shown: Sequence[str],
    files: Files,
    wide: float = 1.0,
) -> dict[str, Any]:
    """The content of the page, as one value that JSON can hold.

    results: figures of a set as `test_model.py` writes them to results.json, fractions of 1 or undefined; rows: one
    dict per sample with id, class, area (pixels of G), confidence and, per map, MAP_iou, MAP_iou_half,
    MAP_iou_adaptive, MAP_average_precision, MAP_pointing as far as known; shown: the maps on the strips, of which
    those of negative audio have no scores but MAP_lit_NEGATIVE; wide: width of an image by its height. ValueError for
    no rows, and where rows and files are not of the same samples.
    """
    if not rows:
        raise ValueError("no sample to report on")
    if strange := {row["id"] for row in rows} ^ set(files):
        raise ValueError(f"{len(strange)} samples have a row or an image, but not both, {min(strange)!r} among them")
    scores = {
        name: {score: _column(rows, f"{name}_{score}") for score in SCORES if f"{name}_{score}" in rows[0]}
        for name in results.get("maps", {})
    }
    return {
        "results": results,
        "shown": shown,
        "folder": FILES,
        "wide": wide,
        "harder": [block._asdict() for block in blocks(results)],
        "curves": {
            rule: {name: success_curve(own["iou" + suffix]) for name, own in scores.items() if "iou" + suffix in own}
            for rule, suffix in RULES.items()
        },
        "samples": {
            **{key: [row.get(key) for row in rows] for key in ("id", "class", "area")},
            "confidence": _per_ten_thousand(_column(rows, "confidence")),
            "picture": [files[row["id"]][0] for row in rows],
            "sound": [files[row["id"]][1] for row in rows],
            "maps": {
                name: {score: _per_ten_thousand(values) for score, values in own.items()}
                for name, own in scores.items()
            },
            "lit": {name: _per_ten_thousand(_column(rows, key)) for name in shown if (key := _lit(name)) in rows[0]},
        },
    }


def _lit(name: str) -> str:
    """The column that says how much of a map is lit: of NAME_silence it is NAME_lit_silence, of NAME NAME_lit_own."""
    kind = next((kind for kind in NEGATIVES if name.endswith(f"_{kind}")), None)
    return f"{name.removesuffix(f'_{kind}')}_lit_{kind}" if kind else f"{name}_lit_own"


def success_curve(ious: np.ndarray) -> list[float]:
    """(N,) IoUs -> the share that reaches each of 0, 0.05 ... 1; an undefined one reaches none but counts."""
    return success_steps(ious).mean(0).tolist()


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """(N,) float64, NaN where a row has no such value."""
    return np.array([math.nan if row.get(key) is None else row[key] for row in rows], dtype=np.float64)


def _per_ten_thousand(values: np.ndarray) -> list[int | None]:
    """Short numbers for the page, rounded down, so that a failure (IoU < 0.5) never becomes a success."""
    return [None if math.isnan(value) else math.floor(value * 10_000) for value in values]
