"""Members whose rows of tokens differ, against merges written out in NumPy token by token."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import from_bf16, read_checkpoint, read_raw, to_bf16, write_checkpoint

import taskvec as tv
from taskvec.checkpoints.folder import open_checkpoint
from taskvec.checkpoints.rows import NOTHING, Gathered, Mean, gather
from taskvec.checkpoints.source import derived
from taskvec.checkpoints.views import StoredTensor
from taskvec.dtypes import DTYPES
from taskvec.errors import CheckpointError, FamilyError
from taskvec.family.members import open_members
from taskvec.family.vocabulary import align

EMBEDDING, HEAD, BIAS, OTHER = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "lm_head.bias",
    "other",
)
WIDTH = 5
WORDS = ["<unk>", "<s>", "the", "cat", "sat"]
Rows = dict[str, np.ndarray[Any, Any]]


def tokenizer(words: Sequence[str], added: Sequence[Any] = ()) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>"])
    made.add_tokens(list(added))
    return made


def values(seed: int, rows: int) -> Rows:
    """Weights that bfloat16 holds as they are."""
    rng = np.random.default_rng(seed)
    shapes = {EMBEDDING: (rows, WIDTH), HEAD: (rows, WIDTH), BIAS: (rows,), OTHER: (3, WIDTH)}
    return {n: from_bf16(to_bf16(rng.normal(0, 1, shape))) for n, shape in shapes.items()}


class Member:
    """A folder with weights and a tokenizer, and what a reference needs to know of it."""

    def __init__(
        self, folder: Path, seed: int, words: Sequence[str] = WORDS, added: Sequence[Any] = (),
        rows: int | None = None, dtype: str = "BF16", **config: Any,
    ) -> None:  # fmt: skip
        made = tokenizer(words, added)
        self.folder, self.tokens = folder, made.get_vocab(with_added_tokens=True)
        self.rows = rows or len(self.tokens)
        self.weights = values(seed, self.rows)
        config = {"model_type": "llama", "vocab_size": self.rows, **config}
        write_checkpoint(folder, self.weights, dtype, config=config)
        made.save(str(folder / "tokenizer.json"))

    def has(self, token: str | None) -> bool:
        return token is not None and self.tokens.get(token, self.rows) < self.rows

    def row(self, name: str, token: str | None) -> np.ndarray[Any, Any]:
        assert token is not None
        return self.weights[name][self.tokens[token]].astype(np.float64)


def family(members: Mapping[str, Member], **options: Any) -> tv.Family:
    tasks = {n: m.folder for n, m in members.items() if n not in ("base", "instruct", "target")}
    roles = {n: m.folder for n, m in members.items() if n in ("base", "instruct", "target")}
    return tv.Family(tasks, **roles, **options)


def merge(members: Mapping[str, Member], out: Path, scale: float = 0.5, **options: Any) -> Rows:
    given = family(members, **options)
    tv.merge(
        given, out, method="task_arithmetic", scale=dict.fromkeys(given.tasks, scale), threads=1
    )
    return read_checkpoint(out)


def by_token(members: Mapping[str, Member], name: str, scale: float = 0.5) -> Any:
    """θ_target + λ Σ_t (θ_t − θ_anchor) by token, for the target's rows, float64."""
    target = members.get("target", members["instruct"])
    anchor = members["instruct"]
    result = target.weights[name].astype(np.float64)
    for token, row in target.tokens.items():
        for task in (m for n, m in members.items() if n not in ("base", "instruct", "target")):
            if target.has(token) and anchor.has(token) and task.has(token):
                result[row] += scale * (task.row(name, token) - anchor.row(name, token))
    return result


def stored(values: Any) -> Any:
    return from_bf16(to_bf16(values.astype(np.float32)))


# --- refuse --------------------------------------------------------------------------------------


def refusal(members: Mapping[str, Member], **options: Any) -> str:
    with pytest.raises((FamilyError, CheckpointError)) as caught:
        open_members(family(members, **options), needs_base=False, needs_anchor=True)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def differs(task: Member, instruct: Member) -> str:
    return (
        f"task 'math' ({task.folder}): tensor '{BIAS}' has shape [{task.rows}], the target has "
        f"[{instruct.rows}]; "
    )


def test_refused_with_the_policy_that_fits_padding(tmp_path: Path) -> None:
    members = {"instruct": Member(tmp_path / "i", 1), "math": Member(tmp_path / "m", 2, rows=8)}
    assert refusal(members) == differs(members["math"], members["instruct"]) + (
        "no token uses the rows that only one has: set vocabulary: truncate-padding"
    )


