"""A LoRA adapter as the result: what changed in a model, as matrices of low rank that PEFT loads.

Where every change to a weight is that of adapters, their factors are stacked, which loses nothing.
Else the weight of a linear layer becomes B A by a singular value decomposition, at a given rank.
What else differs (norms, biases, embeddings, experts) has no place in B A: it is refused, dropped,
or kept whole as PEFT's `modules_to_save`, as the caller says. One matrix is held at a time, and two
to five times its size while it is factored; finished factors wait in an unnamed file beside the
output.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np

from taskvec.checkpoints.factored import FactorStack, stack
from taskvec.checkpoints.fingerprint import chunk_digests, fingerprint, tensor_digest
from taskvec.checkpoints.names import CONV1D_MODELS, TRAINERS
from taskvec.checkpoints.naming import hub_id
from taskvec.checkpoints.quantised import DEQUANTISED
from taskvec.checkpoints.safetensors import write_header
from taskvec.checkpoints.shards import OutputTensor, Shard
from taskvec.checkpoints.source import Derived, Source, widened
from taskvec.checkpoints.views import size
from taskvec.dtypes import DTYPES, DType
from taskvec.errors import OutputError, ParameterError, UsageError
from taskvec.family.members import Members
from taskvec.family.opening import ties_head
from taskvec.family.vocabulary import token_metadata
from taskvec.layers import LANGUAGE_HEADS, TOKEN_EMBEDDINGS, LayerKey, model_order
from taskvec.merging.apply import InMemory, Record, apply_edits
from taskvec.merging.changes import is_difference, less_target
from taskvec.merging.edits import Edit
from taskvec.outputs.staging import in_words, staged
from taskvec.recipes.recipe import RESTS
from taskvec.statistics.collect import address
from taskvec.statistics.svd import factors, generator, squared_error, squared_norm
from taskvec.streaming import RunOptions, silent

FILE = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
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
        rank: Of every matrix, at the most; None if `energy` says it, or factors are stacked.
        energy: Share of each ‖τ‖² to keep, in (0, 1]; the rank then differs by matrix.
        rest: What becomes of tensors that are no linear weights: `refuse`, `drop` or `save`.
        seed: Of the random projections.
        dtype: Of the factors.
        stacks: Whether factors of adapters are stacked where that is all that changes a weight.
    """

    rank: int | None = None
    energy: float | None = None
    rest: str = "refuse"
    seed: int = 0
    dtype: DType = DTYPES["F32"]
    stacks: bool = False

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ParameterError(f"rank must be a whole number above 0; got {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ParameterError(f"energy must be in (0, 1]; got {self.energy:g}")
        if self.rest not in RESTS:
            raise ParameterError(f"rest must be in {' | '.join(RESTS)}; got {self.rest!r}")


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter holds, before weights are read for it.

    Attributes:
        name: In words.
        members: As opened.
        over: Role of the model that the adapter is for.
        edits: Differences of the tensors that differ, in name order.
        whole: From one of them, the edit whose result is the changed tensor itself.
        metadata: What the file says of itself.
        published: Names on the hub of local models, by path.
    """

    name: str
    members: Members
    over: str
    edits: tuple[Edit, ...]
    whole: Callable[[Edit], Edit]
    metadata: Mapping[str, str]
    published: Mapping[str, str]

    @property
    def model(self) -> Source:
        """The model that the adapter is for."""
        return self.members.sources[self.over]


@dataclass(frozen=True, slots=True)
class Factored:
    """What became of one tensor of a difference in a LoRA adapter.

    Attributes:
        name: Parameter name.
        kept: `stacked` (factors of adapters, nothing lost), `lora`, `saved` or `dropped`.
        rank: Of B A; None unless `stacked` or `lora`.
        norm: ‖τ‖.
        error: ‖τ − B A‖ / ‖τ‖ of the factors as stored; 0 if saved, 1 if dropped.
    """

    name: str
    kept: str
    rank: int | None
    norm: float
    error: float


@dataclass(frozen=True, slots=True)
class Written:
    """An adapter that is about to be published.

    Attributes:
        rows: What became of each tensor that differs, in the order of the model.
        records: Digests of what was read, by tensor, then by role; of the difference as `output`.
        digests: Of the tensors of the adapter, by name.
        fingerprint: Of the adapter by content.
        start: Fingerprint of the tensors that it changes, as the model has them.
        files: Beside the weights, by name.
        nbytes: Size of the weights.
    """

    rows: tuple[Factored, ...]
    records: Mapping[str, Record]
    digests: Mapping[str, str]
    fingerprint: str
    start: str
    files: Mapping[str, bytes]
    nbytes: int

    @property
    def lost(self) -> float:
        """The share of ‖τ‖² of the whole model that the adapter lacks."""
        total = math.fsum(row.norm**2 for row in self.rows)
        return math.fsum((row.norm * row.error) ** 2 for row in self.rows) / (total or 1.0)

    def to_json(self) -> dict[str, Any]:
        """What a manifest says of the adapter: errors, and digests of the differences."""
        return {
            "tensors": [asdict(row) for row in self.rows],
            "error": math.sqrt(self.lost),
            "differences": {name: record["output"] for name, record in self.records.items()},
        }


# What becomes of a tensor: a stack, the low rank of a linear weight, or none of these.
Kinds = dict[str, FactorStack | str | None]


def _is_wrapped(name: str) -> bool:
    return name.startswith("module.") or not TRAINERS.isdisjoint(name.split("."))


def write_adapter(
    change: Change,
    shape: AdapterShape,
    out: Path,
    options: RunOptions,
    more: Callable[[Written], Mapping[str, bytes]] = lambda written: {},
) -> Written:
    """Write a change of a model as a folder that PEFT loads.

    Args:
        change: What differs.
        shape: Rank, and what becomes of the rest.
        out: Folder to appear.
        options: How to run.
        more: Further files beside the weights.

    Raises:
        UsageError: tensors that differ have no place, or need a rank.
        OutputError: the folder cannot be written there, or a factor overflows the dtype.
    """
    wrapped = [edit.name for edit in change.edits if _is_wrapped(edit.name)]
    if wrapped:
        raise UsageError(
            f"{change.model.where}: its tensors have the names of a trainer's wrapper, such as "
            f"{wrapped[0]!r}, under which PEFT would not find them; write a whole model, or save "
            "this one again with transformers"
        )
    kinds = kinds_of(change, shape)
    modules = _modules_to_save(kinds) if shape.rest == "save" else []
    _check_kinds(change, kinds, shape)
    tied = tied_embedding(change, modules)
    if tied is not None and not tied.endswith("embed_tokens"):
        raise UsageError(
            f"{tied!r} is tied to the head, which PEFT would part from it; exclude it, or take "
            "--rest drop"
        )
    work = _Work(change, shape, options)
    with in_words(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent) as file:
            work.spool = _Spool(file, shape.dtype)
            for edit in change.edits:
                work.factor(edit, kinds[edit.name], modules)
            for module in modules:
                work.save(module, head=LANGUAGE_HEADS[0] if module == tied else None)
            for source in change.members.distinct:
                source.check_unchanged()
            return _write(out, work, modules, more)


def kinds_of(change: Change, shape: AdapterShape, *, reads: bool = True) -> Kinds:
    """What becomes of each tensor that differs.

    Args:
        change: What differs.
        shape: Of the adapter.
        reads: Whether weights may be read to see that a stack is exact; without, it is taken to be.
    """
    keys = change.members.keys
    kinds: Kinds = {}
    for edit in change.edits:
        found = _stacked(edit) if shape.stacks else None
        if found is not None and reads and not found.is_exact():
            found = None
        kinds[edit.name] = found or _linear(edit, keys[edit.name])
    original = change.model
    while original.parts and not (isinstance(original, Derived) and original.how == DEQUANTISED):
        original = original.parts[0]  # shapes of codes say nothing of the weight's
    grown = token_metadata(change.model)[1]  # rows that the model lacks as it is stored
    for name, info in change.model.tensors.items():
        is_other = name in original.tensors and original.tensors[name].shape != info.shape
        if name in grown or (is_other and name in kinds):
            kinds[name] = None
    return kinds


def _stacked(edit: Edit) -> FactorStack | None:
    """The change of a weight as a stack, if it is a sum of changes by adapters."""
    views = [(edit.views[role], c) for role, c in edit.terms.items()]
    is_plain = is_difference(edit) and edit.name.endswith(".weight")
    return stack(views) if views and is_plain else None


def _linear(edit: Edit, key: LayerKey) -> str | None:
    """`lora` for the weight of a linear layer, None for anything else."""
    is_linear = key.module in ("attention", "mlp", "head") and key.projection != "router"
    is_matrix = len(edit.like.shape) == 2 and edit.name.endswith(".weight")
    return "lora" if is_linear and is_matrix and key.expert is None else None


def _check_kinds(change: Change, kinds: Kinds, shape: AdapterShape) -> None:
    if not change.edits:
        raise UsageError(f"the {change.name} changes nothing; an adapter would be empty")
    _refuse_rest(kinds, shape.rest)
    if not any(kinds.values()):
        raise UsageError(
            f"the {change.name} leaves no weight of a linear layer to be factored (a layer whose "
            "bias differs is saved whole); take --rest drop, or extract a vector"
        )
    full = [name for name, kind in kinds.items() if kind == "lora"]
    if full and shape.rank is None and shape.energy is None:
        raise UsageError(
            f"{full[0]!r} ({len(full)} tensors) changes by more than the factors of adapters, so "
            "that no stack of them is the sum; give a rank, such as out: {form: lora, rank: 16}"
        )


def _refuse_rest(kinds: Kinds, rest: str) -> None:
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


def _modules_to_save(kinds: Kinds) -> list[str]:
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
    digests: dict[str, str] = field(default_factory=dict)

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
        self.digests[name] = tensor_digest([chunk_digests(stored)])
        self.file.write(stored.data)
        return widened(stored, kind).reshape(shape)


class _Layout(NamedTuple):
    """How B A lies in a weight, and what PEFT calls the factors.

    Attributes:
        is_transposed: Whether the weight is stored as (in, out).
        inner: Dimensions of A after the rank.
        is_embedding: Whether the factors are those of an embedding.
    """

    is_transposed: bool
    inner: tuple[int, ...]
    is_embedding: bool

    def matrix(self, tau: Array) -> Array:
        """A change as the matrix B A."""
        return tau.T if self.is_transposed else tau.reshape(len(tau), -1)

    def named(self, module: str, left: Array, right: Array) -> dict[str, Array]:
        """The factors as PEFT stores them, by name."""
        kind, end = ("lora_embedding_", "") if self.is_embedding else ("lora_", ".weight")
        ones = (1,) * (len(self.inner) - 1)
        return {
            f"{_PREFIX}{module}.{kind}B{end}": left.reshape(*left.shape, *ones),
            f"{_PREFIX}{module}.{kind}A{end}": right.reshape(len(right), *self.inner),
        }


@dataclass(slots=True)
class _Work:
    """Factoring of one difference after the other."""

    change: Change
    shape: AdapterShape
    options: RunOptions
    spool: _Spool = field(init=False)
    rows: list[Factored] = field(default_factory=list)
    records: dict[str, Record] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    transposed: list[str] = field(default_factory=list)

    def factor(self, edit: Edit, kind: FactorStack | str | None, modules: Sequence[str]) -> None:
        """Factor one matrix, or only measure what has another place or none."""
        with self.options.progress("factor", edit.read_bytes) as advance:
            tau = read_difference(edit, self.options, self.records)
            advance(edit.read_bytes)
        norm = math.sqrt(squared_norm(tau.reshape(len(tau) if tau.ndim > 1 else 1, -1)))
        module = _module(edit.name)
        if kind is None:
            saved = module in modules
            kept, error = ("saved", 0.0) if saved else ("dropped", 1.0)
            self.rows.append(Factored(edit.name, kept, None, norm, error))
            return
        if norm == 0:
            return
        layout = self._layout(edit, kind, module)
        matrix = layout.matrix(tau)
        if isinstance(kind, FactorStack) and (
            self.shape.rank is None or kind.rank <= self.shape.rank
        ):
            left, right = kind.factors()
            kept = "stacked"
        else:
            left, right = factors(
                matrix,
                rank=self.shape.rank,
                energy=self.shape.energy,
                random=generator(self.shape.seed, edit.name),
            )
            kept = "lora"
        stored = {n: self.spool.add(n, x) for n, x in layout.named(module, left, right).items()}
        left, right = (
            x.reshape(y.shape) for x, y in zip(stored.values(), (left, right), strict=True)
        )
        self.ranks[module] = len(right)
        error = math.sqrt(squared_error(matrix, left, right)) / norm
        self.rows.append(Factored(edit.name, kept, len(right), norm, error))

    def _layout(self, edit: Edit, kind: FactorStack | str, module: str) -> _Layout:
        shape = edit.like.shape
        if isinstance(kind, FactorStack):
            layout = _Layout(
                kind.is_transposed,
                (shape[0],) if kind.is_transposed else shape[1:],
                kind.is_embedding,
            )
        else:
            model = self.change.model.config.get("model_type")
            is_conv1d = model in CONV1D_MODELS and module.rpartition(".")[2] in _CONV1D
            layout = _Layout(is_conv1d, shape[:1] if is_conv1d else shape[1:], is_embedding=False)
        if layout.is_transposed and not layout.is_embedding:
            self.transposed.append(module)
        return layout

    def save(self, module: str, head: str | None) -> None:
        """Every tensor of a module with its change.

        PEFT asks for a head that is tied to the module under its own name as well.
        """
        source = self.change.model
        edits = {edit.name: edit for edit in self.change.edits}
        for name in [n for n in source.tensors if _module(n) == module]:
            view = source.view(name)
            if not view.dtype.is_float:
                self.spool.add(
                    _PREFIX + name, view.read(0, size(view)).reshape(view.shape), view.dtype
                )
                continue
            edit = Edit(name, DTYPES["F64"], {"target": view})
            if name in edits:
                edit = self.change.whole(edits[name])
            sink = InMemory([edit])
            apply_edits([edit], sink, replace(self.options, progress=silent))
            for place in (name, *([head] if head is not None else ())):
                self.spool.add(_PREFIX + place, sink.arrays[0].reshape(view.shape))


def read_difference(edit: Edit, options: RunOptions, records: dict[str, Record]) -> Array:
    """The difference of one tensor; its digests go into `records`."""
    sink = InMemory([edit])
    record = apply_edits([edit], sink, replace(options, progress=silent))[edit.name]
    target = edit.views.get("target")
    found = sink.arrays[0]
    if target is not None and not is_difference(edit):
        found = less_target(edit, found, target.read(0, size(target)))
        record = {**record, "output": tensor_digest([chunk_digests(np.ascontiguousarray(found))])}
    records[edit.name] = record
    return found.reshape(edit.like.shape)


def start_fingerprint(change: Change, records: Mapping[str, Record]) -> str:
    """Fingerprint of the tensors that are changed, as the model has them."""
    tensors, role = change.model.tensors, change.over
    digests = {name: record[role] for name, record in records.items() if role in record}
    described = {name: (tensors[name].dtype.name, tensors[name].shape) for name in digests}
    return fingerprint(digests, described)


def _write(
    out: Path,
    work: _Work,
    modules: Sequence[str],
    more: Callable[[Written], Mapping[str, bytes]],
) -> Written:
    """Publish the folder."""
    if not work.spool.placed:
        raise UsageError(f"the {work.change.name} changes nothing; an adapter would be empty")
    placed = sorted(work.spool.placed.values(), key=lambda p: (-p[0].dtype.itemsize, p[0].name))
    tensors = tuple(tensor for tensor, _ in placed)
    start = start_fingerprint(work.change, work.records)
    header = write_header(
        [(t.name, t.dtype, t.shape) for t in tensors],
        {"taskvec": "adapter", **work.change.metadata, "anchor_fingerprint": start},
    )
    shard = Shard(FILE, header, tensors)
    config = json.dumps(_config(work, modules), indent=2, sort_keys=True)
    # A tokenizer that has tokens which the model lacks.
    files = {CONFIG: config.encode() + b"\n", **work.change.model.files}
    keys = work.change.members.keys
    rows = {
        model_order(key.tower, key.block, key.module, row.name): row
        for row in work.rows
        for key in [keys[row.name]]
    }
    written = Written(
        rows=tuple(rows[place] for place in sorted(rows)),
        records=work.records,
        digests=work.spool.digests,
        fingerprint=fingerprint(
            work.spool.digests, {t.name: (t.dtype.name, t.shape) for t in tensors}
        ),
        start=start,
        files=files,
        nbytes=shard.nbytes,
    )
    work.spool.file.flush()
    held: Array = np.memmap(work.spool.file, np.uint8, "r")
    key = json.dumps([start, os.getpid()])  # never taken up: factors are not made twice alike
    with staged(out, [shard], key, force=work.options.force) as staging:
        for i, (tensor, offset) in enumerate(placed):
            staging.write(i, 0, held[offset : offset + tensor.nbytes])
        for name, content in {**files, **more(written)}.items():
            staging.add(name, content)
        staging.publish()
    return written


def _config(work: _Work, modules: Sequence[str]) -> dict[str, Any]:
    """`adapter_config.json`; α = r everywhere, so that the scaling α / r is 1."""
    ranks, change = work.ranks, work.change
    usual = max(ranks.values(), default=1)
    other = {module: rank for module, rank in sorted(ranks.items()) if rank != usual}
    source = change.model
    architecture = str((source.config.get("architectures") or [""])[0])
    task_type = [t for end, t in _TASK_TYPES.items() if architecture.endswith(end)]
    return {
        "peft_type": "LORA",
        "task_type": task_type[0] if task_type else None,
        "base_model_name_or_path": hub_id(source, change.published) or None,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": _by_suffix(ranks, source.tensors),
        "modules_to_save": list(modules) or None,
        "fan_in_fan_out": bool(work.transposed),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        **({"ensure_weight_tying": True} if tied_embedding(change, modules) else {}),
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


def tied_embedding(change: Change, modules: Sequence[str]) -> str | None:
    """The embedding that is kept whole and that the head is tied to, if there is one."""
    if not ties_head(change.model, LANGUAGE_HEADS[0]):
        return None
    tied = [module for module in modules if f"{module}.weight".endswith(TOKEN_EMBEDDINGS)]
    return tied[0] if tied else None


def tied_warning(change: Change, written: Written) -> tuple[str, ...]:
    """What to know where an embedding that is kept whole is tied to the head."""
    config = json.loads(written.files[CONFIG])
    if tied_embedding(change, config["modules_to_save"] or []) is None:
        return ()
    return (
        "the saved embedding is tied to the head: load the adapter with a PEFT that knows "
        "ensure_weight_tying (0.21 does), or the head keeps the old rows",
    )
