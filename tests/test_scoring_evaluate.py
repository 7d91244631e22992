"""The one path by which maps are scored, in training and in testing."""

import contextlib
from functools import partial

import pytest
import torch

import scoring.evaluate as evaluation
from dataset import EvaluationPairs, build_test_set
from maps import smooth_maps
from models import load_model
from scoring.questions import WithWrongAudio
from scoring.retrieval import retrieval_recall
from utils import UserError

SIZES = {"image_size": 64, "audio_seconds": 0.8}


def build(synthetic_root, name="synthetic"):
    return build_test_set(name, str(synthetic_root), None, "", **SIZES)


def test_evaluation_leaves_weights_buffers_mode_and_random_state_untouched(checkpoint, synthetic_root):
    model = load_model(checkpoint).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    evaluation.evaluate(model, build(synthetic_root), torch.device("cpu"))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_batch_size_changes_no_figure(checkpoint, synthetic_root):
    model = load_model(checkpoint)
    one, other = (
        evaluation.evaluate(model, build(synthetic_root), torch.device("cpu"), batch_size=size).results["maps"]
        for size in (3, 64)
    )
    for name, figures in one.items():
        assert figures == pytest.approx(other[name], abs=1e-3, nan_ok=True), name


def test_figures_are_those_of_the_maps_that_localize_gives(checkpoint, synthetic_root):
    """The whole path once more, by hand: localize, enlarge, threshold, intersect."""
    model, dataset = load_model(checkpoint), build(synthetic_root)
    scored = evaluation.evaluate(model, dataset, torch.device("cpu"))
    for i in (0, 3):
        sample = dataset[i]
        maps = model.localize(sample.image[None], sample.spectrogram[None])
        big = torch.nn.functional.interpolate(maps.audio_map[:, None], (224, 224), mode="bicubic")[0, 0]
        region = (big - big.min()) / (big.max() - big.min()) >= 0.6
        union = sample.truth.sum() + (region & (sample.truth == 0)).sum()
        assert scored.rows[i]["AUD_iou"] == pytest.approx(((region * sample.truth).sum() / union).item(), abs=1e-3)
        assert scored.rows[i]["id"] == sample.id


def test_retrieval_asks_only_for_sources_that_are_in_view(checkpoint, synthetic_root):
    model, dataset = load_model(checkpoint), build(synthetic_root, "synthetic_offscreen")
    found = evaluation.evaluate(model, dataset, torch.device("cpu")).results["retrieval"]
    silent = dataset.ground_truth.silent
    assert 0 < len(silent) < len(dataset)
    seen = dataset.without(dict.fromkeys(silent, "not in view"))
    embeddings = evaluation.embed_set(model, seen, torch.device("cpu"))
    assert found["by_pair"] == retrieval_recall(*embeddings)
    assert found["by_class"] == retrieval_recall(*embeddings, seen.class_names)


@pytest.mark.parametrize("broken", ["map", "embedding"])
def test_a_value_that_is_not_finite_is_named_by_its_id(broken, checkpoint, synthetic_root, monkeypatch):
    localize, dataset = evaluation.localize_batch, build(synthetic_root)
    whole = dataset[13].image

    def localize_badly(model, names, image, *others, **settings):
        found = localize(model, names, image, *others, **settings)
        bad = (image == whole).flatten(1).all(1)
        raw = {**found.raw, "AUD": found.raw["AUD"].masked_fill(bad[:, None, None], torch.nan)}
        embedding = found.audio_embedding.masked_fill(bad[:, None], torch.inf)
        return found._replace(raw=raw) if broken == "map" else found._replace(audio_embedding=embedding)

    monkeypatch.setattr(evaluation, "localize_batch", localize_badly)
    with pytest.raises(UserError, match=rf"the (map AUD|audio embedding) of {dataset.pairs[13].id} holds a value"):
        evaluation.evaluate(load_model(checkpoint), dataset, torch.device("cpu"))


