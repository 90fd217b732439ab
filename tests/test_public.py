"""What is public, and what importing it costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import taskvec


def loaded_after(code, *args):
    """Top-level modules that a fresh interpreter has loaded after running the code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules, sep='\\n')", *args],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {line.split(".")[0] for line in done.stdout.splitlines()}


def test_all_is_what_is_public():
    assert taskvec.__all__ == sorted(taskvec.__all__)
    assert set(taskvec.__all__) == set(taskvec._HOMES)
    assert dir(taskvec) == taskvec.__all__
    names = {}
    exec("from taskvec import *", names)
    assert set(names) - {"__builtins__"} == set(taskvec.__all__)


@pytest.mark.parametrize("name", taskvec.__all__)
def test_every_public_name_is_there_and_explained(name):
    found = getattr(taskvec, name)
    assert found.__name__ == name
    assert found.__module__ == taskvec._HOMES[name]
    assert len(inspect.getdoc(found) or "") > 20


@pytest.mark.parametrize(
    "name", [n for n in taskvec.__all__ if inspect.isfunction(getattr(taskvec, n))]
)
def test_functions_document_their_arguments(name):
    function = getattr(taskvec, name)
    text = inspect.getdoc(function)
    assert "Raises:" in text
    parameters = inspect.signature(function).parameters
    if len(parameters) > 1:
        assert "Args:" in text
        for parameter in parameters:
            assert f"{parameter}:" in text, parameter


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'taskvec' has no attribute 'mergee'"):
        taskvec.mergee  # noqa: B018


def test_importing_is_light():
    loaded = loaded_after("import taskvec")
    assert "taskvec" in loaded
    assert not loaded & {
        "numpy",
        "numba",
        "llvmlite",
        "torch",
        "transformers",
        "safetensors",
        "yaml",
    }


def test_the_error_tree_is_light():
    loaded = loaded_after("import taskvec; taskvec.TaskvecError")
    assert not loaded & {"numpy", "numba", "torch"}


def test_the_core_works_without_torch(family, tmp_path):
    code = """
import sys
import taskvec as tv
import taskvec.vectors.extract
base, instruct, math, out = sys.argv[1:]
family = tv.Family(base=base, instruct=instruct, tasks={"math": math})
table = tv.lata(tv.scan(family))
tv.merge(family, out, table=table, scale={"math": 0.5})
assert tv.verify(out)[0].outcome == "same"
"""
    members = [family["base"], family["instruct"], family["math"], tmp_path / "out"]
    loaded = loaded_after(code, *map(str, members))
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert {"numpy", "numba"} <= loaded
    assert not loaded & {
        "torch",
        "transformers",
        "safetensors",
        "altair",
        "vl_convert",
        "huggingface_hub",
    }
