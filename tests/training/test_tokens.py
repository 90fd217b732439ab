"""Texts as tokens: windows, and the mask of answers token by token."""

import dataclasses

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from taskvec import zoo
from taskvec.errors import DataError, UsageError
from taskvec.running.encoding import make_encoder, open_encoder
from taskvec.training.data import Classified, Conversations, Documents
from taskvec.training.objectives import IGNORED
from taskvec.training.tokens import (
    Fitting,
    TokenRow,
    answer_row,
    answer_rows,
    text_examples,
    token_examples,
    window_rows,
)

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<s>system\nBe brief<e>\n{% endif %}"
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}<e>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def tokenizer(template=None, *, merges=(), eos="</s>", bos="<b>"):
    """A token for every letter, and for the pieces in `merges`; special tokens whole."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [t for t in ("<pad>", "<unk>", bos, eos, "<s>", "<e>") if t]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789.?\n"
    names = [*special, *letters, *merges]
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(names)}, unk_token="<unk>"))
    pieces = "|".join([*merges, r"[\s\S]"])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    backend.decoder = decoders.Fuse()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=None, special_tokens=[(bos, names.index(bos))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<s>", "<e>"],
        chat_template=template,
        **{k: v for k, v in (("bos_token", bos), ("eos_token", eos)) if v},
    )
    made.model_max_length = 64
    made.model_input_names = ["input_ids", "attention_mask"]
    return made


def encoder(made, ends=()):
    config = {"max_position_embeddings": 96, "eos_token_id": [*ends, made.eos_token_id]}
    return make_encoder(made, config, {}, "the model")


def shown(made, row):
    """What is learned in brackets, token by token."""
    texts = [made.convert_ids_to_tokens(token) for token in row.tokens]
    for token, label in zip(row.tokens, row.labels, strict=True):
        assert label in (token, IGNORED)
    return "".join(
        text if label == IGNORED else f"[{text}]"
        for text, label in zip(texts, row.labels, strict=True)
    )


def chatml(messages, **options):
    made = tokenizer(CHATML, bos=None, **options)
    return made, answer_row(encoder(made, [made.convert_tokens_to_ids("<e>")]), messages, "row")


def test_answers_of_a_conversation_are_learned_with_the_token_that_ends_them():
    made, row = chatml(
        [("user", "hi?"), ("assistant", "ok."), ("user", "b"), ("assistant", "no a")]
    )
    assert shown(made, row) == (
        "<s>system\nBe brief<e>\n<s>user\nhi?<e>\n<s>assistant\n[o][k][.][<e>]\n"
        "<s>user\nb<e>\n<s>assistant\n[n][o][ ][a][<e>]\n"
    )


def test_a_system_message_and_a_last_question_are_not_learned():
    made, row = chatml([("system", "x"), ("assistant", "ok"), ("user", "why?")])
    assert shown(made, row) == ("<s>system\nx<e>\n<s>assistant\n[o][k][<e>]\n<s>user\nwhy?<e>\n")


def test_a_token_that_reaches_into_an_answer_is_learned():
    made, row = chatml([("user", "hi"), ("assistant", "\nok")], merges=["\n\n"])
    assert shown(made, row) == (
        "<s>system\nBe brief<e>\n<s>user\nhi<e>\n<s>assistant[\n\n][o][k][<e>]\n"
    )


def test_a_template_without_an_end_gets_the_end_of_sequence():
    """As the zoo's: a line break ends the answer, and the model must learn to stop."""
    encoder = open_encoder(zoo.path("instruct"), "zoo")
    row = answer_row(encoder, [("user", "one"), ("assistant", "two")], "row")
    made = encoder.tokenizer
    assert shown(made, row) == "Q: one\nA: [t][w][o][\n][<eos>]"


def test_without_a_template_texts_stand_as_they_are():
    made = tokenizer()
    row = answer_row(encoder(made), [("user", "a b "), ("assistant", "cd")], "row")
    assert shown(made, row) == "<b>a b [c][d][</s>]"
    made = tokenizer(eos=None)
    row = answer_row(
        dataclasses.replace(make_encoder(made, {}, {}, "m"), where="m"),
        [("user", "a"), ("assistant", "b")],
        "row",
    )
    assert shown(made, row) == "<b>a[b]"


def talks(*messages):
    return Conversations(
        messages, [f"t.jsonl, line {i + 1}" for i in range(len(messages))], "t", ""
    )


LONG = (("user", "a" * 90), ("assistant", "bcdefghi"))
SHORT = (("user", "a"), ("assistant", "b"))


