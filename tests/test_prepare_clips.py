"""Clips made here with PyAV: each second has a colour, each frame its number: the frame that is taken can be proved."""

import csv
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import soundfile
from conftest import files_up_to, shared_folder
from PIL import Image

import prepare.convert
import prepare.pool
import prepare_data
from annotations import clip_id
from audio_io import SAMPLE_RATE, load_audio, load_spectrogram
from dataset import find_pairs
from prepare.folder import finished_ids
from utils import run_cli

COLOURS = ((220, 40, 40), (40, 220, 40), (40, 40, 220), (220, 220, 40), (220, 40, 220), (40, 220, 220), (90, 90, 90))
WIDTH, HEIGHT, BLOCK = 160, 64, 16  # ten blocks in the top row write the frame's number in bits, lowest first
TURN = 1 << 16  # 1 in a display matrix
TONE = 440  # Hz; amplitude 0.4 left, 0.2 right
FAST = {"libx264": {"preset": "veryfast"}, "libvpx": {"deadline": "realtime", "cpu-used": "8"}}
OPUS = {"video": "libvpx", "audio": "libopus", "rate": 48000}
LIVE = {"options": {"live": "1"}}  # Matroska without a length in its header

PAIRS = {  # file: how it is made, the id, the number of the frame
    "--8puiAGLhs_000030.mp4": ({}, "--8puiAGLhs_000030", 125),
    "_30fps-mp4__60_70.mp4": ({"fps": 30}, "_30fps-mp4__000060", 150),
    "mkvNTSC-a_b_30000_40000.mkv": ({"fps": Fraction(30000, 1001)}, "mkvNTSC-a_b_000030", 150),
    "webmopus-11_7_17.webm": (OPUS, "webmopus-11_000007", 125),
    "b_frames.AVI": ({"video": "mpeg4", "audio": "libmp3lame", "b_frames": 2}, "b_frames", 125),
    "h264.avi": ({"audio": "pcm_s16le"}, "h264", 125),
    "no_length.mkv": ({"audio": "pcm_s16le"} | LIVE, "no_length", 125),
    "no_length_opus.webm": (OPUS | LIVE, "no_length_opus", 125),
    "mono.mkv": ({"audio": "pcm_s16le", "rate": 16000, "channels": 1}, "mono", 125),
    "nested/seven_seconds.mp4": ({"seconds": 7}, "seven_seconds", 125),
    "three_seconds.mp4": ({"seconds": 3}, "three_seconds", 37),
    "twelve_seconds.mp4": ({"seconds": 12}, "twelve_seconds", 125),
}
BROKEN = {  # file: how it is made or of which it is a copy, how much of it is kept, what failures.csv says
    "no_sound.mp4": ({"seconds": 2, "audio": None}, 1, "no audio stream"),
    "silent.mp4": ({"seconds": 2, "loudness": 0}, 1, "all-zero sound"),
    "no_picture.mp4": ({"seconds": 2, "video": None}, 1, "no video stream"),
    "short.mp4": ({"seconds": 0.6}, 1, "too short: 0.60 s of pictures"),
    "same-id_abc_30_40.mp4": ({"seconds": 1}, 1, "same id: same-id_abc_000030.webm"),
    "same-id_abc_000030.webm": ({"seconds": 1} | OPUS, 1, "same id: same-id_abc_30_40.mp4"),
    "cut.mp4": ("--8puiAGLhs_000030.mp4", 0.9, "truncated: the index"),
    "cut_index_first.mp4": ({"options": {"movflags": "faststart"}}, 0.6, "truncated:"),
    "cut_mkv.mkv": ("mkvNTSC-a_b_30000_40000.mkv", 0.6, "truncated: it ends after 6"),
    "cut_avi.avi": ("h264.avi", 0.6, "truncated:"),
    "empty.mp4": ("--8puiAGLhs_000030.mp4", 0, "empty"),
}


def tone(seconds: float, rate: int, channels: int, loudness: float = 1) -> np.ndarray:
    """(channels, samples) float32."""
    wave = loudness * np.sin(2 * np.pi * TONE * np.arange(round(seconds * rate)) / rate)
    return np.stack([0.4 * wave, 0.2 * wave][:channels]).astype(np.float32)


