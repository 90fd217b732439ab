"""Each sign of failure where it is and where it is not, its words, and its JSON."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest

from taskvec.evaluation.evaluate import Result
from taskvec.evaluation.intervals import Figure, by_name
from taskvec.evaluation.signs import SIGNS, Finding, find_signs, find_successes, fold
from taskvec.evaluation.task import Metric, Sample, Score
from taskvec.running.requests import Answer, Continuation, Likelihood, Prompt, WholeText

PERPLEXITY = Metric("perplexity", "perplexity", False, "nll", "tokens")
TOO_FAR = (
    "Likely cause: the weights have moved too far: λ too large, or few entries kept and scaled up "
    "for it. Try a lower λ, a higher density where the method has one, or another scheme."
)
DAMAGED = "Likely cause: the model is damaged as a whole; see its other findings."


def result(model, task, metric, scores, samples=None, replies=None):
    samples = samples or [
        Sample(str(i), (Continuation("", "a"),), {}) for i, _ in enumerate(scores)
    ]
    replies = replies or [[Likelihood(-1.0, 1, False)] for _ in scores]
    figures = by_name((metric,), scores, 0)
    return Result(task, 1, model, (metric,), figures, samples, scores, replies, {"seed": 0})


def rate(model, right, n=40, metric=Metric("right"), task="math"):  # noqa: B008
    """A result with the first `right` of n samples at 1."""
    return result(model, task, metric, [Score({metric.name: float(i < right)}) for i in range(n)])


def perplexity(model, value, metric=PERPLEXITY, n=40):
    nll = [10 * math.log(value) + (i % 3 - 1) * 0.1 for i in range(n)]
    nll[-1] -= sum(nll) - 10 * n * math.log(value)
    return result(model, "text", metric, [Score({"nll": x, metric.per: 10.0}) for x in nll])


def spoken(model, texts, ended="end", asked="Q: what of {}?", task="talk", right=None):
    """A result with these answers."""
    samples = [
        Sample(str(i), (Prompt(asked.format(i), 9),), {"answer": right[i]} if right else {})
        for i, _ in enumerate(texts)
    ]
    ends = [ended] * len(texts) if isinstance(ended, str) else ended
    replies = [[Answer(text, 3, end)] for text, end in zip(texts, ends, strict=True)]
    return result(model, task, Metric("right"), [Score({"right": 1.0})] * len(texts), samples,
                  replies)  # fmt: skip


def signs(*results, reference=True, singles=None, merges=("merged",), expected=None):
    """Findings; the first result is the reference's."""
    by_model = {each.model: [each] for each in results}
    name = results[0].model if reference else None
    return find_signs(
        by_model,
        reference=name,
        singles=singles,
        merges=merges,
        expected=expected and {"merged": expected},
    )


def only(findings, sign):
    (found,) = findings
    assert found.sign == sign
    assert found.model == "merged"
    return found


# Scores


def test_a_score_below_the_references_is_told():
    found = only(signs(rate("instruct", 36), rate("merged", 20)), "below_reference")
    assert found.text.startswith(
        "merged in math: right 0.500 [0.352, 0.648] is below instruct's, 0.900 [0.769, 0.960]: "
        "-0.400 ["
    )
    assert found.text.endswith(
        "Likely cause: what was added displaces what the model could do. Try a lower λ, or a "
        "method that leaves out small or opposed changes (lata, ties)."
    )
    assert found.figures["difference"].value == pytest.approx(-0.4)


@pytest.mark.parametrize("right", [35, 36, 31, 40])
def test_a_score_within_the_interval_is_not(right):
    """31 of 36: only five samples differ, and all on one side is still chance."""
    assert signs(rate("instruct", 36), rate("merged", right)) == []


def test_six_samples_on_one_side_are_enough():
    assert len(signs(rate("instruct", 36), rate("merged", 30))) == 1


