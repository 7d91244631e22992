"""The kinds of the synthetic set: the look and the sound of each, both varied within the kind.

All that draws one object or makes one sound is here, and the constants that make the set easy or hard. N points of a
polygon, h x w pixels of an object, n samples of a waveform. Chance is only what the given generator draws.
"""

import colorsys
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from scipy import signal

from audio_io import SAMPLE_RATE, num_samples

# What makes the set easy or hard. A root remembers these values: after a change it needs --force.
TEXTURE_STRENGTH = 0.30  # depth of an object's texture, 0 (flat colour) to 1
BACKGROUND_CONTRAST = 24.0  # standard deviation of the background, in grey levels of 0..255
CLUTTER_COUNT = (7, 16)  # small patches and lines on the background, fewest and most
CLUTTER_CONTRAST = 45.0  # standard deviation of their colours, in grey levels
COLOUR_SPREAD = 1.3  # width of each kind's range of hues, 1 = as in the table KINDS
SNR_DB = (10.0, 20.0)  # sound to noise, in dB
LEVEL_DB = (-36.0, -20.0)  # root mean square of the noisy sound, in dB of full scale
TILT_DB = 4.0  # random slope of a sound's spectrum, plus or minus, in dB per octave

AUDIO_SECONDS = 1.6
SAMPLES = num_samples(AUDIO_SECONDS)

Part = tuple[np.ndarray, float]  # points (N, 2) and tone, see below
Range = tuple[float, float]


def difficulty() -> dict[str, float | Range]:
    """What makes the set easy or hard, by name."""
    return {
        "TEXTURE_STRENGTH": TEXTURE_STRENGTH,
        "BACKGROUND_CONTRAST": BACKGROUND_CONTRAST,
        "CLUTTER_COUNT": CLUTTER_COUNT,
        "CLUTTER_CONTRAST": CLUTTER_CONTRAST,
        "COLOUR_SPREAD": COLOUR_SPREAD,
        "SNR_DB": SNR_DB,
        "LEVEL_DB": LEVEL_DB,
        "TILT_DB": TILT_DB,
    }


# ---------------------------------------------------------------- looks
# A shape is a list of parts, painted in turn: (points (N, 2), tone). x to the right and y down, about -1..1. Tone 0 is
# the object's own colour under its texture; -1 is black and 1 is white, both without texture.


def ellipse(x: float, y: float, rx: float, ry: float | None = None, start: float = 0, end: float = 360) -> np.ndarray:
    """Polygon (N, 2) of an ellipse, or of its arc from start to end in degrees, clockwise from the right."""
    angle = np.radians(np.linspace(start, end, 40))
    return np.stack([x + rx * np.cos(angle), y + (rx if ry is None else ry) * np.sin(angle)], axis=1)


def bar(x0: float, y0: float, x1: float, y1: float, width: float) -> np.ndarray:
    """Polygon (4, 2) of a straight bar from one point to another."""
    along = np.array([x1 - x0, y1 - y0])
    across = np.array([-along[1], along[0]]) * width / 2 / np.hypot(*along)
    start, end = np.array([x0, y0]), np.array([x1, y1])
    return np.array([start + across, end + across, end - across, start - across])


def bell_shape(rng: Generator) -> list[Part]:
    flare, waist = rng.uniform(0.75, 0.95), rng.uniform(0.42, 0.55)
    right = np.array([[0.16, -0.85], [waist - 0.08, -0.6], [waist, 0.0], [waist + 0.1, 0.35], [flare, 0.7]])
    return [
        (ellipse(0, 0.8, 0.2), -0.6),
        (ellipse(0, -0.88, 0.16), -0.4),
        (np.concatenate([right, right[::-1] * [-1, 1]]), 0),
        (bar(-flare, 0.66, flare, 0.66, 0.14), 0.5),
    ]


