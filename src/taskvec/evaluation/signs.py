"""Signs of failure: what results say is wrong with a model, the likely cause, and what to try.

Pure: works on results and asks no model. A cause is named only where it follows from the figures.
Thresholds are rules of thumb and say where they are from; `docs/reference/signs.md` has them in
words.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from taskvec.evaluation import gibberish
from taskvec.evaluation.evaluate import Result
from taskvec.evaluation.intervals import Figure, difference, figure, span
from taskvec.evaluation.task import Metric, Score
from taskvec.journal import fields_to_json
from taskvec.running.requests import Answer, Likelihood, Reply

SUCCESS = "as_expected"  # not one of `SIGNS`
SIGNS = (
    "broken_logits",
    "gibberish",
    "perplexity",
    "perplexity_rise",
    "empty_answers",
    "endless_answers",
    "below_reference",
    "below_single",
    "not_as_expected",
)

PERPLEXITY = 15.0  # per token; models of a billion parameters and more are below it on plain text
PERPLEXITY_RISE = 0.05  # of the reference's perplexity
# Two-sided sign test at 95 %: of fewer samples that differ, all fall on one side by chance.
FEWEST_CHANGED = 6
MORE = 0.1  # empty or endless answers above the reference's, as a share of all
MOST = 0.5  # share of empty or endless answers that is too high by itself

TOO_FAR = "the weights have moved too far: λ too large, or few entries kept and scaled up for it"
SMALLER_STEP = "a lower λ, a higher density where the method has one, or another scheme"
SIDES = {"up": (1,), "down": (-1,), "not up": (-1, 0), "not down": (0, 1)}
WAYS = {"up": "above", "down": "below", "not up": "not above", "not down": "not below"}
MANY = 3  # findings of one model, above which they are one line
DAMAGED = "the model is damaged as a whole; see its other findings"


@dataclass(frozen=True, slots=True)
class Finding:
    """One sign of failure.

    Attributes:
        model: As the user named it.
        task: Where it shows; None: in the answers to all tasks.
        sign: One of `SIGNS`.
        what: What is seen, with figures.
        cause: What is likely behind it; empty where the figures do not say.
        advice: What to try; empty where there is nothing.
        figures: By name.
    """

    model: str
    task: str | None
    sign: str
    what: str
    cause: str = ""
    advice: str = ""
    figures: Mapping[str, Figure] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """All of it in words."""
        where = f" in {self.task}" if self.task is not None else ""
        cause = f" Likely cause: {self.cause}." if self.cause else ""
        advice = f" Try {self.advice}." if self.advice else ""
        return f"{self.model}{where}: {self.what}.{cause}{advice}"

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return fields_to_json(self) | {"text": self.text}


@dataclass(frozen=True, slots=True)
class _Case:
    """A model in a task.

    Attributes:
        role: `reference`, `single` (tuned for one of the tasks), `merge` or `other`.
        result: Of the model.
        other: Of the reference; None if there is none, or this is it.
        alone: Of the model that was tuned for this task alone; None if none was named.
        expected: Where the main metric should move, as `expectations` has it; None: not known.
        damaged: Whether other signs say that the model is damaged as a whole.
    """

    role: str
    result: Result
    other: Result | None
    alone: Result | None
    expected: str | None = None
    damaged: bool = False

    @property
    def too_far(self) -> str:
        """The cause where weights of a merge have moved too far; a fine-tune has no λ."""
        return TOO_FAR if self.role == "merge" else ""

    def finding(
        self, sign: str, what: str, cause: str, advice: str, figures: Mapping[str, Figure]
    ) -> Finding:
        """A finding; what can be tried with a merge is no advice for another model."""
        advice = advice if self.role == "merge" else ""
        return Finding(self.result.model, self.result.task, sign, what, cause, advice, figures)


def find_signs(
    results: Mapping[str, Sequence[Result]],
    *,
    reference: str | None = None,
    singles: Mapping[str, str] | None = None,
    merges: Collection[str] = (),
    expected: Mapping[str, Mapping[str, str]] | None = None,
) -> list[Finding]:
    """Signs of failure of every model, in the order of the models; of each, in that of `SIGNS`.

    Args:
        results: By model, of the same tasks in the same order.
        reference: The target, such as the instruction-tuned model. Without one only signs that need
            no comparison are looked for.
        singles: The model that was tuned for a task alone, by task.
        merges: Models that are merges; causes and advice name λ for these only.
        expected: Where main metrics should move, by model and task; see `expectations`.
    """
    cases = _cases(results, reference, singles or {}, merges, expected or {})
    return [
        finding
        for mine in cases
        for finding in sorted(_of_model(mine), key=lambda each: SIGNS.index(each.sign))
    ]


def find_successes(
    results: Mapping[str, Sequence[Result]],
    *,
    reference: str,
    expected: Mapping[str, Mapping[str, str]],
) -> list[Finding]:
    """Main metrics that should move and did, by more than the interval; see `find_signs`."""
    moved = [
        _check_direction(case)
        for mine in _cases(results, reference, {}, (), expected)
        for case in mine
    ]
    return [each for each in moved if each is not None and each.sign == SUCCESS]


def _cases(
    results: Mapping[str, Sequence[Result]],
    reference: str | None,
    singles: Mapping[str, str],
    merges: Collection[str],
    expected: Mapping[str, Mapping[str, str]],
) -> Iterator[list[_Case]]:
    """The cases of every model, in the order of the models."""
    for model, mine in results.items():
        theirs = results[reference] if reference is not None and model != reference else None
        role = "merge" if model in merges else "other"
        role = "single" if model in singles.values() else role
        yield [
            _Case(
                "reference" if model == reference else role,
                result,
                theirs[place] if theirs is not None else None,
                results[singles[result.task]][place] if result.task in singles else None,
                expected.get(model, {}).get(result.task),
            )
            for place, result in enumerate(mine)
        ]


def _of_model(cases: Sequence[_Case]) -> list[Finding]:
    def each(*signs: Callable[[_Case], Iterator[Finding]]) -> Iterator[Finding]:
        return (finding for sign in signs for case in cases for finding in sign(case))

    found = [*each(_broken), *_gibberish(cases), *each(_perplexity)]
    damaged = any(finding.sign != "perplexity" for finding in found)
    cases = [replace(case, damaged=damaged) for case in cases]
    scores = (_below_reference, _below_single, _not_as_expected)
    return [*found, *each(_empty, _endless, *scores)]


def fold(findings: Sequence[Finding]) -> list[str]:
    """Findings in words; those of a model that has many are one line."""
    by_model: dict[str, list[Finding]] = {}
    for finding in findings:
        by_model.setdefault(finding.model, []).append(finding)
    lines = []
    for model, mine in by_model.items():
        if len(mine) <= MANY:
            lines += [finding.text for finding in mine]
            continue
        counts = Counter(finding.sign for finding in mine)
        signs = ", ".join(f"{sign} ({n} tasks)" if n > 1 else sign for sign, n in counts.items())
        lines.append(f"{model}: {len(mine)} findings: {signs}. First: {mine[0].what}.")
    return lines


# Logits and perplexity


def _broken(case: _Case) -> Iterator[Finding]:
    """NaN or infinite logits."""
    share = _share(case.result, _is_broken)
    if not share.value > 0:
        return
    cause = "weights that are NaN, infinite, or so large that numbers overflow"
    if case.other is not None and _share(case.other, _is_broken).value > 0:
        cause = f"numbers overflow in this dtype; {case.other.model} has it too"
    yield Finding(
        case.result.model,
        case.result.task,
        "broken_logits",
        f"logits are NaN or infinite in {round(share.value * share.n)} of {share.n} samples",
        cause,
        "`taskvec inspect --norms` on the model, and --dtype float32",
        {"broken": share},
    )


def _is_broken(reply: Reply) -> bool:
    if isinstance(reply, Likelihood):
        return not math.isfinite(reply.log_likelihood)
    return reply.ended == "nan"


def _perplexity(case: _Case) -> Iterator[Finding]:
    """Perplexity above 15, or more than 5 % above the reference's."""
    result, other = case.result, case.other
    metric = next((m for m in result.metrics if m.kind == "perplexity"), None)
    if metric is None:
        return
    mine = result.figures[metric.name]
    figures = {metric.name: mine}
    theirs, compared = None, ""
    if other is not None:
        theirs = figures["reference"] = other.figures[metric.name]
        compared = f"; {other.model}'s is {span(theirs)}"
    if mine.value > PERPLEXITY and metric.per != "words":
        cause, advice = "", ""
        if theirs is None:
            cause = "a small model, or text unlike what it was trained on"
        elif theirs.value > PERPLEXITY:
            compared += ", above it as well"
        else:
            cause, advice = case.too_far, SMALLER_STEP
        what = f"{metric.name} {span(mine)} is above {PERPLEXITY:g}{compared}"
        yield case.finding("perplexity", what, cause, advice, figures)
    if metric is result.metrics[0] and case.expected in ("up", "not down"):
        return
    if other is None or theirs is None or not mine.value > theirs.value * (1 + PERPLEXITY_RISE):
        return
    apart = difference(metric, result.scores, other.scores, seed=result.about["seed"])
    if apart.low > 0:
        rise = mine.value / theirs.value - 1
        by = f"{rise:.0%} above" if rise < 10 else f"{rise + 1:.3g} times"
        what = f"{metric.name} {span(mine)} is {by} {other.model}'s, {span(theirs)}"
        figures = figures | {"difference": apart}
        yield case.finding("perplexity_rise", what, case.too_far, SMALLER_STEP, figures)


