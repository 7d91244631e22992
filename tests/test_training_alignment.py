"""Where tokens look: a patch that moves over the image moves the change of the features, and the map, with it."""

import pytest
import torch

from resnet import ImageEncoder, TimmImageEncoder
from training.alignment import align, change_centre, measured_shift, with_patch

NETWORKS = ["timm:mobilenetv3_small_050@3", "timm:resnet10t@3", "timm:convnext_atto@2", "timm:vit_tiny_patch16_224@5"]


def worst_distance(encoder, tokens):
    """Largest distance, in tokens, between a patch and the change that it causes in the features, along a side; each
    averaged over three images, as noise moves it, too."""
    stride, middle = encoder.stride, tokens / 2
    places = [(middle + y, middle + x) for y, x in ((-1.5, 0), (1, -1.25), (0, 1.75), (0.5, -0.5))]
    drawn, draw = torch.zeros(len(places), 2), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(3):
            noise = torch.randn(1, 3, tokens * stride, tokens * stride, generator=draw) / 2
            patched = [with_patch(noise, (y * stride, x * stride), stride) for y, x in places]
            before, *after = encoder.trunk(torch.cat([noise, *patched]))
            drawn += torch.tensor([change_centre(before, features) for features in after]) / 3
    return (drawn - torch.tensor(places)).abs().max().item()


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_of_networks_of_timm_are_drawn_where_their_tokens_look(name):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    encoder = TimmImageEncoder(name, 8).eval()
    align(encoder)
    assert worst_distance(encoder, 14) < 0.25
    grid = encoder.trunk(torch.zeros(1, 3, 6 * encoder.stride, 7 * encoder.stride)).shape[2:]
    assert grid == (6, 7)


def test_maps_of_the_small_encoder_are_drawn_where_its_tokens_look():
    torch.manual_seed(0)
    assert worst_distance(ImageEncoder("small", 8).eval(), 14) < 0.25


def test_the_papers_encoder_is_half_a_token_off_as_documented():
    torch.manual_seed(0)
    encoder = ImageEncoder("resnet18", 8).eval()
    assert 0.3 < measured_shift(encoder.trunk, encoder.stride, tokens=10, images=1) < 0.7
