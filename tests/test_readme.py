"""The README runs as it stands: its recipe, its commands and its Python, in a scratch folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What the README shows and this file does not run with the rest, and why.
SLOW = "taskvec demo\n"  # run by a test of its own
ELSEWHERE = "make demo\n"  # makes an environment; its target is compared with the Makefile


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The file that a YAML block stands for: its first line says `# NAME.yaml`."""
        named = re.match(r"# (\S+\.yaml)\n", self.text)
        return named[1] if named and self.language == "yaml" else None


def blocks(page: Path) -> list[Block]:
    """Fenced blocks in order."""
    text = page.read_text("utf-8")
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in FENCE.finditer(text)]


def run_block(block: Block, folder: Path, page: str) -> str:
    """Run one block in a folder as a reader would; gives what it printed on standard output."""
    if block.file is not None:
        (folder / block.file).write_text(block.text, "utf-8")
        return ""
    command = {
        "shell": ["bash", "-euo", "pipefail", "-c", block.text],
        "python": [sys.executable, "-W", "error", "-c", block.text],
    }[block.language]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    where = f"{page}:{block.line}"
    assert done.returncode == 0, f"{where}: exit code {done.returncode}\n{done.stderr}"
    assert "Traceback" not in done.stderr, f"{where}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def readme() -> list[Block]:
    """Fenced blocks of the README."""
    return blocks(ROOT / "README.md")


@pytest.fixture(scope="module")
def ran(
    readme: list[Block], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, str]]]:
    """The scratch folder after every block has run, and what each printed."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKVEC_CACHE", str(folder / "cache"))
        yield folder, {b.text: run_block(b, folder, "README.md") for b in _to_run(readme)}


def _to_run(readme: list[Block]) -> list[Block]:
    return [b for b in readme if b.language != "text" and b.text not in (SLOW, ELSEWHERE)]


def test_every_block_is_of_a_kind_that_is_run(readme: list[Block]) -> None:
    kinds = [(b.language, b.file) for b in readme if b.language != "text"]
    assert {language for language, _ in kinds} == {"shell", "yaml", "python"}
    assert ("yaml", None) not in kinds, "a YAML block of the README must name its file"
    assert {SLOW, ELSEWHERE} <= {b.text for b in readme}
    assert len(_to_run(readme)) >= 5


def test_commands_write_the_folders_that_the_text_names(
    ran: tuple[Path, dict[str, str]],
) -> None:
    folder, _ = ran
    for name in ("merged", "safer", "merged-linear"):
        assert (folder / name / "model.safetensors").is_file()
        assert (folder / name / "taskvec-manifest.json").is_file()
    assert not list(folder.glob(".*")), "staging folders are left"


def test_scan_shows_what_the_text_says(ran: tuple[Path, dict[str, str]]) -> None:
    _, printed = ran
    shown = next(out for text, out in printed.items() if "taskvec scan recipe.yaml" in text)
    for words in ("math", "code", "similarity", "weight", "≤ σ", "Spearman"):
        assert words in shown
    assert re.search(r"^replay +same", shown, re.MULTILINE)


def test_python_prints_what_it_merged(ran: tuple[Path, dict[str, str]]) -> None:
    folder, printed = ran
    out = next(out for text, out in printed.items() if text.startswith("import taskvec"))
    assert "similarity" in out
    shown = re.search(r"<Merged .*/merged-linear: .*fingerprint ([0-9a-f]{8})…>", out)
    assert shown is not None
    manifest = (folder / "merged-linear" / "taskvec-manifest.json").read_text("utf-8")
    assert f'"fingerprint": "{shown[1]}' in manifest


def test_make_demo_is_a_target_that_runs_the_demo() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert re.search(r"^demo:.*\n\t\$\(BIN\)/taskvec demo$", makefile, re.MULTILINE)


def test_methods_table_is_the_list_of_methods() -> None:
    from taskvec.methods import METHODS

    rows = re.findall(
        r"^\| \[`(\w+)`\]\(docs/methods/(\w+)\.md\).*\| (\S+) \|$",
        (ROOT / "README.md").read_text("utf-8"), re.MULTILINE,
    )  # fmt: skip
    assert rows == [(m.name, m.name, m.source) for m in METHODS.values()]


@pytest.mark.slow
def test_demo_runs(readme: list[Block], tmp_path: Path) -> None:
    (demo,) = [b for b in readme if b.text == SLOW]
    assert run_block(demo, tmp_path, "README.md")
    assert (tmp_path / "taskvec-demo").is_dir()
    assert any((tmp_path / "taskvec-demo").glob("*.png"))
