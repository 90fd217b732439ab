"""Rows of fused projections: which belong to W_q, W_k and W_v, and training only some of them.

Where one tensor holds several projections, its output rows are laid out as `groups` repetitions of
so many rows of q, of k and of v:

```text
GPT-2, MPT, nn.MultiheadAttention, timm    q | k | v
Phi-3                                      q | k | v, of n and n_kv heads
GPT-NeoX, BLOOM, Falcon (RW)               (q | k | v) of every head
Falcon, multi-query                        q of n heads | k | v of one
Falcon, new architecture                   (q of n/n_kv heads | k | v) of every key-value head
```

That is read from the forward pass of the class, so it is known by class and refused for others.
GPT-2's Conv1D stores (in, out): its output rows are columns, `axis` 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from taskvec.errors import ParameterError
from taskvec.extras import require

if TYPE_CHECKING:
    from torch import Tensor, nn

Mask = NDArray[np.bool_]  # one entry for each output row of a parameter


@dataclass(frozen=True, slots=True)
class RowRanges:
    """Output rows of a parameter.

    Attributes:
        axis: The dimension that they are counted along: 0, or 1 of a Conv1D's weight.
        ranges: Half-open, ascending, apart from each other.
    """

    axis: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """How output rows of a fused projection are laid out.

    Attributes:
        groups: How often the parts follow each other.
        parts: Projection and rows, as they follow each other in a group.
    """

    groups: int
    parts: tuple[tuple[str, int], ...]

    def mask(self, wanted: Collection[str]) -> Mask:
        """The rows of some projections.

        >>> Layout(2, (("q", 2), ("k", 1), ("v", 1))).mask("q").astype(int)
        array([1, 1, 0, 0, 1, 1, 0, 0])
        """
        group = [np.full(rows, part in wanted) for part, rows in self.parts]
        return np.tile(np.concatenate(group), self.groups)


def rows_in(mask: Mask, axis: int) -> RowRanges:
    """The ranges of a mask.

    >>> rows_in(np.array([True, True, False, True]), 0).ranges
    ((0, 2), (3, 4))
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return RowRanges(
        axis, tuple((int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True))
    )


@contextmanager
def hold_rows(module: nn.Module, trained: Mapping[str, RowRanges]) -> Iterator[Callable[[], None]]:
    """Keep the rows of fused projections that do not train bit for bit as they are.

    Their gradients are zero as soon as they are made, so that clipping and momentum do not see
    them; an optimiser may move them still (weight decay), so they are put back after its step.

    ```text
    with hold_rows(module, selection.rows) as put_back:
        loss.backward(); optimizer.step(); put_back()
    ```

    Args:
        module: As it is when training starts; it may change devices later.
        trained: Rows that train, by parameter; the rest of these parameters is held.

    Yields:
        What is to be called after every step of the optimiser.
    """
    torch = require("torch", "train")
    parameters = dict(module.named_parameters())
    saved = []
    for name, rows in trained.items():
        parameter = parameters[name]
        frozen = frozen_rows(rows, parameter.shape[rows.axis]).to(parameter.device)
        values = parameter.detach().index_select(rows.axis, frozen)
        saved.append((parameter, rows.axis, frozen, values))

    def put_back() -> None:
        with torch.no_grad():
            for parameter, axis, frozen, values in saved:
                there = parameter.device
                parameter.index_copy_(axis, frozen.to(there), values.to(there, parameter.dtype))

    hooks: list[Any] = []
    for parameter, axis, frozen, _ in saved:
        tensor: Any = parameter  # register_hook has no types
        hooks.append(tensor.register_hook(_masking(axis, frozen)))
    try:
        yield put_back
    finally:
        for hook in hooks:
            hook.remove()


def frozen_rows(rows: RowRanges, size: int) -> Tensor:
    """Numbers of the rows of a parameter that do not train, of `size` in all; int64."""
    torch = require("torch", "train")
    trains = np.zeros(size, bool)
    for start, stop in rows.ranges:
        trains[start:stop] = True
    frozen: Tensor = torch.from_numpy(np.flatnonzero(~trains))
    return frozen