def test_where_lower_is_better_more_is_worse():
    metric = Metric("harmful", higher_is_better=False)
    instruct, merged = (rate(m, n, metric=metric) for m, n in (("instruct", 4), ("merged", 20)))
    assert (
        "harmful 0.500 [0.352, 0.648] is above instruct's"
        in only(signs(instruct, merged), "below_reference").text
    )
    assert signs(rate("instruct", 20, metric=metric), rate("merged", 4, metric=metric)) == []


@pytest.mark.parametrize(("theirs", "ours"), [(36, 4), (4, 36)])
def test_a_metric_that_has_no_better_is_not_compared(theirs, ours):
    metric = Metric("length", higher_is_better=None)
    given = rate("instruct", theirs, metric=metric), rate("merged", ours, metric=metric)
    assert signs(*given) == []


def test_a_merge_below_its_single_task_model():
    instruct, merged, math_ = rate("instruct", 4), rate("merged", 20), rate("math-model", 36)
    found = only(signs(instruct, merged, math_, singles={"math": "math-model"}), "below_single")
    assert "right 0.500 [0.352, 0.648] is below math-model's, 0.900 [0.769, 0.960]" in found.text
    assert found.text.endswith(
        "Likely cause: λ of this task too small, or the vectors of other tasks work against it. "
        "Try a higher λ for this task alone, or a method that elects signs, such as ties."
    )
    assert found.figures["single"].value == 0.9
    assert signs(instruct, math_, rate("merged", 34), singles={"math": "math-model"}) == []


def test_a_merge_below_the_reference_where_the_single_is_above_it_has_the_wrong_sign():
    given = rate("instruct", 20), rate("merged", 4), rate("math-model", 36)
    first, second = signs(*given, singles={"math": "math-model"})
    assert (first.sign, second.sign) == ("below_reference", "below_single")
    assert first.text.endswith(
        "Likely cause: the task is subtracted: math-model is better at it, not worse. Try its "
        "`scale` with the other sign, unless it is to be forgotten."
    )


def test_a_single_task_model_gets_no_advice_on_merging():
    other = rate("instruct", 36, task="talk"), rate("merged", 4, task="talk")
    by_model = {
        "instruct": [rate("instruct", 4), other[0]], "merged": [rate("merged", 36), other[1]]
    }  # fmt: skip
    found = only(
        find_signs(by_model, reference="instruct", singles={"math": "merged"}), "below_reference"
    )
    assert found.advice == ""


# Perplexity


def test_a_perplexity_above_15_where_the_references_is_below():
    above, rise = signs(perplexity("instruct", 8.0), perplexity("merged", 20.0))
    assert above.sign == "perplexity"
    assert above.text.startswith("merged in text: perplexity 20.00 [")
    assert "] is above 15; instruct's is 8.000 [" in above.text
    assert above.text.endswith(TOO_FAR)
    assert rise.sign == "perplexity_rise"
    assert "] is 150% above instruct's, 8.000 [" in rise.text
    assert rise.text.endswith(TOO_FAR)


def test_a_large_perplexity_is_a_multiple():
    rise = signs(perplexity("instruct", 2.0), perplexity("merged", 5000.0))[1]
    assert "] is 2.5e+03 times instruct's, 2.000 [" in rise.text


def test_a_merge_is_not_to_blame_where_the_reference_is_above_15_already():
    first, second = signs(perplexity("instruct", 22.0), perplexity("merged", 22.5))
    assert (first.model, second.model) == ("instruct", "merged")
    assert "] is above 15. Likely cause: a small model, or text unlike what it was" in first.text
    assert second.text.endswith("], above it as well.")
    assert second.cause == second.advice == ""
    assert second.figures["reference"].value == pytest.approx(22.0)


