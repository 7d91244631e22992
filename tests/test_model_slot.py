"""The method: reference numbers, properties of slot attention, losses."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN

import model_slot
from experiments.reference import reference_inputs, reference_numbers, reference_weights
from model_slot import TARGET, JointSlotModel, MlpDecoder
from models import load_model

SMALL = {"image_encoder": "small", "dim": 16, "image_size": 64, "audio_seconds": 0.8}


@pytest.fixture(scope="module")
def golden():
    return reference_numbers()


@pytest.fixture(scope="module")
def golden_model(golden, tmp_path_factory):
    """The reference weights, written as a released checkpoint is and read back."""
    folder = tmp_path_factory.mktemp("released")
    weights = {f"module.{key}": value for key, value in reference_weights(golden[0]["shapes"]).items()}
    torch.save({"model": weights, "epoch": 3, "best_cIoU": np.float64(0.5)}, folder / "best.pth")
    (folder / "configs.json").write_text(json.dumps({"tau": 0.03, "reciprocal_k": 3, "mask_ratio": 0.0, "gpu": 7}))
    return load_model(folder / "best.pth")


@pytest.fixture(scope="module")
def golden_inputs():
    return reference_inputs()


def assert_close(ours, reference: np.ndarray, tolerance: float = 1e-5):
    ours = np.asarray(torch.as_tensor(ours).detach(), dtype=np.float64)
    assert ours.shape == reference.shape
    assert np.abs(ours - reference).max() <= tolerance * np.abs(reference).max()


def test_features_slots_and_maps_match_the_reference(golden, golden_model, golden_inputs):
    arrays = golden[1]
    image, spectrogram = golden_inputs
    model = golden_model.eval()
    with torch.no_grad():
        assert_close(model.imgnet(image[:1])[0], arrays["image_features_first"])
        assert_close(model.audnet(spectrogram[:1])[0], arrays["audio_features_first"])
        slots = model.embed(image, spectrogram)
        assert_close(slots.image_slots, arrays["image_slots"])
        assert_close(slots.audio_slots, arrays["audio_slots"])
        for sharpening in ("0.1", "1.0"):
            maps = model.localize(image, spectrogram, infer_sharpening=float(sharpening))
            assert_close(maps.audio_map, arrays[f"audio_map_{sharpening}"])
            assert_close(maps.image_map, arrays[f"image_map_{sharpening}"])
        unit = [F.normalize(s[:, TARGET], dim=1) for s in slots]
        assert np.array_equal(model_slot.false_negative_keep_mask(*unit, 3).numpy(), arrays["keep_mask_k3"])


def test_losses_and_gradients_match_the_reference(golden, golden_model, golden_inputs):
    meta, arrays = golden
    model = golden_model
    order = ("info_nce", "reconstruction", "slot_divergence", "attention_matching")
    with torch.no_grad():
        losses = model.eval()(*golden_inputs)
    assert_close([losses[name].item() for name in order], arrays["losses_eval_mode"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    losses = model.train()(*golden_inputs)
    total = losses["info_nce"] + 0.1 * losses["reconstruction"] + 0.1 * losses["slot_divergence"]
    total = total + 100 * losses["attention_matching"]
    ours = [losses[name].item() for name in order] + [total.item()]
    assert_close(ours, arrays["losses_train_mode"])
    total.backward()
    parameters = dict(model.named_parameters())
    norms = [parameters[name].grad.norm().item() for name in meta["grad_norm_names"]]
    assert np.abs(np.array(norms) / arrays["grad_norms"] - 1).max() <= 1e-4
    model.zero_grad()
    model.load_state_dict(before)


def test_keep_mask_matches_the_reference():
    arrays = np.load(GOLDEN / "evaluation_public.npz")
    image, audio = torch.from_numpy(arrays["fn_image_slots"]), torch.from_numpy(arrays["fn_audio_slots"])
    assert not arrays["fn_keep_k8"].all()
    assert np.array_equal(model_slot.false_negative_keep_mask(image, audio, 8).numpy(), arrays["fn_keep_k8"])


# ---------------------------------------------------------------- slot attention


def joint(dim=16, num_slots=3, iterations=3):
    torch.manual_seed(0)
    return model_slot.JointSlotAttention(dim, num_slots, iterations)


def test_attention_sums_to_one_over_tokens_and_is_at_least_the_floor():
    query, keys = torch.randn(2, 3, 8), torch.randn(2, 5, 8) * 50
    attention = model_slot.slot_attention(query, keys)
    assert attention.shape == (2, 3, 5)
    assert torch.allclose(attention.sum(2), torch.ones(2, 3), atol=1e-6)
    assert (attention > 0).all()


def test_attention_before_the_sum_over_tokens_is_a_softmax_over_slots():
    query, keys = torch.randn(1, 2, 4, dtype=torch.float64), torch.randn(1, 3, 4, dtype=torch.float64)
    share = torch.softmax(query @ keys.transpose(1, 2) / 2.0 * 0.1, dim=1) + 1e-8
    assert torch.allclose(model_slot.slot_attention(query, keys, sharpening=0.1), share / share.sum(2, keepdim=True))


@pytest.mark.parametrize("modality", ["img", "aud"])
def test_the_order_of_tokens_moves_keys_only(modality):
    attention, tokens, order = joint(), torch.randn(2, 6, 16), torch.randperm(6)
    one, other = attention(modality, tokens), attention(modality, tokens[:, order])
    assert torch.allclose(one.slots, other.slots, atol=1e-5)
    assert torch.allclose(one.keys[:, order], other.keys, atol=1e-6)


def test_permuted_initial_slots_give_permuted_slots():
    attention, tokens = joint(), torch.randn(2, 6, 16)
    before = attention("img", tokens)
    attention.slots.data = attention.slots.data[:, [2, 0, 1]]
    after = attention("img", tokens)
    assert torch.allclose(before.slots[:, [2, 0, 1]], after.slots, atol=1e-5)
    assert not torch.allclose(before.slots, after.slots, atol=1e-3)


def test_the_query_is_the_one_before_the_last_gru_step():
    attention, tokens = joint(iterations=1), torch.randn(2, 6, 16)
    state = attention("aud", tokens)
    first = attention.aud_to_q(attention.aud_norm_slots(attention.slots))
    assert torch.allclose(state.query, first.expand_as(state.query), atol=1e-6)


def test_both_modalities_share_the_initial_slots_and_nothing_else():
    names = {name.split(".")[0] for name, _ in joint().named_parameters()}
    shared = {name for name in names if not name.startswith(("img_", "aud_"))}
    assert shared == {"slots", "mask_token_img", "mask_token_aud"}
    assert {n[4:] for n in names if n.startswith("img_")} == {n[4:] for n in names if n.startswith("aud_")}


def test_tokens_are_masked_in_training_only_and_at_the_given_rate():
    attention = joint()
    tokens, hidden = torch.randn(200, 50, 16), torch.rand(200, 50) < 0.1
    masked = attention.mask_tokens("img", tokens, hidden)
    assert torch.equal((masked == attention.mask_token_img).all(2), hidden)
    assert torch.equal(masked[~hidden], tokens[~hidden])
    torch.manual_seed(0)
    drawn = JointSlotModel(**SMALL, mask_ratio=0.1).draw_masks(2000)
    for hidden, count in zip(drawn, (4 * 4, 5), strict=True):
        assert hidden.shape == (2000, count) and abs(hidden.float().mean().item() - 0.1) < 0.01
    model = JointSlotModel(**SMALL, mask_ratio=0.9, reciprocal_k=0).eval()
    inputs = torch.randn(4, 3, 64, 64), torch.randn(4, 1, 257, 81)
    assert model(*inputs)["info_nce"] == model(*inputs)["info_nce"]
    for module in (model.imgnet, model.audnet):
        module.eval()
    model.training = True
    assert model(*inputs)["info_nce"] != model(*inputs)["info_nce"]


# ---------------------------------------------------------------- losses


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_info_nce_is_both_directions_without_the_left_out_pairs():
    image, audio = unit(5, 8), unit(5, 8)
    keep = torch.ones(5, 5, dtype=torch.bool)
    keep[0, 3] = keep[3, 0] = False
    expected = 0.0
    for a, b in ((image, audio), (audio, image)):
        for n in range(5):
            scores = [(a[n] @ b[m] / 0.07).exp() for m in range(5) if keep[n, m]]
            expected -= ((a[n] @ b[n] / 0.07).exp() / sum(scores)).log() / 5
    assert torch.allclose(model_slot.info_nce_loss(image, audio, 0.07, keep), expected)


def test_false_negatives_follow_the_definition():
    torch.manual_seed(3)
    image = unit(24, 3)
    audio = F.normalize(image + 0.3 * torch.randn(24, 3, dtype=torch.float64), dim=1)
    near = []
    for x in (image, audio):
        order = (x @ x.T).argsort(dim=1, descending=True)[:, :6]
        near.append([set(row.tolist()) for row in order])
    keep = model_slot.false_negative_keep_mask(image, audio, 6)
    for n in range(24):
        for m in range(24):
            both_ways = all(m in near[side][n] and n in near[side][m] for side in (0, 1))
            assert keep[n, m].item() == (not both_ways or n == m)
    assert not keep.all()


def test_divergence_is_the_mean_positive_cosine_of_ordered_pairs():
    slots = unit(4, 3, 8)
    pairs = [(s[i] @ s[j]).clamp(min=0) for s in slots for i in range(3) for j in range(3) if i != j]
    assert torch.allclose(model_slot.slot_divergence_loss(slots), torch.stack(pairs).mean())
    assert model_slot.slot_divergence_loss(slots[:, :1]) == 0


def test_attention_matching_pulls_the_cross_attention_only():
    states = []
    for tokens in (6, 4):
        query, keys = torch.randn(2, 2, 8, requires_grad=True), torch.randn(2, tokens, 8)
        states.append(model_slot.SlotState(torch.zeros(2, 2, 8), query, keys))
    loss = model_slot.attention_matching_loss(*states)
    intra = model_slot.slot_attention(states[0].query, states[0].keys)[:, 0]
    cross = model_slot.slot_attention(states[1].query, states[0].keys)[:, 0]
    other = model_slot.slot_attention(states[1].query, states[1].keys)[:, 0]
    back = model_slot.slot_attention(states[0].query, states[1].keys)[:, 0]
    assert torch.allclose(loss, ((cross - intra) ** 2).mean() + ((back - other) ** 2).mean())
    loss.backward()
    only_cross = torch.autograd.grad(((cross - intra.detach()) ** 2).mean(), states[1].query)[0]
    assert torch.allclose(states[1].query.grad, only_cross, atol=1e-6)


# ---------------------------------------------------------------- losses of the map, which are not the paper's


def map_inputs(batch=4, slots=3, tokens=20, dim=8):
    """Audio queries (B, K, D), image keys (B, N, D), and a mask that leaves out pair 0, 2."""
    torch.manual_seed(0)
    query, keys = (torch.randn(batch, count, dim, dtype=torch.float64) for count in (slots, tokens))
    keep = torch.ones(batch, batch, dtype=torch.bool)
    keep[0, 2] = keep[2, 0] = False
    return query, keys, keep


def mean_shares(query, keys):
    """(4, 4), pictures by sounds."""
    pairs = [(query[m : m + 1], keys[n : n + 1]) for n in range(4) for m in range(4)]
    return torch.stack([model_slot.slot_share(*pair)[0, TARGET].mean() for pair in pairs]).view(4, 4) + 1e-8


def test_share_contrast_is_both_directions_of_the_mean_share_without_the_left_out_pairs():
    query, keys, keep = map_inputs()
    mean = mean_shares(query, keys)
    kept = mean * keep
    expected = -sum((mean.diagonal() / kept.sum(dim)).log().mean() for dim in (0, 1))
    assert torch.allclose(model_slot.share_contrast_loss(model_slot.shares_of_others(query, keys), keep), expected)


def test_foreign_claims_are_what_sounds_take_of_other_pictures():
    query, keys, keep = map_inputs()
    mean = mean_shares(query, keys)
    others = [(n, m) for n in range(4) for m in range(4) if n != m and keep[n, m]]
    expected = -torch.stack([(1 - mean[pair]).log() for pair in others]).mean()
    assert torch.allclose(model_slot.foreign_claim_loss(model_slot.shares_of_others(query, keys), keep), expected)


def test_a_sound_that_claims_everything_is_still_pulled_back():
    """In float32 1 - share would be 0 there, and so the gradient."""
    query, keys = torch.zeros(3, 2, 4), torch.ones(3, 6, 4)
    query[:, TARGET] = 10.0  # logits 20 above the other slot's
    query.requires_grad_()
    model_slot.foreign_claim_loss(model_slot.shares_of_others(query, keys)).backward()
    found, query.grad = query.grad, None
    model_slot.foreign_claim_loss(model_slot.shares_of_others(query.double(), keys.double())).backward()
    assert found.abs().max() > 0.1 and torch.allclose(found, query.grad, rtol=1e-3)


def test_no_foreign_pair_left_is_no_loss():
    query, keys, _ = map_inputs()
    assert model_slot.foreign_claim_loss(model_slot.shares_of_others(query, keys), torch.eye(4, dtype=torch.bool)) == 0


MAP_LOSSES = {"share_contrast": model_slot.share_contrast_loss, "foreign_claims": model_slot.foreign_claim_loss}


def map_loss(name, query, keys, keep=None):
    return MAP_LOSSES[name](model_slot.shares_of_others(query, keys), keep)


@pytest.mark.parametrize("name", MAP_LOSSES)
def test_the_order_of_a_batch_changes_no_loss_of_the_map(name):
    *inputs, keep = map_inputs()
    order = torch.tensor([2, 0, 3, 1])
    permuted = map_loss(name, *(x[order] for x in inputs), keep[order][:, order])
    assert torch.allclose(map_loss(name, *inputs, keep), permuted, rtol=1e-12)


@pytest.mark.parametrize("name, share", [("share_contrast", 3 / 4), ("foreign_claims", 1)])
def test_a_false_negative_partner_counts_in_no_loss_of_the_map(name, share):
    """Pair 3, a false negative of all others, might as well not be there, but in the mean over pairs."""
    *inputs, _ = map_inputs()
    keep = torch.ones(4, 4, dtype=torch.bool)
    keep[3, :3] = keep[:3, 3] = False
    without = map_loss(name, *(x[:3] for x in inputs))
    assert torch.allclose(map_loss(name, *inputs, keep), share * without, rtol=1e-12)
    assert not torch.allclose(map_loss(name, *inputs), share * without, rtol=1e-3)


def small_batch():
    torch.manual_seed(0)
    model = JointSlotModel(**SMALL, mask_ratio=0.0, reciprocal_k=1).eval()
    return model, (torch.randn(4, 3, 64, 64), torch.randn(4, 1, 257, 81))


@pytest.mark.parametrize("name", MAP_LOSSES)
def test_the_map_alone_teaches_the_audio_encoder(name):
    model, inputs = small_batch()
    model(*inputs, wanted=[name])[name].backward()
    for weight in (model.audnet.proj[0].weight, model.imgnet.proj.weight, model.slot_attn.aud_to_q.weight):
        assert weight.grad.abs().max() > 0


def test_the_papers_losses_are_the_same_with_and_without_those_of_the_map():
    model, inputs = small_batch()
    pairs = model.represent(*inputs)
    plain, more = (model.batch_losses(model.compared(pairs, wanted)) for wanted in ((), MAP_LOSSES))
    assert plain.keys() - {"info_nce_chance"} == {"info_nce"} and more.keys() >= {*MAP_LOSSES}
    assert torch.equal(plain["info_nce"], more["info_nce"])


def test_silence_costs_what_it_claims_and_nothing_else():
    query, keys = torch.zeros(2, 2, 4), torch.randn(2, 6, 4)
    assert torch.allclose(model_slot.silence_loss(query, keys), torch.tensor(2.0).log())  # half of every token
    query[:, 1] = 50 * (keys := keys.abs()).mean(1)
    assert model_slot.silence_loss(query, keys) < 1e-3
    assert model_slot.silence_loss(query.flip(1), keys) > 5


def test_silence_adds_one_loss_that_teaches_the_audio_encoder():
    model, (image, spectrogram) = small_batch()
    both = torch.cat([spectrogram, torch.randn(4, 1, 257, 81)], dim=1)
    plain, more = (model.pair_losses(model.represent(image, x)) for x in (spectrogram, both))
    assert more.keys() - plain.keys() == {"silence"}
    assert all(torch.allclose(plain[name], more[name], rtol=1e-5) for name in plain)  # no batch statistics in between
    more["silence"].backward()
    assert model.audnet.proj[0].weight.grad.abs().max() > 0


def test_presence_is_the_share_of_a_pairs_best_tokens_and_feels_a_missing_source():
    torch.manual_seed(0)
    keys, query = 3 * torch.randn(2, 20, 8), torch.randn(2, 2, 8)
    keys[0, :2] = 9 * (query[0, 0] - query[0, 1])  # the first sound finds two tokens, the second none
    keys[1] = -9 * (query[1, 0] - query[1, 1])
    states = (model_slot.SlotState(torch.zeros(2, 2, 8), *both) for both in ((query, keys), (query, keys)))
    present, absent = model_slot.presence_confidence(*states)
    assert present > 0.99 and absent < 0.01
    best = model_slot.slot_share(query, keys)[0, TARGET].sort(descending=True).values[:2]
    assert torch.allclose(present, best.mean())


# ---------------------------------------------------------------- decoder, false negatives


def test_the_decoder_adds_columns_then_rows_and_weights_slots_by_alpha():
    decoder, slots = MlpDecoder(2, 3, 4), torch.randn(1, 2, 4)
    expected = torch.zeros(6, 4)
    for y in range(2):
        for x in range(3):
            position = torch.cat([decoder.pos_emb.col_embed.weight[x], decoder.pos_emb.row_embed.weight[y]])
            decoded = decoder.mlp(slots[0] + position)
            expected[3 * y + x] = (decoded[:, :4] * decoded[:, 4:].softmax(0)).sum(0)
    assert torch.allclose(decoder(slots)[0], expected, atol=1e-6)


def test_k_follows_the_batch_and_a_k_as_large_as_the_batch_is_refused():
    assert [model_slot.default_reciprocal_k(b) for b in (256, 128, 8, 2)] == [20, 10, 1, 1]
    model = JointSlotModel(**SMALL, reciprocal_k=4)
    with pytest.raises(ValueError, match="reciprocal_k 4 leaves no negative in a batch of 4"):
        model(torch.randn(4, 3, 64, 64), torch.randn(4, 1, 257, 81))


# ---------------------------------------------------------------- maps, sizes, precision


def test_a_batch_gives_the_maps_of_its_samples():
    torch.manual_seed(0)
    model = JointSlotModel(**SMALL).eval()
    image, spectrogram = torch.randn(3, 3, 64, 64), torch.randn(3, 1, 257, 81)
    together = model.localize(image, spectrogram)
    alone = model.localize(image[1:2], spectrogram[1:2])
    assert together.audio_map.shape == together.image_map.shape == (3, 4, 4)
    assert torch.allclose(together.audio_map[1], alone.audio_map[0], atol=1e-6)
    assert torch.allclose(together.image_map[1], alone.image_map[0], atol=1e-6)


def test_a_model_of_224_px_takes_images_of_448_and_its_maps_are_14_by_14():
    model = JointSlotModel(audio_seconds=1.0).eval()
    maps = model.localize(torch.rand(1, 3, 448, 448), torch.rand(1, 1, 257, 101))
    assert maps.audio_map.shape == maps.image_map.shape == (1, 14, 14)


@pytest.mark.parametrize("arch, dim, size, seconds, slots", [("small", 6, 50, 0.7, 1), ("resnet18", 32, 96, 1.1, 3)])
def test_no_size_is_fixed(arch, dim, size, seconds, slots):
    model = JointSlotModel(arch, dim, slots, image_size=size, audio_seconds=seconds)
    frames = model_slot.num_frames(seconds)
    losses = model(torch.randn(3, 3, size, size), torch.randn(3, 1, 257, frames))
    assert all(torch.isfinite(value) and value.shape == () for value in losses.values())
    sum(losses.values()).backward()
    with pytest.raises(ValueError, match="tokens reach a decoder"):
        model(torch.randn(3, 3, 2 * size, 2 * size), torch.randn(3, 1, 257, frames))


def test_slots_and_losses_stay_fp32_under_bf16_autocast():
    torch.manual_seed(0)
    model = JointSlotModel(**SMALL)
    inputs = torch.randn(4, 3, 64, 64), torch.randn(4, 1, 257, 81)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*inputs)
        state = model.attend_audio(inputs[1])
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert state.slots.dtype == torch.float32
    sum(losses.values()).backward()


def test_the_chance_of_the_contrastive_loss_counts_the_negatives_that_are_left():
    torch.manual_seed(0)
    model = JointSlotModel("small", 16, image_size=64, audio_seconds=0.8, reciprocal_k=3)
    one = torch.nn.functional.normalize(torch.randn(1, 16), dim=1).expand(12, -1)
    losses = model.batch_losses({"image_target": one, "audio_target": one})
    assert losses["info_nce"].item() == pytest.approx(losses["info_nce_chance"].item(), rel=1e-5)
    left = torch.tensor([10.0] * 3 + [12.0] * 9)  # three samples are neighbours of all: two negatives less each
    assert losses["info_nce_chance"].item() == pytest.approx(2 * left.log().mean().item())
