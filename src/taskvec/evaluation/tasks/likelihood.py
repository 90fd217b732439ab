"""Likelihood of given answers: Σ log p(answer | prompt) / Σ tokens of the answers, in nats.

It says something of a model that answers nothing right yet, and its interval is narrow. Prompt and
answer are joined as they are: a space between them belongs to one of them, best to the answer.

Source of the MBPP prompt: Austin et al., arXiv:2108.07732.
"""

from __future__ import annotations

from taskvec.evaluation.data import DataFile, DataRow, HubData
from taskvec.evaluation.task import Metric, Replies, Sample, Score, Task, each
from taskvec.evaluation.tasks.shared import likelihoods, nonblank_text, one_each
from taskvec.running.requests import Continuation

MBPP = (
    "You are an expert Python programmer, and here is your task: {text} "
    "Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
)

METRICS = (
    Metric("log_likelihood_per_token", "ratio", value="log_likelihood", per="tokens"),
    Metric("perplexity", "perplexity", higher_is_better=False, value="nll", per="tokens"),
    Metric("greedy"),
)


def score(sample: Sample, replies: Replies) -> Score:
    """Log-likelihood and tokens of the one answer; `greedy` where the model would write it."""
    (reply,) = likelihoods(replies)
    return Score(
        {
            "log_likelihood": reply.log_likelihood,
            "nll": -reply.log_likelihood,
            "tokens": float(reply.tokens),
            "greedy": float(reply.is_greedy),
        }
    )


@one_each("likelihood", "id")
def _samples(name: str, row: DataRow) -> Sample:
    return Sample(name, (Continuation(row.text("prompt"), nonblank_text(row, "answer")),))


@one_each("mbpp-likelihood", "task_id")
def _mbpp_samples(name: str, row: DataRow) -> Sample:
    tests = "\n".join(row.texts("test_list"))
    prompt = MBPP.format(text=nonblank_text(row, "text"), tests=tests)
    code = nonblank_text(row, "code").replace("\r\n", "\n")  # the data's are those of Windows
    return Sample(name, (Continuation(prompt, code),))


TASKS = (
    Task(
        name="likelihood",
        summary="likelihood per token of answers of your own",
        files=(DataFile("test", ("likelihood/*.jsonl", "likelihood/*.json")),),
        samples=_samples,
        score=each(score),
        metrics=METRICS,
        source="taskvec",
    ),
    Task(
        name="mbpp-likelihood",
        summary="likelihood per token of the reference programs of MBPP",
        files=(
            DataFile(
                "test",
                ("mbpp/mbpp.test.jsonl", "mbpp/test.jsonl"),
                HubData("google-research-datasets/mbpp", "full", "test"),
            ),
        ),
        samples=_mbpp_samples,
        score=each(score),
        metrics=METRICS,
        fewest_tokens=256,
        source="Austin et al., arXiv:2108.07732",
    ),
)
