"""Models in memory: a state dict of NumPy arrays or torch tensors, or a module that has one.

Nothing is copied: views read the arrays and tensors as they are when they are read. What is in
memory has no file to look at, so scans of it are never kept, and it cannot be opened again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable
from uuid import uuid4

import numpy as np

from taskvec.checkpoints.folder import FileIdentity, check_files
from taskvec.checkpoints.quantised import plain
from taskvec.checkpoints.safetensors import TensorInfo
from taskvec.checkpoints.source import Source
from taskvec.checkpoints.views import View
from taskvec.dtypes import DTYPES, DType
from taskvec.errors import CheckpointError, UsageError

# What begins `where` and `identity` of a model in memory; no path begins so.
MARK = "<in memory"
# Element types under the names that NumPy and torch give them.
_NAMED = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}


@runtime_checkable
class Module(Protocol):
    """A `torch.nn.Module`, as far as it is needed here."""

    def state_dict(self) -> Mapping[str, Any]:
        """Parameters and buffers by name."""


@dataclass(frozen=True, slots=True, eq=False)
class ArrayView:
    """An array in memory, of any strides.

    Attributes:
        dtype: See `View`.
        shape: See `View`.
        array: The elements, as `dtype.storage`.
    """

    dtype: DType
    shape: tuple[int, ...]
    array: np.ndarray[Any, Any]
    is_difference: ClassVar[bool] = False

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """See `View`; only what is not contiguous is copied, a block at a time."""
        if self.array.flags.c_contiguous:
            return self.array.reshape(-1)[start:stop]
        return self.array.flat[start:stop]


@dataclass(frozen=True, slots=True, eq=False)
class DeviceView:
    """A torch tensor on an accelerator, brought over a block at a time.

    Attributes:
        dtype: See `View`.
        shape: See `View`.
        flat: The elements in row-major order, on the device.
    """

    dtype: DType
    shape: tuple[int, ...]
    flat: Any
    is_difference: ClassVar[bool] = False

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """See `View`."""
        return stored(self.flat[start:stop].cpu())


@dataclass(slots=True, eq=False)
class Held:
    """A source whose tensors are all at hand; see `Source`.

    Attributes:
        views: By name, in name order.
        place: Folder of the files that it came from, if it did.
        read_from: How those files looked when they were opened.
    """

    where: str
    views: Mapping[str, View]
    config: Mapping[str, Any]
    identity: object
    files: Mapping[str, bytes] = field(default_factory=dict)
    folder: Path | None = None
    inputs: tuple[Path, ...] = ()
    place: Path = Path()
    read_from: tuple[FileIdentity, ...] = ()
    tensors: Mapping[str, TensorInfo] = field(init=False)
    notes: tuple[str, ...] = ()
    parts: ClassVar[tuple[()]] = ()
    is_difference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.tensors = {n: TensorInfo(n, v.dtype, v.shape, 0) for n, v in self.views.items()}
        if not self.tensors:
            raise CheckpointError(f"{self.where}: holds no tensors; give a model with weights")

    def view(self, name: str) -> View:
        """See `Source`."""
        return self.views[name]

    def check_unchanged(self) -> None:
        """See `Source`; content in memory is compared by digests only."""
        check_files(self.place, self.read_from)


def open_memory(model: Mapping[str, Any] | Module) -> Source:
    """A state dict or module as a model; quantised weights are widened when they are read.

    Raises:
        UsageError: as `held_in_memory`.
        CheckpointError: as `held_in_memory`, or weights are quantised in a way that is not read.
    """
    return plain(held_in_memory(model))


def held_in_memory(model: Mapping[str, Any] | Module) -> Held:
    """A source that reads a state dict, or a module's, without copying it.

    Args:
        model: NumPy arrays or torch tensors by name, or a module; of a transformers model, the
            config and the generation config are taken as well.

    Raises:
        UsageError: a name is not text, or a value neither array nor tensor, or of an element type
            that is not known.
        CheckpointError: it holds no tensors, or some without weights (device meta).
    """
    where = described(model)
    config: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    if isinstance(model, Module):
        config, files = _configs(model)
        model = model.state_dict()
    views = {name: view_of(name, model[name], where) for name in sorted(_named(model, where))}
    # An object's address can be that of an earlier one; this is never the same twice.
    return Held(where, views, config, f"{MARK} {uuid4().hex}>", files)


def described(model: Mapping[str, Any] | Module) -> str:
    """What stands for a model in memory where others have a path."""
    return f"{MARK}: {type(model).__name__}>" if isinstance(model, Module) else f"{MARK}>"


def _named(tensors: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    odd = [name for name in tensors if not isinstance(name, str)]
    if odd:
        raise UsageError(f"{where}: names of tensors must be text; got {odd[0]!r}")
    return tensors


def _configs(model: Module) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Config and further files of a transformers model; empty for any other module."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return {}, {}
    found = json.loads(config.to_json_string())
    found["architectures"] = [type(model).__name__]
    dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
    if dtype:
        found["torch_dtype" if "torch_dtype" in found else "dtype"] = dtype
    generation: Any = getattr(model, "generation_config", None)
    if not hasattr(generation, "to_json_string"):
        return found, {}
    return found, {"generation_config.json": generation.to_json_string().encode()}


def is_torch(value: object) -> bool:
    """Whether a value is a torch tensor; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def dtype_of(name: str, value: Any, where: str) -> DType:
    """Element type of an array or tensor.

    Raises:
        UsageError: it is neither, or its type is not known.
    """
    if not is_torch(value) and not isinstance(value, (np.ndarray, np.generic)):
        raise UsageError(
            f"{where}: {name!r} must be a NumPy array or a torch tensor; got {type(value).__name__}"
        )
    kind = str(value.dtype).removeprefix("torch.")  # of an array in foreign byte order: ">f4"
    if kind not in _NAMED:
        raise UsageError(
            f"{where}: tensor {name!r} is of type {kind}, which is not known; convert it first "
            "(bfloat16 can be given as a torch tensor)"
        )
    return DTYPES[_NAMED[kind]]


def view_of(name: str, value: Any, where: str) -> View:
    """The view of an array or tensor.

    Raises:
        UsageError: it is neither, or its type is not known.
        CheckpointError: it has no elements at hand (device meta, sparse or quantised layout).
    """
    dtype, shape = dtype_of(name, value, where), tuple(value.shape)
    if not is_torch(value):
        return ArrayView(dtype, shape, np.asarray(value).view(dtype.storage))
    if value.device.type == "meta" or str(value.layout) != "torch.strided" or value.is_quantized:
        kind = "on the device meta" if value.device.type == "meta" else "sparse or quantised"
        raise CheckpointError(
            f"{where}: tensor {name!r} is {kind}, its weights are not there; load the model whole"
        )
    value = value.detach().resolve_conj().resolve_neg()
    if value.device.type != "cpu":
        return DeviceView(dtype, shape, value.contiguous().view(-1))
    return ArrayView(dtype, shape, stored(value))


def stored(tensor: Any) -> np.ndarray[Any, Any]:
    """A torch tensor in main memory as an array of its stored elements, sharing its memory."""
    torch = sys.modules["torch"]
    dtype = dtype_of("", tensor, MARK)
    bits = tensor.view(torch.int16) if dtype.name == "BF16" else tensor  # NumPy has no bfloat16
    bits = bits.view(torch.uint8) if dtype.is_quantised else bits
    array: np.ndarray[Any, Any] = bits.numpy().view(dtype.storage)
    return array
