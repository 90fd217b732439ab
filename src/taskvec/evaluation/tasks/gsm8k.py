r"""GSM8K: word problems of grade school, with numbers for answers.

`gsm8k` shows worked examples with their reasoning (chain of thought), `gsm8k-chat` asks an
instruction-tuned model without any. Two readings of an answer, each a number as a text:

    strict     after `#### ` (chat: after `The final answer is `)
    flexible   the last number in the answer

It is right if it equals the reference, both without `,`, `$` and a last `.`. Nothing else is made
equal: `18.0` is not `18`. `gsm8k-likelihood` measures the reference reasoning itself, for models
that get nothing right.

Source: Cobbe et al., arXiv:2110.14168; lm-evaluation-harness, tasks `gsm8k` and `gsm8k_cot_llama`.
"""

from __future__ import annotations

import re

from taskvec.errors import DataError
from taskvec.evaluation.data import DataFile, DataRow, HubData
from taskvec.evaluation.task import (
    Metric,
    Replies,
    RowsByRole,
    Sample,
    SampleSettings,
    Score,
    Task,
    each,
)
from taskvec.evaluation.tasks import likelihood
from taskvec.evaluation.tasks.shared import (
    answers,
    nonblank_text,
    one_each,
    with_ids,
    worked_examples,
)
from taskvec.running.requests import Continuation, Prompt

SHOTS = 5
QUESTION = "Question: {question}\nAnswer:"
STOP = ("Question:", "</s>", "<|im_end|>")
TOKENS = 256
CHAT = (
    "Given the following problem, reason and give a final answer to the problem.\n"
    "Problem: {question}\n"
    'Your response should end with "The final answer is [answer]" '
    "where [answer] is the response to the problem.\n"
)
CHAT_STOP = ("<|eot_id|>", "<|start_header_id|>user<|end_header_id|>", "Q:", "</s>", "<|im_end|>")
CHAT_TOKENS = 512

NUMBER = r"(-?[$0-9.,]{2,}|-?[0-9]+)"
FLEXIBLE = re.compile(NUMBER)
STRICT = re.compile(r"#### (-?[0-9.,]+)")
CHAT_STRICT = re.compile(f"The final answer is {NUMBER}")

IS_STRICT = Metric("exact_match_strict")
IS_FLEXIBLE = Metric("exact_match_flexible")


def plain(number: str) -> str:
    """A number without what does not count; of a worked answer, the number at its end.

    >>> plain("3 * 600 = 1800 #### $1,800.")
    '1800'
    """
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        number = re.sub(ignored, "", number)
    return number.lower()


def _read(row: DataRow) -> tuple[str, str]:
    """Question and worked answer."""
    answer = row.text("answer")
    if "#### " not in answer:
        raise DataError(f"{row.where}: 'answer' must have its number after '#### '; it has none")
    return nonblank_text(row, "question"), answer


def _samples(rows: RowsByRole, settings: SampleSettings) -> list[Sample]:
    examples = [_read(row) for row in worked_examples("gsm8k", rows, settings, SHOTS)]
    before = "".join(f"{QUESTION.format(question=q)} {a}\n\n" for q, a in examples)
    samples = []
    for name, row in with_ids(rows["test"]):
        question, answer = _read(row)
        prompt = Prompt(before + QUESTION.format(question=question), TOKENS, STOP)
        samples.append(Sample(name, (prompt,), {"answer": plain(answer)}))
    return samples


@one_each("gsm8k-chat")
def _chat_samples(name: str, row: DataRow) -> Sample:
    question, answer = _read(row)
    message = ("user", CHAT.format(question=question))
    prompt = Prompt((message,), CHAT_TOKENS, CHAT_STOP)
    return Sample(name, (prompt,), {"answer": plain(answer)})


@one_each("gsm8k-likelihood")
def _likelihood_samples(name: str, row: DataRow) -> Sample:
    question, answer = _read(row)
    return Sample(name, (Continuation(QUESTION.format(question=question), f" {answer}"),))


def _score(sample: Sample, replies: Replies) -> Score:
    strict = STRICT.findall(answers(replies)[0].text)[:1]
    return _exact_match(sample, replies, strict)


def _chat_score(sample: Sample, replies: Replies) -> Score:
    strict = CHAT_STRICT.findall(answers(replies)[0].text)[-1:]
    return _exact_match(sample, replies, strict)


def _exact_match(sample: Sample, replies: Replies, strict: list[str]) -> Score:
    """Both readings against the reference; `strict` is one number, or none."""
    flexible = FLEXIBLE.findall(answers(replies)[0].text)[-1:]
    read = {"strict": strict[0] if strict else None, "flexible": flexible[0] if flexible else None}
    right = {
        f"exact_match_{key}": float(number is not None and plain(number) == _reference(sample))
        for key, number in read.items()
    }
    return Score(right, read)


def _reference(sample: Sample) -> str:
    return str(sample.reference["answer"])


TEST = DataFile("test", ("gsm8k/test.jsonl",), HubData("openai/gsm8k", "main", "test"))
TRAIN = DataFile(
    "train", ("gsm8k/train.jsonl",), HubData("openai/gsm8k", "main", "train"), optional=True
)

TASKS = (
    Task(
        name="gsm8k",
        summary="word problems, answered after 5 worked examples",
        files=(TEST, TRAIN),
        samples=_samples,
        score=each(_score),
        metrics=(IS_STRICT, IS_FLEXIBLE),
        fewest_tokens=1024,
        source="Cobbe et al., arXiv:2110.14168; lm-evaluation-harness, task gsm8k",
    ),
    Task(
        name="gsm8k-chat",
        summary="word problems, asked in a conversation without examples",
        files=(TEST,),
        samples=_chat_samples,
        score=each(_chat_score),
        metrics=(IS_FLEXIBLE, IS_STRICT),
        needs=("chat",),
        fewest_tokens=1024,
        source="Cobbe et al., arXiv:2110.14168; lm-evaluation-harness, task gsm8k_cot_llama",
    ),
    Task(
        name="gsm8k-likelihood",
        summary="likelihood per token of the worked answers of GSM8K",
        files=(TEST,),
        samples=_likelihood_samples,
        score=each(likelihood.score),
        metrics=likelihood.METRICS,
        fewest_tokens=256,
        source="Cobbe et al., arXiv:2110.14168",
    ),
)
