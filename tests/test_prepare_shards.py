"""Shards hold the pairs that went in, whoever reads them, and are whole or not there."""

import json
import tarfile

import numpy as np
import pytest
import soundfile
from PIL import Image

import prepare.shards as prepare_shards
from dataset import Pair
from prepare.shards import Settings, packed, write_shards
from shards.index import load_index, scan
from utils import UserError


@pytest.fixture
def made(cli, synthetic_root, tmp_path):
    """70 pairs of the built-in set in 4 shards."""
    done = pack(cli, synthetic_root, tmp_path / "shards")
    assert done.returncode == 0, done.stderr
    return tmp_path / "shards"


def pack(cli, root, out, *flags):
    common = "--trainset", "synthetic", "--train_data_path", root, "--pairs_per_shard", 20, "--workers", 0
    return cli("prepare_data", "shards", *common, "--out", out, *flags)


def test_the_index_counts_and_checks_every_shard(made):
    index = json.loads((made / "index.json").read_text())
    assert [entry["pairs"] for entry in index["shards"]] == [20, 20, 20, 10] and index["pairs"] == 70
    for entry in index["shards"]:
        found = scan(str(made / entry["name"]), whole=True)
        assert {key: entry[key] for key in found} == found
    assert not [*made.glob(".*")]


def test_the_package_webdataset_reads_them(made, synthetic_root):
    webdataset = pytest.importorskip("webdataset", reason="pip install -r requirements-shards.txt")
    names = [*map(str, sorted(made.glob("*.tar")))]
    found = {item["__key__"]: item for item in webdataset.WebDataset(names, shardshuffle=False)}
    assert {*found} == {*(synthetic_root / "train.txt").read_text().split()}
    for name in ("train_000003", "train_000044"):
        assert found[name]["jpg"] == (synthetic_root / "frames" / f"{name}.jpg").read_bytes()


def test_the_same_again_is_there_already_and_other_settings_are_refused(made, cli, synthetic_root):
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    assert "there already" in pack(cli, synthetic_root, made).stdout
    done = pack(cli, synthetic_root, made, "--short_side", 32)
    assert done.returncode == 2 and "--overwrite" in done.stderr
    assert before == {path.name: path.read_bytes() for path in made.iterdir()}
    assert pack(cli, synthetic_root, made, "--short_side", 32, "--overwrite", "true").returncode == 0
    assert load_index(str(made)).files[:, 1].max() < load_index_of(before)


def load_index_of(before):
    return max(place[1] for entry in json.loads(before["index.json"])["shards"] for place in entry["files"])


def test_what_was_finished_before_a_stop_is_kept(made, synthetic_root, tmp_path, cli, monkeypatch):
    whole, calls = prepare_shards.packed, []

    def stop(pair, short_side):
        calls.append(pair.id)
        if len(calls) == 50:
            raise KeyboardInterrupt
        return whole(pair, short_side)

    monkeypatch.setattr(prepare_shards, "packed", stop)
    assert pack(cli, synthetic_root, tmp_path / "again").returncode == 130
    assert not (tmp_path / "again" / "index.json").exists()
    assert pack(cli, synthetic_root, tmp_path / "again").returncode == 0 and len(calls) == 50 + 30
    assert all((tmp_path / "again" / path.name).read_bytes() == path.read_bytes() for path in made.iterdir())


def test_what_cannot_be_decoded_is_left_out_and_named(cli, damaged, tmp_path):
    flags = "--trainset", "custom", "--train_data_path", damaged, "--out", tmp_path / "shards", "--workers", 0
    done = cli("prepare_data", "shards", *flags)
    assert done.returncode == 2 and "2 pairs are left out: " in done.stderr and "--allow_missing" in done.stderr
    done = cli("prepare_data", "shards", *flags, "--allow_missing", "true")
    assert done.returncode == 0 and "4 pairs in 1 shards" in done.stdout
    assert {*json.loads((tmp_path / "shards" / "index.json").read_text())["left_out"]} == {*"bc"}


