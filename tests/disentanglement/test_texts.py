"""Language models: which positions count, accuracy of answers, intervals over texts."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from taskvec import zoo
from taskvec.disentanglement import ModelTask, coefficients, disentanglement_error, language
from taskvec.disentanglement.accuracy import _ask
from taskvec.errors import DataError
from taskvec.evaluation.intervals import Bootstrap
from taskvec.running.model import Model, load, open_stored
from taskvec.zoo.skills import SKILLS

PAIRS = {
    name: [(example.prompt, example.answer) for example in SKILLS[name].test(30, 11)]
    for name in ("math", "code")
}
TEXTS = ["the quick fox", "a", "one line of text that is long enough for several windows of eight"]


@pytest.fixture(scope="module")
def model() -> Model:
    return load(open_stored(zoo.path("instruct")), device="cpu")


@pytest.fixture(scope="module")
def fine_tunes() -> dict[str, dict[str, Any]]:
    return {t: load(open_stored(zoo.path(t)), device="cpu").module.state_dict() for t in PAIRS}


def tokens(model: Model, text: str) -> list[int]:
    return list(model.encoder.tokenizer(text, add_special_tokens=False)["input_ids"])


def split(model: Model, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of its answer; a token is a character."""
    return tokens(model, prompt), tokens(model, answer)


def answers(model: Model, pairs: list[tuple[str, str]]) -> list[np.ndarray[Any, Any]]:
    """Most likely token at every position of every answer, text by text, without batches."""
    found = []
    for prompt, answer in pairs:
        before, after = split(model, prompt, answer)
        ids = torch.tensor([[1, *before, *after]])
        with torch.no_grad():
            logits = model.module(input_ids=ids).logits[0]
        found.append(logits[len(before) : len(before) + len(after)].argmax(-1).numpy())
    return found


def test_only_answers_count_and_all_of_them(model: Model) -> None:
    task = language("math", PAIRS["math"], model.encoder, batch_tokens=40)
    rows = list(task.run(model.module))
    assert len(rows) > 2  # several batches
    predicted, labels, owners = [], [], []
    for each in rows:
        predicted.append(each.logits.argmax(-1).numpy())
        labels.append(each.labels)
        owners.append(each.examples)
    owner = np.concatenate(owners)
    for number, (by_hand, pair) in enumerate(
        zip(answers(model, PAIRS["math"]), PAIRS["math"], strict=True)
    ):
        mine = owner == number
        np.testing.assert_array_equal(np.concatenate(predicted)[mine], by_hand)
        np.testing.assert_array_equal(np.concatenate(labels)[mine], split(model, *pair)[1])


def test_a_token_that_joins_prompt_and_answer_counts(model: Model) -> None:
    """As tokenizers that put a space in front of words have them: `A:`, ` 7`, but `A:`, ` `."""

    class Joining:
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            parts = re.findall(r" ?[^ ]| ", text)
            return {"input_ids": [3 + sum(map(ord, part)) % 50 for part in parts]}

    encoder = replace(model.encoder, tokenizer=Joining())
    ids = Joining()("ab 7x")["input_ids"]
    (rows,) = language("math", [("ab ", "7x")], encoder).run(model.module)
    assert rows.labels is not None
    assert rows.labels.tolist() == ids[2:]
    (rows,) = language("math", [("ab ", "7x")], model.encoder).run(model.module)
    assert rows.labels is not None
    assert rows.labels.tolist() == tokens(model, "7x")


def test_nothing_before_an_answer_is_the_beginning(model: Model) -> None:
    (rows,) = language("math", [("", "7x")], model.encoder).run(model.module)
    assert rows.labels is not None
    assert rows.labels.tolist() == tokens(model, "7x")
    bare = replace(model.encoder, begins=())
    (same,) = language("math", [("", "7x")], bare).run(model.module)
    torch.testing.assert_close(same.logits, rows.logits)


def test_an_answer_is_right_if_all_of_it_is(model: Model) -> None:
    right = [
        list(by_hand) == split(model, *pair)[1]
        for by_hand, pair in zip(answers(model, PAIRS["code"]), PAIRS["code"], strict=True)
    ]
    counts = _ask(language("code", PAIRS["code"], model.encoder), model.module)
    np.testing.assert_array_equal(counts.right, right)
    np.testing.assert_array_equal(counts.of, np.ones(30))


