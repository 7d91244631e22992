"""Films of known time, colour and pitch in every dress: a colour a second, and a tone that changes every second."""

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

COLOURS = np.array(
    [
        (200, 60, 50),
        (50, 190, 70),
        (60, 60, 200),
        (210, 200, 60),
        (190, 70, 190),
        (60, 200, 200),
        (120, 120, 120),
        (230, 230, 230),
    ]
)  # of each second
TONES = (440, 880, 660, 550, 990, 770, 500, 620)  # Hz of each second
WIDTH, HEIGHT, SECONDS = 64, 48, 4
NOISE = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
SPEED = {
    "libx264": {"preset": "ultrafast"}, "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"}, "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"preset": "11", "svtav1-params": "lp=1"},
}  # fmt: skip
TRANSFERS = {"pq": 16, "hlg": 18}
FROM_BT709 = np.array([(0.627404, 0.329283, 0.043313), (0.069097, 0.919540, 0.011362), (0.016391, 0.088013, 0.895595)])


def hdr_codes(rgb: Sequence[int], transfer: str) -> np.ndarray:
    """Code values 0..1 in BT.2020 of a colour of BT.1886 whose white is shown at 203 cd/m2 (ITU-R BT.2408, BT.2100)."""
    light = FROM_BT709 @ (np.asarray(rgb) / 255) ** 2.4 * 203  # cd/m2
    if transfer == "pq":
        y = (light / 10_000) ** (2610 / 16384)
        return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)
    scene = (light / 1000) ** (1 / 1.2)  # the system gamma, channel by channel
    return np.where(
        scene <= 1 / 12, np.sqrt(3 * scene), 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    )


def picture(
    rgb: Sequence[int], pix_fmt: str, width: int, height: int, transfer: str | None = None, matrix: str | None = None
) -> av.VideoFrame:
    """A frame of one colour in the matrix and range that the pixel format and size are usually stored with."""
    if transfer:
        red, green, blue = hdr_codes(rgb, transfer)
        luma = 0.2627 * red + 0.678 * green + 0.0593 * blue
        codes = [64 + 876 * luma, 512 + 896 * (blue - luma) / 1.8814, 512 + 896 * (red - luma) / 1.4746]
        frame = av.VideoFrame(width, height, "yuv420p10le")
        for plane, code in zip(frame.planes, codes, strict=True):
            plane.update(np.full(plane.buffer_size // 2, round(code), "<u2").tobytes())
        return frame
    if pix_fmt.startswith(("yuva", "rgba", "bgra", "argb")):
        pixels = np.zeros((height, width, 4), np.uint8)
        pixels[..., :3], pixels[..., 3] = rgb, 255
        return av.VideoFrame.from_ndarray(pixels, "rgba").reformat(format=pix_fmt)
    frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), rgb, np.uint8), "rgb24")
    return frame.reformat(
        format=pix_fmt,
        dst_colorspace=matrix or ("ITU709" if height >= 720 else "ITU601"),
        dst_color_range="JPEG" if pix_fmt.startswith("yuvj") else "MPEG",
    )


def wave(second: int, rate: int) -> np.ndarray:
    """(samples,) of one second, between -0.3 and 0.3."""
    return 0.3 * np.sin(2 * np.pi * TONES[second % len(TONES)] * np.arange(rate) / rate)


