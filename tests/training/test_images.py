"""Images made ready for a model."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from taskvec.errors import CheckpointError, DataError
from taskvec.training.images import IMAGENET, Preparation, as_pixels, preparation_of

PLAIN = {"mode": "bilinear", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "origin": ""}


def random(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_values_are_scaled_and_normalised():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    prepare = Preparation((4, 4), None, "bilinear", mean, std, "")
    pixels = random(4, 4, 3)
    expected = (pixels.astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(prepare(pixels), expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-6)


def test_an_image_that_may_not_be_written_to():
    """As PIL gives them; torch warns of that, and warnings are errors here."""
    pixels = random(8, 8, 3)
    pixels.flags.writeable = False
    assert Preparation((8, 8), None, **PLAIN)(pixels).shape == (3, 8, 8)


def test_grey_becomes_three_equal_channels():
    prepared = Preparation((4, 4), None, **PLAIN)(random(4, 4))
    assert prepared.shape == (3, 4, 4)
    assert torch.equal(prepared[0], prepared[2])


def test_the_shorter_side_is_scaled_and_the_middle_cut():
    pixels = random(8, 12)
    prepared = Preparation((4, 4), 4, **{**PLAIN, "mode": "nearest"})(pixels)
    scaled = pixels[::2, ::2]  # (4, 6); nearest takes the first of every pair
    np.testing.assert_allclose(prepared[0] * 255, scaled[:, 1:5], rtol=1e-5)


def test_halving_is_antialiased():
    """A bilinear filter twice as wide: weights 1, 3, 3, 1 over four pixels, by hand for a row."""
    row = np.array([10, 200, 30, 90, 250, 60, 0, 80], np.uint8)
    prepared = Preparation((2, 4), None, **PLAIN)(np.tile(row, (2, 1)))
    pixels = row.astype(float)
    inner = [np.dot([1, 3, 3, 1], pixels[at : at + 4]) / 8 for at in (1, 3)]
    np.testing.assert_allclose(prepared[0, 0, 1:3] * 255, inner, rtol=1e-5)


def test_bicubic_stays_between_black_and_white():
    pixels = np.zeros((6, 6), np.uint8)
    pixels[:, 3:] = 255
    prepared = Preparation((24, 24), None, **{**PLAIN, "mode": "bicubic"})(pixels)
    assert (prepared.min(), prepared.max()) == (0, 1)


def test_a_small_image_is_put_in_the_middle_of_black():
    prepared = Preparation((4, 5), None, **PLAIN)
    middle = Preparation((6, 6), 2, **PLAIN)(np.full((2, 2), 255, np.uint8))
    assert prepared(random(4, 5)).shape == (3, 4, 5)
    expected = np.zeros((6, 6))
    expected[2:4, 2:4] = 1
    np.testing.assert_array_equal(middle[0], expected)


CLIP = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "do_normalize": True,
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}


@pytest.mark.parametrize(
    ("changes", "size", "shorter", "mode"),
    [
        ({}, (224, 224), 224, "bicubic"),
        ({"size": {"shortest_edge": 256}, "resample": 2}, (224, 224), 256, "bilinear"),
        ({"size": 256, "crop_size": 200}, (200, 200), 256, "bicubic"),
        ({"do_center_crop": False, "size": {"height": 30, "width": 40}}, (30, 40), None, "bicubic"),
    ],
)
def test_what_a_model_expects(tmp_path, changes, size, shorter, mode):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP | changes))
    found = preparation_of(tmp_path, {})
    assert found == Preparation(
        size, shorter, mode, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "preprocessor_config.json"
    )
    assert preparation_of(tmp_path, {}, 84).size == (84, 84)


def test_without_a_file_the_config_says_the_size(tmp_path):
    found = preparation_of(tmp_path, {"vision_config": {"image_size": 32}})
    assert found == Preparation(
        (32, 32), 32, "bicubic", *IMAGENET,
        "no preprocessor_config.json: mean and deviation of ImageNet",
    )  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        preparation_of(tmp_path, {})
    assert str(caught.value) == f"{tmp_path}: says nothing of the size of its images; give one"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"size": {}}, "has no 'height'"),
        ({"resample": 9}, "has no 9"),
        ({"image_mean": None}, "cannot be read: "),
        ({"do_center_crop": False}, "says no height and width; give a size"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, changes, text):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(CLIP | changes))
    with pytest.raises(CheckpointError) as caught:
        preparation_of(tmp_path, {})
    assert str(caught.value).startswith(f"{path}: {text}")


@pytest.mark.parametrize("array", [np.ones((3, 3)), random(3), random(3, 3, 2), random(0, 3)])
def test_arrays_that_are_no_images(array):
    with pytest.raises(DataError) as caught:
        as_pixels(array, "row 3")
    assert str(caught.value) == (
        "row 3: an image must be uint8, (height, width) or (height, width, 3); got "
        f"{array.dtype} of shape {array.shape}"
    )