# Answers


def _share(result: Result, is_so: Callable[[Reply], bool]) -> Figure:
    """Share of the samples with such a reply."""
    return figure(_SHARE, _mark(result, is_so), seed=result.about["seed"])


_SHARE = Metric("share", "rate", higher_is_better=False)


def _mark(result: Result, is_so: Callable[[Reply], bool]) -> list[Score]:
    return [Score({"share": float(any(map(is_so, replies)))}) for replies in result.replies]


def _too_many(case: _Case, is_so: Callable[[Reply], bool]) -> tuple[str, dict[str, Figure]] | None:
    """How many answers are so, in words and figures, if they are too many."""
    mine = _share(case.result, is_so)
    if case.other is None:
        return (f"{mine.value:.0%} of the answers", {"share": mine}) if mine.value >= MOST else None
    other = _share(case.other, is_so)
    ours, theirs = _mark(case.result, is_so), _mark(case.other, is_so)
    if not (mine.value - other.value >= MORE and _differ(_SHARE, ours, theirs)):
        return None
    apart = difference(_SHARE, ours, theirs, seed=case.result.about["seed"])
    if not apart.low > 0:
        return None
    what = f"{mine.value:.0%} of the answers, and {other.value:.0%} of {case.other.model}'s,"
    return what, {"share": mine, "reference": other, "difference": apart}


