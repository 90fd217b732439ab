"""Images made ready for a model."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from taskvec.errors import CheckpointError, DataError
from taskvec.training.images import IMAGENET, as_pixels, preparation_of

CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 24},
    "do_center_crop": True,
    "crop_size": {"height": 20, "width": 20},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}
VIT = {
    **{k: v for k, v in CLIP.items() if not k.endswith("crop") and k != "crop_size"},
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 6, "width": 8},
}


def random(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def prepare(folder, about, size=None):
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return preparation_of(folder, {}, size)


def test_values_are_scaled_and_normalised(tmp_path):
    pixels = random(6, 8, 3)
    expected = (pixels.astype(np.float64) / 255 - VIT["image_mean"]) / VIT["image_std"]
    found = prepare(tmp_path, VIT)(pixels)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-6)


def test_it_is_what_the_processor_of_the_model_gives(tmp_path):
    from PIL import Image

    preparation = prepare(tmp_path, CLIP)
    pixels = random(30, 40, 3)
    scaled = Image.fromarray(pixels).resize((32, 24), Image.Resampling.BICUBIC)
    cut = np.asarray(scaled)[2:22, 6:26] / 255
    expected = (cut - CLIP["image_mean"]) / CLIP["image_std"]
    np.testing.assert_allclose(preparation(pixels), expected.transpose(2, 0, 1), atol=1e-5)


def test_an_image_that_may_not_be_written_to(tmp_path):
    """As PIL gives them; torch warns of that, and warnings are errors here."""
    pixels = random(8, 8, 3)
    pixels.flags.writeable = False
    assert prepare(tmp_path, VIT)(pixels).shape == (3, 6, 8)


@pytest.mark.parametrize("about", [CLIP, VIT])
def test_grey_becomes_three_channels(tmp_path, about):
    about = about | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    prepared = prepare(tmp_path, about)(random(4, 4))
    assert len(prepared) == 3
    assert torch.equal(prepared[0], prepared[2])


@pytest.mark.parametrize(
    ("about", "size", "seen"),
    [(CLIP, None, (20, 20)), (CLIP, 14, (14, 14)), (VIT, None, (6, 8)), (VIT, 14, (14, 14))],
)
def test_what_a_model_sees(tmp_path, about, size, seen):
    found = prepare(tmp_path, about, size)
    assert found.size == seen
    assert found(random(9, 30, 3)).shape == (3, *seen)
    assert found.origin == "preprocessor_config.json" + (", at 14 px" if size else "")


def test_without_a_file_the_config_says_the_size(tmp_path):
    found = preparation_of(tmp_path, {"vision_config": {"image_size": 32}})
    assert found.size == (32, 32)
    pixels = random(32, 32, 3)
    expected = (pixels / 255 - IMAGENET[0]) / IMAGENET[1]
    np.testing.assert_allclose(found(pixels), expected.transpose(2, 0, 1), atol=1e-5)
    with pytest.raises(CheckpointError, match="--image-size"):
        preparation_of(tmp_path, {})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"image_processor_type": "NoSuchProcessor"}, "cannot be read: "),
        ({"resample": 99}, "cannot be read: "),
        ({"do_center_crop": False}, "has no height and width; give a size"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, changes, text):
    with pytest.raises(CheckpointError) as caught:
        prepare(tmp_path, CLIP | changes)
    assert str(caught.value).startswith(f"{tmp_path / 'preprocessor_config.json'}: {text}")


def test_code_of_a_checkpoint_is_never_run(tmp_path):
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    about = CLIP | {"auto_map": {"AutoImageProcessor": "own.Own"}, "image_processor_type": "Own"}
    with pytest.raises(CheckpointError):
        prepare(tmp_path, about)


@pytest.mark.parametrize("array", [np.ones((3, 3)), random(3), random(3, 3, 2), random(0, 3)])
def test_arrays_that_are_no_images(array):
    with pytest.raises(DataError) as caught:
        as_pixels(array, "row 3")
    assert str(caught.value) == (
        "row 3: an image must be uint8, (height, width) or (height, width, 3); got "
        f"{array.dtype} of shape {array.shape}"
    )
