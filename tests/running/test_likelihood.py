"""Likelihoods: equal to log-softmax of one row at a time, and to transformers' own loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from tests.evaluation import tiny  # noqa: E402

from taskvec.evaluation.evaluate import EvaluationOptions, evaluate_with, prepare  # noqa: E402
from taskvec.evaluation.replies import ReplyOptions, encode, replies_to  # noqa: E402
from taskvec.evaluation.task import Sample  # noqa: E402
from taskvec.running import likelihood  # noqa: E402
from taskvec.running.batches import by_length, halving, tokens_at_once  # noqa: E402
from taskvec.running.encoding import ScoredRow, Windows, document_rows, scored_row  # noqa: E402
from taskvec.running.likelihood import likelihoods  # noqa: E402
from taskvec.running.model import Model  # noqa: E402
from taskvec.running.requests import Continuation, WholeText  # noqa: E402

TEXT = tiny.TEXT + " " + tiny.TEXT.lower() + " The hen sees 31 gates; why?"
ROWS = [
    ScoredRow([1, 5, 9, 12], [9, 12, 30]),
    ScoredRow([1, 5, 9, 12], [31]),
    ScoredRow([0], [40]),
    ScoredRow([7, 7, 8, 3, 300, 2, 19, 33], [8, 3, 300, 2, 19, 33, 21]),
    ScoredRow([1, 5, 9], [77]),
]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model()


def alone(model: Model, row: ScoredRow) -> tuple[float, bool]:
    """By definition: Σ log softmax(logits)[target], one row, float64."""
    with torch.no_grad():
        logits = model.module(input_ids=torch.tensor([list(row.inputs)])).logits[0].double()
    logits = logits[len(row.inputs) - len(row.targets) :]
    told = logits.log_softmax(-1)
    total = sum(float(told[i, token]) for i, token in enumerate(row.targets))
    return total, logits.argmax(-1).tolist() == list(row.targets)


@pytest.mark.parametrize("batch_tokens", [1, 12, None])
def test_rows_are_what_each_is_alone(model: Model, batch_tokens: int | None) -> None:
    found = likelihoods(model, ROWS, batch_tokens=batch_tokens)
    for row, reply in zip(ROWS, found, strict=True):
        total, is_greedy = alone(model, row)
        assert reply.log_likelihood == pytest.approx(total, abs=1e-5)
        assert reply.is_greedy == is_greedy
        assert reply.tokens == len(row.targets)


def test_logits_are_normalised_in_parts(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = likelihoods(model, ROWS)
    monkeypatch.setattr(likelihood, "CPU_LOGITS", 2 * len(model.encoder.tokenizer))
    for one, two in zip(likelihoods(model, ROWS), whole, strict=True):
        assert one.log_likelihood == pytest.approx(two.log_likelihood, abs=1e-5)


def test_greedy_is_told(model: Model) -> None:
    inputs = [1, 5, 9, 12]
    for _ in range(3):
        with torch.no_grad():
            best = int(model.module(input_ids=torch.tensor([inputs])).logits[0, -1].argmax())
        inputs = [*inputs, best]
    yes, no = likelihoods(
        model,
        [
            ScoredRow(inputs[:-1], inputs[4:]),
            ScoredRow(inputs[:-1], [*inputs[4:-1], inputs[-1] - 1]),
        ],
    )
    assert (yes.is_greedy, no.is_greedy) == (True, False)
    assert yes.log_likelihood > no.log_likelihood


def test_replies_come_as_they_are_there(model: Model) -> None:
    taken = {}
    found = likelihoods(model, ROWS, batch_tokens=4, take=taken.__setitem__)
    assert [taken[i] for i in range(len(ROWS))] == found
    assert likelihoods(model, []) == []


def test_rows_with_the_same_inputs_are_read_once(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    forward = model.module.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        read.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.module, "forward", counted)
    likelihoods(model, [ScoredRow([1, 5, 9], [token]) for token in range(50)])
    assert read == [(1, 3)]


class Without(torch.nn.Module):  # type: ignore[misc]
    """A module whose forward knows no `logits_to_keep`."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, input_ids: Any, use_cache: bool) -> Any:
        return self.inner(input_ids=input_ids, use_cache=use_cache)


