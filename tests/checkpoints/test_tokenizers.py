"""Rows of tokens by the files of a tokenizer, against the libraries that write those files."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from taskvec.checkpoints.tokenizers import (
    Added,
    Tokenizer,
    next_row,
    read_tokenizer,
    with_added_tokens,
)
from taskvec.errors import CheckpointError, MissingExtraError

TEXT = ["the cat sat on the mat", "a dog, a cat & the rat: 12 + 34 = 46", "naïve café – ok\n\tso"]
SAVE = (
    "save it with tokenizer.json: transformers.AutoTokenizer.from_pretrained(DIR)"
    ".save_pretrained(DIR)"
)
PLAIN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)


def read(folder: Path, **files: bytes) -> Tokenizer | None:
    return read_tokenizer(SimpleNamespace(folder=folder, where=str(folder), files=files))  # type: ignore[arg-type]


def known(folder: Path) -> Tokenizer:
    found = read(folder)
    assert found is not None
    return found


def byte_level(added: Sequence[Any] = (), size: int = 300) -> Any:
    """A byte-level BPE tokenizer as GPT-2 has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT * 4, trainer)
    made.add_tokens(list(added))
    return made


def test_byte_level_bpe_with_added_tokens(tmp_path: Path) -> None:
    from tokenizers import AddedToken

    made = byte_level([AddedToken("<tool>", lstrip=True), "plain"])
    made.add_special_tokens(["<sys>"])
    made.save(str(tmp_path / "tokenizer.json"))
    found = known(tmp_path)
    assert found.tokens == made.get_vocab(with_added_tokens=True)
    assert found.used_rows == made.get_vocab_size(with_added_tokens=True)
    assert set(found.added) == {"<|end|>", "<tool>", "plain", "<sys>"}
    assert found.added["<tool>"].flags == PLAIN | {"lstrip": True, "normalized": True}
    assert found.added["<sys>"].flags == PLAIN | {"special": True}
    assert "Ġcat" in found.tokens
    assert found.knows_all


def test_unigram_and_word_pieces_in_tokenizer_json(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    pieces = [("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0)]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0))
    unigram.add_tokens(["c"])
    unigram.save(str(tmp_path / "tokenizer.json"))
    assert known(tmp_path).tokens == {"<unk>": 0, "▁a": 1, "b": 2, "c": 3}
    words = {"[UNK]": 0, "a": 2, "##b": 1}
    Tokenizer(models.WordPiece(words, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    assert known(tmp_path).tokens == words


def test_gpt2_files_with_added_tokens(tmp_path: Path) -> None:
    made = byte_level()
    made.model.save(str(tmp_path))
    assert (tmp_path / "merges.txt").exists()
    rows = made.get_vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<s>": rows, "<t>": rows + 1}))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "pad_token": "<|end|>"})
    )
    found = known(tmp_path)
    assert found.file == "vocab.json"
    assert found.tokens == made.get_vocab() | {"<s>": rows, "<t>": rows + 1}
    assert found.added["<s>"].flags["special"]
    assert not found.added["<t>"].flags["special"]


def test_tokens_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\n##b\n")
    decoder = {"4": {"content": "<x>", "special": True}, "3": {"content": "a", "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": 9}))
    found = known(tmp_path)
    assert found.tokens == {"[PAD]": 0, "[UNK]": 1, "a": 2, "##b": 3, "<x>": 4}
    assert found.added["<x>"] == Added(4, PLAIN | {"special": True})


def sentencepiece_model(folder: Path, name: str, model_type: str) -> Any:
    sentencepiece = pytest.importorskip("sentencepiece")
    (folder / "text").write_text("\n".join(TEXT * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "made"), vocab_size=36,
        model_type=model_type, user_defined_symbols=["<tool>"], minloglevel=2,
    )  # fmt: skip
    (folder / "made.model").rename(folder / name)
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / name))


@pytest.mark.parametrize(
    ("name", "model_type"), [("tokenizer.model", "bpe"), ("spiece.model", "unigram")]
)
def test_sentencepiece(tmp_path: Path, name: str, model_type: str) -> None:
    made = sentencepiece_model(tmp_path, name, model_type)
    found = known(tmp_path)
    assert found.file == name
    assert found.tokens == {made.id_to_piece(i): i for i in range(made.get_piece_size())}
    assert found.knows_all


def test_t5_counts_its_sentinels_from_the_end(tmp_path: Path) -> None:
    made = sentencepiece_model(tmp_path, "spiece.model", "unigram")
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 3}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    size = made.get_piece_size()
    tokens = known(tmp_path).tokens
    assert [tokens[f"<extra_id_{i}>"] for i in range(3)] == [size + 2, size + 1, size]
    assert len(tokens) == size + 3


