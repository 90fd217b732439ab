r"""Which layer of a model a tensor belongs to, read from its name.

`classify` maps a tensor's name to a `LayerKey`: tower, block, module, projection, expert. What is
known about names is one table, `_FAMILIES`, at the end of this file. It has the names on disk and
those of `state_dict()` (transformers 5 renames some on loading and saving). An unknown name with a
block number is in that block; its module and projection are then read from the words in it
(`_WORDS`), and it is `other` if none is known. Only a name without a block number is outside the
blocks. Overrides in a recipe describe other names.

What a module holds:

- `attention`: projections of self- and cross-attention (`cross_q` ...), their relative position
  biases and mask buffers, and the scale of the attention's output (DINOv2's `layer_scale1`).
- `mlp`: the feed-forward part and its scale; in a mixture of experts all experts, the
  shared expert and the router (projection `router`).
- `norm`: every normalization, including that of queries and keys (projection `q`, `k`) and one
  before the first block. `final_norm` is the one after the last block.
- `embedding`: tokens, positions, patches, class and mask tokens.
- `head`: everything after the final norm (language model heads, classifiers, poolers, projections
  into a common space, the logit scale), including norms inside it.

The tower is `model` in models with one tower, and for tensors outside every tower (T5's shared
embedding, heads). Vision-language models have `vision` and `text`, encoder-decoders `encoder` and
`decoder`. Any other list of blocks is a separate tower with the name before the block number
(`down_blocks`, `single_transformer_blocks`), so block 3 of one list is never block 3 of another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Final, NamedTuple

from taskvec.errors import ParameterError, RecipeError, nearest
from taskvec.patterns import Pattern

GRANULARITIES: Final = ("tensor", "module", "block")
MODULES: Final = ("attention", "mlp", "norm", "embedding", "final_norm", "head", "other")


# Ends of the names of tensors whose rows are tokens.
TOKEN_EMBEDDINGS: Final = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "shared.weight",
    "token_embedding.weight",
    "tok_embeddings.weight",
    "backbone.embeddings.weight",
)
LANGUAGE_HEADS: Final = (
    "lm_head.weight",
    "embed_out.weight",
    "cls.predictions.decoder.weight",
    "lm_head.decoder.weight",
    "proj_out.weight",
)


@dataclass(frozen=True, slots=True)
class LayerKey:
    """Where a tensor sits in its model.

    `block` counts from 0 within the tower and is None outside the blocks. `projection` is None
    for tensors that are not projections. `expert` is None for experts fused into one tensor and for
    the shared expert (whose projections are `shared_gate`, `shared_up`, `shared_down`).
    """

    tower: str
    block: int | None
    module: str
    projection: str | None
    expert: int | None

    def at(self, granularity: str, name: str) -> str:
        """Identifier of the layer that tensor `name`, whose key this is, belongs to.

        Tensors outside the blocks are layers of their own at every granularity, tensors classified
        `other` at `module`.

        >>> name = "model.layers.3.mlp.up_proj.weight"
        >>> [classify(name).at(granularity, name) for granularity in GRANULARITIES]
        ['model.layers.3.mlp.up_proj.weight', 'model/3/mlp', 'model/3']

        Raises:
            ParameterError: `granularity` is not one of GRANULARITIES.
        """
        if granularity not in GRANULARITIES:
            raise ParameterError(
                f"granularity: got {granularity!r}; {nearest(str(granularity), GRANULARITIES)}"
            )
        if granularity == "tensor" or self.block is None:
            return name
        block = f"{self.tower}/{self.block}"
        if granularity == "block":
            return block
        return name if self.module == "other" else f"{block}/{self.module}"


@dataclass(frozen=True, slots=True)
class Override:
    r"""Names that a recipe classifies itself; made by `override`.

    The pattern is looked for anywhere in a name (`re.search`): anchor it with `^` and `$`, and end
    an index with `\.`, where that matters. Its optional named groups `block` and `expert` must
    capture whole numbers.
    """

    pattern: Pattern
    tower: str
    module: str
    projection: str | None

    def match(self, name: str) -> LayerKey | None:
        """The key of `name`, or None if the pattern is not found in it.

        Raises:
            RecipeError: a named group captured something else than a whole number.
        """
        found = self.pattern.search(name)
        if found is None:
            return None
        indices: dict[str, int | None] = {"block": None, "expert": None}
        for group, text in found.items():
            if text is not None and not _whole_number(text):
                raise RecipeError(
                    f"override {self.pattern.text!r}: group {group!r} captured {text!r} in "
                    f"tensor {name!r}, expected a whole number; let it match \\d+ only"
                )
            indices[group] = None if text is None else int(text)
        return LayerKey(
            self.tower, indices["block"], self.module, self.projection, indices["expert"]
        )


def classify(name: str, overrides: Sequence[Override] = ()) -> LayerKey:
    """The place of tensor `name` in its model.

    Overrides are tried first and in their order, then the table of known architectures.

    >>> classify("model.layers.3.self_attn.q_proj.weight")
    LayerKey(tower='model', block=3, module='attention', projection='q', expert=None)
    >>> classify("transformer.h.3.odd.weight")
    LayerKey(tower='model', block=3, module='other', projection=None, expert=None)

    Raises:
        RecipeError: a group of an override captured something else than a whole number. Without
            overrides no name fails.
    """
    for rule in overrides:
        key = rule.match(name)
        if key is not None:
            return key
    parts = _INDEX_SEGMENT.split(name)  # literal text and indices take turns
    place = _place(tuple(parts[::2]))
    indices = parts[1::2]
    return LayerKey(
        place.tower,
        None if place.block is None else int(indices[place.block]),
        place.module,
        place.projection,
        None if place.expert is None else int(indices[place.expert]),
    )


def renumber(name: str, block: int) -> str:
    """The name of a tensor in a block with another number for the block.

    >>> renumber("model.layers.3.mlp.experts.3.up_proj.weight", 10)
    'model.layers.10.mlp.experts.3.up_proj.weight'
    """
    parts = _INDEX_SEGMENT.split(name)
    place = _place(tuple(parts[::2]))
    if place.block is None:
        return name
    parts[2 * place.block + 1] = str(block)
    return "".join(parts)


def override(entry: Mapping[str, object]) -> Override:
    r"""An override from its entry in a recipe.

    >>> rule = override(
    ...     {
    ...         "pattern": r"visual\.blocks\.(?P<block>\d+)\.attn\.",
    ...         "tower": "vision",
    ...         "module": "attention",
    ...         "projection": "qkv",
    ...     }
    ... )
    >>> classify("visual.blocks.7.attn.qkv.weight", [rule])
    LayerKey(tower='vision', block=7, module='attention', projection='qkv', expert=None)

    Args:
        entry: `pattern` and `module` are required; `tower` is `model` and `projection` None unless
            given.

    Raises:
        RecipeError: a key is unknown, missing or of the wrong type, the pattern is not a regular
            expression or has a named group other than `block` and `expert`, or the module is not
            in MODULES.
    """
    if not isinstance(entry, Mapping):
        raise RecipeError(f"override: got {entry!r}, expected a mapping with pattern and module")
    for key in entry:
        if key not in _OVERRIDE_KEYS:
            raise RecipeError(f"override: unknown key {key!r}; {nearest(str(key), _OVERRIDE_KEYS)}")
    for key in ("pattern", "module"):
        if key not in entry:
            raise RecipeError(f"override: key {key!r} is missing in {dict(entry)!r}")
    text = _text(entry, "pattern")
    module = _text(entry, "module")
    if module not in MODULES:
        raise RecipeError(
            f"override {text!r}: unknown module {module!r}; {nearest(module, MODULES)}"
        )
    tower = _word(entry, "tower") if "tower" in entry else "model"
    projection = _word(entry, "projection") if entry.get("projection") is not None else None
    return Override(_pattern(text), tower, module, projection)


_OVERRIDE_KEYS: Final = ("pattern", "tower", "module", "projection")


def _text(entry: Mapping[str, object], key: str) -> str:
    value = entry[key]
    if not isinstance(value, str) or not value:
        raise RecipeError(f"override: {key} must be text that is not empty, got {value!r}")
    return value


def _word(entry: Mapping[str, object], key: str) -> str:
    """A value that becomes part of layer identifiers, so it must not contain their separator."""
    value = _text(entry, key)
    if not value.isidentifier():
        raise RecipeError(
            f"override: {key} must be a word of letters, digits and underscores, got {value!r}"
        )
    return value


def _pattern(text: str) -> Pattern:
    pattern = Pattern(text, f"override {text[:60]!r}", RecipeError)
    for group in sorted(pattern.groups):
        if group not in ("block", "expert"):
            raise RecipeError(
                f"override {text!r}: group {group!r} means nothing; "
                f"{nearest(group, ('block', 'expert'))}"
            )
    return pattern


def _whole_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= 9


# Looking names up. A model has many tensors but few kinds of names: what is left when the indices
# are taken out (20,000 names of a mixture of experts leave about twenty). So each kind is searched
# for once, and the rest is a lookup.


class _Place(NamedTuple):
    """A key with open indices: `block` and `expert` are positions among the indices of a name."""

    tower: str
    block: int | None
    module: str
    projection: str | None
    expert: int | None


class _Row(NamedTuple):
    pattern: str
    module: str
    projection: str | None = None


class _Family(NamedTuple):
    """Architectures that name their tensors alike.

    A name is `root + blocks + "." + index + "." + row` for a row of `inside`, or `root + row` for a
    row of `outside`. Every root comes with its tower.
    """

    roots: tuple[tuple[str, str], ...]
    blocks: str = ""
    inside: tuple[_Row, ...] = ()
    outside: tuple[_Row, ...] = ()


# Not "007", and not longer than any index.
_INDEX: Final = "(?:0|[1-9][0-9]{0,4})"
_INDEX_SEGMENT: Final = re.compile(rf"(?<=\.)({_INDEX})(?=\.)")
_NOWHERE: Final = _Place("model", None, "other", None, None)
_compiled = cache(re.compile)


@lru_cache(maxsize=8192)
def _place(literals: tuple[str, ...]) -> _Place:
    """The place of all names that consist of these literal texts with any indices between them."""
    probe = literals[0] + "".join(f"{i}{text}" for i, text in enumerate(literals[1:]))
    for family in _FAMILIES:
        for tower, root in family.roots:
            start = _compiled(root).match(probe)
            if start is None:
                continue
            for rest, block, rows in _rests(family, probe, start.end()):
                for row in rows:
                    found = _compiled(row.pattern).fullmatch(rest)
                    if found is not None:
                        expert = found.groupdict().get("expert")
                        return _Place(
                            tower,
                            block,
                            row.module,
                            row.projection,
                            None if expert is None else int(expert),
                        )
    return _place_by_number(literals, probe)


def _rests(
    family: _Family, probe: str, start: int
) -> Iterator[tuple[str, int | None, tuple[_Row, ...]]]:
    """What follows the root, and what follows a block's index if there is one, with their rows."""
    yield probe[start:], None, family.outside
    if family.inside:
        block = _compiled(rf"{family.blocks}\.({_INDEX})\.").match(probe, start)
        if block is not None:
            yield probe[block.end() :], int(block[1]), family.inside


