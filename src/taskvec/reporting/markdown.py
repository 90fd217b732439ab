"""A report for a model card: what the scores say, a table of them, and two small pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from taskvec.files import write_text
from taskvec.outputs.card import escaped
from taskvec.reporting.document import ReportData
from taskvec.reporting.evaluations import score_charts, verdicts
from taskvec.reporting.figures import save_charts
from taskvec.reporting.layers import layer_maps
from taskvec.reporting.sections import shown

SCORES, WEIGHTS = "scores with 95 % intervals", "λ times the weight of each layer"


def write_markdown(document: ReportData, path: Path) -> None:
    """Write the text, and pictures beside it.

    Raises:
        OutputError: a file cannot be written.
    """
    pictures = {}
    if document.evaluations:
        pictures[SCORES] = f"{path.stem}-scores.svg"
        panels = [chart for each in document.evaluations for chart in score_charts(each)]
        save_charts(panels, path.with_name(pictures[SCORES]), 2)
    tables = [*(merge.table for merge in document.merges), *document.tables]
    if tables:
        pictures[WEIGHTS] = f"{path.stem}-weights.svg"
        table = tables[0]
        values = {
            task: [table.scales.get(task, 1.0) * weight for weight in weights]
            for task, weights in table.weights.items()
        }
        save_charts(layer_maps(table.names, values), path.with_name(pictures[WEIGHTS]), 2)
    write_text(path, markdown(document, pictures))


def markdown(document: ReportData, pictures: Mapping[str, str]) -> str:
    """Words, a table of scores, and links to pictures.

    Args:
        document: All data.
        pictures: Names of files, by what they show.
    """
    lines: list[str] = []
    for evaluation in document.evaluations:
        tasks = list(dict.fromkeys(score.task for score in evaluation.scores))
        by = {(score.task, score.model): score for score in evaluation.scores}
        lines += [*(f"- {escaped(text)}" for text in verdicts(evaluation)), ""]
        lines.append("| " + " | ".join(["model", *map(escaped, tasks)]) + " |")
        lines.append("|---" * (1 + len(tasks)) + "|")
        for model in evaluation.models:
            cells = [escaped(model), *(shown(by[task, model].figure) for task in tasks)]
            lines.append("| " + " | ".join(cells) + " |")
        counts = {score.figure.n for score in evaluation.scores}
        n = f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"
        lines += ["", f"n = {n} a task; 95 % intervals in brackets.", ""]
    for merge in document.merges:
        lines += [f"{escaped(merge.name)} was merged by {escaped(merge.decided_by)}.", ""]
    lines += [f"![{what}]({quote(name)})" for what, name in pictures.items()]
    return "\n".join(lines).rstrip() + "\n"
