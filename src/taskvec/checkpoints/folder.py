"""A checkpoint folder as transformers writes it: one safetensors file, or shards with an index.

A single `.safetensors` file is a checkpoint as well, without config and without companions.
`open_checkpoint` reads and checks headers only; weights are read where a view is read.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from taskvec import documents
from taskvec.checkpoints.quantised import plain
from taskvec.checkpoints.safetensors import TensorInfo, read_header
from taskvec.checkpoints.schema import Index, ModelConfig
from taskvec.checkpoints.source import Source
from taskvec.checkpoints.stored import StoredFile
from taskvec.checkpoints.views import StoredTensor
from taskvec.errors import CheckpointError, StaleError
from taskvec.validation import read_as

USE_ADAPTER = "it can be a task, instruct or target of a family, or be merged into its base first"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.*)-\d+-of-\d+\.safetensors")
# Copies of a model's weights for other programs or at another precision, and further weights that
# transformers does not load with the model.
_COPY = re.compile(
    r"consolidated.*|.*\.(fp16|fp32|bf16|int8|non_ema|ema)[.-].*|mtp.*|adapter_model.*|.*original.*"
)
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
PICKLED_REMEDY = (
    "holds only pickled weights, which can run code when loaded; allow_pickle: true "
    "(--allow-pickle) reads them without running what is in them; or convert them to safetensors"
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
    def of(cls, path: Path, stat: os.stat_result | None = None) -> FileIdentity:
        """The identity of the file that has this name now, or of an opened one by its `stat`."""
        stat = stat or path.stat()
        return cls(path.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


@dataclass(slots=True)
class Checkpoint:
    """An opened folder, or a single file; a `Source`.

    Attributes:
        path: The folder, absolute.
        single: Name of the file in it, if that was opened and not the folder.
        tensors: What the headers say, by name, in name order.
        config: `config.json`; empty without one.
        notes: What looks odd and was dealt with, in words.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    config: Mapping[str, Any]
    stored: tuple[FileIdentity, ...]
    _file_of: dict[str, str]
    _opened: dict[str, StoredFile] = field(default_factory=dict)
    _views: dict[str, StoredTensor] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    single: str | None = None
    notes: tuple[str, ...] = ()
    parts: ClassVar[tuple[()]] = ()
    is_difference: ClassVar[bool] = False

    @property
    def where(self) -> str:
        """See `Source`."""
        return str(self.inputs[0])

    @property
    def folder(self) -> Path | None:
        """See `Source`; None for a single file, whose neighbours may be of other models."""
        return self.path if self.single is None else None

    @property
    def inputs(self) -> tuple[Path, ...]:
        """See `Source`."""
        return (self.path if self.single is None else self.path / self.single,)

    @property
    def identity(self) -> object:
        """See `Source`."""
        return (str(self.path), self.stored)

    def view(self, name: str) -> StoredTensor:
        """See `Source`.

        Raises:
            StaleError: the file is not the one whose header was read.
        """
        if name not in self._views:
            info = self.tensors[name]
            file = self._file_of[name]
            if file not in self._opened:
                (identity,) = [opened for opened in self.stored if opened.name == file]
                self._opened[file] = open_file(self.path / file, identity)
            self._views[name] = StoredTensor(
                info.dtype, info.shape, self._opened[file], info.offset
            )
        return self._views[name]

    def check_unchanged(self) -> None:
        """Raise `StaleError` if a weight file is not what it was when it was opened."""
        check_files(self.path, self.stored)


_CONVERT = (
    "merge it into its model with the tool that made it and give the whole model, or convert it to "
    "a PEFT folder"
)
# Names of the factors of adapters, what those are, and what to do.
_FACTORS = (
    (
        re.compile(
            r"\.(hada_w[12]_[ab]|hada_t[12]|lokr_w[12](_[ab])?|lokr_t2|oft_blocks|glora_\w+)$"
        ),
        "factors of a LyCORIS adapter",
        _CONVERT,
    ),
    (
        re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)"),
        "LoRA factors as PEFT or diffusers name them",
        "put the adapter_config.json that was saved with them beside them, call the file "
        f"adapter_model.safetensors and give the folder, or {_CONVERT}",
    ),
    (
        re.compile(r"(^lora_(unet|te\d?|transformer)_.*)|\.lora_(down|up|mid)(\.|$)|\.dora_scale$"),
        "LoRA factors as kohya's scripts name them",
        _CONVERT,
    ),
    (
        re.compile(r"\.lora(_linear_layer)?\.(down|up)\.|_lora\.(down|up)\."),
        "LoRA factors as diffusers named them",
        _CONVERT,
    ),
)