# Names that match no row of the table but have a block number.

# Lists inside a module whose numbers are not those of blocks.
_NOT_BLOCKS: Final = re.compile(
    r".*(?:mlp|merger|proj|projector|projection|resampler|classifier|head|heads|score|scores|fc|net"
    r"|conv|convs|linear|linears|embed|embeddings|experts|norms|adapter|adapters|to_out|stem|pooler"
    r"|bn|downsample|upsample|cond|gate|act|dropout)"
)
_BLOCKS: Final = re.compile(r".*(?:layers?|blocks?|stages?)|h")
_LONGEST: Final = 1000  # characters of a name that is searched for words
# Segments that do not distinguish one list of blocks from another.
_PLAIN: Final = frozenset(
    {"model", "base_model", "auto_model", "transformer", "backbone", "diffusion_model"}
    | {"layers", "layer", "h", "blocks", "block", "resblocks", "gpt_neox"}
    | {"bert", "roberta", "distilbert", "electra", "deberta", "albert", "mpnet", "esm"}
    | {"vit", "deit", "beit", "dinov2"}
)
_TOWERS: Final = {
    **dict.fromkeys(("visual", "vision", "vision_tower", "vision_model"), "vision"),
    **dict.fromkeys(("text", "text_model", "language_model", "llm"), "text"),
    **dict.fromkeys(("audio", "audio_tower", "audio_model"), "audio"),
}


