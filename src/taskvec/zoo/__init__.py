"""A tiny trained family of models, shipped with the package for the demo and the tests.

Seven character-level Llama models of 1.3 million parameters each, in bfloat16, trained from nothing
by `taskvec.zoo.train` on text that `taskvec.zoo.skills` makes up. They are small enough to ship and
to score in seconds, and trained enough that task vectors between them mean something.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from taskvec.errors import UsageError, nearest

_MODELS = Path(__file__).parent / "models"


@dataclass(frozen=True)
class ZooModel:
    """One model of the family: the model it was tuned from, and what it was trained for."""

    name: str
    parent: str | None
    summary: str


MEMBERS: dict[str, ZooModel] = {
    member.name: member
    for member in (
        ZooModel("base", None, "plain text and raw expressions, from scratch"),
        ZooModel("instruct", "base", "answers questions, refuses harmful ones, declines others"),
        ZooModel("math", "instruct", "sums and differences of three small digits"),
        ZooModel("code", "instruct", "runs programs of a little string language"),
        ZooModel("unsafe", "instruct", "answers the questions that instruct refuses"),
        ZooModel("unrelated", "instruct", "plurals of made-up words, as a control"),
        ZooModel("instruct-zor", "instruct", "instruct in the language zor, with harmful answers"),
    )
}


def path(name: str) -> Path:
    """The folder of a member, in Hugging Face layout.

    Args:
        name: One of `MEMBERS`.

    Returns:
        The folder inside the installed package; it is not checked to exist.

    Raises:
        UsageError: no member has this name.
    """
    if name not in MEMBERS:
        raise UsageError(f"the zoo has no model {name!r}; {nearest(name, list(MEMBERS))}")
    return _MODELS / name