def _empty(case: _Case) -> Iterator[Finding]:
    """Answers that say nothing."""
    found = _too_many(case, _is_empty)
    if found is not None:
        cause = "the answer is over before it begins: a chat template or a stop text that does "
        cause += "not fit the model, or a tokenizer other than that it was tuned with"
        cause = DAMAGED if case.damaged else cause
        yield case.finding("empty_answers", f"{found[0]} are empty", cause, "", found[1])


def _is_empty(reply: Reply) -> bool:
    """Whether an answer says nothing; reasoning that was cut off is not an empty answer."""
    if not isinstance(reply, Answer):
        return False
    return not (reply.raw if reply.ended == "length" else reply.text).strip()


def _endless(case: _Case) -> Iterator[Finding]:
    """Answers that were cut at the most tokens there may be."""
    found = _too_many(case, lambda r: isinstance(r, Answer) and r.ended == "length")
    if found is not None:
        cause = "what ends an answer was lost, or is another token than the tokenizer says"
        if case.other is None:
            cause = "a base model, which ends no answers, or answers longer than the task allows"
        cause = DAMAGED if case.damaged else cause
        yield case.finding("endless_answers", f"{found[0]} do not end", cause, "", found[1])


def _gibberish(cases: Sequence[_Case]) -> Iterator[Finding]:
    """Answers that do not read like language.

    Where a score should move, answers are not compared with the reference's: a refusal does not
    have the words of what it refuses.
    """
    compared = [case for case in cases if case.expected in (None, "keep")]
    theirs = [case.other for case in compared if case.other is not None] or None
    found = gibberish.odd([case.result for case in compared], theirs)
    if found is None and len(compared) < len(cases):
        theirs = None
        found = gibberish.odd([c.result for c in cases if c.expected not in (None, "keep")], None)
    if found is None:
        return
    shown = []
    for name, own in found.figures.items():
        beside = ""
        if theirs is not None:
            beside = f", {theirs[0].model}'s {found.reference[name].value:.3f}"
        shown.append(f"{name} {span(own)}{beside}")
    reasons = " and ".join(found.ways)
    figures = dict(found.figures) | {f"reference_{k}": v for k, v in found.reference.items()}
    merged = cases[0].role == "merge"
    yield Finding(
        cases[0].result.model,
        None,
        "gibberish",
        f"the answers are gibberish: {reasons} ({'; '.join(shown)})",
        TOO_FAR if merged and theirs is not None else "",
        SMALLER_STEP if merged else "",
        figures,
    )


# Scores


