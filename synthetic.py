"""A small synthetic set of sounding objects in the VGG-Sound layout, made from a seed in under a minute.

    python synthetic.py --out data/synthetic                     write the set
    python synthetic.py --out data/synthetic --probe             how far one gets on it without learning anything
    python synthetic.py --preview synthetic.png                  contact sheet: pictures and a sound of each kind

Ten kinds of objects, each with a look (shape, texture, range of colours) and a sound, both varied within the kind.
Splits: train, val, test (one object in view), distractor (the sounding object among one or two silent ones of other
kinds) and interactive (two objects, and one entry for the sound of each). Each sample comes from its own random stream,
(seed, split, index): nothing is shared between splits, and the number of processes changes nothing.
"""
import argparse
import colorsys
import json
import multiprocessing
from collections.abc import Callable, Iterable
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import soundfile
import torch
from scipy import signal
from tqdm import tqdm

from audio_io import SAMPLE_RATE, log_spectrogram
from metrics import (
    MAP_SIZE,
    consensus_iou,
    every,
    interactive_groups,
    normalize_maps,
    pointing,
    region_fixed,
    success_rate,
)

# What makes the set easy or hard. A root remembers these values: after a change it needs --force.
TEXTURE_STRENGTH = 0.30  # depth of an object's texture, 0 (flat colour) to 1
BACKGROUND_CONTRAST = 24.0  # standard deviation of the background, in grey levels of 0..255
CLUTTER_COUNT = (7, 16)  # small patches and lines on the background, fewest and most
CLUTTER_CONTRAST = 45.0  # standard deviation of their colours, in grey levels
COLOUR_SPREAD = 1.3  # width of each kind's range of hues, 1 = as in the table KINDS
SNR_DB = (10.0, 20.0)  # sound to noise, in dB
LEVEL_DB = (-36.0, -20.0)  # root mean square of the noisy sound, in dB of full scale
TILT_DB = 4.0  # random slope of a sound's spectrum, plus or minus, in dB per octave

FORMAT_VERSION = 1
SIDE = 128  # pixels
OBJECT_SIDE = (0.25, 0.5)  # longer side of an object's box, as a part of the picture's side
AUDIO_SECONDS = 1.6
JPEG_QUALITY = 92
COUNTS = {"train": 4000, "val": 256, "test": 400, "distractor": 400, "interactive": 200}  # pictures
SPLITS = tuple(COUNTS)
SAMPLES = int(AUDIO_SECONDS * SAMPLE_RATE)


# ---------------------------------------------------------------- looks
# A shape is a list of parts, painted in turn: (points (N, 2), tone). x to the right and y down, about -1..1. Tone 0 is
# the object's own colour under its texture; -1 is black and 1 is white, both without texture.

def ellipse(x, y, rx, ry=None, start=0, end=360):
    """Polygon (N, 2) of an ellipse, or of its arc from start to end in degrees, clockwise from the right."""
    angle = np.radians(np.linspace(start, end, 40))
    return np.stack([x + rx * np.cos(angle), y + (rx if ry is None else ry) * np.sin(angle)], axis=1)


def bar(x0, y0, x1, y1, width):
    """Polygon (4, 2) of a straight bar from one point to another."""
    along = np.array([x1 - x0, y1 - y0])
    across = np.array([-along[1], along[0]]) * width / 2 / np.hypot(*along)
    start, end = np.array([x0, y0]), np.array([x1, y1])
    return np.array([start + across, end + across, end - across, start - across])


def bell_shape(rng):
    flare, waist = rng.uniform(0.75, 0.95), rng.uniform(0.42, 0.55)
    right = np.array([[0.16, -0.85], [waist - 0.08, -0.6], [waist, 0.0], [waist + 0.1, 0.35], [flare, 0.7]])
    return [(ellipse(0, 0.8, 0.2), -0.6), (ellipse(0, -0.88, 0.16), -0.4),
            (np.concatenate([right, right[::-1] * [-1, 1]]), 0), (bar(-flare, 0.66, flare, 0.66, 0.14), 0.5)]


def siren_shape(rng):
    width, lamp = rng.uniform(0.55, 0.7), rng.uniform(-0.2, 0.2)
    return [(ellipse(0, 0.3, width, rng.uniform(1.0, 1.2), 180, 360), 0), (bar(lamp, -0.45, lamp, 0.2, 0.2), 0.7),
            (bar(-0.85, 0.5, 0.85, 0.5, 0.42), -0.75)]


