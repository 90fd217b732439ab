"""Extracting a task vector as a LoRA adapter that PEFT loads.

Every weight of a linear layer becomes B A of low rank. What else differs (norms, biases,
embeddings, experts) has no place in B A: it is refused, dropped, or kept whole as PEFT's
`modules_to_save`, as the caller says. One matrix is held at a time, and two to five times its
size while it is factored; finished factors wait in an unnamed file beside the output.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from taskvec.checkpoints.naming import hub_id
from taskvec.checkpoints.safetensors import write_header
from taskvec.checkpoints.shards import OutputTensor, Shard
from taskvec.checkpoints.source import widened
from taskvec.checkpoints.views import size
from taskvec.dtypes import DTYPES, DType
from taskvec.errors import OutputError, ParameterError, UsageError
from taskvec.family.opening import ties_head
from taskvec.family.vocabulary import token_metadata
from taskvec.layers import LANGUAGE_HEADS, TOKEN_EMBEDDINGS, LayerKey, model_order
from taskvec.merging.apply import InMemory, Record, apply_edits
from taskvec.merging.edits import Edit
from taskvec.outputs.place import check_place
from taskvec.outputs.staging import in_words, staged
from taskvec.recipes.recipe import Recipe
from taskvec.statistics.collect import address
from taskvec.statistics.svd import factors, generator, squared_error, squared_norm
from taskvec.streaming import RunOptions, silent
from taskvec.vectors.difference import Difference, Wanted, make_difference, result_dtype
from taskvec.vectors.vector_file import Extracted, Factored, about, start_fingerprint

RESTS = ("refuse", "drop", "save")
FILE = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
# Models whose `c_attn`, `c_proj`, `c_fc` and `q_attn` are Conv1D: stored as (in, out).
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """What the adapter shall be.

    Attributes:
        rank: Of every matrix; None if `energy` says it.
        energy: Share of each ‖τ‖² to keep, in (0, 1]; the rank then differs by matrix.
        rest: What becomes of tensors that are no linear weights: `refuse`, `drop` or `save`.
        seed: Of the random projections.
    """

    rank: int | None = None
    energy: float | None = None
    rest: str = "refuse"
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise UsageError("a LoRA adapter needs either a rank or an energy; give one of them")
        if self.rank is not None and self.rank < 1:
            raise ParameterError(f"rank must be a whole number above 0; got {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ParameterError(f"energy must be in (0, 1]; got {self.energy:g}")
        if self.rest not in RESTS:
            raise ParameterError(f"rest must be in {' | '.join(RESTS)}; got {self.rest!r}")


def shape_of(form: str, **given: Any) -> AdapterShape | None:
    """What an adapter shall be, from options; None where a vector is wanted.

    Raises:
        UsageError: an unknown form, or options that do not go with it.
    """
    if form == "lora":
        return AdapterShape(**given)
    if form != "vector":
        raise UsageError(f"form must be in vector | lora; got {form!r}")
    for name, value in given.items():
        if value != AdapterShape.__dataclass_fields__[name].default:
            raise UsageError(f"{name} goes with the form lora; got {value!r} for a vector")
    return None


def extract_lora(
    recipe: Recipe, out: Path, wanted: Wanted, shape: AdapterShape, options: RunOptions
) -> Extracted:
    """Write the difference of two members as a LoRA adapter.

    Args:
        recipe: Family; for a pure vector also the method. `out.dtype` is that of the factors,
            float32 by default.
        out: Folder to appear.
        wanted: Which difference.
        shape: Rank, and what becomes of the rest.
        options: How to run.

    Raises:
        UsageError: the request is contradictory or incomplete; tensors that differ have no place.
        CheckpointError, FamilyError: the members are broken, do not fit or do not differ.
        OutputError: the folder cannot be written there, or a factor overflows the dtype.
    """
    dtype = recipe.out.dtype
    recipe = replace(recipe, out=replace(recipe.out, dtype=None))  # the difference is not rounded
    found = make_difference(recipe, wanted, options)
    kinds = {edit.name: _kind(edit, found.members.keys[edit.name]) for edit in found.edits}
    grown = token_metadata(found.members.sources[found.start])[1]  # rows that the anchor lacks
    kinds |= dict.fromkeys(kinds.keys() & grown.keys())
    modules = _modules_to_save(found, kinds) if shape.rest == "save" else []
    _refuse_rest(kinds, shape.rest)
    if not any(kinds.values()):
        raise UsageError(
            f"the {found.name} leaves no weight of a linear layer to be factored (a layer whose "
            "bias differs is saved whole); take --rest drop, or extract a vector"
        )
    tied = _find_tie(found, modules)
    if tied is not None and not tied.endswith("embed_tokens"):
        raise UsageError(
            f"{tied!r} is tied to the head, which PEFT would part from it; exclude it, or take "
            "--rest drop"
        )
    check_place(found.members, 0, out, force=options.force)
    out = Path(os.path.realpath(out))
    work = _Work(found, shape, replace(options, precision=recipe.out.precision))
    with in_words(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent) as file:
            work.spool = _Spool(file, result_dtype([], dtype))
            for edit in found.edits:
                work.factor(edit, kinds[edit.name], modules)
            for module in modules:
                work.save(module, head=LANGUAGE_HEADS[0] if module == tied else None)
            for source in found.members.distinct:
                source.check_unchanged()
            start = start_fingerprint(found, work.records)
            written = _write(out, found, work, modules, start)
    lost = math.fsum((row.norm * row.error) ** 2 for row in work.rows)
    total = math.fsum(row.norm**2 for row in work.rows)
    keys = {row.name: found.members.keys[row.name] for row in work.rows}
    order = {name: model_order(k.tower, k.block, k.module, name) for name, k in keys.items()}
    rows = sorted(work.rows, key=lambda row: order[row.name])
    return Extracted(
        path=out,
        name=f"{found.name} as a LoRA adapter",
        tensors=tuple(row.name for row in rows if row.kept != "dropped"),
        zero=found.zero,
        bytes=written,
        fingerprint=None,
        anchor_fingerprint=start,
        warnings=_warnings(found, modules),
        factored=tuple(rows),
        lost=lost / total,
    )


def _kind(edit: Edit, key: LayerKey) -> str | None:
    """`lora` for the weight of a linear layer, None for anything else."""
    is_linear = key.module in ("attention", "mlp", "head") and key.projection != "router"
    is_matrix = len(edit.like.shape) == 2 and edit.name.endswith(".weight")
    return "lora" if is_linear and is_matrix and key.expert is None else None


def _refuse_rest(kinds: Mapping[str, str | None], rest: str) -> None:
    others = [name for name, kind in kinds.items() if kind is None]
    nowhere = [name for name in others if "." not in name]
    if others and rest == "refuse":
        raise UsageError(
            f"{len(others)} tensors that differ are no weights of linear layers, such as "
            f"{others[0]!r}; --rest drop leaves them out, --rest save keeps their modules whole"
        )
    if nowhere and rest == "save":
        raise UsageError(
            f"tensor {nowhere[0]!r} belongs to no module, so that PEFT cannot save it; exclude it, "
            "or take --rest drop"
        )


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _modules_to_save(found: Difference, kinds: dict[str, str | None]) -> list[str]:
    """Modules that are kept whole; a linear weight whose bias differs too goes with it."""
    modules = sorted({_module(name) for name, kind in kinds.items() if kind is None})
    for name in kinds:
        if _module(name) in modules:
            kinds[name] = None
    return modules


@dataclass(slots=True)
class _Spool:
    """Finished tensors, one after the other, and where each lies."""

    file: IO[bytes]
    dtype: DType
    placed: dict[str, tuple[OutputTensor, int]] = field(default_factory=dict)

    def add(self, name: str, array: Array, dtype: DType | None = None) -> Array:
        """Round and put a tensor; the result is its values as stored. Other dtypes are as given."""
        from taskvec.kernels.convert import narrow

        kind, shape = dtype or self.dtype, array.shape
        stored = np.ascontiguousarray(array).reshape(-1)
        if dtype is None:
            values, stored = stored, np.empty(array.size, kind.storage)
            narrow(kind.code, values, address(stored), 0, len(values))
            if not np.isfinite(widened(stored, kind)).all():
                raise OutputError(f"{name!r} overflows {kind.config_name}; choose a wider dtype")
        self.placed[name] = OutputTensor(name, kind, shape), self.file.tell()
        self.file.write(stored.data)
        return widened(stored, kind).reshape(shape)


@dataclass(slots=True)
class _Work:
    """Factoring of one difference after the other."""

    found: Difference
    shape: AdapterShape
    options: RunOptions
    spool: _Spool = field(init=False)
    rows: list[Factored] = field(default_factory=list)
    records: dict[str, Record] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)

    def factor(self, edit: Edit, kind: str | None, modules: Sequence[str]) -> None:
        """Factor one matrix, or only measure what has another place or none."""
        with self.options.progress("factor", edit.read_bytes) as advance:
            tau = self._read(edit)
            advance(edit.read_bytes)
        norm = math.sqrt(squared_norm(tau.reshape(len(tau) if tau.ndim == 2 else 1, -1)))
        if kind is None:
            saved = _module(edit.name) in modules
            kept, error = ("saved", 0.0) if saved else ("dropped", 1.0)
            self.rows.append(Factored(edit.name, kept, None, norm, error))
            return
        module = _module(edit.name)
        if self._is_conv1d(module):
            tau = tau.T
        left, right = factors(
            tau,
            rank=self.shape.rank,
            energy=self.shape.energy,
            random=generator(self.shape.seed, edit.name),
        )
        left = self.spool.add(f"{_PREFIX}{module}.lora_B.weight", left)
        right = self.spool.add(f"{_PREFIX}{module}.lora_A.weight", right)
        self.ranks[module] = len(right)
        error = math.sqrt(squared_error(tau, left, right)) / norm
        self.rows.append(Factored(edit.name, "lora", len(right), norm, error))

    def _read(self, edit: Edit) -> Array:
        sink = InMemory([edit])
        self.records |= apply_edits([edit], sink, replace(self.options, progress=silent))
        return sink.arrays[0].reshape(edit.like.shape)

    def _is_conv1d(self, module: str) -> bool:
        model = self.found.members.sources[self.found.start].config.get("model_type")
        return model in _CONV1D_MODELS and module.rpartition(".")[2] in _CONV1D

    def save(self, module: str, head: str | None) -> None:
        """Every tensor of a module as the fine-tune has it: start + difference.

        PEFT asks for a head that is tied to the module under its own name as well.
        """
        source = self.found.members.sources[self.found.start]
        edits = {edit.name: edit for edit in self.found.edits}
        for name in [n for n in source.tensors if _module(n) == module]:
            view = source.view(name)
            if not view.dtype.is_float:
                self.spool.add(
                    _PREFIX + name, view.read(0, size(view)).reshape(view.shape), view.dtype
                )
                continue
            wide = edits[name].dtype if name in edits else DTYPES["F64"]
            edit = Edit(name, wide, {"target": view})
            if name in edits:
                views = {"target": view, **edits[name].views}
                edit = replace(edits[name], views=views, target_factor=1.0)
            sink = InMemory([edit])
            apply_edits([edit], sink, replace(self.options, progress=silent))
            for place in (name, *([head] if head is not None else ())):
                self.spool.add(_PREFIX + place, sink.arrays[0].reshape(view.shape))


def _write(out: Path, found: Difference, work: _Work, modules: Sequence[str], start: str) -> int:
    """Publish the folder; the result is the size of the weights."""
    placed = sorted(work.spool.placed.values(), key=lambda p: (-p[0].dtype.itemsize, p[0].name))
    tensors = tuple(tensor for tensor, _ in placed)
    header = write_header(
        [(t.name, t.dtype, t.shape) for t in tensors],
        {"taskvec": "adapter", **about(found), "anchor_fingerprint": start},
    )
    shard = Shard(FILE, header, tensors)
    work.spool.file.flush()
    held: Array = np.memmap(work.spool.file, np.uint8, "r")
    key = json.dumps([start, os.getpid()])  # never taken up: factors are not made twice alike
    with staged(out, [shard], key, force=work.options.force) as staging:
        for i, (tensor, offset) in enumerate(placed):
            staging.write(i, 0, held[offset : offset + tensor.nbytes])
        text = json.dumps(_config(found, work, modules), indent=2, sort_keys=True)
        staging.add(CONFIG, text.encode() + b"\n")
        for name, content in found.members.sources[found.start].files.items():
            staging.add(name, content)  # a tokenizer that has tokens which the anchor lacks
        staging.publish()
    return shard.nbytes


def _config(found: Difference, work: _Work, modules: Sequence[str]) -> dict[str, Any]:
    """`adapter_config.json`; α = r everywhere, so that the scaling α / r is 1."""
    ranks = work.ranks
    usual = max(ranks.values(), default=1)
    other = {module: rank for module, rank in sorted(ranks.items()) if rank != usual}
    source = found.members.sources[found.start]
    architecture = str((source.config.get("architectures") or [""])[0])
    task_type = [t for end, t in _TASK_TYPES.items() if architecture.endswith(end)]
    return {
        "peft_type": "LORA",
        "task_type": task_type[0] if task_type else None,
        "base_model_name_or_path": hub_id(source, found.published) or None,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": _by_suffix(ranks, source.tensors),
        "modules_to_save": list(modules) or None,
        "fan_in_fan_out": any(work._is_conv1d(module) for module in ranks),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        **({"ensure_weight_tying": True} if _find_tie(found, modules) else {}),
    }


def _by_suffix(modules: Iterable[str], tensors: Iterable[str]) -> list[str]:
    """Modules as PEFT selects them: by their last name, where it selects no other module.

    >>> _by_suffix(["0.q", "1.q", "0.k"], ["0.q.weight", "1.q.weight", "0.k.weight", "1.k.weight"])
    ['0.k', 'q']
    """
    wanted = set(modules)
    others = {str(path) for n in tensors for path in PurePosixPath(n.replace(".", "/")).parents}
    others = {path.replace("/", ".") for path in others} - wanted
    taken = {path.rpartition(".")[2] for path in others}
    last = {module: module.rpartition(".")[2] for module in wanted}
    return sorted({module if name in taken else name for module, name in last.items()})


def _find_tie(found: Difference, modules: Sequence[str]) -> str | None:
    """The embedding that is kept whole and that the head is tied to, if there is one."""
    if not ties_head(found.members.sources[found.start], LANGUAGE_HEADS[0]):
        return None
    tied = [module for module in modules if f"{module}.weight".endswith(TOKEN_EMBEDDINGS)]
    return tied[0] if tied else None


def _warnings(found: Difference, modules: Sequence[str]) -> tuple[str, ...]:
    if _find_tie(found, modules) is None:
        return found.warnings
    return (
        *found.warnings,
        "the saved embedding is tied to the head: load the adapter with a PEFT that knows "
        "ensure_weight_tying (0.21 does), or the head keeps the old rows",
    )