def make_film(
    path: Path,
    format: str | None = None,
    video: str | None = "libx264",
    audio: str | None = "aac",
    rate: int = 44100,
    layout: str = "mono",
    gains: Sequence[float] = (),
    fps: int | Fraction = 25,
    seconds: int = SECONDS,
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (WIDTH, HEIGHT),
    times: Sequence[float] | None = None,
    image_from: float = 0.0,
    sound_from: float = 0.0,
    transfer: str | None = None,
    tags: tuple[int, int, int] | None = None,
    pixel_shape: Fraction | None = None,
    b_frames: int | None = None,
    gop: int = 25,
    silent_track_first: bool = False,
    options: dict[str, str] | None = None,
    bit_rate: int | None = None,
    turned: int = 0,
    matrix: str | None = None,
    loud_from: float = 0.0,
    sharp_at: int | None = None,
    sound_seconds: int | None = None,
    coding: dict[str, str] | None = None,
) -> None:
    """Write a film. times: of its frames, else one every 1 / fps s; gains: of the channels, else 1 for each.

    image_from, sound_from: s from which on there is an image, or sound, on the same clock. tags: primaries, transfer
    and matrix in FFmpeg's numbers. loud_from: s before which the sound is a tenth as loud. sharp_at: the second that
    shows noise. sound_seconds: where the sound does not end with the images. coding:
    of the images, for their encoder.
    """
    times = np.arange(image_from, seconds, 1 / float(fps)) if times is None else times
    with av.open(str(path), "w", format=format, options=options or {}) as film:
        if video:
            images = film.add_stream(video, rate=fps, options=SPEED.get(video, {}) | (coding or {}))
            images.width, images.height, images.pix_fmt = *size, pix_fmt
            images.codec_context.gop_size = gop
            if b_frames is not None:
                images.codec_context.max_b_frames = b_frames
            if transfer:
                tags = (9, TRANSFERS[transfer], 9)
            if tags:
                context = images.codec_context
                context.color_primaries, context.color_trc, context.colorspace = tags
                context.color_range = 2 if pix_fmt.startswith("yuvj") else 1
            if pixel_shape:
                images.codec_context.sample_aspect_ratio = pixel_shape
            if bit_rate:
                images.bit_rate = bit_rate
            if times is not None and not np.allclose(np.diff(times), 1 / float(fps)):
                images.codec_context.time_base = Fraction(1, 1000)
            if turned:
                images.set_display_rotation(turned)
        sounds = []
        if audio:
            for _ in range(1 + silent_track_first):
                stream = film.add_stream(audio, rate=rate, layout=layout)
                if audio.startswith(("wma", "mp2", "ac3", "libopencore")):
                    stream.bit_rate = 12200 if audio.startswith("libopencore") else 128000
                sounds.append(stream)
        packets = []
        if video:
            for time in times:
                frame = picture(
                    COLOURS[min(int(time + 1e-6), seconds - 1) % len(COLOURS)], pix_fmt, *size, transfer, matrix
                )
                if sharp_at is not None and int(time + 1e-6) == sharp_at:
                    frame = av.VideoFrame.from_ndarray(NOISE, "rgb24").reformat(format=pix_fmt)
                base = images.codec_context.time_base or 1 / Fraction(fps)
                frame.pts, frame.time_base = round(time / base), Fraction(base)
                packets += images.encode(frame)
            packets += images.encode()
        for number, stream in enumerate(sounds):
            channels = stream.codec_context.layout.nb_channels
            loud = np.array(gains or [1.0] * channels)[:, None] * (not (silent_track_first and number == 0))
            resampler = av.AudioResampler(stream.codec_context.format, layout, rate)
            for second in range(sound_seconds or seconds):
                mono = wave(second, rate) * (1 if second >= loud_from else 0.1)
                begin = max(0, round((sound_from - second) * rate))
                if begin >= rate:
                    continue
                samples = np.ascontiguousarray((loud * mono[begin:]).astype(np.float32).T.reshape(1, -1))
                frame = av.AudioFrame.from_ndarray(samples, "flt", layout)
                frame.rate, frame.pts, frame.time_base = rate, second * rate + begin, Fraction(1, rate)
                for part in resampler.resample(frame):
                    packets += stream.encode(part)
            packets += stream.encode()
        for packet in sorted(packets, key=lambda p: float((p.dts or 0) * p.time_base)):
            film.mux(packet)
    if video == "libsvtav1":  # started by root, it makes the whole process a real-time one, which starves all others
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def copy_from(film: Path, path: Path, begin: float, format: str | None = None, from_key_frame: bool = True) -> None:
    """Copy packets from `begin` s on without decoding them, as a cutting tool does: from the key frame before it."""
    with av.open(str(film)) as source, av.open(str(path), "w", format=format) as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        packets = [packet for packet in source.demux() if packet.dts is not None]
        video = source.streams.video[0].index
        keys = [p.pts * p.time_base for p in packets if p.stream_index == video and p.is_keyframe]
        first = max((key for key in keys if key <= begin), default=0) if from_key_frame else begin
        for packet in packets:
            if packet.pts * packet.time_base < (first if packet.stream_index == video else begin) - 1e-6:
                continue
            shift = round(begin / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, streams[packet.stream_index]
            target.mux(packet)


def damage(film: Path, path: Path, numbers: Sequence[int], kind: str) -> None:
    """A copy in which packets of the stream of that kind hold zeros, by their number."""
    content = bytearray(Path(film).read_bytes())
    with av.open(str(film)) as source:
        stream = source.streams.get({kind: 0})[0]
        places = [(packet.pos, packet.size) for packet in source.demux(stream) if packet.size]
    for number in numbers:
        place, size = places[number]
        content[place : place + size] = bytes(size)
    Path(path).write_bytes(content)
