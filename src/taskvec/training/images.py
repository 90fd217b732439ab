"""Images for training: read from folders and arrays, and prepared for a model.

Pixels are arrays of uint8, shape (height, width) if grey, else (height, width, 3). The model's
image processor in transformers prepares them.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from taskvec import documents
from taskvec.errors import CheckpointError, DataError
from taskvec.extras import require
from taskvec.running.pretrained import load_image_processor

Pixels = NDArray[np.uint8]

IMAGE_NAMES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
ARRAYS = {  # of an npz, the first pair that is there
    "image": ("train_x", "x_train", "train_images", "x", "images", "data"),
    "label": ("train_y", "y_train", "train_labels", "y", "labels", "target"),
}
PROCESSOR = "preprocessor_config.json"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Images(NamedTuple):
    """Images with labels.

    Attributes:
        items: A sequence of pixels.
        labels: From 0.
        classes: Their names.
    """

    items: Any
    labels: list[int]
    classes: tuple[str, ...]


class Folder(Sequence[Any]):
    """Images in files, opened when they are used."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: Any) -> Any:
        return open_image(self.paths[i])


def open_image(path: Path) -> Pixels:
    """The pixels of an image file.

    Raises:
        DataError: it is not a readable image.
    """
    pillow = require("PIL.Image", "train")
    try:
        with _open(path) as file, pillow.open(file) as image:
            return as_pixels(image, str(path))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: cannot be read as an image: {error}") from error


def _open(path: Path) -> BinaryIO:
    return open(documents.open_regular(path), "rb")  # noqa: PTH123 (a descriptor)


def as_pixels(value: Any, where: str) -> Pixels:
    """An image of Pillow, or an array, as pixels.

    Raises:
        DataError: it is neither, or of another kind of number.
    """
    if hasattr(value, "convert"):  # of Pillow; grey stays grey, palettes and transparency go
        value = np.asarray(value if value.mode in ("L", "RGB") else value.convert("RGB"))
    array = np.asarray(value)
    if array.dtype != np.uint8 or not _is_image(array.shape):
        raise DataError(
            f"{where}: an image must be uint8, (height, width) or (height, width, 3); got "
            f"{array.dtype} of shape {array.shape}"
        )
    return array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array


def _is_image(shape: tuple[int, ...]) -> bool:
    return 0 not in shape and (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3)))


def read_folder(path: Path) -> Images:
    """Images in a folder for each class; classes in order of their names.

    Raises:
        DataError: no folder has images.
    """
    found = {
        sub.name: sorted(p for p in sub.rglob("*") if p.suffix.lower() in IMAGE_NAMES)
        for sub in sorted(path.iterdir())
        if sub.is_dir() and not sub.name.startswith(".")
    }
    if not any(found.values()):
        raise DataError(f"{path}: holds no images; expected a folder for each class, with images")
    empty = [name for name, paths in found.items() if not paths]
    if empty:
        raise DataError(f"{path}: class {empty[0]!r} holds no images")
    labels = [i for i, paths in enumerate(found.values()) for _ in paths]
    return Images(Folder([p for paths in found.values() for p in paths]), labels, tuple(found))


def read_npz(path: Path, image: str | None, label: str | None) -> Images:
    """Images and labels of an npz; `classes`, if it is there, names them.

    Args:
        path: The file.
        image: Name of the array of images; None: the first of `ARRAYS`.
        label: The same, of labels.

    Raises:
        DataError: they are not there, or of another kind or length.
    """
    try:
        with _open(path) as file, np.load(file, allow_pickle=False) as arrays:
            images = arrays[_name_of_array(path, arrays, "image", image)]
            labels = arrays[_name_of_array(path, arrays, "label", label)]
            classes = arrays.get("classes")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return _check(path, images, labels, classes)


def _name_of_array(path: Path, arrays: Any, use: str, given: str | None) -> str:
    names = ARRAYS[use] if given is None else (given,)
    for name in names:
        if name in arrays:
            return name
    raise DataError(
        f"{path}: has no array {names[0]!r}; it has {', '.join(arrays)}: "
        f"name one with --fields {use}=NAME"
    )


def read_idx(path: Path) -> Images:
    """Images of an idx file, with the labels beside it.

    Raises:
        DataError: either cannot be read, or they are of different lengths.
    """
    return _check(path, _idx(path), _idx(labels_beside(path)), None)


def labels_beside(path: Path) -> Path:
    """The labels of an idx file of images.

    Raises:
        DataError: they are not there.
    """
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if beside == path or not beside.is_file():
        raise DataError(f"{path}: its labels are missing; expected {beside.name} beside it")
    return beside


