"""Augmentation draws what torchvision's transforms on PIL pictures draw, and changes pictures as they do."""

import cv2
import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional, v2

import transforms
from experiments.bench_input import random_image
from experiments.released import ReleasedPairs
from experiments.timing import one_thread

SIZE = 224
HUES = 12  # bins of the hue histogram


def pictures(count, height=360, width=640):
    rng = np.random.default_rng(0)
    return [Image.fromarray(random_image(rng, height, width)) for _ in range(count)]


def pixels_of(normalised):
    """(3, H, W) normalised -> (H, W, 3) uint8."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (transforms.IMAGENET_MEAN, transforms.IMAGENET_STD))
    return (normalised * std + mean).mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def statistics_of(pixels):
    """Channel means (3), deviations (3), gradient energy, share of the coloured pixels in each bin of hue."""
    values = pixels.astype(np.float32)
    energy = np.square(np.diff(values, axis=0)).mean() + np.square(np.diff(values, axis=1)).mean()
    hue, saturation, _ = cv2.split(cv2.cvtColor(values / 255, cv2.COLOR_RGB2HSV))
    counts = np.histogram(hue[saturation > 0.1], HUES, (0, 360))[0]
    return np.array([*values.mean((0, 1)), *values.std((0, 1)), energy, *counts / hue.size])


def draw_statistics(transform, drawn_from, draws):
    """(pictures, draws, 7 + HUES) statistics; each draw has a seed of its own, the same for every transform."""
    found = np.empty((len(drawn_from), draws, 7 + HUES))
    for i, draw in np.ndindex(found.shape[:2]):
        torch.manual_seed(draws * i + draw)
        found[i, draw] = statistics_of(pixels_of(transform(drawn_from[i])))
    return found


def standard_errors_apart(ours, reference):
    """How far the means of two arrays of statistics lie apart, in standard errors of the reference's: (7 + HUES,).

    Both come from the same seeds: of nineteen figures from independent draws one would lie beyond 2 standard errors in
    most runs. The standard error is nevertheless that of independent draws (of the same pictures): a change of the
    distribution shows as it would there, but chance cannot.
    """
    error = np.sqrt(reference.var(axis=1, ddof=1).mean(0) / reference[..., 0].size)
    return np.abs((ours - reference).mean((0, 1))) / error


def with_half_the_blur(monkeypatch):
    uniform = transforms._uniform
    halves = {(0.1, 2.0): (0.05, 1.0)}
    monkeypatch.setattr(transforms, "_uniform", lambda *bounds: uniform(*halves.get(bounds, bounds)))
    return transforms.train_transform(SIZE, "hard")


def check_statistics(drawn_from, draws, released, monkeypatch):
    with one_thread():
        reference = draw_statistics(released, drawn_from, draws)
        ours = draw_statistics(transforms.train_transform(SIZE, "hard"), drawn_from, draws)
        blurred_less = draw_statistics(with_half_the_blur(monkeypatch), drawn_from, draws)
    assert standard_errors_apart(ours, reference).max() < 2
    assert standard_errors_apart(blurred_less, reference).max() > 2


@pytest.fixture
def released():
    """torchvision's transforms on PIL pictures, as the benchmark's baseline keeps them."""
    return ReleasedPairs([]).transform


@pytest.mark.slow
def test_statistics_of_a_few_draws_are_those_of_torchvision_and_a_halved_blur_shows(released, monkeypatch):
    check_statistics(pictures(4), 75, released, monkeypatch)


@pytest.mark.slow
def test_statistics_of_two_thousand_draws_are_those_of_torchvision_and_a_halved_blur_shows(released, monkeypatch):
    check_statistics(pictures(20), 100, released, monkeypatch)


def levels_apart(ours, reference, picture, seed):
    """Mean difference of two transforms' pictures of one seed, in levels of 0..255."""
    drawn = []
    for transform in (ours, reference):
        torch.manual_seed(seed)
        drawn.append(pixels_of(transform(picture)).astype(int))
    return np.abs(drawn[0] - drawn[1]).mean()


