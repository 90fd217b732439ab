"""Replies of a model to the requests of a task's samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from taskvec.errors import DataError
from taskvec.evaluation.task import Sample
from taskvec.running.encoding import (
    Encoder,
    ScoredRow,
    Windows,
    document_rows,
    prompt_tokens,
    scored_row,
)
from taskvec.running.generation import Query, answers
from taskvec.running.likelihood import likelihoods
from taskvec.running.model import Model
from taskvec.running.requests import Continuation, Likelihood, Reply, WholeText


@dataclass(frozen=True, slots=True)
class ReplyOptions:
    """How samples are put to a model.

    Attributes:
        windows: How documents are read.
        truncate: Whether what does not fit is cut at the front.
        batch_tokens: Tokens of a batch; None: by the memory there is.
        seed: Of draws.
    """

    windows: Windows
    truncate: bool = False
    batch_tokens: int | None = None
    seed: int = 0


Place = tuple[int, int]  # sample, request


@dataclass(frozen=True, slots=True)
class Encoded:
    """Samples as the model sees them.

    Attributes:
        rows: What is to be scored.
        row_places: Of which request each row is; the rows of a document have the same.
        queries: What is to be answered.
        query_places: Of which request each query is.
    """

    rows: list[ScoredRow]
    row_places: list[Place]
    queries: list[Query]
    query_places: list[Place]

    @property
    def tokens(self) -> int:
        """Tokens that are read; answers are not counted."""
        return sum(len(r.inputs) for r in self.rows) + sum(len(q.tokens) for q in self.queries)


def encode(encoder: Encoder, samples: Sequence[Sample], asking: ReplyOptions) -> Encoded:
    """Turn requests into tokens.

    Raises:
        TaskvecError: a sample does not fit the model's context.
    """
    found = Encoded([], [], [], [])
    for i, sample in enumerate(samples):
        for j, request in enumerate(sample.requests):
            if isinstance(request, (Continuation, WholeText)):
                rows = (
                    [scored_row(encoder, request, truncate=asking.truncate)]
                    if isinstance(request, Continuation)
                    else list(document_rows(encoder, request.text, asking.windows))
                )
                if not rows:
                    raise DataError(f"sample {sample.id!r}: its text is empty; take it out")
                found.rows.extend(rows)
                found.row_places.extend([(i, j)] * len(rows))
                continue
            tokens = prompt_tokens(encoder, request, truncate=asking.truncate)
            key = f"{asking.seed}\0{sample.id}\0{j}\0{request.draw}"
            found.queries.append(
                Query(tokens, request.max_new_tokens, request.stop, request.temperature, key)
            )
            found.query_places.append((i, j))
    return found


def replies_to(
    model: Model,
    samples: Sequence[Sample],
    encoded: Encoded,
    *,
    batch_tokens: int | None = None,
    done: Callable[[int, list[Reply]], object] = lambda sample, replies: None,
) -> list[list[Reply]]:
    """The replies to every sample.

    Args:
        model: Which model.
        samples: What was encoded.
        encoded: For this model.
        batch_tokens: Tokens of a batch; None: by the memory there is.
        done: Called with the place of a sample and its replies, once they are all there.
    """
    parts: dict[Place, list[Reply]] = {}
    missing = [0] * len(samples)
    for i, _ in (*encoded.row_places, *encoded.query_places):
        missing[i] += 1
    found: list[list[Reply]] = [[] for _ in samples]

    def take(place: Place, reply: Reply) -> None:
        parts.setdefault(place, []).append(reply)
        i = place[0]
        missing[i] -= 1
        if missing[i] == 0:
            found[i] = [_join(parts.pop((i, j))) for j in range(len(samples[i].requests))]
            done(i, found[i])

    likelihoods(
        model,
        encoded.rows,
        batch_tokens=batch_tokens,
        take=lambda row, reply: take(encoded.row_places[row], reply),
    )
    answers(
        model,
        encoded.queries,
        batch_tokens=batch_tokens,
        take=lambda query, reply: take(encoded.query_places[query], reply),
    )
    return found


def _join(parts: Sequence[Reply]) -> Reply:
    """The reply to a request from those to its windows."""
    if len(parts) == 1:
        return parts[0]
    read = [part for part in parts if isinstance(part, Likelihood)]
    return Likelihood(
        sum(part.log_likelihood for part in read),
        sum(part.tokens for part in read),
        all(part.is_greedy for part in read),
    )
