"""LoRA adapters as PEFT writes them: a task vector as it lies on disk.

`open_adapter` reads and checks the folder, `difference` says what it changes in the model that it
is put over: for a module with the matrices A (r, in) and B (out, r)

    τ = s · B A,    s = α / r,  or α / √r with `use_rslora`

in float32, without the rounding to the adapter's own dtype that PEFT does when it merges. Rank and
α may differ by module (`rank_pattern`, `alpha_pattern`: the first pattern that fits the end of the
module's name). What PEFT stores whole (`modules_to_save`, biases) takes the place of the model's.

LoRA on parameters (`target_parameters`), as those of experts in one tensor, has the matrices of all
experts in one: see `expert_changes`. Files of other tools than PEFT: see `loose_adapters`.

Source: PEFT 0.21, `tuners/lora/layer.py`, `utils/save_and_load.py`; LoRA, arXiv:2106.09685.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from taskvec import documents
from taskvec.checkpoints.folder import INDEX, PICKLED_REMEDY, SINGLE, Checkpoint, identify
from taskvec.checkpoints.loose_adapters import LooseAdapter, open_loose, resolve
from taskvec.checkpoints.low_rank import (
    Decomposed,
    LowRank,
    Moved,
    Replaced,
    ScaledChange,
    expert_changes,
)
from taskvec.checkpoints.memory import Held
from taskvec.checkpoints.names import Names
from taskvec.checkpoints.pickled import open_pickled_adapter
from taskvec.checkpoints.safetensors import TensorInfo, read_header
from taskvec.checkpoints.schema import AdapterConfig
from taskvec.checkpoints.source import Derived, Source, Sum
from taskvec.checkpoints.views import View
from taskvec.errors import CheckpointError, FamilyError
from taskvec.patterns import Pattern
from taskvec.validation import read_as

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|token_adapter\.trainable_tokens_delta|base_layer|original_module"
    r"|modules_to_save)(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_NOT_GATHERED = (
    "shards were not gathered when it was saved; save it again (DeepSpeed ZeRO-3, FSDP: gathered)"
)
_MERGE = "merge it in PEFT (merge_and_unload, save_pretrained) and give the whole model"
# Settings that change what the matrices mean, and how to call them.
_REFUSED = {
    "layer_replication": "replicated layers",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# Settings with which an adapter is no change of weights: what it adds depends on the input.
_DYNAMIC = {
    "alora_invocation_tokens": "activated LoRA, which changes only what follows some tokens",
    "arrow_config": "Arrow, which routes between adapters",
}
# Initialisations that take their matrices out of the model's weights.
_CHANGES_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Models whose linear layers are stored as (in, out); elsewhere `fan_in_fan_out` is set.
_STORED_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
# Models whose experts are stored as (experts, in, out).
_EXPERTS_TRANSPOSED = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
# Inside a block, what transformers 5 calls modules in memory, and files still do: ViT and its kin
# (BEiT, DeiT, MAE …), which also have `layers` for `encoder.layer`, and DINOv2.
_BLOCK = re.compile(r"(?P<root>(?:.+\.)?)(?:layers|encoder\.layer)\.(?P<block>\d+)\.(?P<rest>.+)")
_IN_FILES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "mlp.down_proj": "mlp.weights_out",
}
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
              "vocab.*", "merges.txt", "*.tiktoken", "spiece.model")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Adapter:
    """An opened adapter folder.

    Attributes:
        where: Path or hub name; for messages and manifests.
        stored: Its tensors under the names of the file.
        config: `adapter_config.json`.
        modules: Stored name by module, then by part (`lora_A`, `base_layer.weight` …).
        whole: Stored name of every tensor that takes the place of the model's, by its name there.
        loose: Of a file that is in no folder of PEFT, what its names say.
        indices: Names of the models that it was put over, by `id`.
    """

    where: str
    stored: Checkpoint | Held
    config: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, str]]
    whole: Mapping[str, str]
    loose: LooseAdapter | None = None
    indices: dict[int, Names] = field(default_factory=dict, repr=False)

    def tokenizer(self) -> dict[str, bytes]:
        """Tokenizer and chat template, which training leaves beside an adapter; may be none."""
        folder = self.stored.folder
        if folder is None:
            return {}
        found = {path for pattern in _TOKENIZER for path in folder.glob(pattern)}
        return {
            path.name: documents.read_bytes(path, documents.TOKENIZER, of=folder)
            for path in sorted(found)
            if not path.is_dir()
        }


def open_loose_adapter(path: Path) -> Adapter | None:
    """A LoRA file of another tool than PEFT; None if it is none. See `open_loose`."""
    loose = open_loose(path)
    if loose is None:
        return None
    return Adapter(str(path), loose.stored, {"scalings": loose.scalings}, loose.modules, {}, loose)


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    folder = Path(os.path.expanduser(path))  # noqa: PTH111 (unlike Path's, leaves ~nobody)
    is_model = (folder / SINGLE).exists() or (folder / INDEX).exists()
    return (folder / CONFIG).exists() and not is_model


def open_adapter(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Adapter:
    """Open an adapter folder and check what can be checked without the model that it is over.

    Args:
        path: The folder.
        allow_pickle: Whether `adapter_model.bin` may be read if there is no other file.

    Raises:
        CheckpointError: broken files, or a kind of adapter that is not supported.
    """
    folder = Path(os.path.expanduser(path)).absolute()  # noqa: PTH111
    config = documents.read_object(folder / CONFIG, documents.CONFIG, of=folder, non_finite=True)
    _check_kind(str(folder), config)
    stored = _stored(folder, allow_pickle=allow_pickle)
    modules, whole = _sorted_parts(str(folder), stored.tensors)
    return Adapter(str(folder), stored, config, modules, whole)


def _stored(folder: Path, *, allow_pickle: bool) -> Checkpoint | Held:
    """The tensors of an adapter folder."""
    if (folder / WEIGHTS).exists():
        identity = identify(folder / WEIGHTS)
        infos = {info.name: info for info in read_header(folder / WEIGHTS)}
        if not infos:
            raise CheckpointError(
                f"{folder}: {WEIGHTS} holds no tensors; is the download complete?"
            )
        return Checkpoint(
            path=folder,
            tensors={name: infos[name] for name in sorted(infos)},
            config={},
            stored=(identity,),
            _file_of=dict.fromkeys(infos, WEIGHTS),
        )
    if not (folder / PICKLED).exists():
        others = sorted(p.name for p in folder.glob("adapter_model*"))
        got = f"got {others[0]}; save it as one safetensors file" if others else "download it again"
        raise CheckpointError(f"{folder}: holds no {WEIGHTS}; {got}")
    if not allow_pickle:
        raise CheckpointError(f"{folder / PICKLED}: {PICKLED_REMEDY}")
    return open_pickled_adapter(folder / PICKLED)


def difference(
    adapter: Adapter,
    over: Source,
    *,
    exclude: Sequence[str] = (),
    token_rows: tuple[str, ...] = (),
) -> Derived:
    """What an adapter changes in the model that it is put over.

    Tensors of tokens that the adapter brings along whole may have other rows than the model's, as
    where tokens were added in training: what their rows are for is then for the family to say.

    Args:
        adapter: As opened.
        over: The model that it was trained over, or another of the same shapes.
        exclude: Shell patterns of tensors that may be missing there, such as a new classifier.
        token_rows: Ends of names of tensors whose rows are tokens.

    Returns:
        A source that is a difference: views are τ where a module was adapted, and weights where the
        adapter has whole tensors.

    Raises:
        CheckpointError: ranks or dtypes that do not agree with each other or with the config.
        FamilyError: a tensor that `over` lacks or has in another shape.
    """
    makers: dict[str, Callable[[], View]] = {}
    infos: dict[str, TensorInfo] = {}
    left_out: list[str] = []

    def add(name: str, stored: str, shape: tuple[int, ...], make: Callable[[], View]) -> None:
        if name in makers:
            _fail(adapter, f"changes {name!r} in two ways ({stored!r} is one)", _MERGE)
        makers[name] = make
        infos[name] = TensorInfo(name, adapter.stored.tensors[stored].dtype, shape, 0)

    for called, stored in adapter.whole.items():
        name = _adapted(adapter, called, over)
        fits = name is not None and over.tensors[name].shape == adapter.stored.tensors[stored].shape
        if not fits and any(fnmatchcase(name or called, pattern) for pattern in exclude):
            left_out.append(name or called)
            continue
        name = _present(adapter, over, called, name)
        shape = adapter.stored.tensors[stored].shape
        if 0 in shape and 0 not in over.tensors[name].shape:
            _fail(adapter, f"tensor {stored!r} has shape {list(shape)}", _NOT_GATHERED)
        may_grow = name.endswith(token_rows) and bool(shape) if token_rows else False
        expected = over.tensors[name].shape
        if shape != expected and not (may_grow and shape[1:] == expected[1:]):
            _misfit(adapter, over, stored, shape, name)
        add(name, stored, shape, partial(adapter.stored.view, stored))
    wrapped = _parameters(adapter, over)
    for module, parts in adapter.modules.items():
        if module in wrapped:
            called = wrapped[module]
            name = _adapted(adapter, called, over)
            if not any(fnmatchcase(name or called, pattern) for pattern in exclude):
                info, make = _of_parameter(adapter, over, called, parts)
                add(info.name, parts["lora_A"], info.shape, make)
            else:
                left_out.append(name or called)
            continue
        called = f"{module}.weight"
        is_there = _adapted(adapter, called, over) is not None
        if not is_there and any(fnmatchcase(called, pattern) for pattern in exclude):
            left_out.append(called)
            continue
        for name, stored, shape, make in _of_module(adapter, over, module, parts):
            add(name, stored, shape, make)
    return Derived(
        parts=(adapter.stored, over),
        how=f"adapter {json.dumps(adapter.config, sort_keys=True)}",
        tensors={name: infos[name] for name in sorted(infos)},
        make_view=lambda name: makers[name](),
        config=over.config,  # says whether the head is the embedding
        where=adapter.where,
        is_difference=True,
        left_out=tuple(left_out),
    )


def scaling_of(config: Mapping[str, Any], module: str) -> tuple[float, int]:
    """The factor s and the rank r of a module by the config.

    >>> scaling_of({"r": 8, "lora_alpha": 16, "rank_pattern": {"k_proj": 4}}, "layers.0.k_proj")
    (4.0, 4)
    """

    def matching(key: str, default: Any) -> Any:
        for pattern, value in (config.get(key) or {}).items():
            where = f"{key} {pattern[:60]!r}"
            fits = Pattern(rf"\A(.*\.)?({pattern})$", where, CheckpointError)
            if fits.search(module) is not None:
                return value
        return default

    rank = matching("rank_pattern", config.get("r", 8))
    alpha = matching("alpha_pattern", config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), rank


def _check_kind(where: str, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        said = f"is a {kind} adapter" if kind else f"{CONFIG} does not say peft_type"
        raise CheckpointError(f"{where}: {said}; only LoRA is supported: {_MERGE}")
    for key, meaning in _DYNAMIC.items():
        if config.get(key):
            raise CheckpointError(
                f"{where}: {key} ({meaning}) cannot be merged into weights by any tool; load it "
                "beside the model with PEFT"
            )
    for key, meaning in _REFUSED.items():
        if config.get(key):
            raise CheckpointError(f"{where}: {key} ({meaning}) is not supported; {_MERGE}")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_MODEL):
        raise CheckpointError(
            f"{where}: init_lora_weights {start!r} changed the model that the adapter is over when "
            "training began; save it with path_initial_model_for_weight_conversion, which makes "
            f"an ordinary LoRA of it, or {_MERGE}"
        )
    read_as(AdapterConfig, config, f"{where}/{CONFIG}", "use the one that was saved with it")


def _sorted_parts(
    where: str, tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Parts of adapted modules, and whole tensors: see `Adapter`."""
    modules: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    copies: dict[str, str] = {}
    names: set[str] = set()
    for stored in tensors:
        called = stored.removeprefix(PREFIX)
        match = _PART.fullmatch(called)
        if match is None:
            if ".lora_" in called or "." not in called:
                raise CheckpointError(f"{where}: tensor {stored!r} is not recognized; {_MERGE}")
            whole[called] = stored
            continue
        module, part, leaf = match["module"], match["part"], match["leaf"]
        names |= {match["adapter"]} - {None}
        if part == "original_module":
            continue  # what modules_to_save replaced
        if part == "modules_to_save":
            copies[f"{module}.{leaf}"] = stored
        elif part == "base_layer" and leaf == "bias":
            whole[f"{module}.bias"] = stored
        else:
            is_named = part in ("base_layer", "lora_B")
            modules.setdefault(module, {})[f"{part}.{leaf}" if is_named else part] = stored
    if len(names) > 1:
        raise CheckpointError(
            f"{where}: holds adapters {', '.join(sorted(names))}; save each in its own folder"
        )
    return modules, copies | whole