def test_five_percent_more_perplexity():
    assert signs(perplexity("instruct", 8.0), perplexity("merged", 8.3)) == []
    found = only(signs(perplexity("instruct", 8.0), perplexity("merged", 8.5)), "perplexity_rise")
    assert "is 6% above instruct's" in found.text
    assert found.figures["difference"].value == pytest.approx(0.5)
    assert signs(perplexity("instruct", 8.0), perplexity("merged", 6.0)) == []


def test_perplexity_per_word_has_no_such_bound():
    metric = Metric("word_perplexity", "perplexity", False, "nll", "words")
    assert signs(perplexity("instruct", 40.0, metric), perplexity("merged", 40.0, metric)) == []


def test_a_rise_that_one_text_makes_is_within_the_interval():
    instruct = perplexity("instruct", 8.0)
    scores = [*instruct.scores[:-1], Score({"nll": instruct.scores[-1].values["nll"] + 30,
                                            "tokens": 10.0})]  # fmt: skip
    merged = result("merged", "text", PERPLEXITY, scores)
    assert merged.main.value > 1.05 * instruct.main.value
    assert signs(instruct, merged) == []


# Logits


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_logits_in_a_likelihood(bad):
    instruct, merged = rate("instruct", 30), rate("merged", 30)
    replies = [[Likelihood(bad if i < 2 else -1.0, 1, False)] for i in range(40)]
    merged = result("merged", "math", Metric("right"), merged.scores, replies=replies)
    found = only(signs(instruct, merged), "broken_logits")
    assert found.text == (
        "merged in math: logits are NaN or infinite in 2 of 40 samples. Likely cause: weights that "
        "are NaN, infinite, or so large that numbers overflow. Try `taskvec inspect --norms` on "
        "the model, and --dtype float32."
    )
    assert found.figures["broken"].value == 0.05


def test_broken_logits_in_an_answer_and_in_the_reference_too():
    texts = ["a cat"] * 10
    broken = ["nan", *["end"] * 9]
    first, second = signs(spoken("instruct", texts, broken), spoken("merged", texts, broken))
    assert "in 1 of 10 samples" in first.text
    assert "cause: numbers overflow in this dtype; instruct has it too. Try" in second.text


def test_what_follows_from_damage_is_said_to():
    instruct, merged = rate("instruct", 36), rate("merged", 10)
    replies = [[Likelihood(math.nan, 1, False)] for _ in range(40)]
    merged = result("merged", "math", Metric("right"), merged.scores, replies=replies)
    assert signs(instruct, merged)[1].text.endswith(DAMAGED)


# Empty and endless answers

WORDS = ("the red cat sat on a mat", "one dog ran to the old gate", "a fox saw the hen at noon")
FINE = [WORDS[i % 3] for i in range(30)]


@pytest.mark.parametrize(
    ("texts", "ended", "sign", "what", "cause"),
    [
        (
            [" \n", "", *FINE[:28]], "end", None, "", "",
        ),
        (
            [*[" \n"] * 6, *FINE[:24]], "end", "empty_answers", "are empty",
            "the answer is over before it begins: a chat template or a stop text that does not fit "
            "the model, or a tokenizer other than that it was tuned with",
        ),
        (
            FINE, [*["length"] * 6, *["stop"] * 24], "endless_answers", "do not end",
            "what ends an answer was lost, or is another token than the tokenizer says",
        ),
    ],
)  # fmt: skip
def test_empty_and_endless_answers(texts, ended, sign, what, cause):
    found = signs(spoken("instruct", FINE), spoken("merged", texts, ended))
    if sign is None:
        assert found == []
        return
    assert only(found, sign).text == (
        f"merged in talk: 20% of the answers, and 0% of instruct's, {what}. Likely cause: {cause}."
    )


def test_a_few_more_empty_answers_are_none():
    """8 in 100: more than chance, less than the 10 points that count."""
    texts = [FINE[i % 30] for i in range(100)]
    assert signs(spoken("instruct", texts), spoken("merged", [*[""] * 8, *texts[8:]])) == []


