"""What a checkpoint, an adapter or a vector holds; with norms, what its numbers look like."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Unpack

import numpy as np

from taskvec.checkpoints.adapters import Adapter
from taskvec.checkpoints.fingerprint import chunk_digests, tensor_digest
from taskvec.checkpoints.folder import Checkpoint
from taskvec.checkpoints.safetensors import TensorInfo
from taskvec.checkpoints.source import Derived, Source, widened
from taskvec.checkpoints.vectors import Vector
from taskvec.checkpoints.views import View
from taskvec.family.opening import open_model, ties_head, token_embedding
from taskvec.keywords import takes
from taskvec.layers import LANGUAGE_HEADS, LayerKey, classify, model_order, module_order
from taskvec.recipes.coerce import RunKeywords, run_options
from taskvec.streaming import CHUNK, RunOptions, Stretch, gather
from taskvec.tables import frame, html_table

Array = np.ndarray[Any, Any]
# Ends of the names of architectures that have a language model head.
_WITH_HEADS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")
_ADAPTER_PART = re.compile(r"^base_model\.model\.|\.lora_[A-Za-z_]+(?=\.|$)|\.base_layer(?=\.)")


@dataclass(frozen=True, slots=True)
class Numbers:
    """What the elements of one tensor look like.

    Attributes:
        norm: Frobenius norm of the finite elements.
        largest: Largest magnitude among them.
        zeros: Share of elements that are zero.
        nan: Elements that are not a number.
        infinite: Elements that are infinite.
        digest: Identity by content.
    """

    norm: float
    largest: float
    zeros: float
    nan: int
    infinite: int
    digest: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found.

    Attributes:
        path: What was inspected.
        kind: `model`, `adapter` or `vector`.
        about: What config or metadata say of it.
        files: Size in bytes by name.
        tensors: By name.
        keys: Place of each tensor in the model.
        tied: By head, the token embedding that its weights are taken from when it is loaded.
        numbers: By tensor; empty unless asked for.
    """

    path: str
    kind: str
    about: Mapping[str, Any]
    files: Mapping[str, int]
    tensors: Mapping[str, TensorInfo]
    keys: Mapping[str, LayerKey]
    tied: Mapping[str, str]
    numbers: Mapping[str, Numbers] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Inspection of {self.path}: {self.kind}, {len(self.tensors)} tensors>"

    def to_pandas(self) -> Any:
        """One row a tensor, as a DataFrame."""
        return frame([self._row(name) for name in self.tensors])

    def _repr_html_(self) -> str:
        return html_table([self._row(name) for name in self.tensors], repr(self))

    @property
    def identical(self) -> list[list[str]]:
        """Groups of tensors with the same content; empty unless numbers are known."""
        groups: dict[tuple[str, str], list[str]] = {}
        for name, numbers in self.numbers.items():
            groups.setdefault((self.tensors[name].dtype.name, numbers.digest), []).append(name)
        return [names for names in groups.values() if len(names) > 1]

    def to_json(self, *, tensors: bool = True) -> dict[str, Any]:
        """A JSON object; `tensors` says whether every tensor is listed."""
        infos = self.tensors.values()
        out: dict[str, Any] = {
            "path": self.path,
            "kind": self.kind,
            "about": dict(self.about),
            "files": dict(self.files),
            "tensors": len(self.tensors),
            "parameters": sum(info.size for info in infos),
            "bytes": sum(info.nbytes for info in infos),
            "dtypes": dict(Counter(info.dtype.name for info in infos)),
            "blocks": self._blocks(),
            "modules": self._modules(),
            "tied": dict(self.tied),
            "not_float": [info.name for info in infos if not info.dtype.is_float],
            "other": [n for n, key in self.keys.items() if key.module == "other"],
        }
        if self.numbers:
            out["identical"] = self.identical
            out["nan"] = sum(n.nan for n in self.numbers.values())
            out["infinite"] = sum(n.infinite for n in self.numbers.values())
        if tensors:
            rows = [self._row(name) for name in self.tensors]
            out["layers"] = sorted(
                rows, key=lambda r: model_order(r["tower"], r["block"], r["module"], r["name"])
            )
        return out

    def _blocks(self) -> dict[str, int]:
        seen: dict[str, set[int]] = {}
        for key in self.keys.values():
            if key.block is not None:
                seen.setdefault(key.tower, set()).add(key.block)
        return {tower: len(blocks) for tower, blocks in sorted(seen.items())}

    def _modules(self) -> list[dict[str, Any]]:
        groups: dict[tuple[str, str], list[TensorInfo]] = {}
        for name, key in self.keys.items():
            groups.setdefault((key.tower, key.module), []).append(self.tensors[name])
        rows = []
        for (tower, module), infos in sorted(groups.items(), key=lambda g: module_order(*g[0])):
            row: dict[str, Any] = {
                "tower": tower,
                "module": module,
                "tensors": len(infos),
                "parameters": sum(info.size for info in infos),
                "bytes": sum(info.nbytes for info in infos),
            }
            known = [self.numbers[i.name] for i in infos if i.name in self.numbers]
            if self.numbers:
                row["norm"] = _number(math.hypot(*[n.norm for n in known]))
                row["largest"] = max((n.largest for n in known), default=0.0)
            rows.append(row)
        return rows

    def _row(self, name: str) -> dict[str, Any]:
        info, key = self.tensors[name], self.keys[name]
        row: dict[str, Any] = {
            "name": name,
            "dtype": info.dtype.name,
            "shape": list(info.shape),
            "bytes": info.nbytes,
            "tower": key.tower,
            "block": key.block,
            "module": key.module,
        }
        if self.numbers:
            known = self.numbers.get(name)
            for column in ("norm", "largest", "zeros", "nan", "infinite", "digest"):
                row[column] = _number(getattr(known, column)) if known is not None else None
        return row


