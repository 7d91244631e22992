"""Films as they play everywhere: MP4 with H.264 and AAC, written frame by frame."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from utils import UserError

CLOCK = 90_000  # ticks per second: frames keep their own times, whatever their rate
SOUND_RATE = 48_000
LARGEST = 3840  # pixels along the longer side; decoders of telephones end there
BT709 = 1
LAYOUTS = {1: "mono", 2: "stereo", 3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}  # by channels


def playable_size(width: int, height: int) -> tuple[int, int]:
    """The size of a film that shows images of this size: even, as H.264's colours want it, and at most LARGEST."""
    scale = min(1.0, LARGEST / max(width, height))
    return tuple(max(2, 2 * round(length * scale / 2)) for length in (width, height))


class FilmWriter:
    """Writes one film: `frame` and `sound` in the order of time, then `close`; what was written by then plays.

    size: (width, height), even; rate: frames per second on average; channels: of the sound, 0 for none; crf: quality of
    x264, lower is better. UserError where this build of FFmpeg cannot write such films.
    """

    def __init__(self, path: Path, size: tuple[int, int], rate: float, channels: int, crf: int = 21) -> None:
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        try:
            self._video = self._container.add_stream(
                "libx264",
                rate=Fraction(max(rate, 1)).limit_denominator(1000),
                options={"preset": "veryfast", "crf": str(crf), "bf": "0"},  # so that times of decoding are true
            )
            self._audio = self._container.add_stream("aac", rate=SOUND_RATE) if channels else None
        except (av.FFmpegError, ValueError) as error:
            self._container.close()
            raise UserError(
                f"PyAV here cannot write H.264 with AAC ({error}): install its wheel, pip install av"
            ) from error
        self._video.width, self._video.height = size
        self._video.pix_fmt = "yuv420p"
        self._video.gop_size = max(1, round(2 * rate))
        context = self._video.codec_context
        context.time_base = Fraction(1, CLOCK)
        context.color_range, context.colorspace = ColorRange.MPEG, BT709
        context.color_primaries = context.color_trc = BT709
        if self._audio:
            self._audio.layout = "mono" if channels == 1 else "stereo"
            self._audio.bit_rate = 96_000 * min(channels, 2)
        self._resampler: av.AudioResampler | None = None
        self._kind: tuple[int, int] | None = None  # channels and rate that it takes
        self._colours = VideoReformatter()  # one for all frames: its tables take longer than a frame
        self._lengths: dict[int, int] = {}  # by time, in ticks, of frames that the encoder has
        self._last: tuple[float, np.ndarray] | None = None  # waits for the time at which it ends
        self._heard = 0

    def frame(self, time: float, image: np.ndarray) -> None:
        """Show (H, W, 3) uint8 RGB of the film's size from `time` s on."""
        if self._last:
            self._write_last(time)
        self._last = time, image

    def _write_last(self, end: float) -> None:
        time, image = self._last
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame = self._colours.reformat(
            frame,
            format="yuv420p",
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            dst_colorspace=Colorspace.ITU709,
        )
        frame.pts, frame.time_base = round(time * CLOCK), Fraction(1, CLOCK)
        self._lengths[frame.pts] = max(1, round(end * CLOCK) - frame.pts)
        self._write_images(frame)

    def _write_images(self, given: av.VideoFrame | None) -> None:
        """x264 hands no lengths on, and the last packet's says when the film ends."""
        for packet in self._video.encode(given):
            packet.duration = self._lengths.pop(packet.pts, packet.duration)
            self._container.mux(packet)

    def sound(self, samples: np.ndarray, rate: int) -> None:
        """Append (samples, C) float32 to the sound; C and the rate may change on the way."""
        if samples.shape[1] not in LAYOUTS:
            samples = samples.mean(1, keepdims=True)
        if self._kind != (samples.shape[1], rate):
            self._flush_sound()
            self._kind = samples.shape[1], rate
            self._resampler = av.AudioResampler(format="fltp", layout=self._audio.layout.name, rate=SOUND_RATE)
        flat = np.ascontiguousarray(samples, np.float32).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(flat, format="flt", layout=LAYOUTS[samples.shape[1]])
        frame.sample_rate = rate
        self._write_sound(frame)

    def _flush_sound(self) -> None:
        if self._resampler:
            self._write_sound(None)

    def _write_sound(self, given: av.AudioFrame | None) -> None:
        for frame in self._resampler.resample(given):
            frame.pts, frame.time_base = self._heard, Fraction(1, SOUND_RATE)
            self._heard += frame.samples
            self._container.mux(self._audio.encode(frame))

    def close(self, end: float = 0.0) -> None:
        """Finish the film; its last frame is shown until `end` s."""
        try:
            if self._last:
                self._write_last(end)
                self._write_images(None)
            if self._audio:
                self._flush_sound()
                self._container.mux(self._audio.encode(None))
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of the file, whatever state it is in."""
        self._container.close()
