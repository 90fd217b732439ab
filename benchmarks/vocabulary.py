"""A family that is nearly all embedding, and the same folders with other tokenizers beside them.

`close` moves one token in 64 by one row, as where tokens were replaced here and there; `far` puts
every token at a row of its own choosing, as between models with unrelated tokenizers.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks import synthetic

SHAPES = synthetic.Shapes(hidden=2048, blocks=0, kv=512, mlp=8192, vocab=128_256)
QUICK = synthetic.Shapes(hidden=512, blocks=0, kv=64, mlp=512, vocab=32_768)
ORDERS = ("same", "close", "far")


def order(kind: str, rows: int) -> list[int]:
    """Row of each token."""
    found = np.arange(rows)
    if kind == "close":
        found[0::64], found[1::64] = np.arange(1, rows, 64), np.arange(0, rows, 64)
    found = np.random.default_rng(0).permutation(rows) if kind == "far" else found
    return [int(row) for row in found]


def write_tokenizers(shapes: synthetic.Shapes, folder: Path) -> None:
    """A tokenizer for every member, and for `math` one in each order, in folders `math-ORDER`."""
    for member in synthetic.MEMBERS:
        _write(folder / member, order("same", shapes.vocab))
    for kind in ORDERS:
        copy = folder / f"math-{kind}"
        copy.mkdir(exist_ok=True)
        for file in ("config.json", "model.safetensors"):
            if not (copy / file).exists():
                (copy / file).symlink_to(folder / "math" / file)
        _write(copy, order(kind, shapes.vocab))


def _write(folder: Path, rows: list[int]) -> None:
    tokens = {f"token{i}": row for i, row in enumerate(rows)}
    content = {"model": {"type": "BPE", "vocab": tokens, "merges": []}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(content))
