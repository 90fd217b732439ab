"""The config of a stack: counts, lists by block, and kinds of blocks that follow from their number.

A config says in three ways what a block is. A *list* has an entry for each block and is stacked as
the blocks are; a list of block *numbers* is renumbered. Where the kind follows from a *rule* over
the number (every second block slides its window), the rule would say another thing of a block that
has moved: the list that the rule stands for is written out, or the rule is set again so that it
gives every block the kind that it had; a rule that cannot is an error. All of it is done in the
config itself and in the config of the tower that is stacked (`text_config` and its like).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from taskvec.checkpoints.source import Source
from taskvec.errors import FamilyError
from taskvec.recipes.stack import Piece

COUNTS: Final = (
    *("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers"),
    *("num_transformer_layers", "num_blocks"),  # OpenELM, xLSTM
)
# Texts with one letter for each block (Nemotron-H).
_LETTERS: Final = ("hybrid_override_pattern",)
COUNTS_OF_ENCODERS: Final = ("decoder_layers", "encoder_layers")
# Lists that are not by block, at any length.
_NOT_BY_BLOCK: Final = re.compile(
    r"architectures|.*token_ids?|.*_section|.*(kernel|stride|image|patch|dilation|label|size_list|mean"
    r"|std|languages|bounds|grid|temporal|window_size|crop).*|torch_dtype|auto_map|tags|betas"
)
# Lists of numbers of blocks.
_NUMBERS: Final = re.compile(
    r"mlp_only_layers|moe_layers|cross_attention_layers|full_attn_idxs|global_attn_layers"
    r"|attn_layer_indices|hybrid_layer_ids|.*_layer_(?:ids|idx|indices|indexes)|.*_layers_(?:idx|ids)"
)
# Configs of towers that are not the stacked one.
_OTHER_TOWER: Final = re.compile(
    r".*(vision|visual|image|audio|speech|video|encoder|projector|talker).*"
)

Kinds = Callable[[Mapping[str, Any], int], list[Any]]


def stacked_config(
    pieces: Sequence[Piece], sources: Sequence[Source], counts: Sequence[int]
) -> dict[str, Any]:
    """The first model's config for the blocks of the pieces.

    Args:
        pieces: Which blocks.
        sources: The model of each piece.
        counts: How many blocks each model has.

    Raises:
        FamilyError: a rule gives a block another kind, and the config cannot express the old one.
    """
    return _stacked(pieces, [source.config for source in sources], counts)


def _stacked(
    pieces: Sequence[Piece], configs: Sequence[Mapping[str, Any]], counts: Sequence[int]
) -> dict[str, Any]:
    total = sum(piece.stop - piece.first for piece in pieces)
    written = [_written_out(config, count) for config, count in zip(configs, counts, strict=True)]
    config = dict(written[0])
    for key, value in written[0].items():
        theirs = [other.get(key, value) for other in written]
        if key in COUNTS and value == counts[0]:
            config[key] = total
        elif isinstance(value, dict):
            if not _OTHER_TOWER.fullmatch(key) and _counts(value, counts[0]):
                inner = [each if isinstance(each, dict) else value for each in theirs]
                config[key] = _stacked(pieces, inner, counts)
        elif key in _LETTERS and isinstance(value, str):
            letters = [list(each) if isinstance(each, str) else each for each in theirs]
            config[key] = "".join(_list(key, pieces, letters, counts))
        elif isinstance(value, list) and not _NOT_BY_BLOCK.fullmatch(key):
            config[key] = _list(key, pieces, theirs, counts)
    for rule in _RULES:
        config |= rule(pieces, written, counts)
    return config


def _counts(config: Mapping[str, Any], count: int) -> bool:
    """Whether a config, or one inside it, says that there are so many blocks."""
    return any(config.get(key) == count for key in COUNTS) or any(
        isinstance(value, dict) and not _OTHER_TOWER.fullmatch(key) and _counts(value, count)
        for key, value in config.items()
    )


def _list(
    key: str, pieces: Sequence[Piece], lists: Sequence[Any], counts: Sequence[int]
) -> list[Any]:
    """A list by block stacked, a list of numbers renumbered; any other as it is."""
    first: list[Any] = lists[0]
    if _NUMBERS.fullmatch(key) and all(type(number) is int for number in first):
        return [
            new
            for new, (i, old) in enumerate(_origins(pieces))
            if old in (lists[i] if isinstance(lists[i], list) else first)
        ]
    if len(first) != counts[0]:
        return first
    for i, each in enumerate(lists):
        if not isinstance(each, list) or len(each) != counts[i]:
            raise FamilyError(
                f"stack: {key} of the config of piece {i + 1} must have an entry for each of its "
                f"{counts[i]} blocks, as that of piece 1 has; got {each!r}"
            )
    return [lists[i][old] for i, old in _origins(pieces)]


def _origins(pieces: Sequence[Piece]) -> Iterator[tuple[int, int]]:
    """Piece and old number of every block of the stack."""
    for i, piece in enumerate(pieces):
        for block in range(piece.first, piece.stop):
            yield i, block


# Lists that a rule over the number of a block stands for, where a config does not have them. They
# are the names under which transformers takes the lists.


def _every(key: str, default: int, last: str, others: str) -> Kinds:
    """`last` for every n-th block, where n is a number in the config."""

    def kinds(config: Mapping[str, Any], count: int) -> list[str]:
        n = config.get(key) or default
        return [others if (i + 1) % n else last for i in range(count)]

    return kinds


def _windows(config: Mapping[str, Any], count: int) -> list[str]:
    """Qwen 2 and 3: the last blocks slide."""
    first = config.get("max_window_layers", count)
    slides = bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None
    return [
        "sliding_attention" if slides and i >= first else "full_attention" for i in range(count)
    ]


def _without_rope(config: Mapping[str, Any], count: int) -> list[int]:
    n = config.get("no_rope_layer_interval") or 4
    return [int((i + 1) % n != 0) for i in range(count)]


def _chunks(config: Mapping[str, Any], count: int) -> list[str]:
    """Llama 4: blocks with rotary positions attend within chunks."""
    rope = config.get("no_rope_layers") or _without_rope(config, count)
    return ["chunked_attention" if each else "full_attention" for each in rope]


def _experts(config: Mapping[str, Any], count: int) -> list[int]:
    step = config.get("interleave_moe_layer_step") or 1
    return list(range(step - 1, count, step))


_SLIDES, _FULL = "sliding_attention", "full_attention"
_IMPLIED: Final[dict[str, dict[str, Kinds]]] = {
    "gemma2": {"layer_types": _every("", 2, _FULL, _SLIDES)},
    "gemma3": {"layer_types": _every("sliding_window_pattern", 6, _FULL, _SLIDES)},
    "gemma3_text": {"layer_types": _every("sliding_window_pattern", 6, _FULL, _SLIDES)},
    "cohere2": {"layer_types": _every("sliding_window_pattern", 4, _FULL, _SLIDES)},
    "gpt_oss": {"layer_types": _every("", 2, _FULL, _SLIDES)},
    "qwen3_next": {"layer_types": _every("full_attention_interval", 4, _FULL, "linear_attention")},
    "qwen2": {"layer_types": _windows},
    "qwen3": {"layer_types": _windows},
    "smollm3": {"no_rope_layers": _without_rope},
    "llama4_text": {
        "no_rope_layers": _without_rope, "layer_types": _chunks, "moe_layers": _experts,
    },
}  # fmt: skip


def _written_out(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The config with the lists that its rules stand for."""
    found = dict(config)
    if config.get("model_type") == "gemma3" and "text_config" in config:
        return found  # the text config has them
    for key, kinds in _IMPLIED.get(str(config.get("model_type")), {}).items():
        if not found.get(key):
            found[key] = kinds(found, count)
    return found


