"""Films to pairs: ours against an `ffmpeg` that seeks, in CPU time; and how long a long film takes."""

import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from experiments.bench_input import random_image
from experiments.timing import Timing, add_rounds, alternate
from prepare.convert import Wish, convert
from prepare.names import Task
from utils import number

FPS, SOUND_RATE = 25, 44100


def add_flags(parser) -> None:
    add_rounds(parser, default=3)
    parser.add_argument("--clips", type=number(int, low=1), default=8, help="number of films of 10 s")
    parser.add_argument("--minutes", type=number(float, above=0), default=20, help="length of the long film")


def make_film(path: Path, seconds: int, seed: int = 0) -> None:
    """H.264 of 640 x 360 with a key frame every 5 s, an image that moves; AAC stereo noise."""
    rng = np.random.default_rng(seed)
    image = random_image(rng)
    with av.open(str(path), "w") as film:
        video = film.add_stream("libx264", rate=FPS, options={"preset": "ultrafast"})
        video.width, video.height, video.pix_fmt, video.codec_context.gop_size = 640, 360, "yuv420p", 5 * FPS
        audio = film.add_stream("aac", rate=SOUND_RATE, layout="stereo")
        for second in range(seconds):
            for number_in_second in range(FPS):
                place = second * FPS + number_in_second
                frame = av.VideoFrame.from_ndarray(np.roll(image, 2 * place, axis=1), "rgb24")
                frame.pts, frame.time_base = place, Fraction(1, FPS)
                film.mux(video.encode(frame))
            wave = rng.uniform(-0.2, 0.2, (2, SOUND_RATE)).astype(np.float32)
            sound = av.AudioFrame.from_ndarray(wave, "fltp", "stereo")
            sound.rate, sound.pts, sound.time_base = SOUND_RATE, second * SOUND_RATE, Fraction(1, SOUND_RATE)
            film.mux(audio.encode(sound))
        film.mux(video.encode())
        film.mux(audio.encode())


def pairs_by_us(films: list[Path], out: Path) -> None:
    for path in films:
        outcome = convert(Task(path, path.name, path.stem), out, Wish())
        assert outcome.rows, outcome
        for file in (out / "frames" / f"{path.stem}.jpg", out / "audio" / f"{path.stem}.wav"):
            file.unlink()


def pairs_by_ffmpeg(films: list[Path], out: Path) -> None:
    """The frame at 5.0 s and the first 10 s of audio, as a script would ask for them."""
    quiet = ["ffmpeg", "-v", "error", "-y", "-threads", "1"]
    for path in films:
        image = [*quiet, "-ss", "5", "-i", path, "-frames:v", "1", "-q:v", "2", out / "frame.jpg"]
        sound = [*quiet, "-i", path, "-vn", "-t", "10", "-ac", "1", "-ar", "16000", out / "sound.wav"]
        for command in (image, sound):
            subprocess.run(command, check=True)


def cpu_time() -> float:
    """CPU seconds of this process and of those that it started and that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + spent.ru_utime + spent.ru_stime


def run(args) -> Iterator[Timing]:
    with tempfile.TemporaryDirectory() as folder:
        out, films = Path(folder), [Path(folder) / f"film{i}.mp4" for i in range(args.clips)]
        for seed, path in enumerate(films):
            make_film(path, 10, seed)
        theirs = pairs_by_ffmpeg if shutil.which("ffmpeg") else None
        ours, baseline = alternate(
            lambda: pairs_by_us(films, out),
            lambda: theirs(films, out) if theirs else None,
            args.rounds,
            cpu_time,
        )
        name = f"clips: CPU time per film of 10 s (baseline: {'ffmpeg' if theirs else 'no ffmpeg here'})"
        yield Timing(name, 1000 * ours / args.clips, 1000 * baseline / args.clips if theirs else None, "ms")
        films = [Path(folder) / "long.mp4"]
        make_film(films[0], round(60 * args.minutes))
        spent, _ = alternate(lambda: pairs_by_us(films, out), lambda: None, args.rounds, cpu_time)
        yield Timing(f"clips: CPU time of one pair from a film of {args.minutes:g} min", spent, None, "s")
