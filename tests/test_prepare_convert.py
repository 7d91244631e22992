"""Long films, frames and shards of `prepare_data.py clips`, and what a folder of strangers' files may hold."""

import csv
import json
import os
import struct
import zlib

import numpy as np
import pytest
import soundfile
from films import COLOURS, SECONDS, TONES, make_film
from PIL import Image

from annotations import frames_in
from dataset import TrainingPairs, find_pairs


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    path = tmp_path_factory.mktemp("films") / "film.mp4"
    make_film(path)
    return path


@pytest.fixture
def clips(film, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    os.link(film, folder / "film.mp4")
    return folder


def colour(path):
    with Image.open(path) as image:
        shown = np.asarray(image)[24, 32].astype(int)
    return int(np.abs(COLOURS - shown).max(axis=1).argmin())


def pitch(path):
    sound, rate = soundfile.read(path)
    part = sound[rate // 4 : rate // 4 + rate // 2]
    return np.abs(np.fft.rfft(part * np.hanning(len(part)), 4 * rate)).argmax() / 4


def test_many_pairs_are_cut_from_a_long_film_each_with_its_own_sound(clips, cli, tmp_path):
    out = tmp_path / "out"
    done = cli("prepare_data", "clips", clips, "--out", out, "--every", 1, "--overlap", 0.5, "--workers", 1)
    assert done.returncode == 0 and f"{SECONDS} pairs made" in done.stdout
    for second in range(SECONDS):
        name = f"film_{second:06d}"
        assert colour(out / "frames" / f"{name}.jpg") == min(second, SECONDS - 1)
        assert abs(pitch(out / "audio" / f"{name}.wav") - TONES[second]) <= 3
    assert abs(soundfile.info(out / "audio/film_000001.wav").duration - 1.5) < 0.01
    lines = rows(out / "pairs.csv")
    assert [row["start"] for row in lines] == [f"{second:.3f}" for second in range(SECONDS)]
    again = cli("prepare_data", "clips", clips, "--out", out, "--every", 1, "--overlap", 0.5, "--workers", 1)
    assert f"0 pairs made, {SECONDS} there already" in again.stdout


@pytest.mark.parametrize(
    ("seconds", "source", "image", "sound"),
    [
        ((12, 3), "vggsound", 1.5, 0),
        ((3, 12), "vggsound", 1.5, 0),
        ((12, 3), "flickr", 1.5, 0),
        ((40, 14), "flickr", 7, 2),
    ],
)
def test_image_and_sound_of_a_pair_are_of_one_time_where_one_of_them_ends_early(
    seconds, source, image, sound, cli, tmp_path
):
    (tmp_path / "clips").mkdir()
    make_film(tmp_path / "clips/film.mp4", seconds=seconds[0], sound_seconds=seconds[1])
    command = ("prepare_data", "clips", tmp_path / "clips", "--out", tmp_path / "out", "--source", source)
    first = cli(*command)
    assert colour(tmp_path / "out/frames/film.jpg") == int(image) % len(COLOURS)
    assert abs(pitch(tmp_path / "out/audio/film.wav") - TONES[sound % len(TONES)]) <= 3
    (row,) = rows(tmp_path / "out/pairs.csv")
    assert abs(float(row["frame"]) - image) < 0.1 and abs(float(row["start"]) - sound) < 0.1
    ends = "the sound ends" if seconds[1] < seconds[0] else "the image ends"
    for done in (first, cli(*command)):  # what was decided is also told about pairs of an earlier run
        assert ends in done.stdout and ("nearest their middle" in done.stdout) == (source == "vggsound")


@pytest.mark.parametrize(("frame", "second"), [("first", 0), ("middle", 2), ("loudest", 3)])
def test_the_frame_is_chosen(frame, second, cli, tmp_path):
    (tmp_path / "clips").mkdir()
    make_film(tmp_path / "clips/film.mp4", loud_from=3.0)
    done = cli("prepare_data", "clips", tmp_path / "clips", "--out", tmp_path / "out", "--every", 4, "--frame", frame)
    assert done.returncode == 0 and colour(tmp_path / "out/frames/film_000000.jpg") == second, done.stdout


def test_the_sharpest_frame_is_taken(cli, tmp_path):
    (tmp_path / "clips").mkdir()
    make_film(tmp_path / "clips/film.mkv", video="ffv1", audio="flac", sharp_at=2)
    flags = ("--every", 4, "--frame", "sharpest")
    done = cli("prepare_data", "clips", tmp_path / "clips", "--out", tmp_path / "out", *flags)
    assert done.returncode == 0 and 2 <= float(rows(tmp_path / "out/pairs.csv")[0]["frame"]) < 3


def test_of_several_frames_one_is_drawn_per_epoch_by_seed_and_epoch_alone(clips, cli, tmp_path):
    out = tmp_path / "out"
    assert cli("prepare_data", "clips", clips, "--out", out, "--frames", 4).returncode == 0
    assert [colour(path) for path in frames_in(str(out / "frames/film"))] == [0, 1, 2, 3]
    pairs, _ = find_pairs(out, "vggsound", None)
    drawn = []
    for seed in (0, 0, 1):
        data = TrainingPairs(pairs, 32, 1.0, seed=seed)
        drawn.append([])
        for epoch in range(12):
            data.epoch = epoch
            drawn[-1].append(data._frame(pairs[0]))
    assert drawn[0] == drawn[1] != drawn[2] and len({*drawn[0]}) == 4


def test_shards_share_the_films_and_join_without_a_further_step(film, cli, tmp_path):
    (tmp_path / "clips").mkdir()
    for number in range(12):
        os.link(film, tmp_path / f"clips/film{number}.mp4")
    (tmp_path / "clips/broken1.mp4").write_bytes(b"")
    (tmp_path / "clips/broken2.mp4").write_bytes(b"")
    out, made = tmp_path / "out", []
    for part in (1, 2, 3):
        done = cli("prepare_data", "clips", tmp_path / "clips", "--out", out, "--shard", f"{part}/3", "--workers", 1)
        made.append(int(done.stdout.split(" pairs made")[0].split()[-1]))
    assert sum(made) == 12 and max(made) < 12
    assert {row["id"] for row in rows(out / "pairs.csv")} == {f"film{number}" for number in range(12)}
    assert {row["file"] for row in rows(out / "failures.csv")} == {"broken1.mp4", "broken2.mp4"}


def test_the_folder_remembers_what_made_it(clips, cli, tmp_path):
    out = tmp_path / "out"
    assert cli("prepare_data", "clips", clips, "--out", out).returncode == 0
    done = cli("prepare_data", "clips", clips, "--out", out, "--source", "flickr")
    assert done.returncode == 2 and "--source vggsound, not flickr" in done.stderr and "another --out" in done.stderr
    (clips / "film.mp4").unlink()
    make_film(clips / "film.mp4", seconds=2)
    cli("prepare_data", "clips", clips, "--out", out)
    assert rows(out / "failures.csv")[0]["reason"].startswith("same id: another file")


def huge_png(path):
    """A few bytes that claim 100,000 x 100,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def test_a_second_run_names_what_changed_and_what_is_gone(clips, film, cli, tmp_path):
    out = clips / "pairs"  # it may lie in the folder of clips, and is no input then
    os.link(film, clips / "gone.mp4")
    os.link(film, clips / "other.mp4")
    command = ("prepare_data", "clips", clips, "--out", out, "--workers", 1)
    assert "3 pairs made, 0 there already, 0 failed" in cli(*command).stdout
    (clips / "gone.mp4").unlink()
    (clips / "other.mp4").unlink()
    make_film(clips / "other.mp4", seconds=3)
    done = cli(*command)
    assert "0 pairs made, 1 there already, 1 failed" in done.stdout and "other files" not in done.stdout
    assert "not in this folder: 1 (gone)" in done.stdout
    assert "delete the pair" in rows(out / "failures.csv")[0]["reason"]
    itself = cli("prepare_data", "clips", clips, "--out", clips)
    assert itself.returncode == 2 and "the folder of clips itself" in itself.stderr


def test_what_strangers_leave_costs_one_line_each_and_the_rest_goes_on(clips, film, cli, tmp_path):
    make_film(tmp_path / "small.avi", video="mjpeg", pix_fmt="yuvj420p", audio="pcm_s16le", seconds=2)
    head = b"\x08" + struct.pack(">HH", 48, 64)  # bits, height and width in each frame's header
    content = (tmp_path / "small.avi").read_bytes()
    assert head in content
    (clips / "huge.avi").write_bytes(content.replace(head, b"\x08" + struct.pack(">HH", 65_500, 65_500)))
    screen = struct.pack("<HHBBB", 65_535, 65_535, 0xF0, 0, 0) + bytes(6)
    image = b"," + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\x02\x02D\x01\x00;"
    (clips / "bomb.gif").write_bytes(b"GIF89a" + screen + image)
    huge_png(clips / "huge.png")
    huge_png(clips / "bomb.mp4")
    (clips / "list.mkv").write_text(f"#EXTM3U\n#EXTINF:4,\n{film}\n#EXT-X-ENDLIST\n")
    os.mkfifo(clips / "pipe.mp4")
    (tmp_path / "outside.mp4").write_bytes(film.read_bytes())
    os.symlink(tmp_path / "outside.mp4", clips / "link.mp4")
    os.symlink("/dev/zero", clips / "device.mp4")
    os.symlink(clips / "nowhere", clips / "dangling.mp4")
    (clips / "line\nbreak.mp4").write_bytes(film.read_bytes())
    (clips / "notes.txt").write_text("a\n")
    done = cli("prepare_data", "clips", clips, "--out", tmp_path / "out", "--workers", 2)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "other files: 3" in done.stdout, done.stdout
    reasons = {row["file"]: row["reason"] for row in rows(tmp_path / "out/failures.csv")}
    wanted = {
        "huge.avi",
        "bomb.mp4",
        "list.mkv",
        "pipe.mp4",
        "link.mp4",
        "device.mp4",
        "dangling.mp4",
        "line\nbreak.mp4",
    }
    assert reasons.keys() == wanted
    assert reasons["pipe.mp4"] == "not a regular file" and "out of the folder" in reasons["link.mp4"]
    assert (tmp_path / "out/frames/film.jpg").is_file()


NAMES = ["rain, part 2", '"quoted"', "with  blanks", "-leading dash", "Zürich", "a+b", "interview_A_2"]


def test_own_names_survive_preparing_lists_and_boxes(film, cli, tmp_path):
    import unicodedata

    import annotations

    (tmp_path / "clips").mkdir()
    for name in NAMES:
        os.link(film, tmp_path / "clips" / f"{unicodedata.normalize('NFD', name)}.mp4")
    done = cli("prepare_data", "clips", tmp_path / "clips", "--out", tmp_path / "out")
    assert f"{len(NAMES)} pairs made" in done.stdout
    pairs, _ = find_pairs(tmp_path / "out", "vggsound", None)
    assert sorted(pair.id for pair in pairs) == sorted(NAMES)
    (tmp_path / "ids.txt").write_text("".join(f"{name}\n" for name in NAMES))
    with open(tmp_path / "ids.csv", "w", newline="") as file:
        csv.writer(file).writerows([[name, "class"] for name in NAMES])
    for path in (tmp_path / "ids.txt", tmp_path / "ids.csv"):
        assert annotations.read_ids(path) == NAMES
    boxes = [{"file": unicodedata.normalize("NFD", name), "class": "", "bbox": [[0, 0, 1, 1]]} for name in NAMES]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    flags = ("--test_data_path", tmp_path / "out", "--test_gt_path", tmp_path / "boxes.json", "--workers", 0)
    checked = cli("prepare_data", "check", "--testset", "custom", *flags)
    assert checked.returncode == 0 and "complete: every pair" in checked.stdout, checked.stdout


@pytest.mark.parametrize("wrong", ["film.jpg", '"film"', "film,dog"])
def test_an_id_that_is_written_otherwise_gets_a_hint(clips, cli, tmp_path, wrong):
    from utils import UserError

    cli("prepare_data", "clips", clips, "--out", tmp_path / "out")
    with pytest.raises(UserError, match="'film' is"):
        find_pairs(tmp_path / "out", "vggsound", [wrong])
