"""Expressions from files: what they match, and what they may cost."""

from __future__ import annotations

import re

import pytest

from taskvec import patterns
from taskvec.errors import CheckpointError, RecipeError
from taskvec.patterns import Pattern

NAMES = ["", "model.layers.3.mlp.up_proj", "a" * 60 + "c", "x\ny", "ü.\ud800", "a" * 2000]
SIMPLE = [r"layers\.(?P<block>\d+)\.", r"\A(.*\.)?(q_proj)$", "k_proj|v_proj", "a{3}", ".*"]
OTHERS = [r".*\.(?:mlp|attn)\..*_proj.*", r"(a+)+c", r"(a|aa)+c$", r"(ab?)+c", r"(.)\1", "(a|b){3}"]


@pytest.fixture(autouse=True)
def no_child_is_left():
    yield
    patterns._close_children()


@pytest.mark.parametrize("text", [*SIMPLE, *OTHERS])
@pytest.mark.parametrize("name", NAMES)
def test_matches_as_python_does(text, name):
    if name == "a" * 2000 and text in OTHERS:
        pytest.skip("may take long")
    expected = re.search(text, name)
    found = Pattern(text, "here", RecipeError).search(name)
    assert found == (None if expected is None else expected.groupdict())


@pytest.mark.parametrize("text", SIMPLE)
def test_simple_expressions_need_no_process(text):
    Pattern(text, "here", RecipeError).search("model.layers.3.mlp.up_proj")
    assert not patterns._children


@pytest.mark.parametrize("text", ["(a+)+b", "(a|aa)+b", "(a?){40}a{40}b", ".*.*.*.*.*.*.*b"])
def test_an_expression_may_not_cost_years(text, monkeypatch):
    monkeypatch.setattr(patterns, "_SECONDS", 1)
    pattern = Pattern(text, "rank_pattern 'x'", CheckpointError)
    with pytest.raises(CheckpointError, match=r"rank_pattern 'x'.*more than 1 s"):
        pattern.search("a" * 200)
    with pytest.raises(CheckpointError, match="more than 1 s"):
        pattern.search("a")  # the process is gone


@pytest.mark.parametrize("text", ["(", "[a", "(?P<a>x)(?P<a>y)", "a" * 5000, "(" * 2000])
def test_what_is_no_expression(text):
    with pytest.raises(RecipeError, match=r"^here: pattern"):
        Pattern(text, "here", RecipeError)


def test_a_long_name_is_matched_with_limits_too():
    assert Pattern(".*x$", "here", RecipeError).search("a" * 5000) is None
    assert len(patterns._children) == 1
