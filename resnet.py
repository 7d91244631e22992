"""The encoders, their initial weights, and the ImageNet object prior.

B batch, D embedding channels, C channels of a trunk's features, h x w image tokens, T audio tokens, F frequency bins,
L spectrogram frames. Weight names of `resnet18` are those of the paper's released checkpoints. Every other network is
one of timm, by its name there: "timm:NAME", or "timm:NAME@STAGE" for another feature stage than the last.
"""

import hashlib
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from torchvision.models import ResNet18_Weights
from torchvision.models.resnet import BasicBlock, conv1x1

from transforms import IMAGENET_MEAN, IMAGENET_STD
from utils import UserError, check_weights, evaluation_mode, is_safetensors

TIMM = "timm:"
TIMM_DIM = 512  # embedding channels D of a network of timm by default
# Without gradients on a CPU so much of a batch goes through a network of timm at once: with more, EfficientNet-Lite0
# takes 1.4 times as long, as what its layers hand on is allocated anew each time and stays in no cache.
PIXELS_AT_ONCE = 4 * 224 * 224
HEAD = ("proj.", "standardise.")  # names of an encoder's own weights, behind its trunk


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


def get_architecture(name: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown encoder {name!r}: choose {', '.join(ARCHITECTURES)} or {TIMM}NAME")
    return ARCHITECTURES[name]


def default_dim(name: str) -> int:
    """Embedding channels D of an encoder where none are asked for."""
    return TIMM_DIM if name.startswith(TIMM) else get_architecture(name).dim


def tokens_along(size: int, name: str) -> int:
    """Tokens of `resnet18` or `small` along a side of `size` pixels or frames: odd strided kernels round up."""
    design = get_architecture(name)
    return size // design.stride if design.aligned else -(-size // design.stride)


# ---------------------------------------------------------------- our ResNets


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


def fuse_batch_norm(model: nn.Module) -> nn.Module:
    """Fold the batch norm of our ResNets into their convolutions, in place: the same numbers within rounding, sooner.

    model: anything that holds such networks, in evaluation mode, else ValueError; it can no more be trained. Networks
    of timm stay as they are.
    """
    if model.training:
        raise ValueError("batch norm is folded with its running statistics: call eval() first")
    for trunk in (module for module in model.modules() if isinstance(module, ResNetTrunk)):
        for block in trunk.modules():
            parts = dict(block.named_children())
            pairs = [(name, f"bn{name[4]}") for name in parts if name.startswith("conv")]
            for convolution, norm in [("0", "1")] if isinstance(block, nn.Sequential) else pairs:
                if isinstance(parts.get(convolution), nn.Conv2d) and isinstance(parts.get(norm), nn.BatchNorm2d):
                    setattr(block, convolution, fuse_conv_bn_eval(parts[convolution], parts[norm]))
                    setattr(block, norm, nn.Identity())
    return model


# ---------------------------------------------------------------- networks of timm


def import_timm():
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"encoders {TIMM}NAME need timm: pip install -r requirements-timm.txt ({error})") from error
    return timm


def split_name(name: str) -> tuple[str, int | None]:
    """ "timm:NAME@STAGE" -> NAME and the stage; None without one. ValueError for a stage that is no number."""
    network, at, stage = name.removeprefix(TIMM).partition("@")
    if at and not stage.isdigit():
        raise ValueError(f"{name}: what follows @ is the number of a feature stage, counted from 0")
    return network, int(stage) if at else None


def configured_size(name: str) -> int:
    """Image size, in pixels, that the configuration of a network of timm asks for."""
    timm = import_timm()
    network, _ = split_name(name)
    with _building(name):
        config = timm.models.get_pretrained_cfg(network)
    if config is None:
        raise ValueError(f"{name}: timm has no network of this name; timm.list_models() names them")
    return config.input_size[-1]


@contextmanager
def _building(name: str) -> Iterator[None]:
    """timm's errors for a name, stage or size that it cannot build, as ValueError in one line."""
    try:
        yield
    except (RuntimeError, TypeError, AssertionError, AttributeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name}: timm cannot build this encoder ({reason})") from error


