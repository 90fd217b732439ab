"""What presets select, written so that it can be read and compared.

`python -m tests.training.presets` prints the table that tests/training/presets.json holds; a new
architecture's part is to be read before it is put there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taskvec.errors import ParameterError
from taskvec.training.selection import ParameterSelection, select

FILE = Path(__file__).with_name("presets.json")
PRESETS = (
    "attention",
    "attention+bias",
    "attention-qv",
    "attention-k+bias",
    "mlp",
    "mlp+bias",
    "norms",
    "embeddings",
    "heads",
)
BLOCKS = 2


def written(selection: ParameterSelection) -> list[str]:
    """Names, with their rows (or columns) where those are not all; {b} stands for every block."""
    lines: dict[str, list[str]] = {}
    for name in selection.names:
        text = name
        if name in selection.rows:
            rows = selection.rows[name]
            kind = "columns" if rows.axis else "rows"
            text += f" {kind} " + ",".join(f"{a}:{b}" for a, b in rows.ranges)
        general = re.sub(r"(layers?|h|blocks?|resblocks)\.[01]\.", r"\1.{b}.", text, count=1)
        lines.setdefault(general, []).append(text)
    for line, found in lines.items():
        assert len(found) == (BLOCKS if "{b}" in line else 1), (line, found)
    return sorted(lines)


def table(module: Any) -> dict[str, list[str]]:
    """What every preset selects; an empty list where it selects nothing."""
    found = {}
    for preset in PRESETS:
        try:
            found[preset] = written(select(module, preset))
        except ParameterError as error:
            if "matches nothing" not in str(error):
                raise
            found[preset] = []
    return found


def printed(tables: Mapping[str, Mapping[str, list[str]]]) -> str:
    """As the file holds it: a line a preset."""
    parts = []
    for which, presets in tables.items():
        lines = ",\n".join(
            f'  "{preset}": {json.dumps(names)}' for preset, names in presets.items()
        )
        parts.append(f' "{which}": {{\n{lines}\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    from tests.architectures import ARCHITECTURES
    from tests.foreign_models import in_process

    FOREIGN = """
from tests.training.presets import table
print(json.dumps({k: table(m) for k, m in models().items() if k != "open_clip-timm"}))
"""
    tables = {which: table(each.build(BLOCKS)) for which, each in ARCHITECTURES.items()}
    print(printed({**tables, **in_process(FOREIGN)}), end="")
