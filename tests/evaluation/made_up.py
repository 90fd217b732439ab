"""A task of made-up samples that needs no data, for tests of what is around tasks."""

from __future__ import annotations

from typing import Any

from taskvec.evaluation.task import Metric, Sample, Score, Task, each
from taskvec.running.requests import Answer, Continuation, Likelihood, Prompt, WholeText

N = 12


def _samples(rows: Any, settings: Any) -> list[Sample]:
    return [
        Sample(
            f"s{i}",
            (
                Prompt(f"Q: say {'ab' * (i + 1)}?\nA: ", 8, ("\n",)),
                Continuation(f"Q: calc {i % 5}+2=?\nA: ", str(i % 5 + 2)),
                WholeText("the red fox sees the old gate at noon. " * (i + 1)),
            ),
            {"right": str(i)},
        )
        for i in range(N)
    ]


def _score(sample: Sample, replies: Any) -> Score:
    answer, likely, text = replies
    assert isinstance(answer, Answer)
    assert isinstance(likely, Likelihood)
    assert isinstance(text, Likelihood)
    values = {
        "long": float(len(answer.text) > 4),
        "likely": likely.log_likelihood,
        "nll": -text.log_likelihood,
        "tokens": text.tokens,
    }
    return Score(values, {"said": answer.text})


def make(**changes: Any) -> Task:
    """The task, with some fields changed."""
    fields: dict[str, Any] = {
        "name": "made-up",
        "summary": "nothing much",
        "files": (),
        "samples": _samples,
        "score": each(_score),
        "metrics": (
            Metric("long"),
            Metric("likely", "mean"),
            Metric("perplexity", "perplexity", higher_is_better=False, value="nll", per="tokens"),
        ),
    }
    return Task(**(fields | changes))
