"""Which tensors have a row for each token, and where members differ in what the rows are for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from taskvec.checkpoints.safetensors import TensorInfo
from taskvec.checkpoints.source import Source
from taskvec.checkpoints.tokenizers import Tokenizer, read_tokenizer
from taskvec.errors import CheckpointError, FamilyError, MissingExtraError
from taskvec.layers import LANGUAGE_HEADS, TOKEN_EMBEDDINGS
from taskvec.statistics.collect import describe

_BIASES: Final = (
    *(f"{head.removesuffix('weight')}bias" for head in LANGUAGE_HEADS),
    "lm_head.bias",
    "cls.predictions.bias",
)


def tokenizer_source(sources: Mapping[str, Source], name: str | None) -> Source | None:
    """The member whose tokenizer the result has, as `tokenizer` in `out` names it.

    Args:
        sources: By role, as they are merged.
        name: A task or a role; None for the target.

    Raises:
        FamilyError: it has none, or one with other tokens than the rows that are written.
    """
    if name is None:
        return None
    role = f"task:{name}" if f"task:{name}" in sources else name
    source = sources.get("anchor" if role == "instruct" else role)
    own = None if source is None else read_tokenizer(source)
    target = read_tokenizer(sources["target"])
    if source is None or own is None:
        raise FamilyError(f"tokenizer of {name!r}, named in `out`, does not exist; remove it")
    if target is not None and not own.agrees(target):
        raise FamilyError(
            f"tokenizer of {name!r} ({source.where}): its tokens are not those of the target "
            f"({sources['target'].where}), whose rows are written; remove `tokenizer` from `out`"
        )
    return source


# Ends of the names of tensors with a row for each token.
TOKEN_ROWS: Final = (*TOKEN_EMBEDDINGS, *LANGUAGE_HEADS, *_BIASES)


def token_tensors(sources: Mapping[str, Source]) -> list[str]:
    """Names of the tensors whose rows are tokens, where the members have them in a shape that fits.

    Other differences are left to the comparison of all tensors, which reports them.
    """
    target = sources["target"]
    names = []
    for name, info in target.tensors.items():
        is_bias = name.endswith(_BIASES) and len(info.shape) == 1
        is_rows = name.endswith((*TOKEN_EMBEDDINGS, *LANGUAGE_HEADS)) and len(info.shape) == 2
        if not info.dtype.is_float or not (is_bias or is_rows):
            continue
        others = [s.tensors.get(name) for s in sources.values() if not s.is_difference]
        if all(i is not None and i.dtype.is_float and _fits(i, info) for i in others):
            names.append(name)
    return names


def _fits(info: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors differ in nothing but the number of rows."""
    return len(info.shape) == len(other.shape) and info.shape[1:] == other.shape[1:]


def remedy_for_rows(member: Source, target: Source) -> str:
    """The policy that fits where a member has another number of token rows than the target."""
    try:
        return _fitting_policy(member, target)
    except (CheckpointError, MissingExtraError) as error:
        return f"no vocabulary policy can be recommended: {error}"


def _fitting_policy(member: Source, target: Source) -> str:
    own, theirs = read_tokenizer(member), read_tokenizer(target)
    if own is None or theirs is None:
        return (
            f"no tokenizer in {(target if theirs is None else member).where} describes the "
            "rows: add its files, or exclude the tensor"
        )
    names = token_tensors({"target": target, "member": member})
    rows = min(
        source.tensors[n].shape[0]
        for source in (target, member)
        for n in names
        if n in source.tensors
    )
    if max(own.used_rows, theirs.used_rows) <= rows and not _conflicts(own, theirs):
        return "no token uses the rows that only one has: set vocabulary: truncate-padding"
    new = [token for token in own.tokens if token not in theirs.tokens]
    if new:
        return (
            f"it has {some(new)} that the target lacks: set vocabulary: by-token to leave out what "
            "only tasks have, or union to add it"
        )
    return "its tokens are at other rows, or fewer: set vocabulary: by-token"


def other_rows(sources: Mapping[str, Source], names: Iterable[str]) -> list[str]:
    """Warnings about members that have as many token rows as the target, but of other tokens.

    Args:
        sources: By role.
        names: Tensors that are merged.
    """
    merged = set(names)
    with_rows = [n for n in token_tensors(sources) if n in merged]
    if not with_rows:
        return []
    seen = {id(sources["target"])}
    warnings = []
    for role, source in sources.items():
        if id(source) in seen or not any(name in source.tensors for name in with_rows):
            continue
        seen.add(id(source))
        try:
            found = _differing(source, sources["target"])
        except (CheckpointError, MissingExtraError) as error:
            warnings.append(f"{describe(role)}: tokens cannot be compared: {error}")
        else:
            if found:
                warnings.append(
                    f"{describe(role)}: rows of tokens are merged by number, and {some(found)} "
                    "stand at another row than in the target, or at the row of another token; "
                    "vocabulary: by-token merges them by token"
                )
    return warnings


def _differing(member: Source, target: Source) -> list[str]:
    """`_conflicts` of two models; nothing where one has no tokenizer, or both have the same."""
    own, theirs = read_tokenizer(member), read_tokenizer(target)
    if own is None or theirs is None or own.agrees(theirs):
        return []
    return _conflicts(own, theirs)


def _conflicts(tokenizer: Tokenizer, target: Tokenizer) -> list[str]:
    """Tokens that the target has at another row, or at whose row it has another token."""
    taken = set(target.tokens.values())
    return [
        token
        for token, row in tokenizer.tokens.items()
        if (row != target.tokens[token] if token in target.tokens else row in taken)
    ]


def some(tokens: Sequence[str]) -> str:
    """How many tokens, and the first three."""
    shown = ", ".join(repr(token) for token in tokens[:3]) + (", …" if len(tokens) > 3 else "")
    return f"{len(tokens):,} token{'' if len(tokens) == 1 else 's'} ({shown})"