def _masking(axis: int, frozen: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.index_fill(axis, frozen.to(gradient.device), 0)


def axis_of(module: nn.Module, name: str) -> int:
    """The dimension of a parameter's output rows: 1 of the weight of a Conv1D, else 0."""
    return int(name.endswith("weight") and _CONV1D in _classes(_owner(module, name)))


def is_linear(module: nn.Module, name: str) -> bool:
    """Whether a parameter is one of a linear layer."""
    owner = _owner(module, name)
    is_torch = isinstance(owner, require("torch", "train").nn.Linear)
    return is_torch or is_multihead(owner) or _CONV1D in _classes(owner)


def is_multihead(module: nn.Module) -> bool:
    """Whether a module is torch's own attention."""
    return isinstance(module, require("torch", "train").nn.MultiheadAttention)


def layout_of(module: nn.Module, name: str, projections: str) -> Layout:
    """How the output rows of a fused projection are laid out.

    Args:
        module: What the parameter is in.
        name: The parameter's.
        projections: Which it holds: `qkv` or `kv`.

    Raises:
        ParameterError: the class of the attention is not known, or the shape is another than its
            numbers of heads make it.
    """
    attention: Any = module.get_submodule(whole_of(module, name))
    size = module.get_parameter(name).shape[axis_of(module, name)]
    kind = next((kind for kind in _classes(attention) if kind in _LAYOUTS), None)
    if kind is None:
        raise ParameterError(
            f"the rows of {' and '.join(projections)} in {name!r} are unknown, because the "
            f"class {_classes(attention)[0]} is; train the whole attention"
        )
    layout = _LAYOUTS[kind](attention, size, projections)
    if layout.groups * sum(rows for _, rows in layout.parts) != size:
        raise ParameterError(
            f"{name!r} has {size} rows, by its heads {layout.groups} × {dict(layout.parts)}; "
            "train the whole attention"
        )
    return layout


def whole_of(module: nn.Module, name: str) -> str:
    """Path of the attention, or other part of a block, that a parameter's layer is one of.

    That of a linear layer is what the layer stands in; `in_proj_weight` is the attention's own.
    """
    path = name.rpartition(".")[0]
    return path.rpartition(".")[0] if hasattr(_owner(module, name), "weight") else path


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _classes(module: nn.Module) -> list[str]:
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]


def _in_turn(attention: Any, size: int, projections: str) -> Layout:
    return Layout(1, tuple((part, size // len(projections)) for part in projections))


def _by_head(attention: Any, size: int, projections: str) -> Layout:
    heads = getattr(attention, "num_heads", None) or attention.config.num_attention_heads
    return Layout(heads, tuple((part, size // heads // len(projections)) for part in projections))


def _grouped_layout(attention: Any, size: int, projections: str) -> Layout:
    """Fewer heads of keys and values than of queries; all queries first."""
    keys = attention.num_key_value_heads * attention.head_dim
    queries = attention.config.num_attention_heads * attention.head_dim
    return Layout(1, (("q", queries), ("k", keys), ("v", keys)))


def _falcon(attention: Any, size: int, projections: str) -> Layout:
    if not (attention.new_decoder_architecture or attention.multi_query):
        return _by_head(attention, size, projections)
    groups, rows = attention.num_kv_heads, attention.head_dim
    return Layout(groups, (("q", attention.num_heads // groups * rows), ("k", rows), ("v", rows)))


_CONV1D: Final = "transformers.pytorch_utils.Conv1D"
_LAYOUTS: Final[Mapping[str, Callable[[Any, int, str], Layout]]] = {
    "open_clip.transformer.Attention": _in_turn,
    "timm.layers.attention.Attention": _in_turn,
    "timm.models.vision_transformer.Attention": _in_turn,  # before timm 1.0.16
    "torch.nn.modules.activation.MultiheadAttention": _in_turn,
    "transformers.models.bloom.modeling_bloom.BloomAttention": _by_head,
    "transformers.models.falcon.modeling_falcon.FalconAttention": _falcon,
    "transformers.models.gpt2.modeling_gpt2.GPT2Attention": _in_turn,
    "transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXAttention": _by_head,
    "transformers.models.mpt.modeling_mpt.MptAttention": _in_turn,
    "transformers.models.phi3.modeling_phi3.Phi3Attention": _grouped_layout,
}