def picture(number: int, fps: float) -> np.ndarray:
    rgb = np.full((HEIGHT, WIDTH, 3), COLOURS[int(number / fps) % len(COLOURS)], np.uint8)
    for bit in range(WIDTH // BLOCK):
        rgb[:BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = 255 * (number >> bit & 1)
    return rgb


def make_clip(
    path: Path,
    seconds: float = 10,
    fps: int | Fraction = 25,
    video: str | None = "libx264",
    audio: str | None = "aac",
    rate: int = 44100,
    channels: int = 2,
    loudness: float = 1,
    b_frames: int | None = None,
    options: dict[str, str] | None = None,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as container:
        frames = container.add_stream(video, rate=fps, options=FAST.get(video)) if video else None
        sounds = container.add_stream(audio, rate=rate, layout=("mono", "stereo")[channels - 1]) if audio else None
        if frames:
            frames.width, frames.height, frames.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            if b_frames is not None:
                frames.codec_context.max_b_frames = b_frames
            for number in range(round(seconds * fps)):
                frame = av.VideoFrame.from_ndarray(picture(number, fps), "rgb24")
                frame.pts, frame.time_base = number, 1 / Fraction(fps)
                container.mux(frames.encode(frame))
            container.mux(frames.encode())
        if sounds:
            wave = tone(seconds, rate, channels, loudness)
            for start in range(0, wave.shape[1], 1024):
                piece = np.ascontiguousarray(wave[:, start : start + 1024])
                frame = av.AudioFrame.from_ndarray(piece, "fltp", sounds.layout.name)
                frame.rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
                container.mux(sounds.encode(frame))
            container.mux(sounds.encode())


def read_pair(out: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The picture (H, W, 3) and the sound (samples,) of a pair; the sound is asserted to be 16-kHz mono 16 bit."""
    info = soundfile.info(out / "audio" / f"{name}.wav")
    assert (info.samplerate, info.channels, info.subtype) == (SAMPLE_RATE, 1, "PCM_16")
    with Image.open(out / "frames" / f"{name}.jpg") as jpeg:
        assert jpeg.format == "JPEG"
        return np.array(jpeg), load_audio(out / "audio" / f"{name}.wav")


def frame_number(rgb: np.ndarray) -> int:
    blocks = rgb[4 : BLOCK - 4].reshape(BLOCK - 8, -1, BLOCK, 3)[:, :, 4:-4].mean(axis=(0, 2, 3))
    return sum(1 << bit for bit, bright in enumerate(blocks > 128) if bright)


def rows(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def leftovers(out: Path) -> list[Path]:
    return [path for path in out.rglob(".*") if "lock" not in path.name]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "clips"
    for name, (how, _, _) in (PAIRS | BROKEN).items():
        path = folder / name
        make_clip(path, **how) if isinstance(how, dict) else shutil.copy(folder / how, path)
        if name in BROKEN:
            os.truncate(path, int(path.stat().st_size * BROKEN[name][1]))
    (folder / "page.mp4").write_text("<html>not found</html>")
    (folder / "playlist.mp4").write_text(f"#EXTM3U\n#EXTINF:10,\n{folder / '--8puiAGLhs_000030.mp4'}\n#EXT-X-ENDLIST\n")
    os.link(folder / "silent.mp4", os.fsencode(folder) + b"/caf\xe9.mp4")
    (folder / "._hidden.mp4").write_text("no clip")
    (folder / "notes.txt").write_text("no clip")
    (folder / "list.csv").write_text('--8puiAGLhs,30,"duck, quacking",train\nwebmopus-11,7,owl,test\nsilent,1,a,b\n')
    return folder


@pytest.fixture(scope="module")
def made(clips, cli, tmp_path_factory):
    """What one run over all clips prints, and the folder that it makes."""
    out = tmp_path_factory.mktemp("made") / "pairs"
    return cli("prepare_data", "clips", clips, "--out", out, "--vggsound_csv", clips / "list.csv", "--workers", 2), out


# ---------------------------------------------------------------- pairs


@pytest.mark.parametrize("file", PAIRS)
def test_the_frame_is_the_one_at_five_seconds(made, file):
    how, name, number = PAIRS[file]
    rgb, _ = read_pair(made[1], name)
    assert frame_number(rgb) == number
    second = int(number / how.get("fps", 25))
    assert np.abs(rgb[40, 80].astype(int) - COLOURS[second]).max() < 12


@pytest.mark.parametrize("file", PAIRS)
def test_the_sound_is_the_clips_first_ten_seconds(made, file):
    how, name, _ = PAIRS[file]
    _, sound = read_pair(made[1], name)
    assert abs(len(sound) / SAMPLE_RATE - min(how.get("seconds", 10), 10)) < 0.05
    spectrum = np.abs(np.fft.rfft(sound[SAMPLE_RATE : 2 * SAMPLE_RATE]))
    assert spectrum.argmax() == TONE
    assert abs(2 * spectrum.max() / SAMPLE_RATE - (0.4 if how.get("channels") == 1 else 0.3)) < 0.02  # the mean of both


def test_the_sound_is_what_the_loader_makes_of_the_same_samples(made, tmp_path):
    soundfile.write(tmp_path / "same.wav", tone(10, 44100, 2).T, 44100, subtype="FLOAT")
    _, sound = read_pair(made[1], "no_length")
    assert np.abs(sound - load_audio(tmp_path / "same.wav")).max() < 1e-4


def test_every_clip_is_a_pair_or_a_row_of_the_failures(made):
    done, out = made
    assert done.returncode == 0 and not done.stderr
    ids = {name for _, name, _ in PAIRS.values()}
    assert finished_ids(out) == ids == {path.stem for path in (out / "frames").iterdir()}
    head, *failures = rows(out / "failures.csv")
    reasons = {file: reason for file, _, reason in failures}
    assert head == ["file", "id", "reason"] and reasons.keys() == {
        *BROKEN,
        "page.mp4",
        "playlist.mp4",
        "caf\\udce9.mp4",
    }
    for file, (_, _, says) in BROKEN.items():
        assert reasons[file].startswith(says), (file, reasons[file])
    assert reasons["page.mp4"].startswith("no video") and reasons["playlist.mp4"].startswith("no video")
    assert "other files: 3 (" in made[0].stdout and "hidden 1" in made[0].stdout
    assert f"{len(PAIRS) + len(failures)} clips" in done.stdout and f"{len(PAIRS)} pairs made" in done.stdout
    assert f"{len(failures)} failed" in done.stdout and "truncated: 4" in done.stdout
    assert not leftovers(out)


def test_the_summary_names_middle_frames_and_kept_names(made):
    early = next(line for line in made[0].stdout.splitlines() if "middle" in line)
    assert "three_seconds" in early and "seven_seconds" not in early
    other = next(line for line in made[0].stdout.splitlines() if "no known form" in line)
    assert "b_frames" in other


def test_classes_come_from_vggsounds_list(made):
    wanted = [["--8puiAGLhs_000030", "duck, quacking", "train"], ["webmopus-11_000007", "owl", "test"]]
    assert rows(made[1] / "classes.csv") == [["id", "class", "split"], *wanted]
    assert f"2 of {len(PAIRS)} pairs" in made[0].stdout


def test_pairs_load_as_a_data_set(made):
    pairs, missing = find_pairs(made[1], "vggsound", None)
    assert len(pairs) == len(PAIRS) and not missing
    assert load_spectrogram(pairs[0].audio, 5).shape == (1, 257, 501)


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [
        ((0, TURN, -TURN, 0), lambda rgb: np.rot90(rgb, -1)),  # a telephone held upright
        ((0, -TURN, TURN, 0), lambda rgb: np.rot90(rgb, 1)),
        ((-TURN, 0, 0, -TURN), lambda rgb: np.rot90(rgb, 2)),
        ((-TURN, 0, 0, TURN), lambda rgb: rgb[:, ::-1]),
    ],
)
def test_rotation_metadata_is_honoured(made, clips, cli, tmp_path, matrix, upright):
    content = bytearray((clips / "--8puiAGLhs_000030.mp4").read_bytes())
    place = content.index(b"tkhd") + 44  # the matrix of the track header: a b u, c d v, x y w
    a, b, c, d = matrix
    content[place : place + 36] = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/turned.mp4").write_bytes(content)
    assert cli("prepare_data", "clips", tmp_path / "clips", "--out", tmp_path, "--workers", 1).returncode == 0
    turned = read_pair(tmp_path, "turned")[0].astype(int)
    wanted = upright(read_pair(made[1], "--8puiAGLhs_000030")[0])
    assert turned.shape == wanted.shape and np.abs(turned - wanted).mean() < 2


def test_flickr_clips_give_their_middle_and_keep_their_names(clips, cli, tmp_path):
    (tmp_path / "clips").mkdir()
    os.link(clips / "twelve_seconds.mp4", tmp_path / "clips/10000130166_30.mp4")
    done = cli("prepare_data", "clips", tmp_path / "clips", "--out", tmp_path, "--source", "flickr")
    rgb, sound = read_pair(tmp_path, "10000130166_30")
    assert frame_number(rgb) == 150 and abs(len(sound) / SAMPLE_RATE - 10) < 0.05
    assert "nearest" not in done.stdout and "known form" not in done.stdout


def test_a_film_with_camera_sound_becomes_a_pair(cli, tmp_path):
    (tmp_path / "clips").mkdir()
    shutil.copy(shared_folder("clips") / "big_buck_bunny.mp4", tmp_path / "clips")
    assert cli("prepare_data", "clips", tmp_path / "clips", "--out", tmp_path).returncode == 0
    rgb, sound = read_pair(tmp_path, "big_buck_bunny")
    assert rgb.shape == (720, 1280, 3) and rgb.std() > 20 and 5.2 < len(sound) / SAMPLE_RATE < 5.4
    with av.open(str(shared_folder("clips") / "big_buck_bunny.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in islice(film.decode(video=0), 122, 129)]
    assert np.argmin([cv2.absdiff(frame, rgb).mean() for frame in frames]) == 3  # number 125


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("stem", "wanted", "remark"),
    [
        ("--8puiAGLhs_000030", "--8puiAGLhs_000030", ""),
        ("--8puiAGLhs_035752", "--8puiAGLhs_035752", ""),
        ("_a_b_c_1_12_30_40", "_a_b_c_1_12_000030", ""),
        ("--8puiAGLhs_30000_40000", "--8puiAGLhs_000030", ""),
        ("--8puiAGLhs_0_10000", "--8puiAGLhs_000000", ""),
        ("--8puiAGLhs_0.000_10.000", "--8puiAGLhs_000000", ""),
        ("v--8puiAGLhs_30_40_out", "--8puiAGLhs_000030", ""),
        ("_a_b_c_d_12_30", "_a_b_c_d_12_30", "ambiguous"),
        ("interview_A_2", "interview_A_2", "ambiguous"),
        ("Y--8puiAGLhs_30000", "Y--8puiAGLhs_30000", "ambiguous"),
        ("--8puiAGLhs_0_7", "--8puiAGLhs_0_7", "ambiguous"),
        ("--8puiAGLhs_150000", "--8puiAGLhs_150000", "ambiguous"),
        ("--8puiAGLhs_5000", "--8puiAGLhs_5000", "ambiguous"),
        ("--8puiAGLhs_40_30", "--8puiAGLhs_40_30", "other"),
        ("--8puiAGLhs_30500_40500", "--8puiAGLhs_30500_40500", "other"),
        ("--8puiAGLhs", "--8puiAGLhs", "other"),
        ("--8puiAGLhs.f137", "--8puiAGLhs.f137", "other"),
        ("take_1", "take_1", "other"),
        ("rain, part 2", "rain, part 2", "other"),
        ("ünïcödeÄÖÜß_30", "ünïcödeÄÖÜß_30", "other"),
    ],
)
def test_names_in_the_communitys_forms(stem, wanted, remark):
    assert clip_id(stem) == (wanted, remark)


@pytest.mark.parametrize(
    ("stem", "listed"),
    [
        ("--8puiAGLhs_5000", "--8puiAGLhs_000005"),
        ("--8puiAGLhs_5000", "--8puiAGLhs_005000"),
        ("Y--8puiAGLhs_30000", "--8puiAGLhs_000030"),
        ("--8puiAGLhs_30", "--8puiAGLhs_000030"),
        ("--8puiAGLhs_0_7", "--8puiAGLhs_000000"),
        ("v--8puiAGLhs_30_37_out", "--8puiAGLhs_000030"),
    ],
)
def test_a_list_settles_what_a_name_means(stem, listed):
    assert clip_id(stem, {listed}) == (listed, "")
    assert clip_id(stem, {stem, listed}) == (stem, "")  # an own name that is listed stays


@pytest.mark.slow
def test_public_ids_are_read_as_they_are():
    for line in (shared_folder("metadata") / "vggss_test.csv").read_text().split():
        assert clip_id(line.split(",")[0]) == (line.split(",")[0], "")


# ---------------------------------------------------------------- interrupted, crashed, resumed


@pytest.fixture
def many(clips, tmp_path) -> Path:
    """A folder of 30 clips, one of them broken."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(29):
        os.link(clips / "--8puiAGLhs_000030.mp4", folder / f"--8puiAGLhs_{number:06d}.mp4")
    os.link(clips / "silent.mp4", folder / "!silent.mp4")
    return folder


def start(folder: Path, out: Path) -> multiprocessing.Process:
    """A slow run in a process of its own; returns when it has made some pairs."""
    real = prepare.convert.pieces_of

    def slow(*what):
        time.sleep(0.05)
        return real(*what)

    def run() -> None:
        os.setpgrp()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        prepare.convert.pieces_of = slow
        run_cli(lambda: prepare_data.main(["clips", str(folder), "--out", str(out), "--workers", "2"]))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    wait_until(lambda: len(list(out.glob("audio/[!.]*.wav"))) >= 5 or not process.is_alive())
    return process


def wait_until(happened: Callable[[], bool]) -> None:
    """Come back when it happened, or after a time so long that what is asserted next will not hold."""
    limit = time.monotonic() + 60
    while not happened() and time.monotonic() < limit:
        time.sleep(0.005)


def assert_whole(out: Path) -> int:
    """Every file that bears its name is whole; their number."""
    for path in out.glob("frames/[!.]*.jpg"):
        Image.open(path).load()
    for path in out.glob("audio/[!.]*.wav"):
        load_audio(path)
    return len(finished_ids(out))


@pytest.mark.parametrize("whom", ["parent", "all"])
def test_a_killed_run_leaves_no_half_file_and_a_new_one_completes(many, cli, tmp_path, whom):
    out = tmp_path / "out"
    process = start(many, out)
    os.kill(process.pid, signal.SIGKILL) if whom == "parent" else os.killpg(process.pid, signal.SIGKILL)
    process.join()
    early = {path: path.stat().st_mtime_ns for path in out.glob("*/*.*") if not path.name.startswith(".")}
    assert 5 <= assert_whole(out) < 29, "the run was over before it was killed"
    wait_until(lambda: not group_lives(process.pid))  # the workers notice that their parent is gone
    assert not group_lives(process.pid)
    done = cli("prepare_data", "clips", many, "--out", out, "--workers", 2)
    assert done.returncode == 0 and assert_whole(out) == 29 and not leftovers(out)
    assert {path: path.stat().st_mtime_ns for path in early} == early
    assert [row[0] for row in rows(out / "failures.csv")[1:]] == ["!silent.mp4"]


def group_lives(group: int) -> bool:
    """Whether any process of the group is at work; one that has ended but that nobody has asked after is not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                return True
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_accounts_for_what_it_did(many, tmp_path, capfd, number):
    out = tmp_path / "out"
    process = start(many, out)
    os.killpg(process.pid, number)
    process.join(60)
    assert process.exitcode == 130 and not group_lives(process.pid)
    assert 5 <= assert_whole(out) < 29 and not leftovers(out)
    assert [row[0] for row in rows(out / "failures.csv")[1:]] == ["!silent.mp4"]
    printed = capfd.readouterr()
    assert "not reached" in printed.out and "interrupted" in printed.err and "Traceback" not in printed.err


def test_a_second_run_makes_only_what_is_missing(many, cli, tmp_path):
    out = tmp_path / "out"
    cli("prepare_data", "clips", many, "--out", out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.*")}
    lost = out / "audio/--8puiAGLhs_000007.wav"
    lost.unlink()
    done = cli("prepare_data", "clips", many, "--out", out)
    assert "1 pairs made, 28 there already, 1 failed" in done.stdout
    changed = {path.stem for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert changed == {"--8puiAGLhs_000007"}


def test_a_decoder_that_crashes_while_writing_costs_one_clip(many, cli, tmp_path, monkeypatch):
    real = prepare.convert.write_audio

    def crash(path, *args, **kwargs):
        real(path, *args, **kwargs)
        if "--8puiAGLhs_000003" in str(path):
            os.truncate(path, 100)
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(prepare.convert, "write_audio", crash)
    out = tmp_path / "out"
    assert "28 pairs made" in cli("prepare_data", "clips", many, "--out", out, "--workers", 1).stdout
    assert assert_whole(out) == 28 and not leftovers(out)
    assert rows(out / "failures.csv")[2][1:] == ["--8puiAGLhs_000003", "crash: the process ended with status -9"]


def test_an_error_that_nobody_foresaw_costs_one_clip(many, cli, tmp_path, monkeypatch):
    real = prepare.convert.pieces_of

    def fail(film, *what):
        return {}["stream"] if "_000003" in film.path.name else real(film, *what)

    monkeypatch.setattr(prepare.convert, "pieces_of", fail)
    out = tmp_path / "out"
    assert "28 pairs made" in cli("prepare_data", "clips", many, "--out", out, "--workers", 2).stdout
    assert rows(out / "failures.csv")[2][1:] == ["--8puiAGLhs_000003", "crash: KeyError('stream')"]


def test_a_decoder_that_hangs_costs_one_clip(many, cli, tmp_path, monkeypatch):
    real = prepare.convert.pieces_of

    def hang(film, *what):
        return time.sleep(600) if "_000003" in film.path.name else real(film, *what)

    monkeypatch.setattr(prepare.pool, "CLIP_TIMEOUT", 5)
    monkeypatch.setattr(prepare.convert, "pieces_of", hang)
    out = tmp_path / "out"
    assert "hang: 1" in cli("prepare_data", "clips", many, "--out", out, "--workers", 2).stdout
    assert rows(out / "failures.csv")[2][1:] == ["--8puiAGLhs_000003", "hang: not done after 5 s"]
    assert len(finished_ids(out)) == 28


def test_a_full_disk_ends_the_run_in_one_line(many, cli, tmp_path):
    with files_up_to(5_000):
        done = cli("prepare_data", "clips", many, "--out", tmp_path / "out")
    assert done.returncode == 2 and "(File too large)" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not leftovers(tmp_path / "out") and "not reached" in done.stdout


def test_two_runs_do_not_share_a_folder(many, cli, tmp_path):
    process = start(many, tmp_path / "out")
    done = cli("prepare_data", "clips", many, "--out", tmp_path / "out")
    process.join(60)
    assert done.returncode == 2 and "another run" in done.stderr and process.exitcode == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("no/such/folder", "--out", "{tmp}"), "does not exist"),
        (("{tmp}/empty", "--out", "{tmp}"), "no file"),
        (("{clips}", "--out", "{tmp}", "--overlap", "2"), "--every"),
        (("{clips}", "--out", "{tmp}", "--shard", "0/4"), "I/N"),
        (("{clips}", "--out", "{tmp}", "--shard", "5/4"), "I/N"),
        (("{tmp}",), "--out"),
        (("{clips}", "--out", "{tmp}", "--workers", "0"), "at least 1"),
        (("{clips}", "--out", "{tmp}", "--vggsound_csv", "no.csv"), "no.csv"),
        (("{clips}", "--out", "{tmp}", "--vggsound_csv", "{clips}/notes.txt"), "no row"),
        (("{clips}", "--out", "{clips}/notes.txt"), "notes.txt"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(clips, cli, tmp_path, flags, says):
    (tmp_path / "empty").mkdir()
    done = cli("prepare_data", "clips", *(flag.format(tmp=tmp_path, clips=clips) for flag in flags))
    assert done.returncode == 2 and says in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
