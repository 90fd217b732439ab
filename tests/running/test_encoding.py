"""From requests to tokens: what is put in front, what is scored, what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.evaluation import tiny  # noqa: E402

from taskvec import zoo  # noqa: E402
from taskvec.errors import CheckpointError, DataError, TaskvecError  # noqa: E402
from taskvec.evaluation.replies import ReplyOptions, encode  # noqa: E402
from taskvec.evaluation.task import Sample  # noqa: E402
from taskvec.running.encoding import (  # noqa: E402
    UNLIMITED,
    Encoder,
    ScoredRow,
    Windows,
    document_rows,
    make_encoder,
    open_encoder,
    prompt_tokens,
    scored_row,
)
from taskvec.running.requests import Continuation, Prompt, WholeText  # noqa: E402

BOS, EOS = 0, 1
TALK = (("system", "be red"), ("user", "Which is red?"))


def encoder(context: int = 64, **about: Any) -> Encoder:
    config = {"max_position_embeddings": context}
    return make_encoder(tiny.tokenizer(**about), config, {}, "m")


def plain(text: str) -> list[int]:
    """Tokens of a text and nothing else, by the tokenizers library."""
    found: list[int] = tiny.tokenizer(bos=None).backend_tokenizer.encode(text).ids
    return found


KINDS = pytest.mark.parametrize(
    ("about", "front", "prefix"),
    [
        ({"adds_bos": True}, [BOS], BOS),
        ({"adds_bos": False}, [], BOS),
        ({"bos": None}, [], EOS),
        ({"eos": None}, [BOS], BOS),
    ],
)


@KINDS
def test_what_stands_in_front(about: dict[str, Any], front: list[int], prefix: int) -> None:
    made = encoder(**about)
    assert (list(made.begins), made.prefix) == (front, prefix)
    assert made.prompt("The hen") == front + plain("The hen")
    assert made.prompt("") == [prefix]
    row = scored_row(made, Continuation("The hen", " sees"), truncate=False)
    assert row == ScoredRow(front + plain("The hen"), plain(" sees"))
    row = scored_row(made, Continuation("The hen", " sees a gate"), truncate=False)
    assert row == ScoredRow(front + plain("The hen sees a gate")[:-1], plain(" sees a gate"))
    (row,) = document_rows(made, "The hen sees", Windows(64, 64))
    assert row == ScoredRow([prefix, *plain("The hen sees")[:-1]], plain("The hen sees"))
    assert list(document_rows(made, "", Windows(64, 64))) == []


@KINDS
def test_an_empty_context(about: dict[str, Any], front: list[int], prefix: int) -> None:
    row = scored_row(encoder(**about), Continuation("", "The hen"), truncate=False)
    assert row == ScoredRow([prefix, *plain("The hen")[:-1]], plain("The hen"))


@pytest.mark.parametrize("context", ["The hen ", "The hen  \n", " ", "\n"])
def test_spaces_at_the_end_of_a_context_are_scored(context: str) -> None:
    row = scored_row(encoder(), Continuation(context, "sees"), truncate=False)
    kept = len(plain(context.rstrip()))
    assert list(row.targets) == plain(context + "sees")[kept:]
    assert list(row.inputs) == [BOS, *plain(context + "sees")[:-1]]
    assert tiny.tokenizer().decode(row.targets) == context[len(context.rstrip()) :] + "sees"


def test_nothing_to_score() -> None:
    with pytest.raises(TaskvecError, match="m: nothing to score in ''"):
        scored_row(encoder(), Continuation("The hen", ""), truncate=False)


def test_a_sample_without_text() -> None:
    samples = [Sample("7", (WholeText(""),))]
    with pytest.raises(DataError, match="sample '7': its text is empty; take it out"):
        encode(encoder(), samples, ReplyOptions(Windows(8, 8)))


def test_a_text_that_begins_itself_gets_no_second_beginning() -> None:
    assert encoder().prompt("<s>The hen") == [BOS, *plain("The hen")]
    row = scored_row(encoder(), Continuation("<s>The hen", " sees"), truncate=False)
    assert row == ScoredRow([BOS, *plain("The hen")], plain(" sees"))


# Conversations


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("begin", ["", "<s>"])
def test_conversations_begin_as_the_template_says(adds_bos: bool, begin: str) -> None:
    made = encoder(adds_bos=adds_bos, template=begin + tiny.TEMPLATE)
    text = "<system>be red\n<user>Which is red?\n<assistant>"
    assert made.has_chat
    assert made.rendered(TALK) == begin + text
    front = [BOS] if begin else []
    assert made.prompt(TALK) == front + plain(text)
    row = scored_row(made, Continuation(TALK, "the gate"), truncate=False)
    stop = len(front + plain(text + "the gate"))
    assert list(row.targets) == (front + plain(text + "the gate"))[len(front + plain(text)) : stop]
    # transformers' own way from a conversation to tokens
    words = tiny.tokenizer(adds_bos=adds_bos, template=begin + tiny.TEMPLATE)
    messages = [{"role": role, "content": content} for role, content in TALK]
    own = words.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert made.prompt(TALK) == own["input_ids"]


def test_a_conversation_that_the_assistant_began_goes_on() -> None:
    talk = (("user", "Which?"), ("assistant", "the red"))
    assert encoder().rendered(talk) == "<user>Which?\n<assistant>the red"


def test_a_template_that_refuses() -> None:
    made = encoder(template="{{ raise_exception('no system role') }}")
    with pytest.raises(TaskvecError) as caught:
        made.rendered(TALK)
    assert str(caught.value) == (
        "m: its chat template refuses a conversation of system, user: no system role; ask it "
        "without conversations, or with other roles"
    )
    assert not encoder(template=None).has_chat


# What does not fit


def test_prompts_that_leave_no_room() -> None:
    made = encoder(context=12)
    tokens = made.prompt("The red fox sees the old gate")
    room = 12 - len(tokens)
    assert room > 1
    fits = Prompt("The red fox sees the old gate", room)
    assert prompt_tokens(made, fits, truncate=False) == tokens
    over = Prompt("The red fox sees the old gate", room + 2)
    with pytest.raises(TaskvecError) as caught:
        prompt_tokens(made, over, truncate=False)
    assert str(caught.value) == (
        "m: a sample needs 14 tokens, the model's context is 12; take fewer shots, or cut samples "
        "at the front (--truncate)"
    )
    assert prompt_tokens(made, over, truncate=True) == tokens[2:]
    with pytest.raises(TaskvecError, match="the model's context is 12"):
        prompt_tokens(made, Prompt("The", 12), truncate=True)


def test_continuations_that_do_not_fit() -> None:
    context, text = "The red fox sees the old", " gate and the hen"
    whole = [BOS, *plain(context + text)]
    fits = len(whole) - 1  # the last token is predicted, not read
    request = Continuation(context, text)
    assert scored_row(encoder(fits), request, truncate=False).inputs == whole[:-1]
    with pytest.raises(
        TaskvecError, match=f"needs {fits} tokens, the model's context is {fits - 1}"
    ):
        scored_row(encoder(fits - 1), request, truncate=False)
    cut = scored_row(encoder(fits - 1), request, truncate=True)
    assert cut == ScoredRow(whole[1:-1], plain(text))
    least = len(plain(text))
    assert scored_row(encoder(least), request, truncate=True) == ScoredRow(
        whole[-least - 1 : -1], plain(text)
    )
    with pytest.raises(TaskvecError, match="the model's context is"):
        scored_row(encoder(least - 1), request, truncate=True)


# What is known of a model


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 77}, 77),
        ({"n_positions": 33}, 33),
        ({"max_seq_len": 44, "max_position_embeddings": 55}, 44),
        ({"text_config": {"max_position_embeddings": 66}}, 66),
        ({}, UNLIMITED),
        ({"max_position_embeddings": None}, UNLIMITED),
    ],
)
def test_context_is_what_the_config_says(config: dict[str, Any], context: int) -> None:
    assert make_encoder(tiny.tokenizer(), config, {}, "m").context == context


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({}, {}, {EOS}),
        ({"eos_token_id": 5}, {}, {5, EOS}),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": [6, 7]}, {5, 6, 7, EOS}),
        ({"eos_token_id": None}, {"eos_token_id": 8}, {8, EOS}),
        ({"text_config": {"eos_token_id": 9}}, {}, {9, EOS}),
    ],
)
def test_ends_are_those_of_all_configs(
    config: dict[str, Any], generation: dict[str, Any], ends: set[int]
) -> None:
    assert make_encoder(tiny.tokenizer(), config, generation, "m").ends == ends
    assert make_encoder(tiny.tokenizer(eos=None), config, generation, "m").ends == ends - {EOS}


def test_a_tokenizer_with_neither_beginning_nor_end() -> None:
    words = tiny.tokenizer(bos=None, eos=None)
    with pytest.raises(CheckpointError) as caught:
        make_encoder(words, {}, {}, "m")
    assert str(caught.value) == (
        "m: its tokenizer has neither a beginning- nor an end-of-sequence token"
    )


def test_an_encoder_of_a_folder(tmp_path: Path) -> None:
    made = open_encoder(zoo.path("math"), "zoo")
    assert (made.context, made.begins, made.prefix, made.ends) == (128, (1,), 1, frozenset({2}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"m: has no tokenizer that can be read: .*; put the"):
        open_encoder(tmp_path, "m")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"m: config\.json: (cannot be read|is not JSON)"):
        open_encoder(tmp_path, "m")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"m: config\.json: (cannot be read|is not JSON)"):
        open_encoder(tmp_path, "m")
