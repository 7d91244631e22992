"""Maps of any method from a file: what is read, how it is matched, what is refused."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import files_up_to

from annotations import GroundTruth, box_map
from scoring.evaluate import evaluate_stored
from scoring.maps_file import MapWriter, StoredMaps
from utils import UserError

IDS = [f"clip_{i}" for i in range(6)]
BOXES = [[0.1 * i, 0.2, 0.1 * i + 0.4, 0.8] for i in range(6)]


@pytest.fixture
def truth():
    return GroundTruth("x", IDS, lambda name: box_map([BOXES[IDS.index(name)]]), 6)


def perfect(size=56):
    maps = torch.stack([box_map([box]) for box in BOXES])
    return torch.nn.functional.interpolate(maps[:, None], (size, size))[:, 0].numpy()


@pytest.fixture
def save(tmp_path):
    def write(compressed=False, **arrays):
        (np.savez_compressed if compressed else np.savez)(tmp_path / "maps.npz", **arrays)
        return StoredMaps(tmp_path / "maps.npz")

    return write


@pytest.mark.filterwarnings("ignore:.*tie at the cut")
def test_names_of_arrays_become_rows_and_masks_of_any_kind_score(truth, save):
    rng = np.random.default_rng(0)
    stored = save(
        True,
        id=IDS,
        mine=perfect(224) > 0,
        noise=rng.random((6, 7, 9)).astype(np.float16),
        whole=perfect(224).astype(int),
    )
    results = evaluate_stored(stored, truth, batch_size=4).results
    assert list(results["maps"]) == ["mine", "noise", "whole"]
    assert results["maps"]["mine"]["cIoU"] == results["maps"]["whole"]["mAP"] == 1 > results["maps"]["noise"]["cIoU"]
    assert results["pairs"] == {"scored": 6, "expected": 6, "left_out": [], "left_out_because": ""}
    assert results["settings"]["interpolation"] == "bicubic"


def test_maps_belong_to_their_ids_in_any_order(truth, save):
    maps = np.random.default_rng(1).random((6, 7, 7))
    order = [3, 0, 5, 1, 4, 2]
    one = evaluate_stored(save(id=IDS, a=maps), truth)
    other = evaluate_stored(save(id=[IDS[i] for i in order], a=maps[order]), truth, batch_size=1)
    assert one.rows == other.rows and one.results["maps"] == other.results["maps"]


def test_interpolation_is_the_one_of_the_file(truth, save):
    maps = np.random.default_rng(2).random((6, 4, 4))
    scores = [
        evaluate_stored(save(id=IDS, a=maps, interpolation=kind), truth).results["maps"]["a"]["mean_iou"]
        for kind in ("bicubic", "bilinear")
    ]
    assert scores[0] != scores[1]
    with pytest.raises(UserError, match="nearest"):
        save(id=IDS, a=maps, interpolation="nearest")


def test_a_confidence_serves_silent_pairs(save):
    silent = GroundTruth("x", IDS, lambda name: box_map([BOXES[IDS.index(name)]]), 6, silent=frozenset(IDS[:2]))
    stored = save(id=IDS, a=np.random.default_rng(3).random((6, 7, 7)), confidence=np.arange(6))
    assert evaluate_stored(stored, silent).results["maps"]["a"]["presence_AP"] == 1
    assert (
        "AP"
        not in evaluate_stored(save(id=IDS, a=np.eye(6)[:, None] + np.ones((6, 6, 6))), silent).results["maps"]["a"]
    )


def test_ids_that_do_not_fit_are_named_and_counted_only_when_allowed(truth, save):
    maps = np.random.default_rng(4).random((6, 7, 7))
    with pytest.raises(UserError, match=r"1 ids occur twice.*clip_1"):
        evaluate_stored(save(id=[*IDS[:5], "clip_1"], a=maps), truth, allow_missing=True)
    stored = save(id=[*IDS[:5], "other"], a=maps)
    with pytest.raises(UserError, match=r"1 ids are not of this set: other; 1 ids of the set have no map: clip_5"):
        evaluate_stored(stored, truth)
    scored = evaluate_stored(stored, truth, batch_size=2, allow_missing=True)
    pairs = scored.results["pairs"]
    assert (pairs["scored"], pairs["left_out"], pairs["unknown_ids_in_file"]) == (5, ["clip_5"], ["other"])
    assert len(scored.rows) == 5
    with pytest.raises(UserError, match="not one id is the set's"):
        evaluate_stored(save(id=[f"no{i}" for i in IDS], a=maps), truth, allow_missing=True)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"a": np.ones((6, 7, 7))}, "no array `id`"),
        ({"id": IDS}, "holds no maps"),
        ({"id": np.array(IDS, dtype=object), "a": np.ones((6, 7, 7))}, "not an .npz file of maps"),
        ({"id": IDS, "a": np.ones((5, 7, 7))}, r"`a` must be \(6, h, w\)"),
        ({"id": IDS, "a": np.ones((6, 49))}, r"`a` must be \(6, h, w\)"),
        ({"id": IDS, "a": np.ones((6, 7, 7), dtype=complex)}, r"`a` must be \(6, h, w\)"),
        ({"id": IDS, "a": np.full((6, 7, 7), np.nan)}, "`a` of clip_0 holds a value that is not finite"),
        ({"id": IDS, "a": np.asfortranarray(np.ones((6, 7, 7)))}, "ascontiguousarray"),
        ({"id": IDS, "a": np.ones((6, 7, 7)), "confidence": np.ones(5)}, "`confidence` must be 6 finite numbers"),
        ({"id": IDS, "AUD": np.ones((6, 7, 7)), "IQR": np.ones((6, 7, 7)), "alpha": 0.5}, "IQR and `alpha`"),
        ({"id": IDS, "a": np.ones((6, 7, 7)), "alpha": 7.5}, "in 0..1"),
        ({"id": IDS, "a": np.tile(np.float32([[-3e38, 3e38]]), (6, 7, 1))}, "`a` of clip_0 holds"),
        ({"id": np.array([b"\xff"] * 6), "a": np.ones((6, 7, 7))}, "decode"),
        ({"id": IDS, "a": np.ones((6, 7, 7)), "alpha": "x"}, "`alpha` must be a number in 0..1"),
    ],
)
def test_a_file_of_another_form_is_one_clear_line(arrays, message, truth, save):
    with pytest.raises(UserError, match=message):
        evaluate_stored(save(**arrays), truth)


def test_a_damaged_file_is_named(truth, save, tmp_path):
    stored = save(id=IDS, a=np.random.default_rng(0).random((6, 20, 20)))
    data = bytearray(stored.path.read_bytes())
    data[len(data) // 2] ^= 255
    stored.path.write_bytes(data)
    with pytest.raises(UserError, match=r"maps\.npz.*damaged"):
        evaluate_stored(stored, truth)
    (tmp_path / "maps.npz").write_bytes(b"PK" + bytes(50))
    with pytest.raises(UserError, match=r"not an \.npz file"):
        StoredMaps(tmp_path / "maps.npz")


def test_a_file_is_never_whole_in_memory(tmp_path, save):
    stored = save(id=[f"i{n}" for n in range(400)], a=np.random.default_rng(0).random((400, 64, 64)))
    tracemalloc.start()
    count = sum(len(batch.ids) for batch in stored.batches(8))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 400 and peak < 400 * 64 * 64 * 8 / 5


def test_what_is_written_is_read_back(tmp_path):
    writer = MapWriter(tmp_path / "sub" / "maps.npz", 5)
    maps, sure = torch.rand(5, 3, 3), torch.rand(5)
    for rows in (slice(0, 2), slice(2, 5)):
        writer.add(IDS[rows], {"AUD": maps[rows], "confidence": sure[rows]})
    writer.finish(interpolation="bicubic", alpha=0.4)
    stored = StoredMaps(tmp_path / "sub" / "maps.npz")
    batches = list(stored.batches(3))
    assert torch.equal(torch.cat([b.maps["AUD"] for b in batches]), maps) and stored.alpha == 0.4
    assert [i for b in batches for i in b.ids] == IDS[:5]
    assert np.allclose(stored.scalars["confidence"], sure)


def test_maps_of_a_set_have_their_room_on_disk_before_they_are_drawn_or_are_one_line(tmp_path, monkeypatch):
    """Written through memory, a file without room would end the process by a signal."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    writer = MapWriter(tmp_path / "maps.npz", 5000)
    writer.add(["a"], {"AUD": torch.rand(1, 7, 7)})
    (draft,) = tmp_path.glob("*/*.npy")
    assert draft.stat().st_blocks * 512 >= 5000 * 7 * 7 * 4
    with files_up_to(100_000), pytest.raises(UserError, match=r"\.npy cannot be written \(File too large\)"):
        MapWriter(tmp_path / "maps.npz", 5000).add(["a"], {"AUD": torch.rand(1, 7, 7)})