def _place_by_number(literals: tuple[str, ...], probe: str) -> _Place:
    """The place of a name by its numbers and the words in it."""
    if len(probe) > _LONGEST:
        return _NOWHERE
    start = 0
    for block, before in enumerate(literals[:-1]):
        start += len(before)
        path = [segment for segment in probe[:start].split(".") if segment]
        start += len(str(block))
        rest = probe[start + 1 :]
        if not path or not rest or _NOT_BLOCKS.fullmatch(path[-1]):
            continue
        # What has no module inside is an entry of a sequence, unless the sequence is of blocks.
        if "." in rest or _BLOCKS.fullmatch(path[-1]):
            return _Place(_tower_of(probe, path, block), block, *_read(rest))
    return _NOWHERE


def _tower_of(probe: str, path: Sequence[str], block: int) -> str:
    """The tower that a list of blocks is in: that of a family with this list, or by its path."""
    for family in _FAMILIES:
        for tower, root in family.roots:
            start = _compiled(root).match(probe)
            if start is not None and family.inside:
                found = _compiled(rf"{family.blocks}\.({_INDEX})\.").match(probe, start.end())
                if found is not None and int(found[1]) == block:
                    return tower
    words = list(dict.fromkeys(_TOWERS.get(s, s) for s in path if s not in _PLAIN))
    if words and words[0] in _TOWERS.values():
        words = [word for word in words if word != "encoder"]
    return "_".join(re.sub(r"\W", "_", word) for word in words) or "model"


def _read(rest: str) -> tuple[str, str | None, int | None]:
    """Module, projection and place of the expert's index, from the words behind a block's index."""
    expert = re.search(rf"(?:^|\.)experts\.({_INDEX})\.", rest)
    kinds = [
        (module, projection)
        for pattern, module, projection in _WORDS
        if _compiled(pattern).search(rest)
    ]
    module, projection = kinds[0] if kinds else ("other", None)
    if projection is not None and re.search(r"(?:^|\.)shared_(?:expert|mlp)", rest):
        projection = f"shared_{projection}"
    elif projection is not None and re.search(r"(?:^|\.)(?:cross|encoder)_?attn|attn2\.", rest):
        projection = f"cross_{projection}"
    return module, projection, None if expert is None or module != "mlp" else int(expert[1])


def _words() -> tuple[tuple[str, str, str | None], ...]:
    """Patterns of what follows a block's index, with module and projection; the first that fits."""
    end = r"(?:\.(?:weight|bias|base_layer\.weight))?$"
    attention = r"(?:^|[._])(?:[a-z]*attn\d?|[a-z]*attention|sa|ca)(?=[._])(?:.*\.)?"
    mlp = (
        r"(?:^|\.)(?:\w*mlp\w*|\w*ffn?\w*|feed_forward\w*|\w*moe\w*|\w*experts?|ff_context"
        r"|intermediate|output)\.(?:.*\.)?"
    )
    rows: list[tuple[str, str, str | None]] = [
        (rf"(?:^|[._])q_?(?:layer_?)?norm{end}", "norm", "q"),
        (rf"(?:^|[._])k_?(?:layer_?)?norm{end}", "norm", "k"),
        (r"(?:^|\.)\w*norm\w*\.(?:weight|bias|gamma|beta|scale)$", "norm", None),
        (r"(?:^|[._])ln_?(?:[0-9f]|\w+)?\.(?:weight|bias|gamma|beta)$", "norm", None),
    ]
    for words, projection in (
        ("q_proj|query|query_proj|q_lin|to_q|q|wq|Wq", "q"),
        ("k_proj|key|key_proj|k_lin|to_k|k|wk|Wk", "k"),
        ("v_proj|value|value_proj|v_lin|to_v|v|wv|Wv", "v"),
        ("qkv|qkv_proj|Wqkv|c_attn|query_key_value|in_proj|in_proj_weight|in_proj_bias"
         "|in_proj_qkvz|to_qkv", "qkv"),
        ("q_a_proj", "q_a"), ("q_b_proj", "q_b"),
        ("kv_a_proj_with_mqa", "kv_a"), ("kv_b_proj", "kv_b"),
        ("o_proj|out_proj|out_lin|dense|proj|c_proj|Wo|wo|o|to_out\\.\\d+|to_out", "o"),
    ):  # fmt: skip
        rows.append((rf"{attention}(?:{words}){end}", "attention", projection))
    rows.append((attention, "attention", None))
    rows.append((rf"{mlp}(?:gate|router|router\.layer|gate\.wg){end}", "mlp", "router"))
    rows.append((r"(?:^|\.)shared_expert_gate\.", "mlp", "router"))
    for words, projection in (
        ("gate_up_proj(?:_bias)?|input_linear|Wi|weights_in|w12|experts\\.w1w3", "gate_up"),
        ("gate_proj|w1|wi_0|fc1_g", "gate"),
        ("up_proj|w3|wi_1|wi|fc1|c_fc|fc_in|lin1|linear_fc1|dense_h_to_4h|intermediate\\.dense"
         "|net\\.\\d+\\.proj", "up"),
        ("down_proj(?:_bias)?|w2|wo|fc2|c_proj|fc_out|lin2|linear_fc2|dense_4h_to_h"
         "|output_linear|output\\.dense|Wo|net\\.\\d+", "down"),
    ):  # fmt: skip
        rows.append((rf"(?:{mlp}|^)(?:{words}){end}", "mlp", projection))
    rows.append((mlp, "mlp", None))
    rows.append((r"(?:^|\.)(?:mamba|mixer|conv|ssm|rec|recurrent)\.out_proj" + end, "other", "o"))
    return tuple(rows)