def test_a_conversation_that_is_too_long():
    made = tokenizer()
    with pytest.raises(DataError) as caught:
        answer_rows(encoder(made), talks(SHORT, LONG), Fitting())
    assert str(caught.value) == (
        "t.jsonl, line 2: has 100 tokens, the limit is 96; truncate such examples (--truncate), "
        "or leave it out"
    )
    rows, dropped = answer_rows(encoder(made), talks(SHORT, LONG), Fitting(truncate=True))
    assert (len(rows), dropped) == (2, 0)
    assert shown(made, rows[1]).endswith("a[b][c][d][e][f]")
    rows, dropped = answer_rows(encoder(made), talks(SHORT, LONG), Fitting(50, truncate=True))
    assert (len(rows), dropped) == (1, 1)


def test_limits_that_cannot_be_meant():
    made = tokenizer()
    with pytest.raises(UsageError) as caught:
        answer_rows(encoder(made), talks(SHORT), Fitting(97))
    assert str(caught.value) == (
        "context is 97 tokens, more than the 96 that the model reads; give less"
    )
    with pytest.raises(UsageError) as caught:
        window_rows(encoder(made), Documents(["a"], "t", ""), Fitting(1))
    assert str(caught.value) == "context must be at least 2 tokens; got 1"


def test_a_template_that_rewrites_earlier_turns():
    last_only = (
        "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}{{ m['content'] }}<e>"
        "{% endif %}{% endfor %}"
    )
    made = tokenizer(last_only)
    with pytest.raises(DataError) as caught:
        answer_row(encoder(made), [*SHORT, *SHORT], "t.jsonl, line 3")
    text = str(caught.value)
    assert text.startswith("t.jsonl, line 3: answer 2 cannot be located")
    assert text.endswith("; split it into conversations with one answer, at the end")


def test_a_template_that_refuses():
    made = tokenizer("{{ raise_exception('no system') }}")
    with pytest.raises(DataError) as caught:
        answer_row(encoder(made), SHORT, "t.jsonl, line 3")
    assert (
        str(caught.value) == "t.jsonl, line 3: the chat template of the model refuses it: no system"
    )


def test_windows_hold_every_token_once():
    made = tokenizer()
    rows = window_rows(encoder(made), Documents(["abcd", "", "efg"], "t", ""), Fitting(5))
    assert ["".join(made.convert_ids_to_tokens(row.tokens)) for row in rows] == [
        "<b>abcd",
        "</s><b></s><b>e",
        "fg</s>",
    ]
    assert all(row.tokens == row.labels for row in rows)


def test_a_window_of_one_token_predicts_nothing():
    made = tokenizer()
    rows = window_rows(encoder(made), Documents(["abcd"], "t", ""), Fitting(5))
    assert [len(row.tokens) for row in rows] == [5]


def test_windows_are_512_tokens_or_what_the_model_reads():
    made = tokenizer()
    document = Documents(["a" * 2000], "t", "")
    assert len(window_rows(encoder(made), document, Fitting())[0].tokens) == 96
    wide = make_encoder(made, {"max_position_embeddings": 4096}, {}, "m")
    assert len(window_rows(wide, document, Fitting())[0].tokens) == 512


def test_batches_are_padded_on_the_right_and_count_what_is_predicted():
    examples = token_examples(
        [TokenRow([5, 6, 7], [IGNORED, 6, 7]), TokenRow([8, 9], [8, 9])], {"digest": "d"}
    )
    batch = examples.collate(list(examples.items))
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 0]],
        "labels": [[IGNORED, 6, 7], [8, 9, IGNORED]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    }
    assert examples.count(batch) == 3  # the first token of a row has nothing before it
    assert set(examples.collate([examples.items[0]])) == {"input_ids", "labels"}
    assert examples.unit == "tokens"


def test_labelled_texts():
    made = tokenizer()
    data = Classified(["abc", "d"], [1, 0], ("x", "y"), "text", "t.csv", "")
    examples = text_examples(made, data, Fitting(), "the model")
    batch = examples.collate(list(examples.items))
    ids = {letter: made.convert_tokens_to_ids(letter) for letter in "abcd"}
    assert batch["input_ids"].tolist() == [
        [2, ids["a"], ids["b"], ids["c"]],
        [2, ids["d"], 0, 0],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert examples.count(batch) == 2


def test_a_labelled_text_that_is_too_long():
    made = tokenizer()
    data = Classified(["abc", "d" * 70], [1, 0], ("x", "y"), "text", "t.csv", "")
    with pytest.raises(DataError) as caught:
        text_examples(made, data, Fitting(), "the model")
    assert str(caught.value) == (
        "t.csv: example 1 has 71 tokens, the limit of the model is 64; truncate such "
        "examples (--truncate)"
    )
    cut = text_examples(made, data, Fitting(10, truncate=True), "the model")
    assert [len(entry["input_ids"]) for entry, _ in cut.items] == [4, 10]