def drum_shape(rng):
    depth = rng.uniform(0.4, 0.65)
    corners = np.linspace(-0.85, 0.85, rng.integers(5, 8))
    laces = [(bar(x0, depth if i % 2 else -0.3, x1, -0.3 if i % 2 else depth, 0.1), -0.7)
             for i, (x0, x1) in enumerate(pairwise(corners))]
    side = np.array([[-0.9, -0.4], [0.9, -0.4], [0.85, depth], [-0.85, depth]])
    return [(ellipse(0, depth, 0.85, 0.25), 0), (side, 0), *laces, (ellipse(0, -0.45, 0.95, 0.32), 0.75)]


def guitar_shape(rng):
    lower, upper = rng.uniform(0.55, 0.68), rng.uniform(0.4, 0.48)
    return [(bar(0, -0.3, 0, -0.95, 0.18), -0.6), (bar(0, -0.9, 0, -1.15, 0.34), -0.75),
            (ellipse(0, 0.5, lower, 0.46), 0), (ellipse(0, -0.05, upper, 0.38), 0), (ellipse(0, 0.12, 0.18), -0.9),
            (bar(-0.25, 0.6, 0.25, 0.6, 0.1), -0.8)]


def bird_shape(rng):
    wing, tail = rng.uniform(0.28, 0.4), rng.uniform(-0.5, -0.1)
    return [(np.array([[-0.35, 0.0], [-1.05, tail], [-1.0, tail + 0.4], [-0.3, 0.35]]), -0.4),
            (np.array([[0.7, -0.55], [1.1, -0.35], [0.7, -0.2]]), 0.75), (ellipse(0, 0.1, 0.62, 0.44), 0),
            (ellipse(0.5, -0.35, 0.32), 0), (ellipse(-0.1, 0.05, wing, 0.2), -0.5), (ellipse(0.6, -0.42, 0.08), -1),
            (bar(-0.05, 0.5, -0.1, 0.8, 0.07), -0.7), (bar(0.15, 0.5, 0.12, 0.8, 0.07), -0.7)]


def car_shape(rng):
    roof, back, front = rng.uniform(-0.6, -0.45), rng.uniform(-0.65, -0.5), rng.uniform(0.25, 0.45)
    body = np.array([[-1, 0.1], [-0.85, 0], [back, roof], [front, roof], [0.7, 0], [1, 0.12], [1, 0.5], [-1, 0.5]])
    glass = np.array([[-0.65, -0.04], [back + 0.08, roof + 0.12], [front - 0.05, roof + 0.12], [0.5, -0.04]])
    wheels = [(ellipse(x, 0.5, radius), tone) for x in (-0.52, 0.52) for radius, tone in ((0.28, -0.9), (0.12, 0.6))]
    return [(body, 0), (glass, 0.75), (bar(-0.05, roof, -0.05, 0, 0.08), -0.3), *wheels]


def singer_shape(rng):
    mouth, eyes = rng.uniform(0.12, 0.26), rng.uniform(0.26, 0.36)
    return [(ellipse(0, 0, 0.74, 0.9), 0), (ellipse(0, -0.25, 0.82, 0.75, 180, 360), -0.8),
            (ellipse(-eyes, -0.05, 0.12), -1), (ellipse(eyes, -0.05, 0.12), -1), (ellipse(0, 0.48, 0.3, mouth), -0.85)]


def water_shape(rng):
    angle = np.linspace(0, 2 * np.pi, 60)
    drop = np.stack([rng.uniform(0.68, 0.82) * np.sin(angle) * np.sin(angle / 2) ** 1.3, -np.cos(angle)], axis=1)
    return [(drop, 0), (ellipse(-0.25, 0.35, 0.13, 0.28), 0.8)]


def clock_shape(rng):
    hands = [(bar(0, 0, reach * np.cos(angle), reach * np.sin(angle), 0.12), -0.95)
             for reach, angle in zip((0.6, 0.4), rng.uniform(0, 2 * np.pi, 2))]
    ticks = [(bar(0.6 * np.cos(a), 0.6 * np.sin(a), 0.74 * np.cos(a), 0.74 * np.sin(a), 0.09), -0.8)
             for a in np.arange(12) * np.pi / 6]
    return [(ellipse(0, 0, 1, rng.uniform(0.92, 1)), -0.7), (ellipse(0, 0, 0.8), 0), *ticks, *hands]


def phone_shape(rng):
    width = rng.uniform(0.52, 0.66)
    keys = [(ellipse(x * width, y, 0.12, 0.1), 0.8) for x in (-0.55, 0, 0.55) for y in (0.12, 0.42, 0.72)]
    return [(bar(0, -1, 0, 1, 2 * width), 0), (bar(-0.7 * width, -0.5, 0.7 * width, -0.5, 0.6), -0.85), *keys]


