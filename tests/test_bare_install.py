"""A bare install, in an environment of its own (`make` builds it): merges without torch."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from taskvec import zoo

BARE = Path(__file__).parents[1] / ".venv-bare" / "bin"


@pytest.fixture(scope="module", autouse=True)
def bare_environment() -> None:
    if not (BARE / "taskvec").exists():
        pytest.fail("no bare environment; run: make .venv-bare/.ready")


def taskvec(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(cwd),
        "TASKVEC_CACHE": str(cwd / "cache"),
    }
    return subprocess.run(
        [BARE / "taskvec", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_has_no_torch() -> None:
    code = "import importlib.util as u; print([u.find_spec(m) for m in ('torch', 'transformers')])"
    done = subprocess.run([BARE / "python", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[None, None]"


def test_scans_merges_forgets_and_verifies(tmp_path: Path) -> None:
    family = [f"--base={zoo.path('base')}", f"--instruct={zoo.path('instruct')}"]
    task = f"--task=math={zoo.path('math')}:0.5"
    scanned = taskvec("scan", *family, task, "--json", cwd=tmp_path)
    assert scanned.returncode == 0, scanned.stderr
    assert json.loads(scanned.stdout)["summary"]["tasks"]["math"]["layers"] > 50
    merged = taskvec("merge", "out", *family, task, "--json", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    forgotten = taskvec("forget", "less", *family, task, "--target", "out", cwd=tmp_path)
    assert forgotten.returncode == 0, forgotten.stderr
    assert taskvec("verify", "out", "--replay", cwd=tmp_path).returncode == 0
    assert (tmp_path / "less" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["demo"], "demo"), (["finetune", "m", "--data", "d", "--out", "o"], "train"),
        (["eval", str(zoo.path("instruct")), "--tasks", "zoo:math"], "eval"),
        (["fit", "r.yaml", "--prompts", "math=p", "--out", "o"], "train"),
        (["search", "r.yaml", "--maximize", "zoo:math"], "search"),
    ],
)  # fmt: skip
def test_verbs_say_in_one_line_what_they_need(tmp_path: Path, words: list[str], extra: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("instruct: i\nmethod: task_arithmetic\ntasks: {math: {model: m}}\n")
    done = taskvec(*words, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("taskvec: error: ")
    assert done.stderr.endswith(f" is not installed; this needs: pip install 'taskvec[{extra}]'\n")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_plot_says_what_it_needs(tmp_path: Path) -> None:
    task = f"--task=math={zoo.path('math')}"
    done = taskvec("scan", f"--instruct={zoo.path('instruct')}", task, "--plot=a.svg", cwd=tmp_path)
    assert done.returncode == 1
    assert "altair is not installed; this needs: pip install 'taskvec[report]'" in done.stderr