def siren_shape(rng: Generator) -> list[Part]:
    width, lamp = rng.uniform(0.55, 0.7), rng.uniform(-0.2, 0.2)
    return [
        (ellipse(0, 0.3, width, rng.uniform(1.0, 1.2), 180, 360), 0),
        (bar(lamp, -0.45, lamp, 0.2, 0.2), 0.7),
        (bar(-0.85, 0.5, 0.85, 0.5, 0.42), -0.75),
    ]


def drum_shape(rng: Generator) -> list[Part]:
    depth = rng.uniform(0.4, 0.65)
    corners = np.linspace(-0.85, 0.85, rng.integers(5, 8))
    laces = [
        (bar(x0, depth if i % 2 else -0.3, x1, -0.3 if i % 2 else depth, 0.1), -0.7)
        for i, (x0, x1) in enumerate(pairwise(corners))
    ]
    side = np.array([[-0.9, -0.4], [0.9, -0.4], [0.85, depth], [-0.85, depth]])
    return [(ellipse(0, depth, 0.85, 0.25), 0), (side, 0), *laces, (ellipse(0, -0.45, 0.95, 0.32), 0.75)]


def guitar_shape(rng: Generator) -> list[Part]:
    lower, upper = rng.uniform(0.55, 0.68), rng.uniform(0.4, 0.48)
    return [
        (bar(0, -0.3, 0, -0.95, 0.18), -0.6),
        (bar(0, -0.9, 0, -1.15, 0.34), -0.75),
        (ellipse(0, 0.5, lower, 0.46), 0),
        (ellipse(0, -0.05, upper, 0.38), 0),
        (ellipse(0, 0.12, 0.18), -0.9),
        (bar(-0.25, 0.6, 0.25, 0.6, 0.1), -0.8),
    ]


def bird_shape(rng: Generator) -> list[Part]:
    wing, tail = rng.uniform(0.28, 0.4), rng.uniform(-0.5, -0.1)
    return [
        (np.array([[-0.35, 0.0], [-1.05, tail], [-1.0, tail + 0.4], [-0.3, 0.35]]), -0.4),
        (np.array([[0.7, -0.55], [1.1, -0.35], [0.7, -0.2]]), 0.75),
        (ellipse(0, 0.1, 0.62, 0.44), 0),
        (ellipse(0.5, -0.35, 0.32), 0),
        (ellipse(-0.1, 0.05, wing, 0.2), -0.5),
        (ellipse(0.6, -0.42, 0.08), -1),
        (bar(-0.05, 0.5, -0.1, 0.8, 0.07), -0.7),
        (bar(0.15, 0.5, 0.12, 0.8, 0.07), -0.7),
    ]


def car_shape(rng: Generator) -> list[Part]:
    roof, back, front = rng.uniform(-0.6, -0.45), rng.uniform(-0.65, -0.5), rng.uniform(0.25, 0.45)
    body = np.array([[-1, 0.1], [-0.85, 0], [back, roof], [front, roof], [0.7, 0], [1, 0.12], [1, 0.5], [-1, 0.5]])
    glass = np.array([[-0.65, -0.04], [back + 0.08, roof + 0.12], [front - 0.05, roof + 0.12], [0.5, -0.04]])
    wheels = [(ellipse(x, 0.5, radius), tone) for x in (-0.52, 0.52) for radius, tone in ((0.28, -0.9), (0.12, 0.6))]
    return [(body, 0), (glass, 0.75), (bar(-0.05, roof, -0.05, 0, 0.08), -0.3), *wheels]


def singer_shape(rng: Generator) -> list[Part]:
    mouth, eyes = rng.uniform(0.12, 0.26), rng.uniform(0.26, 0.36)
    return [
        (ellipse(0, 0, 0.74, 0.9), 0),
        (ellipse(0, -0.25, 0.82, 0.75, 180, 360), -0.8),
        (ellipse(-eyes, -0.05, 0.12), -1),
        (ellipse(eyes, -0.05, 0.12), -1),
        (ellipse(0, 0.48, 0.3, mouth), -0.85),
    ]


