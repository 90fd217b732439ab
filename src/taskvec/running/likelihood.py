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

from taskvec.extras import require
from taskvec.running.batches import by_length, halving, tokens_at_once
from taskvec.running.encoding import ScoredRow
from taskvec.running.model import Model
from taskvec.running.requests import Likelihood

CPU_LOGITS = 1 << 22  # worked on at once: more leave the caches of a CPU between two passes
LOGITS = 1 << 27


def likelihoods(
    model: Model,
    rows: Sequence[ScoredRow],
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


def _batch(model: Model, groups: Sequence[Sequence[ScoredRow]]) -> list[list[Likelihood]]:
    """Likelihoods of one batch; the rows of a group have the same inputs."""
    torch = require("torch", "eval")
    width = max(len(group[0].inputs) for group in groups)
    ids = torch.full((len(groups), width), model.encoder.prefix)
    for i, group in enumerate(groups):
        ids[i, : len(group[0].inputs)] = torch.tensor(group[0].inputs)
    first = min(len(g[0].inputs) - max(len(row.targets) for row in g) for g in groups)
    with torch.no_grad():
        logits = logits_from(model.module, ids.to(model.device), first)
        return [_replies(torch, group, logits[i], first) for i, group in enumerate(groups)]


def logits_from(module: Any, ids: Any, first: int) -> Any:
    """Logits from position `first` on, shape (rows, positions, vocabulary).

    Args:
        module: A causal language model.
        ids: Tokens, padded on the right, int64, shape (rows, tokens).
        first: Where the first token is predicted.
    """
    if "logits_to_keep" in inspect.signature(module.forward).parameters:
        return module(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - first).logits
    return module(input_ids=ids, use_cache=False).logits[:, first:]


def _replies(torch: Any, group: Sequence[ScoredRow], logits: Any, first: int) -> list[Likelihood]:
    """Replies to rows with the same inputs, from logits of shape (positions, vocabulary)."""
    stop = len(group[0].inputs) - first
    start = stop - max(len(row.targets) for row in group)
    at_once = max(1, (CPU_LOGITS if logits.device.type == "cpu" else LOGITS) // logits.shape[1])
    parts = logits[start:stop].split(at_once)
    normal = torch.cat([part.float().logsumexp(-1) for part in parts])
    best = logits[start:stop].argmax(-1)
    replies = []
    for row in group:
        targets = torch.tensor(row.targets, device=logits.device)
        last = slice(len(normal) - len(targets), None)
        if not normal[last].isfinite().all():
            replies.append(Likelihood(math.nan, len(targets), False))
            continue
        there = logits[stop - len(targets) : stop]
        taken = there.gather(1, targets[:, None])[:, 0].float() - normal[last]
        is_greedy = bool((best[last] == targets).all())
        replies.append(Likelihood(float(taken.double().sum()), len(targets), is_greedy))
    return replies
