"""Which parameters of a module train: presets that the layer table resolves, and name patterns.

```text
attention         weights of W_q, W_k, W_v, W_o: what arXiv 2407.07089 trains
attention-qv      some of them, by letter
attention+bias    with their biases; also attention-qv+bias
mlp, linear       weights of the linear layers of the MLPs; of attention and MLPs. +bias as above
norms             every normalisation but those of heads
embeddings, heads
all               everything
a name or a shell pattern of names, such as `*.layers.11.*`
vision:attention  only in that tower
!heads            what is taken away from the rest
```

Entries are joined by commas: `attention,norms`. Heads and embeddings are in none of the first five.
Cross-attention counts as attention; the experts and the router of a mixture as MLP. Not attention:
norms of queries and keys, relative position biases, the scale of the attention's output.

Where W_q, W_k and W_v are one tensor, a part of them is rows of it: see `taskvec.training.rows`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Final

import numpy as np

from taskvec.errors import ParameterError, UsageError, nearest
from taskvec.layers import MODULES, LayerKey, Override, classify
from taskvec.training.rows import (
    Mask,
    RowRanges,
    axis_of,
    is_linear,
    is_multihead,
    layout_of,
    rows_in,
    whole_of,
)

if TYPE_CHECKING:
    from torch import nn

PRESETS: Final = ("attention", "mlp", "linear", "norms", "embeddings", "heads", "all")
_PRESET: Final = re.compile(
    r"(?P<linear>attention|mlp|linear)(?:(?<=attention)-(?P<letters>[qkvo]+))?(?P<bias>\+bias)?"
    r"|(?P<whole>norms|embeddings|heads|all)"
)
_MODULES: Final = {
    "attention": ("attention",),
    "mlp": ("mlp",),
    "linear": ("attention", "mlp"),
    "norms": ("norm", "final_norm"),
    "embeddings": ("embedding",),
    "heads": ("head",),
    "all": MODULES,
}
_NOT_LINEAR: Final = ("scale", "relative_bias", "bias_k", "bias_v")  # projections, but no maps
_LETTERS: Final = frozenset("qkvo")
# Parameters of nn.MultiheadAttention: (module, projection), independent of the module's name.
_MULTIHEAD: Final = {
    "in_proj_weight": "qkv",
    "in_proj_bias": "qkv",
    "q_proj_weight": "q",
    "k_proj_weight": "k",
    "v_proj_weight": "v",
    "out_proj.weight": "o",
    "out_proj.bias": "o",
    "bias_k": "bias_k",
    "bias_v": "bias_v",
}


@dataclass(frozen=True, slots=True)
class ParameterSelection:
    """Parameters that train.

    Attributes:
        names: As `named_parameters` has them, in its order; of tied ones the first name.
        rows: Of fused projections that train in part: which rows do. Absent: all.
        parameters: How many entries train.
        total: How many the module has.
    """

    names: tuple[str, ...]
    rows: Mapping[str, RowRanges]
    parameters: int
    total: int

    @property
    def share(self) -> float:
        """Of all entries, those that train."""
        return self.parameters / self.total


def select(
    module: nn.Module, train: str | Sequence[str] = "attention", layers: Sequence[Override] = ()
) -> ParameterSelection:
    """The parameters that `train` means in a module.

    Args:
        module: Any module of torch; names that the layer table does not know are taken by pattern,
            or described by `layers`. An `nn.MultiheadAttention` is known under any name.
        train: Entries as above, in one string or several.
        layers: Overrides of the layer table, as of a recipe.

    Raises:
        ParameterError: an entry is unknown or matches nothing, nothing is left, the rows of a
            fused projection are unknown, or a selected module has unknown tensors.
    """
    model = _model(module, layers)
    entries = _entries(train)
    chosen: dict[str, Mask] = {}
    for entry in (e for e in entries if not e.startswith("!")):
        for name, mask in _find(model, entry).items():
            chosen[name] = chosen[name] | mask if name in chosen else mask
    for entry in (e for e in entries if e.startswith("!")):
        for name, mask in _find(model, entry[1:]).items():
            if name in chosen:
                chosen[name] = chosen[name] & ~mask
    names = [name for name in model.shapes if name in chosen and chosen[name].any()]
    if not names:
        raise ParameterError(f"train {','.join(entries)!r} leaves nothing; {_summary(model)}")
    parameters = dict(module.named_parameters())
    for name in names:
        if not parameters[name].is_floating_point():
            raise ParameterError(
                f"train {','.join(entries)!r} selects {name!r}, which is {parameters[name].dtype}; "
                "only floating-point weights train: load the model unquantised, or use lora"
            )
    parts = {n: rows_in(chosen[n], model.axes[n]) for n in names if not chosen[n].all()}
    sizes = {name: prod(shape) for name, shape in model.shapes.items()}
    training = sum(round(sizes[name] * float(chosen[name].mean())) for name in names)
    return ParameterSelection(tuple(names), parts, training, sum(sizes.values()))


def freeze_rest(module: nn.Module, selection: ParameterSelection) -> None:
    """Let gradients be taken of the selected parameters and of no others.

    Rows that do not train are part of tensors that do: see `taskvec.training.rows.hold_rows`.

    Raises:
        UsageError: the selection is of another module.
    """
    parameters = dict(module.named_parameters())
    check_names(selection, parameters)
    wanted = set(selection.names)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in wanted)


def check_names(selection: ParameterSelection, names: Iterable[str]) -> None:
    """Raise `UsageError` if a selection names parameters that a module lacks."""
    missing = sorted(set(selection.names) - set(names))
    if missing:
        raise UsageError(
            f"the selection names {missing[0]!r} ({len(missing)} such), which the module lacks; "
            "select on the module that is trained"
        )


def describe(selection: ParameterSelection) -> str:
    """What trains, in one line.

    >>> describe(ParameterSelection(("a", "b"), {}, 60, 200))
    'trains 2 tensors, 60 of 200 parameters (30.0 %)'
    """
    tensors = f"{len(selection.names)} tensor" + ("s" if len(selection.names) != 1 else "")
    part = f" ({len(selection.rows)} of them in part)" if selection.rows else ""
    return (
        f"trains {tensors}{part}, {selection.parameters:,} of {selection.total:,} parameters "
        f"({100 * selection.share:.1f} %)"
    )


def _entries(train: str | Sequence[str]) -> list[str]:
    words = [train] if isinstance(train, str) else list(train)
    entries = [entry.strip() for word in words for entry in word.split(",")]
    if not any(entries):
        raise ParameterError(f"train is empty; give {' | '.join(PRESETS)}, or names of parameters")
    return [entry for entry in entries if entry]


@dataclass(frozen=True, slots=True)
class _Model:
    """What is known of a module's parameters.

    Attributes:
        module: Itself.
        keys: Of every parameter's every name; tied ones have several.
        first: The name by which each goes, by every name.
        known: Names known from an override or from the type of their module.
        shapes: By first name.
        axes: By first name: the dimension of its output rows.
    """

    module: nn.Module
    keys: dict[str, LayerKey] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)


def _model(module: nn.Module, layers: Sequence[Override]) -> _Model:
    model = _Model(module)
    names: dict[int, str] = {}
    multihead = {
        f"{path}." if path else "" for path, m in module.named_modules() if is_multihead(m)
    }
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        model.first[name] = first
        model.keys[name] = key = classify(name, layers)
        model.shapes.setdefault(first, tuple(parameter.shape))
        model.axes.setdefault(first, axis_of(module, first))
        if any(rule.match(name) is not None for rule in layers):
            model.known.add(name)
        elif key.module == "other":
            inside = [root for root in multihead if name.startswith(root)]
            if inside:
                projection = _MULTIHEAD.get(name.removeprefix(max(inside, key=len)))
                model.keys[name] = LayerKey("model", None, "attention", projection, None)
                model.known.add(name)
    if not model.shapes:
        raise ParameterError("train: the module has no parameters")
    return model


def _find(model: _Model, entry: str) -> dict[str, Mask]:
    """What an entry (without `!`) means: output rows by the parameter's first name.

    Raises:
        ParameterError: it is unknown or fits nothing; see `select`.
    """
    tower, colon, word = entry.rpartition(":")
    towers = {key.tower for key in model.keys.values()}
    if colon and tower not in towers:
        raise ParameterError(
            f"train {entry!r}: the module has no tower {tower!r}; "
            f"it has {', '.join(sorted(towers))}"
        )
    here = {name: key for name, key in model.keys.items() if not colon or key.tower == tower}
    preset = _PRESET.fullmatch(word)
    found: dict[str, Mask] = {}
    for name, key in here.items():
        mask = (
            _by_name(model, name, word)
            if preset is None
            else _rows_of_preset(model, name, key, preset)
        )
        if mask is not None:
            first = model.first[name]
            found[first] = found[first] | mask if first in found else mask
    if preset is None and not found and not any(c in word for c in "*?["):
        raise ParameterError(
            f"train {entry!r} is neither a preset nor a parameter; {nearest(word, PRESETS)}"
        )
    if not found:
        raise ParameterError(f"train {entry!r} matches nothing; {_summary(model)}")
    if preset is not None and word not in ("all", "embeddings", "heads"):
        _refuse_unknown(model, entry, [n for n in here if model.first[n] in found])
    return found


def _by_name(model: _Model, name: str, pattern: str) -> Mask | None:
    fits = name == pattern or fnmatchcase(name, pattern)
    return _all_rows(model, name) if fits else None


def _rows_of_preset(model: _Model, name: str, key: LayerKey, preset: re.Match[str]) -> Mask | None:
    """The rows of a parameter that a preset selects; None if it selects none."""
    if key.module not in _MODULES[preset["linear"] or preset["whole"]]:
        return None
    if preset["whole"] is not None:
        return _all_rows(model, name)
    if name.endswith("bias") and preset["bias"] is None:
        return None
    if key.module == "mlp":
        return _all_rows(model, name) if key.projection not in _NOT_LINEAR else None
    projection = (key.projection or "").removeprefix("cross_")
    wanted = set(preset["letters"] or _LETTERS)
    if projection and set(projection) <= _LETTERS:
        held = set(projection)
        if held <= wanted:
            return _all_rows(model, name)
        return layout_of(model.module, name, projection).mask(wanted) if held & wanted else None
    if projection in _NOT_LINEAR or not is_linear(model.module, name):
        return None
    if wanted != _LETTERS:
        raise ParameterError(
            f"train {preset[0]!r}: the projection of {name!r} is unknown; set `projection` "
            "(q, k, v, o) in `layers`, or select the whole attention"
        )
    return _all_rows(model, name)


def _all_rows(model: _Model, name: str) -> Mask:
    shape, axis = model.shapes[model.first[name]], model.axes[model.first[name]]
    return np.ones(shape[axis] if shape else 1, bool)


def _refuse_unknown(model: _Model, entry: str, names: Sequence[str]) -> None:
    """Refuse a preset where the layer table knows only some of the parameters of a module.

    So that half of an attention is never taken for the whole, as in one with projections of low
    rank (MLA), of which the table would know the last.
    """
    blocks = [name for name in names if model.keys[name].block is not None]
    inside = {whole_of(model.module, name) for name in blocks} - {""}
    for name, key in model.keys.items():
        if key.module != "other" or name in model.known:
            continue
        above = next((path for path in inside if name.startswith(f"{path}.")), None)
        if above is not None:
            raise ParameterError(
                f"train {entry!r}: {name!r} in {above!r} is unknown to the layer table; describe "
                "it in `layers` (module: other if it is neither), or select parameters by patterns"
            )


def _summary(model: _Model) -> str:
    """The kinds of parameters in a module, for messages."""
    kinds: dict[str, dict[str, None]] = {}
    for key in model.keys.values():
        kinds.setdefault(key.module, {}).setdefault(key.projection or "", None)
    words = []
    for kind in sorted(kinds, key=MODULES.index):
        parts = ", ".join(part for part in kinds[kind] if part)
        example = next(name for name, key in model.keys.items() if key.module == kind)
        words.append(f"{kind} ({parts})" if parts else f"{kind} (such as {example!r})")
    return "the module has " + ", ".join(words)
