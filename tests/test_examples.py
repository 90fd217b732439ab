"""The examples run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))
WRITTEN = {  # what each leaves behind
    "lata_on_adapters": ("math-lora-weighed/adapter_model.safetensors",),
    "merge_while_training": ("step-5/model.safetensors", "step-10/model.safetensors"),
    "similarities": (),
    "sweep_scale": ("best/model.safetensors",),
}
NEEDS = {
    "lata_on_adapters": ("peft", "pandas"),
    "similarities": ("pandas",),
    "sweep_scale": ("pandas",),
}


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES} == set(WRITTEN)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path, cli):
    for name in ("torch", "transformers", "pandas", *NEEDS.get(path.stem, ())):
        pytest.importorskip(name)
    assert cli("zoo", "copy", "--to", tmp_path / "zoo")[0] == 0
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    for file in WRITTEN[path.stem]:
        assert (tmp_path / file).stat().st_size > 0
