"""Images to train on: read from folders and arrays, and made ready for a model.

Pixels are arrays of uint8, shape (height, width) if grey, else (height, width, 3). For a model they
are scaled so that the shorter side fits (with antialiasing), cut at the centre, and normalised.
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

Pixels = NDArray[np.uint8]

IMAGE_NAMES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
ARRAYS = {  # of an npz, the first pair that is there
    "image": ("train_x", "x_train", "train_images", "x", "images", "data"),
    "label": ("train_y", "y_train", "train_labels", "y", "labels", "target"),
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Images(NamedTuple):
    """Images that were read.

    Attributes:
        items: A sequence of pixels.
        labels: From 0.
        classes: Their names.
    """

    items: Any
    labels: list[int]
    classes: tuple[str, ...]


class Folder(Sequence[Any]):
    """Images in files, opened when they are asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: Any) -> Any:
        return open_image(self.paths[i])


def open_image(path: Path) -> Pixels:
    """The pixels of an image file.

    Raises:
        DataError: it is no image that can be read.
    """
    pillow = require("PIL.Image", "train")
    try:
        with _opened(path) as file, pillow.open(file) as image:
            return as_pixels(image, str(path))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: cannot be read as an image: {error}") from error


def _opened(path: Path) -> BinaryIO:
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
        DataError: there are no folders with images.
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
        label: Likewise, of labels.

    Raises:
        DataError: they are not there, or of another kind or length.
    """
    try:
        with _opened(path) as file, np.load(file, allow_pickle=False) as arrays:
            images = arrays[_named(path, arrays, "image", image)]
            labels = arrays[_named(path, arrays, "label", label)]
            classes = arrays.get("classes")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return _checked(path, images, labels, classes)


def _named(path: Path, arrays: Any, use: str, given: str | None) -> str:
    names = ARRAYS[use] if given is None else (given,)
    for name in names:
        if name in arrays:
            return name
    raise DataError(
        f"{path}: has no array {names[0]!r}; it has {', '.join(arrays)}: "
        f"say which, --fields {use}=NAME"
    )


def read_idx(path: Path) -> Images:
    """Images of an idx file, with the labels beside it.

    Raises:
        DataError: either cannot be read, or they are of different lengths.
    """
    return _checked(path, _idx(path), _idx(labels_beside(path)), None)


def labels_beside(path: Path) -> Path:
    """The labels of an idx file of images.

    Raises:
        DataError: they are not there.
    """
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if beside == path or not beside.is_file():
        raise DataError(f"{path}: its labels are not there; expected {beside.name} beside it")
    return beside


def _idx(path: Path) -> NDArray[Any]:
    """An idx file of bytes: 0, 0, 8, number of dimensions, each as 4 bytes, elements."""
    raw = documents.read_bytes(path, documents.DATA, DataError)
    if path.suffix == ".gz":
        raw = documents.unzipped(raw, documents.DATA, str(path), DataError)
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"{path}: is not an idx file of bytes")
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if math.prod(shape) != data.size:
        raise DataError(f"{path}: holds {data.size:,} bytes; its header says {math.prod(shape):,}")
    return data.reshape(shape)


def _checked(
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
    """What is done to pixels before a model sees them.

    Attributes:
        size: Height and width that the model sees.
        shorter: Length that the shorter side is scaled to; None: both sides are scaled to `size`.
        mode: Of interpolation: `nearest`, `bilinear` or `bicubic`.
        mean: Of each channel, of values in [0, 1].
        std: Likewise.
        origin: Where this is from, for people.
    """

    size: tuple[int, int]
    shorter: int | None
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str

    def __call__(self, pixels: Pixels) -> Any:
        """One image as the model sees it, shape (3, height, width), float32."""
        torch = require("torch", "train")
        image = torch.from_numpy(np.array(pixels, order="C"))  # PIL's may not be written to
        image = image.expand(3, *image.shape) if image.ndim == 2 else image.permute(2, 0, 1)
        image = image.float().div(255)
        height, width = image.shape[1:]
        wanted = self.size
        if self.shorter is not None:
            scale = self.shorter / min(height, width)
            wanted = max(round(height * scale), 1), max(round(width * scale), 1)
        if wanted != (height, width):
            smooth = {} if self.mode == "nearest" else {"antialias": True, "align_corners": False}
            image = torch.nn.functional.interpolate(image[None], wanted, mode=self.mode, **smooth)
            image = image[0].clamp(0, 1)  # bicubic overshoots
        image = _centre(image, self.size)
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (image - mean) / std


def _centre(image: Any, size: tuple[int, int]) -> Any:
    """The middle of an image; where it is smaller, with black around."""
    torch = require("torch", "train")
    height, width = image.shape[1:]
    up, left = max(size[0] - height, 0), max(size[1] - width, 0)
    if up or left:
        around = (left // 2, left - left // 2, up // 2, up - up // 2)
        image = torch.nn.functional.pad(image, around)
    top, side = (image.shape[1] - size[0]) // 2, (image.shape[2] - size[1]) // 2
    return image[:, top : top + size[0], side : side + size[1]]


def preparation_of(
    folder: Path | None, config: Mapping[str, Any], size: int | None = None
) -> Preparation:
    """What a model expects, by its `preprocessor_config.json`, or by its config without one.

    Args:
        folder: Of the model.
        config: Of the model.
        size: Height and width instead; the shorter side is scaled to it.

    Raises:
        CheckpointError: the file cannot be read or says no size.
    """
    path = None if folder is None else folder / "preprocessor_config.json"
    if path is None or not path.is_file():
        side = size or (config.get("vision_config") or config).get("image_size")
        if not isinstance(side, int):
            raise CheckpointError(
                f"{folder or 'the model'}: says nothing of the size of its images; give one"
            )
        origin = "no preprocessor_config.json: mean and deviation of ImageNet"
        return Preparation((side, side), side, "bicubic", *IMAGENET, origin)
    told = documents.read_object(path, documents.CONFIG, non_finite=True)
    try:
        scaled = _sides(told["size"]) if told.get("do_resize", True) else None
        cut = _sides(told["crop_size"]) if told.get("do_center_crop") else None
        mode = {0: "nearest", 2: "bilinear", 3: "bicubic"}[told.get("resample", 3)]
        normal = told.get("do_normalize", True)
        mean = tuple(map(float, told["image_mean"])) if normal else (0.0, 0.0, 0.0)
        std = tuple(map(float, told["image_std"])) if normal else (1.0, 1.0, 1.0)
    except (ValueError, KeyError, TypeError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else f"cannot be read: {error}"
        raise CheckpointError(f"{path}: {what}") from error
    if size is not None:
        return Preparation((size, size), size, mode, mean, std, f"{path.name}, at {size} px")
    seen = cut or scaled
    if seen is None or (cut is None and isinstance(seen, int)):
        raise CheckpointError(f"{path}: says no height and width; give a size")
    shorter = scaled if isinstance(scaled, int) else None
    wanted = (seen, seen) if isinstance(seen, int) else seen
    return Preparation(wanted, shorter, mode, mean, std, path.name)


def _sides(told: Any) -> int | tuple[int, int]:
    """The length of the shorter side, or height and width."""
    if isinstance(told, int):
        return told
    if "shortest_edge" in told:
        return int(told["shortest_edge"])
    return int(told["height"]), int(told["width"])
