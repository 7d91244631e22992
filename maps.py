"""Maps of where a sound comes from: enlarged, smoothed, normalised to 0..1, summed to IQR and OGL.

B batch, h x w tokens of a map, H x W pixels. A map is a float tensor, larger where the sound comes from. The values of
an absolute map (AUD_share) mean the same in every image, so it may stay dark; those of any other map compare the places
of one image, and are scored and shown after min-max normalisation.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

MAP_SIZE = 224  # pixels per side at which maps and ground truth are compared
ABSOLUTE = "AUD_share"
CONSTANT_RANGE = 1e-6  # a map whose range is at most this share of its largest magnitude is constant


def upsample_maps(maps: Tensor, size: int | tuple[int, int] = MAP_SIZE, interpolation: str = "bicubic") -> Tensor:
    """Enlarge (B, h, w) maps to (B, H, W), H x W the size: a number where both are the same.

    "bicubic" (this method) has align_corners=False and no antialiasing; "bilinear" (LVS, EZ-VSL, FNAC, SSLalignment)
    has align_corners=True. Half-precision maps become float32. ValueError for another interpolation.
    """
    if interpolation not in ("bicubic", "bilinear"):
        raise ValueError(f"interpolation must be bicubic or bilinear, not {interpolation!r}")
    if maps.dtype not in (torch.float32, torch.float64):
        maps = maps.float()
    size = (size, size) if isinstance(size, int) else tuple(size)
    if maps.shape[1:] == size:
        return maps
    align_corners = interpolation == "bilinear"
    return F.interpolate(maps[:, None], size, mode=interpolation, align_corners=align_corners)[:, 0]


def smooth_maps(maps: Tensor, smoothing: float) -> Tensor:
    """Smooth (B, h, w) maps: kernel (s, 1 - 2s, s) along columns, then along rows. Not in the paper.

    Each map's minimum is subtracted first and added afterwards; outside the map is 0. So where an object covers the two
    outer tokens, the outermost one ends up lower than the one inside; if it were the largest, bicubic enlargement would
    put the peak between it and the edge of the image, outside of most boxes. A single high token at an edge stays the
    largest. smoothing: s in 0..1/3, else ValueError; 0 changes nothing. Half-precision maps become float32.
    """
    if not 0 <= smoothing <= 1 / 3:
        raise ValueError(f"smoothing must be within 0..1/3, not {smoothing}")
    if not smoothing:
        return maps
    if maps.dtype not in (torch.float32, torch.float64):
        maps = maps.float()
    low = maps.flatten(1).amin(1)[:, None, None]
    smooth = F.pad(maps - low, (1, 1, 1, 1))
    smooth = (1 - 2 * smoothing) * smooth[:, 1:-1] + smoothing * (smooth[:, :-2] + smooth[:, 2:])
    smooth = (1 - 2 * smoothing) * smooth[:, :, 1:-1] + smoothing * (smooth[:, :, :-2] + smooth[:, :, 2:])
    return smooth + low


def _range(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per sample the smallest value, the range and whether the map is constant, each (B,)."""
    flat = maps.flatten(1)
    low, high = flat.amin(1), flat.amax(1)  # many times faster than aminmax on a CPU
    return low, high - low, high - low <= CONSTANT_RANGE * torch.maximum(low.abs(), high.abs())


def normalize_maps(maps: Tensor) -> Tensor:
    """Min-max normalise each (B, H, W) map to 0..1; a constant one becomes 0. ValueError for a NaN or an infinity."""
    low, span, constant = _range(maps)
    if not torch.isfinite(span).all():
        raise ValueError(
            f"map {int((~torch.isfinite(span)).nonzero()[0])} of the batch holds a value that is not finite"
        )
    span = span.masked_fill(constant, 1)
    normalised = (maps - low[:, None, None]) / span[:, None, None]
    return normalised.masked_fill(constant[:, None, None], 0) if constant.any() else normalised


def mix_maps(audio_map: Tensor, *rest: Tensor, alpha: float = 0.6) -> Tensor:
    """n(alpha AUD + (1 - alpha) rest), the rest shared equally; maps (B, H, W) of one size, normalised before."""
    mixed = alpha * audio_map
    for other in rest:
        mixed = mixed + (1 - alpha) / len(rest) * other
    return normalize_maps(mixed)


def enlarge_absolute(maps: Tensor, size: int | tuple[int, int] = MAP_SIZE) -> Tensor:
    """Absolute maps (B, h, w) -> (B, 224, 224), bilinear with aligned corners: no value leaves the range of the map.

    Nor does rounding take one out of it: a map that is nowhere above a threshold would be lit in places.
    """
    large = upsample_maps(maps, size, "bilinear")
    flat = maps.to(large.dtype).flatten(1)
    return large.clamp(flat.amin(1)[:, None, None], flat.amax(1)[:, None, None])


def enlarge(
    raw: Mapping[str, Tensor], interpolation: str, alpha: float | None, size: int | tuple[int, int] = MAP_SIZE
) -> dict[str, Tensor]:
    """Maps (B, h, w) by name -> (B, 224, 224) in 0..1; with alpha also the sums IQR, OGL, IQR_OGL that they allow.

    size: of another ground truth. An absolute map keeps its own range, and is enlarged as `enlarge_absolute` does it.
    """
    maps = {
        name: enlarge_absolute(values, size)
        if name == ABSOLUTE
        else normalize_maps(upsample_maps(values, size, interpolation))
        for name, values in raw.items()
    }
    if alpha is None or "AUD" not in maps:
        return maps
    for name, rest in {"IQR": ["IMG_QUERY"], "OGL": ["OBJ_PRIOR"], "IQR_OGL": ["IMG_QUERY", "OBJ_PRIOR"]}.items():
        if all(part in maps for part in rest):
            maps[name] = mix_maps(maps["AUD"], *(maps[part] for part in rest), alpha=alpha)
    return maps
