"""What `taskvec disentangle` prints for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from taskvec.cli.printing import show

if TYPE_CHECKING:
    from taskvec.disentanglement import Addition, Departure, Disentanglement, Negation
    from taskvec.evaluation.intervals import Figure


def print_error(found: Disentanglement) -> None:
    """The grid's mean and corners, and what lies where coefficients mostly do."""
    from taskvec.evaluation.intervals import span

    one, two = found.tasks
    rows = " and ".join(f"{found.examples[t]:,} examples of {t}" for t in found.tasks)
    print(f"disentanglement error ({found.distance}), {rows}")
    cells = [cell for row in found.cells for cell in row]
    inside = [c for c in cells if all(0 <= alpha <= 1 for alpha in c.alphas.values())]
    wanted = {"at its largest": max(cells, key=lambda c: (c.error.value, *c.alphas.values()))}
    with_both = [cell for cell in cells if all(cell.alphas.values())]  # without, 0 says nothing
    if with_both:
        wanted["nearest to (1, 1)"] = min(
            with_both, key=lambda c: sum((a - 1) ** 2 for a in c.alphas.values())
        )
    lines = [
        [name, cell.alphas[one], cell.alphas[two], span(cell.error)]
        for name, cell in wanted.items()
    ]
    show(lines, ("cell", f"α {one}", f"α {two}", "ξ"))
    for name, chosen in (("cells", cells), ("cells within [0, 1]", inside)):
        if len(chosen) > 1:
            mean = sum(cell.error.value for cell in chosen) / len(chosen)
            print(f"mean over {len(chosen)} {name}: {mean:.4f}")
    print()


def print_additions(found: Sequence[Addition]) -> None:
    """A line for each method, then the models that it is compared with."""
    from taskvec.evaluation.intervals import span

    tasks = list(found[0].accuracy)
    print(f"task addition ({found[0].search}), on test data; normalised by the single-task models")
    lines = []
    for each in found:
        scales = ", ".join(dict.fromkeys(f"{scale:g}" for scale in each.scales.values()))
        if each.search == "by-task":
            scales = ", ".join(f"{scale:g}" for scale in each.scales.values())
        shown = [span(each.accuracy[task]) for task in tasks]
        lines.append(
            [each.method, scales, span(each.mean_normalised), span(each.mean_accuracy), *shown]
        )
    for name in ("single", "pretrained"):
        figures = getattr(found[0], name)
        lines.append([name, "", "", "", *(span(figures[task]) for task in tasks)])
    show(lines, ("", "λ", "normalised", "accuracy", *tasks))
    print()


def print_negations(task: str, control: str, found: Sequence[Negation]) -> None:
    """A line for each method, then the model that it began with, and what must be known."""
    from taskvec.evaluation.intervals import span

    def shown(*figures: Figure | None) -> list[object]:
        return ["–" if figure is None else span(figure) for figure in figures]

    print(f"task negation of {task}, {found[0].keep:.0%} of {control} kept; on test data")
    lines: list[list[object]] = [
        [each.method, each.scale, *shown(each.target, each.control, each.control_share)]
        for each in found
    ]
    start = found[0].pretrained
    lines.append(["pretrained", None, *shown(start["target"], start["control"]), ""])
    show(lines, ("", "λ", task, control, f"share of {control}"))
    for each in found:
        if each.note:
            print(f"{each.method}: {each.note}")
    print()


def print_linearity(found: Sequence[Departure]) -> None:
    """A line for each vector, part and coefficient."""
    from taskvec.evaluation.intervals import span

    print("departure from the tangent: ‖f − f_lin‖ / ‖f − f0‖")
    lines = []
    for each in found:
        right = [None if f is None else f.value for f in (each.accuracy, each.linear_accuracy)]
        lines.append(
            [
                each.task,
                each.part,
                each.share,
                each.alpha,
                span(each.departure),
                each.change,
                *right,
            ]
        )
    head = ("task", "part", "of ‖τ‖²", "α", "departure", "change", "accuracy", "of the tangent")
    show(lines, head)
    print()