def test_sound_of_any_kind_becomes_16_khz_pcm16_and_16_bit_sound_stays_as_it_is(tmp_path):
    levels = np.random.default_rng(0).integers(-(2**15), 2**15, 9000).astype(np.int16)
    Image.new("RGB", (300, 400)).save(tmp_path / "x.png")
    soundfile.write(tmp_path / "x.wav", levels, 16000, "PCM_16")
    soundfile.write(tmp_path / "x.flac", np.stack([levels, levels], 1), 44100, "PCM_16")
    pair = Pair("x", str(tmp_path / "x.png"), str(tmp_path / "x.wav"))
    files = packed(pair, None)
    assert files[".png"] == (tmp_path / "x.png").read_bytes()
    (tmp_path / "y.wav").write_bytes(files[".wav"])
    assert (soundfile.read(tmp_path / "y.wav", dtype="int16")[0] == levels).all()
    files = packed(pair._replace(audio=str(tmp_path / "x.flac")), 150)
    (tmp_path / "y.wav").write_bytes(files[".wav"])
    (tmp_path / "y.jpg").write_bytes(files[".jpg"])
    info = soundfile.info(tmp_path / "y.wav")
    assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
    assert Image.open(tmp_path / "y.jpg").size == (150, 200)
    with pytest.raises(ValueError, match="stored spectrogram"):
        packed(pair._replace(audio="x.npy"), None)


def test_shards_of_others_get_an_index(tmp_path, cli, synthetic_root):
    """Other folders and names in the archive, ids with dots, files of other kinds, one half pair."""
    with tarfile.open(tmp_path / "foreign-0.tar", "w") as archive:
        for key, name in {"a%2Eb": "train_000000", "c": "train_000001"}.items():
            archive.add(synthetic_root / "frames" / f"{name}.jpg", f"some/{key}.JPG")
            archive.add(synthetic_root / "train.txt", f"some/{key}.txt")
            archive.add(synthetic_root / "audio" / f"{name}.wav", f"some/{key}.wav")
        archive.add(synthetic_root / "frames" / "train_000002.jpg", "some/half.jpg")
    index = load_index(str(tmp_path))
    assert [name.decode() for name in index.ids] == ["a.b", "c"] and index.incomplete == ["some/half"]
    done = cli("prepare_data", "shards", "--index", tmp_path)
    assert done.returncode == 0 and "2 pairs in 1 shards" in done.stdout and "some/half" in done.stdout
    again = load_index(str(tmp_path))
    assert (again.files == index.files).all() and again.shards[0].sha256 and not index.shards[0].sha256


def test_an_archive_without_an_end_is_cut_short(made, tmp_path):
    content = (made / "pairs-000000.tar").read_bytes()
    for size in (len(content) // 2, len(content) - 20480, 700):
        (tmp_path / "x.tar").write_bytes(content[:size])
        for whole in (False, True):
            with pytest.raises(UserError, match=r"x.tar is (cut short|broken)"):
                scan(str(tmp_path / "x.tar"), whole=whole)


@pytest.mark.parametrize("text, wanted", [
    ("{", "damaged"), ("[]", "damaged"), ('{"format": "x", "shards": []}', "another format"),
    ('{"format": "pairs of image and audio in shards, 1", "shards": [{"name": "pairs-000000.tar"}]}', "damaged"),
])  # fmt: skip
def test_a_damaged_index_is_one_line(made, text, wanted):
    (made / "index.json").write_text(text)
    with pytest.raises(UserError, match=wanted):
        load_index(str(made))


def test_a_shard_that_is_missing_is_named(made):
    (made / "pairs-000002.tar").unlink()
    with pytest.raises(UserError, match=r"1 shards .* are not there: pairs-000002.tar"):
        load_index(str(made))


def test_pairs_in_their_order_come_from_a_seed(synthetic_root, tmp_path):
    pairs = [
        Pair(i, *(str(synthetic_root / f"{kind}/{i}.{end}") for kind, end in (("frames", "jpg"), ("audio", "wav"))))
        for i in (f"train_{n:06}" for n in range(12))
    ]
    orders = []
    for seed in (0, 1):
        write_shards(pairs, tmp_path / str(seed), Settings(5, None, seed))
        orders.append(load_index(str(tmp_path / str(seed))).ids.tolist())
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
