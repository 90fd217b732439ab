"""Sections about scores: what a merge keeps, in words, and every model in every task."""

from __future__ import annotations

import math
from collections.abc import Sequence

from taskvec.evaluation.intervals import span
from taskvec.reporting import charts
from taskvec.reporting.document import EvaluationData, ReportData, ScoreData
from taskvec.reporting.sections import (
    Block,
    Chart,
    Chip,
    Chips,
    Code,
    Live,
    ReportSection,
    TableBlock,
    Words,
    figure_of,
    interval_row,
    listed,
    shown,
)

ARROWS = {"up": "▲ higher is wanted", "down": "▼ lower is wanted", "keep": "＝ must be kept"}


def verdict_section(document: ReportData) -> ReportSection:
    """What the data say, in words; warnings; how to repeat it."""
    blocks: list[Block] = []
    for evaluation in document.evaluations:
        blocks += [Words(text, is_lead=True) for text in verdicts(evaluation)]
    chips = warning_chips(document)
    if chips:
        blocks.append(Chips(chips))
    for merge in document.merges:
        scales = ", ".join(f"{task} {scale:g}" for task, scale in merge.table.scales.items())
        blocks.append(Words(
            f"{merge.name}: merged by {merge.decided_by}"
            + (f"; λ: {scales}" if scales else "") + f"; fingerprint {merge.fingerprint}."
        ))  # fmt: skip
        blocks.append(Code("Repeat this merge", merge.command))
        blocks.append(Code("Recipe", merge.recipe_text, is_long=True))
    if not blocks:
        blocks.append(Words("No evaluation and no merged folder are part of this report."))
    blocks += [Words(note) for note in document.notes]
    return ReportSection("verdict", "Verdict", blocks)


def merges_of(evaluation: EvaluationData) -> list[str]:
    """Models that are neither the reference nor tuned for a task alone."""
    tuned = {*evaluation.singles.values(), evaluation.reference}
    return [model for model in evaluation.models if model not in tuned]


def verdicts(evaluation: EvaluationData) -> list[str]:
    """A sentence for each merge, with figures and intervals."""
    return [_verdict(evaluation, model) for model in merges_of(evaluation)]


def _verdict(evaluation: EvaluationData, model: str) -> str:
    by_task = {(score.task, score.model): score for score in evaluation.scores}
    kept, changed, same = [], [], []
    for task in dict.fromkeys(score.task for score in evaluation.scores):
        score = by_task[task, model]
        reference = by_task.get((task, evaluation.reference or ""))
        single = by_task.get((task, evaluation.singles.get(task, "")))
        if single is not None:
            kept.append(_share(task, score, reference, single))
        elif score.difference is None or reference is None:
            changed.append(f"{task} {shown(score.figure)}")
        elif _is_same(score):
            same.append(task)
        else:
            wanted = evaluation.expected.get(model, {}).get(task)
            changed.append(_change(task, score, reference, wanted))
    parts = []
    if kept:
        parts.append(f"keeps {listed(kept)}")
    if same:
        parts.append(f"{listed(same)} unchanged (interval of the difference includes 0)")
    parts += changed
    against = f", compared with {evaluation.reference}" if evaluation.reference else ""
    return f"{model} {'; '.join(parts) if parts else 'was not compared'}{against}."


def _share(task: str, score: ScoreData, reference: ScoreData | None, single: ScoreData) -> str:
    """How much of a tuned model's gain over the reference is left."""
    mine, whole = figure_of(score.figure), figure_of(single.figure)
    start = figure_of(reference.figure).value if reference is not None else math.nan
    gain = whole.value - start
    if math.isfinite(gain) and gain:
        low, high = sorted((bound - start) / gain for bound in (mine.low, mine.high))
        share = (mine.value - start) / gain
        return (
            f"{share:.0%} [{low:.0%}, {high:.0%}] of {single.model}'s gain in {task} "
            f"({mine.value:.2f} of {whole.value:.2f})"
        )
    return f"{task} at {span(mine)}, {single.model} has {span(whole)}"


def _is_same(score: ScoreData) -> bool:
    if score.difference is None:
        return False
    low, high = score.difference.interval
    return low is not None and high is not None and low <= 0 <= high


