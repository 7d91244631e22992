"""The two encoders and the ImageNet object prior.

B batch, D embedding channels, h x w image tokens, T audio tokens, F frequency bins, L spectrogram frames.
Weight names are those of the paper's released checkpoints.
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from torch import nn
from torchvision.models import ResNet18_Weights
from torchvision.models.resnet import BasicBlock, conv1x1


class Architecture(NamedTuple):
    """A ResNet of basic blocks.

    aligned: a token's receptive field is centred where the enlarged map draws it (one stride-4 convolution with an even
    kernel, averaging between stages). The paper's ResNet-18 is not: its odd strided kernels move maps by half a token
    towards the lower right, which matters where tokens are few and images small.
    """

    widths: tuple[int, ...]  # channels of each stage; every stage but the first halves the resolution
    blocks: int  # basic blocks per stage; fewer mean a smaller receptive field, which keeps small maps sharp
    dim: int  # embedding channels D by default
    aligned: bool

    @property
    def stride(self) -> int:
        """Input pixels per token side: the stem divides by 4, each later stage by 2."""
        return 4 * 2 ** (len(self.widths) - 1)


ARCHITECTURES = {
    "resnet18": Architecture(widths=(64, 128, 256, 512), blocks=2, dim=512, aligned=False),
    "small": Architecture(widths=(16, 32, 64), blocks=1, dim=144, aligned=True),
}


def get_architecture(arch: str) -> Architecture:
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown arch {arch!r}: choose from {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[arch]


def tokens_along(size: int, arch: str) -> int:
    """Number of tokens along a side of `size` pixels or frames: odd strided kernels round up, even ones down."""
    design = get_architecture(arch)
    return size // design.stride if design.aligned else -(-size // design.stride)


def _stem(in_channels: int, design: Architecture) -> nn.Conv2d:
    kernel, stride, padding = (8, 4, 2) if design.aligned else (7, 2, 3)
    return nn.Conv2d(in_channels, design.widths[0], kernel, stride, padding, bias=False)


def _stage(in_width: int, width: int, halve: bool, design: Architecture) -> nn.Sequential:
    stride = 2 if halve and not design.aligned else 1
    shortcut = None
    if stride != 1 or in_width != width:
        shortcut = nn.Sequential(conv1x1(in_width, width, stride), nn.BatchNorm2d(width))
    pool = [nn.AvgPool2d(2)] if halve and design.aligned else []
    first = BasicBlock(in_width, width, stride, shortcut)
    return nn.Sequential(*pool, first, *(BasicBlock(width, width) for _ in range(design.blocks - 1)))


class ResNetTrunk(nn.Module):
    """A ResNet of basic blocks without its first convolution, global pooling and classifier."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        design = get_architecture(arch)
        widths = design.widths
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if design.aligned else nn.MaxPool2d(3, 2, 1)
        self.stages = len(widths)
        for number, (in_width, width) in enumerate(zip((widths[0], *widths[:-1]), widths), start=1):
            self.add_module(f"layer{number}", _stage(in_width, width, number > 1, design))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Output of the first convolution -> output of the last stage."""
        x = self.maxpool(self.relu(self.bn1(x)))
        for number in range(1, self.stages + 1):
            x = getattr(self, f"layer{number}")(x)
        return x

    def init_convolutions(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ImageTrunk(ResNetTrunk):
    """(B, 3, H, W) normalised images -> (B, C, h, w), the last stage's features."""

    def __init__(self, arch: str) -> None:
        super().__init__(arch)
        self.conv1 = _stem(3, get_architecture(arch))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.features(self.conv1(image))


class ImageEncoder(ImageTrunk):
    """(B, 3, H, W) normalised images -> (B, D, h, w)."""

    def __init__(self, arch: str, dim: int) -> None:
        super().__init__(arch)
        self.proj = nn.Conv2d(get_architecture(arch).widths[-1], dim, 1)
        self.init_convolutions()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.proj(super().forward(image))


class AudioEncoder(ResNetTrunk):
    """(B, 1, F, L) log spectrogram -> (B, D, T), the maximum over frequency."""

    def __init__(self, arch: str, dim: int) -> None:
        super().__init__(arch)
        design = get_architecture(arch)
        self.conv1_1 = _stem(1, design)
        self.proj = nn.Sequential(nn.Conv2d(design.widths[-1], dim, 1))
        self.init_convolutions()

    def forward(self, spectrogram: torch.Tensor) -> torch.Tensor:
        return self.proj(self.features(self.conv1_1(spectrogram))).amax(dim=2)


class ObjectSaliency(ImageTrunk):
    """OBJ_PRIOR: mean over channels of |stage-4 features| of the plain ImageNet ResNet-18 (paper, object-guided
    localization). (B, 3, H, W) normalised images -> (B, h, w), not negative. Cannot be built without its weights.
    """

    def __init__(self, weights: str = "auto") -> None:
        super().__init__("resnet18")
        load_imagenet_weights(self, weights)
        self.eval()

    @torch.no_grad()
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(image).abs().mean(dim=1)


def load_imagenet_weights(trunk: ImageTrunk, source: str = "auto") -> None:
    """Fill a trunk with the ImageNet weights of torchvision's ResNet-18 (IMAGENET1K_V1); a projection stays as it is.

    source: "auto" downloads them, or takes torch hub's cache; anything else is the path of a state dict of torchvision.
    Raises ValueError that says what to do when they cannot be loaded or do not fit: random weights are never scored.
    """
    weights = _download_weights() if source == "auto" else _read_weights(Path(source))
    weights = {key: value for key, value in weights.items() if not key.startswith("fc.")}
    misfit = ValueError(f"the ImageNet weights ({source}) are not those of torchvision's resnet18")
    try:
        missing, unexpected = trunk.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise misfit from error
    if unexpected or any(not key.startswith("proj.") for key in missing):
        raise misfit


def _download_weights() -> dict[str, torch.Tensor]:
    official = ResNet18_Weights.IMAGENET1K_V1
    try:
        return official.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the ImageNet weights could not be downloaded ({error}): fetch {official.url} by other means and give the "
            "file's path as --imagenet_weights, or give none"
        ) from error


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
        raise ValueError(f"cannot read the ImageNet weights {path}: {error}") from error
    if not isinstance(weights, dict):
        raise ValueError(f"{path} is not a state dict")
    return weights
