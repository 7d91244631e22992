"""Maps: enlarged as the protocols do, smoothed, normalised, summed."""

import pytest
import torch
import torch.nn.functional as F

from maps import enlarge, enlarge_absolute, normalize_maps, smooth_maps, upsample_maps


def test_smoothing_lets_each_value_flow_to_its_neighbours_and_out_of_the_edges():
    lone = torch.zeros(2, 5, 4)
    lone[0, 2, 1], lone[1, 0, 0] = 1.0, 1.0
    kernel = torch.tensor([0.1, 0.8, 0.1])
    inside, corner = smooth_maps(lone - 3, 0.1) + 3
    torch.testing.assert_close(inside[1:4, 0:3], torch.outer(kernel, kernel), atol=1e-6, rtol=0)
    assert inside.sum() == pytest.approx(1, abs=1e-5) and corner.sum() == pytest.approx(0.81, abs=1e-5)
    maps = torch.rand(3, 5, 7)
    assert smooth_maps(maps, 0.0) is maps
    turned = smooth_maps(maps.transpose(1, 2), 0.2).transpose(1, 2)
    torch.testing.assert_close(smooth_maps(maps, 0.2), turned, atol=1e-6, rtol=0)
    torch.testing.assert_close(smooth_maps(5 * maps - 2, 0.2), 5 * smooth_maps(maps, 0.2) - 2, atol=1e-5, rtol=0)


def test_an_object_over_the_two_outer_tokens_peaks_inside_of_them_once_it_is_smoothed():
    maps = torch.zeros(2, 7, 7)
    maps[0, 3, :3] = torch.tensor([1.0, 0.9, 0.4])
    maps[1, 3, 0] = 1  # a single high token stays the best
    middle = 16  # of the outermost; enlarged as it is, a map peaks between it and the edge of the picture
    raw, smooth = (upsample_maps(smooth_maps(maps, s)).flatten(1).argmax(1) % 224 for s in (0.0, 0.1))
    assert raw[0] < middle < smooth[0] < 2 * 32 and raw[1] == smooth[1] < middle


def test_smoothing_is_refused_beyond_a_third_and_half_precision_becomes_fp32():
    with pytest.raises(ValueError, match=r"0\.4"):
        smooth_maps(torch.rand(1, 3, 3), 0.4)
    assert smooth_maps(torch.rand(1, 3, 3).half(), 0.1).dtype == torch.float32


def test_upsampling_is_that_of_the_two_protocols():
    maps = torch.rand(2, 7, 7)
    bicubic = torch.nn.functional.interpolate(maps[:, None], (224, 224), mode="bicubic", align_corners=False)[:, 0]
    assert torch.equal(upsample_maps(maps), bicubic)
    assert torch.equal(upsample_maps(maps, 13, "bilinear")[:, ::12, ::12], maps[:, ::6, ::6])  # corners are aligned
    assert upsample_maps(maps.half()).dtype == torch.float32
    with pytest.raises(ValueError, match="nearest"):
        upsample_maps(maps, interpolation="nearest")


def test_a_map_that_is_not_finite_is_refused():
    for bad in (float("nan"), float("inf")):
        maps = torch.rand(3, 4, 4)
        maps[1, 2, 2] = bad
        with pytest.raises(ValueError, match="map 1 "):
            normalize_maps(maps)


def test_the_constant_bound_is_relative():
    maps = torch.zeros(1, 4, 4)
    maps[0, 1, 1] = 1e-12
    assert normalize_maps(maps).amax() == 1
    assert (normalize_maps(maps + 1) == 0).all()


def test_fused_maps_are_normalised_sums_of_normalised_maps():
    torch.manual_seed(0)
    aud, img, prior = (torch.rand(2, 7, 7) * scale for scale in (1.0, 5.0, 0.1))

    def n(x):
        x = F.interpolate(x[:, None], (224, 224), mode="bicubic")[:, 0] if x.shape[-1] == 7 else x
        low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
        return (x - low) / (high - low)

    found = enlarge({"AUD": aud, "IMG_QUERY": img, "OBJ_PRIOR": prior}, "bicubic", alpha=0.3)
    assert torch.allclose(found["IQR"], n(0.3 * n(aud) + 0.7 * n(img)), atol=1e-6)
    assert torch.allclose(found["OGL"], n(0.3 * n(aud) + 0.7 * n(prior)), atol=1e-6)
    assert torch.allclose(found["IQR_OGL"], n(0.3 * n(aud) + 0.35 * n(img) + 0.35 * n(prior)), atol=1e-6)
    assert "IQR" not in enlarge({"AUD": aud, "OBJ_PRIOR": prior}, "bicubic", 0.6)
    assert list(enlarge({"AUD": aud, "IMG_QUERY": img}, "bilinear", None)) == ["AUD", "IMG_QUERY"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_lights_nothing_in_a_map_that_is_nowhere_above_its_threshold(dtype):
    values = torch.tensor([0.1, 0.3, 0.45, 0.7, 1 / 3], dtype=dtype)
    flat = enlarge_absolute(values[:, None, None].expand(-1, 7, 7))
    assert (flat == values[:, None, None]).all()
    maps = torch.rand(8, 7, 7, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 1e-3 + 0.3
    large = enlarge_absolute(maps).flatten(1)
    assert (large.amax(1) <= maps.flatten(1).amax(1)).all() and (large.amin(1) >= maps.flatten(1).amin(1)).all()