def test_modules_that_give_all_logits(model: Model) -> None:
    plain = Model(Without(model.module), model.encoder)
    mine, other = likelihoods(model, ROWS), likelihoods(plain, ROWS)
    for one, two in zip(mine, other, strict=True):
        assert one.log_likelihood == pytest.approx(two.log_likelihood, abs=1e-5)


class With(Without):
    """A module, one of whose logits is always this."""

    def __init__(self, inner: Any, value: float) -> None:
        super().__init__(inner)
        self.value = value

    def forward(self, input_ids: Any, use_cache: bool) -> Any:
        out = super().forward(input_ids, use_cache)
        out.logits[..., 5] = self.value
        return out


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_give_nan(model: Model, value: float) -> None:
    for reply in likelihoods(Model(With(model.module, value), model.encoder), ROWS):
        assert math.isnan(reply.log_likelihood)
        assert not reply.is_greedy


def test_a_token_that_is_masked_out_breaks_nothing(model: Model) -> None:
    masked = Model(With(model.module, -math.inf), model.encoder)
    never, other = likelihoods(masked, [ScoredRow([1, 9], [5]), ScoredRow([1, 9], [6])])
    assert never.log_likelihood == -math.inf
    assert math.isfinite(other.log_likelihood)


def test_a_broken_row_breaks_no_other() -> None:
    half = tiny.model()
    with torch.no_grad():
        half.module.model.embed_tokens.weight[300] = math.nan
    values = [reply.log_likelihood for reply in likelihoods(half, ROWS)]
    assert [math.isnan(value) for value in values] == [False, False, False, True, False]


# Perplexity


def loss_of_transformers(model: Model, text: str, context: int, stride: int) -> float:
    """Mean loss by windows, labels −100 where a token is only context, by transformers itself."""
    tokens = [
        model.encoder.prefix,
        *model.encoder.tokenizer(text, add_special_tokens=False).input_ids,
    ]
    total, count, end = 0.0, 0, 1
    while end < len(tokens):
        old, end = end, min(len(tokens), end + (context if end == 1 else stride))
        # The last input predicts the last target, so a window of inputs has one more label.
        begin = max(0, end - 1 - context)
        ids = torch.tensor([tokens[begin:end]])
        labels = ids.clone()
        labels[0, : old - begin] = -100
        with torch.no_grad():
            logits = model.module(input_ids=ids[:, :-1]).logits
        padded = torch.cat([logits, torch.zeros_like(logits[:, :1])], 1)  # shifted away inside
        loss = model.module.loss_function(padded, labels, vocab_size=logits.shape[-1])
        total += float(loss) * (end - old)
        count += end - old
    assert count == len(tokens) - 1
    return total / count


@pytest.mark.parametrize(
    ("context", "stride"), [(64, 64), (64, 1), (16, 16), (16, 5), (9, 8), (2, 1), (1, 1)]
)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_perplexity_is_transformers_loss(context: int, stride: int, adds_bos: bool) -> None:
    model = tiny.model(adds_bos=adds_bos)
    asking = ReplyOptions(Windows(context, stride))
    samples = [Sample("1", (WholeText(TEXT),))]
    ((reply,),) = replies_to(model, samples, encode(model.encoder, samples, asking))
    expected = loss_of_transformers(model, TEXT, context, stride)
    assert -reply.log_likelihood / reply.tokens == pytest.approx(expected, rel=1e-5)


