"""What the tests of several verbs share: a family as flags and as a recipe, strict JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def strict(text: str) -> Any:
    """JSON without the NaN and Infinity that Python would let pass."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def flags(family: dict[str, Path]) -> list[Any]:
    """A family with two tasks, as flags."""
    tasks = [f"{task}={family[task]}:0.5" for task in ("math", "code")]
    roles = ["--base", family["base"], "--instruct", family["instruct"]]
    return [*roles, "--task", tasks[0], "--task", tasks[1]]


@pytest.fixture
def recipe(tmp_path: Path, family: dict[str, Path]) -> Path:
    """The same family as a recipe."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "base: family/base\ninstruct: family/instruct\ntasks:\n"
        "  math: {model: family/math, scale: 0.5}\n  code: {model: family/code, scale: 0.5}\n"
        "method: lata\n"
    )
    return path