def test_pegasus_is_refused_by_name(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path, "spiece.model", "unigram")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PegasusTokenizer"}')
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/spiece.model: PegasusTokenizer numbers its tokens otherwise than this file; "
        f"{SAVE}"
    )


@pytest.mark.parametrize("name", ["tokenizer.model", "qwen.tiktoken"])
def test_tiktoken_is_read_as_byte_level_bpe_writes_it(tmp_path: Path, name: str) -> None:
    tokens = [bytes([i]) for i in range(256)] + [b" the", b"\n\t", "é".encode(), b"cat"]
    lines = [base64.b64encode(t) + f" {row}\n".encode() for row, t in enumerate(tokens)]
    (tmp_path / name).write_bytes(b"".join(lines))
    found = known(tmp_path)
    assert found.file == name
    made = byte_level()  # writes tokens in its own letters and says what they stand for
    for token, row in found.tokens.items():
        if row >= 128:
            continue
        assert made.decoder.decode([token]).encode() == tokens[row]
    assert [found.tokens[t] for t in ("Ġthe", "ĊĉĠ"[:2], "Ã©", "cat")] == [256, 257, 258, 259]
    assert not found.knows_all
    config = {"added_tokens_decoder": {"260": {"content": "<|end|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert known(tmp_path).knows_all
    assert known(tmp_path).tokens["<|end|>"] == 260


def test_files_of_the_source_take_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    found = read(tmp_path, **{"vocab.json": b'{"b": 0, "a": 1}'})
    assert found is not None
    assert found.tokens == {"b": 0, "a": 1}


def test_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tekken.json").write_text("{}")
    assert read(tmp_path) is None


def test_the_same_file_is_not_parsed_to_be_compared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.json").write_text("not JSON")
    assert known(tmp_path / "a").agrees(known(tmp_path / "b"))
    (tmp_path / "b" / "added_tokens.json").write_text('{"<x>": 5}')
    with pytest.raises(CheckpointError, match="is not JSON"):
        known(tmp_path / "a").agrees(known(tmp_path / "b"))


def test_agreement_is_of_rows_not_of_files(tmp_path: Path) -> None:
    contents = {"a": '{"x": 0, "y": 1}', "b": '{"y":1,"x":0}', "c": '{"x": 1, "y": 0}'}
    for name, text in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.json").write_text(text)
    a, b, c = (known(tmp_path / name) for name in "abc")
    assert a.agrees(b)
    assert not a.agrees(c)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": "b"}}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}'),
        ("vocab.json", b'{"a": -1}'),
        ("vocab.json", b"{}"),
        ("tokenizer.model", b"\x0a\x7fshort"),
        ("tokenizer.model", b"\x0a\x05\x0a\x01a"),
        ("tokenizer.model", b"\x0f"),
        ("tokenizer.model", b""),
        ("x.tiktoken", b"YQ== 0\nYQ=\n"),
    ],
)
def test_broken_vocabulary(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    found = known(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        _ = found.tokens
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/{name}: ")
    assert message.endswith(f"; {SAVE}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("added_tokens.json", '{"a": "1"}'),
    ],
)
def test_broken_added_tokens(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/{name}: ")
    assert str(caught.value).endswith(SAVE)


def test_configuration_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/tokenizer_config.json: ")
    assert str(caught.value).endswith(SAVE)


def test_sentencepiece_is_asked_for_only_where_it_is_needed(tmp_path: Path, monkeypatch) -> None:
    """The same file in two models is not read; other files are, and the message says with what."""
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    for name, content in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(content)
    a, b, c = (known(tmp_path / name) for name in "abc")
    assert a.agrees(b)
    with pytest.raises(MissingExtraError, match=r"taskvec\[sentencepiece\]"):
        a.agrees(c)


# --- new tokens ----------------------------------------------------------------------------------


def appended(folder: Path, new: dict[str, Added]) -> dict[str, bytes]:
    source: Any = SimpleNamespace(folder=folder, where=str(folder), files={})
    return with_added_tokens(source, known(folder), new)


def test_tokenizers_gives_new_tokens_their_rows(tmp_path: Path) -> None:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Loaded

    made = byte_level([AddedToken("<old>")])
    made.save(str(tmp_path / "tokenizer.json"))
    source: Any = SimpleNamespace(folder=tmp_path, where=str(tmp_path), files={})
    first = next_row(source, known(tmp_path))
    assert first == made.get_vocab_size(with_added_tokens=True)
    flags = PLAIN | {"lstrip": True, "special": True}
    files = appended(tmp_path, {"<a>": Added(first, flags), "be": Added(first + 1, PLAIN)})
    assert set(files) == {"tokenizer.json"}
    loaded = Loaded.from_str(files["tokenizer.json"].decode())
    expected = made.get_vocab(with_added_tokens=True) | {"<a>": first, "be": first + 1}
    assert loaded.get_vocab(with_added_tokens=True) == expected
    assert loaded.encode("the <a>be").ids[-2:] == [first, first + 1]
    about = loaded.get_added_tokens_decoder()[first]
    assert (about.lstrip, about.special, about.normalized) == (True, True, False)
    assert loaded.decode([first, first + 1]) == "be"  # special tokens are left out


def test_every_file_that_lists_added_tokens_is_changed(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Loaded

    made = byte_level()
    made.save(str(tmp_path / "tokenizer.json"))
    rows = made.get_vocab_size()
    decoder = {str(rows): {"content": "<late>", **PLAIN}}
    config = {"added_tokens_decoder": decoder, "model_max_length": 9}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<late>": rows}))
    files = appended(tmp_path, {"<new>": Added(rows + 1, PLAIN)})
    written = {name: json.loads(content) for name, content in files.items()}
    assert written["added_tokens.json"] == {"<late>": rows, "<new>": rows + 1}
    new = {str(rows + 1): {"content": "<new>", **PLAIN}}
    assert written["tokenizer_config.json"] == {
        "added_tokens_decoder": decoder | new, "model_max_length": 9,
    }  # fmt: skip
    loaded = Loaded.from_str(files["tokenizer.json"].decode())
    assert [loaded.token_to_id(t) for t in ("<late>", "<new>")] == [rows, rows + 1]


def test_new_tokens_go_only_into_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    source: Any = SimpleNamespace(folder=tmp_path, where=str(tmp_path), files={})
    with pytest.raises(CheckpointError) as caught:
        next_row(source, known(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: new tokens cannot be put into vocab.json; {SAVE}, or leave the new tokens "
        "out with new_tokens: drop"
    )


def test_a_vocabulary_with_gaps_takes_no_new_tokens(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 4}}}')
    source: Any = SimpleNamespace(folder=tmp_path, where=str(tmp_path), files={})
    with pytest.raises(CheckpointError) as caught:
        next_row(source, known(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}/tokenizer.json: a token that is appended would get row 2, but rows up to 4 "
        f"are taken; {SAVE}, or leave the new tokens out with new_tokens: drop"
    )
