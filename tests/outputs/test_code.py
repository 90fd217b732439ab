"""Code in a target's folder: copied only when asked for, and said to be there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import taskvec as tv

Cli = Callable[..., tuple[int, str, str]]
MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModel": "parts.modeling_own.Own",
    "AutoModelForCausalLM": "someone/else--modeling_else.Else",
    "Bad": "\x1b[31m/../etc.passwd",
}


@pytest.fixture
def family_with_code(family: dict[str, Path]) -> dict[str, Path]:
    target = family["instruct"]
    (target / "configuration_own.py").write_text("1 / 0\n")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"auto_map": MAP}))
    return family


def flags(family: dict[str, Path]) -> list[object]:
    return ["--instruct", family["instruct"], "--task", f"math={family['math']}:0.5"]


def test_code_is_not_copied(cli: Cli, tmp_path: Path, family_with_code: dict[str, Path]) -> None:
    out = tmp_path / "out"
    code, _, err = cli("merge", out, "--method", "task_arithmetic", *flags(family_with_code))
    assert code == 0
    assert list(out.rglob("*.py")) == []
    assert "'configuration_own.py', 'parts/modeling_own.py'" in err
    assert "--copy-code" in err
    assert "else" not in err
    assert "\x1b" not in err


def test_code_is_copied_when_asked_for(
    cli: Cli, tmp_path: Path, family_with_code: dict[str, Path]
) -> None:
    out = tmp_path / "out"
    method = ("--method", "task_arithmetic", "--copy-code")
    code, _, err = cli("merge", out, *method, *flags(family_with_code))
    assert code == 0
    assert [path.name for path in out.rglob("*.py")] == ["configuration_own.py"]
    for told in (err, (out / "README.md").read_text()):
        assert "carries code" in told
        assert "'configuration_own.py'" in told


@pytest.mark.parametrize("copy_code", [False, True])
def test_code_in_python(tmp_path: Path, family_with_code: dict[str, Path], copy_code: bool) -> None:
    roles = {"instruct": family_with_code["instruct"], "tasks": {"math": family_with_code["math"]}}
    merged = tv.merge(
        tv.Family(**roles),
        tmp_path / "out",
        method="task_arithmetic",
        scale={"math": 0.5},
        copy_code=copy_code,
    )
    assert (tmp_path / "out/configuration_own.py").exists() is copy_code
    assert any("code" in warning for warning in merged.warnings)


def test_a_model_without_code_says_nothing_of_it(
    cli: Cli, tmp_path: Path, family: dict[str, Path]
) -> None:
    code, _, err = cli("merge", tmp_path / "out", "--method", "task_arithmetic", *flags(family))
    assert code == 0
    assert "code" not in err