class TimmTrunk(nn.Module):
    """A network of timm up to one of its feature stages: (B, in_channels, H, W) -> (B, C, h, w).

    Images arrive with ImageNet's mean and deviation and get those that the network's configuration names. Vision
    transformers give the grid of their patch tokens, after the last norm.
    """

    def __init__(self, name: str, in_channels: int = 3) -> None:
        super().__init__()
        self.name, self.in_channels = name, in_channels
        with _building(name):
            self.network = self.create()
            stages = len(self.network.feature_info)
            stage = split_name(name)[1]
            self.stage = stages - 1 if stage is None else stage
            if self.stage >= stages:
                raise ValueError(f"{name}: this network has the feature stages 0 to {stages - 1}")
            info = self.network.feature_info[self.stage]
            self.channels, self.stride = info["num_chs"], info["reduction"]
            self.network.prune_intermediate_layers([self.stage], prune_norm=False, prune_head=True)
        config = self.network.pretrained_cfg
        self.fixed_size = bool(config.get("fixed_input_size"))  # by its configuration: it may take others nevertheless
        scale = torch.tensor([b / a for a, b in zip(config["std"], IMAGENET_STD, strict=True)])
        shift = [(b - a) / s for a, b, s in zip(config["mean"], IMAGENET_MEAN, config["std"], strict=True)]
        rescaled = in_channels == len(scale)
        self.register_buffer("pixel_scale", scale[:, None, None] if rescaled else torch.ones(1, 1, 1))
        self.register_buffer("pixel_shift", torch.tensor(shift)[:, None, None] if rescaled else torch.zeros(1, 1, 1))

    def create(self, **more: Any) -> nn.Module:
        """The whole network; one whose position embedding has a fixed size adapts it to that of the image."""
        timm, network = import_timm(), split_name(self.name)[0]
        channels = {} if self.in_channels == 3 else {"in_chans": self.in_channels}
        try:
            return timm.create_model(network, dynamic_img_size=True, **channels, **more)
        except TypeError:  # it is not a transformer, or one that cannot
            return timm.create_model(network, **channels, **more)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.pixel_scale + self.pixel_shift
        learning = self.training or torch.is_grad_enabled()
        if learning or x.device.type != "cpu" or torch.compiler.is_compiling():
            return self._features(x)
        at_once = max(1, PIXELS_AT_ONCE // (x.shape[2] * x.shape[3]))
        return torch.cat([self._features(part) for part in x.split(at_once)])

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        options = {"norm": True, "stop_early": True, "output_fmt": "NCHW", "intermediates_only": True}
        return self.network.forward_intermediates(x, indices=[self.stage], **options)[0]

    def stage_parameters(self) -> list[list[nn.Parameter]]:
        """Parameters by stage (transformers: by block), the stem first; all as one where timm names no stages."""
        from timm.models import group_parameters

        if not hasattr(self.network, "group_matcher"):
            return [[*self.network.parameters()]]

        groups = group_parameters(self.network, self.network.group_matcher(coarse=True))
        by_name = dict(self.network.named_parameters())
        return [[by_name[key] for key in groups[number]] for number in sorted(groups)]


# ---------------------------------------------------------------- the encoders


class Standardise(nn.Module):
    """Features (B, C, h, w) with mean 0 and deviation 1 in each channel, as measured once by `fit`; identity before."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def fit(self, batches: Iterable[torch.Tensor]) -> None:
        """Take mean and deviation over all tokens of the batches (B, C, h, w), summed in float64."""
        count, total, squares = 0, 0.0, 0.0
        for batch in batches:
            tokens = batch.double().transpose(0, 1).flatten(1)  # (C, B * h * w)
            count, total, squares = count + tokens.shape[1], total + tokens.sum(1), squares + tokens.square().sum(1)
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(deviation > 0, deviation, 1.0))  # a channel that is always 0 stays 0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean[:, None, None]) / self.std[:, None, None]


class Encoder(nn.Module):
    """What image encoders have in common: a trunk, images (B, 3, H, W) -> (B, C, h, w), and a head -> (B, D, h, w).

    The trunk may be frozen, all of it or but for its last stages: no gradient, and batch norm as in evaluation. In
    place of images the features of the frozen trunk may come, as they were kept.
    """

    name: str
    channels: int  # C
    stride: int  # pixels per token side
    proj: nn.Conv2d
    standardise: Standardise | None
    token_shift = 0.0  # in tokens: how far left of or above the place where they are drawn the trunk's tokens look
    frozen_modules: Iterable[nn.Module] = ()

    def trunk(self, image: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def tokens_along(self, size: int) -> int:
        """Tokens along a side of `size` pixels. ValueError where there are none."""
        raise NotImplementedError

    def check_size(self, size: int) -> None:
        """ValueError for images of a size that the encoder does not take; a warning where tokens do not fit into it."""
        tokens = self.tokens_along(size)
        if beside := abs(tokens * self.stride - size):
            warnings.warn(
                f"images of {size} px are {tokens} tokens of {self.stride} px: maps are drawn up to {beside} px beside "
                f"what they show; a multiple of {self.stride} px avoids that",
                stacklevel=2,
            )

    def stage_parameters(self) -> list[list[nn.Parameter]]:
        """The trunk's parameters by stage, the stem and first stage first."""
        raise NotImplementedError

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, 3, H, W), or their features (B, C, h, w) -> (B, D, h, w)."""
        features = image.float() if image.shape[1] == self.channels else self.trunk(image)
        return self.proj(features if self.standardise is None else self.standardise(features))

    def freeze(self, unfreeze_last: int = 0) -> list[nn.Parameter]:
        """Freeze the trunk but for its last stages -> the parameters of these. ValueError where it has too few."""
        stages = self.stage_parameters()
        if unfreeze_last >= len(stages):
            raise ValueError(f"--unfreeze_last {unfreeze_last}: the trunk has {len(stages)} stages, one must be frozen")
        first = len(stages) - unfreeze_last
        for parameter in (p for stage in stages[:first] for p in stage):
            parameter.requires_grad_(False)
        self.frozen_modules = self._without_gradient()
        self.train(self.training)
        return [p for stage in stages[first:] for p in stage]

    def _without_gradient(self) -> list[nn.Module]:
        """Modules of the trunk that nothing trains: those without parameters, as dropout, and those that are frozen."""
        head = {self.proj, *self.proj.modules(), self.standardise, self}
        return [m for m in self.modules() if m not in head and not any(p.requires_grad for p in m.parameters(False))]

    def train(self, mode: bool = True) -> "Encoder":
        super().train(mode)
        for module in self.frozen_modules:
            module.training = False
        return self

    @property
    def config(self) -> dict[str, Any]:
        """Settings that rebuild it, beside its name and D; those that are off are left out."""
        settings = {"standardise": self.standardise is not None, "token_shift": self.token_shift}
        return {name: value for name, value in settings.items() if value}

    def trunk_state(self) -> dict[str, torch.Tensor]:
        """The trunk's part of the state dict: all but the head."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith(HEAD)}