def _idx(path: Path) -> NDArray[Any]:
    """An idx file of bytes: 0, 0, 8, number of dimensions, each as 4 bytes, elements."""
    raw = documents.read_bytes(path, documents.DATA, DataError)
    if path.suffix == ".gz":
        raw = documents.unzip(raw, documents.DATA, str(path), DataError)
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"{path}: is not an idx file of bytes")
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if math.prod(shape) != data.size:
        raise DataError(f"{path}: holds {data.size:,} bytes; its header says {math.prod(shape):,}")
    return data.reshape(shape)


def _check(
    path: Path, images: NDArray[Any], labels: NDArray[Any], classes: NDArray[Any] | None
) -> Images:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not _is_image(images.shape[1:]):
        raise DataError(
            f"{path}: images must be uint8, (n, height, width) or (n, height, width, 3); got "
            f"{images.dtype} of shape {images.shape}"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
        raise DataError(
            f"{path}: labels must be {len(images):,} whole numbers; got {labels.dtype} of shape "
            f"{labels.shape}"
        )
    images = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
    least, most = (int(labels.min()), int(labels.max())) if len(labels) else (0, -1)
    if least < 0 or (classes is not None and most >= len(classes)):
        count = "" if classes is None else f"; there are {len(classes)} classes"
        raise DataError(f"{path}: a label is {least if least < 0 else most}{count}")
    names = range(most + 1) if classes is None else classes.tolist()
    return Images(images, [int(label) for label in labels], tuple(str(name) for name in names))


@dataclass(frozen=True, slots=True)
class Preparation:
    """The image processor of a model.

    Attributes:
        processor: Of transformers.
        options: Sizes that replace its own.
        size: Height and width that the model sees.
        origin: Where this is from, for messages.
    """

    processor: Any
    options: Mapping[str, Any]
    size: tuple[int, int]
    origin: str

    def __call__(self, pixels: Pixels) -> Any:
        """One image as the model sees it, shape (3, height, width), float32."""
        return _prepare(self.processor, self.options, pixels)


def _prepare(processor: Any, options: Mapping[str, Any], pixels: Pixels) -> Any:
    colour = np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels
    about = {"return_tensors": "pt", "input_data_format": "channels_last"}
    return processor([colour], **about, **options)["pixel_values"][0].float()


def preparation_of(
    folder: Path | None, config: Mapping[str, Any], size: int | None = None
) -> Preparation:
    """The image processor of a model; without one, that of CLIP with ImageNet's mean and deviation.

    Args:
        folder: Of the model.
        config: Of the model.
        size: Height and width that replace its own.

    Raises:
        CheckpointError: the processor cannot be read, or neither it nor the config has a size.
    """
    path = None if folder is None else folder / PROCESSOR
    if folder is None or path is None or not path.is_file():
        side = size or (config.get("vision_config") or config).get("image_size")
        if not isinstance(side, int):
            raise CheckpointError(
                f"{folder or 'the model'}: no {PROCESSOR}, and no image_size in its config; "
                "give a size (--image-size)"
            )
        origin = f"no {PROCESSOR}: mean and deviation of ImageNet"
        return Preparation(_clip(), _sizes(side, crops=True), (side, side), origin)
    try:
        processor = load_image_processor(folder)
        crops = bool(getattr(processor, "do_center_crop", False))
        options = {} if size is None else _sizes(size, crops=crops)
        shapes = {
            tuple(_prepare(processor, options, np.zeros(shape, np.uint8)).shape[1:])
            for shape in ((64, 48, 3), (48, 64, 3))
        }
    except CheckpointError:
        raise
    except Exception as error:  # its many processors may raise anything
        text = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: cannot be read: {text}") from error
    if len(shapes) > 1:
        raise CheckpointError(f"{path}: has no height and width; give a size (--image-size)")
    ((height, width),) = shapes
    origin = path.name if size is None else f"{path.name}, at {size} px"
    return Preparation(processor, options, (height, width), origin)


def _sizes(side: int, *, crops: bool) -> dict[str, Any]:
    """Options with which a processor returns squares of this side."""
    square = {"height": side, "width": side}
    return {"size": {"shortest_edge": side}, "crop_size": square} if crops else {"size": square}


def _clip() -> Any:
    transformers = require("transformers", "train")
    mean, std = map(list, IMAGENET)
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return kind(image_mean=mean, image_std=std)