def _change(task: str, score: ScoreData, reference: ScoreData, wanted: str | None) -> str:
    """How a score moved, and whether that is what was wanted of a skill to add or to forget."""
    assert score.difference is not None
    difference, start = figure_of(score.difference), figure_of(reference.figure).value
    good = score.higher_is_better
    rises = difference.value > 0
    word = "changes" if good is None else "improves" if rises == good else "worsens"
    if wanted in ("up", "down"):
        as_wanted = "as expected" if rises == (wanted == "up") else "against what was expected"
        word = f"{'rises' if rises else 'falls'} {as_wanted}"
    if "perplexity" in score.metric and start:
        share = [x / start for x in (difference.value, difference.low, difference.high)]
        return f"{task} {word}: perplexity {share[0]:+.1%} [{share[1]:+.1%}, {share[2]:+.1%}]"
    return f"{task} {word} by {span(difference, '+')}"


def warning_chips(document: ReportData) -> list[Chip]:
    """Signs of failure and warnings, each with the place where it shows."""
    chips = []
    for i, evaluation in enumerate(document.evaluations):
        chips += [
            Chip(f"{f.model}{'' if f.task is None else f' in {f.task}'}: "
                 f"{f.sign.replace('_', ' ')}", f"finding-{i}-{j}")
            for j, f in enumerate(evaluation.findings)
        ]  # fmt: skip
    for family in document.families:
        chips += [Chip(text, "layers") for text in family.warnings]
    for fit in document.fits:
        chips += [Chip(str(text), "fit") for text in fit.record.get("warnings", [])]
    return chips


def scores_section(document: ReportData, number: int) -> ReportSection:
    """Every model in every task, with findings, and the samples."""
    evaluation = document.evaluations[number]
    tasks = list(dict.fromkeys(score.task for score in evaluation.scores))
    config = {"evaluation": number}
    specs = {}
    for i, task in enumerate(tasks):
        rows = [score for score in evaluation.scores if score.task == task]
        specs[f"score-{i}"] = _dots(evaluation, rows)
        if any(row.difference for row in rows):
            specs[f"difference-{i}"] = _differences(evaluation, rows)
    title = "Scores" if len(document.evaluations) == 1 else f"Scores: {evaluation.path}"
    blocks: list[Block] = [
        Words(
            "Dots are scores, bars 95 % intervals. The switch shows paired differences to "
            f"{evaluation.reference or 'the reference'}."
        ),
        Live("scores", config | {"tasks": [_about(evaluation, task) for task in tasks]}, specs),
        _table(evaluation, tasks),
    ]
    if evaluation.samples:
        blocks.append(Live("samples", config))
    name = "scores" if number == 0 else f"scores-{number + 1}"
    return ReportSection(name, title, blocks)


def _about(evaluation: EvaluationData, task: str) -> dict[str, object]:
    """Title, direction and findings of a task."""
    rows = [score for score in evaluation.scores if score.task == task]
    first = rows[0]
    wanted = {way for by in evaluation.expected.values() if (way := by.get(task))}
    arrow = ""
    if len(wanted) == 1 and wanted <= ARROWS.keys():
        arrow = ARROWS[wanted.pop()]
    elif first.higher_is_better is not None:
        arrow = ARROWS["up" if first.higher_is_better else "down"]
    of = f" of {first.available:,}" if first.available not in (None, first.figure.n) else ""
    seed = "" if first.seed is None else f", seed {first.seed}"
    return {
        "task": task,
        "about": f"{first.metric}; {arrow}; n = {first.figure.n:,}{of}{seed}",
        "findings": [
            [j, finding.text] for j, finding in enumerate(evaluation.findings)
            if finding.task == task
        ],
    }  # fmt: skip


def _dots(evaluation: EvaluationData, rows: Sequence[ScoreData]) -> charts.Spec:
    marks = [interval_row(row.model, row.figure) for row in rows]
    return charts.spec_of(charts.intervals(marks, evaluation.models, rows[0].metric))


def _differences(evaluation: EvaluationData, rows: Sequence[ScoreData]) -> charts.Spec:
    marks = [
        interval_row(row.model, row.difference, "+") for row in rows if row.difference is not None
    ]
    title = f"Δ {rows[0].metric} vs {evaluation.reference}"
    chart = charts.intervals(marks, evaluation.models, title, zero_line=True)
    return charts.spec_of(chart)


def _table(evaluation: EvaluationData, tasks: Sequence[str]) -> TableBlock:
    by = {(score.task, score.model): score for score in evaluation.scores}
    rows = [
        [model, *(shown(by[task, model].figure) for task in tasks)] for model in evaluation.models
    ]
    return TableBlock("All scores, with 95 % intervals", ["model", *tasks], rows)


def score_charts(evaluation: EvaluationData) -> list[Chart]:
    """A chart of every task, for Markdown and notebooks."""
    tasks = dict.fromkeys(score.task for score in evaluation.scores)
    return [
        Chart(task, _dots(evaluation, [s for s in evaluation.scores if s.task == task]))
        for task in tasks
    ]