class ImageEncoder(Encoder, ImageTrunk):
    """`resnet18` or `small`: (B, 3, H, W) normalised images -> (B, D, h, w)."""

    def __init__(self, arch: str, dim: int, standardise: bool = False) -> None:
        ImageTrunk.__init__(self, arch)
        self.name, design = arch, get_architecture(arch)
        self.channels, self.stride = design.widths[-1], design.stride
        self.proj = nn.Conv2d(self.channels, dim, 1)
        self.standardise = Standardise(self.channels) if standardise else None
        self.init_convolutions()

    def trunk(self, image: torch.Tensor) -> torch.Tensor:
        return ImageTrunk.forward(self, image)

    def tokens_along(self, size: int) -> int:
        if tokens := tokens_along(size, self.name):
            return tokens
        raise ValueError(f"images of {size} px leave the encoder {self.name} no token: enlarge them")

    def stage_parameters(self) -> list[list[nn.Parameter]]:
        stem = [*self.conv1.parameters(), *self.bn1.parameters()]
        stages = [[*getattr(self, f"layer{number}").parameters()] for number in range(1, self.stages + 1)]
        return [stem + stages[0], *stages[1:]]


class TimmImageEncoder(Encoder):
    """A network of timm: (B, 3, H, W) normalised images, whose sides are multiples of its stride -> (B, D, h, w).

    token_shift: how far left of or above the place where they are drawn the tokens look, in tokens
    (training/alignment.py). Unless it is 0, images get a border of one token, from which the trunk's grid is taken so
    that every token looks at the middle of its cell.
    """

    def __init__(self, name: str, dim: int, standardise: bool = False, token_shift: float = 0.0) -> None:
        super().__init__()
        self.name, self.timm = name, TimmTrunk(name)
        self.channels, self.stride, self.token_shift = self.timm.channels, self.timm.stride, token_shift
        self.proj = nn.Conv2d(self.channels, dim, 1)
        self.standardise = Standardise(self.channels) if standardise else None

    def trunk(self, image: torch.Tensor) -> torch.Tensor:
        h, w = (self.tokens_along(side) for side in image.shape[2:])
        if not self.token_shift:
            return self.timm(image)
        # a token looks `behind` pixels to the left of its cell's middle: images move by that, or to the next token
        behind = round(self.token_shift * self.stride)
        before = self.stride - behind if behind > 0 else -behind
        after = self.stride - before
        first = int(behind > 0)
        bordered = F.pad(image, (before, after, before, after))
        return self.timm(bordered)[:, :, first : first + h, first : first + w]

    def tokens_along(self, size: int) -> int:
        """As above. ValueError also where they do not divide it: maps would be drawn amiss."""
        tokens = size // self.stride
        if size % self.stride and self.timm.fixed_size and size == configured_size(self.timm.name):
            raise ValueError(
                f"{self.timm.name}: images of {size} px, which it is made for, are no whole number of tokens of "
                f"{self.stride} px: take another feature stage, NAME@STAGE, or another network"
            )
        if size % self.stride or not tokens:
            near = " or ".join(str(self.stride * n) for n in (tokens, tokens + 1) if n)
            raise ValueError(
                f"{self.timm.name} takes images whose side is a multiple of {self.stride}, not {size} px: {near}"
            )
        return tokens

    @torch.no_grad()
    def refusal(self, size: int) -> str:
        """Why the network gives no grid of tokens of images of that size; empty where it does.

        Some transformers are made for one size alone.
        """
        tokens = self.tokens_along(size)
        try:
            with evaluation_mode(self):
                shape = self.trunk(torch.zeros(1, 3, size, size, device=self.proj.weight.device)).shape[1:]
        except (AssertionError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            return (str(error).strip() or type(error).__name__).splitlines()[0]
        wanted = self.channels, tokens, tokens
        return "" if shape == wanted else f"features of shape {tuple(shape)} instead of {wanted}"

    def check_size(self, size: int) -> None:
        super().check_size(size)
        if reason := self.refusal(size):
            own = configured_size(self.timm.name)
            if own == size:
                raise ValueError(f"{self.timm.name} gives no tokens of images of {size} px ({reason})")
            raise ValueError(f"{self.timm.name} takes images of {own} px alone, not {size} px ({reason})")

    def stage_parameters(self) -> list[list[nn.Parameter]]:
        return self.timm.stage_parameters()


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


class TimmAudioEncoder(nn.Module):
    """A convolutional network of timm with one input channel: as `AudioEncoder`."""

    def __init__(self, name: str, dim: int) -> None:
        super().__init__()
        self.timm = TimmTrunk(name, in_channels=1)
        self.proj = nn.Sequential(nn.Conv2d(self.timm.channels, dim, 1))

    def forward(self, spectrogram: torch.Tensor) -> torch.Tensor:
        with _building(self.timm.name):
            return self.proj(self.timm(spectrogram)).amax(dim=2)


class Encoders(NamedTuple):
    """Both encoders, and how many tokens they make."""

    image: Encoder
    audio: nn.Module
    side: int  # image tokens along a side
    steps: int  # audio tokens


def build_encoders(
    image_encoder: str,
    audio_encoder: str | None,
    dim: int,
    image_size: int,
    frames: int,
    standardise: bool = False,
    token_shift: float = 0.0,
) -> Encoders:
    """The encoders by name; audio_encoder None: see `own_audio_encoder`. frames: L.

    ValueError for unknown names, and for sizes that leave no token.
    """
    audio_encoder = audio_encoder or own_audio_encoder(image_encoder)
    if image_encoder.startswith(TIMM):
        image = TimmImageEncoder(image_encoder, dim, standardise, token_shift)
        side = image.tokens_along(image_size)
    else:
        image, side = ImageEncoder(image_encoder, dim, standardise), tokens_along(image_size, image_encoder)
    if audio_encoder.startswith(TIMM):
        audio = TimmAudioEncoder(audio_encoder, dim)
        with torch.no_grad():
            steps = audio.eval()(torch.zeros(1, 1, 257, frames)).shape[2]
        audio.train()
    else:
        audio, steps = AudioEncoder(audio_encoder, dim), tokens_along(frames, audio_encoder)
    if min(side, steps) < 1:
        raise ValueError(
            f"{image_size} px and {frames} frames of audio leave {image_encoder} or {audio_encoder} no token: "
            "enlarge them"
        )
    return Encoders(image, audio, side, steps)


def own_audio_encoder(image_encoder: str) -> str:
    """The audio encoder where none is named: that of the images, or the paper's beside a network of timm."""
    return "resnet18" if image_encoder.startswith(TIMM) else image_encoder


# ---------------------------------------------------------------- initial weights


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
    """Fill a trunk with the ImageNet weights of torchvision's ResNet-18 (IMAGENET1K_V1); a head stays as it is.

    source: "auto" downloads them, or takes torch hub's cache; anything else is the path of a state dict of torchvision.
    Raises ValueError that says what to do when they cannot be loaded or do not fit: random weights are never scored.
    """
    weights = _download_weights() if source == "auto" else read_weights(Path(source))
    wanted = {key: value for key, value in trunk.state_dict().items() if not key.startswith(HEAD)}
    _check(weights, wanted, source, unused=("fc.",))
    trunk.load_state_dict(weights, strict=False)


def load_image_weights(encoder: Encoder, name: str, source: str) -> None:
    """Fill the trunk of an image encoder; source: "auto" (download) or a file (pth, safetensors). ValueError: as above.

    Weights of timm are those of the whole network, in any form in which timm takes them.
    """
    if isinstance(encoder, TimmImageEncoder):
        _load_timm_weights(encoder.timm, source)
    elif name == "resnet18":
        load_imagenet_weights(encoder, source)
    else:
        raise ValueError(f"there are no ImageNet weights for the encoder {name}: --image_weights none")


def _load_timm_weights(trunk: TimmTrunk, source: str) -> None:
    if source == "auto":
        try:
            weights = trunk.create(pretrained=True).state_dict()
        except Exception as error:  # of timm, its hub or the network: they share no class
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"the weights of {trunk.name} could not be downloaded ({reason}): fetch them by other means and give "
                "the file's path as --image_weights, or none for random ones"
            ) from error
        trunk.network.load_state_dict({key: weights[key] for key in trunk.network.state_dict()})
        return
    whole, weights = trunk.create(), read_weights(Path(source))
    wanted = whole.state_dict()
    convert = getattr(sys.modules[type(whole).__module__], "checkpoint_filter_fn", None)
    if convert and not weights.keys() <= wanted.keys():
        with _building(f"{trunk.name}, {source}"):
            weights = convert(weights, whole)
    heads = whole.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    kept = trunk.network.state_dict().keys()
    _check(weights, {k: v for k, v in wanted.items() if k in kept}, source, (*heads, *(wanted.keys() - kept)))
    trunk.network.load_state_dict({key: weights[key] for key in kept})