def water_shape(rng: Generator) -> list[Part]:
    angle = np.linspace(0, 2 * np.pi, 60)
    drop = np.stack([rng.uniform(0.68, 0.82) * np.sin(angle) * np.sin(angle / 2) ** 1.3, -np.cos(angle)], axis=1)
    return [(drop, 0), (ellipse(-0.25, 0.35, 0.13, 0.28), 0.8)]


def clock_shape(rng: Generator) -> list[Part]:
    hands = [
        (bar(0, 0, reach * np.cos(angle), reach * np.sin(angle), 0.12), -0.95)
        for reach, angle in zip((0.6, 0.4), rng.uniform(0, 2 * np.pi, 2))
    ]
    ticks = [
        (bar(0.6 * np.cos(a), 0.6 * np.sin(a), 0.74 * np.cos(a), 0.74 * np.sin(a), 0.09), -0.8)
        for a in np.arange(12) * np.pi / 6
    ]
    return [(ellipse(0, 0, 1, rng.uniform(0.92, 1)), -0.7), (ellipse(0, 0, 0.8), 0), *ticks, *hands]


def phone_shape(rng: Generator) -> list[Part]:
    width = rng.uniform(0.52, 0.66)
    keys = [(ellipse(x * width, y, 0.12, 0.1), 0.8) for x in (-0.55, 0, 0.55) for y in (0.12, 0.42, 0.72)]
    return [(bar(0, -1, 0, 1, 2 * width), 0), (bar(-0.7 * width, -0.5, 0.7 * width, -0.5, 0.6), -0.85), *keys]


# A texture is a function of x and y (as above), a frequency f and a phase p, with values in -1..1.
TEXTURES: dict[str, Callable[..., np.ndarray]] = {
    "bands": lambda x, y, f, p: np.sin(f * y + p),
    "stripes": lambda x, y, f, p: np.sin(f * x + p),
    "diamonds": lambda x, y, f, p: np.sin(f * (x + y) / 1.4 + p) * np.sin(f * (x - y) / 1.4),
    "grain": lambda x, y, f, p: np.sin(f * x + 2 * np.sin(3 * y + p)),
    "dots": lambda x, y, f, p: np.cos(f * x + p) * np.cos(f * y),
    "rings": lambda x, y, f, p: np.sin(f * np.hypot(x, y - 0.3) + p),
    "checks": lambda x, y, f, p: np.sign(np.sin(f * x + p) * np.sin(f * y)),
    "smooth": lambda x, y, f, p: np.clip(y + 0.5 * np.sin(p), -1, 1),
}


# ---------------------------------------------------------------- sounds
# Each takes a random generator and returns a waveform (SAMPLES,) of any level.

TIME = np.arange(SAMPLES) / SAMPLE_RATE  # of each sample, in s
OCTAVES = np.log2(np.maximum(np.fft.rfftfreq(SAMPLES, 1 / SAMPLE_RATE), 50) / 1000)  # of each frequency, from 1 kHz


def between(rng: Generator, low: float, high: float) -> float:
    """A number between two, uniform in its logarithm."""
    return low * (high / low) ** rng.random()


def tone(frequency: float | np.ndarray, amplitudes: tuple[float, ...] = (1,)) -> np.ndarray:
    """Harmonics of a frequency in Hz: one number or one for each sample (n,)."""
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(frequency, np.shape(frequency) or (SAMPLES,))) / SAMPLE_RATE
    return sum(a * np.sin((n + 1) * phase) for n, a in enumerate(amplitudes))


def resonate(sound: np.ndarray, centre: float, width: float) -> np.ndarray:
    """A resonance at centre Hz, width Hz wide, applied to a waveform (n,)."""
    radius = np.exp(-np.pi * width / SAMPLE_RATE)
    return signal.lfilter([1 - radius], [1, -2 * radius * np.cos(2 * np.pi * centre / SAMPLE_RATE), radius**2], sound)