def check_files(folder: Path, stored: Iterable[FileIdentity]) -> None:
    """Raise `StaleError` if a file is not what it was."""
    for opened in stored:
        path = folder / opened.name
        try:
            now = FileIdentity.of(path)
        except OSError as error:
            raise StaleError(f"{path}: vanished while it was read; run again") from error
        if now != opened:
            raise StaleError(f"{path}: changed while it was read; run again when it is at rest")


def open_file(path: Path, identity: FileIdentity) -> StoredFile:
    """A file of weights whose header was read.

    Raises:
        CheckpointError: it cannot be read.
        StaleError: it is not the file that had this identity, or not there any more.
    """
    try:
        file = StoredFile(path)
    except CheckpointError:
        check_files(path.parent, [identity])
        raise
    if FileIdentity.of(path, file.stat()) != identity:
        raise StaleError(f"{path}: changed while it was read; run again when it is at rest")
    return file


def identify(path: Path) -> FileIdentity:
    """How a file looks before anything of it is read, so that a later change is noticed.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path}: is not a regular file; weights are read from files only")
    return FileIdentity.of(path, found)


def open_checkpoint(path: str | os.PathLike[str]) -> Source:
    """Open a folder or one file as a model; quantised weights are widened when they are read.

    Raises:
        CheckpointError: as `open_stored`, or weights are quantised in a way that is not read.
    """
    return plain(open_stored(path))


def open_stored(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a folder or one file; check everything that can be checked without reading weights.

    Raises:
        CheckpointError: no such folder or file, no or broken safetensors files, an index that does
            not fit them, pickled weights.
    """
    folder = Path(os.path.expanduser(path)).absolute()  # noqa: PTH111 (unlike Path's, leaves ~nobody)
    single = None
    if folder.is_file() and folder.suffix == ".safetensors":
        folder, single = folder.parent, folder.name
    elif not folder.is_dir():
        if folder.suffix in _PICKLED_SUFFIXES and folder.is_file():
            raise CheckpointError(f"{folder}: {PICKLED_REMEDY}")
        kind = "is a file of another kind" if folder.exists() else "no such folder or file"
        raise CheckpointError(
            f"{path}: {kind}; a model is a folder, a .safetensors file, or org/name on the hub"
        )
    index = _index(folder) if single is None else None
    shards = _shards(folder, index) if single is None else {single: None}
    files = tuple(identify(folder / shard) for shard in sorted(shards))
    found = {shard: read_header(folder / shard) for shard in shards}
    for shard, listed in shards.items():
        if listed is not None and index is not None:
            check_index(folder, index, shard, listed, {info.name for info in found[shard]})
    infos = {info.name: info for held in found.values() for info in held}
    if not infos:
        raise CheckpointError(
            f"{folder / (single or '')}: holds no tensors; is the download complete?"
        )
    refuse_factors(folder / (single or ""), infos)
    config = read_config(folder) if single is None else {}
    return Checkpoint(
        folder,
        {name: infos[name] for name in sorted(infos)},
        config,
        files,
        {info.name: shard for shard, held in found.items() for info in held},
        single=single,
        notes=() if single is not None else _two_sets(folder, shards),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder; empty without one.

    Raises:
        CheckpointError: it cannot be read, is not a JSON object, or is a link out of the folder.
    """
    path = folder / "config.json"
    if not os.path.lexists(path):
        return {}
    config = documents.read_object(path, documents.CONFIG, of=folder)
    read_as(ModelConfig, config, str(path), "use the one that was saved with the weights")
    return config


def _index(folder: Path) -> str | None:
    """Name of the index: that of transformers or, as diffusers has it, the only other one.

    Where one file holds everything as well, transformers loads that, and diffusers the shards.
    """
    found = sorted(path.name for path in folder.glob("*.safetensors.index*.json"))
    if (folder / SINGLE).exists():
        return None
    if INDEX in found:
        return INDEX
    found = [name for name in found if not _COPY.fullmatch(name)] or found
    return found[0] if len(found) == 1 else None


def _two_sets(folder: Path, read: Iterable[str]) -> tuple[str, ...]:
    """What is left out where one file and, with an index, shards hold the same model."""
    file = next(iter(read))
    shard = _SHARD.fullmatch(file)
    stem = shard["stem"] if shard is not None else file.removesuffix(".safetensors")
    whole, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    if not ((folder / whole).exists() and (folder / index).exists()):
        return ()
    if shard is not None:
        how = f"the shards are read, as diffusers does, and {whole} is left out"
    else:
        how = f"{whole} is read, as transformers does, and the shards are left out"
    return (f"{folder}: has both {whole} and {index}; {how}",)


def _shards(folder: Path, index: str | None) -> dict[str, set[str] | None]:
    """Weight files, each with the tensors that the index lists for it (None without an index).

    What another index lists, and what is called otherwise, belongs to another set of weights.
    """
    files = {p.name for p in folder.glob("*.safetensors")}
    if index is not None:
        whole = re.sub(r"\.index.*", "", index)
        shards = read_index(folder, index, files)
        stems = {whole.removesuffix(".safetensors")}
        stems |= {found["stem"] for found in map(_SHARD.fullmatch, shards) if found is not None}
        unlisted = sorted(
            file
            for file in files - shards.keys()
            if (found := _SHARD.fullmatch(file)) is not None and found["stem"] in stems
        )
        if unlisted:
            raise CheckpointError(
                f"{folder}: shard {unlisted[0]} is not listed in {index}; remove it if it is left "
                "over from an earlier save, or fix the index"
            )
        return dict(shards)
    is_adapter = (folder / "adapter_config.json").exists()
    if SINGLE in files:
        return {SINGLE: None}
    if not is_adapter:
        files = {file for file in files if not _COPY.fullmatch(file)} or files
        if len(files) == 1:
            return {files.pop(): None}
    if files and not is_adapter:
        raise CheckpointError(
            f"{folder}: {len(files)} safetensors files and no {INDEX} to say what belongs together"
        )
    if is_adapter:
        raise CheckpointError(f"{folder}: is an adapter, not a whole model; {USE_ADAPTER}")
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED_SUFFIXES)
    if pickled:
        raise CheckpointError(f"{folder / pickled[0]}: {PICKLED_REMEDY}")
    raise CheckpointError(f"{folder}: holds no safetensors file; expected {SINGLE} or {INDEX}")


def read_index(folder: Path, index: str, files: Set[str]) -> dict[str, set[str]]:
    """The shards that an index names, each with the tensors that it lists for it.

    Raises:
        CheckpointError: the index is broken, or names a shard that is not among `files`.
    """
    content = documents.read_json(folder / index, documents.CONFIG)
    listed = read_as(Index, content, str(folder / index), "download it again")
    shards: dict[str, set[str]] = {}
    for name, file in listed.weight_map.items():
        if Path(file).name != file:
            raise CheckpointError(
                f"{folder / index}: file {file!r} of {name!r} is outside the folder"
            )
        shards.setdefault(file, set()).add(name)
    missing = sorted(shards.keys() - files)
    if missing:
        raise CheckpointError(
            f"{folder}: {index} lists {missing[0]}, which is not there "
            f"({len(missing)} of {len(shards)} shards missing); download it again"
        )
    return shards


def check_index(folder: Path, index: str, shard: str, listed: Set[str], found: Set[str]) -> None:
    """Raise `CheckpointError` if a shard does not hold what the index lists for it."""
    remedy = "the two were not saved together; download both again, or write the index again"
    if listed - found:
        name = min(listed - found)
        raise CheckpointError(
            f"{folder}: {index} says that {name!r} is in {shard}, where it is not "
            f"({len(listed - found)} such tensors); {remedy}"
        )
    if found - listed:
        name = min(found - listed)
        raise CheckpointError(
            f"{folder}: {shard} holds {name!r}, which {index} does not list there "
            f"({len(found - listed)} such tensors); {remedy}"
        )


def refuse_factors(where: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Raise `CheckpointError` if tensors are those of an adapter that is in no folder of PEFT."""
    for name in names:
        for pattern, kind, remedy in _FACTORS:
            if pattern.search(name):
                raise CheckpointError(
                    f"{where}: holds {kind} ({name!r}), not a whole model; {remedy}"
                )
