"""Pictures from files, and what is done to pictures and spectrograms before a model sees them.

H x W picture, F bins, L frames.
"""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import to_tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPECTROGRAM_MASK_BINS = 9


def train_transform(size: int, augment: str) -> Callable[[Image.Image], torch.Tensor]:
    """PIL picture -> (3, size, size) normalised. augment: "hard" (the paper's) or "plain" (crop and flip)."""
    crop = [v2.Resize(int(size * 1.1), InterpolationMode.BICUBIC), v2.RandomCrop(size)]
    if augment == "hard":
        crop.append(v2.RandomApply([v2.GaussianBlur(5, (0.1, 2.0))], p=0.8))
    crop.append(v2.RandomHorizontalFlip())
    if augment == "hard":
        crop.append(v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8))
        crop.append(v2.RandomGrayscale(0.2))
    return v2.Compose([*crop, *_to_normalised()])


def eval_transform(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """PIL picture -> (3, size, size) normalised: bicubic, antialiased, the aspect ratio is not kept."""
    return v2.Compose([v2.Resize((size, size), InterpolationMode.BICUBIC), *_to_normalised()])


def _to_normalised() -> list[Callable]:
    return [to_tensor, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]  # v2's own scaling differs in the last bit


def mask_spectrogram(spectrogram: torch.Tensor) -> torch.Tensor:
    """Set one random band of bins and one of frames of (1, F, L), 0 to 9 wide each, to 0 in place."""
    for axis in (1, 2):
        width = int(torch.randint(SPECTROGRAM_MASK_BINS + 1, ()))
        width = min(width, spectrogram.shape[axis])
        start = int(torch.randint(spectrogram.shape[axis] - width + 1, ()))
        spectrogram.narrow(axis, start, width).zero_()
    return spectrogram


def load_image(path: str | Path) -> Image.Image:
    """RGB picture as a viewer shows it: turned as its EXIF data say, 16 bits scaled to 8, transparency dropped.

    Raises ValueError, naming the file, when it cannot be decoded.
    """
    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
                picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, TypeError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode the picture {path}: {error}") from error
