"""Images from files, and the transforms of images and spectrograms before a model sees them.

H x W image, F bins, L frames.
"""

import filecmp
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, v2

from utils import as_file

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPECTROGRAM_MASK_BINS = 9
NO_IMAGES = ("EPS", "MPEG")  # of what Pillow opens: programs, which it would run, and films
CUT_OFF = -0.499  # OpenCV rounds to whole levels, Pillow cuts the fraction off

cv2.setNumThreads(0)  # a forked worker would wait forever for the threads of its parent's OpenCV


def train_transform(size: int, augment: str) -> Callable[[Image.Image], torch.Tensor]:
    """RGB PIL image -> (3, size, size) normalised. augment: "hard" (the paper's) or "plain" (crop and flip)."""
    draw = augmentation(size, augment)
    return lambda image: _normalise_one(draw(image))


def augmentation(size: int, augment: str) -> Callable[[Image.Image | np.ndarray], np.ndarray]:
    """The same before it is normalised: RGB image, PIL or (H, W, 3) uint8 -> (size, size, 3) uint8."""

    def draw(image: Image.Image | np.ndarray) -> np.ndarray:
        return change(random_crop(np.asarray(image), size, short_side=int(size * 1.1)), augment == "hard")

    return draw


def change(pixels: np.ndarray, hard: bool) -> np.ndarray:
    """Draws from torch's global generator what torchvision's transforms of the same names draw, in their order."""
    if hard and _chance(0.8):
        kernel = cv2.getGaussianKernel(5, _uniform(0.1, 2.0))
        pixels = cv2.sepFilter2D(pixels, -1, kernel, kernel)
    if _chance(0.5):
        pixels = cv2.flip(pixels, 1)
    if hard and _chance(0.8):
        pixels = _jitter_colour(pixels, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
    if hard and _chance(0.2):
        pixels = _grey(pixels)
    return pixels


def _chance(probability: float) -> bool:
    return float(torch.rand(())) < probability


def _uniform(low: float, high: float) -> float:
    return float(torch.empty(()).uniform_(low, high))


def random_crop(image: np.ndarray, size: int, short_side: int) -> np.ndarray:
    """RGB (H, W, 3) -> (size, size, 3) uint8: a random crop of it resized (bicubic, antialiased) to that short side.

    Cropped before resizing: the result is the same to half a pixel, and only the cropped part has to be resized.
    """
    height, width = image.shape[:2]
    scale = min(height, width) / short_side  # pixels of the image per pixel of the crop
    side = round(scale * size)
    places = [short_side * length // min(height, width) - size + 1 for length in (height, width)]
    top, left = (round(scale * int(torch.randint(count, ()))) for count in places)
    top, left = min(top, height - side), min(left, width - side)  # rounding may have passed the edge
    part = torch.from_numpy(cv2.cvtColor(image[top : top + side, left : left + side], cv2.COLOR_RGB2RGBA))
    resized = v2.functional.resize(part.permute(2, 0, 1), [size, size], InterpolationMode.BICUBIC)
    return cv2.cvtColor(resized.permute(1, 2, 0).numpy(), cv2.COLOR_RGBA2RGB)


def _jitter_colour(pixels: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float) -> np.ndarray:
    """Four changes in random order: factors within 1 -+ the given spread; hue turned by up to `hue` of a circle."""
    order = torch.randperm(4).tolist()
    factors = [_uniform(1 - spread, 1 + spread) for spread in (brightness, contrast, saturation)]
    turn = _uniform(-hue, hue)
    for change in order:
        if change == 3:
            pixels = _turn_hue(pixels, turn)
        else:
            blend_with = (np.zeros_like, _mean_grey, _grey)[change](pixels)
            pixels = cv2.addWeighted(pixels, factors[change], blend_with, 1 - factors[change], CUT_OFF)
    return pixels


def _grey(pixels: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _mean_grey(pixels: np.ndarray) -> np.ndarray:
    return np.full_like(pixels, round(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0]))


def _turn_hue(pixels: np.ndarray, turn: float) -> np.ndarray:
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(256 * turn) % 256)  # wraps around: the circle has 256 steps
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def eval_transform(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """PIL image -> (3, size, size) normalised: bicubic, antialiased, the aspect ratio is not kept."""
    return lambda image: _normalise_one(resize_whole(image, size))


def resize_whole(image: Image.Image, size: int) -> np.ndarray:
    """PIL image -> (size, size, 3) uint8: bicubic, antialiased, the aspect ratio is not kept.

    One axis after the other, in the order in which Pillow 13 takes them itself. Older ones always begin with the width,
    which rounds otherwise: up to 4 grey levels in images that are much reduced in height.
    """
    width, height = image.size
    height_first = height - size > 2 * max(width - size, 0)
    between = (width, size) if height_first else (size, height)
    return np.array(image.resize(between, Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.BICUBIC))


def normalise(levels: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, ImageNet-normalised, channels last in memory, on the same device."""
    mean, std = _statistics(levels.shape[2], levels.device)
    flat = levels.flatten(2).float()  # (B, H, W * 3): rows that are long enough for vector instructions
    return flat.div_(255).sub_(mean).div_(std).view(levels.shape).permute(0, 3, 1, 2)


def _normalise_one(pixels: np.ndarray) -> torch.Tensor:
    return normalise(torch.from_numpy(pixels)[None])[0].contiguous()


@cache
def _statistics(width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor(values).repeat(width).to(device) for values in (IMAGENET_MEAN, IMAGENET_STD))


def draw_bands(bins: int, frames: int) -> torch.Tensor:
    """One random band of bins and one of frames to mask, 0 to 9 wide each: (4,) int64, start and width of both."""
    bands = []
    for size in (bins, frames):
        width = min(int(torch.randint(SPECTROGRAM_MASK_BINS + 1, ())), size)
        bands += [int(torch.randint(size - width + 1, ())), width]
    return torch.tensor(bands)


def mask_bands(spectrograms: torch.Tensor, bands: torch.Tensor) -> torch.Tensor:
    """Set the bands (B, 4), see `draw_bands`, of spectrograms (B, 1, F, L) to 0 in place."""
    for axis, (start, width) in ((2, bands[:, :2].T), (3, bands[:, 2:].T)):
        place = torch.arange(spectrograms.shape[axis], device=spectrograms.device)
        hidden = (place >= start[:, None]) & (place < (start + width)[:, None])  # (B, F) or (B, L)
        spectrograms.masked_fill_(hidden[:, None, :, None] if axis == 2 else hidden[:, None, None], 0)
    return spectrograms


def load_image(path: str | Path, short_side: int | None = None) -> Image.Image:
    """RGB image as a viewer shows it: rotated by its EXIF data, 16 bits scaled to 8, white where transparent.

    short_side: a JPEG whose sides are all at least 2, 4 or 8 times as long is decoded at that fraction of its size.
    Raises ValueError, naming the file, when it cannot be decoded.
    """
    source = as_file(path)
    try:
        with Image.open(source) as image:
            if image.format in NO_IMAGES:
                raise ValueError(f"{image.format} is no image")
            if short_side:
                image.draft(None, (short_side, short_side))
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            return on_white(image)
    except (OSError, ValueError, SyntaxError, TypeError, struct.error, Image.DecompressionBombError) as error:
        reason = str(error).replace(repr(source), repr(str(path)))
        raise ValueError(f"cannot decode the image {path}: {reason}") from error


SKETCH = 32  # pixels along a side of what is left of images to compare them
ALIKE = 6.0  # mean difference of two sketches, 0..255: a copy that was compressed anew stays below


def same_image(one: str | Path, other: str | Path) -> bool:
    """Whether two files show the same image, also where one is a copy that was scaled or compressed anew.

    True where one of them cannot be decoded, which is told when its turn comes.
    """
    try:
        if filecmp.cmp(one, other, shallow=False):
            return True
        sketches = [load_image(path, SKETCH).resize((SKETCH, SKETCH), Image.Resampling.BOX) for path in (one, other)]
    except (OSError, ValueError):
        return True
    one, other = (np.asarray(sketch, float) for sketch in sketches)
    return float(np.abs(one - other).mean()) <= ALIKE


def on_white(image: Image.Image) -> Image.Image:
    """RGB image; what is transparent shows white, as a viewer shows it, and not the colour hidden there."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


REFERENCE_WHITE = 203.0  # cd/m2: what HDR shows where SDR is at its brightest (ITU-R BT.2408)
HLG_PEAK, HLG_GAMMA = 1000.0, 1.2  # cd/m2 and system gamma of HLG's reference display (BT.2100)
SDR_GAMMA = 2.4  # BT.1886
TO_BT709 = {  # linear light of other primaries (columns: red, green, blue) in those of BT.709
    "bt2020": ((1.660491, -0.587641, -0.072850), (-0.124550, 1.132900, -0.008349), (-0.018151, -0.100579, 1.118730)),
    "p3": ((1.224940, -0.224940, 0.0), (-0.042057, 1.042057, 0.0), (-0.019638, -0.078636, 1.098274)),
}


def to_sdr(rgb: np.ndarray, transfer: str, primaries: str) -> tuple[np.ndarray, float]:
    """RGB (H, W, 3) uint16 -> (H, W, 3) uint8 of BT.709, and the share of pixels that were brighter than its white.

    transfer: "pq", "hlg" or "sdr"; primaries: "bt709" or a key of TO_BT709. Light up to reference white keeps its
    value, brighter light is cut off. HLG's system gamma is taken channel by channel, as FFmpeg's zscale does.
    """
    light = _light_of_codes(transfer)[rgb]
    if primaries in TO_BT709:
        light = cv2.transform(light, np.array(TO_BT709[primaries], np.float32))
    brighter = float((light.max(axis=2) > 1.05).mean())
    return np.rint(255 * cv2.pow(light.clip(0, 1), 1 / SDR_GAMMA)).astype(np.uint8), brighter


@cache
def _light_of_codes(transfer: str) -> np.ndarray:
    """(65536,) float32: linear light of every code of 16 bits, 1 at SDR's white."""
    code = np.arange(2**16) / (2**16 - 1)
    if transfer == "pq":  # SMPTE ST 2084
        root = code ** (32 / 2523)
        light = (
            10_000 / REFERENCE_WHITE * ((root - 107 / 128).clip(0) / (2413 / 128 - 2392 / 128 * root)) ** (8192 / 1305)
        )
    elif transfer == "hlg":  # BT.2100
        scene = np.where(code <= 0.5, code**2 / 3, (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12)
        light = HLG_PEAK / REFERENCE_WHITE * scene**HLG_GAMMA
    else:
        light = code**SDR_GAMMA
    return light.astype(np.float32)
