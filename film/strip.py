"""A picture of a whole film: some of its frames, its spectrogram, and how present the source is over time."""

import warnings
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from audio_io import HOP, N_FFT, SAMPLE_RATE, power_spectrogram
from utils import atomic_path, printable

COLUMNS = 1000  # of the spectrogram
FRAMES, FRAME_HEIGHT = 8, 150  # pixels
INCHES, DOTS = 12.0, 100
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Hiragino Sans", "Yu Gothic")
PRESENCE, LIT = "#d55e00", "#0072b2"  # Okabe and Ito


@cache
def _fonts() -> list[str]:
    """Those of FONTS that are there, tried in turn for each letter of a title."""
    there = {font.name for font in fontManager.ttflist}
    return [name for name in FONTS if name in there]


class Strip:
    """Collects what the picture needs while a film passes by; what it holds does not grow with the film."""

    def __init__(self, duration: float) -> None:
        self.duration = max(duration, 1e-3)
        self.frames: list[tuple[float, np.ndarray]] = []
        self._shown: np.ndarray | None = None
        self._power = np.zeros((N_FFT // 2 + 1, COLUMNS))
        self._weight = np.zeros(COLUMNS)
        self._heard = 0
        self._last = np.zeros(0, np.float32)  # samples that the next spectra reach back to, from spectrum _from on
        self._from = self._drawn = 0

    @property
    def next_frame(self) -> float:
        """When the next frame to keep is shown: in the middle of the next of FRAMES equal parts."""
        return (len(self.frames) + 0.5) * self.duration / FRAMES

    def see(self, time: float, image: np.ndarray) -> None:
        """The frame (H, W, 3) comes up at `time` s."""
        self.until(time)
        self._shown = image

    def until(self, time: float) -> None:
        """The last frame is shown until `time` s: kept wherever one is due before."""
        while self._shown is not None and self.next_frame < time and len(self.frames) < FRAMES:
            width = max(1, round(self._shown.shape[1] * FRAME_HEIGHT / self._shown.shape[0]))
            small = cv2.resize(self._shown, (width, FRAME_HEIGHT), interpolation=cv2.INTER_AREA)
            self.frames.append((self.next_frame, small))

    def hear(self, samples: np.ndarray) -> None:
        """The next samples (n,) at 16 kHz; spectra are drawn that have all their samples."""
        self._heard += len(samples)
        self._last = np.concatenate([self._last, samples])
        stop = self._from + (len(self._last) - N_FFT // 2) // HOP + 1
        if stop <= self._drawn or len(self._last) <= N_FFT // 2:
            return
        power = power_spectrogram(self._last)[0].numpy()[:, self._drawn - self._from : stop - self._from]
        times = np.arange(self._drawn, stop) * HOP / SAMPLE_RATE
        places = np.minimum((times / self.duration * COLUMNS).astype(int), COLUMNS - 1)
        np.add.at(self._power.T, places, power.T)
        np.add.at(self._weight, places, 1)
        kept = max(stop - N_FFT // 2 // HOP - 1, 0)
        self._last, self._from, self._drawn = self._last[(kept - self._from) * HOP :], kept, stop

    def draw(self, path: Path, times: np.ndarray, presence: np.ndarray, lit: np.ndarray, title: str) -> None:
        """Write the PNG, whole or not at all: presence and lit share (N,) at `times` s."""
        figure = Figure(figsize=(INCHES, 5.4), dpi=DOTS)
        FigureCanvasAgg(figure)
        left, width = 0.055, 0.92
        figure.text(left, 0.955, printable(title), fontsize=12, fontfamily=_fonts(), parse_math=False)
        top = figure.add_axes((left, 0.63, width, 0.31))
        top.imshow(self._mosaic(round(INCHES * DOTS * width)), aspect="auto", interpolation="bilinear")
        top.set_axis_off()
        below = figure.add_axes((left, 0.36, width, 0.26))
        below.imshow(
            self._decibels(), aspect="auto", origin="lower", cmap="magma",
            extent=(0, self.duration, 0, SAMPLE_RATE / 2000), interpolation="nearest",
        )  # fmt: skip
        below.set_ylabel("kHz")
        below.tick_params(labelbottom=False)
        curve = figure.add_axes((left, 0.09, width, 0.235), sharex=below)
        curve.plot(times, presence, color=PRESENCE, linewidth=1.6, label="presence")
        curve.fill_between(times, lit, color=LIT, alpha=0.35, linewidth=0, label="lit share")
        curve.set_xlim(0, self.duration)
        low = min(0.0, float(np.nanmin(presence, initial=0)))
        curve.set_ylim(low, max(1.0, float(np.nanmax(presence, initial=1))))
        curve.set_xlabel("s")
        curve.grid(alpha=0.25)
        curve.legend(loc="upper right", ncols=2, fontsize=8, framealpha=0.8)
        with atomic_path(path) as temporary, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # of a script that no font here has: boxes
            figure.savefig(temporary, format="png", pil_kwargs={"compress_level": 3})

    def _mosaic(self, width: int) -> np.ndarray:
        """The kept frames side by side, each cut or filled to its share of the width."""
        each = width // FRAMES
        mosaic = np.full((FRAME_HEIGHT, each * FRAMES, 3), 255, np.uint8)
        for place, (_, image) in enumerate(self.frames):
            shown = min(each - 4, image.shape[1])
            begin, left = (image.shape[1] - shown) // 2, place * each + (each - shown) // 2
            mosaic[:, left : left + shown] = image[:, begin : begin + shown]
        return mosaic

    def _decibels(self) -> np.ndarray:
        """(F, COLUMNS), at most 80 dB below the highest; an empty column is as the one before, until the sound ends."""
        filled = np.maximum.accumulate(np.where(self._weight > 0, np.arange(COLUMNS), 0))
        power = (self._power / np.maximum(self._weight, 1))[:, filled]
        power[:, round(self._heard / SAMPLE_RATE / self.duration * COLUMNS) :] = 0
        decibels = 10 * np.log10(np.maximum(power, 1e-10))
        return np.maximum(decibels, max(decibels.max() - 80, -60))
