"""Answers: what transformers generates alone, whatever batch a prompt falls into."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.evaluation import tiny  # noqa: E402

from taskvec.running.encoding import Encoder  # noqa: E402
from taskvec.running.generation import Query, _answer, _Stopper, answers  # noqa: E402
from taskvec.running.model import Model, wrap  # noqa: E402
from taskvec.running.requests import Answer  # noqa: E402

PROMPTS = [
    "The red fox",
    "Question: which is red? Answer:",
    "0 1 2",
    "The",
    "hen hen hen hen hen hen",
]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model(context=128)


def queries(model: Model, prompts: Sequence[str] = PROMPTS, **about: Any) -> list[Query]:
    about = {"max_new_tokens": 12} | about
    return [Query(model.encoder.prompt(text), **about) for text in prompts]


def generated(model: Model, query: Query) -> list[int]:
    """What transformers generates for one prompt, greedily, with its end tokens."""
    ids = torch.tensor([list(query.tokens)])
    with torch.inference_mode():
        made = model.module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=query.max_new_tokens,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
    tokens: list[int] = made[0, len(query.tokens) :].tolist()
    return tokens


def lively(model: Model) -> Query:
    """A prompt whose answer has no token twice at its beginning."""
    return next(q for q in queries(model) if len(set(generated(model, q)[:6])) == 6)


def test_greedy_answers_are_transformers(model: Model) -> None:
    asked = queries(model)
    found = answers(model, asked)
    for query, answer in zip(asked, found, strict=True):
        tokens = generated(model, query)
        assert answer == Answer(model.encoder.decode(tokens), 12, "length")
    assert len({answer.text for answer in found}) == len(PROMPTS)


@pytest.mark.parametrize("batch_tokens", [1, 40, 70])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_answers_like_each_prompt_alone(
    model: Model, batch_tokens: int, temperature: float
) -> None:
    asked = [
        Query(model.encoder.prompt(text), 3 + 4 * i, temperature=temperature * (i % 2), key=str(i))
        for i, text in enumerate(PROMPTS)
    ]
    alone = [answers(model, [query])[0] for query in asked]
    assert [answer.tokens for answer in alone] == [3, 7, 11, 15, 19]
    assert answers(model, asked) == alone
    taken: dict[int, Answer] = {}
    assert answers(model, asked, batch_tokens=batch_tokens, take=taken.__setitem__) == alone
    assert [taken[i] for i in range(5)] == alone
    assert answers(model, []) == []


def test_stop_texts_cut_the_answer(model: Model) -> None:
    query = lively(model)
    (whole,) = answers(model, [query])
    pieces = [model.encoder.decode([token]) for token in generated(model, query)]
    spanning = pieces[3][-1] + pieces[4][0]  # ends one token and begins the next
    start = whole.text.index(spanning)
    (cut,) = answers(model, [Query(query.tokens, 12, stop=("zzz", spanning))])
    assert (cut.text, cut.ended) == (whole.text[:start], "stop")
    assert cut.tokens <= 5
    first, other = whole.text[2], whole.text[4]
    (cut,) = answers(model, [Query(query.tokens, 12, stop=(other, first))])
    assert cut.text == whole.text[: min(whole.text.index(first), whole.text.index(other))]
    (cut,) = answers(model, [Query(query.tokens, 12, stop=(whole.text[0],))])
    assert (cut.text, cut.ended) == ("", "stop")


def test_a_long_stop_text_is_found(model: Model) -> None:
    (query, *_) = queries(model, max_new_tokens=90)
    (whole,) = answers(model, [query])
    stop = whole.text[10:60]
    (cut,) = answers(model, [Query(query.tokens, 90, stop=(stop,))])
    assert (cut.text, cut.ended) == (whole.text[: whole.text.index(stop)], "stop")
    assert cut.tokens < 90


class Spelling:
    """Decodes tokens by a list of texts."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return "".join(self.texts[token] for token in tokens)


@pytest.mark.parametrize(
    ("prompt", "written", "text", "done_at"),
    [
        ("Q", ["<think>", "2 Q: ", "</think>", "3", " Q: ", "4"], "<think>2 Q: </think>3 ", 5),
        ("<think>\n", ["2 Q: ", "</think>", "3", " Q: ", "4"], "<think>2 Q: </think>3 ", 4),
        ("<think>\n", ["2 Q: ", "5", "</think>", "3"], "<think>2 Q: 5</think>3", None),
        ("Q", ["<think>", "2 Q: ", "5"], "<think>2 Q: 5", None),
        ("Q", ["3", " Q: ", "4"], "3 ", 2),
    ],
)
def test_stop_texts_count_outside_of_reasoning(
    prompt: str, written: list[str], text: str, done_at: int | None
) -> None:
    encoder = Encoder("m", Spelling([prompt, *written]), 99, (), 0, frozenset())
    query = Query([0], 99, stop=("Q:",))
    stopper = _Stopper([query], 1, encoder)
    tokens = list(range(1, len(written) + 1))
    for step in tokens:
        stopper(torch.tensor([[0, *tokens[:step]]]), None)
    assert stopper.done_at == [done_at]
    answer = _answer(encoder, query, tokens[:done_at], None)
    assert (answer.raw, answer.ended) == (text, "stop" if done_at else "length")


def test_each_prompt_of_a_batch_has_its_own_stop_and_limit(model: Model) -> None:
    plain = queries(model)
    texts = [answer.text for answer in answers(model, plain)]
    asked = [
        Query(query.tokens, 4 + i, stop=(texts[i][5 + i],) if i % 2 else ())
        for i, query in enumerate(plain)
    ]
    found = answers(model, asked)
    assert found == [answers(model, [query])[0] for query in asked]
    assert [answer.ended for answer in found][::2] == ["length"] * 3


