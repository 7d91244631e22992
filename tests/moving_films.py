"""Small films for tests, written with PyAV."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE = 16000


def moving_square(time: float, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3): a red square that crosses a grey image in 4 s."""
    width, height = size
    image = np.full((height, width, 3), 90, np.uint8)
    side = height // 3
    left = int((width - side) * (time / 4 % 1))
    image[side : 2 * side, left : left + side] = (220, 30, 30)
    return image


def tone(start: float, seconds: float, rate: int = RATE) -> np.ndarray:
    """(samples,) float32: half a second of 440 Hz and half a second of silence by turns."""
    time = start + np.arange(round(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * 440 * time) * (time % 1 < 0.5)).astype(np.float32)


def write_film(
    path: Path,
    seconds: float,
    fps: float = 25,
    size: tuple[int, int] = (64, 48),
    times: list[float] | None = None,
    sound: Callable[[float, float], np.ndarray] | None = tone,
    picture: Callable[[float, tuple[int, int]], np.ndarray] | None = moving_square,
    begins: float = 0.0,
) -> Path:
    """An H.264 film with AAC; times: of the frames, where their rate varies; begins: s at which the images begin."""
    with av.open(str(path), "w") as container:
        video = audio = None
        if picture:
            video = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "10"})
            video.width, video.height, video.pix_fmt = *size, "yuv420p"
            video.codec_context.time_base = Fraction(1, 90000)
        if sound:
            audio = container.add_stream("aac", rate=RATE, layout="mono")
        if times is None:
            times = [i / fps for i in range(round(seconds * fps))]
        for place, time in enumerate(times if picture else ()):
            frame = av.VideoFrame.from_ndarray(picture(time, size), format="rgb24")
            frame.pts, frame.time_base = round((begins + time) * 90000), Fraction(1, 90000)
            frame.duration = round(((times[place + 1] if place + 1 < len(times) else seconds) - time) * 90000)
            container.mux(video.encode(frame))
        if picture:
            container.mux(video.encode(None))
        for second in range(int(np.ceil(seconds))) if sound else ():
            samples = sound(second, min(1.0, seconds - second))
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, second * RATE, Fraction(1, RATE)
            container.mux(audio.encode(frame))
        if sound:
            container.mux(audio.encode(None))
    return path