def test_every_token_of_a_text_counts_once(model: Model) -> None:
    task = language("text", TEXTS, model.encoder, context=8)
    labels: dict[int, int] = {}
    for rows in task.run(model.module):
        assert rows.labels is not None
        for owner in rows.examples:
            labels[int(owner)] = labels.get(int(owner), 0) + 1
    assert labels == {i: len(tokens(model, text)) for i, text in enumerate(TEXTS)}
    counts = _ask(task, model.module)
    np.testing.assert_array_equal(counts.of, [len(tokens(model, text)) for text in TEXTS])


def test_answers_of_conversations_count_with_their_end(model: Model) -> None:
    talks = [
        (("user", "ab+c"), ("assistant", "x1"), ("user", "d"), ("assistant", "y")),
        (("user", "a longer question"), ("assistant", "z")),
    ]
    (rows,) = language("math", talks, model.encoder).run(model.module)
    assert rows.labels is not None
    told = {i: rows.labels[rows.examples == i] for i in range(2)}
    # The zoo's template puts a line break behind an answer; nothing ends a turn, so that the end
    # of the sequence is added behind the last.
    expected = [tokens(model, "x1\n") + tokens(model, "y\n") + [2], [*tokens(model, "z\n"), 2]]
    assert [told[i].tolist() for i in range(2)] == expected
    whole = tokens(model, "Q: ab+c\nA: x1\nQ: d\nA: y\n")
    with torch.no_grad():
        logits = model.module(input_ids=torch.tensor([whole])).logits[0]
    places = [*range(10, 13), *range(21, 24)]
    mine = rows.logits[torch.tensor(rows.examples == 0)]
    torch.testing.assert_close(mine, logits[places], rtol=1e-4, atol=1e-4)


def test_error_is_of_positions_with_intervals_over_texts(
    model: Model, fine_tunes: dict[str, dict[str, Any]]
) -> None:
    data = {name: language(name, PAIRS[name], model.encoder) for name in PAIRS}
    alphas = coefficients(3, 0, 2)
    found = disentanglement_error(model.module, fine_tunes, data, alphas=alphas, seed=3)
    start = {n: v.clone() for n, v in model.module.state_dict().items()}

    def at(**scales: float) -> None:
        moved = {
            n: value + sum(s * (fine_tunes[t][n] - value) for t, s in scales.items())
            for n, value in start.items()
        }
        model.module.load_state_dict(moved)

    try:
        terms = {}
        for name in PAIRS:
            at(**{name: 2.0})
            alone = answers(model, PAIRS[name])
            at(math=2.0, code=2.0)
            both = answers(model, PAIRS[name])
            terms[name] = [(a != b, len(a)) for a, b in zip(alone, both, strict=True)]
    finally:
        model.module.load_state_dict(start)
    cell = found.cells[2][2]
    assert found.examples == {"math": 30, "code": 30}
    for name, each in terms.items():
        above, below = np.array([d.sum() for d, _ in each]), np.array([n for _, n in each])
        assert found.rows[name] == below.sum()
        figure = cell.by_task[name]
        assert figure.value == pytest.approx(above.sum() / below.sum())
        # Texts are drawn, not positions: another generator gives about the same interval.
        picks = np.random.default_rng(1).integers(0, 30, (20_000, 30))
        drawn = above[picks].sum(1) / below[picks].sum(1)
        low, high = np.quantile(drawn, (0.025, 0.975))
        assert (figure.low, figure.high) == pytest.approx((low, high), abs=0.05)
    assert cell.error.value > 0.1


def test_resamples_are_of_examples_and_the_same_every_time() -> None:
    one, other = Bootstrap(5, 7), Bootstrap(5, 7)
    np.testing.assert_array_equal(one.counts, other.counts)
    assert one.counts.shape == (2000, 5)
    np.testing.assert_array_equal(one.counts.sum(1), np.full(2000, 5))
    assert (one.counts != Bootstrap(5, 8).counts).any()


def refused(model: Model, texts: list[Any]) -> ModelTask:
    return language("math", texts, model.encoder)


def test_refuses_texts_that_are_none(model: Model) -> None:
    with pytest.raises(DataError, match="data of task 'math' are empty; give texts of one kind"):
        refused(model, [])
    with pytest.raises(DataError, match="'math' mix pairs and texts; give texts of one kind"):
        refused(model, ["text", ("prompt", "answer")])
    with pytest.raises(DataError, match="text 0 has 209 tokens, the model's context is 128"):
        refused(model, [(("user", "a" * 200), ("assistant", "b"))])
    with pytest.raises(DataError, match="text 1 has no answer; remove it"):
        refused(model, [("a", "b"), ("a", "")])
    with pytest.raises(DataError, match="data of task 'math': text 1 is empty"):
        refused(model, ["text", ""])
