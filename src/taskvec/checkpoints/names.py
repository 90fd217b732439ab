"""One name for one parameter, under any name in a file.

The same parameter goes by many names: trainers wrap models (`module.`, `_orig_mod.`), a model with
a head calls its inside `bert.…` or `model.…`, versions of transformers move towers
(`model.language_model.layers` was `language_model.model.layers` and, in Qwen2-VL, `model.layers`)
and rename modules. `canonical` gives all of these one name; it serves to compare names, and no
file has it. `Names` finds what a model calls a tensor that goes by another name elsewhere. Literal
names come first everywhere.

`fused` and `taken_apart` say how a tensor of one form is made of tensors of the other: the experts
of a block in one tensor, q, k and v in one, gate and up in one. In each the parts lie one after the
other, as they are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from taskvec.checkpoints.safetensors import TensorInfo

# Model types whose `c_attn`, `c_proj`, `c_fc` and `q_attn` are Conv1D: stored as (in, out).
CONV1D_MODELS: Final = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
# What trainers put around a model or a module; transformers and PEFT do not know such names.
TRAINERS: Final = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
# What trainers and adapters put around a model or a module, anywhere in a name.
_WRAPPERS: Final = TRAINERS | frozenset(
    {"module", "pretrained_model", "base_model", "base_layer", "auto_model", "_fpw_module", "ddp"}
)
# What a model inside another class is called, at the beginning of a name; only in this order.
_ROOTS: Final = frozenset(
    {"model", "language_model", "transformer", "backbone", "llm", "thinker", "gpt_neox", "bert"}
    | {"roberta", "distilbert", "electra", "deberta", "albert", "mpnet", "esm", "vit", "deit"}
    | {"beit", "dinov2", "dinov2_with_registers", "longformer", "xlm", "rwkv"}
    | {"wav2vec2", "hubert", "wavlm", "convnext", "convnextv2", "swin", "segformer", "mobilebert"}
    | {"clip", "siglip"}
)
_VISION: Final = frozenset({"visual", "vision_tower", "vision_model", "image_tower"})
_RENAMED: Final = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\.LayerNorm\.gamma$", ".LayerNorm.weight"),
        (r"\.LayerNorm\.beta$", ".LayerNorm.bias"),
        (r"\.weight_g$", ".parametrizations.weight.original0"),
        (r"\.weight_v$", ".parametrizations.weight.original1"),
        # ViT and its kin, DINOv2: files and memory since transformers 5.
        (r"(^|\.)encoder\.layer\.(?=\d+\.(attention\.(attention|output)\.|intermediate\.|output\."
         r"|layernorm_|norm[12]\.|mlp\.|layer_scale))", r"\1layers."),
        (r"(?<=\.)attention\.attention\.query\.", "attention.q_proj."),
        (r"(?<=\.)attention\.attention\.key\.", "attention.k_proj."),
        (r"(?<=\.)attention\.attention\.value\.", "attention.v_proj."),
        (r"(?<=\d\.)intermediate\.dense\.", "mlp.fc1."),
        # Mixtral and what is named like it.
        (r"\.block_sparse_moe\.", ".mlp."),
        (r"(\.experts\.\d+)\.w1\.", r"\1.gate_proj."),
        (r"(\.experts\.\d+)\.w3\.", r"\1.up_proj."),
        (r"(\.experts\.\d+)\.w2\.", r"\1.down_proj."),
        (r"\.mlp\.input_linear\.weight$", ".mlp.experts.gate_up_proj"),
        (r"\.mlp\.output_linear\.weight$", ".mlp.experts.down_proj"),
        (r"\.mlp\.router\.layer\.weight$", ".mlp.router.weight"),
        # What PEFT calls a module that it saves whole.
        (r"\.(?:modules_to_save|original_module)(?:\.default)?\.", "."),
    )
)  # fmt: skip
# Of ViT alone: BERT has the same ends under `attention.self`.
_VIT: Final = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"(?<=\d\.)attention\.output\.dense\.", "attention.o_proj."),
        (r"(?<=\d\.)output\.dense\.", "mlp.fc2."),
    )
)
_INDEX: Final = re.compile(r"(?<=\.)\d+(?=\.)")


def canonical(name: str) -> str:
    """The name by which a parameter is compared.

    >>> canonical("module.language_model.model.layers.3.mlp.up_proj.weight")
    'layers.3.mlp.up_proj.weight'
    >>> canonical("model.visual.blocks.0.attn.qkv.weight")
    'vision.blocks.0.attn.qkv.weight'
    """
    literal = _INDEX.split(name)
    found = _of_kind("\0".join(literal))
    numbers = iter(_INDEX.findall(name))
    return re.sub("\0", lambda _: next(numbers), found)


@lru_cache(maxsize=8192)
def _of_kind(kind: str) -> str:
    """`canonical` of all names with these texts between their numbers, which are NUL here."""
    segments = kind.split(".")
    if len(segments) > 1 and segments[0].isdecimal():  # a module of sentence-transformers
        segments = segments[1:]
    kept = [s for s in segments[:-1] if s not in _WRAPPERS] + segments[-1:]
    towers = False
    while len(kept) > 1 and (kept[0] in _ROOTS or kept[0] in _VISION):
        towers = towers or kept[0] in _VISION
        kept = kept[1:]
    probe = ".".join(["vision", *kept] if towers else kept)
    # Patterns are written for numbers.
    probe = re.sub("\0", "0", probe)
    for pattern, new in _RENAMED:
        probe = pattern.sub(new, probe)
    if re.search(r"(^|\.)layers\.0\.(attention\.output|output)\.dense\.", probe):
        for pattern, new in _VIT:
            probe = pattern.sub(new, probe)
    numbers = kind.count("\0")
    if len(_INDEX.findall(probe)) != numbers:
        return ".".join(["vision", *kept] if towers else kept)
    return _INDEX.sub("\0", probe)


class Names:
    """The names of a model's tensors, found by other names that they go by."""

    def __init__(self, names: Collection[str]) -> None:
        """Index names; what is asked for literally costs nothing before the first other name."""
        is_set = isinstance(names, (set, frozenset))  # whose order differs from run to run
        ordered = sorted(names) if is_set else names
        self._names = names if isinstance(names, Mapping) else dict.fromkeys(ordered)
        self._by_canonical: dict[str, list[str]] | None = None
        self._roots: set[str] = set()

    def find(self, name: str) -> list[str]:
        """The model's names of a tensor; several if it is not clear which.

        That is the name itself, else what has the same canonical name, else what has one class
        around the model more or less.
        """
        if name in self._names:
            return [name]
        if self._by_canonical is None:
            self._by_canonical = {}
            for each in self._names:
                self._by_canonical.setdefault(canonical(each), []).append(each)
            self._roots = {each.partition(".")[0] for each in self._names}
        plain = canonical(name)
        found = self._by_canonical.get(plain, [])
        if not found and f"vision.{plain}" not in self._by_canonical:
            found = self._by_canonical.get(f"text_model.{plain}", [])
        if not found and plain.startswith("text_model."):
            found = self._by_canonical.get(plain.removeprefix("text_model."), [])
        if found:
            return found
        others = (name.partition(".")[2], *(f"{root}.{name}" for root in sorted(self._roots)))
        return [each for each in others if each in self._names]


