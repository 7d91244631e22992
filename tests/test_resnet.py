"""Encoders: recipes, shapes, ImageNet weights."""

import warnings
from urllib.error import URLError

import pytest
import torch
from torchvision.models import ResNet18_Weights, resnet18

import resnet
import transforms
import utils
from model_slot import JointSlotModel
from models import load_model
from resnet import (
    AudioEncoder,
    ImageEncoder,
    ObjectSaliency,
    TimmImageEncoder,
    TimmTrunk,
    configured_size,
    fuse_batch_norm,
    load_image_weights,
    load_imagenet_weights,
    read_weights,
    tokens_along,
    weights_digest,
)
from training import alignment
from training.alignment import align


def count(*modules) -> float:
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def test_parameter_counts_are_the_published_ones():
    model = JointSlotModel()
    assert round(count(model), 2) == 31.82
    assert round(count(model.imgnet, model.audnet), 2) == 22.87
    assert 0.8 < count(JointSlotModel("small", image_size=112, audio_seconds=1.6)) < 1.2


@pytest.mark.parametrize(
    "arch, size, side", [("resnet18", 224, 7), ("small", 112, 7), ("resnet18", 100, 4), ("small", 70, 4)]
)
def test_maps_have_the_size_that_tokens_along_says(arch, size, side):
    assert tokens_along(size, arch) == side
    assert ImageEncoder(arch, 8).eval()(torch.zeros(1, 3, size, size)).shape == (1, 8, side, side)


@pytest.mark.parametrize("arch, frames", [("resnet18", 501), ("small", 161), ("small", 33)])
def test_audio_tokens_have_the_size_that_tokens_along_says(arch, frames):
    tokens = AudioEncoder(arch, 8).eval()(torch.zeros(1, 1, 257, frames))
    assert tokens.shape == (1, 8, tokens_along(frames, arch))


def test_convolutions_start_kaiming_normal_with_fan_out():
    encoder = ImageEncoder("resnet18", 512)
    weight = encoder.layer4[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)
    assert encoder.proj.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """torchvision's own network, its state dict on disk as the download would bring it."""
    torch.manual_seed(0)
    network = resnet18()
    path = tmp_path_factory.mktemp("imagenet") / "resnet18.pth"
    torch.save(network.state_dict(), path)
    return network.eval(), path


def test_the_object_prior_is_the_mean_magnitude_of_stage_4(official):
    network, path = official
    image = torch.randn(2, 3, 96, 96)
    x = network.maxpool(network.relu(network.bn1(network.conv1(image))))
    x = network.layer4(network.layer3(network.layer2(network.layer1(x))))
    assert torch.allclose(ObjectSaliency(str(path))(image), x.abs().mean(1), atol=1e-6)


def test_the_image_encoder_takes_imagenet_weights_and_keeps_its_projection(official):
    network, path = official
    encoder = ImageEncoder("resnet18", 32)
    projection = encoder.proj.weight.clone()
    load_imagenet_weights(encoder, str(path))
    assert torch.equal(encoder.conv1.weight, network.conv1.weight)
    assert torch.equal(encoder.proj.weight, projection)


def test_a_failed_download_says_what_to_do_and_leaves_no_random_prior(monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr(type(ResNet18_Weights.IMAGENET1K_V1), "get_state_dict", fail)
    with pytest.raises(ValueError, match=r"could not be downloaded.*--image_weights"):
        ObjectSaliency("auto")


def test_weights_that_do_not_fit_are_refused(tmp_path, official):
    weights = torch.load(official[1], weights_only=True)
    del weights["layer3.0.conv1.weight"]
    torch.save(weights, tmp_path / "short.pth")
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    for name in ("short.pth", "broken.pth", "absent.pth"):
        with pytest.raises(ValueError, match=name):
            ObjectSaliency(str(tmp_path / name))


# ---------------------------------------------------------------- networks of timm

SMALL_NETWORK = "timm:mobilenetv3_small_050"


def needs_timm():
    return pytest.importorskip("timm", reason="timm is not installed: pip install -r requirements-timm.txt")


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory):
    """A whole network of timm with random weights, and its state dict as a file of safetensors."""
    timm = needs_timm()
    from safetensors.torch import save_file

    torch.manual_seed(5)
    network = timm.create_model(SMALL_NETWORK.removeprefix("timm:")).eval()
    path = tmp_path_factory.mktemp("timm") / "weights.safetensors"
    save_file(network.state_dict(), path)
    return network, path