def test_the_same_seed_gives_torchvisions_picture_up_to_rounding(released):
    ours = transforms.train_transform(SIZE, "hard")
    exact = pictures(1, height=492, width=656)[0]  # twice the short side: crops lie on whole pixels
    apart = [levels_apart(ours, released, exact, seed) for seed in range(30)]
    assert np.mean(apart) < 1  # other draws are 70 levels apart
    assert np.mean([levels_apart(ours, released, pictures(1)[0], seed) for seed in range(10)]) < 4  # half a pixel off


def test_plain_augmentation_resizes_crops_and_flips(released):
    plain = v2.Compose([*(released.transforms[i] for i in (0, 1, 3, 6, 7))])
    picture = pictures(1, height=656, width=492)[0]
    apart = [levels_apart(transforms.train_transform(SIZE, "plain"), plain, picture, seed) for seed in range(10)]
    assert max(apart) < 0.1


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (640, 5), (32, 32), (35, 35), (36, 90)])
def test_pictures_of_any_shape_are_augmented(size):
    for seed in range(20):
        torch.manual_seed(seed)
        drawn = transforms.train_transform(32, "hard")(Image.new("RGB", size, (200, 200, 200)))
        assert drawn.shape == (3, 32, 32) and drawn.dtype == torch.float32 and drawn.is_contiguous()
        assert pixels_of(drawn).min() > 30, "black from beyond the picture's edge"


def test_normalisation_is_torchvisions():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    wanted = functional.normalize(functional.to_tensor(pixels), transforms.IMAGENET_MEAN, transforms.IMAGENET_STD)
    assert torch.equal(transforms.normalise(torch.from_numpy(pixels)[None])[0], wanted)


# ---------------------------------------------------------------- decoding at a fraction of the size


@pytest.fixture
def large_jpeg(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    pictures(1, height=1080, width=1920)[0].save(tmp_path / "x.jpg", quality=90, exif=exif)
    return tmp_path / "x.jpg"


def test_a_large_jpeg_is_decoded_at_half_its_size_and_two_thousand_draws_would_not_show_it(large_jpeg):
    whole, half = transforms.load_image(large_jpeg), transforms.load_image(large_jpeg, 2 * SIZE)
    assert whole.size == (1080, 1920) and half.size == (540, 960)
    with one_thread():
        found = [draw_statistics(transforms.train_transform(SIZE, "hard"), [x], 40) for x in (half, whole)]
    assert standard_errors_apart(*found).max() * (2000 / 40) ** 0.5 < 2


def test_a_picture_that_is_not_much_larger_than_needed_is_decoded_whole(large_jpeg):
    assert transforms.load_image(large_jpeg, 541).size == (1080, 1920)
    transforms.load_image(large_jpeg).save(large_jpeg.with_suffix(".png"))
    assert transforms.load_image(large_jpeg.with_suffix(".png"), 100).size == (1080, 1920)


def test_a_truncated_jpeg_is_named_when_it_is_decoded_at_a_fraction_of_its_size(large_jpeg):
    large_jpeg.write_bytes(large_jpeg.read_bytes()[:-9000])
    with pytest.raises(ValueError, match=r"x\.jpg"):
        transforms.load_image(large_jpeg, 100)


SHAPES = [(640, 360), (360, 640), (480, 640), (1080, 1920), (223, 300), (31, 500), (100, 200), (100, 90), (112, 300)]


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow before 13 takes the passes in one order")
@pytest.mark.parametrize("shape", SHAPES)
def test_images_are_resized_as_pillow_13_does_it_whatever_version_is_there(shape):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (shape[1], shape[0], 3), dtype=np.uint8))
    for size in (112, 224):
        own = image.resize((size, size), Image.Resampling.BICUBIC)
        assert np.array_equal(transforms.resize_whole(image, size), np.asarray(own))


def test_a_copy_that_was_compressed_anew_is_the_same_image_and_another_is_not(tmp_path):
    one, other = pictures(2)
    one.save(tmp_path / "one.png")
    one.resize((320, 180)).save(tmp_path / "copy.jpg", quality=60)
    other.save(tmp_path / "other.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert transforms.same_image(tmp_path / "one.png", tmp_path / "copy.jpg")
    assert not transforms.same_image(tmp_path / "one.png", tmp_path / "other.png")
    assert transforms.same_image(tmp_path / "one.png", tmp_path / "broken.png"), "told when its turn comes"