def _of_module(
    adapter: Adapter, over: Source, module: str, parts: Mapping[str, str]
) -> Iterator[tuple[str, str, tuple[int, ...], Callable[[], View]]]:
    """What an adapted module changes: name in the model, a stored name, shape, how to view it."""
    view = adapter.stored.view
    found = _adapted(adapter, f"{module}.weight", over)
    if found is None and parts.keys() == {"lora_A", "lora_B.weight"} and not adapter.loose:
        yield _of_part(adapter, module, parts)
        return
    name = _present(adapter, over, f"{module}.weight", found)
    if "token_adapter.trainable_tokens_delta" in parts:
        stored = parts["token_adapter.trainable_tokens_delta"]
        which = _token_rows(adapter, over, module, stored, name)
        order = np.argsort(which)
        known = {"which": which[order], "order": order}
        shape = over.tensors[name].shape
        yield name, stored, shape, lambda: Replaced(over.view(name), view(stored), **known)
        parts = {part: stored for part, stored in parts.items() if not part.startswith("token_")}
        if not parts:
            return
    is_embedding = "lora_embedding_A" in parts
    kinds = (
        ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B.weight")
    )
    for kind in kinds:
        if kind not in parts:
            _fail(adapter, f"has no {kind} of module {module!r}", "the file is incomplete")
    a, b = parts[kinds[0]], parts[kinds[1]]
    scaling, rank = _scaling(adapter, module)
    weight = over.tensors[name]
    base = parts.get("base_layer.weight")
    brought = adapter.stored.tensors[base] if base is not None else weight
    grown = brought.shape != weight.shape and brought.shape[1:] == weight.shape[1:]
    if grown:  # rows of tokens were added: what is adapted is the weight that was brought along
        weight = replace(brought, name=name)
    _check_shapes(adapter, over, (a, b), weight, rank)
    transposed = _is_transposed(adapter, over, (a, b), weight, is_embedding)
    shape = weight.shape
    make = partial(_product, adapter, (a, b), shape, (scaling, transposed, is_embedding))
    if "lora_magnitude_vector" in parts:
        m = parts["lora_magnitude_vector"]
        if transposed or len(over.tensors[name].shape) != 2:
            _fail(adapter, f"uses DoRA on {name!r}, which is not a plain linear layer", _MERGE)
        if adapter.stored.tensors[m].shape != over.tensors[name].shape[:1]:
            _misfit(adapter, over, m, adapter.stored.tensors[m].shape, name)
        yield name, a, shape, lambda: Decomposed(over.view(name), make(), view(m))
    elif adapter.config.get("use_dora"):
        _fail(adapter, f"uses DoRA and has no lora_magnitude_vector of {module!r}", _MERGE)
    elif base is not None and grown:
        yield name, a, shape, lambda: Sum(view(base), make())
    elif base is not None:
        if brought.shape != shape:
            _misfit(adapter, over, base, brought.shape, name)
        yield name, a, shape, lambda: Moved(make(), view(base), over.view(name))
    else:
        yield name, a, shape, make
    if "lora_B.bias" in parts:
        bias, called = parts["lora_B.bias"], f"{name.removesuffix('weight')}bias"
        called = _present(adapter, over, called, _adapted(adapter, called, over))
        if adapter.stored.tensors[bias].shape != over.tensors[called].shape:
            _misfit(adapter, over, bias, adapter.stored.tensors[bias].shape, called)
        shape = over.tensors[called].shape
        yield called, bias, shape, lambda: ScaledChange(view(bias), scaling)


