"""An overview of the methods: in groups by their declarations, and as a table for the docs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from taskvec.methods.method import Method

SUMS = "Weighted sums of task vectors"
SELECTING = "Part of each vector, or elected signs"
BY_ENTRY = "Entry by entry, no sum"
BY_TENSOR = "Whole rows or tensors at once"
MODELS = "Task models themselves, without an anchor"
NO_TASKS = "No tasks"
GROUPS = (SUMS, SELECTING, BY_ENTRY, BY_TENSOR, MODELS, NO_TASKS)

_HEAD = """\
# Methods

This page lists what each method needs, accepts and sees. `taskvec methods` prints one line for each
method; `taskvec methods NAME` prints its formula and parameters. `taskvec methods --markdown` makes
this page from the declarations of the methods. It does not include methods of [other
distributions](how-to/write-a-method.md).

- **Needs**: roles besides `tasks`.
- **λ**: the default; **−λ**: whether λ may be negative.
- **Table**: whether it accepts given layer weights.
- **Sees**: how much of a tensor it must see at once. `tensor` means that the largest tensor of
  every member is held in memory.
"""
_COLUMNS = ("method", "needs", "λ", "−λ", "table", "sees", "parameters")


def group_of(method: Method) -> str:
    """The group of `GROUPS` that a method is listed in, from what it declares."""
    if not method.takes_tasks:
        return NO_TASKS
    if not method.needs_anchor:
        return MODELS
    if method.sparsifies:
        return SELECTING
    if method.alignment != "element":
        return BY_TENSOR
    return SUMS if method.combine is None else BY_ENTRY


def group_methods(methods: Iterable[Method]) -> dict[str, list[Method]]:
    """Methods by group, in the order of the groups, without empty groups."""
    found: dict[str, list[Method]] = {group: [] for group in GROUPS}
    for method in methods:
        found[group_of(method)].append(method)
    return {group: members for group, members in found.items() if members}


def needs(method: Method) -> tuple[str, ...]:
    """Roles that a recipe must name besides tasks."""
    roles = (("base", method.needs_base), ("instruct", method.needs_anchor))
    found = tuple(role for role, is_needed in roles if is_needed)
    return found if method.takes_tasks else (*found, "target")


def markdown(methods: Iterable[Method]) -> str:
    """The page `docs/methods.md`."""
    parts = [_HEAD]
    for group, members in group_methods(methods).items():
        lines = [_row(_COLUMNS), "|---" * len(_COLUMNS) + "|", *(_cells(m) for m in members)]
        parts.append("\n".join([f"## {group}", "", *lines, ""]))
    return "\n".join(parts)


def _cells(method: Method) -> str:
    scale = "required" if method.default_scale is None else f"{method.default_scale:g}"
    return _row(
        (
            f"[`{method.name}`](methods/{method.name}.md)",
            ", ".join(f"`{role}`" for role in needs(method)) or "–",
            scale if method.takes_tasks else "–",
            _mark(method.takes_negative_scale),
            _mark(method.takes_table),
            method.alignment,
            ", ".join(f"`{p.name}`" for p in method.parameters) or "–",
        )
    )


def _mark(has: bool) -> str:
    return "yes" if has else "–"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
