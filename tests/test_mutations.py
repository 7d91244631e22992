"""Thousands of damaged files at every parser and loader: each loads or gives one clear line, none a traceback."""

import io
import json

import numpy as np
import pytest
import soundfile
from PIL import Image

import annotations
import audio_io
import dataset_avs
import transforms
from utils import UserError

MUTATIONS = 220  # of each kind of file
CLEAR = (UserError, ValueError)  # what the loaders promise; the message must name the file


def picture(kind):
    ramp = np.add.outer(np.arange(40), np.arange(60)).astype(np.uint8) * 2
    buffer = io.BytesIO()
    Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], 2)).save(buffer, kind)
    return buffer.getvalue()


def sound(kind, subtype=None):
    buffer = io.BytesIO()
    wave = 0.3 * np.sin(np.arange(8000) / 9)
    soundfile.write(buffer, wave, 16000, format=kind, subtype=subtype)
    return buffer.getvalue()


def spectrogram():
    buffer = io.BytesIO()
    np.save(buffer, np.ones((1, 257, 60), np.float32))
    return buffer.getvalue()


BOXES = json.dumps([{"file": f"v{i}", "class": "dog", "bbox": [[0.1, 0.2, 0.6, 0.7]]} for i in range(4)]).encode()
FRAMES = json.dumps([{"image": f"/x/v{i}.jpg", "audio": "/x/a.wav", "gt_box": [1, 2, 90, 100]} for i in range(4)])
XML = b"<a><w><bbox><n>x</n><a>10</a><b>20</b><c>100</c><d>200</d></bbox></w></a>"
SILENT = b"video,audio,label\na,b,non-sounding\nc,d,non-sounding\n"
FILES = {  # name: (content, loader)
    "boxes.json": (BOXES, annotations.load_boxes),
    "frames.json": (FRAMES.encode(), annotations.load_frames),
    "ids.txt": (b"a_000001\nb_000002\nc,3\n", annotations.read_ids),
    "silent.csv": (SILENT, annotations.read_silent_pairs),
    "s4.csv": (b"name,start,category,split\nv,0,dog,test\nw,0,cat,test\n", dataset_avs.read_videos),
    "box.xml": (XML, annotations.consensus_map),
    "mask.png": (picture("PNG"), annotations.mask_map),
    "p.jpg": (picture("JPEG"), transforms.load_image),
    "p.webp": (picture("WEBP"), transforms.load_image),
    "a.wav": (sound("WAV"), lambda path: audio_io.load_spectrogram(path, 0.5)),
    "a.flac": (sound("FLAC"), lambda path: audio_io.load_spectrogram(path, 0.5)),
    "a.ogg": (sound("OGG", "VORBIS"), lambda path: audio_io.load_spectrogram(path, 0.5)),
    "a.npy": (spectrogram(), lambda path: audio_io.load_spectrogram(path, 0.5)),
}


def mutate(content, rng):
    """Cut, doubled, with bytes replaced, inserted or taken away, most of them near the head, where headers are."""
    data = bytearray(content)
    way = rng.integers(5)
    place = int(len(data) * rng.random() ** 2)
    if way == 0:
        return bytes(data[:place])
    if way == 1:
        return bytes(data + data[place:])
    for _ in range(rng.integers(1, 9)):
        place = int(len(data) * rng.random() ** 2)
        if way == 2 and data:
            data[place] = rng.integers(256)
        elif way == 3:
            data.insert(place, int(rng.integers(256)))
        elif data:
            del data[place]
    return bytes(data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_loads_or_is_named(name, tmp_path):
    content, load = FILES[name]
    rng, path = np.random.default_rng(0), tmp_path / name
    load_error = 0
    for number in range(MUTATIONS):
        path.write_bytes(mutate(content, rng))
        try:
            load(path)
        except CLEAR as error:
            load_error += 1
            assert name in str(error), f"mutation {number}: {error!r} does not name the file"
    assert load_error


def harmless(name, rng):
    """The same content in another dress: line ends, marks, spaces, further fields, rates, subtypes, modes."""
    content = FILES[name][0]
    if name.endswith(".json"):
        entries = [{**entry, f"more{rng.integers(99)}": int(rng.integers(99))} for entry in json.loads(content)]
        return b"\xef\xbb\xbf" * int(rng.integers(2)) + json.dumps(entries, indent=int(rng.integers(5))).encode()
    if name.endswith((".txt", ".csv")):
        text = content.replace(b"\n", [b"\n", b"\r\n"][rng.integers(2)])
        return b"\xef\xbb\xbf" * int(rng.integers(2)) + text + b"\n" * int(rng.integers(4))
    if name == "box.xml":
        return content.replace(b"><", b">" + b" \n"[: rng.integers(3)] + b"<")
    if name == "a.wav":
        return sound("WAV", ["PCM_24", "PCM_32", "FLOAT", "DOUBLE"][rng.integers(4)])
    buffer = io.BytesIO()
    mode = ["RGB", "RGBA"][rng.integers(2)]
    Image.open(io.BytesIO(content)).convert(mode).save(buffer, "PNG", compress_level=int(rng.integers(9)))
    return buffer.getvalue()


def same(one, other):
    if isinstance(one, dict | list):
        return one == other
    return np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).max() < 1e-4


DRESSED = ("boxes.json", "frames.json", "ids.txt", "silent.csv", "s4.csv", "box.xml", "p.jpg", "a.wav")


@pytest.mark.slow
@pytest.mark.parametrize("name", DRESSED)
def test_another_dress_changes_nothing(name, tmp_path):
    content, load = FILES[name]
    load = audio_io.load_audio if name == "a.wav" else load  # the logarithm would enlarge what rounding to 16 bits does
    rng, path = np.random.default_rng(1), tmp_path / name
    path.write_bytes(content)
    wanted = load(path)
    for _ in range(70):
        path.write_bytes(harmless(name, rng))
        assert same(load(path), wanted)