# A texture is a function of x and y (as above), a frequency f and a phase p, with values in -1..1.
TEXTURES = {
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

TIME = np.arange(SAMPLES) / SAMPLE_RATE


def between(rng, low, high):
    """A number between two, uniform in its logarithm."""
    return low * (high / low) ** rng.random()


def tone(frequency, amplitudes=(1,)):
    """Harmonics of a frequency in Hz: one number or one for each sample (n,)."""
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(frequency, np.shape(frequency) or (SAMPLES,))) / SAMPLE_RATE
    return sum(a * np.sin((n + 1) * phase) for n, a in enumerate(amplitudes))


def resonate(sound, centre, width):
    """A resonance at centre Hz, width Hz wide, applied to a waveform (n,)."""
    radius = np.exp(-np.pi * width / SAMPLE_RATE)
    return signal.lfilter([1 - radius], [1, -2 * radius * np.cos(2 * np.pi * centre / SAMPLE_RATE), radius ** 2], sound)


def events(rng, rate, jitter, event):
    """Sum of event(), a waveform (n,), at about rate times a second; jitter is a part of the time between two."""
    sound = np.zeros(SAMPLES)
    for time in np.arange(rng.random() / rate, AUDIO_SECONDS, 1 / rate):
        start = max(0, int((time + jitter * rng.uniform(-0.5, 0.5) / rate) * SAMPLE_RATE))
        piece = event()[:SAMPLES - start] if start < SAMPLES else np.zeros(0)
        sound[start:start + len(piece)] += piece
    return sound


def bell_sound(rng):
    pitch, decay = between(rng, 250, 1100), rng.uniform(0.15, 0.5)
    ratios = np.array([0.5, 1, 1.19, 1.5, 2, 2.66, 3.9, 5.2]) * rng.uniform(0.99, 1.01, 8)
    weights = rng.uniform(0.4, 1, 8)

    def strike():
        time = TIME[:int(4 * decay * SAMPLE_RATE)]
        return sum(w * np.exp(-time / decay * r ** 0.4) * np.sin(2 * np.pi * pitch * r * time)
                   for w, r in zip(weights, ratios))
    return events(rng, rng.uniform(1.3, 3), 0.2, strike)


def siren_sound(rng):
    swing = np.sin(2 * np.pi * (rng.uniform(1.2, 3.0) * TIME + rng.random()))
    return tone(between(rng, 350, 1100) * 2 ** (rng.uniform(0.4, 0.8) * swing), (1, 0.5, 0.3, 0.15))


def drum_sound(rng):
    pitch, decay, snare = between(rng, 60, 260), rng.uniform(0.03, 0.1), between(rng, 300, 3000)

    def hit():
        time = TIME[:int(6 * decay * SAMPLE_RATE)]
        skin = tone(pitch * (1 + np.exp(-time / 0.02))) + 0.8 * resonate(rng.normal(size=len(time)), snare, 1500)
        return rng.uniform(0.5, 1) * np.exp(-time / decay) * skin
    return events(rng, rng.uniform(3, 6), 0.3, hit)


def guitar_sound(rng):
    pitch, bright = between(rng, 90, 350), rng.uniform(0.3, 0.9)

    def pluck():
        period = int(SAMPLE_RATE / (pitch * 2 ** (rng.integers(0, 8) / 6)))
        string = np.zeros(int(0.7 * SAMPLE_RATE))
        string[:period] = signal.lfilter([bright], [1, bright - 1], rng.uniform(-1, 1, period))
        loop = np.zeros(period + 2)
        loop[0], loop[period:] = 1, -0.497
        return signal.lfilter([1], loop, string)
    return events(rng, rng.uniform(2.5, 5), 0.3, pluck)


def bird_sound(rng):
    pitch, sweep = between(rng, 1200, 4000), rng.choice([-1, 1]) * rng.uniform(0.5, 0.9)

    def chirp():
        length = int(rng.uniform(0.06, 0.13) * SAMPLE_RATE)
        rise = np.linspace(-0.5, 0.5, length) * sweep + rng.uniform(-0.15, 0.15)
        return np.hanning(length) * tone(pitch * 2 ** rise, (1, 0.15))
    return events(rng, rng.uniform(4, 8), 0.5, chirp)


def car_sound(rng):
    rate = between(rng, 18, 50) * (1 + rng.uniform(-0.3, 0.3) * TIME / AUDIO_SECONDS)
    firing = np.diff(np.floor(np.cumsum(rate) / SAMPLE_RATE + rng.random()), prepend=0) > 0
    pulses = firing * rng.uniform(0.6, 1.0, SAMPLES) + 0.004 * rng.normal(size=SAMPLES)
    return sum(resonate(pulses, between(rng, low, 3 * low), 300) for low in (120, 400, 1200))