def test_refused_with_the_policies_that_fit_added_tokens(tmp_path: Path) -> None:
    added = ["<a>", "<b>", "<c>", "<d>"]
    members = {
        "instruct": Member(tmp_path / "i", 1),
        "math": Member(tmp_path / "m", 2, added=added),
    }
    assert refusal(members) == differs(members["math"], members["instruct"]) + (
        "it has 4 tokens ('<a>', '<b>', '<c>', …) that the target lacks: set vocabulary: by-token "
        "to leave out what only tasks have, or union to add it"
    )


def test_refused_with_the_policy_that_fits_tokens_at_other_rows(tmp_path: Path) -> None:
    members = {
        "instruct": Member(tmp_path / "i", 1),
        "math": Member(tmp_path / "m", 2, words=WORDS[::-1], rows=9),
    }
    assert refusal(members).endswith(
        "; its tokens are at other rows, or fewer: set vocabulary: by-token"
    )


def test_refused_where_nothing_says_what_rows_are_for(tmp_path: Path) -> None:
    members = {"instruct": Member(tmp_path / "i", 1), "math": Member(tmp_path / "m", 2, rows=8)}
    (tmp_path / "m" / "tokenizer.json").unlink()
    assert refusal(members).endswith(
        f"; no tokenizer in {tmp_path}/m describes the rows: add its files, or exclude the tensor"
    )
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    assert f"; no vocabulary policy can be recommended: {tmp_path}/m/tokenizer.json: " in (
        refusal(members)
    )


def test_other_tensors_keep_their_remedy(tmp_path: Path) -> None:
    for name, rows in (("i", 3), ("m", 4)):
        write_checkpoint(tmp_path / name, {OTHER: np.ones((rows, 2))})
    with pytest.raises(FamilyError, match="or use checkpoints of one architecture"):
        open_members(
            tv.Family({"math": tmp_path / "m"}, tmp_path / "i"), needs_base=False, needs_anchor=True
        )


def warnings(members: Mapping[str, Member], **options: Any) -> tuple[str, ...]:
    opened = open_members(family(members, **options), needs_base=False, needs_anchor=True)
    return opened.warnings


def test_as_many_rows_for_other_tokens_are_warned_of(tmp_path: Path) -> None:
    members = {
        "instruct": Member(tmp_path / "i", 1),
        "math": Member(tmp_path / "m", 2, words=["<unk>", "<s>", "cat", "the", "dog"]),
    }
    (warning,) = warnings(members)
    assert warning == (
        "task 'math': rows of tokens are merged by number, and 3 tokens ('cat', 'the', 'dog') "
        "stand at another row than in the target, or at the row of another token; vocabulary: "
        "by-token merges them by token"
    )
    assert warnings(members, vocabulary="by-token") == ()
    assert warnings(members, include=(OTHER,)) == ()


def test_a_token_in_a_row_that_was_padding_is_no_conflict(tmp_path: Path) -> None:
    members = {
        "instruct": Member(tmp_path / "i", 1, rows=8),
        "math": Member(tmp_path / "m", 2, added=["<pad>"], rows=8),
    }
    assert warnings(members) == ()


def test_same_files_are_not_parsed_and_broken_ones_do_not_stop_a_merge(tmp_path: Path) -> None:
    members = {"instruct": Member(tmp_path / "i", 1), "math": Member(tmp_path / "m", 2)}
    for name in "im":
        (tmp_path / name / "tokenizer.json").write_text("broken")
    assert warnings(members) == ()
    (tmp_path / "m" / "tokenizer.json").write_text("broken too")
    (warning,) = warnings(members)
    assert warning.startswith(
        f"task 'math': tokens cannot be compared: {tmp_path}/m/tokenizer.json: is not JSON"
    )
    (tmp_path / "m" / "tokenizer.json").unlink()
    assert warnings(members) == ()


# --- truncate-padding ----------------------------------------------------------------------------


def padded(tmp_path: Path) -> dict[str, Member]:
    return {
        "base": Member(tmp_path / "b", 0, rows=7),
        "instruct": Member(tmp_path / "i", 1, rows=16, text_config={"hidden_size": 5}),
        "math": Member(tmp_path / "m", 2, added=["<t>"], rows=8),
    }


