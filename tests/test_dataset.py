"""Lists, annotations, transforms, data sets."""

import numpy as np
import pytest
from conftest import shared_folder

import dataset


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_evaluation_picture_matches_the_reference_exactly(name):
    folder = shared_folder("golden")
    reference = np.load(folder / "preprocess_public.npz")[f"image_{name}"]
    picture = dataset.load_image(folder / "preprocess" / f"{name}.png")
    assert np.array_equal(dataset.eval_transform(224)(picture).numpy(), reference)


def test_consensus_and_mask_match_the_reference():
    folder = shared_folder("golden")
    reference = np.load(folder / "preprocess_public.npz")
    assert np.array_equal(dataset.consensus_map(folder / "preprocess" / "123.xml").numpy(), reference["consensus_123"])
    assert np.array_equal(dataset.mask_map(folder / "preprocess" / "mask.png").numpy(), reference["mask"])