@pytest.mark.parametrize(
    "name, size, channels, side",
    [(SMALL_NETWORK, 96, 288, 3), (f"{SMALL_NETWORK}@3", 96, 24, 6), ("timm:vit_tiny_patch16_224", 64, 192, 4)],
)
def test_a_network_of_timm_gives_the_tokens_of_the_stage_that_is_asked_for(name, size, channels, side):
    needs_timm()
    encoder = TimmImageEncoder(name, 8).eval()
    assert encoder.trunk(torch.zeros(2, 3, size, size)).shape == (2, channels, side, side)
    assert encoder(torch.zeros(2, 3, size, size)).shape == (2, 8, side, side)
    assert encoder.tokens_along(size) == side


def test_parts_of_a_batch_give_what_the_whole_batch_gives(monkeypatch):
    needs_timm()
    torch.manual_seed(0)
    trunk, images = resnet.TimmTrunk(SMALL_NETWORK).eval(), torch.randn(5, 3, 64, 96)
    whole, sizes, features = trunk(images), [], trunk._features
    monkeypatch.setattr(trunk, "_features", lambda x: sizes.append(len(x)) or features(x))
    monkeypatch.setattr(resnet, "PIXELS_AT_ONCE", 2 * 64 * 96)
    with torch.no_grad():
        assert torch.allclose(trunk(images), whole, atol=1e-5) and sizes == [2, 2, 1]
        assert trunk.train()(images).shape == whole.shape and sizes[3:] == [5]  # batch norm needs them all
    trunk.eval()(images)
    assert sizes[4:] == [5]


def test_images_reach_a_network_of_timm_with_the_mean_and_deviation_of_its_configuration(monkeypatch):
    timm = needs_timm()
    network, seen = timm.create_model(SMALL_NETWORK.removeprefix("timm:")), []
    network.pretrained_cfg = network.pretrained_cfg | {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: network)
    trunk, pixels = TimmTrunk(SMALL_NETWORK), torch.rand(1, 3, 32, 32)
    monkeypatch.setattr(network, "forward_intermediates", lambda x, **_: seen.append(x) or [x])
    mean, std = (torch.tensor(x)[:, None, None] for x in (transforms.IMAGENET_MEAN, transforms.IMAGENET_STD))
    trunk((pixels - mean) / std)
    mean, std = (torch.tensor(network.pretrained_cfg[x])[:, None, None] for x in ("mean", "std"))
    assert torch.allclose(seen[0], (pixels - mean) / std, atol=1e-6)


@pytest.mark.parametrize(
    "name, message",
    [
        ("timm:no_such_network", "cannot build"),
        (f"{SMALL_NETWORK}@9", "stages 0 to"),
        (f"{SMALL_NETWORK}@last", "number"),
    ],
)
def test_a_network_or_stage_that_timm_does_not_have_is_one_line(name, message):
    needs_timm()
    with pytest.raises(ValueError, match=message):
        TimmImageEncoder(name, 8)


def test_the_size_of_a_network_that_timm_does_not_have_is_one_line_that_says_so():
    needs_timm()
    with pytest.raises(ValueError, match="timm:no_such_network: timm has no network of this name"):
        configured_size("timm:no_such_network")


def test_sizes_that_would_draw_maps_amiss_are_refused_with_those_that_do_not():
    needs_timm()
    with pytest.raises(ValueError, match="multiple of 32, not 100 px: 96 or 128"):
        TimmImageEncoder(SMALL_NETWORK, 8).eval()(torch.zeros(1, 3, 100, 100))


def test_a_size_that_tokens_do_not_fill_is_told_with_what_it_does_to_maps():
    for arch, size, beside in (("small", 127, 15), ("resnet18", 100, 28)):
        encoder = ImageEncoder(arch, 16)
        with pytest.warns(UserWarning, match=f"drawn up to {beside} px beside"):
            encoder.check_size(size)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            encoder.check_size(4 * encoder.stride)