def find_tensor(called: str, tensors: Mapping[str, TensorInfo] | Names) -> str | None:
    """The model's name of a tensor that an adapter or a vector may call otherwise; see `Names`."""
    names = tensors if isinstance(tensors, Names) else Names(tensors)
    found = names.find(called)
    return found[0] if len(found) == 1 else None


class Form(NamedTuple):
    """How one tensor is made of others that lie in it one after the other.

    Attributes:
        whole: Name of the fused tensor.
        parts: Names of its parts, in order.
    """

    whole: str
    parts: tuple[str, ...]


_FUSED: Final = (
    (re.compile(r"(?P<path>.*\.)(?:qkv_proj|qkv|Wqkv|w_qkv|W_pack)(?P<end>\.weight|\.bias)"), (
        ("q_proj", "k_proj", "v_proj"), ("to_q", "to_k", "to_v"), ("q", "k", "v"),
        ("query", "key", "value"),
    )),
    (re.compile(r"(?P<path>.*\.)in_proj(?P<end>_weight|_bias)"), (
        ("q_proj", "k_proj", "v_proj"),
    )),
    (re.compile(r"(?P<path>.*\.)gate_up_proj(?P<end>\.weight|\.bias)"), (
        ("gate_proj", "up_proj"),
    )),
)  # fmt: skip
_EXPERTS: Final = (
    (re.compile(r"(?P<path>.*\.experts)\.gate_up_proj"), ("gate_proj", "up_proj")),
    (re.compile(r"(?P<path>.*\.experts)\.down_proj"), ("down_proj",)),
)


def forms(whole: str, experts: int) -> Iterator[Form]:
    """What a fused tensor may be made of, by the canonical names of the parts.

    Args:
        whole: Its canonical name.
        experts: Length of its first dimension, if it has three.

    >>> [form.parts for form in forms("layers.0.mlp.gate_up_proj.weight", 0)]
    [('layers.0.mlp.gate_proj.weight', 'layers.0.mlp.up_proj.weight')]
    """
    for pattern, kinds in _FUSED:
        found = pattern.fullmatch(whole)
        if found is not None:
            end = found["end"].replace("_", ".")
            for parts in kinds:
                yield Form(whole, tuple(f"{found['path']}{part}{end}" for part in parts))
    for pattern, each in _EXPERTS:
        found = pattern.fullmatch(whole)
        if found is not None and experts:
            yield Form(
                whole,
                tuple(
                    f"{found['path']}.{expert}.{part}.weight"
                    for expert in range(experts)
                    for part in each
                ),
            )


def fits(whole: TensorInfo, parts: Sequence[TensorInfo]) -> bool:
    """Whether parts that lie one after the other have the shape of the whole.

    Experts in one tensor have shape (experts, rows of all parts, columns), anything else (rows of
    all parts, columns) or (rows).
    """
    shapes = [part.shape for part in parts]
    if len(whole.shape) == 3:
        count = whole.shape[0]
        if not count or len(parts) % count or any(len(shape) != 2 for shape in shapes):
            return False
        each = len(parts) // count
        groups = [shapes[i : i + each] for i in range(0, len(shapes), each)]
        return all(
            sum(shape[0] for shape in group) == whole.shape[1]
            and all(shape[1] == whole.shape[2] for shape in group)
            for group in groups
        )
    same = all(len(shape) == len(whole.shape) and shape[1:] == whole.shape[1:] for shape in shapes)
    return same and sum(shape[0] for shape in shapes) == whole.shape[0]