def singer_sound(rng):
    vibrato = 1 + 0.03 * np.sin(2 * np.pi * (rng.uniform(4, 7) * TIME + rng.random()))
    drift = 2 ** (rng.uniform(-0.3, 0.3) * np.sin(2 * np.pi * (rng.uniform(0.5, 1.2) * TIME + rng.random())))
    rate = between(rng, 110, 400) * vibrato * drift
    pulses = np.diff(np.floor(np.cumsum(rate) / SAMPLE_RATE), prepend=0)
    voice = sum(resonate(pulses, between(rng, low, high), 90) for low, high in ((300, 900), (900, 2300), (2400, 3400)))
    syllables = np.clip(1.2 + np.sin(2 * np.pi * (rng.uniform(1.5, 3) * TIME + rng.random())), 0.1, None)
    return voice * syllables


def water_sound(rng):
    flow = resonate(rng.normal(size=SAMPLES), between(rng, 400, 3500), rng.uniform(800, 2500))

    def bubble():
        length = int(rng.uniform(0.02, 0.06) * SAMPLE_RATE)
        return np.hanning(length) * tone(between(rng, 400, 2500) * np.linspace(1, rng.uniform(1.2, 1.8), length))
    return flow / flow.std() + 2 * events(rng, rng.uniform(8, 16), 1, bubble)


def clock_sound(rng):
    pitch, width = between(rng, 700, 5000), rng.uniform(150, 500)

    def tick():
        click = np.zeros(int(0.03 * SAMPLE_RATE))
        click[:3] = 3, -2, 1
        click[:8] += rng.uniform(-1, 1, 8)
        return resonate(click, pitch * rng.choice([1, 0.8]), width)
    return events(rng, rng.uniform(5, 11), 0.05, tick)


def phone_sound(rng):
    length, pitch = rng.uniform(0.09, 0.2), between(rng, 0.5, 2.0)

    def key():
        time = TIME[:int(0.8 * length * SAMPLE_RATE)]
        low, high = rng.choice([697, 770, 852, 941]), rng.choice([1209, 1336, 1477])
        return np.sin(2 * np.pi * pitch * low * time) + np.sin(2 * np.pi * pitch * high * time)
    return events(rng, 1 / length, 0, key)


class Kind(NamedTuple):
    """One kind of object: its shape, texture, ranges of hue (degrees), saturation and value (0..1), and its sound."""
    shape: Callable
    texture: str
    hue: tuple
    saturation: tuple
    value: tuple
    sound: Callable


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


# ---------------------------------------------------------------- pictures and sounds of a sample