def events(rng: Generator, rate: float, jitter: float, event: Callable[[], np.ndarray]) -> np.ndarray:
    """Sum of event(), a waveform (n,), at about rate times a second; jitter is a part of the time between two."""
    sound = np.zeros(SAMPLES)
    for time in np.arange(rng.random() / rate, AUDIO_SECONDS, 1 / rate):
        start = max(0, int((time + jitter * rng.uniform(-0.5, 0.5) / rate) * SAMPLE_RATE))
        piece = event()[: SAMPLES - start] if start < SAMPLES else np.zeros(0)
        sound[start : start + len(piece)] += piece
    return sound


def bell_sound(rng: Generator) -> np.ndarray:
    pitch, decay = between(rng, 250, 1100), rng.uniform(0.15, 0.5)
    ratios = np.array([0.5, 1, 1.19, 1.5, 2, 2.66, 3.9, 5.2]) * rng.uniform(0.99, 1.01, 8)
    weights = rng.uniform(0.4, 1, 8)

    def strike() -> np.ndarray:
        time = TIME[: int(4 * decay * SAMPLE_RATE)]
        return sum(
            w * np.exp(-time / decay * r**0.4) * np.sin(2 * np.pi * pitch * r * time) for w, r in zip(weights, ratios)
        )

    return events(rng, rng.uniform(1.3, 3), 0.2, strike)


def siren_sound(rng: Generator) -> np.ndarray:
    swing = np.sin(2 * np.pi * (rng.uniform(1.2, 3.0) * TIME + rng.random()))
    return tone(between(rng, 350, 1100) * 2 ** (rng.uniform(0.4, 0.8) * swing), (1, 0.5, 0.3, 0.15))


def drum_sound(rng: Generator) -> np.ndarray:
    pitch, decay, snare = between(rng, 60, 260), rng.uniform(0.03, 0.1), between(rng, 300, 3000)

    def hit() -> np.ndarray:
        time = TIME[: int(6 * decay * SAMPLE_RATE)]
        skin = tone(pitch * (1 + np.exp(-time / 0.02))) + 0.8 * resonate(rng.normal(size=len(time)), snare, 1500)
        return rng.uniform(0.5, 1) * np.exp(-time / decay) * skin

    return events(rng, rng.uniform(3, 6), 0.3, hit)


def guitar_sound(rng: Generator) -> np.ndarray:
    pitch, bright = between(rng, 90, 350), rng.uniform(0.3, 0.9)

    def pluck() -> np.ndarray:
        period = int(SAMPLE_RATE / (pitch * 2 ** (rng.integers(0, 8) / 6)))
        string = np.zeros(int(0.7 * SAMPLE_RATE))
        string[:period] = signal.lfilter([bright], [1, bright - 1], rng.uniform(-1, 1, period))
        loop = np.zeros(period + 2)
        loop[0], loop[period:] = 1, -0.497
        return signal.lfilter([1], loop, string)

    return events(rng, rng.uniform(2.5, 5), 0.3, pluck)


def bird_sound(rng: Generator) -> np.ndarray:
    pitch, sweep = between(rng, 1200, 4000), rng.choice([-1, 1]) * rng.uniform(0.5, 0.9)

    def chirp() -> np.ndarray:
        length = int(rng.uniform(0.06, 0.13) * SAMPLE_RATE)
        rise = np.linspace(-0.5, 0.5, length) * sweep + rng.uniform(-0.15, 0.15)
        return np.hanning(length) * tone(pitch * 2**rise, (1, 0.15))

    return events(rng, rng.uniform(4, 8), 0.5, chirp)


def car_sound(rng: Generator) -> np.ndarray:
    rate = between(rng, 18, 50) * (1 + rng.uniform(-0.3, 0.3) * TIME / AUDIO_SECONDS)
    firing = np.diff(np.floor(np.cumsum(rate) / SAMPLE_RATE + rng.random()), prepend=0) > 0
    pulses = firing * rng.uniform(0.6, 1.0, SAMPLES) + 0.004 * rng.normal(size=SAMPLES)
    return sum(resonate(pulses, between(rng, low, 3 * low), 300) for low in (120, 400, 1200))


