from random import Random

import pytest

from taskvec.zoo import interpreter
from taskvec.zoo.interpreter import MAX_STEPS, MAX_TEXT, ProgramError, run


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("drop", "bc"),
        ("chop", "ab"),
        ("twin", "abcc"),
        ("head", "aabc"),
        ("rev", "cba"),
        ("add x", "abcx"),
        ("put x", "xabc"),
        ("drop; add x", "bcx"),
        (" rev;put y ;chop", "ycb"),
        ("drop; drop; drop; drop", ""),
    ],
)
def test_steps_do_what_the_table_says(program, expected):
    assert run(program, "abc") == expected


@pytest.mark.parametrize("step", [*interpreter.PLAIN_STEPS, "add x; chop", "put x; drop"])
def test_steps_are_total_on_the_empty_text(step):
    assert run(step, "") == ""


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("", "step 1 of '': it is empty"),
        ("drop;", "step 2 of 'drop;': it is empty"),
        ("drop; jump", "step 2 of 'drop; jump': unknown step 'jump'"),
        ("add", "step 1 of 'add': 'add' takes one letter a to z, got ''"),
        ("add xy", "step 1 of 'add xy': 'add' takes one letter a to z, got 'xy'"),
        ("put é", "step 1 of 'put é': 'put' takes one letter a to z, got 'é'"),
        ("drop 2", "step 1 of 'drop 2': 'drop' takes no letter, got '2'"),
        (";".join(["rev"] * 17), "program has 17 steps, at most 16 are allowed"),
    ],
)
def test_bad_programs_are_named(program, message):
    with pytest.raises(ProgramError) as caught:
        run(program, "abc")
    assert str(caught.value) == message


def test_long_texts_are_refused():
    with pytest.raises(ProgramError, match="65 characters, at most 64"):
        run("rev", "a" * 65)


def test_any_program_ends_with_a_bounded_text_or_its_own_error():
    rng = Random(0)
    pieces = ["drop", "chop", "twin", "head", "rev", "add", "put", " ", ";", "x", "\n", "é", "0"]
    outcomes = set()
    for _ in range(3000):
        program = "".join(rng.choice(pieces) for _ in range(rng.randrange(30)))
        try:
            assert len(run(program, "z" * rng.randrange(MAX_TEXT + 1))) <= MAX_TEXT + MAX_STEPS
            outcomes.add("done")
        except ProgramError:
            outcomes.add("refused")
    assert outcomes == {"done", "refused"}