def test_the_models_relative_maps_are_smoothed_and_nothing_else(checkpoint, synthetic_root):
    model, sample = load_model(checkpoint), build(synthetic_root)[0]
    pair = sample.image[None], sample.spectrogram[None], -sample.spectrogram[None]
    asked_with = {"infer_sharpening": 0.1, "saliency": lambda image: image[:, 0]}
    ask = partial(evaluation.localize_batch, model, ["wrong"], *pair, **asked_with)
    with torch.no_grad():
        raw, smooth = (ask(infer_smoothing=s) for s in (0.0, 0.1))
    for name, values in raw.raw.items():
        expected = values if name in ("OBJ_PRIOR", "AUD_share") else smooth_maps(values, 0.1)
        assert torch.equal(smooth.raw[name], expected), name
    assert raw.raw.keys() == {"AUD", "AUD_wrong", "AUD_share", "IMG_QUERY", "OBJ_PRIOR"}
    assert all(torch.equal(smooth.scalars[name], values) for name, values in raw.scalars.items())
    assert torch.equal(raw.audio_embedding, smooth.audio_embedding)


def test_wrong_audio_is_of_another_class_whatever_the_order_of_the_list(synthetic_root):
    dataset = build(synthetic_root)
    paired = WithWrongAudio(dataset, seed=0)
    assert sorted(paired.partner) == list(range(len(dataset)))
    assert all(dataset.class_names[i] != dataset.class_names[j] for i, j in enumerate(paired.partner))
    assert torch.equal(paired[2][1], dataset[int(paired.partner[2])].spectrogram)
    other = EvaluationPairs(dataset.pairs[::-1], dataset.ground_truth, [], **SIZES)
    partner = WithWrongAudio(other, seed=0).partner
    assert other.pairs[partner[-1]] == dataset.pairs[paired.partner[0]]


def test_the_absolute_map_is_shown_as_it_is_and_scored_like_every_other(checkpoint, synthetic_root):
    """AUD_share: softmax over slots, neither sharpened nor stretched to its own range; rules compare its places."""
    model, dataset = load_model(checkpoint), build(synthetic_root)
    shown = {}

    def keep(batch):
        shown.update(zip(batch.ids, batch.maps["AUD_share"].clone(), strict=True))

    scored = evaluation.evaluate(model, dataset, torch.device("cpu"), infer_sharpening=0.3, on_batch=[keep])
    sample = dataset[0]
    with torch.no_grad():
        seen, grid = model.attend_image(sample.image[None])
        heard = model.attend_audio(sample.spectrogram[None])
    logits = heard.query @ seen.keys.transpose(1, 2) / seen.keys.shape[2] ** 0.5
    share = logits.softmax(1)[:, 0].unflatten(1, grid)
    big = torch.nn.functional.interpolate(share[:, None], (224, 224), mode="bilinear", align_corners=True)[0, 0]
    assert torch.allclose(shown[sample.id], big, atol=1e-5)
    assert shown[sample.id].min() > 0.1 and shown[sample.id].max() < 0.9  # an untrained model: nothing is stretched
    assert {"cIoU", "pointing", "mAP"} <= scored.results["maps"]["AUD_share"].keys()
    region = (big - big.min()) / (big.max() - big.min()) >= 0.6
    union = sample.truth.sum() + (region & (sample.truth == 0)).sum()
    assert scored.rows[0]["AUD_share_iou"] == pytest.approx(((region * sample.truth).sum() / union).item(), abs=1e-3)


TF32 = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)


@pytest.fixture
def tf32():
    before = [backend.fp32_precision for backend in TF32]
    for backend in TF32:
        backend.fp32_precision = "tf32"
    yield
    for backend, precision in zip(TF32, before, strict=True):
        backend.fp32_precision = precision


@pytest.mark.parametrize("fails", [False, True])
def test_no_tf32_while_a_model_is_scored(checkpoint, synthetic_root, tf32, fails):
    model, dataset, seen = load_model(checkpoint), build(synthetic_root), []
    attend_image = model.attend_image

    def watched(image):
        seen.append([backend.fp32_precision for backend in TF32])
        if fails:
            raise RuntimeError("out of memory")
        return attend_image(image)

    model.attend_image = watched
    for score in (evaluation.evaluate, evaluation.embed_set):
        seen.clear()
        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            score(model, dataset, torch.device("cpu"))
        assert seen and all(found == ["ieee"] * 3 for found in seen)
        assert [backend.fp32_precision for backend in TF32] == ["tf32"] * 3