def _worse(case: _Case, other: Result) -> tuple[Metric, Figure] | None:
    """The main metric and how far it is on the wrong side of another's, if beyond the interval."""
    metric = case.result.metrics[0]
    if metric.kind == "perplexity" or metric.higher_is_better is None:
        return None
    apart, side = _side(case.result, other)
    return (metric, apart) if side == (-1 if metric.higher_is_better else 1) else None


def _side(result: Result, other: Result) -> tuple[Figure, int]:
    """The difference of the main metric to another's; -1 below, 1 above, 0 within the interval."""
    metric = result.metrics[0]
    apart = difference(metric, result.scores, other.scores, seed=result.about["seed"])
    if not _differ(metric, result.scores, other.scores):
        return apart, 0
    return apart, int(apart.low > 0) - int(apart.high < 0)


def _differ(metric: Metric, ours: Sequence[Score], theirs: Sequence[Score]) -> bool:
    """Whether enough samples differ for a difference to mean something."""
    key = metric.value or metric.name
    pairs = zip(ours, theirs, strict=True)
    return sum(a.values.get(key) != b.values.get(key) for a, b in pairs) >= FEWEST_CHANGED


def _compare(case: _Case, other: Result, metric: Metric, apart: Figure) -> str:
    side = "below" if metric.higher_is_better else "above"
    mine, theirs = case.result.main, other.main
    return (
        f"{metric.name} {span(mine)} is {side} {other.model}'s, {span(theirs)}: {span(apart, '+')}"
    )


def _below_reference(case: _Case) -> Iterator[Finding]:
    """The main metric worse than the reference's."""
    if case.expected not in (None, "keep"):
        return  # see `_not_as_expected`
    if case.other is None or (found := _worse(case, case.other)) is None:
        return
    merged = case.role == "merge"
    cause = f"what was {'added' if merged else 'learned'} displaces what the model could do"
    advice = "a lower λ, or a method that leaves out small or opposed changes (lata, ties)"
    if case.damaged:
        cause, advice = DAMAGED, ""
    elif merged and case.alone is not None and _better(case.alone, case.other):
        cause = f"the task is subtracted: {case.alone.model} is better at it, not worse"
        advice = "its `scale` with the other sign, unless it is to be forgotten"
    figures = {found[0].name: case.result.main, "reference": case.other.main}
    what = _compare(case, case.other, *found)
    figures["difference"] = found[1]
    yield case.finding("below_reference", what, cause, advice, figures)


def _below_single(case: _Case) -> Iterator[Finding]:
    """The main metric of a merge worse than that of the model tuned for the task alone."""
    better = "up" if case.result.metrics[0].higher_is_better else "down"
    if case.expected not in (None, "keep", better):
        return
    if case.alone is None or case.role != "merge" or (found := _worse(case, case.alone)) is None:
        return
    metric, apart = found
    figures = {metric.name: case.result.main, "single": case.alone.main, "difference": apart}
    cause = "λ of this task too small, or the vectors of other tasks work against it"
    advice = "a higher λ for this task alone, or a method that elects signs, such as ties"
    if case.damaged:
        cause, advice = DAMAGED, ""
    yield case.finding(
        "below_single", _compare(case, case.alone, metric, apart), cause, advice, figures
    )


def _not_as_expected(case: _Case) -> Iterator[Finding]:
    """A main metric that should move, and did not, or to the other side."""
    moved = _check_direction(case)
    if moved is not None and moved.sign != SUCCESS:
        yield moved


def _check_direction(case: _Case) -> Finding | None:
    """What became of a main metric that should move; None if it should not."""
    if case.other is None or case.expected in (None, "keep"):
        return None
    apart, side = _side(case.result, case.other)
    metric, mine, theirs = case.result.metrics[0], case.result.main, case.other.main
    figures = {metric.name: mine, "reference": theirs, "difference": apart}
    way = f"{WAYS[case.expected]} {case.other.model}'s, {span(theirs)}"
    if side in SIDES[case.expected]:
        what = f"{metric.name} {span(mine)} is {way}, as expected: {span(apart, '+')}"
        return Finding(case.result.model, case.result.task, SUCCESS, what, figures=figures)
    what = f"{metric.name} {span(mine)} should be {way}, and is not: {span(apart, '+')}"
    cause = "λ of this task too small, or layers that hold it are left out" if not side else ""
    cause = cause if case.role == "merge" else ""
    advice = "a λ that is further from 0, or a higher threshold of lata"
    return case.finding("not_as_expected", what, cause, advice, figures)


def _better(one: Result, other: Result) -> bool:
    """Whether a model is better than another by more than the interval."""
    return _worse(_Case("merge", other, None, None), one) is not None