def _scaling(adapter: Adapter, module: str) -> tuple[float, int]:
    """As `scaling_of`, for any adapter."""
    return adapter.loose.scalings[module] if adapter.loose else scaling_of(adapter.config, module)


def _of_part(
    adapter: Adapter, module: str, parts: Mapping[str, str]
) -> tuple[str, str, tuple[int, ...], Callable[[], View]]:
    """The change of a linear layer that the model may hold as part of another, under PEFT's name.

    Whether it does is for the family to say: q, k and v in one, experts in one.
    """
    a, b = (adapter.stored.tensors[parts[part]] for part in ("lora_A", "lora_B.weight"))
    scaling, _ = _scaling(adapter, module)
    name, shape = f"{module}.weight", (*b.shape[:1], *a.shape[1:])
    weight = TensorInfo(name, a.dtype, shape, 0)
    _check_shapes(adapter, None, (a.name, b.name), weight, scaling_of(adapter.config, module)[1])
    make = partial(_product, adapter, (a.name, b.name), shape, (scaling, False, False))
    return name, a.name, shape, make


def _parameters(adapter: Adapter, over: Source) -> dict[str, str]:
    """Parameters that are adapted themselves, by the module that PEFT stores the factors under.

    A module with several of them is wrapped once for each, in the order of its definition, which no
    file has: shapes say which is which, or else the order that experts have in transformers.
    """
    targets = adapter.config.get("target_parameters") or ()
    layers: dict[str, list[str]] = {}
    for module in adapter.modules if targets else ():
        layers.setdefault(re.sub(r"(\.base_layer)+$", "", module), []).append(module)
    found: dict[str, str] = {}
    for root, modules in layers.items():
        if len(modules) == 1 and _adapted(adapter, f"{root}.weight", over) is not None:
            continue  # a linear layer
        called = [f"{root}.{p}" for p in _of_root(root, targets)]
        there = [name for name in called if _adapted(adapter, name, over) is not None]
        called = sorted(there or called, key=_in_order)
        modules.sort(key=len, reverse=True)  # innermost first
        orders = [
            order
            for order in permutations(called, len(modules))
            if all(_may_be(adapter, over, *each) for each in zip(modules, order, strict=True))
        ]
        if not orders or (len(orders) > 1 and not all(n.endswith(_DEFINED) for n in called)):
            _fail(
                adapter,
                f"target_parameters {sorted(targets)} do not say what {modules[0]!r} changes",
                _MERGE,
            )
        found |= dict(zip(modules, orders[0], strict=True))
    return found