# Rules that are set again.

Rule = Callable[[Sequence[Piece], Sequence[Mapping[str, Any]], Sequence[int]], dict[str, Any]]


def _periodic(period: str, offset: str) -> Rule:
    """Blocks i with i mod period = offset, as Jamba has its attention and its experts."""

    def rule(
        pieces: Sequence[Piece], configs: Sequence[Mapping[str, Any]], counts: Sequence[int]
    ) -> dict[str, Any]:
        if not all(type(config.get(key)) is int for config in configs for key in (period, offset)):
            return {}
        wanted = [old % configs[i][period] == configs[i][offset] for i, old in _origins(pieces)]
        total = len(wanted)
        for n in (configs[0][period], *range(1, total + 2)):
            for m in range(n):
                if wanted == [i % n == m for i in range(total)]:
                    return {period: n, offset: m}
        raise FamilyError(
            f"stack: {period} and {offset} of {configs[0].get('model_type')} cannot say which "
            "blocks are of which kind in this order; take pieces that repeat the pattern"
        )

    return rule


def _dense_first(
    pieces: Sequence[Piece], configs: Sequence[Mapping[str, Any]], counts: Sequence[int]
) -> dict[str, Any]:
    """DeepSeek: the first blocks have no experts."""
    key = "first_k_dense_replace"
    if not all(type(config.get(key)) is int for config in configs):
        return {}
    wanted = [old < configs[i][key] for i, old in _origins(pieces)]
    if wanted != sorted(wanted, reverse=True):
        raise FamilyError(
            f"stack: {key} says that blocks without experts come first, which they would not; take "
            "pieces whose blocks without experts are the first of the stack"
        )
    return {key: sum(wanted)}