_WORDS: Final = _words()


# The table. Together, root, blocks and row match a whole name. Indices are matched by _INDEX and
# _EXPERT only: patterns are tried on a name whose indices are replaced by their positions, so they
# must not tell indices apart. The first family that fits wins.

_WB: Final = r"\.(?:weight|bias)"
_EXPERT: Final = rf"(?P<expert>{_INDEX})\."
_NORM: Final = r"\.(?:weight|bias|gamma|beta)"  # gamma, beta: BERT from TensorFlow checkpoints

_SELF_ATTENTION: Final = (
    _Row(rf"self_attn\.q_proj{_WB}", "attention", "q"),
    _Row(rf"self_attn\.k_proj{_WB}", "attention", "k"),
    _Row(rf"self_attn\.v_proj{_WB}", "attention", "v"),
)

_FAMILIES: Final[tuple[_Family, ...]] = (
    # Llama, Mistral, Mixtral, Qwen2, Qwen2-MoE, Qwen3, Qwen3-MoE, Gemma 2, Gemma 3, Phi-3. The
    # first two roots are the language model inside Gemma 3 with images, in memory and on disk.
    _Family(
        roots=(
            ("text", r"model\.language_model\."),
            ("text", r"language_model\.model\."),
            ("model", r"(?:model\.)?"),
        ),
        blocks="layers",
        inside=(
            *_SELF_ATTENTION,
            _Row(rf"self_attn\.o_proj{_WB}", "attention", "o"),
            _Row(rf"self_attn\.qkv_proj{_WB}", "attention", "qkv"),  # Phi-3
            _Row(r"self_attn\.rotary_emb\.inv_freq", "attention"),  # buffer, old Llama checkpoints
            _Row(r"self_attn\.q_norm\.weight", "norm", "q"),  # Qwen3, Gemma 3
            _Row(r"self_attn\.k_norm\.weight", "norm", "k"),
            _Row(rf"mlp\.gate_proj{_WB}", "mlp", "gate"),
            _Row(rf"mlp\.up_proj{_WB}", "mlp", "up"),
            _Row(rf"mlp\.down_proj{_WB}", "mlp", "down"),
            _Row(rf"mlp\.gate_up_proj{_WB}", "mlp", "gate_up"),  # Phi-3
            # Qwen-MoE and Mixtral in memory (transformers 5): all experts in one tensor.
            _Row(r"mlp\.experts\.gate_up_proj", "mlp", "gate_up"),
            _Row(r"mlp\.experts\.down_proj", "mlp", "down"),
            # Qwen-MoE on disk.
            _Row(r"mlp\.gate\.weight", "mlp", "router"),
            _Row(rf"mlp\.experts\.{_EXPERT}gate_proj\.weight", "mlp", "gate"),
            _Row(rf"mlp\.experts\.{_EXPERT}up_proj\.weight", "mlp", "up"),
            _Row(rf"mlp\.experts\.{_EXPERT}down_proj\.weight", "mlp", "down"),
            _Row(r"mlp\.shared_expert\.gate_proj\.weight", "mlp", "shared_gate"),
            _Row(r"mlp\.shared_expert\.up_proj\.weight", "mlp", "shared_up"),
            _Row(r"mlp\.shared_expert\.down_proj\.weight", "mlp", "shared_down"),
            _Row(r"mlp\.shared_expert_gate\.weight", "mlp", "shared_router"),
            # Mixtral on disk.
            _Row(r"block_sparse_moe\.gate\.weight", "mlp", "router"),
            _Row(rf"block_sparse_moe\.experts\.{_EXPERT}w1\.weight", "mlp", "gate"),
            _Row(rf"block_sparse_moe\.experts\.{_EXPERT}w3\.weight", "mlp", "up"),
            _Row(rf"block_sparse_moe\.experts\.{_EXPERT}w2\.weight", "mlp", "down"),
            _Row(r"(?:input|post_attention)_layernorm\.weight", "norm"),
            _Row(r"(?:pre|post)_feedforward_layernorm\.weight", "norm"),  # Gemma
        ),
        outside=(
            _Row(r"embed_tokens\.weight", "embedding"),
            _Row(rf"(?:norm|final_layernorm|final_norm|embedding_norm){_WB}", "final_norm"),
        ),
    ),
    # Mamba, outside the blocks.
    _Family(
        roots=(("model", r"(?:backbone|model)\."),),
        outside=(
            _Row(r"embeddings?\.weight", "embedding"),
            _Row(r"norm_f\.weight", "final_norm"),
        ),
    ),
    # DistilBERT, outside the blocks.
    _Family(
        roots=(("model", r"(?:distilbert\.)?"),),
        outside=(
            _Row(rf"vocab_(?:transform|layer_norm|projector){_WB}", "head"),
            _Row(r"embeddings\.tok_embeddings\.weight", "embedding"),  # ModernBERT
        ),
    ),
    # GPT-2.
    _Family(
        roots=(("model", r"(?:transformer\.)?"),),
        blocks="h",
        inside=(
            _Row(rf"attn\.c_attn{_WB}", "attention", "qkv"),
            _Row(rf"attn\.c_proj{_WB}", "attention", "o"),
            _Row(r"attn\.(?:bias|masked_bias)", "attention"),  # buffers of the causal mask
            _Row(rf"crossattention\.q_attn{_WB}", "attention", "cross_q"),
            _Row(rf"crossattention\.c_attn{_WB}", "attention", "cross_kv"),
            _Row(rf"crossattention\.c_proj{_WB}", "attention", "cross_o"),
            _Row(rf"mlp\.c_fc{_WB}", "mlp", "up"),
            _Row(rf"mlp\.c_proj{_WB}", "mlp", "down"),
            _Row(rf"ln_(?:1|2|cross_attn){_WB}", "norm"),
        ),
        outside=(
            _Row(r"w[tp]e\.weight", "embedding"),
            _Row(rf"ln_f{_WB}", "final_norm"),
        ),
    ),
    # GPT-NeoX, Pythia.
    _Family(
        roots=(("model", r"(?:gpt_neox\.)?"),),
        blocks="layers",
        inside=(
            _Row(rf"attention\.query_key_value{_WB}", "attention", "qkv"),
            _Row(rf"attention\.dense{_WB}", "attention", "o"),
            # Buffers of older checkpoints.
            _Row(r"attention\.(?:bias|masked_bias|rotary_emb\.inv_freq)", "attention"),
            _Row(rf"mlp\.dense_h_to_4h{_WB}", "mlp", "up"),
            _Row(rf"mlp\.dense_4h_to_h{_WB}", "mlp", "down"),
            _Row(rf"(?:input|post_attention)_layernorm{_WB}", "norm"),
        ),
        outside=(
            _Row(r"embed_in\.weight", "embedding"),
            _Row(rf"final_layer_norm{_WB}", "final_norm"),
        ),
    ),
    # BLOOM (on disk without a root) and Falcon, whose blocks differ in norms alone.
    _Family(
        roots=(("model", r"(?:transformer\.)?"),),
        blocks="h",
        inside=(
            _Row(rf"self_attention\.query_key_value{_WB}", "attention", "qkv"),
            _Row(rf"self_attention\.dense{_WB}", "attention", "o"),
            _Row(rf"mlp\.dense_h_to_4h{_WB}", "mlp", "up"),
            _Row(rf"mlp\.dense_4h_to_h{_WB}", "mlp", "down"),
            _Row(rf"(?:(?:input|post_attention)_layernorm|ln_attn|ln_mlp){_WB}", "norm"),
        ),
        outside=(
            _Row(r"word_embeddings\.weight", "embedding"),
            _Row(rf"word_embeddings_layernorm{_WB}", "norm"),
        ),
    ),
    # MPT.
    _Family(
        roots=(("model", r"(?:transformer\.)?"),),
        blocks="blocks",
        inside=(
            _Row(rf"attn\.Wqkv{_WB}", "attention", "qkv"),
            _Row(rf"attn\.out_proj{_WB}", "attention", "o"),
            _Row(rf"attn\.q_ln{_WB}", "norm", "q"),
            _Row(rf"attn\.k_ln{_WB}", "norm", "k"),
            _Row(rf"ffn\.up_proj{_WB}", "mlp", "up"),
            _Row(rf"ffn\.down_proj{_WB}", "mlp", "down"),
            _Row(rf"norm_[12]{_WB}", "norm"),
        ),
        outside=(_Row(rf"norm_f{_WB}", "final_norm"),),
    ),
    # T5: version 1.0 (wi), version 1.1 and Flan (wi_0, wi_1), encoder alone, classifier (root
    # transformer). Before OPT, whose bare decoder.embed_tokens and decoder.final_layer_norm.weight
    # are also T5's: they get T5's tower, which changes no layer.
    _Family(
        roots=(
            ("encoder", r"(?:transformer\.)?encoder\."),
            ("decoder", r"(?:transformer\.)?decoder\."),
        ),
        blocks="block",
        inside=(
            _Row(rf"layer\.{_INDEX}\.SelfAttention\.q\.weight", "attention", "q"),
            _Row(rf"layer\.{_INDEX}\.SelfAttention\.k\.weight", "attention", "k"),
            _Row(rf"layer\.{_INDEX}\.SelfAttention\.v\.weight", "attention", "v"),
            _Row(rf"layer\.{_INDEX}\.SelfAttention\.o\.weight", "attention", "o"),
            _Row(
                rf"layer\.{_INDEX}\.SelfAttention\.relative_attention_bias\.weight",
                "attention",
                "relative_bias",
            ),
            _Row(rf"layer\.{_INDEX}\.EncDecAttention\.q\.weight", "attention", "cross_q"),
            _Row(rf"layer\.{_INDEX}\.EncDecAttention\.k\.weight", "attention", "cross_k"),
            _Row(rf"layer\.{_INDEX}\.EncDecAttention\.v\.weight", "attention", "cross_v"),
            _Row(rf"layer\.{_INDEX}\.EncDecAttention\.o\.weight", "attention", "cross_o"),
            _Row(  # unused, but in the first checkpoints
                rf"layer\.{_INDEX}\.EncDecAttention\.relative_attention_bias\.weight",
                "attention",
                "cross_relative_bias",
            ),
            _Row(rf"layer\.{_INDEX}\.DenseReluDense\.wi_0\.weight", "mlp", "gate"),
            _Row(rf"layer\.{_INDEX}\.DenseReluDense\.wi(?:_1)?\.weight", "mlp", "up"),
            _Row(rf"layer\.{_INDEX}\.DenseReluDense\.wo\.weight", "mlp", "down"),
            _Row(rf"layer\.{_INDEX}\.layer_norm\.weight", "norm"),
        ),
        outside=(
            _Row(r"embed_tokens\.weight", "embedding"),
            _Row(r"final_layer_norm\.weight", "final_norm"),
        ),
    ),
    _Family(
        roots=(("model", r"(?:transformer\.)?"),),
        outside=(_Row(r"shared\.weight", "embedding"),),
    ),
    # OPT, and decoders of BART, Marian, Whisper. The final_layer_norm inside a block is the norm
    # before the block's MLP.
    _Family(
        roots=(("decoder", r"(?:model\.)?decoder\."),),
        blocks="layers",
        inside=(
            *_SELF_ATTENTION,
            _Row(rf"self_attn\.out_proj{_WB}", "attention", "o"),
            _Row(rf"encoder_attn\.q_proj{_WB}", "attention", "cross_q"),
            _Row(rf"encoder_attn\.k_proj{_WB}", "attention", "cross_k"),
            _Row(rf"encoder_attn\.v_proj{_WB}", "attention", "cross_v"),
            _Row(rf"encoder_attn\.out_proj{_WB}", "attention", "cross_o"),
            _Row(rf"fc1{_WB}", "mlp", "up"),
            _Row(rf"fc2{_WB}", "mlp", "down"),
            _Row(rf"(?:self_attn|encoder_attn|final)_layer_norm{_WB}", "norm"),
        ),
        outside=(
            _Row(r"embed_(?:tokens|positions)\.weight", "embedding"),
            _Row(r"project_in\.weight", "embedding"),
            _Row(r"project_out\.weight", "head"),
            _Row(rf"layernorm_embedding{_WB}", "norm"),
            _Row(rf"(?:final_layer_norm|layer_norm){_WB}", "final_norm"),
        ),
    ),
    # Encoders of BART, Marian, Whisper.
    _Family(
        roots=(("encoder", r"model\.encoder\."),),
        blocks="layers",
        inside=(
            *_SELF_ATTENTION,
            _Row(rf"self_attn\.out_proj{_WB}", "attention", "o"),
            _Row(rf"fc1{_WB}", "mlp", "up"),
            _Row(rf"fc2{_WB}", "mlp", "down"),
            _Row(rf"(?:self_attn|final)_layer_norm{_WB}", "norm"),
        ),
        outside=(
            _Row(rf"conv[12]{_WB}", "embedding"),
            _Row(r"embed_(?:tokens|positions)\.weight", "embedding"),
            _Row(rf"layernorm_embedding{_WB}", "norm"),
            _Row(rf"layer_norm{_WB}", "final_norm"),
        ),
    ),
    # BERT, RoBERTa, and what is named like them.
    _Family(
        roots=(("model", r"(?:(?:bert|roberta|electra|deberta)\.)?"),),
        blocks=r"encoder\.layer",
        inside=(
            _Row(rf"attention\.self\.query{_WB}", "attention", "q"),
            _Row(rf"attention\.self\.key{_WB}", "attention", "k"),
            _Row(rf"attention\.self\.value{_WB}", "attention", "v"),
            _Row(rf"attention\.output\.dense{_WB}", "attention", "o"),
            _Row(rf"crossattention\.self\.query{_WB}", "attention", "cross_q"),
            _Row(rf"crossattention\.self\.key{_WB}", "attention", "cross_k"),
            _Row(rf"crossattention\.self\.value{_WB}", "attention", "cross_v"),
            _Row(rf"crossattention\.output\.dense{_WB}", "attention", "cross_o"),
            _Row(rf"intermediate\.dense{_WB}", "mlp", "up"),
            _Row(rf"output\.dense{_WB}", "mlp", "down"),
            _Row(rf"(?:(?:cross)?attention\.)?output\.LayerNorm{_NORM}", "norm"),
        ),
        outside=(
            _Row(r"embeddings\.(?:word|position|token_type)_embeddings\.weight", "embedding"),
            _Row(r"embeddings\.(?:position|token_type)_ids", "embedding"),  # buffers
            _Row(rf"embeddings\.LayerNorm{_NORM}", "norm"),
            _Row(rf"pooler\.dense{_WB}", "head"),
        ),
    ),
    # ViT and DINOv2 (with registers, with SwiGLU): attention.attention.query on disk and in
    # transformers 4, attention.q_proj in memory since transformers 5.
    _Family(
        roots=(("model", r"(?:(?:vit|dinov2|dinov2_with_registers)\.)?"),),
        blocks=r"(?:encoder\.layer|layers)",
        inside=(
            _Row(rf"attention\.(?:attention\.query|q_proj){_WB}", "attention", "q"),
            _Row(rf"attention\.(?:attention\.key|k_proj){_WB}", "attention", "k"),
            _Row(rf"attention\.(?:attention\.value|v_proj){_WB}", "attention", "v"),
            _Row(rf"attention\.(?:output\.dense|o_proj){_WB}", "attention", "o"),
            _Row(r"layer_scale1\.lambda1", "attention", "scale"),
            _Row(rf"(?:intermediate\.dense|mlp\.fc1){_WB}", "mlp", "up"),
            _Row(rf"(?:output\.dense|mlp\.fc2){_WB}", "mlp", "down"),
            _Row(rf"mlp\.weights_in{_WB}", "mlp", "gate_up"),
            _Row(rf"mlp\.gate_proj{_WB}", "mlp", "gate"),
            _Row(rf"mlp\.up_proj{_WB}", "mlp", "up"),
            _Row(rf"mlp\.(?:weights_out|down_proj){_WB}", "mlp", "down"),
            _Row(r"layer_scale2\.lambda1", "mlp", "scale"),
            _Row(rf"(?:layernorm_before|layernorm_after|norm1|norm2){_WB}", "norm"),
        ),
        outside=(
            _Row(r"embeddings\.(?:cls_token|mask_token|register_tokens)", "embedding"),
            _Row(r"embeddings\.position_embeddings", "embedding"),
            _Row(rf"embeddings\.patch_embeddings\.projection{_WB}", "embedding"),
            _Row(rf"layernorm{_WB}", "final_norm"),
            _Row(rf"pooler\.dense{_WB}", "head"),
        ),
    ),
    # CLIP and SigLIP as transformers names them, and the vision tower of Gemma 3 in memory and on
    # disk. One tower alone has no root since transformers 5.
    _Family(
        roots=(
            ("text", r"text_model\."),
            ("vision", r"vision_model\."),
            ("vision", r"(?:model\.)?vision_tower\.(?:vision_model\.)?"),
            ("model", ""),
        ),
        blocks=r"encoder\.layers",
        inside=(
            *_SELF_ATTENTION,
            _Row(rf"self_attn\.out_proj{_WB}", "attention", "o"),
            _Row(rf"mlp\.fc1{_WB}", "mlp", "up"),
            _Row(rf"mlp\.fc2{_WB}", "mlp", "down"),
            _Row(rf"layer_norm[12]{_WB}", "norm"),
        ),
        outside=(
            _Row(r"embeddings\.class_embedding", "embedding"),
            _Row(rf"embeddings\.patch_embedding{_WB}", "embedding"),
            _Row(r"embeddings\.(?:token|position)_embedding\.weight", "embedding"),
            _Row(r"embeddings\.position_ids", "embedding"),  # buffer
            _Row(rf"pre_layrnorm{_WB}", "norm"),  # the spelling is theirs
            _Row(rf"(?:post_layernorm|final_layer_norm){_WB}", "final_norm"),
            # SigLIP: a projection (text), attention pooling (vision).
            _Row(rf"head{_WB}", "head"),
            _Row(r"head\.(?:probe|attention\.in_proj_(?:weight|bias))", "head"),
            _Row(rf"head\.(?:attention\.out_proj|layernorm|mlp\.fc1|mlp\.fc2){_WB}", "head"),
        ),
    ),
    # ViT as timm names it (DINOv2's own code too), alone and as the vision tower of open_clip.
    _Family(
        roots=(("vision", r"visual\.trunk\."), ("model", "")),
        blocks="blocks",
        inside=(
            _Row(rf"attn\.qkv{_WB}", "attention", "qkv"),
            _Row(rf"attn\.proj{_WB}", "attention", "o"),
            _Row(rf"attn\.q_norm{_WB}", "norm", "q"),
            _Row(rf"attn\.k_norm{_WB}", "norm", "k"),
            _Row(r"ls1\.gamma", "attention", "scale"),
            _Row(rf"mlp\.(?:fc1|fc1_x){_WB}", "mlp", "up"),
            _Row(rf"mlp\.fc1_g{_WB}", "mlp", "gate"),
            _Row(rf"mlp\.w12{_WB}", "mlp", "gate_up"),
            _Row(rf"mlp\.(?:fc2|w3){_WB}", "mlp", "down"),
            _Row(r"ls2\.gamma", "mlp", "scale"),
            _Row(rf"(?:norm[12]|attn\.norm|mlp\.norm){_WB}", "norm"),
        ),
        outside=(
            _Row(r"cls_token|dist_token|reg_token|register_tokens|mask_token", "embedding"),
            _Row(r"pos_embed", "embedding"),
            _Row(rf"patch_embed\.proj{_WB}", "embedding"),
            _Row(rf"norm_pre{_WB}", "norm"),
            _Row(rf"(?:norm|fc_norm){_WB}", "final_norm"),
            _Row(rf"(?:head|head_dist){_WB}", "head"),
            _Row(r"attn_pool\.(?:latent|pos_embed)", "head"),
            _Row(rf"attn_pool\.(?:q|kv|proj|q_norm|k_norm|norm|mlp\.fc1|mlp\.fc2){_WB}", "head"),
        ),
    ),
    # CLIP with a vision transformer as OpenAI and open_clip name it; the root text is open_clip's
    # CustomTextCLIP.
    _Family(
        roots=(("vision", r"visual\."), ("text", r"(?:text\.)?")),
        blocks=r"transformer\.resblocks",
        inside=(
            _Row(r"attn\.in_proj_(?:weight|bias)", "attention", "qkv"),
            _Row(rf"attn\.out_proj{_WB}", "attention", "o"),
            _Row(r"ls_1\.gamma", "attention", "scale"),
            _Row(rf"mlp\.c_fc{_WB}", "mlp", "up"),
            _Row(rf"mlp\.c_proj{_WB}", "mlp", "down"),
            _Row(r"ls_2\.gamma", "mlp", "scale"),
            _Row(rf"ln_[12]{_WB}", "norm"),
        ),
    ),
    _Family(
        roots=(("vision", r"visual\."),),
        outside=(
            _Row(r"class_embedding|positional_embedding|conv1\.weight", "embedding"),
            _Row(rf"ln_pre{_WB}", "norm"),
            _Row(rf"ln_post{_WB}", "final_norm"),
            _Row(r"proj", "head"),
            _Row(rf"head\.(?:proj|mlp\.fc1|mlp\.fc2){_WB}", "head"),  # behind a tower of timm
            _Row(r"attn_pool\.(?:query|attn\.(?:in|q|k|v)_proj_(?:weight|bias))", "head"),
            _Row(rf"attn_pool\.(?:attn\.out_proj|ln_q|ln_k){_WB}", "head"),
        ),
    ),
    _Family(
        roots=(("text", r"(?:text\.)?"),),
        outside=(
            _Row(r"token_embedding\.weight|positional_embedding|cls_emb", "embedding"),
            _Row(rf"ln_final{_WB}", "final_norm"),
            _Row(rf"text_projection(?:{_WB})?", "head"),  # CLIP of transformers too
        ),
    ),
    # What leads into and out of a vision tower: CLIP of transformers, Gemma 3, LLaVA, Qwen-VL.
    _Family(
        roots=(("vision", ""),),
        outside=(
            _Row(r"visual_projection\.weight", "head"),
            _Row(r"(?:model\.)?multi_modal_projector\.mm_input_projection_weight", "head"),
            _Row(r"(?:model\.)?multi_modal_projector\.mm_soft_emb_norm\.weight", "head"),
            _Row(rf"(?:model\.)?multi_modal_projector\.(?:linear_[12]|norm){_WB}", "head"),  # LLaVA
            _Row(
                rf"(?:model\.)?visual\.merger\.(?:ln_q|norm|mlp\.{_INDEX}|linear_fc[12]){_WB}",
                "head",
            ),
            _Row(rf"(?:model\.)?visual\.patch_embed\.proj{_WB}", "embedding"),
            _Row(r"(?:model\.)?visual\.pos_embed\.weight", "embedding"),
        ),
    ),
    # Heads that stand beside the model: causal (Llama and its like, GPT-2, OPT; embed_out is
    # GPT-NeoX on disk), masked (RoBERTa: lm_head.dense; BERT: cls), classification, question
    # answering, CLIP's logit scale.
    _Family(
        roots=(("text", r"language_model\."), ("model", "")),
        outside=(_Row(rf"lm_head{_WB}", "head"),),
    ),
    _Family(
        roots=(("model", ""),),
        outside=(
            _Row(r"embed_out\.weight", "head"),
            _Row(rf"proj_out{_WB}", "head"),  # Whisper
            _Row(rf"lm_head\.(?:dense|layer_norm|decoder){_WB}", "head"),
            _Row(rf"cls\.predictions\.(?:decoder|transform\.dense){_WB}", "head"),
            _Row(rf"cls\.predictions\.transform\.LayerNorm{_NORM}", "head"),
            _Row(r"cls\.predictions\.bias", "head"),
            _Row(rf"cls\.seq_relationship{_WB}", "head"),
            _Row(rf"(?:score|classifier|qa_outputs){_WB}", "head"),
            _Row(rf"(?:classifier|classification_head)\.(?:dense|out_proj){_WB}", "head"),
            _Row(r"logit_scale|logit_bias", "head"),
        ),
    ),
)