def _of_root(root: str, targets: Sequence[str]) -> list[str]:
    """Names of parameters of a module that `target_parameters` select."""
    split = [target.rpartition(".") for target in targets]
    return sorted({p for module, _, p in split if not module or f".{root}".endswith(f".{module}")})


_DEFINED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


def _in_order(name: str) -> int:
    leaf = name.rpartition(".")[2]
    return _DEFINED.index(leaf) if leaf in _DEFINED else len(_DEFINED)


def _may_be(adapter: Adapter, over: Source, module: str, called: str) -> bool:
    """Whether factors fit a parameter by their shapes; yes, if the model has it in parts."""
    name = _adapted(adapter, called, over)
    if name is None:
        return True
    a, b = (adapter.stored.tensors[adapter.modules[module][p]].shape for p in _PAIR)
    inner = over.tensors[name].shape[-2:]
    return inner in ((b[0], a[-1]), (a[-1], b[0]))


_PAIR = ("lora_A", "lora_B.weight")


def _of_parameter(
    adapter: Adapter, over: Source, called: str, parts: Mapping[str, str]
) -> tuple[TensorInfo, Callable[[], View]]:
    """The change of a parameter: of one matrix, or of the matrices of all experts."""
    if parts.keys() != set(_PAIR):
        _fail(adapter, f"has other than A and B of {called!r}", _MERGE)
    a, b = (adapter.stored.tensors[parts[part]] for part in _PAIR)
    scaling, rank = scaling_of(adapter.config, called)
    name = _adapted(adapter, called, over)
    are_factors = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]
    if not are_factors or a.shape[0] % rank:
        _fail(
            adapter,
            f"A and B of {called!r} have shapes {list(a.shape)} and {list(b.shape)}, by {CONFIG} "
            f"the rank is {rank}",
            "use the config that was saved with the weights",
        )
    count, plain = a.shape[0] // rank, (b.shape[0], a.shape[1])
    is_matrix = name is not None and len(over.tensors[name].shape) == 2
    lead = () if is_matrix else (count,)
    shape = (*lead, *plain)
    expected = shape if name is None else over.tensors[name].shape
    is_transposed = expected == (*lead, *plain[::-1]) and (
        plain[0] != plain[1] or over.config.get("model_type") in _EXPERTS_TRANSPOSED
    )
    if name is not None and not is_transposed and expected != shape:
        _misfit(adapter, over, b.name, shape, name)
    info = TensorInfo(name or called, a.dtype, expected, 0)
    if is_matrix:
        how = scaling, is_transposed, False
        return info, partial(_product, adapter, (a.name, b.name), expected, how)
    view = adapter.stored.view
    return info, lambda: expert_changes(
        view(a.name), view(b.name), expected, scaling, transposed=is_transposed
    )