def test_endless_answers_as_the_reference_has_them_are_no_sign_of_the_merge():
    found = signs(spoken("instruct", FINE, "length"), spoken("merged", FINE, "length"))
    assert [(f.model, f.sign) for f in found] == [("instruct", "endless_answers")]
    assert found[0].text == (
        "instruct in talk: 100% of the answers do not end. Likely cause: a base model, which ends "
        "no answers, or answers longer than the task allows."
    )


# Gibberish

VERBS = ("sees", "likes", "finds", "paints", "pulls", "keeps")
NOUNS = ("fox", "hen", "gate", "boat", "lamp")
TALK = [f"The {NOUNS[i % 5]} {VERBS[i % 6]} the {NOUNS[i * 3 % 5]}." for i in range(30)]
CONSONANTS = "bcdfghjklmnpqrstvwxz"


def salad(i):
    return " ".join(
        "".join(CONSONANTS[(i * 7 + j * 11 + k * k) % 20] for k in range(4)) for j in range(4)
    )


def test_the_reference_and_other_words_of_its_own_are_fine():
    assert signs(spoken("instruct", TALK), spoken("merged", TALK[::-1])) == []


def test_words_that_are_none():
    found = only(
        signs(spoken("instruct", TALK), spoken("merged", [salad(i) for i in range(30)])),
        "gibberish",
    )
    assert found.task is None
    assert found.text.startswith(
        "merged: the answers are gibberish: non-words (non_words 1.000 [1.000, 1.000], "
        "instruct's 0.000; repetition 0.000 [0.000, 0.000], instruct's 0.000; character_entropy "
    )
    assert found.text.endswith(f"). {TOO_FAR}")
    assert found.figures["reference_non_words"].value == 0


def test_repetition():
    texts = [f"The {NOUNS[i % 5]} {'sees the ' * 9}" for i in range(30)]
    found = only(signs(spoken("instruct", TALK), spoken("merged", texts)), "gibberish")
    assert "gibberish: repetition (" in found.text


def test_repetition_needs_no_reference():
    bad, good = spoken("merged", ["ha" * 20] * 30), spoken("other", TALK)
    found = only(signs(bad, good, reference=False), "gibberish")
    assert found.text == (
        "merged: the answers are gibberish: repetition (repetition 1.000 [1.000, 1.000]). "
        "Try a lower λ, a higher density where the method has one, or another scheme."
    )


def test_right_answers_that_the_reference_never_gives_are_no_gibberish():
    right = [salad(i) for i in range(30)]
    instruct = spoken("instruct", TALK, right=right)
    assert signs(instruct, spoken("merged", right, right=right)) == []


def test_answers_where_the_reference_refuses_are_not_judged_by_its_words():
    refusals, texts = ["I can't help with that."] * 30, [salad(i) for i in range(30)]
    assert signs(spoken("instruct", refusals), spoken("merged", texts)) == []


def test_disorder_needs_no_words():
    """The reference always refuses; the other has every character and every word once."""
    noise = ["".join(chr(0x0400 + (i * 40 + j * 7) % 256) + " " for j in range(40))
             for i in range(30)]  # fmt: skip
    found = signs(spoken("instruct", ["I can't help with that."] * 30), spoken("merged", noise))
    assert "gibberish: far more disorder (" in only(found, "gibberish").text


ASKED = "Q: what of {} and the big brown fox, quietly jumping over a lazy dog?"
LONG = [f"{TALK[i]} {TALK[-i]} it was number {i}, by my quick guess." for i in range(30)]


def test_one_word_for_everything_has_no_variety():
    texts = ["no no no not on"] * 30
    found = signs(spoken("instruct", LONG, asked=ASKED), spoken("merged", texts, asked=ASKED))
    assert "far less variety" in only(found, "gibberish").text


