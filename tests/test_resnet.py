"""Encoders: recipes, shapes, ImageNet weights."""

from urllib.error import URLError

import pytest
import torch
from torchvision.models import ResNet18_Weights, resnet18

from model_slot import JointSlotModel
from resnet import AudioEncoder, ImageEncoder, ObjectSaliency, load_imagenet_weights, tokens_along


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
    with pytest.raises(ValueError, match=r"could not be downloaded.*--imagenet_weights"):
        ObjectSaliency("auto")


def test_weights_that_do_not_fit_are_refused(tmp_path, official):
    weights = torch.load(official[1], weights_only=True)
    del weights["layer3.0.conv1.weight"]
    torch.save(weights, tmp_path / "short.pth")
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    for name in ("short.pth", "broken.pth", "absent.pth"):
        with pytest.raises(ValueError, match=name):
            ObjectSaliency(str(tmp_path / name))