# End tokens


def with_ends(config: Any, generation: Any) -> Model:
    words = tiny.tokenizer()
    module = tiny.llama(words, context=128)
    module.config.eos_token_id = config
    module.generation_config.eos_token_id = generation
    return wrap(module, words)


def test_end_tokens_of_the_config_and_of_the_generation_config_end_answers(model: Model) -> None:
    query = lively(model)
    tokens = generated(model, query)
    third, sixth = tokens[2], tokens[5]
    for config, generation, length in (
        (sixth, None, 5),
        (None, sixth, 5),
        ([400, sixth], [third], 2),
        ([sixth], [400, third], 2),
    ):
        (answer,) = answers(with_ends(config, generation), [query])
        assert answer == Answer(model.encoder.decode(tokens[:length]), length, "end")


def test_prompts_go_on_after_others_have_ended(model: Model) -> None:
    asked = queries(model)
    ended = with_ends(generated(model, asked[0])[1], None)
    found = answers(ended, asked)
    assert found[0].ended == "end"
    assert {answer.ended for answer in found} == {"end", "length"}
    assert found == [answers(ended, [query])[0] for query in asked]


def test_an_end_token_inside_the_prompt_ends_nothing(model: Model) -> None:
    end = model.encoder.tokenizer.eos_token_id
    query = Query([*model.encoder.prompt("The"), end, end], 5)
    assert answers(model, [query])[0].tokens == 5


# The model's own settings


def test_sampling_and_penalties_of_the_model_do_not_apply_and_come_back(model: Model) -> None:
    expected = answers(model, queries(model))
    words = tiny.tokenizer()
    other = wrap(tiny.llama(words, context=128), words)
    own = other.module.generation_config
    own.update(
        repetition_penalty=5.0, do_sample=True, temperature=3.0, top_k=2, no_repeat_ngram_size=2,
        min_new_tokens=9, max_length=3, num_beams=1, suppress_tokens=[5, 6], forced_eos_token_id=7,
    )  # fmt: skip
    told = own.to_dict()
    assert answers(other, queries(other)) == expected
    assert other.module.generation_config is own
    assert own.to_dict() == told

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("no")

    other.module.forward = broken
    with pytest.raises(ValueError, match="no"):
        answers(other, queries(other))
    assert other.module.generation_config is own


# Draws


def drawn(
    model: Model, keys: Sequence[str], temperature: float = 1.0, tokens: int = 8
) -> list[str]:
    prompt = model.encoder.prompt("The red fox")
    asked = [Query(prompt, tokens, temperature=temperature, key=key) for key in keys]
    return [answer.text for answer in answers(model, asked)]


def test_draws_depend_on_their_key_and_nothing_else(model: Model) -> None:
    keys = [f"0\0sample\0{i}" for i in range(6)]
    first = drawn(model, keys)
    torch.manual_seed(3)
    assert drawn(model, keys) == first
    assert len(set(first)) == 6
    assert drawn(model, keys[::-1]) == first[::-1]
    assert drawn(model, keys[2:3]) == first[2:3]
    assert drawn(model, ["1\0sample\0" + str(i) for i in range(6)]) != first


def test_a_low_temperature_is_greedy(model: Model) -> None:
    (greedy,) = drawn(model, ["a"], temperature=0.0)
    assert drawn(model, ["a", "b"], temperature=1e-4) == [greedy, greedy]


def test_no_global_random_state_is_touched(model: Model) -> None:
    def states() -> tuple[object, ...]:
        numpy = np.random.get_state()[1].tolist()  # noqa: NPY002
        return random.getstate(), numpy, torch.get_rng_state().tolist()

    before = states()
    drawn(model, ["a", "b"])
    answers(model, queries(model))
    assert states() == before


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_are_distributed_as_softmax_says(model: Model, temperature: float) -> None:
    words = tiny.tokenizer()
    fixed = wrap(tiny.llama(words, context=128), words)
    shares = np.full(len(words), -np.inf)
    shares[20:26] = np.log([0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
    inner = fixed.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        out.logits[:] = torch.tensor(shares, dtype=torch.float32)
        return out

    fixed.module.forward = forward
    n = 2000
    texts = drawn(fixed, [f"{i}" for i in range(n)], temperature, tokens=2)
    expected = np.exp(shares[20:26] / temperature)
    expected /= expected.sum()
    letters = [fixed.encoder.decode([token]) for token in range(20, 26)]
    for step in range(2):
        counts = np.array([sum(text[step] == letter for text in texts) for letter in letters])
        assert counts.sum() == n
        chi_square = ((counts - n * expected) ** 2 / (n * expected)).sum()
        assert chi_square < 20.5  # 99.9 % point with 5 degrees of freedom
    assert len(set(texts)) > 20  # the steps of one answer are drawn apart


# Broken models


def test_nan_ends_an_answer(model: Model) -> None:
    query = lively(model)
    tokens = generated(model, query)
    good = next(q for q in queries(model) if tokens[3] not in [*q.tokens, *generated(model, q)])
    words = tiny.tokenizer()
    broken = wrap(tiny.llama(words, context=128), words)
    with torch.no_grad():  # breaks where the fourth token is read
        broken.module.model.embed_tokens.weight[tokens[3]] = math.nan
    for temperature in (0.0, 1e-4):
        (answer,) = answers(broken, [Query(query.tokens, 12, temperature=temperature)])
        assert answer == Answer(model.encoder.decode(tokens[:4]), 4, "nan")
    both = answers(broken, [query, good])
    assert both[0].ended == "nan"
    assert both[1] == answers(model, [good])[0]
    with torch.no_grad():
        broken.module.lm_head.weight[:] = math.nan
    assert answers(broken, [query])[0] == Answer("", 0, "nan")
