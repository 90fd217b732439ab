"""Quantised checkpoints as models of plain weights: recognised, widened on the way, never stored.

A format is recognised by the tensors that belong to a weight; `quantization_config` says what
tensors do not (bits, convention of zero points, sizes of blocks), and by itself nothing. After
`plain`, a weight has the name, shape and 16-bit dtype that it had before it was quantised, and its
view yields float32. What is in a format that is not known is refused.

| suffix of the tensors           | format                                   | decoded in |
|---------------------------------|------------------------------------------|------------|
| weight, weight_scale(_inv)      | FP8, 8-bit integers, any grid of scales  | ScaledBytes |
| weight, SCB                     | bitsandbytes, 8-bit integers             | ScaledBytes |
| weight_packed, weight_scale     | compressed-tensors, packed integers      | PackedRows |
| weight, weight.quant_state.*    | bitsandbytes, NF4 and FP4                | FlatNibbles |
| *_blocks, *_scales              | MXFP4, experts of gpt-oss                | MicroscaledColumns |
| qweight, qzeros, scales (g_idx) | GPTQ; AWQ                                | PackedColumns |
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol, TypeVar

import numpy as np

from taskvec import documents
from taskvec.checkpoints.codebooks import BYTES, E2M1, integers
from taskvec.checkpoints.names import CONV1D_MODELS
from taskvec.checkpoints.quantised_views import (
    FlatNibbles,
    MicroscaledColumns,
    Nested,
    PackedColumns,
    PackedRows,
    Quantised,
    ScaledBytes,
    Slabs,
    floats,
)
from taskvec.checkpoints.safetensors import TensorInfo
from taskvec.checkpoints.source import Source, derived
from taskvec.checkpoints.views import View, size
from taskvec.dtypes import DTYPES, FLOATS, DType
from taskvec.errors import CheckpointError

DEQUANTISED: Final = "dequantised"  # what was done to a source whose weights are widened
REMEDY: Final = "give the model as it was before quantisation"
_KEYS: Final = ("quantization_config", "compression_config")
# Where tools before `quantization_config` said the same.
_FILES: Final = ("quantize_config.json", "quant_config.json")
_ONLY_ACTIVATIONS: Final = re.compile(
    r".*[._](input_scale|activation_scale|output_scale|prob_output_scale|[qkv]_scale|kv_scale"
    r"|input_zero_point|output_zero_point|input_global_scale|weight_format|input_scale_ub"
    r"|[qkv]_zero_point|activation_scale_inv)"
)
_LEFT: Final = re.compile(
    r".*\.(qweight|qzeros|g_idx|SCB|absmax|quant_map|quant_state\..+|weight_scale(_inv|_2)?"
    r"|weight_scales|weight_packed|weight_shape|weight_zero_point|weight_g_idx|W_q|_data|_scale)"
)
_MXFP4_NAME: Final = re.compile(r".*_(blocks|scales)")
_BITSANDBYTES: Final = re.compile(r"(?P<name>.+)\.quant_state\.bitsandbytes__(?P<kind>nf4|fp4)")
_INT8_FACTOR: Final = 7.874015718698502e-3  # 1 / 127, as bitsandbytes multiplies by it

Array = np.ndarray[Any, Any]


class Noted(Source, Protocol):
    """A source whose config can be corrected, and that says what was."""

    config: Mapping[str, Any]
    notes: tuple[str, ...]


S = TypeVar("S", bound=Noted)


@dataclass(frozen=True, slots=True)
class _Weight:
    """One quantised weight.

    Attributes:
        name: That of the weight.
        shape: Of the weight.
        stored: Names of the tensors that it is stored in.
        kind: Format, in words.
        codebook: Values of its codes, for what is said of accuracy.
        view: Makes its view.
    """

    name: str
    shape: tuple[int, ...]
    stored: tuple[str, ...]
    kind: str
    codebook: Array
    view: Callable[[], Quantised]


def plain(source: S) -> S | Source:
    """The model with plain weights: itself, or one whose quantised weights are widened when read.

    Raises:
        CheckpointError: weights are in a format that is not read, or lack what belongs to them.
    """
    said = _said(source)
    slabs = Slabs()
    weights = {each.name: each for each in _weights(source, said, slabs)}
    config = _without_quantisation(source.config)
    if not weights:
        refuse_quantised(source.where, said, source.tensors)
        if config != source.config:  # tools that widen weights, or train over them, leave it
            source.notes += (
                f"{source.where}: config.json has a quantization_config, but no tensor is "
                "quantised; the weights are taken as they are and the key is left out",
            )
            source.config = config
        return source
    used = {name for weight in weights.values() for name in weight.stored}
    idle = {n for n in source.tensors if n not in used and _ONLY_ACTIVATIONS.fullmatch(n)}
    rest = {n: t for n, t in source.tensors.items() if n not in used and n not in idle}
    refuse_quantised(source.where, said, rest)
    twice = sorted(weights.keys() & rest.keys())
    if twice:
        raise CheckpointError(
            f"{source.where}: holds {twice[0]!r} both quantised and plain; remove one of them"
        )
    dtype = _dtype(source.config)
    infos = {
        name: TensorInfo(
            name, dtype, w.shape, 0, sum(source.tensors[each].nbytes for each in w.stored)
        )
        for name, w in weights.items()
    }
    made = derived(
        source,
        DEQUANTISED,
        tensors=rest | infos,
        make_view=lambda name: weights[name].view() if name in weights else source.view(name),
        config=config,
    )
    made.notes = (*source.notes, _note(source.where, weights, dtype, len(made.tensors), len(idle)))
    return made


def _note(where: str, weights: Mapping[str, _Weight], dtype: DType, total: int, idle: int) -> str:
    kinds = Counter(weight.kind for weight in weights.values())
    said = ", ".join(f"{kind} ({count:,})" for kind, count in sorted(kinds.items()))
    losses = sorted({_loss(weight.codebook) for weight in weights.values()})
    cost = " to ".join(f"{100 * loss:.1f} %" for loss in dict.fromkeys((losses[0], losses[-1])))
    scales = f"; {idle:,} scales of activations are left out" if idle else ""
    return (
        f"{where}: {len(weights):,} of {total:,} tensors are quantised, {said}: they are widened "
        f"as they are read and count as {dtype.config_name}; the rounding of their codes is about "
        f"{cost} of the norm of normally distributed weights, and stays{scales}"
    )


def _loss(codebook: Array) -> float:
    """Norm of the rounding error against that of weights, where those are normally distributed.

    The largest of 64 weights has the largest code, about 2.4 standard deviations.
    """
    values = np.unique(codebook[np.isfinite(codebook)]).astype(np.float64)
    x = np.linspace(-1, 1, 20_001) * values.max()
    density = np.exp(-0.5 * (2.4 * x / values.max()) ** 2)
    nearest = np.clip(np.searchsorted((values[1:] + values[:-1]) / 2, x), 0, len(values) - 1)
    error = np.square(x - values[nearest])
    return float(np.sqrt((density * error).sum() / (density * np.square(x)).sum()))


# --- what is said -------------------------------------------------------------------------------


def _places(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A config and those inside it that are of a model."""
    yield config
    for value in config.values():
        if isinstance(value, dict) and ("model_type" in value or _KEYS[0] in value):
            yield from _places(value)


