"""What rows of a fused projection do in an attention, found out from outside.

Of rows that are claimed to be of q, k and v this is checked: without v nothing comes out; without q
it does not matter what k is, and without k not what q is; a token's q changes what comes out for
that token and for no other, and its k and its v what comes out for others. Together with every row
being of exactly one of them, that leaves no other claim.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from taskvec.training.selection import select


def mask(module: nn.Module, name: str, letter: str) -> torch.Tensor:
    """The output rows that training only `letter` moves."""
    selection = select(module, f"attention-{letter}+bias")
    parameter = module.get_parameter(name)
    rows = selection.rows[name]
    found = torch.zeros(parameter.shape[rows.axis], dtype=torch.bool)
    for start, stop in rows.ranges:
        found[start:stop] = True
    return found


def check_roles(
    module: nn.Module,
    fused: nn.Module,
    output: nn.Module,
    name: str,
    run: Callable[[], object],
    letters: str = "qkv",
    token: int = 1,
) -> None:
    """Check the rows of one fused layer.

    Args:
        module: The whole.
        fused: The layer whose output is q, k and v, last dimension; tokens are dimension 1.
        output: The layer that gets what the heads attend to; tokens are dimension 1.
        name: The fused weight's.
        run: Runs the module.
        letters: What the layer holds.
        token: Whose part is changed: not the last, so that others come after it.
    """
    masks = {letter: mask(module, name, letter) for letter in letters}
    assert torch.equal(sum(m.int() for m in masks.values()), torch.ones(len(masks["k"]), dtype=int))

    def outcome(zero: str = "", noise: str = "", where: slice = slice(None)) -> torch.Tensor:
        """What the heads attend to, with some parts zeroed and noise on one of a token's."""
        generator = torch.Generator().manual_seed(0)
        seen: list[torch.Tensor] = []

        def change(_: nn.Module, __: object, out: torch.Tensor) -> torch.Tensor:
            kept = torch.ones(out.shape[-1], dtype=out.dtype)
            step = torch.zeros_like(out)
            for letter in zero:
                kept[masks[letter]] = 0
            for letter in noise:
                step[:, where] += torch.randn(out[:, where].shape, generator=generator)
                step *= masks[letter]
            return out * kept + step

        hooks = [
            fused.register_forward_hook(change),
            output.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())),
        ]
        with torch.no_grad():
            run()
        for hook in hooks:
            hook.remove()
        return seen[0]

    def moved(noise: str, zero: str = "", where: slice = slice(None)) -> list[int]:
        """Tokens of which something else comes out with noise than without."""
        difference = outcome(zero, noise, where) - outcome(zero)
        return np.flatnonzero(difference.abs().amax(dim=(0, 2)) > 1e-6).tolist()

    tokens = list(range(outcome().shape[1]))
    here = slice(token, token + 1)
    assert outcome(zero="v").abs().max() == 0
    for letter in "kv":
        assert set(moved(letter, where=here)) >= set(tokens[token + 1 :])
    if "q" in letters:
        assert moved("q", where=here) == [token]
        assert moved("k", zero="q") == []
        assert moved("q", zero="k") == []
        assert moved("v", zero="q") == tokens