def _check(weights: Mapping, wanted: Mapping, source: str, unused: tuple[str, ...]) -> None:
    """ValueError unless the keys and shapes are those wanted; keys that begin with one of `unused` do not count."""
    counted = {key: value for key, value in weights.items() if not key.startswith(unused)}
    try:
        check_weights(counted, dict(wanted), source)
    except UserError as error:
        raise ValueError(str(error)) from error
    if broken := [key for key in wanted if not torch.isfinite(weights[key]).all()]:
        raise ValueError(f"the weights in {source} are not finite: {', '.join(broken)}")


def _download_weights() -> dict[str, torch.Tensor]:
    official = ResNet18_Weights.IMAGENET1K_V1
    try:
        return official.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the ImageNet weights could not be downloaded ({error}): fetch {official.url} by other means and give the "
            "file's path as --image_weights (of test_model.py: --imagenet_weights), or give none"
        ) from error


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from a file of PyTorch, where it may be below `model` or `state_dict`, or of safetensors.

    Safetensors are known by their first bytes, too, whatever the name.
    """
    try:
        if is_safetensors(path):
            from safetensors.torch import load_file  # comes with timm

            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ValueError(f"{path}: this format needs safetensors: pip install -r requirements-timm.txt") from error
    except UnpicklingError as error:  # PyTorch's own words speak of loading it with the code that it may run
        raise ValueError(
            f"cannot read the weights {path}: it is no file of PyTorch or safetensors that holds tensors alone"
        ) from error
    except Exception as error:  # SafetensorError has no class of its own to catch
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read the weights {path}: {reason}") from error
    for name in ("state_dict", "model"):
        if isinstance(weights, dict) and isinstance(weights.get(name), dict):
            weights = weights[name]
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{path} is not a state dict")
    return {key.removeprefix("module."): value for key, value in weights.items()}


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """sha256 of a state dict: of names, types, shapes and values, so that it is the same in every file format."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        value = weights[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
