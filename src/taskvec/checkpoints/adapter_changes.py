"""What an adapter changes in the model that it is over, tensor by tensor, as views.

`difference` finds the tensor of the model that each part of an adapter is for. A linear layer that
the model does not have by itself may be part of a fused tensor, or the other way round; that is for
the family to say. `open_adapter` says what the parts are, `low_rank` how they are worked out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import permutations
from typing import Any, NoReturn

import numpy as np

from taskvec.checkpoints.adapters import CONFIG, MERGE, Adapter, scaling_of
from taskvec.checkpoints.loose_adapters import LooseAdapter, resolve
from taskvec.checkpoints.low_rank import (
    Decomposed,
    LowRank,
    Moved,
    Replaced,
    ScaledChange,
    expert_changes,
)
from taskvec.checkpoints.names import CONV1D_MODELS, Names, find_tensor
from taskvec.checkpoints.safetensors import TensorInfo
from taskvec.checkpoints.source import Derived, Source, Sum
from taskvec.checkpoints.views import View
from taskvec.errors import CheckpointError, FamilyError

_NOT_GATHERED = (
    "shards were not gathered when it was saved; save it again (DeepSpeed ZeRO-3, FSDP: gathered)"
)
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
            _fail(adapter, f"changes {name!r} in two ways ({stored!r} is one)", MERGE)
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
            _fail(adapter, f"uses DoRA on {name!r}, which is not a plain linear layer", MERGE)
        if adapter.stored.tensors[m].shape != over.tensors[name].shape[:1]:
            _misfit(adapter, over, m, adapter.stored.tensors[m].shape, name)
        yield name, a, shape, lambda: Decomposed(over.view(name), make(), view(m))
    elif adapter.config.get("use_dora"):
        _fail(adapter, f"uses DoRA and has no lora_magnitude_vector of {module!r}", MERGE)
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
            for order in permutations(called[:_MOST], len(modules))
            if all(_may_be(adapter, over, *each) for each in zip(modules, order, strict=True))
        ]
        if not orders or (len(orders) > 1 and not all(n.endswith(_DEFINED) for n in called)):
            _fail(
                adapter,
                f"target_parameters {sorted(targets)} do not say what {modules[0]!r} changes",
                MERGE,
            )
        found |= dict(zip(modules, orders[0], strict=True))
    return found


def _of_root(root: str, targets: Sequence[str]) -> list[str]:
    """Names of parameters of a module that `target_parameters` select."""
    split = [target.rpartition(".") for target in targets]
    return sorted({p for module, _, p in split if not module or f".{root}".endswith(f".{module}")})


_MOST = 6  # parameters of one module; transformers has at most four in its experts
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
        _fail(adapter, f"has other than A and B of {called!r}", MERGE)
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
        _fail(adapter, f"tensor {name!r} that it is over is {weight.dtype.name}", MERGE)


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
        # PEFT goes by the layer's class; over linear layers its flag may be set for nothing.
        is_own = kind is None or "auto_map" in over.config
        is_said = is_own and bool(adapter.config.get("fan_in_fan_out"))
        return is_embedding or kind in CONV1D_MODELS or is_said
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
        _fail(adapter, f"trainable_token_indices in {CONFIG} do not fit {stored!r}", MERGE)
    which = np.array(said, np.int64)
    if len(which) and not 0 <= which.min() <= which.max() < over.tensors[name].shape[0]:
        _fail(adapter, f"trains token {which.max()}, which {name!r} has no row for", MERGE)
    return which


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
            f"is over ({over.where}); leave it out with exclude: [{called!r}], or {MERGE}"
        )
    return found[0] if found else None


def _present(adapter: Adapter, over: Source, called: str, name: str | None) -> str:
    if name is None:
        remedy = f"or {MERGE}"
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
