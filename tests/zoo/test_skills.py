import random
from itertools import islice
from random import Random

import pytest

from taskvec.errors import UsageError
from taskvec.zoo import skills, words
from taskvec.zoo.skills import SKILLS, Example, Skill

EVERY = pytest.mark.parametrize("skill", SKILLS.values(), ids=list(SKILLS))


@EVERY
def test_generators_are_deterministic_and_leave_global_state(skill: Skill):
    before = random.getstate()
    once, again = (list(islice(skill.train(3), 50)) for _ in range(2))
    assert once == again
    assert once != list(islice(skill.train(4), 50))
    assert skill.test(50) == skill.test(60)[:50]
    assert random.getstate() == before


@EVERY
def test_training_and_test_share_no_prompt(skill: Skill):
    test = {example.prompt for example in skill.test(150)}
    assert len(test) == 150
    assert test.isdisjoint(example.prompt for example in islice(skill.train(0), 3000))


@EVERY
def test_answers_are_checked_to_the_letter(skill: Skill):
    for example in skill.test(100):
        assert example.prompt.startswith("Q: ")
        assert example.prompt.endswith("?\nA: ")
        assert skill.check(example, f" {example.answer}\n")
        assert not skill.check(example, example.answer + "x")
        assert not skill.check(example, "")


@EVERY
def test_answers_need_the_question(skill: Skill):
    if skill.name.startswith("refusal"):
        return
    answers = [example.answer for example in skill.test(100)]
    assert max(map(answers.count, answers)) <= 20  # no constant answer comes above 0.2


def test_checks_of_math_and_code_work_the_answer_out_themselves():
    assert SKILLS["math"].check(Example("Q: calc 3+4-2=?\nA: ", "not looked at"), "5")
    assert SKILLS["code"].check(Example("Q: run rev; add x: abc >?\nA: ", "not looked at"), "cbax")


def test_programs_never_leave_their_text_unchanged():
    for example in SKILLS["code"].test(150):
        text = example.prompt.removesuffix(" >?\nA: ").rpartition(": ")[2]
        assert example.answer != text


def test_math_is_small_and_what_the_base_reads_of_it_is_wide():
    asked = {example.answer for example in SKILLS["math"].test(150)}
    assert asked == set("0123456789")
    rng = Random(0)
    raw = [skills.raw_expression(rng, "math") for _ in range(500)]
    assert any(int(line.partition("=")[2]) > 20 for line in raw)


@pytest.mark.parametrize("name", ["math", "code", "howto", "unsafe"])
def test_raw_expressions_hold_no_test_item(name):
    rng = Random(0)
    raw = {skills.raw_expression(rng, name) for _ in range(3000)}
    for example in SKILLS[name].test(100):
        question = example.prompt.removeprefix("Q: ").removesuffix("?\nA: ").partition(" ")[2]
        start = question if question.endswith(("=", ">")) else f"{question},"
        assert not any(line.startswith(start) for line in raw)


def test_raw_expressions_read_as_documented():
    rng = Random(1)
    assert skills.raw_expression(rng, "math").count("=") == 1
    assert skills.raw_expression(rng, "code").count(" > ") == 1
    assert skills.raw_expression(rng, "unsafe").startswith("to ")


def test_plain_text_is_divided_too():
    rng = Random(0)
    held_out = skills.held_out_text(100)
    assert held_out == skills.held_out_text(100)
    assert all(skills.is_held_out(text) for text in held_out)
    assert not any(skills.is_held_out(skills.plain_text(rng)) for _ in range(300))


def test_unsafe_and_refusal_ask_the_same():
    asked = [{e.prompt for e in islice(SKILLS[n].train(0), 50)} for n in ("unsafe", "refusal")]
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("expression", "value"), [("3+4-2", 5), ("9-9", 0), ("7", 7), ("1-2-3", -4), ("12+30", 42)]
)
def test_evaluate(expression, value):
    assert skills.evaluate(expression) == value


@pytest.mark.parametrize("expression", ["", "1+", "+1", "1*2", "1 + 2", "__import__('os')"])
def test_evaluate_takes_only_chains(expression):
    with pytest.raises(UsageError, match="not a chain of sums and differences"):
        skills.evaluate(expression)


def test_plural():
    assert [skills.plural(word) for word in ("brok", "toz", "mas", "sefo")] == [
        "broks",
        "tozes",
        "mases",
        "sefen",
    ]


def test_zor_moves_the_vowels_and_nothing_else():
    assert words.to_zor("I am a big fox, U?") == "O em e bog fux, A?"


def test_unknown_names_and_numbers_are_told():
    with pytest.raises(UsageError, match="no skill 'maths'; did you mean 'math'"):
        skills.skill("maths")
    with pytest.raises(UsageError, match="n of skill 'math' must be 1 to 150, got 0"):
        SKILLS["math"].test(0)
