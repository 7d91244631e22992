"""Diagnosis: the numbers behind each picture are the model's own, and the words on the pictures are true."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

import reports.diagnose as diagnose
from dataset import Sample
from model_slot import JointSlotModel, false_negative_keep_mask, slot_attention
from resnet import AudioEncoder
from utils import UserError

CPU = torch.device("cpu")
SMALL = {"image_encoder": "small", "dim": 16, "image_size": 64, "audio_seconds": 0.8}
FILES = ["tsne.png", "tsne.csv", "slots.png", "slots.npz", "false_negatives.png", "false_negatives.csv"]


class Toys(Dataset):
    """Random pairs of a few classes: a class shares most of its picture and of its sound."""

    def __init__(self, count, class_names=("cat", "dog", "bell"), seed=0):
        rng = torch.Generator().manual_seed(seed)
        image, sound = torch.randn(3, 3, 64, 64, generator=rng), torch.randn(3, 1, 257, 81, generator=rng)
        self.items = [
            Sample(
                image[i % 3] + torch.randn(3, 64, 64, generator=rng),
                sound[i % 3] + torch.randn(1, 257, 81, generator=rng),
                torch.empty(0),
                f"id_{i:03}",
                class_names[i % len(class_names)],
            )
            for i in range(count)
        ]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return JointSlotModel(**SMALL, reciprocal_k=6).eval()


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """Folder of one whole run over 13 samples."""
    folder = tmp_path_factory.mktemp("whole") / "new"
    paths = diagnose.diagnose(model, Toys(13), CPU, folder)
    assert paths == [folder / name for name in FILES]
    return folder


@pytest.fixture
def light(monkeypatch):
    """Leaves out the many small axes of slots.png, which other tests draw."""
    monkeypatch.setattr(diagnose, "_draw_sample", lambda *args: None)


@pytest.fixture
def words(monkeypatch):
    """Title and detail of every figure drawn."""
    drawn, figure = [], diagnose._figure
    monkeypatch.setattr(diagnose, "_figure", lambda *args: drawn.append(" ".join(args[2:])) or figure(*args))
    return drawn


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def targets_of(model, dataset):
    return diagnose.embed_targets(model, diagnose.make_loader(dataset, 7, 0), CPU)


# ---------------------------------------------------------------- attention of every iteration


@pytest.mark.parametrize("modality", ["img", "aud"])
def test_the_trace_ends_with_the_intra_attention_and_changes_nothing(modality):
    torch.manual_seed(0)
    attention, tokens, trace = JointSlotModel(**SMALL, num_slots=3, iterations=4).slot_attn, torch.randn(2, 9, 16), []
    traced, plain = attention(modality, tokens, trace), attention(modality, tokens)
    assert all(torch.equal(a, b) for a, b in zip(traced, plain))
    assert [tuple(step.shape) for step in trace] == [(2, 3, 9)] * 4
    intra = slot_attention(traced.query, traced.keys)  # as attention_matching_loss takes it
    assert torch.equal(trace[-1], intra) and not torch.allclose(trace[0], intra, atol=1e-4)
    first = getattr(attention, f"{modality}_to_q")(getattr(attention, f"{modality}_norm_slots")(attention.slots))
    assert torch.allclose(trace[0], slot_attention(first.expand(2, -1, -1), traced.keys), atol=1e-6)


def test_the_stored_attention_is_that_of_each_sample_alone(model, whole):
    data = np.load(whole / "slots.npz")
    assert data["image_attention"].shape == (6, 5, 2, 4, 4)
    assert data["audio_attention"].shape == (6, 5, 2, 5)
    assert data["ids"][0] == "id_000" and data["ids"][-1] == "id_012" and len(set(data["ids"])) == 6
    assert data["image_attention"].sum((3, 4)) == pytest.approx(1, abs=1e-5)
    assert data["audio_attention"].sum(3) == pytest.approx(1, abs=1e-5)
    assert data["seconds_per_token"] == pytest.approx(0.16)
    sample = Toys(13)[int(data["ids"][2][3:])]
    image, grid = model.attend_image(sample.image[None])
    audio = model.attend_audio(sample.spectrogram[None])
    for state, stored in ((image, data["image_attention"]), (audio, data["audio_attention"])):
        alone = slot_attention(state.query, state.keys)[0].detach().numpy()
        assert stored[2, -1].reshape(alone.shape) == pytest.approx(alone, abs=1e-5)
    assert grid == (4, 4)


@pytest.mark.parametrize("arch, frames", [("small", 321), ("resnet18", 1601)])
def test_a_token_stands_at_the_time_that_it_hears(arch, frames):
    centres = []
    for seed in range(3):
        torch.manual_seed(seed)
        spectrogram = torch.randn(1, 1, 65, frames, requires_grad=True)
        tokens = AudioEncoder(arch, 8).eval()(spectrogram)
        middle = tokens.shape[2] // 2
        (gradient,) = torch.autograd.grad(tokens[0, :, middle].sum(), spectrogram)
        weight = gradient.abs().sum((0, 1, 2))
        centres.append((weight @ torch.arange(frames, dtype=torch.float32) / weight.sum() / 100).item())
    edges = diagnose.token_edges(arch, tokens.shape[2], 0)
    assert np.mean(centres) == pytest.approx(edges[middle : middle + 2].mean(), abs=0.03)  # seconds
    assert len(edges) == tokens.shape[2] + 1


@pytest.mark.parametrize("num_slots, iterations", [(1, 1), (3, 2)])
def test_any_number_of_slots_and_iterations_is_drawn(num_slots, iterations, tmp_path):
    model = JointSlotModel(**SMALL, num_slots=num_slots, iterations=iterations).eval()
    diagnose._diagnose_slots(model, Toys(2), CPU, tmp_path)
    assert np.load(tmp_path / "slots.npz")["audio_attention"].shape == (2, iterations, num_slots, 5)


# ---------------------------------------------------------------- t-SNE


def test_all_files_are_written_whole_and_nothing_beside_them(whole):
    assert sorted(path.name for path in whole.iterdir()) == sorted(FILES)
    assert all((whole / name).stat().st_size > 5000 for name in FILES if name.endswith(".png"))


def test_weights_mode_and_random_state_stay(model, tmp_path, light):
    class Drawing(Toys):
        def __getitem__(self, index):
            torch.rand(3)  # augmentation draws
            return super().__getitem__(index)

    state, before = torch.get_rng_state(), {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    try:
        diagnose.diagnose(model, Drawing(6), CPU, tmp_path)
        assert model.training
    finally:
        model.eval()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_the_plane_holds_each_sample_twice_and_repeats_itself(model, whole, tmp_path):
    rows = read(whole / "tsne.csv")
    assert list(rows[0])[:5] == ["id", "class", "modality", "x", "y"]
    assert sorted((row["id"], row["modality"]) for row in rows) == sorted(
        (f"id_{i:03}", modality) for i in range(13) for modality in ("image", "audio")
    )
    assert all(row["class"] == ("cat", "dog", "bell")[int(row["id"][3:]) % 3] for row in rows)
    assert {row["drawn"] for row in rows} == {"all 13 samples"}
    places = np.array([(float(row["x"]), float(row["y"])) for row in rows])
    assert np.isfinite(places).all() and len(np.unique(places, axis=0)) == 26
    targets = diagnose.embed_targets(model, diagnose.make_loader(Toys(13), 64, 0), CPU)
    diagnose._diagnose_tsne(targets, 13, 0, tmp_path)
    assert (tmp_path / "tsne.csv").read_text() == (whole / "tsne.csv").read_text()


def test_a_large_set_is_drawn_from_by_seed_and_says_so(model, tmp_path, monkeypatch, words, light):
    monkeypatch.setattr(diagnose, "MAX_SAMPLES", 9)
    diagnose.diagnose(model, Toys(30), CPU, tmp_path, seed=1)
    rows = read(tmp_path / "tsne.csv")
    assert {row["drawn"] for row in rows} == {"9 of 30 samples, drawn by seed 1"} and len(rows) == 18
    assert "9 of 30 samples, drawn by seed 1" in words[0]
    ids = [[item.id for item in diagnose.draw_samples(Toys(30), 9, seed)] for seed in (1, 1, 2)]
    assert [row["id"] for row in rows] == 2 * ids[0]
    assert ids[0] == ids[1] != ids[2] and ids[0] == sorted(set(ids[0]))


def test_slots_are_compared_by_angle(model):
    dataset = Toys(8)
    targets = targets_of(model, dataset)
    slots = model.embed(*(torch.stack([getattr(s, x) for s in dataset.items]) for x in ("image", "spectrogram")))
    for own, raw in ((targets.image, slots.image_slots), (targets.audio, slots.audio_slots)):
        assert torch.allclose(own, F.normalize(raw[:, 0], dim=1), atol=1e-5)


@pytest.mark.parametrize(
    "class_names, entries",
    [
        (["b"] * 3 + ["a"] * 3 + ["c"], ["image", "audio", "a (3)", "b (3)", "c (1)"]),
        ([""] * 7, ["image", "audio", "joins partners"]),
        (["a", "a", ""], ["image", "audio", "a (2)", "others or unknown (1)"]),
        (["most"] * 2 + [f"{i:02}" for i in range(30)], ["image", "audio", "most (2)", "other classes (21)"]),
        (["$a_b$ ^"] * 2, ["image", "audio", r"\$a_b\$ ^ (2)"]),
    ],
    ids=["classes", "none", "some", "many", "not mathematics"],
)
def test_the_frequent_classes_are_coloured_and_the_rest_grey(class_names, entries, tmp_path):
    figure = diagnose._figure(6, 6, "", "")
    axis = diagnose._axis(figure, 0.2, 1, 4, 4)
    places = [np.random.default_rng(side).normal(size=(len(class_names), 2)) for side in (0, 1)]
    handles = diagnose._scatter(axis, places, class_names)
    labels = [handle.get_label() for handle in handles]
    assert [label for label in labels if not label[0].isdigit()] == entries
    assert len(handles) <= 13
    points = [tuple(point) for drawn in axis.collections for point in drawn.get_offsets()]
    assert sorted(points) == sorted(tuple(point) for side in places for point in side)
    figure.legend(handles=handles)
    diagnose._save(figure, tmp_path / "a.png")


def test_a_collapsed_model_is_drawn_and_named(model, tmp_path, words):
    one = diagnose.Targets(list("abcdef"), [""] * 6, *[torch.full((6, 16), 0.25)] * 2)
    diagnose._diagnose_tsne(one, 6, 0, tmp_path)
    assert "ALL SLOTS ARE THE SAME" in words[0]
    assert all(np.isfinite(float(row["x"])) for row in read(tmp_path / "tsne.csv"))


# ---------------------------------------------------------------- false negatives


def test_the_table_is_what_the_mask_leaves_out_each_pair_once(model, tmp_path, words, light):
    batch = Toys(40, seed=3)
    diagnose.diagnose(model, Toys(5), CPU, tmp_path, training_batch=batch, reciprocal_k=9)
    rows = read(tmp_path / "false_negatives.csv")
    image, audio = targets = targets_of(model, batch)[2:]
    keep = false_negative_keep_mask(*targets, 9)
    expected = {frozenset((f"id_{a:03}", f"id_{b:03}")) for a, b in (~keep).nonzero().tolist()}
    assert len(rows) == len(expected) > 3
    assert {frozenset((row["id_a"], row["id_b"])) for row in rows} == expected
    for row in rows:
        a, b = int(row["id_a"][3:]), int(row["id_b"][3:])
        assert float(row["image_cosine"]) == pytest.approx((image[a] @ image[b]).item(), abs=1e-4)
        assert float(row["audio_cosine"]) == pytest.approx((audio[a] @ audio[b]).item(), abs=1e-4)
        smallest = int(row["smallest_k"])
        assert 1 < smallest <= 9 and row["k"] == "9"
        assert not false_negative_keep_mask(*targets, smallest)[a, b]
        assert false_negative_keep_mask(*targets, smallest - 1)[a, b]
    similar = [float(row["image_cosine"]) + float(row["audio_cosine"]) for row in rows]
    assert similar == sorted(similar, reverse=True)
    assert f"{len(rows)} of 780 pairs left out" in words[-1] and f"{len(rows)} of 780" in rows[0]["about"]
    assert "40 pairs, a training batch; k = 9" in words[-1] and "training batch" in rows[0]["about"]


def test_the_picture_shows_the_most_similar_pairs_of_different_samples(model, tmp_path, monkeypatch, light):
    drawn = []
    monkeypatch.setattr(diagnose, "_draw_pair", lambda figure, left, top, row, batch: drawn.append(row))
    diagnose.diagnose(model, Toys(40), CPU, tmp_path, reciprocal_k=9)
    rows = read(tmp_path / "false_negatives.csv")
    ends = [row[end] for row in drawn for end in ("id_a", "id_b")]
    assert 1 < len(drawn) <= 12 and len(set(ends)) == len(ends)
    assert (drawn[0]["id_a"], drawn[0]["id_b"]) == (rows[0]["id_a"], rows[0]["id_b"])


def test_shares_of_a_class_are_counted_among_known_classes():
    names = ["a", "a", "b", "b", "b", ""]
    rows = [{"class_a": a, "class_b": b} for a, b in (("a", "a"), ("b", "b"), ("a", "b"), ("b", ""))]
    said = diagnose.shared_class(names, rows)  # 4 of the 10 pairs of known classes
    assert said == "2 of 3 left-out pairs share a class (66.7 %), 40 % of all pairs of the batch do"
    assert diagnose.shared_class(names, []) == "40 % of all pairs of the batch share a class"
    assert "unknown" in diagnose.shared_class(["", ""], [])


def test_unknown_classes_are_drawn_and_said(model, tmp_path, words, light):
    diagnose.diagnose(model, Toys(20, [""]), CPU, tmp_path)
    assert "classes unknown" in words[-1]
    assert {row["class"] for row in read(tmp_path / "tsne.csv")} == {""}
    assert {row["class_a"] for row in read(tmp_path / "false_negatives.csv")} == {""}


def test_the_evaluated_set_stands_in_for_a_training_batch_and_is_named(model, tmp_path, monkeypatch, words, light):
    monkeypatch.setattr(diagnose, "PAPER_BATCH", 15)
    diagnose.diagnose(model, Toys(30), CPU, tmp_path)
    for text in (words[-1], read(tmp_path / "false_negatives.csv")[0]["about"]):
        assert "15 samples of the evaluated set, in place of a training batch; k = 6" in text


def test_nothing_left_out_is_said_in_picture_and_table(model, tmp_path, words, light):
    paths = diagnose.diagnose(model, Toys(5), CPU, tmp_path, reciprocal_k=0)
    rows = read(tmp_path / "false_negatives.csv")
    assert len(rows) == 1 and rows[0]["id_a"] == rows[0]["id_b"] == ""
    for text in (words[-1], rows[0]["about"]):
        assert "none of 10 pairs left out" in text and "OFF IN TRAINING" in text and "default k = 1" in text
    assert all(path.is_file() for path in paths)


@pytest.mark.parametrize(
    "batch, given, own, stand_in, k, words",
    [
        (256, None, None, False, 20, "default"),
        (128, None, 7, False, 7, "k = 7"),
        (128, 9, 7, True, 9, "k = 9"),
        (128, 0, 7, False, 10, "OFF"),
        (128, None, 0, False, 10, "OFF"),
        (16, None, 20, True, 1, "too few for k = 20"),
        (16, 20, None, True, None, "k = 20 leaves no negative in a batch of 16"),
        (16, None, 16, False, None, "k = 16 leaves no negative in a batch of 16"),
        (1, None, None, False, None, "batch of 1"),
    ],
)
def test_k_is_the_one_of_training_or_says_why_not(batch, given, own, stand_in, k, words):
    if k is None:
        with pytest.raises(UserError, match=words):
            diagnose.choose_k(batch, given, own, stand_in)
    else:
        chosen, origin = diagnose.choose_k(batch, given, own, stand_in)
        assert chosen == k and words in origin and f"k = {k}" in origin


def test_what_cannot_be_drawn_is_one_line_and_no_file(model, tmp_path):
    broken = JointSlotModel(**SMALL)
    broken.slot_attn.slots.data.fill_(torch.nan)
    for wrong, dataset, message in ((model, Toys(4), "4 samples is too small"), (broken, Toys(6), "not finite")):
        with pytest.raises(UserError, match=message) as raised:
            diagnose.diagnose(wrong, dataset, CPU, tmp_path / "new")
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "new").exists()