def test_weights_of_a_file_fill_the_trunk_key_by_key(timm_file, tmp_path):
    network, path = timm_file
    encoder, image = TimmImageEncoder(SMALL_NETWORK, 8).eval(), torch.rand(1, 3, 64, 64)
    load_image_weights(encoder, SMALL_NETWORK, str(path))
    with torch.no_grad():
        x = image * encoder.timm.pixel_scale + encoder.timm.pixel_shift
        assert torch.allclose(encoder.trunk(image), network.forward_intermediates(x, intermediates_only=True)[-1])
    weights = {f"module.{key}": value for key, value in network.state_dict().items() if "classifier" not in key}
    torch.save({"state_dict": weights}, tmp_path / "headless.pth")
    load_image_weights(encoder, SMALL_NETWORK, str(tmp_path / "headless.pth"))
    key = "module.blocks.1.0.conv_pw.weight"
    torch.save({k: v for k, v in weights.items() if k != key}, tmp_path / "lacking.pth")
    torch.save(weights | {key: weights[key][:1]}, tmp_path / "other_shape.pth")
    torch.save(weights | {"stranger.weight": weights[key]}, tmp_path / "stranger.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    for name, message in [
        ("lacking.pth", "1 missing: blocks.1.0.conv_pw.weight"),
        ("other_shape.pth", "of another shape: blocks.1.0.conv_pw.weight"),
        ("stranger.pth", "1 unexpected: stranger.weight"),
        ("broken.safetensors", "broken.safetensors"),
        ("absent.safetensors", "absent.safetensors"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_image_weights(encoder, SMALL_NETWORK, str(tmp_path / name))


def test_safetensors_of_any_name_are_read_and_other_files_and_broken_values_are_named(timm_file, tmp_path):
    network, path = timm_file
    weights = network.state_dict()
    (tmp_path / "weights.pth").write_bytes(path.read_bytes())
    assert weights_digest(read_weights(tmp_path / "weights.pth")) == weights_digest(weights)
    torch.save(weights, tmp_path / "called.safetensors")  # as with checkpoints: the name promises what it is not
    with pytest.raises(ValueError, match=r"cannot read the weights .*called\.safetensors"):
        read_weights(tmp_path / "called.safetensors")
    torch.save(network, tmp_path / "network.pth")
    with pytest.raises(ValueError, match=r"network\.pth: it is no file of .* that holds tensors alone"):
        read_weights(tmp_path / "network.pth")
    key = "conv_stem.weight"
    torch.save(weights | {key: torch.full_like(weights[key], torch.nan)}, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match=f"nan.pth are not finite: {key}"):
        load_image_weights(TimmImageEncoder(SMALL_NETWORK, 8), SMALL_NETWORK, str(tmp_path / "nan.pth"))


def test_a_download_by_timm_that_fails_is_one_line_that_says_what_to_do(monkeypatch):
    timm = needs_timm()
    encoder = TimmImageEncoder(SMALL_NETWORK, 8)

    def fail(*_, pretrained=False, **__):
        raise RuntimeError("no route\nto the hub")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(ValueError, match=r"could not be downloaded \(no route\): .*--image_weights"):
        load_image_weights(encoder, SMALL_NETWORK, "auto")


def test_a_checkpoint_rebuilds_a_network_of_timm_and_its_maps_without_any_other_file(tmp_path, monkeypatch):
    timm = needs_timm()
    model = JointSlotModel(SMALL_NETWORK, 16, image_size=64, audio_seconds=0.8, audio_encoder=SMALL_NETWORK)
    model.imgnet.token_shift = 0.5
    image, spectrogram = torch.rand(2, 3, 64, 64), torch.rand(2, 1, 257, 81)
    maps = model.eval().localize(image, spectrogram)
    path = tmp_path / "model.pth"
    utils.save_checkpoint(path, {"model": model.state_dict(), "model_config": model.config})
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *a, pretrained=False, **k: create(*a, **k) if not pretrained else 1 / 0
    )
    again = load_model(path)
    assert again.config == model.config and again.config["token_shift"] == 0.5
    assert torch.equal(again.localize(image, spectrogram).audio_map, maps.audio_map)


def test_frozen_stages_get_no_gradient_and_keep_their_statistics():
    needs_timm()
    for encoder, count in [(TimmImageEncoder(SMALL_NETWORK, 8), 7), (ImageEncoder("resnet18", 8), 4)]:
        free = encoder.train().freeze(unfreeze_last=1)
        before = {key: value.clone() for key, value in encoder.state_dict().items()}
        encoder(torch.rand(2, 3, 64, 64)).sum().backward()
        moved = {key for key, value in encoder.state_dict().items() if not torch.equal(value, before[key])}
        trained = {name for name, p in encoder.named_parameters() if p.grad is not None}
        last = {name for name, p in encoder.named_parameters() if any(p is q for q in free)}
        assert last and trained == last | {"proj.weight", "proj.bias"}
        of_last = tuple(name.rpartition(".")[0] for name in last)
        assert moved and all(name.startswith(of_last) for name in moved)  # running statistics of the last stage alone
        with pytest.raises(ValueError, match=r"has .* stages"):
            encoder.freeze(unfreeze_last=count + 9)


def test_features_in_place_of_images_give_the_same_tokens():
    needs_timm()
    encoder = TimmImageEncoder(SMALL_NETWORK, 8, standardise=True).eval()
    image = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        features = encoder.trunk(image)
        encoder.standardise.fit([features[:1], features[1:]])
        standard = encoder.standardise(features)
        assert torch.equal(encoder(features), encoder(image))
    spread = standard.transpose(0, 1).flatten(1)
    assert spread.mean(1).abs().max() < 1e-4
    assert torch.allclose(spread.std(1, correction=0)[encoder.standardise.std != 1], torch.ones(()), atol=1e-3)


def test_the_digest_of_weights_knows_names_and_values_and_not_the_file_format(timm_file):
    network, path = timm_file
    weights = network.state_dict()
    assert weights_digest(weights) == weights_digest(read_weights(path))
    key = next(iter(weights))
    assert weights_digest(weights | {key: weights[key] + 1e-3}) != weights_digest(weights)
    renamed = {f"x.{k}": v for k, v in weights.items()}
    assert weights_digest(renamed) != weights_digest(weights)


@pytest.mark.parametrize("own", [224, 448], ids=["another size than alignment looks at", "that size"])
def test_a_network_that_takes_images_of_one_size_alone_gets_no_border_and_refuses_others(own, monkeypatch):
    needs_timm()
    encoder, forward = TimmImageEncoder(SMALL_NETWORK, 8), TimmTrunk.forward

    def strict(trunk, image):
        assert image.shape[2] == own, "Input height doesn't match"
        return forward(trunk, image)

    monkeypatch.setattr(TimmTrunk, "forward", strict)
    monkeypatch.setattr(resnet, "configured_size", lambda _: own)
    encoder.check_size(own)
    with pytest.raises(ValueError, match=rf"images of {own} px alone, not 320 px \(Input height"):
        encoder.check_size(320)
    align(encoder)
    assert encoder.token_shift == 0 and encoder.training


def test_a_border_that_puts_tokens_further_off_is_not_kept(monkeypatch):
    needs_timm()
    encoder, shifts = TimmImageEncoder(SMALL_NETWORK, 8), iter([0.5, 1.3, 0.5, 0.1])
    monkeypatch.setattr(alignment, "measured_shift", lambda *_: next(shifts))
    for kept in (0.0, 0.5):
        align(encoder)
        assert encoder.token_shift == kept


def test_a_network_that_gives_no_grid_of_tokens_is_told_apart_from_a_wrong_size(monkeypatch):
    needs_timm()
    encoder = TimmImageEncoder(SMALL_NETWORK, 8)
    with pytest.raises(ValueError, match="multiple of 32, not 225 px: 224 or 256"):
        encoder.check_size(225)
    monkeypatch.setattr(TimmTrunk, "forward", lambda _, image: image.new_zeros(1, 288, 4, 4))
    with pytest.raises(ValueError, match=r"gives no tokens of images of 224 px \(features of shape \(288, 4, 4\)"):
        encoder.check_size(224)
    encoder.timm.fixed_size = True
    monkeypatch.setattr(resnet, "configured_size", lambda _: 225)
    with pytest.raises(ValueError, match="225 px, which it is made for, are no whole number of tokens of 32 px"):
        encoder.check_size(225)


def test_a_network_whose_stages_timm_does_not_know_is_frozen_as_a_whole(monkeypatch):
    needs_timm()
    encoder = TimmImageEncoder(SMALL_NETWORK, 8)
    monkeypatch.delattr(type(encoder.timm.network), "group_matcher")
    assert encoder.freeze() == [] and not any(p.requires_grad for p in encoder.timm.parameters())
    with pytest.raises(ValueError, match="has 1 stages, one must be frozen"):
        encoder.freeze(unfreeze_last=1)


@pytest.mark.parametrize("arch", ["resnet18", "small"])
def test_without_batch_norm_maps_and_presence_are_those_with_it_within_1e_5(arch):
    """Running statistics are those of a trained model: neither 0 nor 1."""
    torch.manual_seed(0)
    model = JointSlotModel(arch, 16, image_size=64, audio_seconds=0.8)
    with pytest.raises(ValueError, match="eval"):
        fuse_batch_norm(model)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias, 0, 0.3)
    image, spectrogram = torch.randn(3, 3, 64, 64), torch.randn(3, 1, 257, 81) / 3
    model.eval()
    whole, presence = model.localize(image, spectrogram), model.confidences(*states(model, image, spectrogram))
    assert len(norms) > 10 and fuse_batch_norm(model) is model
    assert not [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    fused = model.localize(image, spectrogram)
    for name, values in whole._asdict().items():
        assert torch.allclose(getattr(fused, name), values, rtol=0, atol=1e-5), name
    assert torch.allclose(
        model.confidences(*states(model, image, spectrogram))["presence"], presence["presence"], rtol=0, atol=1e-5
    )


@torch.no_grad()
def states(model, image, spectrogram):
    return model.attend_image(image)[0], model.attend_audio(spectrogram)