def _said(source: Source) -> dict[str, Any]:
    """What config.json, or the file that older tools wrote, says about quantisation."""
    for place in _places(source.config):
        for key in _KEYS:
            if isinstance(place.get(key), dict) and place[key]:
                return dict(place[key])
    folder = source.folder
    for file in _FILES if folder is not None else ():
        path = Path(folder or "") / file
        if path.is_file():
            return documents.read_object(path, documents.CONFIG, of=folder)
    return {}


def _without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what says that weights are quantised, here and in the configs inside."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if key not in _KEYS:
            kept[key] = _without_quantisation(value) if isinstance(value, dict) else value
    return kept


def _dtype(config: Mapping[str, Any]) -> DType:
    """The 16-bit type that the weights count as: the model's, where it says one."""
    for place in _places(config):
        for key in ("dtype", "torch_dtype"):
            if place.get(key) in ("bfloat16", "float16"):
                return FLOATS[place[key]]
    return DTYPES["BF16"]


def refuse_quantised(where: str, said: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> None:
    """Raise `CheckpointError` if tensors are packed or scaled; the config alone does not say so."""
    for name, info in infos.items():
        is_packed = bool(said) and len(info.shape) > 1 and not info.dtype.is_float
        if info.dtype.name == "U8":
            is_packed = is_packed or _MXFP4_NAME.fullmatch(name) is not None
        if info.dtype.is_quantised or is_packed or _LEFT.fullmatch(name):
            _refuse(where, said, f"tensor {name!r}, {info.dtype.name}")


def _refuse(where: str, said: Mapping[str, Any], what: str) -> NoReturn:
    method = said.get("quant_method", "unknown")
    by = f", {method} by config.json" if said else ""
    raise CheckpointError(
        f"{where}: weights are quantised in a way that is not read ({what}{by}); {REMEDY}"
    )


# --- formats ------------------------------------------------------------------------------------


def _weights(source: Source, said: Mapping[str, Any], slabs: Slabs) -> Iterator[_Weight]:
    """Every quantised weight of a model, by the tensors that belong to it."""
    tensors = source.tensors
    for name, info in tensors.items():
        nibbles = _BITSANDBYTES.fullmatch(name)
        if nibbles is not None:
            yield _nibbles(source, said, nibbles["name"], name)
        elif name.endswith(".SCB"):
            yield _int8(source, said, name.removesuffix(".SCB"))
        elif name.endswith(".qweight") and info.dtype.name == "I32":
            yield _columns(source, said, name.removesuffix(".qweight"), slabs)
        elif name.endswith(".weight_packed") and info.dtype.name == "I32":
            yield _packed(source, said, name.removesuffix("_packed"))
        elif name.endswith("_blocks") and info.dtype.name == "U8":
            yield _microscaled(source, said, name.removesuffix("_blocks"), slabs)
        elif info.dtype.name in BYTES and not info.dtype.is_float:
            scales = (f"{name}_scale_inv", f"{name}_scale")
            scale = next((each for each in scales if each in tensors), "")
            if scale and not (info.dtype.name == "I8" and scale.endswith("_inv")):
                yield _scaled(source, said, name, scale)


def _need(source: Source, said: Mapping[str, Any], owner: str, *names: str) -> list[TensorInfo]:
    """Tensors that belong to a weight."""
    missing = [name for name in names if name not in source.tensors]
    if missing:
        raise CheckpointError(
            f"{source.where}: {owner!r} is quantised, but {missing[0]!r}, which belongs to it, is "
            "missing; download the model again"
        )
    return [source.tensors[name] for name in names]


def _if_there(source: Source, *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if name in source.tensors)


def _linear(source: Source, said: Mapping[str, Any], name: str) -> None:
    """Refuse layers that store (in, out), which quantisers turn."""
    if any(place.get("model_type") in CONV1D_MODELS for place in _places(source.config)):
        _refuse(source.where, said, f"{name!r} of a model that stores weights as (in, out)")


def _scaled(source: Source, said: Mapping[str, Any], name: str, scale: str) -> _Weight:
    info, scales = _need(source, said, name, name, scale)
    zero = _if_there(source, f"{name}_zero_point")
    grid = _grid(info.shape, scales.shape, _blocks(said))
    allowed = scales.dtype.is_float or scales.dtype.name in ("F8_E8M0", "U8")
    for each in zero:
        _check_part(source, said, each, ("I8",), scales.shape)
    if grid is None or not allowed:
        _refuse(source.where, said, f"{scale!r}, {scales.dtype.name} {list(scales.shape)} beside "
                f"{list(info.shape)}")  # fmt: skip

    def view() -> Quantised:
        zeros = source.view(zero[0]) if zero else None
        return ScaledBytes(
            source.view(name), source.view(scale), zeros, BYTES[info.dtype.name], grid
        )

    kind = "8-bit integers" if info.dtype.name == "I8" else info.dtype.name.replace("F8_", "FP8 ")
    return _Weight(name, info.shape, (name, scale, *zero), kind, BYTES[info.dtype.name], view)


def _check_part(
    source: Source, said: Mapping[str, Any], name: str, dtypes: Sequence[str], shape: Sequence[int]
) -> None:
    """Refuse a tensor of a weight that has another dtype or shape than its others ask for."""
    info = source.tensors[name]
    if info.dtype.name not in dtypes or info.shape != tuple(shape):
        _refuse(source.where, said, f"{name!r}, {info.dtype.name} {list(info.shape)}, where "
                f"{' or '.join(dtypes)} {list(shape)} belongs")  # fmt: skip


def _order(source: Source, name: str, groups: int) -> View:
    """Groups of the columns of a weight, each of which there is."""
    view = source.view(name)
    found = view.read(0, size(view))
    if ((found < 0) | (found >= groups)).any():
        raise CheckpointError(
            f"{source.where}: {name!r} puts columns into groups {found.min()} to {found.max()}, "
            f"but there are scales for 0 to {groups - 1}; download the model again"
        )
    return view


def _blocks(said: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Rows and columns with one scale, by config.json; several where groups of layers differ."""
    groups = _groups(said)
    found = [said.get("weight_block_size"), *(group.get("block_structure") for group in groups)]
    found += [(1, group.get("group_size")) for group in groups]
    return [
        (each[0], each[1])
        for each in found
        if isinstance(each, (list, tuple)) and len(each) == 2
        and all(type(n) is int and n > 0 for n in each)
    ]  # fmt: skip


def _grid(
    shape: Sequence[int], scales: Sequence[int], blocks: Sequence[tuple[int, int]]
) -> tuple[int, int, int, int] | None:
    """Rows and columns of a matrix, and of the rectangles with one scale; None if that is unclear.

    Three scales over 300 rows are of 128 each, the last of 44, or of 100. So a size that
    config.json does not say is a power of two and fits, or is one row or all.

    >>> _grid((300, 256), (3, 2), [(128, 128)]), _grid((300, 256), (3, 2), [])
    ((300, 256, 128, 128), None)
    >>> _grid((6, 4), (6, 1), []), _grid((6, 4), (), []), _grid((6, 4), (3, 1), [])
    ((6, 4, 1, 4), (6, 4, 6, 4), (6, 4, 2, 4))
    """
    if len(shape) < 2 or 0 in shape:
        return None
    *outer, rows, columns = shape
    matrices = math.prod(outer)
    if math.prod(scales) == 1:
        return matrices * rows, columns, matrices * rows, columns
    if len(scales) == 1 and outer and scales[0] == matrices:
        return rows, columns, rows, columns
    if len(scales) == 1 and not outer and scales[0] == rows:
        scales = (rows, 1)
    if len(scales) != len(shape) or list(scales[:-2]) != outer or 0 in scales:
        return None
    counts = (scales[-2], scales[-1])
    for high, wide in blocks:
        if (-(-rows // high), -(-columns // wide)) == counts:
            return rows, columns, high, wide
    is_whole = all(n in (1, of) for n, of in zip(counts, (rows, columns), strict=True))
    high, wide = rows // counts[0], columns // counts[1]
    fits = (high * counts[0], wide * counts[1]) == (rows, columns)
    powers = all(
        n == 1 or each & (each - 1) == 0 for n, each in zip(counts, (high, wide), strict=True)
    )
    return (rows, columns, high, wide) if fits and (is_whole or (powers and not blocks)) else None


def _groups(said: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What compressed-tensors says of the weights of each group of layers."""
    groups = said.get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else ()
    found = [group.get("weights") for group in groups if isinstance(group, dict)]
    return [each for each in found if isinstance(each, dict)]


def _int8(source: Source, said: Mapping[str, Any], module: str) -> _Weight:
    name, scale = f"{module}.weight", f"{module}.SCB"
    info, scales = _need(source, said, name, name, scale)
    _linear(source, said, name)
    if info.dtype.name != "I8" or len(info.shape) != 2 or scales.size != info.shape[0]:
        _refuse(source.where, said, f"{name!r}, {info.dtype.name} {list(info.shape)}")
    how = _if_there(source, f"{module}.weight_format")
    if how and source.view(how[0]).read(0, 1).any():
        _refuse(source.where, said, f"{how[0]!r}: not in rows")
    grid = (*info.shape, 1, info.shape[1])

    def view() -> Quantised:
        codes, scale_view = source.view(name), source.view(scale)
        return ScaledBytes(codes, scale_view, None, BYTES["I8"], grid, _INT8_FACTOR)

    kind = "8-bit integers of bitsandbytes"
    return _Weight(name, info.shape, (name, scale, *how), kind, BYTES["I8"], view)


def _packed(source: Source, said: Mapping[str, Any], name: str) -> _Weight:
    words, scales, shape = _need(
        source, said, name, f"{name}_packed", f"{name}_scale", f"{name}_shape"
    )
    order = _if_there(source, f"{name}_g_idx")
    zero = _if_there(source, f"{name}_zero_point")
    said_shape = source.view(shape.name).read(0, shape.size).tolist()
    rows, columns = said_shape if len(said_shape) == 2 else (0, 0)
    choices = [group.get("num_bits") for group in _groups(said)] or [4, 8]
    fitting = [
        bits
        for bits in choices
        if bits in (2, 4, 8)  # of others, the layout depends on the version that packed them
        and words.shape == (rows, -(-columns // (32 // bits)))
    ]  # fmt: skip
    across = scales.shape[-1] if scales.shape else 0
    fits = len(scales.shape) == 2 and scales.shape[0] == rows and across and scales.dtype.is_float
    if not fitting or not fits:
        _refuse(source.where, said, f"{words.name!r}, {list(words.shape)} for {[rows, columns]}")
    bits = fitting[0]
    sizes = [group.get("group_size") for group in _groups(said)]
    fit = [n for n in sizes if isinstance(n, int) and n > 0 and -(-columns // n) == across]
    group = fit[0] if fit else -(-columns // across)
    for each in zero:
        _check_part(source, said, each, ("I32",), (-(-rows // (32 // bits)), across))
    for each in order:
        _check_part(source, said, each, ("I32", "I64"), (columns,))
    codebook = integers(bits, 1 << (bits - 1))

    def view() -> Quantised:
        used = order and not (source.view(order[0]).read(0, columns) < 0).any()
        return PackedRows(
            words=source.view(words.name),
            scales=source.view(scales.name),
            zeros=source.view(zero[0]) if zero else None,
            order=_order(source, order[0], across) if used else None,
            bits=bits,
            codebook=codebook,
            shape=(rows, columns),
            group=group,
        )

    stored = (words.name, scales.name, shape.name, *order, *zero)
    kind = f"packed {bits}-bit integers of compressed-tensors"
    return _Weight(name, (rows, columns), stored, kind, codebook, view)


def _nibbles(source: Source, said: Mapping[str, Any], name: str, state: str) -> _Weight:
    codes, absmax, book = _need(source, said, name, name, f"{name}.absmax", f"{name}.quant_map")
    _linear(source, said, name)
    more = _if_there(source, f"{name}.nested_absmax", f"{name}.nested_quant_map")
    try:
        found = json.loads(source.view(state).read(0, source.tensors[state].size).tobytes())
        shape = tuple(int(n) for n in found["shape"])
        block = int(found["blocksize"])
        inner, offset = int(found.get("nested_blocksize", 1)), float(found.get("nested_offset", 0))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{source.where}: {state!r} does not say how {name!r} is quantised ({error!r}); "
            "download the model again"
        ) from error
    count = math.prod(shape)
    is_nested = absmax.dtype.name == "U8" and len(more) == 2
    fits = codes.size * codes.dtype.itemsize == -(-count // 2) and block > 0 == block % 2
    fits = fits and absmax.size == -(-count // block) and book.size == 16 and inner > 0
    if not fits or not (is_nested or absmax.dtype.name == "F32"):
        _refuse(source.where, said, f"{name!r}, {list(codes.shape)} for {list(shape)}")
    if is_nested:
        _check_part(source, said, more[0], ("F32",), (-(-absmax.size // inner),))
        _check_part(source, said, more[1], ("F32",), (256,))
    codebook = floats(source.view(book.name).read(0, 16), book.dtype)

    def view() -> Quantised:
        scales: View = source.view(absmax.name)
        if is_nested:
            nested, map_ = (source.view(each) for each in more)
            values = floats(map_.read(0, size(map_)), map_.dtype)
            scales = Nested(scales, values, nested, inner, offset)
        return FlatNibbles(_bytes_of(source.view(name)), scales, block, codebook, shape)

    stored = (name, absmax.name, book.name, state, *more)
    kind = state.rpartition("__")[2].upper() + " of bitsandbytes"
    return _Weight(name, shape, stored, kind, codebook, view)


@dataclass(frozen=True, slots=True, eq=False)
class _Bytes:
    """The bytes of a tensor of wider elements, as quantisers may store codes."""

    stored: View
    dtype: DType = DTYPES["U8"]
    is_difference: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        return (size(self.stored) * self.stored.dtype.itemsize,)

    def read(self, start: int, stop: int) -> Array:
        """See `View`."""
        width = self.stored.dtype.itemsize
        first, last = start // width, -(-stop // width)
        block = self.stored.read(first, last).view(np.uint8)
        return block[start - first * width : stop - first * width]


def _bytes_of(view: View) -> View:
    return view if view.dtype.name == "U8" else _Bytes(view)


def _microscaled(source: Source, said: Mapping[str, Any], name: str, slabs: Slabs) -> _Weight:
    blocks, scales = _need(source, said, name, f"{name}_blocks", f"{name}_scales")
    is_known = len(blocks.shape) == 4 and blocks.shape[3] == 16 and scales.dtype.name == "U8"
    if not is_known or scales.shape != blocks.shape[:3]:
        _refuse(source.where, said, f"{blocks.name!r}, {list(blocks.shape)}")
    experts, columns, groups, _ = blocks.shape

    def view() -> Quantised:
        views = source.view(blocks.name), source.view(scales.name)
        return MicroscaledColumns(name, *views, E2M1, slabs)

    stored = (blocks.name, scales.name)
    return _Weight(name, (experts, 32 * groups, columns), stored, "MXFP4", E2M1, view)


def _columns(source: Source, said: Mapping[str, Any], module: str, slabs: Slabs) -> _Weight:
    name = f"{module}.weight"
    words, zeros, scales = _need(
        source, said, name, f"{module}.qweight", f"{module}.qzeros", f"{module}.scales"
    )
    order = _if_there(source, f"{module}.g_idx")
    _linear(source, said, name)
    method = said.get("quant_method", "gptq" if "desc_act" in said else None)
    bits = said.get("bits", said.get("w_bit"))
    is_awq = method == "awq" or (method is None and "w_bit" in said)
    version = str(said.get("version", "gemm")).lower() if is_awq else said.get("checkpoint_format")
    if method not in ("gptq", "awq") and not is_awq:
        _refuse(source.where, said, f"{words.name!r}: whether that is GPTQ or AWQ is not said")
    if version not in (("gemm",) if is_awq else (None, "gptq", "gptq_v2")):
        _refuse(source.where, said, f"{words.name!r} in the layout {version!r}")
    known = bits in ((4,) if is_awq else (2, 3, 4, 8)) and len(words.shape) == 2
    if not known or len(scales.shape) != 2 or not scales.dtype.is_float:
        _refuse(source.where, said, f"{words.name!r}, {bits} bits, {list(words.shape)}")
    assert isinstance(bits, int)
    rows, groups = scales.shape[1], scales.shape[0]
    columns = words.shape[0] if is_awq else words.shape[0] * 32 // bits
    packed = -(-rows * bits // 32)
    expected = (columns, packed) if is_awq else (columns * bits // 32, rows)
    if words.shape != expected or rows % 8 or not groups:
        _refuse(source.where, said, f"{words.name!r}, {list(words.shape)} for {rows} rows")
    _check_part(source, said, zeros.name, ("I32",), (groups, packed))
    for each in order:
        _check_part(source, said, each, ("I32", "I64"), (columns,))
    group = said.get("group_size", said.get("q_group_size"))
    if type(group) is not int or group <= 0 or -(-columns // group) != groups:
        group = -(-columns // groups)

    def view() -> Quantised:
        return PackedColumns(
            name=name,
            words=source.view(words.name),
            scales=source.view(scales.name),
            zeros=source.view(zeros.name),
            order=_order(source, order[0], groups) if order else None,
            bits=bits,
            shape=(rows, columns),
            group=group,
            above=0 if is_awq or version == "gptq_v2" else 1,
            interleaved=is_awq,
            slabs=slabs,
        )

    stored = (words.name, zeros.name, scales.name, *order)
    kind = f"{'AWQ' if is_awq else 'GPTQ'}, {bits} bits"
    return _Weight(name, (rows, columns), stored, kind, integers(bits, 1 << (bits - 1)), view)