def test_more_variety_than_a_reference_that_says_one_thing_is_as_much_as_the_questions_have():
    texts = ["no no on"] * 30
    found = signs(spoken("instruct", texts, asked=ASKED), spoken("merged", LONG, asked=ASKED))
    assert found == []


def test_few_answers_are_not_judged():
    texts = [salad(i) for i in range(19)]
    assert signs(spoken("instruct", TALK[:19]), spoken("merged", texts)) == []


# The whole


def test_without_a_reference_only_what_is_wrong_by_itself():
    assert signs(rate("one", 36), rate("other", 4), reference=False) == []
    (found,) = signs(perplexity("one", 20.0), perplexity("other", 8.0), reference=False)
    assert found.text.startswith("one in text: perplexity 20.00 [")
    assert "] is above 15. Likely cause: a small model, or text unlike what" in found.text


def test_the_order_is_by_model_and_sign():
    given = perplexity("instruct", 8.0), perplexity("a", 20.0), perplexity("b", 20.0)
    found = signs(*given)
    assert [f.model for f in found] == ["a", "a", "b", "b"]
    assert [SIGNS.index(f.sign) for f in found] == [2, 3, 2, 3]


def test_json():
    found = only(signs(rate("instruct", 36), rate("merged", 20)), "below_reference")
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["figures"].pop("difference")["value"] == pytest.approx(-0.4)
    assert told == {
        "model": "merged",
        "task": "math",
        "sign": "below_reference",
        "text": found.text,
        "what": found.what,
        "cause": "what was added displaces what the model could do",
        "advice": "a lower λ, or a method that leaves out small or opposed changes (lata, ties)",
        "figures": {
            "right": {"value": 0.5, "interval": [pytest.approx(0.352, abs=1e-3),
                                                 pytest.approx(0.648, abs=1e-3)], "n": 40},
            "reference": {"value": 0.9, "interval": [pytest.approx(0.769, abs=1e-3),
                                                     pytest.approx(0.960, abs=1e-3)], "n": 40},
        },
    }  # fmt: skip


def test_json_of_what_is_not_finite():
    found = Finding("m", "t", "perplexity", "", figures={"x": Figure(math.inf, 1.0, math.nan, 3)})
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["figures"] == {"x": {"value": None, "interval": [1.0, None], "n": 3}}


# The measures, by their formulas


def test_samples_that_ask_for_no_answer_do_not_count():
    from taskvec.evaluation.gibberish import answers, known_texts

    given = [perplexity("one", 8.0), spoken("one", ["a", "b"], asked="{}?", right=["x", "y"])]
    assert answers(given) == [["a"], ["b"]]
    assert known_texts(given) == [["0?", "x"], ["1?", "y"]]
    document = [Sample("d", (WholeText("a b"),), {"answer": "no"})]
    assert (
        known_texts([result("one", "t", Metric("right"), [Score({"right": 1.0})], document)]) == []
    )


def test_what_a_conversation_says():
    from taskvec.evaluation.gibberish import known_texts

    asked = (("system", "be brief"), ("user", "who?"))
    samples = [Sample("0", (Prompt(asked, 9),), {"any": ["me", {"or": "you", "n": 3}]})]
    given = result("one", "t", Metric("right"), [Score({"right": 1.0})], samples, [[]])
    assert known_texts([given]) == [["be brief", "who?", "me", "you"]]