def _product(
    adapter: Adapter,
    stored: tuple[str, str],
    shape: tuple[int, ...],
    how: tuple[float, bool, bool],
) -> LowRank:
    a, b = (adapter.stored.view(name) for name in stored)
    return LowRank(a, b, shape, *how)


def _check_shapes(
    adapter: Adapter,
    over: Source | None,
    stored: tuple[str, str],
    weight: TensorInfo,
    rank: int,
) -> None:
    """Raise `CheckpointError` for factors that are none, or of another rank."""
    name = weight.name
    a, b = (adapter.stored.tensors[n] for n in stored)
    for info in (a, b):
        if not info.dtype.is_float:
            _fail(adapter, f"tensor {info.name!r} is {info.dtype.name}", "floats are expected")
    if min(len(a.shape), len(b.shape)) < 2 or 0 in a.shape + b.shape:
        _fail(
            adapter,
            f"tensors of {name!r} have shapes {list(a.shape)} and {list(b.shape)}",
            _NOT_GATHERED,
        )
    if (a.shape[0], b.shape[1]) != (rank, rank) or math.prod(b.shape[2:]) != 1:
        _fail(
            adapter,
            f"A and B of {name!r} have shapes {list(a.shape)} and {list(b.shape)}, by {CONFIG} "
            f"the rank is {rank}",
            "use the config that was saved with the weights",
        )
    if not weight.dtype.is_float:
        _fail(adapter, f"tensor {name!r} that it is over is {weight.dtype.name}", _MERGE)


