"""Tasks by name: ours, one module a kind, and those of other distributions.

Others come by the entry point group `taskvec.tasks`. The tasks of an entry point `zoo` are called
`zoo:NAME`; nothing of it is imported before one of them is asked for.

```toml
[project.entry-points."taskvec.tasks"]
zoo = "taskvec.zoo.tasks:TASKS"
```
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from taskvec.errors import UsageError, nearest
from taskvec.evaluation.task import Task

GROUP = "taskvec.tasks"
_MODULES = (
    "perplexity",
    "gsm8k",
    "choice",
    "truthfulqa",
    "tmmluplus",
    "reading",
    "likelihood",
    "code",
    "harm",
)


@cache
def tasks() -> dict[str, Task]:
    """Our own tasks, by name."""
    modules = (import_module(f"{__name__}.{name}") for name in _MODULES)
    return {task.name: task for module in modules for task in module.TASKS}


def task(name: str) -> Task:
    """The task of that name.

    Raises:
        UsageError: there is none; the message names the closest.
    """
    group, colon, _ = name.partition(":")
    known = of_others(group) if colon else tasks()
    if name not in known:
        raise UsageError(f"there is no task {name!r}; {nearest(name, list(known))}")
    return known[name]


def installed_tasks() -> dict[str, Task]:
    """The tasks of other distributions, by name.

    Raises:
        UsageError: some cannot be loaded.
    """
    groups = sorted({point.name for point in entry_points(group=GROUP)})
    return {name: task for group in groups for name, task in of_others(group).items()}


def of_others(group: str) -> dict[str, Task]:
    """The tasks that an entry point brings, by name.

    Raises:
        UsageError: there is no such entry point, or it does not bring tasks.
    """
    points = entry_points(group=GROUP, name=group)
    if not points:
        known = sorted({point.name for point in entry_points(group=GROUP)})
        raise UsageError(
            f"no distribution brings tasks called '{group}:…'; installed: {', '.join(known) or '–'}"
        )
    (point, *_) = points
    try:
        loaded = point.load()
    except Exception as error:  # the code of others may raise anything
        raise UsageError(f"tasks of {point.value} cannot be loaded: {error}") from error
    if not isinstance(loaded, Iterable) or not all(isinstance(each, Task) for each in loaded):
        raise UsageError(f"{point.value} must be a sequence of tasks")
    return {each.name: each for each in loaded}
