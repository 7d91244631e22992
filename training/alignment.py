"""Where the tokens of an image encoder look, so that maps are drawn there.

A strided convolution of an odd kernel centres its outputs beside the middle of the pixels that they stand for; over
the stages of a network this sums up to half a token, one way or the other, unless training has made up for it. So it
is measured, with the weights from which training starts. B images, C channels, h x w tokens.
"""

from collections.abc import Callable

import torch

from resnet import Encoder, TimmImageEncoder
from utils import evaluation_mode

STEP = 0.25  # of a token, to which a shift is rounded
TOKENS = 14  # along a side of the images that are looked at, where the network takes images of any size


def align(encoder: Encoder) -> None:
    """Measure and set `token_shift` of a network of timm.

    The small encoder is aligned by design. The paper's ResNet-18 is not, but its published figures are those of maps
    that are drawn as if it were.
    """
    if not isinstance(encoder, TimmImageEncoder):
        return
    encoder.token_shift = 0.0
    side = TOKENS * encoder.stride
    if encoder.refusal(side) or encoder.refusal(side + encoder.stride):  # it takes images of one size alone
        return
    with evaluation_mode(encoder):
        shift = measured_shift(encoder.trunk, encoder.stride)
        encoder.token_shift = STEP * round(shift / STEP)
        # where tokens look over windows, a border may move the windows instead
        if encoder.token_shift and abs(measured_shift(encoder.trunk, encoder.stride)) > abs(shift):
            encoder.token_shift = 0.0


@torch.no_grad()
def measured_shift(
    trunk: Callable[[torch.Tensor], torch.Tensor], stride: int, tokens: int = TOKENS, images: int = 2
) -> float:
    """How far left of or above the place where they are drawn the tokens of a trunk look, in tokens.

    A bright patch is put onto noise; the centre of gravity of what it changes in the features says where it is drawn. 0
    for a trunk that does not react. With noise of a fixed seed.
    """
    draw, places, moved = torch.Generator().manual_seed(0), patch_places(tokens, stride), []
    for _ in range(images):
        noise = torch.randn(1, 3, tokens * stride, tokens * stride, generator=draw) / 2
        before, *after = trunk(torch.cat([noise, *(with_patch(noise, place, stride) for place in places)]))
        for place, features in zip(places, after, strict=True):
            if centre := change_centre(before, features):
                moved += [drawn - seen / stride for drawn, seen in zip(centre, place, strict=True)]
    return sum(moved) / len(moved) if moved else 0.0


def patch_places(tokens: int, stride: int) -> list[tuple[float, float]]:
    """Places (y, x) in pixels around the middle of an image, symmetric, and at all places within a token's cell."""
    middle, step = tokens * stride / 2, 5 * stride / 8
    return [(middle + y * step, middle + x * step) for y, x in ((-1.5, 0.5), (-0.5, -1.5), (0.5, 1.5), (1.5, -0.5))]


def with_patch(image: torch.Tensor, place: tuple[float, float], side: int) -> torch.Tensor:
    """The images with a bright square of `side` pixels, whose middle is at (y, x)."""
    image = image.clone()
    top, left = (round(p - side / 2) for p in place)
    image[:, :, top : top + side, left : left + side] = 2.5
    return image


def change_centre(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float] | None:
    """Centre of gravity (y, x), in tokens, of the squared change of features (C, h, w); None where nothing changed."""
    change = (after - before).double().square().sum(0)  # (h, w)
    if not change.sum():
        return None
    h, w = change.shape
    y, x = (change.sum(1) * (torch.arange(h) + 0.5)).sum(), (change.sum(0) * (torch.arange(w) + 0.5)).sum()
    return float(y / change.sum()), float(x / change.sum())