def _is_transposed(
    adapter: Adapter,
    over: Source,
    stored: tuple[str, str],
    weight: TensorInfo,
    is_embedding: bool,
) -> bool:
    """Whether the weight is stored as (in, out); factors of another shape are an error."""
    name = weight.name
    a, b = (adapter.stored.tensors[n] for n in stored)
    outs, ins = b.shape[0], a.shape[1:]
    fits, fits_transposed = weight.shape == (outs, *ins), weight.shape == (*ins, outs)
    if not fits and not fits_transposed:
        _misfit(adapter, over, b.name, (outs, *ins), name)
    if fits and fits_transposed and len(weight.shape) == 2:  # square: the shape does not say
        kind = over.config.get("model_type")
        return bool(adapter.config.get("fan_in_fan_out")) or (
            is_embedding or kind in _STORED_TRANSPOSED
        )
    return not fits


def _token_rows(
    adapter: Adapter, over: Source, module: str, stored: str, name: str
) -> np.ndarray[Any, Any]:
    """Numbers of the token rows that were trained, in the order in which they are stored."""
    said = adapter.config.get("trainable_token_indices") or []
    if isinstance(said, dict):
        ends = [key for key in said if module == key or module.endswith(f".{key}")]
        said = said[ends[0]] if ends else []
    expected = (len(said), *over.tensors[name].shape[1:])
    if expected != adapter.stored.tensors[stored].shape or len(set(said)) != len(said):
        _fail(adapter, f"trainable_token_indices in {CONFIG} do not fit {stored!r}", _MERGE)
    which = np.array(said, np.int64)
    if len(which) and not 0 <= which.min() <= which.max() < over.tensors[name].shape[0]:
        _fail(adapter, f"trains token {which.max()}, which {name!r} has no row for", _MERGE)
    return which