def test_the_command_needs_neither_pictures_nor_a_model(tmp_path, cli):
    entries = [{"file": name, "class": "a", "bbox": [box]} for name, box in zip(IDS, BOXES, strict=True)]
    (tmp_path / "boxes.json").write_text(json.dumps(entries))
    (tmp_path / "ids.txt").write_text("\n".join(IDS[:4]))
    np.savez(tmp_path / "m.npz", id=IDS[:4], peer=np.random.default_rng(0).random((4, 7, 7)), interpolation="bilinear")
    where = ("--testset", "custom", "--test_gt_path", tmp_path / "boxes.json")
    done = cli("test_model", "--maps", tmp_path / "m.npz", *where, "--test_list", tmp_path / "ids.txt")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "m_results" / "custom" / "results.json").read_text())
    assert results["pairs"]["scored"] == 4 and "peer" in results["maps"] and "4 of 4 pairs scored" in done.stdout
    done = cli("test_model", "--maps", tmp_path / "m.npz", *where)
    assert done.returncode == 2 and "2 ids of the set have no map: clip_4, clip_5" in done.stderr
    done = cli("test_model", "--maps", tmp_path / "m.npz", *where, "--allow_missing", "true")
    assert "4 of 6 pairs scored" in done.stdout
    done = cli("test_model", "--maps", tmp_path / "absent.npz", *where)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