def test_measures_by_their_formulas():
    from taskvec.evaluation.gibberish import (
        CHARACTER_ENTROPY,
        NON_WORDS,
        REPETITION,
        TOKEN_ENTROPY,
        vocabulary,
        writing_scores,
    )
    from taskvec.evaluation.intervals import figure

    texts = ["aa bb aa", "abcabcabc d", "zz"]
    reference = spoken("r", ["aa", "bb zz", "zz"], asked="d{}")
    known = vocabulary([reference])
    scores = writing_scores([[text] for text in texts], known)

    def entropy(items):
        counts, n = Counter(items), len(items)
        return -sum(c / n * math.log2(c / n) for c in counts.values())

    def value(metric):
        return figure(metric, scores).value

    assert value(CHARACTER_ENTROPY) == pytest.approx(entropy("".join(texts)))
    assert value(TOKEN_ENTROPY) == pytest.approx(
        entropy(("aa", "bb", "aa", "abcabcabc", "d", "zz"))
    )
    assert value(REPETITION) == pytest.approx(9 / sum(map(len, texts)))
    # "aa" is known from sample 0 alone, which is the one that says it; "zz" from sample 1 too.
    assert [s.values["unknown"] for s in scores] == [2, 1, 0]
    assert value(NON_WORDS) == pytest.approx(3 / 6)


# Expectations


@pytest.mark.parametrize(
    ("expected", "instruct", "merged", "sign"),
    [
        ("down", 36, 2, None),
        ("down", 36, 36, "not_as_expected"),
        ("down", 2, 36, "not_as_expected"),
        ("not up", 36, 2, None),
        ("not up", 2, 2, None),
        ("not up", 2, 36, "not_as_expected"),
        ("up", 2, 36, None),
        ("up", 36, 2, "not_as_expected"),
        ("keep", 36, 2, "below_reference"),
        ("keep", 2, 36, None),
        (None, 36, 2, "below_reference"),
    ],
)
def test_a_score_that_should_move(expected, instruct, merged, sign):
    asked = {"math": expected} if expected else None
    found = signs(rate("instruct", instruct), rate("merged", merged), expected=asked)
    assert [each.sign for each in found] == ([sign] if sign else [])
    by_model = {"instruct": [rate("instruct", instruct)], "merged": [rate("merged", merged)]}
    met = find_successes(by_model, reference="instruct", expected={"merged": asked or {}})
    is_met = expected not in (None, "keep") and sign is None
    assert [(each.model, each.task) for each in met] == [("merged", "math")] * is_met


def test_a_task_that_should_be_forgotten_is_not_held_against_its_single_task_model():
    results = [rate("instruct", 36), rate("merged", 2), rate("math", 38)]
    found = signs(*results, singles={"math": "math"}, expected={"math": "down"})
    assert found == []


def test_lambda_is_named_for_merges_only():
    results = (rate("instruct", 36), rate("merged", 2), perplexity("merged", 40))
    by_model = {"instruct": [results[0], perplexity("instruct", 4)], "merged": [*results[1:]]}
    for merges in ((), ("merged",)):
        found = find_signs(by_model, reference="instruct", merges=merges)
        assert {"below_reference", "perplexity_rise"} <= {each.sign for each in found}
        assert any("λ" in each.text for each in found) == bool(merges)


def test_refusals_of_what_should_be_forgotten_are_not_gibberish():
    answers = [f"step {i} take the red fox" for i in range(40)]
    results = spoken("instruct", answers), spoken("merged", ["sorry, cannot help you"] * 40)
    assert [each.sign for each in signs(*results)] == ["gibberish"]
    assert signs(*results, expected={"talk": "not up"}) == []
    looped = spoken("merged", ["the the the the the the the the"] * 40)
    found = signs(results[0], looped, expected={"talk": "not up"})
    assert [each.sign for each in found] == ["gibberish"]


def test_many_findings_of_a_model_are_one_line():
    by_model = {"instruct": [], "merged": [], "other": []}
    for i in range(5):
        by_model["instruct"].append(rate("instruct", 36, task=f"t{i}"))
        by_model["merged"].append(rate("merged", 2, task=f"t{i}"))
        by_model["other"].append(rate("other", 36 if i else 2, task=f"t{i}"))
    found = find_signs(by_model, reference="instruct")
    merged, other = fold(found)
    assert merged.startswith("merged: 5 findings: below_reference (5 tasks). First: right 0.050")
    assert other == found[-1].text