def singer_sound(rng: Generator) -> np.ndarray:
    vibrato = 1 + 0.03 * np.sin(2 * np.pi * (rng.uniform(4, 7) * TIME + rng.random()))
    drift = 2 ** (rng.uniform(-0.3, 0.3) * np.sin(2 * np.pi * (rng.uniform(0.5, 1.2) * TIME + rng.random())))
    rate = between(rng, 110, 400) * vibrato * drift
    pulses = np.diff(np.floor(np.cumsum(rate) / SAMPLE_RATE), prepend=0)
    voice = sum(resonate(pulses, between(rng, low, high), 90) for low, high in ((300, 900), (900, 2300), (2400, 3400)))
    syllables = np.clip(1.2 + np.sin(2 * np.pi * (rng.uniform(1.5, 3) * TIME + rng.random())), 0.1, None)
    return voice * syllables


def water_sound(rng: Generator) -> np.ndarray:
    flow = resonate(rng.normal(size=SAMPLES), between(rng, 400, 3500), rng.uniform(800, 2500))

    def bubble() -> np.ndarray:
        length = int(rng.uniform(0.02, 0.06) * SAMPLE_RATE)
        return np.hanning(length) * tone(between(rng, 400, 2500) * np.linspace(1, rng.uniform(1.2, 1.8), length))

    return flow / flow.std() + 2 * events(rng, rng.uniform(8, 16), 1, bubble)


def clock_sound(rng: Generator) -> np.ndarray:
    pitch, width = between(rng, 700, 5000), rng.uniform(150, 500)

    def tick() -> np.ndarray:
        click = np.zeros(int(0.03 * SAMPLE_RATE))
        click[:3] = 3, -2, 1
        click[:8] += rng.uniform(-1, 1, 8)
        return resonate(click, pitch * rng.choice([1, 0.8]), width)

    return events(rng, rng.uniform(5, 11), 0.05, tick)


def phone_sound(rng: Generator) -> np.ndarray:
    length, pitch = rng.uniform(0.09, 0.2), between(rng, 0.5, 2.0)

    def key() -> np.ndarray:
        time = TIME[: int(0.8 * length * SAMPLE_RATE)]
        low, high = rng.choice([697, 770, 852, 941]), rng.choice([1209, 1336, 1477])
        return np.sin(2 * np.pi * pitch * low * time) + np.sin(2 * np.pi * pitch * high * time)

    return events(rng, 1 / length, 0, key)


class Kind(NamedTuple):
    """One kind of object: its shape, texture, ranges of hue (degrees), saturation and value (0..1), and its sound."""

    shape: Callable[[Generator], list[Part]]
    texture: str
    hue: Range
    saturation: Range
    value: Range
    sound: Callable[[Generator], np.ndarray]


KINDS = {
    "bell": Kind(bell_shape, "bands", (42, 62), (0.6, 0.95), (0.7, 0.95), bell_sound),
    "bird": Kind(bird_shape, "dots", (165, 200), (0.5, 0.9), (0.6, 0.95), bird_sound),
    "car": Kind(car_shape, "smooth", (255, 295), (0.5, 0.9), (0.5, 0.9), car_sound),
    "clock": Kind(clock_shape, "smooth", (0, 360), (0.0, 0.15), (0.75, 1.0), clock_sound),
    "drum": Kind(drum_shape, "diamonds", (10, 34), (0.6, 0.95), (0.6, 0.95), drum_sound),
    "guitar": Kind(guitar_shape, "grain", (20, 42), (0.5, 0.9), (0.4, 0.7), guitar_sound),
    "phone": Kind(phone_shape, "checks", (95, 150), (0.5, 0.9), (0.4, 0.85), phone_sound),
    "singer": Kind(singer_shape, "smooth", (315, 350), (0.25, 0.6), (0.75, 1.0), singer_sound),
    "siren": Kind(siren_shape, "stripes", (350, 370), (0.7, 1.0), (0.6, 0.95), siren_sound),
    "water": Kind(water_shape, "rings", (200, 235), (0.5, 0.9), (0.55, 0.95), water_sound),
}


