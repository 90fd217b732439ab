"""The page of tested architectures holds what the code does with the installed transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers as tf
from tests.tested_architectures import BLOCKS, HEAD, TAIL, models, row

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "architectures.md"
SAMPLE = ("llama", "qwen3-moe", "qwen2_5_vl", "marian", "t5", "mamba", "bert")


def test_the_page_names_every_architecture_of_this_version() -> None:
    text = PAGE.read_text()
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert rows[1:] == list(models())
    assert BLOCKS == 2
    version = f"transformers {tf.__version__}"
    assert version not in HEAD or version in text, "write the page again: see its last line"
    assert text.endswith(TAIL)


@pytest.mark.filterwarnings("ignore")  # of transformers, about tiny configs
@pytest.mark.parametrize("name", SAMPLE)
def test_rows_of_the_page_are_what_is_found(name: str) -> None:
    assert f"{row(name)}\n" in PAGE.read_text()