def _sparse(
    pieces: Sequence[Piece], configs: Sequence[Mapping[str, Any]], counts: Sequence[int]
) -> dict[str, Any]:
    """Qwen-MoE: experts in every n-th block; `mlp_only_layers` can express any pattern."""
    key = "decoder_sparse_step"
    if not any(type(c.get(key)) is int and c[key] > 1 for c in configs):
        return {}
    dense = []
    for new, (i, old) in enumerate(_origins(pieces)):
        config = configs[i]
        step, alone = config.get(key) or 1, config.get("mlp_only_layers") or ()
        if old in alone or (old + 1) % step:
            dense.append(new)
    return {key: 1, "mlp_only_layers": dense}


def _global_every(
    pieces: Sequence[Piece], configs: Sequence[Mapping[str, Any]], counts: Sequence[int]
) -> dict[str, Any]:
    """ModernBERT: block 0 and every n-th block after it see the whole text."""
    key = "global_attn_every_n_layers"
    if not all(type(config.get(key)) is int for config in configs):
        return {}
    wanted = [old % configs[i][key] == 0 for i, old in _origins(pieces)]
    for n in (configs[0][key], *range(1, len(wanted) + 1)):
        if wanted == [i % n == 0 for i in range(len(wanted))]:
            return {key: n}
    raise FamilyError(
        f"stack: {key} cannot say which blocks see the whole text in this order; take pieces that "
        "repeat the pattern"
    )


def _attention_types(
    pieces: Sequence[Piece], configs: Sequence[Mapping[str, Any]], counts: Sequence[int]
) -> dict[str, Any]:
    """GPT-Neo: kinds of attention, each list of them repeated; here one entry for each block."""
    key = "attention_types"
    if not all(isinstance(config.get(key), list) for config in configs):
        return {}
    try:
        kinds = [[k for of, times in c[key] for _ in range(times) for k in of] for c in configs]
        return {key: [[[kinds[i][old]], 1] for i, old in _origins(pieces)]}
    except (TypeError, ValueError, IndexError):
        raise FamilyError(
            f"stack: {key} must be lists of kinds with how often each repeats; got "
            f"{str(configs[0][key])[:80]}"
        ) from None


_RULES: Final[tuple[Rule, ...]] = (
    _global_every,
    _attention_types,
    _periodic("attn_layer_period", "attn_layer_offset"),
    _periodic("expert_layer_period", "expert_layer_offset"),
    _dense_first,
    _sparse,
)