def test_a_text_in_one_window_is_transformers_loss(model: Model) -> None:
    ids = model.encoder.tokenizer("The red fox sees the old gate.", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = float(model.module(input_ids=ids, labels=ids).loss)
    samples = [Sample("1", (WholeText("The red fox sees the old gate."),))]
    encoded = encode(model.encoder, samples, ReplyOptions(Windows(64, 64)))
    ((reply,),) = replies_to(model, samples, encoded)
    assert reply.tokens == ids.shape[1] - 1
    assert -reply.log_likelihood / reply.tokens == pytest.approx(expected, rel=1e-5)


class Letters:
    """An encoder whose tokens are numbers of letters."""

    prefix = -1

    @staticmethod
    def encode(text: str) -> list[int]:
        return list(range(len(text)))


@given(n=st.integers(0, 60), context=st.integers(1, 20), data=st.data())
@settings(deadline=None)
def test_every_token_is_predicted_once(n: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    encoder: Any = Letters()
    rows = list(document_rows(encoder, "x" * n, Windows(context, stride)))
    assert [token for row in rows for token in row.targets] == list(range(n))
    for row in rows:
        assert 1 <= len(row.targets) <= len(row.inputs) <= context
        whole = [*row.inputs, row.targets[-1]]  # as they stand in the text, after the prefix
        assert whole == list(range(whole[0], whole[0] + len(whole)))
        assert list(row.targets) == whole[-len(row.targets) :]
    for row in rows[1:-1]:
        assert len(row.inputs) == context
        assert len(row.targets) == stride


def test_parts_of_a_document_are_summed(model: Model) -> None:
    samples = [
        Sample("1", (WholeText(TEXT), Continuation("The", " fox"))),
        Sample("2", (WholeText("a"),)),
    ]
    encoded = encode(model.encoder, samples, ReplyOptions(Windows(8, 8)))
    done = []
    replies = replies_to(
        model, samples, encoded, batch_tokens=20, done=lambda i, mine: done.append((i, mine))
    )
    assert sorted(i for i, _ in done) == [0, 1]
    assert all(replies[i] == mine for i, mine in done)
    rows = [
        row for row, place in zip(encoded.rows, encoded.row_places, strict=True) if place == (0, 0)
    ]
    assert len(rows) > 3
    total = sum(alone(model, row)[0] for row in rows)
    assert replies[0][0].log_likelihood == pytest.approx(total, rel=1e-5)
    assert replies[0][0].tokens == len(model.encoder.encode(TEXT))
    row = scored_row(model.encoder, Continuation("The", " fox"), truncate=False)
    assert replies[0][1].log_likelihood == pytest.approx(alone(model, row)[0], abs=1e-5)


# Batches


@given(lengths=st.lists(st.integers(1, 40), max_size=30), tokens=st.integers(1, 120))
def test_batches_hold_everything_once(lengths: list[int], tokens: int) -> None:
    batches = list(by_length(lengths, tokens))
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[place] for place in batch)
        assert len(batch) == 1 or longest * len(batch) <= tokens


def test_too_little_memory_halves_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    tried = []

    def work(batch: list[int]) -> list[int]:
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no")
        return [place * place for place in batch]

    assert halving([4, 3, 2, 1, 0], work, "m") == [16, 9, 4, 1, 0]
    assert tried == [5, 2, 3, 1, 2]

    def never(batch: list[int]) -> list[int]:
        raise torch.OutOfMemoryError("no")

    with pytest.raises(
        Exception, match="m: not enough memory for one sample; use a shorter context"
    ):
        halving([1, 2], never, "m")


def test_tokens_at_once(model: Model) -> None:
    assert tokens_at_once(model.module, 7) == 7
    assert tokens_at_once(model.module) < tokens_at_once(model.module, generating=True)


def test_batch_size_changes_nothing(model: Model) -> None:
    values = []
    for batch_tokens in (1, 90, 5000):
        options = EvaluationOptions(batch_tokens=batch_tokens, limit=30, context=20, stride=7)
        prepared = prepare(["zoo:text"], options)
        (result,) = evaluate_with(lambda: model, model.encoder, prepared, options, where="tiny")
        values.append([score.values["nll"] for score in result.scores])
    for other in values[1:]:
        assert other == pytest.approx(values[0], rel=1e-5)
