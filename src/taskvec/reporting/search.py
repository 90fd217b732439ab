"""Figures of a search: scores along each axis, trade-offs between goals, importance of axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taskvec.reporting.figures import new_figure, save_figure

Trial = Mapping[str, Any]
MOST_PAIRS = 6  # of goals that are drawn against each other


def draw_search(told: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what a search tried, as PNG.

    Args:
        told: What `trials.json` holds.
        folder: Where figures go.

    Returns:
        The files: `scores.png`; `trade-off.png` where there are two goals or more;
        `importance.png` where there were enough candidates.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    scored = [t for t in told["trials"] if not t["error"] and t["same_as"] is None]
    drawn = [folder / "scores.png"]
    _scores(told, scored, drawn[0])
    if len(told["goals"]["goals"]) > 1:
        drawn.append(folder / "trade-off.png")
        _trade_off(told, scored, drawn[-1])
    if told["importance"]:
        drawn.append(folder / "importance.png")
        _importance(told["importance"], drawn[-1])
    return drawn


def _scores(told: Mapping[str, Any], scored: Sequence[Trial], path: Path) -> None:
    """A panel an axis, a row an objective."""
    axes = [axis.partition("=")[0] for axis in told["axes"]]
    names = _objectives(told)
    figure, panels = new_figure(3.6 * len(axes), 3.0 * len(names), len(axes), len(names))
    for row, name in enumerate(names):
        for column, axis in enumerate(axes):
            panel = panels[row][column]
            if column:
                panel.sharey(panels[row][0])
            trials = [trial for trial in scored if axis in trial["point"]]
            _points(panel, told, trials, [trial["point"][axis] for trial in trials],
                    [trial["objectives"][row] for trial in trials])  # fmt: skip
            panel.set_xlabel(axis)
            panel.set_ylabel(name if column == 0 else "")
    panels[0][0].legend(fontsize=7)
    save_figure(figure, path)


def _points(
    panel: Any,
    told: Mapping[str, Any],
    trials: Sequence[Trial],
    across: Sequence[Any],
    up: Sequence[float],
) -> None:
    """Candidates, those that lose what must be kept apart, the winner marked."""
    lost = [any(violation > 0 for violation in t["violations"].values()) for t in trials]
    if any(isinstance(value, str) for value in across):
        words = sorted({str(value) for value in across})
        across = [words.index(str(value)) for value in across]
        panel.set_xticks(range(len(words)), words)
        panel.margins(x=0.2)
    for is_lost, marker, label in ((False, "o", "candidates"), (True, "x", "loses what is kept")):
        chosen = [i for i, each in enumerate(lost) if each == is_lost]
        if chosen:
            panel.scatter(
                [across[i] for i in chosen], [up[i] for i in chosen], s=16, marker=marker,
                alpha=0.75, label=label,
            )  # fmt: skip
    winner = told["winner"] and told["winner"]["number"]
    for i, trial in enumerate(trials):
        if trial["number"] == winner and told["winner"]:
            panel.scatter([across[i]], [up[i]], s=90, facecolors="none", edgecolors="black",
                          label="winner")  # fmt: skip
    panel.spines[["top", "right"]].set_visible(False)


def _trade_off(told: Mapping[str, Any], scored: Sequence[Trial], path: Path) -> None:
    """Pairs of goals against each other."""
    keys = [goal_key(goal) for goal in told["goals"]["goals"]]
    pairs = [(a, b) for i, a in enumerate(keys) for b in keys[i + 1 :]][:MOST_PAIRS]
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure, panels = new_figure(3.8 * columns, 3.2 * rows, columns, rows)
    for place in range(columns * rows):
        panel = panels[place // columns][place % columns]
        if place >= len(pairs):
            panel.set_visible(False)
            continue
        across, up = pairs[place]
        _points(panel, told, scored, [t["values"][across] for t in scored],
                [t["values"][up] for t in scored])  # fmt: skip
        panel.scatter([told["target"][across]], [told["target"][up]], marker="*", s=70,
                      color="grey", label="target")  # fmt: skip
        panel.set_xlabel(_in_words(told, across))
        panel.set_ylabel(_in_words(told, up))
    panels[0][0].legend(fontsize=7)
    save_figure(figure, path)


def _importance(importance: Mapping[str, float], path: Path) -> None:
    names = sorted(importance, key=lambda name: importance[name])
    figure, panels = new_figure(5.0, 0.8 + 0.4 * len(names))
    panel = panels[0][0]
    panel.barh(range(len(names)), [importance[name] for name in names])
    panel.set_yticks(range(len(names)), names)
    panel.set_xlabel("share of the spread that the axis explains (PED-ANOVA)")
    panel.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def goal_key(goal: Mapping[str, Any]) -> str:
    """As a goal is asked for."""
    return f"{goal['task']}@{goal['metric']}" if goal["metric"] else str(goal["task"])


def _in_words(told: Mapping[str, Any], key: str) -> str:
    (goal,) = [goal for goal in told["goals"]["goals"] if goal_key(goal) == key]
    return f"{key}: {told['metrics'][key]} ({goal['way']})"


def _objectives(told: Mapping[str, Any]) -> list[str]:
    aims = [goal for goal in told["goals"]["goals"] if goal["way"] != "keep"]
    if told["goals"]["trade_off"]:
        return [f"{goal['way']} {goal_key(goal)}" for goal in aims]
    return [
        told["goals"]["aggregate"] if len(aims) > 1 else f"{aims[0]['way']} {goal_key(aims[0])}"
    ]
