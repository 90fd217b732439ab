"""Which architectures are tested, and how: writes the page docs/reference/architectures.md.

    python -m tests.tested_architectures > docs/reference/architectures.md

Each is a tiny random model of a class of transformers, written to a folder, changed and merged.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tests.architectures import ARCHITECTURES
from tests.wild_architectures import WILD

import taskvec as tv
from taskvec.errors import TaskvecError
from taskvec.layers import classify

NUMBERED = re.compile(r".*\.(layers|h|layer|blocks)\.\d+\.")
BLOCKS = 2
HEAD = f"""\
# Tested architectures

Tiny random models of these classes of transformers {tf.__version__} were tested in four ways:

- **names**: every tensor with a block number is in that block, and no tensor of a block is unknown;
  "part" if some tensors of a block are neither attention, MLP nor norm (convolutions, state-space
  mixers). Those are layers of their own.
- **merged**: a fine-tune of every tensor, merged at λ = 1, gives the fine-tune.
- **loaded**: transformers loads the result without a missing, unexpected or misfitting tensor and
  without a warning.
- **stacked**: all blocks twice, loaded in the same way; "refused" if taskvec says that it cannot.

An architecture that is not in the table is not unknown: names are read by rules, and a name with a
block number is always in that block. `taskvec plan` lists the tensors that say nothing
([layers](../concepts/layers.md)).

| architecture | class | names | merged | loaded | stacked |
|---|---|---|---|---|---|
"""
TAIL = """
By names alone, without loading: the UNets and transformers of Stable Diffusion, SDXL, SD 3, DiT,
PixArt and Flux, in the names of diffusers and of the first implementations; the vision transformers
of timm and of OpenCLIP.

The table is written by `python -m tests.tested_architectures`.
"""


@dataclass(frozen=True)
class Row:
    """What was found for one architecture."""

    name: str
    model: str
    names: str
    merged: str
    loaded: str
    stacked: str

    def __str__(self) -> str:
        cells = (self.name, f"`{self.model}`", self.names, self.merged, self.loaded, self.stacked)
        return f"| {' | '.join(cells)} |"


def models() -> dict[str, Any]:
    """A function that builds each model, by name."""

    def wild(name: str) -> Any:
        cls, options = WILD[name]
        return lambda: getattr(tf, cls)(tf.AutoConfig.for_model(name, **options))

    known = {name: (lambda each=each: each.build(BLOCKS)) for name, each in ARCHITECTURES.items()}
    return known | {name: wild(name) for name in WILD}


def row(name: str) -> Row:
    """Test one architecture."""
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = models()[name]()
        root = Path(folder)
        model.save_pretrained(root / "anchor")
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.01 * torch.randn_like(weight)
        model.save_pretrained(root / "tuned")
        tasks = {"a": {"model": str(root / "tuned"), "scale": 1}}
        anchor = str(root / "anchor")
        recipe = {"anchor": anchor, "method": "task_arithmetic", "tasks": tasks}
        tv.merge(recipe, root / "out")
        found = loaded(type(model), root / "out")
        expected = type(model).from_pretrained(root / "tuned").state_dict()
        same = found is not None and all(
            torch.allclose(found[n], weight, rtol=0, atol=1e-6) for n, weight in expected.items()
        )
        pieces = [{"model": anchor, "blocks": [0, BLOCKS]}] * 2
        try:
            stack = {"target": {"stack": pieces}, "method": "passthrough"}
            tv.merge(stack, root / "stack")
            stacked = "yes" if loaded(type(model), root / "stack") is not None else "no"
        except TaskvecError as error:
            stacked = "refused"
            print(f"{name}: {error}", file=sys.stderr)
        return Row(
            name,
            type(model).__name__,
            names_of(expected),
            "yes" if same else "no",
            "yes" if found is not None else "no",
            stacked,
        )


def names_of(names: Any) -> str:
    """Whether the layer table knows the tensors that are in blocks."""
    keys = {name: classify(name) for name in names}
    if any(NUMBERED.match(name) and key.block is None for name, key in keys.items()):
        return "no"
    inside = {key.module for key in keys.values() if key.block is not None}
    return "yes" if inside <= {"attention", "mlp", "norm"} else "part"


def loaded(cls: Any, folder: Path) -> dict[str, Any] | None:
    """The weights of a folder as transformers loads them; None if it is not content with them."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    log, listener = logging.getLogger("transformers"), Listener(logging.WARNING)
    log.addHandler(listener)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, found = cls.from_pretrained(folder, output_loading_info=True)
    finally:
        log.removeHandler(listener)
    odd = [found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")]
    return None if any(odd) or said else model.state_dict()


def page(names: Iterator[str] | None = None) -> Iterator[str]:
    """The page, line by line."""
    yield HEAD
    for name in names or models():
        yield f"{row(name)}\n"
    yield TAIL


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only these")
    tf.utils.logging.disable_progress_bar()
    for text in page(parser.parse_args().names or None):
        sys.stdout.write(text)
        sys.stdout.flush()
