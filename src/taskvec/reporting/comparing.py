"""ReportSection about two or more merges: where their weights differ, and how their scores do."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from taskvec.evaluation.intervals import Figure, difference
from taskvec.evaluation.task import Metric, Score
from taskvec.reporting import charts
from taskvec.reporting.document import EvaluationData, FigureData, ReportData, TableData
from taskvec.reporting.evaluations import merges_of
from taskvec.reporting.layers import layer_maps
from taskvec.reporting.sections import Block, Chart, Charts, ReportSection, Words, interval_row

MOST = 3  # pairs of merges that are compared


def compare_section(document: ReportData) -> ReportSection | None:
    """Difference maps of λ·w and paired differences of scores, for every pair of merges."""
    tables = [
        *(merge.table for merge in document.merges),
        *(fit.table for fit in document.fits if fit.table is not None),
        *document.tables,
    ]
    pairs = [
        (a, b) for a, b in combinations(tables, 2)
        if a.names == b.names and set(a.weights) & set(b.weights)
    ]  # fmt: skip
    blocks: list[Block] = []
    for a, b in pairs[:MOST]:
        tasks = [task for task in a.weights if task in b.weights]
        maps = layer_maps(
            a.names, {task: _difference(a, b, task) for task in tasks}, charts.DIVERGING
        )
        blocks += [
            Words(f"{a.name} minus {b.name}: λ·w of each layer. Orange: more of the task in "
                  f"{a.name}; blue: more in {b.name}."),
            Charts(maps),
        ]  # fmt: skip
    for evaluation in document.evaluations:
        for one, other in list(combinations(merges_of(evaluation), 2))[:MOST]:
            rows = paired_differences(evaluation, one, other)
            if rows:
                names = [row["name"] for row in rows]
                title = f"{one} minus {other}"
                chart = charts.intervals(rows, names, title, zero_line=True)
                blocks.append(Charts([Chart(
                    f"Scores: {title}", charts.spec_of(chart),
                    "Mean difference over the same samples, with bootstrap 95 % intervals.",
                )]))  # fmt: skip
    return ReportSection("compare", "Merges compared", blocks) if blocks else None


def paired_differences(evaluation: EvaluationData, one: str, other: str) -> list[dict[str, Any]]:
    """The main metric of one model minus that of the other by task, over the same samples."""
    rows = []
    for part in evaluation.samples:
        if one not in part.models or other not in part.models:
            continue
        i, j = part.models.index(one), part.models.index(other)
        both = [(s.scores[i], s.scores[j]) for s in part.samples]
        scores = [[Score({} if each is None else {"value": each}) for each in column]
                  for column in zip(*both, strict=True)]  # fmt: skip
        if not both or any(each is None for pair in both for each in pair):
            continue  # such as a perplexity, which is no mean over samples
        found: Figure = difference(Metric("value", "mean"), *scores)
        rows.append(interval_row(part.task, FigureData(**found.to_json()), "+"))
    return rows


def _difference(a: TableData, b: TableData, task: str) -> list[float]:
    """λ·w of one table minus that of the other, by tensor."""
    mine, theirs = a.scales.get(task, 1.0), b.scales.get(task, 1.0)
    return [mine * x - theirs * y for x, y in zip(a.weights[task], b.weights[task], strict=True)]