def test_padding_is_cut_off_everywhere(tmp_path: Path) -> None:
    members = padded(tmp_path)
    got = merge(members, tmp_path / "out", vocabulary="truncate-padding")
    for name in (EMBEDDING, HEAD, BIAS):
        anchor = members["instruct"].weights[name][:6].astype(np.float64)
        task = members["math"].weights[name][:6].astype(np.float64)
        assert np.array_equal(got[name], stored(anchor + 0.5 * (task - anchor)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 6
    assert config["text_config"] == {"hidden_size": 5, "vocab_size": 6}
    opened = open_members(
        family(members, vocabulary="truncate-padding"), needs_base=True, needs_anchor=True
    )
    assert opened.notes == (
        "rows of tokens: the first 6 of each member, no token uses the rest "
        "(target 16, base 7, task 'math' 8)",
    )


def test_cut_views_are_one_run(tmp_path: Path) -> None:
    members = padded(tmp_path)
    opened = open_members(
        family(members, vocabulary="truncate-padding"), needs_base=True, needs_anchor=True
    )
    view = opened.sources["base"].view(EMBEDDING)
    whole = open_checkpoint(members["base"].folder).view(EMBEDDING)
    assert isinstance(view, Gathered)
    assert view.runs.tolist() == [0, 6]
    assert np.array_equal(view.read(7, 21), whole.read(7, 21))


def test_rows_that_tokens_use_are_not_cut(tmp_path: Path) -> None:
    members = {
        "instruct": Member(tmp_path / "i", 1),
        "math": Member(tmp_path / "m", 2, added=["<t>", "<u>"], rows=8),
    }
    assert refusal(members, vocabulary="truncate-padding") == (
        f"target ({tmp_path}/i): has 5 rows of tokens; task 'math' has 2 tokens ('<t>', '<u>') "
        "beyond them, which truncate-padding does not drop; vocabulary: by-token or union"
    )


def test_rows_of_special_tokens_that_are_not_listed_are_not_cut(tmp_path: Path) -> None:
    members = {"instruct": Member(tmp_path / "i", 1, rows=8), "math": Member(tmp_path / "m", 2)}
    (tmp_path / "i" / "tokenizer.json").unlink()
    (tmp_path / "i" / "x.tiktoken").write_text("YQ== 0\nYg== 1\n")
    assert refusal(members, vocabulary="truncate-padding") == (
        f"target ({tmp_path}/i): x.tiktoken lists no special tokens, so truncate-padding could "
        "drop their rows; vocabulary: by-token"
    )


@pytest.mark.parametrize("policy", ["truncate-padding", "by-token", "union"])
def test_policies_need_a_tokenizer(tmp_path: Path, policy: str) -> None:
    members = {"instruct": Member(tmp_path / "i", 1), "math": Member(tmp_path / "m", 2, rows=8)}
    (tmp_path / "m" / "tokenizer.json").unlink()
    assert refusal(members, vocabulary=policy) == (
        f"task 'math' ({tmp_path}/m): no tokenizer describes its token rows; "
        f"vocabulary: {policy} needs one (tokenizer.json, vocab.json, vocab.txt, tokenizer.model, "
        "spiece.model, spm.model or *.tiktoken)"
    )


# --- by-token ------------------------------------------------------------------------------------


def permuted(tmp_path: Path, dtype: str = "BF16") -> dict[str, Member]:
    """Every way in which tokenizers differ, with a target that is not the anchor."""
    return {
        "base": Member(tmp_path / "b", 0, words=["<unk>", "the", "<s>", "odd"]),
        "instruct": Member(tmp_path / "i", 1, words=["<s>", "cat", "<unk>", "the"], added=["<x>"]),
        "target": Member(tmp_path / "t", 3, added=["<x>", "<y>"], rows=10),
        "math": Member(
            tmp_path / "m", 2, words=["the", "<unk>", "cat", "dog"], rows=6, dtype=dtype
        ),
        "code": Member(tmp_path / "c", 4, words=[*WORDS, "extra"], added=["<y>", "<x>"]),
    }


def test_rows_are_merged_by_token(tmp_path: Path) -> None:
    members = permuted(tmp_path)
    got = merge(members, tmp_path / "out", vocabulary="by-token")
    target = members["target"]
    for name in (EMBEDDING, HEAD, BIAS):
        expected = by_token(members, name)
        assert np.array_equal(got[name], stored(expected))
        changed = np.flatnonzero((expected != target.weights[name]).reshape(10, -1).any(1))
        assert {t for t, row in target.tokens.items() if row in changed} == {
            "<unk>", "<s>", "the", "cat", "<x>",
        }  # fmt: skip
    for file in ("tokenizer.json", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (target.folder / file).read_bytes()


def test_rows_of_another_dtype_are_read_as_they_are(tmp_path: Path) -> None:
    members = permuted(tmp_path, "F32")
    for name, array in values(7, members["math"].rows).items():
        members["math"].weights[name] = (array * np.float32(1.0009)).astype(np.float32)
    config = {"model_type": "llama", "vocab_size": 6}
    write_checkpoint(members["math"].folder, members["math"].weights, "F32", config=config)
    got = merge(members, tmp_path / "out", vocabulary="by-token")
    for name in (EMBEDDING, HEAD, BIAS):
        assert np.array_equal(got[name], stored(by_token(members, name)))


def test_vectors_are_zero_where_a_token_is_lacking(tmp_path: Path) -> None:
    members = permuted(tmp_path)
    opened = open_members(
        family(members, vocabulary="by-token"), needs_base=True, needs_anchor=True
    )

    def rows(role: str) -> Any:
        view = opened.sources[role].view(EMBEDDING)
        assert view.dtype.name == "BF16"
        return from_bf16(view.read(0, 50)).reshape(10, WIDTH)

    target, anchor, base, math = (rows(r) for r in ("target", "anchor", "base", "task:math"))
    tokens = members["target"].tokens
    assert np.array_equal(target, members["target"].weights[EMBEDDING])
    for token in ("<unk>", "<s>", "the", "cat", "<x>"):
        assert np.array_equal(anchor[tokens[token]], members["instruct"].row(EMBEDDING, token))
    for token in ("sat", "<y>"):  # the anchor lacks them
        for role in (anchor, base, math):
            assert np.array_equal(role[tokens[token]], target[tokens[token]])
    for padding in (7, 8, 9):
        assert all(np.array_equal(r[padding], target[padding]) for r in (anchor, base, math))
    assert np.array_equal(base[tokens["the"]], members["base"].row(EMBEDDING, "the"))
    assert np.array_equal(base[tokens["cat"]], anchor[tokens["cat"]])
    assert np.array_equal(math[tokens["<x>"]], anchor[tokens["<x>"]])
    assert not np.array_equal(math[tokens["cat"]], anchor[tokens["cat"]])
    assert opened.notes == (
        "anchor: rows of tokens matched by token; lacks 2 tokens ('sat', '<y>') of the target",
        "base: rows of tokens matched by token; lacks 4 tokens ('cat', 'sat', '<x>', …) of the "
        "target; leaves out 1 token ('odd') that only it has",
        "task 'code': rows of tokens matched by token; leaves out 1 token ('extra') that only it "
        "has",
        "task 'math': rows of tokens matched by token; lacks 3 tokens ('sat', '<x>', '<y>') of "
        "the target; leaves out 1 token ('dog') that only it has",
    )


def test_nothing_is_done_where_all_agree(tmp_path: Path) -> None:
    members = {
        "base": Member(tmp_path / "b", 0, rows=8),
        "instruct": Member(tmp_path / "i", 1, rows=8),
        "math": Member(tmp_path / "m", 2, rows=8),
    }
    plain = open_members(family(members), needs_base=True, needs_anchor=True)
    for policy in ("truncate-padding", "by-token", "union"):
        opened = open_members(
            family(members, vocabulary=policy), needs_base=True, needs_anchor=True
        )
        assert opened.notes == ()
        assert {r: s.identity for r, s in opened.sources.items()} == {
            r: s.identity for r, s in plain.sources.items()
        }
        assert opened.sources["target"] is opened.sources["anchor"]


def test_a_member_with_the_rows_of_the_result_stays_as_it_is(tmp_path: Path) -> None:
    members = {
        "instruct": Member(tmp_path / "i", 1),
        "code": Member(tmp_path / "c", 4),
        "math": Member(tmp_path / "m", 2, words=WORDS[::-1]),
    }
    opened = open_members(
        family(members, vocabulary="by-token"), needs_base=False, needs_anchor=True
    )
    assert opened.sources["task:code"].identity == open_checkpoint(tmp_path / "c").identity
    assert isinstance(opened.sources["task:code"].view(EMBEDDING), StoredTensor)
    assert opened.sources["target"] is opened.sources["anchor"]
    assert isinstance(opened.target.view(EMBEDDING), StoredTensor)
    assert isinstance(opened.sources["task:math"].view(EMBEDDING), Gathered)
    assert isinstance(opened.sources["task:math"].view(OTHER), StoredTensor)


def test_tokens_beyond_the_rows_of_a_model_are_lacking(tmp_path: Path) -> None:
    members = {
        "instruct": Member(tmp_path / "i", 1),
        "math": Member(tmp_path / "m", 2, words=WORDS[::-1], added=["<pad>"], rows=3),
    }
    for i, policy in enumerate(("by-token", "union")):
        got = merge(members, tmp_path / str(i), vocabulary=policy)
        for name in (EMBEDDING, HEAD, BIAS):
            assert np.array_equal(got[name], stored(by_token(members, name)))


def test_the_identity_of_a_member_holds_its_rows(tmp_path: Path) -> None:
    members = permuted(tmp_path)

    def identity() -> str:
        given = family(members, vocabulary="by-token")
        opened = open_members(given, needs_base=True, needs_anchor=True)
        return repr(opened.sources["task:math"].identity)

    before = identity()
    assert identity() == before
    tokenizer(["the", "cat", "<unk>", "dog"]).save(str(tmp_path / "m" / "tokenizer.json"))
    assert identity() != before


def test_same_bits_by_threads_and_blocks(tmp_path: Path) -> None:
    from taskvec.outputs.run import run
    from taskvec.streaming import RunOptions

    members = permuted(tmp_path)
    recipe = tv.load_recipe(_recipe(tmp_path, members, "union"))
    run(recipe, tmp_path / "one", options=RunOptions(threads=1, block=65_536))
    run(recipe, tmp_path / "two", options=RunOptions(threads=2, block=131_072))
    assert read_raw(tmp_path / "one") == read_raw(tmp_path / "two")
    check = tv.verify(tmp_path / "one", replay=True, inputs=False)
    assert {c.outcome for c in check} == {"same"}


def _recipe(tmp_path: Path, members: Mapping[str, Member], policy: str) -> Path:
    tasks = {n: {"model": str(members[n].folder), "scale": 0.5} for n in ("math", "code")}
    roles = {n: str(members[n].folder) for n in ("instruct", "target")}
    content = {**roles, "tasks": tasks, "method": "task_arithmetic", "vocabulary": policy}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(content | {"new_tokens": "drop"}))
    return path


def test_a_difference_without_a_token_leaves_its_row(tmp_path: Path) -> None:
    """The rows of a difference without a tokenizer are the anchor's; lacking ones are zero."""
    members = permuted(tmp_path)
    names = {"base": "b", "target": "t", "anchor": "i", "task:code": "c"}
    sources: dict[str, Any] = {r: open_checkpoint(tmp_path / n) for r, n in names.items()}
    tau = from_bf16(to_bf16(np.random.default_rng(9).normal(0, 1, (5, WIDTH))))
    empty = write_checkpoint(tmp_path / "d", {EMBEDDING: tau}, config=None)
    difference = derived(open_checkpoint(empty), "difference")
    difference.is_difference = True
    difference.make_view = lambda name: AsDifference(open_checkpoint(empty).view(name))
    sources["task:math"] = difference
    aligned, _ = align(sources, "by-token", "copy")
    view = aligned["task:math"].view(EMBEDDING)
    assert view.is_difference
    expected = np.zeros((10, WIDTH), np.float32)
    for token, row in members["target"].tokens.items():
        if token in members["instruct"].tokens:
            expected[row] = tau[members["instruct"].tokens[token]]
    assert expected.any(1).sum() == 5
    assert np.array_equal(from_bf16(view.read(0, 50)).reshape(10, WIDTH), expected)
    assert set(aligned["task:math"].tensors) == {EMBEDDING}


def test_padding_of_a_difference_is_cut_off(tmp_path: Path) -> None:
    Member(tmp_path / "i", 1, rows=8)
    whole = Member(tmp_path / "m", 2, rows=9)
    part = derived(open_checkpoint(tmp_path / "m"), "difference")
    part.is_difference = True
    part.make_view = lambda name: AsDifference(open_checkpoint(tmp_path / "m").view(name))
    instruct = open_checkpoint(tmp_path / "i")
    sources: dict[str, Any] = {"target": instruct, "anchor": instruct, "task:math": part}
    aligned, _ = align(sources, "truncate-padding", "copy")
    view = aligned["task:math"].view(EMBEDDING)
    assert (view.is_difference, view.shape) == (True, (5, WIDTH))
    expected = whole.weights[EMBEDDING][:5].reshape(-1)
    assert np.array_equal(from_bf16(view.read(0, 25)), expected)
    assert aligned["target"] is aligned["anchor"]
    assert aligned["task:math"].is_difference
    sources = {"target": instruct, "task:math": part}
    tokenizer(WORDS, ["<t>"]).save(str(tmp_path / "m" / "tokenizer.json"))
    with pytest.raises(FamilyError) as caught:
        align(sources, "union", "copy")
    assert str(caught.value) == (
        f"task 'math' ({tmp_path}/m): has 1 token ('<t>') that the target lacks, but no rows of "
        f"'{BIAS}' for that; leave new tokens out with new_tokens: drop"
    )


class AsDifference:
    def __init__(self, view: StoredTensor) -> None:
        self.dtype, self.shape, self.read = view.dtype, view.shape, view.read
        self.is_difference = True


# --- union ---------------------------------------------------------------------------------------


def added(text: str, **flags: bool) -> Any:
    from tokenizers import AddedToken

    return AddedToken(text, **flags)


def grown(tmp_path: Path, rows: int | None = None) -> dict[str, Member]:
    """Two tasks with new tokens, one of which both have."""
    both = added("<both>", special=True)
    return {
        "base": Member(tmp_path / "b", 0),
        "instruct": Member(tmp_path / "i", 1, rows=rows),
        "math": Member(tmp_path / "m", 2, added=[added("<m>", lstrip=True), both], rows=16),
        "code": Member(tmp_path / "c", 4, added=[both, added("<c>")]),
    }


@pytest.mark.parametrize(("rows", "expected_rows"), [(None, 8), (6, 8), (64, 64)])
def test_new_tokens_are_copied_behind_the_last_token(
    tmp_path: Path, rows: int | None, expected_rows: int
) -> None:
    from tokenizers import Tokenizer

    members = grown(tmp_path, rows)
    got = merge(members, tmp_path / "out", vocabulary="union")
    math, code, instruct = members["math"], members["code"], members["instruct"]
    for name in (EMBEDDING, HEAD, BIAS):
        assert len(got[name]) == expected_rows
        old = by_token(members, name)
        assert np.array_equal(got[name][:5], stored(old[:5]))
        assert np.array_equal(got[name][8:], instruct.weights[name][8:])
        mean = (code.row(name, "<both>") + math.row(name, "<both>")) / 2
        assert np.array_equal(got[name][5], stored(mean))
        assert np.array_equal(got[name][6], code.row(name, "<c>"))
        assert np.array_equal(got[name][7], math.row(name, "<m>"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == expected_rows
    loaded = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert loaded.get_vocab(with_added_tokens=True) == instruct.tokens | {
        "<both>": 5, "<c>": 6, "<m>": 7,
    }  # fmt: skip
    flags = loaded.get_added_tokens_decoder()
    assert (flags[5].special, flags[6].special, flags[7].lstrip) == (True, False, True)


def test_task_vectors_are_zero_at_new_rows(tmp_path: Path) -> None:
    opened = open_members(
        family(grown(tmp_path), vocabulary="union"), needs_base=True, needs_anchor=True
    )
    views = {role: source.view(EMBEDDING) for role, source in opened.sources.items()}
    blocks = {role: view.read(5 * WIDTH, 8 * WIDTH) for role, view in views.items()}
    assert {view.dtype.name for view in views.values()} == {"F32"}  # the mean is not rounded
    assert all(np.array_equal(block, blocks["target"]) for block in blocks.values())
    assert opened.target.tensors[EMBEDDING].dtype.name == "BF16"
    assert opened.notes == (
        "new rows of tokens from 5 on: '<both>' of task 'code' and task 'math', '<c>' of task "
        "'code', '<m>' of task 'math'",
    )


def test_a_row_of_one_task_keeps_its_bits(tmp_path: Path) -> None:
    members = grown(tmp_path)
    del members["code"]
    merge(members, tmp_path / "out", vocabulary="union", scale=0.3)
    before, after = read_raw(tmp_path / "m"), read_raw(tmp_path / "out")
    row = 2 * WIDTH
    assert after[EMBEDDING][2][5 * row : 7 * row] == before[EMBEDDING][2][5 * row : 7 * row]


def test_the_order_of_tasks_is_that_of_their_names(tmp_path: Path) -> None:
    grown(tmp_path)
    names = {"task:math": "m", "target": "i", "task:code": "c"}
    sources: dict[str, Any] = {r: open_checkpoint(tmp_path / n) for r, n in names.items()}
    for given in (sources, dict(reversed(sources.items()))):
        aligned, _ = align(given, "union", "copy")
        written = json.loads(aligned["target"].files["tokenizer.json"])
        assert [t["content"] for t in written["added_tokens"][1:]] == ["<both>", "<c>", "<m>"]


def test_dropped_tokens_make_union_by_token(tmp_path: Path) -> None:
    members = grown(tmp_path)
    merge(members, tmp_path / "a", vocabulary="union", new_tokens="drop")
    merge(members, tmp_path / "b-token", vocabulary="by-token")
    assert read_raw(tmp_path / "a") == read_raw(tmp_path / "b-token")
    for file in ("tokenizer.json", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "i" / file).read_bytes()


def test_tokens_of_another_vocabulary_are_not_appended(tmp_path: Path) -> None:
    members = {
        "instruct": Member(tmp_path / "i", 1),
        "math": Member(tmp_path / "m", 2, words=["<unk>", "<s>", "dog", "rat"], added=["<t>"]),
    }
    assert refusal(members, vocabulary="union") == (
        f"task 'math' ({tmp_path}/m): 2 tokens ('dog', 'rat') of its vocabulary not in the "
        "target's, nor added to it, so they cannot be appended; leave out what only tasks have: "
        "vocabulary: by-token"
    )


def test_a_tokenizer_with_more_tokens_than_rows_takes_no_new_ones(tmp_path: Path) -> None:
    members = grown(tmp_path, rows=4)
    assert refusal(members, vocabulary="union") == (
        f"target ({tmp_path}/i): has 4 rows of tokens, but tokens up to row 4, so 3 tokens "
        "('<both>', '<c>', '<m>') cannot be appended; leave new tokens out with new_tokens: drop"
    )


def test_new_tokens_need_tokenizer_json_in_the_target(tmp_path: Path) -> None:
    members = grown(tmp_path)
    (tmp_path / "i" / "tokenizer.json").unlink()
    (tmp_path / "i" / "vocab.json").write_text(json.dumps(members["instruct"].tokens))
    assert f"{tmp_path}/i: new tokens cannot be put into vocab.json; " in refusal(
        members, vocabulary="union"
    )


@pytest.mark.parametrize("policy", ["by-token", "union"])
def test_transformers_loads_the_folder(tmp_path: Path, policy: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    extra = {"i": [], "m": [added("<m>", special=True)]}
    for seed, (name, tokens) in enumerate(extra.items()):
        raw = tokenizer(WORDS, tokens)
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
        made.save_pretrained(tmp_path / name)
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=len(made), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=4, bos_token_id=1, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    tv.merge(
        tv.Family({"math": tmp_path / "m"}, tmp_path / "i", vocabulary=policy),
        tmp_path / "out",
        method="task_arithmetic",
        scale={"math": 0.5},
        threads=1,
    )
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = 6 if policy == "union" else 5
    assert model.get_input_embeddings().weight.shape == (expected, 16)
    assert model.lm_head.weight.shape == (expected, 16)
    assert len(loaded) == model.config.vocab_size == expected
    ids = loaded("the <m>")["input_ids"]
    assert ids == ([2, 5] if policy == "union" else [2, 0])
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()
    if policy == "union":
        task = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        assert torch.equal(model.lm_head.weight[5], task.lm_head.weight[5])
        assert loaded.decode(ids, skip_special_tokens=True) == "the"


def test_flags_of_the_command_line(tmp_path: Path, cli: Any) -> None:
    members = grown(tmp_path)
    flags = ["--instruct", tmp_path / "i", "--method", "task_arithmetic", "--quiet"]
    for task, name in (("math", "m"), ("code", "c")):
        flags += ["--task", f"{task}={tmp_path / name}:0.5"]
    code, _, err = cli("merge", tmp_path / "no", *flags)
    assert (code, "set vocabulary: by-token" in err) == (1, True)
    assert cli("merge", tmp_path / "all", *flags, "--vocabulary", "union")[0] == 0
    assert len(read_checkpoint(tmp_path / "all")[EMBEDDING]) == 8
    drop = ["--vocabulary", "union", "--new-tokens", "drop"]
    assert cli("merge", tmp_path / "some", *flags, *drop)[0] == 0
    got = read_checkpoint(tmp_path / "some")[EMBEDDING]
    assert np.array_equal(got, stored(by_token(members, EMBEDDING)))
    code, _, err = cli("merge", tmp_path / "no", *flags, "--vocabulary", "x")
    assert code == 2
    assert "vocabulary must be in refuse | truncate-padding | by-token | union; got 'x'" in err


# --- views ---------------------------------------------------------------------------------------


class InMemory:
    """A view of an array that is no stored tensor."""

    is_difference = False

    def __init__(self, array: np.ndarray[Any, Any], dtype: str) -> None:
        self.array, self.dtype, self.shape = array, DTYPES[dtype], array.shape

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        assert 0 <= start <= stop <= self.array.size
        return self.array.reshape(-1)[start:stop]


def on_disk(folder: Path, array: np.ndarray[Any, Any]) -> StoredTensor:
    return open_checkpoint(write_checkpoint(folder, {"a": array}, "F32")).view("a")


@pytest.mark.parametrize("is_stored", [True, False])
@pytest.mark.parametrize("width", [1, 3, 40])
def test_every_stretch_of_gathered_rows(tmp_path: Path, width: int, is_stored: bool) -> None:
    rng = np.random.default_rng(width)
    arrays = [rng.normal(0, 1, (n, width)).astype(np.float32) for n in (9, 14)]
    if is_stored:
        parts: list[Any] = [on_disk(tmp_path / str(i), a) for i, a in enumerate(arrays)]
    else:
        parts = [InMemory(a, "F32") for a in arrays]
    which = rng.integers(-1, 2, 50)
    row = rng.integers(0, 9, 50)
    which[20:40], row[20:40] = 1, np.minimum(np.arange(20), 13)
    view = gather(parts, which, row)
    expected = np.stack(
        [np.zeros(width) if w == NOTHING else arrays[w][r] for w, r in zip(which, row, strict=True)]
    ).astype(np.float32)
    assert view.shape == (50, width)
    edges = [*range(0, 50 * width, 7), 50 * width]
    for start in edges[::3]:
        for stop in edges:
            if start < stop:
                assert np.array_equal(view.read(start, stop), expected.reshape(-1)[start:stop])
    failures: list[int] = []

    def work(start: int) -> None:
        for stop in range(start + 1, 50 * width, 5):
            if not np.array_equal(view.read(start, stop), expected.reshape(-1)[start:stop]):
                failures.append(stop)

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_parts_of_different_dtypes_are_widened(tmp_path: Path) -> None:
    half = InMemory(np.array([[1.5], [2.5]], np.float16).view("<u2"), "F16")
    brain = InMemory(to_bf16(np.array([[3.0], [4.0]])), "BF16")
    double = InMemory(np.array([[1 / 3]]), "F64")
    every = np.array([0, 1, 0]), np.array([1, 0, 0])
    view = gather([half, brain], *every)
    assert view.dtype.name == "F32"
    assert view.read(0, 3).tolist() == [2.5, 3.0, 1.5]
    view = gather([half, double], *every)
    assert view.dtype.name == "F64"
    assert view.read(0, 3).tolist() == [2.5, 1 / 3, 1.5]
    view = gather([half, brain], np.zeros(3, int), np.array([1, 0, 1]))
    assert view.dtype.name == "F16"


def test_rows_as_they_are_are_the_view_itself() -> None:
    part = InMemory(np.zeros((3, 2), np.float32), "F32")
    assert gather([part], np.zeros(3, int), np.arange(3)) is part
    assert gather([part, part], np.array([0, 1, 0]), np.arange(3)) is part
    assert gather([part], np.zeros(2, int), np.arange(2)) is not part
    assert np.shares_memory(
        gather([part], np.zeros(2, int), np.arange(1, 3)).read(0, 4), part.array
    )


def test_the_mean_is_of_the_widened_values() -> None:
    a = InMemory(to_bf16(np.array([1.0, 2.0, 1.0])), "BF16")
    b = InMemory(np.array([2.0, 5.0, 1e-3], np.float32), "F32")
    view = Mean((a, b, a))
    assert view.dtype.name == "F32"
    expected = np.array([1.0 + 2.0 + 1.0, 2.0 + 5.0 + 2.0, 1.0 + np.float32(1e-3) + 1.0]) / 3
    assert np.allclose(view.read(0, 3), expected, rtol=2e-7)
    assert view.read(1, 2) == view.read(0, 3)[1]
