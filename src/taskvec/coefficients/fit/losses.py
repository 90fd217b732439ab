"""How far a module's answer is from what it should be, position by position, in nats.

```text
kl          Σ_v p_v (ln p_v − ln q_v)         p the teacher's, q the module's
likelihood  −ln q_v                            v the token of the answer that was given
entropy     −Σ_v q_v ln q_v
distance    ‖h − h_teacher‖² / mean ‖h_teacher‖²      of features, and of hidden states
```

Of a large vocabulary the `TOP` tokens that the teacher finds likeliest are kept, and all others
count as one: that is the divergence of two coarser distributions, no more than the whole one, and 0
only if the probabilities of all kept tokens agree. A teacher then needs 2 kB a token instead of
four bytes a word of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from taskvec.extras import require

TOP = 256


@dataclass(frozen=True, slots=True)
class Taught:
    """What a teacher says to one prompt, of P positions.

    Attributes:
        log_p: Of the tokens in `tokens`, or of all; float32, shape (P, n).
        tokens: The likeliest; None: all. Shape (P, n).
        log_rest: Of all other tokens, shape (P,); None where there are none.
        features: Instead; shape (P, dimensions).
        hidden: Hidden states of each block, shape (blocks, P, dimensions); None: not asked for.
    """

    log_p: Any = None
    tokens: Any = None
    log_rest: Any = None
    features: Any = None
    hidden: Any = None


def log_softmax(logits: Any) -> Any:
    """Ln q, in float32 or wider."""
    torch = require("torch", "eval")
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def keep_likeliest(logits: Any, hidden: Any = None) -> Taught:
    """What is kept of a teacher's logits, shape (P, words)."""
    log_p = log_softmax(logits)
    if log_p.shape[-1] <= TOP:
        return Taught(log_p, hidden=hidden)
    kept, tokens = log_p.topk(TOP, -1)
    return Taught(kept, tokens, _log_rest(log_p, tokens), hidden=hidden)


def _log_rest(log_q: Any, tokens: Any) -> Any:
    return log_q.scatter(-1, tokens, float("-inf")).logsumexp(-1)


def join(each: Sequence[Taught]) -> Taught:
    """Of several prompts behind each other."""
    torch = require("torch", "eval")

    def cat(name: str, dim: int = 0) -> Any:
        parts = [getattr(one, name) for one in each]
        return None if not parts or parts[0] is None else torch.cat(parts, dim)

    return Taught(cat("log_p"), cat("tokens"), cat("log_rest"), cat("features"), cat("hidden", 1))


def divergence(logits: Any, teacher: Taught) -> Any:
    """KL(teacher ‖ module) of each position, shape (P,)."""
    log_q = log_softmax(logits)
    if teacher.tokens is None:
        return _kl(teacher.log_p, log_q)
    kept = log_q.gather(-1, teacher.tokens)
    rest = _log_rest(log_q, teacher.tokens)
    return _kl(teacher.log_p, kept) + _kl(teacher.log_rest[:, None], rest[:, None])


def _kl(log_p: Any, log_q: Any) -> Any:
    p = log_p.exp()
    return (p * (log_p - log_q)).masked_fill(p == 0, 0.0).sum(-1)


def surprise(logits: Any, labels: Any) -> Any:
    """−ln q of the labels, shape (P,)."""
    return -log_softmax(logits).gather(-1, labels[:, None])[:, 0]


def entropy(logits: Any) -> Any:
    """Shannon entropy of each position; of the shape of the logits without the last dimension."""
    log_q = log_softmax(logits)
    return -(log_q.exp() * log_q).sum(-1)


def distance(features: Any, wanted: Any, scale: float) -> Any:
    """Squared distance of each position over `scale`, shape (P,)."""
    return (features.float() - wanted.float()).square().sum(-1) / scale


def hidden_distance(hidden: Any, wanted: Any) -> Any:
    """Mean over blocks of ‖h − h_teacher‖² / ‖h_teacher‖², shape (P,).

    Args:
        hidden: Shape (blocks, P, dimensions).
        wanted: Of the teacher.
    """
    far = (hidden.float() - wanted.float()).square().sum(-1)
    return (far / wanted.float().square().sum(-1).clamp_min(1e-12)).mean(0)