def draw_object(kind: str, size: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """One object, cut out tightly: RGB (h, w, 3) in 0..255, opacity (h, w) in 0..1; the longer side is size pixels."""
    look, canvas = KINDS[kind], 192
    angle, stretch, flip = np.radians(rng.uniform(-20, 20)), rng.uniform(0.9, 1.1), rng.choice([-1, 1])
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) * [[stretch * flip], [1]]
    x, y = np.linspace(-1.5, 1.5, canvas)[None, :], np.linspace(-1.5, 1.5, canvas)[:, None]
    back = np.linalg.inv(turn)  # to the object's own x and y
    texture = TEXTURES[look.texture](x * back[0, 0] + y * back[1, 0], x * back[0, 1] + y * back[1, 1],
                                     rng.uniform(9, 14), rng.uniform(0, 2 * np.pi))
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
    colour = np.array(colorsys.hsv_to_rgb((middle + half * rng.uniform(-1, 1)) / 360 % 1,
                                          rng.uniform(*look.saturation), rng.uniform(*look.value))) * 255
    shade = np.clip(shade - 0.1 * y, -1, 1)[..., None]  # light from above
    rgb = np.where(shade > 0, colour + shade * (255 - colour), colour * (1 + shade))
    rows, columns = np.flatnonzero(opacity.any(1)), np.flatnonzero(opacity.any(0))
    tight = np.s_[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    height, width = opacity[tight].shape
    shape = (max(1, round(size * width / max(width, height))), max(1, round(size * height / max(width, height))))
    return (cv2.resize(rgb[tight], shape, interpolation=cv2.INTER_AREA),
            cv2.resize(opacity[tight], shape, interpolation=cv2.INTER_AREA))


def draw_background(rng) -> np.ndarray:
    """A cluttered background of muted colours, RGB (SIDE, SIDE, 3) in about 0..255."""
    texture = np.zeros((SIDE, SIDE, 3))
    for cells in (3, 6, 12, 24, 48):
        noise = rng.normal(size=(cells, cells, 1)) + 0.35 * rng.normal(size=(cells, cells, 3))
        texture += cells ** -rng.uniform(0.2, 0.8) * cv2.resize(noise, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    unevenness = np.exp(0.5 * cv2.resize(rng.normal(size=(5, 5, 1)), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC))
    texture = unevenness[..., None] * (texture - texture.mean()) / texture.std()
    picture = rng.uniform(80, 170) + rng.normal(0, 12, 3) + BACKGROUND_CONTRAST * texture / texture.std()
    picture = np.clip(picture, 0, 255).astype(np.uint8)
    for _ in range(rng.integers(CLUTTER_COUNT[0], CLUTTER_COUNT[1] + 1)):
        colour = picture[tuple(rng.integers(0, SIDE, 2))] + CLUTTER_CONTRAST * (rng.normal() + 0.5 * rng.normal(size=3))
        place = rng.integers(0, SIDE, 2)
        if rng.random() < 0.5:
            end = place + rng.integers(-SIDE // 2, SIDE // 2, 2)
            cv2.line(picture, place.tolist(), end.tolist(), colour.tolist(), int(rng.integers(1, 4)), cv2.LINE_AA)
        else:
            patch = place + rng.integers(-9, 10, (rng.integers(3, 7), 2))
            cv2.fillConvexPoly(picture, cv2.convexHull(patch.astype(np.int32)), colour.tolist(), cv2.LINE_AA)
    return picture.astype(float)


def place_squares(count: int, rng) -> np.ndarray:
    """Squares inside the picture that do not overlap: (count, 3) whole numbers x, y, side in pixels, all alike."""
    smallest, largest = (round(SIDE * part) for part in OBJECT_SIDE)
    while True:
        sides = rng.integers(smallest, largest + 1, count)
        corners = (rng.random((count, 2)) * (SIDE + 1 - sides[:, None])).astype(int)
        apart = [(np.maximum(corners[i], corners[j]) >= np.minimum(corners[i] + sides[i], corners[j] + sides[j])).any()
                 for i in range(count) for j in range(i)]
        if all(apart):
            return np.column_stack([corners, sides])


def make_picture(kinds: list[str], rng) -> tuple[np.ndarray, list[list[float]]]:
    """A picture of an object of each kind: RGB uint8 (SIDE, SIDE, 3); a tight box [xmin, ymin, xmax, ymax], 0..1, each.

    The longer side of a box is 25 to 50 % of the picture's; the other is as short as the shape makes it. Each object is
    centred in a square drawn before its kind is known, so that place and size tell nothing about the kind.
    """
    squares, picture, boxes = place_squares(len(kinds), rng), draw_background(rng), []
    for kind, (left, top, side) in zip(kinds, squares.tolist()):
        rgb, opacity = draw_object(kind, side, rng)
        height, width = opacity.shape
        left, top = left + (side - width) // 2, top + (side - height) // 2
        window = picture[top:top + height, left:left + width]
        window += opacity[..., None] * (rgb - window)
        boxes.append([left / SIDE, top / SIDE, (left + width) / SIDE, (top + height) / SIDE])
    light = rng.uniform(0.85, 1.1) * rng.uniform(0.95, 1.05, 3)
    picture = picture * light + rng.normal(0, 3, picture.shape)
    return np.clip(np.round(picture), 0, 255).astype(np.uint8), boxes


def unit_level(sound: np.ndarray, slope_db: float) -> np.ndarray:
    """A waveform (n,) with its spectrum sloped by so many dB per octave, at a root mean square of 1."""
    octaves = np.log2(np.maximum(np.fft.rfftfreq(len(sound), 1 / SAMPLE_RATE), 50) / 1000)
    sound = np.fft.irfft(np.fft.rfft(sound - sound.mean()) * 10 ** (slope_db * octaves / 20), len(sound))
    return sound / np.sqrt(np.mean(sound ** 2))


def make_sound(kind: str, rng) -> tuple[np.ndarray, np.ndarray]:
    """A sound of a kind and the noise to add to it: two waveforms (SAMPLES,); their sum stays within -1..1."""
    sound = unit_level(KINDS[kind].sound(rng), rng.uniform(-TILT_DB, TILT_DB))
    for _ in range(4):  # softly limits the peaks, to about 15 dB above the mean
        sound = unit_level(5 * np.tanh(sound / 5), 0)
    noise = unit_level(rng.normal(size=SAMPLES), rng.uniform(-TILT_DB, 0))
    level = 10 ** (rng.uniform(*LEVEL_DB) / 20)
    return level * sound, level * 10 ** (-rng.uniform(*SNR_DB) / 20) * noise


# ---------------------------------------------------------------- the set on disk

def plan_kinds(seed: int, split: str, index: int) -> list[str]:
    """Kinds in view in a picture, the sounding one first (interactive: both sound, each in an entry of its own).

    Each block of as many pictures as there are kinds lets every kind sound once, and stay silent equally often.
    """
    names, (block, place) = list(KINDS), divmod(index, len(KINDS))
    rng = np.random.default_rng([seed, SPLITS.index(split), block, 1])  # differs from a sample's stream
    order, steps = rng.permutation(len(names)), rng.permutation(len(names) - 1) + 1
    silent = {"distractor": 1 + block % 2, "interactive": 1}.get(split, 0)
    return [names[order[(place + step) % len(names)]] for step in (0, *steps[:silent])]


def write_sample(task: tuple[Path, int, str, int]) -> list[tuple[str, list[dict]]]:
    """Write one sample (root, seed, split, index): picture and sounds; per entry its id and the objects in view."""
    root, seed, split, index = task
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    kinds = plan_kinds(seed, split, index)
    picture, boxes = make_picture(kinds, rng)
    entries = []
    for sounding in kinds if split == "interactive" else kinds[:1]:
        name = f"{split}_{index:06d}" + (f"_{sounding}" if split == "interactive" else "")
        jpeg = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
        (root / "frames" / f"{name}.jpg").write_bytes(jpeg.tobytes())
        soundfile.write(root / "audio" / f"{name}.wav", sum(make_sound(sounding, rng)), SAMPLE_RATE, subtype="PCM_16")
        entries.append((name, [{"kind": kind, "bbox": box, "sounding": kind == sounding}
                               for kind, box in zip(kinds, boxes)]))
    return entries


def is_complete(root: Path, settings: str, force: bool) -> bool:
    """Whether the root holds this very set; if not, clear it of any other synthetic set (with force) or raise."""
    marker = root / "synthetic.json"
    if marker.is_file() and not force:
        if marker.read_text() == settings:
            return True
        raise FileExistsError(f"{root} holds a synthetic set with other settings: name another --out, or --force")
    if root.exists() and any(root.iterdir()):
        if not force:
            raise FileExistsError(f"{root} is not empty and holds no complete set: name another --out, or --force")
        marker.unlink(missing_ok=True)
        for split in SPLITS:  # only what this program wrote
            for path in [*root.glob(f"frames/{split}_*.jpg"), *root.glob(f"audio/{split}_*.wav")]:
                path.unlink()
    return False


def generate(root, seed: int = 0, counts: dict | None = None, processes: int = 2, force: bool = False) -> bool:
    """Write a set below root; counts: pictures per split (COUNTS for those left out). False if it was there already."""
    root, counts = Path(root), {**COUNTS, **(counts or {})}
    if set(counts) != set(COUNTS) or min(counts.values()) < 1:
        raise ValueError(f"counts {counts}: each of {', '.join(COUNTS)}, and nothing else, needs at least 1")
    difficulty = {name: globals()[name] for name in ("TEXTURE_STRENGTH", "BACKGROUND_CONTRAST", "CLUTTER_COUNT",
                  "CLUTTER_CONTRAST", "COLOUR_SPREAD", "SNR_DB", "LEVEL_DB", "TILT_DB")}
    settings = json.dumps({"version": FORMAT_VERSION, "seed": seed, "counts": counts, **difficulty}, indent=1) + "\n"
    if is_complete(root, settings, force):
        return False
    for folder in ("frames", "audio"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    tasks = [(root, seed, split, index) for split in SPLITS for index in range(counts[split])]
    entries = {split: [] for split in SPLITS}
    cv2.setNumThreads(1)  # before the fork: a child would wait forever for the threads of its parent's OpenCV
    with multiprocessing.Pool(processes) as pool:
        written = tqdm(pool.imap(write_sample, tasks, chunksize=16), total=len(tasks), unit="picture", mininterval=1)
        for (_, _, split, _), sample in zip(tasks, written):
            entries[split] += sample
    for split in SPLITS:
        (root / f"{split}.txt").write_text("".join(f"{name}\n" for name, _ in entries[split]))
        annotations = [{"file": name, "class": thing["kind"], "bbox": [thing["bbox"]]}
                       for name, things in entries[split] for thing in things if thing["sounding"]]
        (root / f"{split}.json").write_text(json.dumps(annotations))
    objects = {name: things for split in SPLITS for name, things in entries[split]}
    (root / "objects.json").write_text(json.dumps(objects))
    (root / "synthetic.json").write_text(settings)  # last: the set is complete
    return True


# ---------------------------------------------------------------- how hard is it without learning?

def blob(x: float, y: float) -> np.ndarray:
    """Gaussian map (MAP_SIZE, MAP_SIZE) centred on x, y in 0..1, with a standard deviation of a quarter of the side."""
    axis = (np.arange(MAP_SIZE) + 0.5) / MAP_SIZE
    return np.exp(-8 * (axis[None, :] - x) ** 2 - 8 * (axis[:, None] - y) ** 2)


def contrast_saliency(picture: np.ndarray) -> np.ndarray:
    """BGR uint8 (SIDE, SIDE, 3) -> map (MAP_SIZE, MAP_SIZE): the local standard deviation of the colour.

    The strongest of several: the distance from the picture's mean colour or mean chroma points right less often.
    """
    lab = cv2.cvtColor(picture, cv2.COLOR_BGR2LAB).astype(np.float32)
    mean, mean_square = (cv2.GaussianBlur(power, (0, 0), SIDE / 16) for power in (lab, lab ** 2))
    return cv2.resize((mean_square - mean ** 2).clip(min=0).sum(2) ** 0.5, (MAP_SIZE, MAP_SIZE))


def score_maps(maps: Iterable[np.ndarray], boxes: list[list[float]], groups: dict) -> dict[str, float]:
    """Scores of N maps (MAP_SIZE, MAP_SIZE) against the sounding boxes; groups: {picture: its entries} or empty."""
    maps, ious, hits = iter(maps), [], []
    for start in range(0, len(boxes), 64):
        batch = normalize_maps(torch.from_numpy(np.stack(list(islice(maps, 64))).astype(np.float32)))
        truth = torch.zeros_like(batch)
        for mask, box in zip(truth, boxes[start:start + 64]):
            left, top, right, bottom = (int(MAP_SIZE * edge) for edge in box)
            mask[top:bottom, left:right] = 1
        ious.append(consensus_iou(region_fixed(batch), truth))
        hits.append(pointing(batch, truth))
    ious, hits = torch.cat(ious), torch.cat(hits).double()
    scores = {"pointing": hits.mean().item(), "cIoU": success_rate(ious)}
    if groups:
        scores |= {"both_pointing": every(hits, groups).mean().item(), "IIoU": success_rate(every(ious, groups))}
    return scores


def read_picture(path: Path) -> np.ndarray:
    """BGR uint8 (SIDE, SIDE, 3)."""
    picture = cv2.imread(str(path))
    if picture is None:
        raise ValueError(f"cannot read the picture {path}")
    return picture


def blind_scores(root: Path, split: str, objects: dict) -> dict[str, dict[str, float]]:
    """Scores of everything that does not hear, on one split: {centre, random, saliency, oracle: {score: 0..1}}."""
    annotations = json.loads((root / f"{split}.json").read_text())
    names = [entry["file"] for entry in annotations]
    boxes = [entry["bbox"][0] for entry in annotations]
    groups = interactive_groups(names) if split == "interactive" else {}
    places = np.random.default_rng(0).random((len(names), 2))
    pictures = (read_picture(root / "frames" / f"{name}.jpg") for name in names)
    scores = {"centre": score_maps((blob(0.5, 0.5) for _ in names), boxes, groups),
              "random": score_maps((blob(x, y) for x, y in places), boxes, groups),
              "saliency": score_maps(map(contrast_saliency, pictures), boxes, groups)}
    # The oracle takes one of the boxes in view, which are disjoint: its IoU is 1 if that one sounds, and else 0.
    chance = torch.tensor([1 / len(objects[name]) for name in names], dtype=torch.float64)
    oracle = {"pointing": chance.mean().item(), "cIoU": chance.mean().item()}
    if groups:
        both = torch.stack([chance[group].prod() for group in groups.values()]).mean().item()
        oracle |= {"both_pointing": both, "IIoU": both}
    return {**scores, "oracle": oracle}


def nearest_mean_accuracy(root: Path, feature: Callable) -> float:
    """Share of test entries whose feature(root, annotation) is nearest to the mean, over train, of their own class."""
    (train, train_kinds), (test, test_kinds) = (
        (np.stack([feature(root, entry) for entry in entries]), np.array([entry["class"] for entry in entries]))
        for entries in (json.loads((root / f"{split}.json").read_text()) for split in ("train", "test")))
    kinds = np.unique(train_kinds)
    means = np.stack([train[train_kinds == kind].mean(0) for kind in kinds])
    nearest = np.linalg.norm(test[:, None] - means[None], axis=2).argmin(1)
    return float((kinds[nearest] == test_kinds).mean())


def mean_colour(root: Path, annotation: dict) -> np.ndarray:
    """Mean BGR colour (3,) of the middle of the sounding object: its box less a fifth on every side."""
    left, top, right, bottom = (SIDE * edge for edge in annotation["bbox"][0])
    picture = read_picture(root / "frames" / f"{annotation['file']}.jpg")
    inset_x, inset_y = (right - left) / 5, (bottom - top) / 5
    return picture[int(top + inset_y):int(bottom - inset_y), int(left + inset_x):int(right - inset_x)].mean((0, 1))


def mean_spectrum(root: Path, annotation: dict) -> np.ndarray:
    """Log power spectrum of the sound, averaged over time: (F,)."""
    waveform, _ = soundfile.read(root / "audio" / f"{annotation['file']}.wav", dtype="float32")
    return log_spectrogram(waveform)[0].mean(1).numpy()


def probe(root) -> dict:
    """What is had without learning, from the files: {split: blind_scores, "class_accuracy": {"colour", "spectrum"}}."""
    root = Path(root)
    objects = json.loads((root / "objects.json").read_text())
    numbers = {split: blind_scores(root, split, objects) for split in SPLITS}
    numbers["class_accuracy"] = {"colour": nearest_mean_accuracy(root, mean_colour),
                                 "spectrum": nearest_mean_accuracy(root, mean_spectrum)}
    return numbers


def probe_table(numbers: dict) -> str:
    """The numbers of `probe` as a table, in percent."""
    columns = ("pointing", "cIoU", "both_pointing", "IIoU")
    lines = [f"{'split':<13}{'what points':<13}" + "".join(f"{column:>15}" for column in columns)]
    for split in SPLITS:
        for pointer, scores in numbers[split].items():
            cells = [f"{100 * scores[column]:15.1f}" if column in scores else " " * 15 for column in columns]
            lines.append(f"{split:<13}{pointer:<13}{''.join(cells)}".rstrip())
    lines += ["", f"class of the nearest mean ({len(KINDS)} kinds), test set"]
    lines += [f"  by mean {feature}: {100 * accuracy:.1f}" for feature, accuracy in numbers["class_accuracy"].items()]
    return "\n".join(lines)


# ---------------------------------------------------------------- preview and command line

def preview(path: Path, seed: int, columns: int = 6) -> None:
    """Draw a contact sheet: a row per kind, with pictures of it and the log spectrogram of one of its sounds."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    widths = [1] * columns + [2.2]
    size = sum(widths), 0.98 * len(KINDS)
    figure, axes = pyplot.subplots(len(KINDS), columns + 1, figsize=size, width_ratios=widths)
    for row, kind in enumerate(KINDS):
        for column in range(columns):
            rng = np.random.default_rng([seed, len(SPLITS), row, column + 1])  # in no split
            axes[row, column].imshow(make_picture([kind], rng)[0])
        spectrogram = log_spectrogram(sum(make_sound(kind, rng)))[0]  # (F, L)
        axes[row, -1].imshow(spectrogram, origin="lower", aspect="auto", cmap="magma",
                             extent=(0, AUDIO_SECONDS, 0, SAMPLE_RATE / 2000))
        axes[row, 0].set_ylabel(kind)
        axes[row, -1].yaxis.tick_right()
    pyplot.setp(axes[:, :-1], xticks=[], yticks=[])
    pyplot.setp(axes[:-1, -1], xticks=[], yticks=[])
    axes[-1, -1].set(xlabel="s", ylabel="kHz", yticks=[0, 4, 8])
    axes[-1, -1].yaxis.set_label_position("right")
    figure.subplots_adjust(left=0.035, right=0.945, top=0.995, bottom=0.05, wspace=0.04, hspace=0.04)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


class OneLineParser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def natural(text: str) -> int:
    """An argparse type: a whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(description="A synthetic set of sounding objects.", allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("data/synthetic"), help="folder of the set (data/synthetic)")
    parser.add_argument("--seed", type=natural, help="seed of the set and of the preview (0)")
    parser.add_argument("--train", type=natural, metavar="N", help=f"number of training pairs ({COUNTS['train']})")
    parser.add_argument("--force", action="store_true", help="rewrite the synthetic set that is in the folder")
    parser.add_argument("--probe", action="store_true", help="print how far one gets on the set without learning")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers of the probe here")
    parser.add_argument("--preview", type=Path, metavar="FILE.png", help="draw each kind and its sound; writes no set")
    options = parser.parse_args(arguments)
    if options.train == 0:
        parser.error("--train 0: a set needs at least one training pair")
    if options.json and not options.probe:
        parser.error("--json writes the numbers of --probe: give both")
    if options.preview and options.preview.suffix != ".png":
        parser.error(f"--preview {options.preview}: the name must end in .png")
    seed, counts = options.seed or 0, {"train": options.train} if options.train else {}
    as_it_is = options.probe and not options.force and options.seed is None and options.train is None
    try:
        if options.preview:
            preview(options.preview, seed)
        if not (as_it_is and (options.out / "synthetic.json").is_file()) and (options.probe or not options.preview):
            made = generate(options.out, seed, counts, force=options.force)
            print(f"{options.out}: " + ("written" if made else "this very set is there already, nothing to do"))
        if options.probe:
            numbers = probe(options.out)
            print(probe_table(numbers))
        if options.json:
            options.json.write_text(json.dumps(numbers, indent=1) + "\n")
    except (OSError, ValueError, soundfile.LibsndfileError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