def model_order(tower: str, block: int | None, module: str | None, name: str) -> tuple[object, ...]:
    """Sort key that lists layers in the order of a model, at any granularity.

    Towers that read come before those that write; within one: embeddings, block 0, 1, 2 … 10,
    final norm, head. Numbers within names count as numbers.

    >>> rows = [
    ...     ("model", None, "head", "lm_head.weight"),
    ...     ("model", 10, None, "model/10"),
    ...     ("model", 2, None, "model/2"),
    ...     ("model", None, "embedding", "embed.weight"),
    ... ]
    >>> [row[-1] for row in sorted(rows, key=lambda row: model_order(*row))]
    ['embed.weight', 'model/2', 'model/10', 'lm_head.weight']
    """
    towers = ("vision", "audio", "encoder", "text", "model", "decoder")
    outside = ("embedding", "block", "norm", "final_norm", "head", "other")
    inside = ("attention", "mlp", "norm")
    place = "block" if block is not None else module or "other"
    words = tuple((not w.isdigit(), int(w) if w.isdigit() else w) for w in re.split(r"(\d+)", name))
    return (
        towers.index(tower) if tower in towers else len(towers),
        tower,
        outside.index(place) if place in outside else len(outside),
        -1 if block is None else block,
        inside.index(module) if module in inside else len(inside),
        words,
    )


def module_order(tower: str, module: str) -> tuple[object, ...]:
    """Sort key of kinds of modules: embeddings, what blocks consist of, final norm, head."""
    is_inside = module in ("attention", "mlp", "norm", "block")
    return model_order(tower, 0 if is_inside else None, module, "")