# ---------------------------------------------------------------- one object, one sound


def draw_object(kind: str, size: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """One object, cut out tightly: RGB (h, w, 3) in 0..255, opacity (h, w) in 0..1; the longer side is size pixels."""
    look, canvas = KINDS[kind], 192
    angle, stretch, flip = np.radians(rng.uniform(-20, 20)), rng.uniform(0.9, 1.1), rng.choice([-1, 1])
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) * [[stretch * flip], [1]]
    x, y = np.linspace(-1.5, 1.5, canvas)[None, :], np.linspace(-1.5, 1.5, canvas)[:, None]
    back = np.linalg.inv(turn)  # to the object's own x and y
    texture = TEXTURES[look.texture](
        x * back[0, 0] + y * back[1, 0], x * back[0, 1] + y * back[1, 1], rng.uniform(9, 14), rng.uniform(0, 2 * np.pi)
    )
    opacity, shade = np.zeros((canvas, canvas)), TEXTURE_STRENGTH * texture
    for points, part_tone in look.shape(rng):
        corners = [np.round((points @ turn + 1.5) / 3 * canvas).astype(np.int32)]
        cv2.fillPoly(opacity, corners, 1.0)
        if part_tone:
            cv2.fillPoly(shade, corners, float(part_tone))
        else:
            part = cv2.fillPoly(np.zeros((canvas, canvas), np.uint8), corners, 1) > 0
            shade[part] = TEXTURE_STRENGTH * texture[part]
    middle, half = np.mean(look.hue), COLOUR_SPREAD * np.ptp(look.hue) / 2
    hue = (middle + half * rng.uniform(-1, 1)) / 360 % 1
    colour = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(*look.saturation), rng.uniform(*look.value))) * 255
    rows, columns = (np.flatnonzero(opacity.any(axis)) for axis in (1, 0))
    tight = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    opacity, shade = opacity[tight], np.clip(shade - 0.1 * y, -1, 1)[tight][..., None]  # light from above
    rgb = np.where(shade > 0, colour + shade * (255 - colour), colour * (1 + shade))
    shape = [max(1, round(side * size / max(opacity.shape))) for side in reversed(opacity.shape)]
    return tuple(cv2.resize(drawn, shape, interpolation=cv2.INTER_AREA) for drawn in (rgb, opacity))


def unit_level(sound: np.ndarray, slope_db: float) -> np.ndarray:
    """A waveform (SAMPLES,) with its spectrum sloped by so many dB per octave, at a root mean square of 1."""
    sound = np.fft.irfft(np.fft.rfft(sound - sound.mean()) * 10 ** (slope_db * OCTAVES / 20), SAMPLES)
    return sound / np.sqrt(np.mean(sound**2))


def make_noise(rng: Generator) -> np.ndarray:
    """Noise of a random slope at a root mean square of 1: a waveform (SAMPLES,)."""
    return unit_level(rng.normal(size=SAMPLES), rng.uniform(-TILT_DB, 0))


def make_sound(kind: str, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """A sound of a kind and the noise to add to it: two waveforms (SAMPLES,); their sum stays within -1..1."""
    sound = unit_level(KINDS[kind].sound(rng), rng.uniform(-TILT_DB, TILT_DB))
    for _ in range(4):  # softly limits the peaks, to about 15 dB above the mean
        sound = unit_level(5 * np.tanh(sound / 5), 0)
    noise = make_noise(rng)
    level = 10 ** (rng.uniform(*LEVEL_DB) / 20)
    return level * sound, level * 10 ** (-rng.uniform(*SNR_DB) / 20) * noise
