"""Likelihoods: log p of given tokens after given tokens, in batches.

Rows are padded on the right, where a causal model does not see the padding, so that no mask is
needed. Logits are worked out only where a token is predicted, in the model's dtype, and turned into
log-probabilities in float32.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from taskvec.evaluation.batches import by_length, halving, tokens_at_once
from taskvec.evaluation.encoding import Row
from taskvec.evaluation.model import Model
from taskvec.evaluation.task import Likelihood
from taskvec.extras import require


def likelihoods(
    model: Model,
    rows: Sequence[Row],
    *,
    batch_tokens: int | None = None,
    take: Callable[[int, Likelihood], object] = lambda place, reply: None,
) -> list[Likelihood]:
    """How likely the targets of each row are.

    Args:
        model: Which model.
        rows: Tokens; rows with the same inputs are read once.
        batch_tokens: Tokens of a batch, with padding; default: by the memory there is.
        take: Called with the place of a row and its reply, as soon as it is there.

    Returns:
        One for each row. Where a logit is NaN or +∞, it is NaN, and not greedy;
        a target whose logit is −∞ has log-likelihood −∞.
    """
    together: dict[tuple[int, ...], list[int]] = {}
    for place, row in enumerate(rows):
        together.setdefault(tuple(row.inputs), []).append(place)
    groups = list(together.values())
    lengths = [len(rows[group[0]].inputs) for group in groups]
    found: dict[int, Likelihood] = {}

    def work(batch: list[int]) -> list[list[Likelihood]]:
        return _batch(model, [[rows[place] for place in groups[i]] for i in batch])

    for batch in by_length(lengths, tokens_at_once(model.module, batch_tokens)):
        for i, replies in zip(batch, halving(batch, work, model.encoder.where), strict=True):
            for place, reply in zip(groups[i], replies, strict=True):
                found[place] = reply
                take(place, reply)
    return [found[place] for place in range(len(rows))]


def _batch(model: Model, groups: Sequence[Sequence[Row]]) -> list[list[Likelihood]]:
    """Likelihoods of one batch; the rows of a group have the same inputs."""
    torch = require("torch", "eval")
    width = max(len(group[0].inputs) for group in groups)
    ids = torch.full((len(groups), width), model.encoder.prefix)
    for i, group in enumerate(groups):
        ids[i, : len(group[0].inputs)] = torch.tensor(group[0].inputs)
    first = min(len(g[0].inputs) - max(len(row.targets) for row in g) for g in groups)
    with torch.inference_mode():
        logits = _logits(model.module, ids.to(model.device), first)
        normal = torch.logsumexp(logits.float(), -1)
        best = logits.argmax(-1)
        return [[_reply(torch, row, logits[i], normal[i], best[i], first) for row in group]
                for i, group in enumerate(groups)]  # fmt: skip


def _logits(module: Any, ids: Any, first: int) -> Any:
    """Logits from position `first` on, shape (rows, positions, vocabulary)."""
    if "logits_to_keep" in inspect.signature(module.forward).parameters:
        return module(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - first).logits
    return module(input_ids=ids, use_cache=False).logits[:, first:]


def _reply(torch: Any, row: Row, logits: Any, normal: Any, best: Any, first: int) -> Likelihood:
    stop = len(row.inputs) - first
    there = slice(stop - len(row.targets), stop)
    targets = torch.tensor(row.targets, device=logits.device)
    if not normal[there].isfinite().all():
        return Likelihood(math.nan, len(row.targets), False)
    taken = logits[there].gather(1, targets[:, None])[:, 0].float() - normal[there]
    total = float(taken.double().sum())
    return Likelihood(total, len(row.targets), bool((best[there] == targets).all()))