def _number(value: Any) -> Any:
    """JSON has no infinity: a norm whose square overflows is not known."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@takes(RunKeywords)
def inspect(
    model: str | os.PathLike[str],
    *,
    norms: bool = False,
    allow_pickle: bool = False,
    **options: Unpack[RunKeywords],
) -> Inspection:
    """Say what a checkpoint, an adapter or a vector holds.

    Args:
        model: Folder, file or name on the hub.
        norms: Whether to read the weights too: norms, largest magnitudes, zeros, NaN and infinity
            (which are counted, not refused), identical tensors.
        allow_pickle: Whether pickled weights may be read.
        {options}

    Raises:
        CheckpointError: it is broken, of an unsupported kind, or not there.
    """
    kind, source, about = _open(model, allow_pickle)
    names = source.tensors
    return Inspection(
        path=str(model),
        kind=kind,
        about=about,
        files=_files(source),
        tensors=names,
        keys={n: classify(_ADAPTER_PART.sub("", n) if kind == "adapter" else n) for n in names},
        tied=_find_ties(source) if kind == "model" else {},
        numbers=_numbers(source, run_options(options)) if norms else {},
    )


def _open(
    model: str | os.PathLike[str], allow_pickle: bool
) -> tuple[str, Source, Mapping[str, Any]]:
    """Kind, stored tensors, and facts about them."""
    source = open_model(model, allow_pickle=allow_pickle)
    if isinstance(source, Adapter):
        keys = ("peft_type", "r", "lora_alpha", "use_rslora", "base_model_name_or_path")
        return "adapter", source.stored, {k: source.config[k] for k in keys if k in source.config}
    inner = _inner(source)
    if isinstance(inner, Vector):
        return "vector", source, inner.metadata
    keys = ("architectures", "model_type", "torch_dtype", "dtype", "tie_word_embeddings")
    return "model", source, {k: source.config[k] for k in keys if k in source.config}


def _inner(source: Source) -> Source:
    """What lies on disk, without the name that the hub has for it."""
    return _inner(source.parts[0]) if isinstance(source, Derived) else source


def _files(source: Source) -> dict[str, int]:
    """Weight files by name; empty for a source without its own files."""
    inner = _inner(source)
    stored = inner.stored if isinstance(inner, Vector) else inner
    return {f.name: f.size for f in stored.stored} if isinstance(stored, Checkpoint) else {}


def _find_ties(source: Source) -> dict[str, str]:
    """Heads that are not taken from the file, stored or not."""
    embedding = token_embedding(source)
    stored = [name for name in source.tensors if name.endswith(LANGUAGE_HEADS)]
    if embedding is None or not ties_head(source, stored[0] if stored else LANGUAGE_HEADS[0]):
        return {}
    is_language_model = any(
        name.endswith(_WITH_HEADS) for name in source.config.get("architectures") or ()
    )
    if stored:
        return dict.fromkeys(stored, embedding)
    return {"(not stored)": embedding} if is_language_model else {}


class _Part(NamedTuple):
    sums: Array  # of each chunk: Σ w², max |w|, zeros, NaN, infinities
    digests: bytes


def _numbers(source: Source, options: RunOptions) -> dict[str, Numbers]:
    """One pass over the floating-point tensors; the same bits for any number of threads."""
    infos = [info for info in source.tensors.values() if info.dtype.is_float]
    views = [source.view(info.name) for info in infos]

    def work(stretch: Stretch) -> _Part:
        return _measure(views[stretch.tensor], stretch.start, stretch.stop)

    found: dict[str, Numbers] = {}
    with options.progress("inspect", sum(info.nbytes for info in infos)) as advance:
        for tensor, parts in gather([info.size for info in infos], lambda: work, options):
            info = infos[tensor]
            found[info.name] = _summary(parts, info.size)
            advance(info.nbytes)
    source.check_unchanged()
    return {info.name: found[info.name] for info in infos}


def _measure(view: View, start: int, stop: int) -> _Part:
    """Chunks of one stretch, measured one by one, so that sums are added in one order only."""
    block = view.read(start, stop)
    values = widened(block, view.dtype)
    chunks = [values[i : i + CHUNK].astype(np.float64) for i in range(0, len(values), CHUNK)]
    return _Part(np.array([_sums(chunk) for chunk in chunks]).reshape(-1, 5), chunk_digests(block))


def _sums(chunk: Array) -> tuple[float, float, int, int, int]:
    nan, infinite = np.isnan(chunk), np.isinf(chunk)
    finite = np.where(nan | infinite, 0.0, chunk)
    zeros = int((chunk == 0).sum())
    with np.errstate(over="ignore"):
        squares = float(np.square(finite).sum())
    return squares, float(np.abs(finite).max()), zeros, int(nan.sum()), int(infinite.sum())


def _summary(parts: list[_Part], size: int) -> Numbers:
    sums = np.concatenate([part.sums for part in parts])
    return Numbers(
        norm=math.sqrt(math.fsum(sums[:, 0])) if np.isfinite(sums[:, 0]).all() else math.inf,
        largest=float(sums[:, 1].max(initial=0.0)),
        zeros=float(sums[:, 2].sum()) / size if size else 0.0,
        nan=int(sums[:, 3].sum()),
        infinite=int(sums[:, 4].sum()),
        digest=tensor_digest([part.digests for part in parts]),
    )