def find_tensor(called: str, tensors: Mapping[str, TensorInfo] | Names) -> str | None:
    """The model's name of a tensor that an adapter or a vector may call otherwise; see `Names`."""
    names = tensors if isinstance(tensors, Names) else Names(tensors)
    found = names.find(called)
    return found[0] if len(found) == 1 else None


def _adapted(adapter: Adapter, called: str, over: Source) -> str | None:
    """The model's name of a tensor that PEFT calls what it is called in memory."""
    if adapter.loose is not None:
        return _resolved(adapter, adapter.loose, called, over)
    names = adapter.indices.setdefault(id(over), Names(over.tensors))
    name, block = find_tensor(called, names), _BLOCK.fullmatch(called)
    if name is not None or block is None:
        return name
    rest = block["rest"]
    module = next((each for each in _IN_FILES if rest.startswith(f"{each}.")), "")
    rest = _IN_FILES.get(module, "") + rest.removeprefix(module)
    return find_tensor(f"{block['root']}encoder.layer.{block['block']}.{rest}", names)


def _resolved(adapter: Adapter, loose: LooseAdapter, called: str, over: Source) -> str | None:
    """The model's name of a tensor that another tool than PEFT calls otherwise."""
    module = called.removesuffix(".weight")
    root = loose.roots.get(module, "")
    if module not in loose.underscored:
        names = adapter.indices.setdefault(id(over), Names(over.tensors))
        return find_tensor(called, names) or find_tensor(called.removeprefix(root), names)
    found = resolve(called, root, loose.index(over.tensors))
    if len(found) > 1:
        raise FamilyError(
            f"{adapter.where}: {called!r} may be {found[0]!r} or {found[1]!r} of the model that it "
            f"is over ({over.where}); leave it out with exclude: [{called!r}], or {_MERGE}"
        )
    return found[0] if found else None


def _present(adapter: Adapter, over: Source, called: str, name: str | None) -> str:
    if name is None:
        remedy = f"or {_MERGE}"
        if adapter.loose is not None:
            root = adapter.loose.roots.get(called.removesuffix(".weight"), "")
            remedy = f"or leave it out with exclude: ['{root}*']" if root else "or exclude it"
        raise FamilyError(
            f"{adapter.where}: changes {called!r}, which the model that it is over "
            f"({over.where}) lacks; give the model that it was trained over, {remedy}"
        )
    return name


def _misfit(
    adapter: Adapter, over: Source, stored: str, shape: tuple[int, ...], name: str
) -> NoReturn:
    raise FamilyError(
        f"{adapter.where}: {stored!r} is for a tensor of shape {list(shape)}, {name!r} of the "
        f"model that it is over ({over.where}) has {list(over.tensors[name].shape)}; give the "
        "model that it was trained over"
    )


def _fail(adapter: Adapter, what: str, remedy: str) -> NoReturn:
    raise CheckpointError(f"{adapter.where}: {what}; {remedy}")
