"""A checkpoint folder as transformers writes it: one safetensors file, or shards with an index.

`open_checkpoint` reads and checks headers only; weights are mapped into memory, and read where a
view is read.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from taskvec.checkpoints.safetensors import TensorInfo, read_header
from taskvec.checkpoints.views import StoredTensor
from taskvec.errors import CheckpointError, StaleError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_QUANTISED_NAME = re.compile(
    r".*\.(qweight|qzeros|g_idx|SCB|absmax|quant_map|quant_state\..+|weight_scale(_inv|_2)?|weight_packed)"
)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What a file looks like from outside: can show that it changed, never that it did not."""

    name: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        """The file's identity now."""
        stat = path.stat()
        return cls(path.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


@dataclass(slots=True)
class Checkpoint:
    """An opened folder; a `Source`.

    Attributes:
        path: The folder, absolute.
        tensors: What the headers say, by name, in name order.
        config: `config.json`; empty if there is none.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    config: dict[str, Any]
    stored: tuple[FileIdentity, ...]
    _file_of: dict[str, str]
    _mapped: dict[str, mmap.mmap] = field(default_factory=dict)
    _views: dict[str, StoredTensor] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    is_difference: ClassVar[bool] = False

    @property
    def where(self) -> str:
        """See `Source`."""
        return str(self.path)

    @property
    def folder(self) -> Path:
        """See `Source`."""
        return self.path

    @property
    def inputs(self) -> tuple[Path, ...]:
        """See `Source`."""
        return (self.path,)

    @property
    def identity(self) -> object:
        """See `Source`."""
        return (str(self.path), self.stored)

    def view(self, name: str) -> StoredTensor:
        """The named tensor, mapped into memory."""
        if name not in self._views:
            info = self.tensors[name]
            file = self._file_of[name]
            if file not in self._mapped:
                self._mapped[file] = _map(self.path / file)
            self._views[name] = StoredTensor(
                info.dtype, info.shape, self._mapped[file], info.offset
            )
        return self._views[name]

    def check_unchanged(self) -> None:
        """Raise `StaleError` if a weight file is not what it was when it was opened."""
        for opened in self.stored:
            path = self.path / opened.name
            try:
                now = FileIdentity.of(path)
            except OSError as error:
                raise StaleError(f"{path}: vanished while it was read; run again") from error
            if now != opened:
                raise StaleError(f"{path}: changed while it was read; run again when it is at rest")


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a folder and check everything that can be checked without reading weights.

    Raises:
        CheckpointError: no such folder, no or broken safetensors files, an index that does not fit
            them, pickled or quantised weights.
    """
    folder = Path(os.path.expanduser(path)).absolute()  # noqa: PTH111 (unlike Path's, leaves ~nobody)
    if not folder.is_dir():
        kind = "is a file, a folder is expected" if folder.exists() else "no such folder"
        hub = "" if folder.exists() else "; a model on the hub must be downloaded first"
        raise CheckpointError(f"{path}: {kind}{hub}")
    shards = _shards(folder)
    infos: dict[str, TensorInfo] = {}
    file_of: dict[str, str] = {}
    for shard, listed in shards.items():
        found = read_header(folder / shard)
        for info in found:
            if info.name in infos:
                raise CheckpointError(
                    f"{folder}: tensor {info.name!r} is in {file_of[info.name]} and in {shard}; "
                    "remove one of the files"
                )
            infos[info.name] = info
            file_of[info.name] = shard
        if listed is not None:
            _check_index(folder, shard, listed, {info.name for info in found})
    if not infos:
        raise CheckpointError(f"{folder}: holds no tensors; is the download complete?")
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    _refuse_quantised(folder, config, infos)
    files = tuple(FileIdentity.of(folder / shard) for shard in sorted(shards))
    return Checkpoint(folder, {n: infos[n] for n in sorted(infos)}, config, files, file_of)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file cannot be read or is not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({str(error)[:80]})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object; got {type(value).__name__}")
    return value


def _shards(folder: Path) -> dict[str, set[str] | None]:
    """Weight files, each with the tensors that the index lists for it (None without an index)."""
    files = {p.name for p in folder.glob("*.safetensors")}
    if (folder / INDEX).exists():
        if SINGLE in files:
            raise CheckpointError(
                f"{folder}: has both {SINGLE} and {INDEX}; remove the one that is not meant"
            )
        return _read_index(folder, files)
    is_adapter = (folder / "adapter_config.json").exists()
    if SINGLE in files or (len(files) == 1 and not is_adapter):
        return {SINGLE if SINGLE in files else files.pop(): None}
    if files and not is_adapter:
        raise CheckpointError(
            f"{folder}: {len(files)} safetensors files and no {INDEX} to say what belongs together"
        )
    if is_adapter:
        raise CheckpointError(
            f"{folder}: is an adapter, not a whole model; merge it into its base first"
        )
    pickled = sorted(p.name for pattern in _PICKLED for p in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder}: holds only pickled weights ({pickled[0]}), which can run code when loaded; "
            "convert them to safetensors first"
        )
    raise CheckpointError(f"{folder}: holds no safetensors file; expected {SINGLE} or {INDEX}")


def _read_index(folder: Path, files: set[str]) -> dict[str, set[str] | None]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map is not a map of tensor to file")
    shards: dict[str, set[str] | None] = {}
    for name, file in weight_map.items():
        if Path(file).name != file:
            raise CheckpointError(
                f"{folder / INDEX}: file {file!r} of {name!r} is outside the folder"
            )
        listed = shards.setdefault(file, set())
        assert listed is not None
        listed.add(name)
    missing = sorted(shards.keys() - files)
    if missing:
        raise CheckpointError(
            f"{folder}: {INDEX} lists {missing[0]}, which is not there "
            f"({len(missing)} of {len(shards)} shards missing); download it again"
        )
    unlisted = sorted(f for f in files - shards.keys() if _SHARD.fullmatch(f))
    if unlisted:
        raise CheckpointError(
            f"{folder}: shard {unlisted[0]} is not listed in {INDEX}; remove it or fix the index"
        )
    return shards


def _check_index(folder: Path, shard: str, listed: set[str], found: set[str]) -> None:
    if listed - found:
        name = min(listed - found)
        raise CheckpointError(
            f"{folder}: {INDEX} says that {name!r} is in {shard}, where it is not"
        )
    if found - listed:
        name = min(found - listed)
        raise CheckpointError(
            f"{folder}: {shard} holds {name!r}, which {INDEX} does not list there"
        )


def _refuse_quantised(folder: Path, config: dict[str, Any], infos: dict[str, TensorInfo]) -> None:
    remedy = "task arithmetic needs the weights themselves; use the model before quantisation"
    if config.get("quantization_config"):
        method = config["quantization_config"]
        kind = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        raise CheckpointError(f"{folder}: weights are quantised ({kind}, by config.json); {remedy}")
    for name, info in infos.items():
        if info.dtype.is_quantised or _QUANTISED_NAME.fullmatch(name):
            raise CheckpointError(
                f"{folder}: weights are quantised (tensor {name!r}, {info.dtype.name}); {remedy}"
            )
