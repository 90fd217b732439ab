"""Values of the command line that replace a recipe's, each with its flag.

```python
document = parse_yaml(read_text(path), path)
document = with_overrides(document, {"density": 0.3, "math.density": 1.2, "out.dtype": "bf16"})
read_recipe(document, folder)  # RecipeError: --set math.density: density of ties must be in [0, 1]
```

Overrides are applied before anything is checked, so that they are checked as values of a recipe
are, and an error about one names its flag and no line of the file. A name is the first of these
that fits:

| name | example | what it sets |
|---|---|---|
| a key of a recipe | `seed`, `method`, `include` | that key |
| section and key | `out.dtype`, `layer_weights.scheme`, `tasks.math.over` | that key |
| task and key | `math.density`, `math.scale` | that key of one task |
| `scale` | `scale` | λ of every task |
| any other word | `density` | a parameter of the method, for all tasks |

A tuple of keys instead of a name is used as it is. A mapping is merged into the mapping
of a section, key by key. A parameter of the method replaces that of every task as well; one that
names a task goes before it. Another method than the recipe's drops the parameters of the old one,
at `method` and of tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from taskvec.errors import UsageError, nearest
from taskvec.recipes.located import Document, Key, parse_yaml
from taskvec.recipes.schema import RecipeFile, TaskEntry

_SECTIONS = ("out", "method", "layer_weights", "tasks", "stages")
_TOP = tuple(RecipeFile.model_fields)
_NAMED = ("method", "layer_weights")  # sections that a word alone may stand for: their name


def with_overrides(
    document: Document,
    overrides: Mapping[str | Key, object],
    *,
    flags: Mapping[str | Key, str] | None = None,
) -> Document:
    """A recipe with other values, before it is checked; the document given is not changed.

    Args:
        document: The recipe as parsed.
        overrides: Value by name; see the module's docstring.
        flags: What the command line calls a name; `--set NAME` for those that are not in it.

    Raises:
        RecipeError: the document is not a mapping, or the task is unknown.
    """
    if not isinstance(document.data, dict):
        document.fail((), "a recipe is a mapping with tasks and a method; this is not")
    data = copy.deepcopy(document.data)
    lines, origins = dict(document.lines), dict(document.flags)
    for name in sorted(overrides, key=_turn):
        flag = (flags or {}).get(name, f"--set {_text(name)}")
        _check_task(replace(document, flags={(): flag}), data, name)
        for key, value in _places(data, name, copy.deepcopy(overrides[name])):
            is_other = "method" in data and key == ("method", "name")
            replaced = _put(data, key, value)
            removed: list[Key] = [replaced, *_own_of_tasks(data, replaced if is_other else key)]
            for known in (lines, origins):
                for old in [old for old in known for gone in removed if old[: len(gone)] == gone]:
                    known.pop(old, None)
            origins[key] = flag
    return replace(document, data=data, lines=lines, flags=origins)


def read_setting(text: str) -> tuple[str, object]:
    """Name and value of `NAME=VALUE`, the value as in YAML.

    >>> read_setting("math.density=0.2"), read_setting("scale={depth: [0, 1]}")
    (('math.density', 0.2), ('scale', {'depth': [0, 1]}))

    Raises:
        UsageError: it is not of that form.
    """
    name, found, value = (part.strip() for part in text.partition("="))
    if not (name and found and value):
        raise UsageError(f"--set takes NAME=VALUE, for example density=0.3; got {text!r}")
    return name, parse_yaml(value, f"--set {name}").data


def _text(name: str | Key) -> str:
    return name if isinstance(name, str) else ".".join(map(str, name))


def _turn(name: str | Key) -> int:
    """Methods before their parameters, tasks before what is set of them, all tasks before one."""
    word = _text(name)
    if word in ("method", "method.name"):
        return 0
    section, dot, _ = word.partition(".")
    return 1 if section == "tasks" else 3 if dot and section not in _SECTIONS else 2


def _own_of_tasks(data: Mapping[str, Any], replaced: Key) -> Iterator[Key]:
    """Remove from the tasks a parameter, or all of a method, that was replaced; the keys."""
    tasks = data.get("tasks")
    if not isinstance(tasks, dict) or replaced[0] != "method" or replaced[1:] == ("name",):
        return
    for task, entry in tasks.items():
        for word in list(entry) if isinstance(entry, dict) else ():
            is_own = word not in TaskEntry.model_fields
            if is_own if len(replaced) == 1 else word == replaced[1]:
                del entry[word]
                yield "tasks", task, word


def _check_task(document: Document, data: Mapping[str, Any], name: str | Key) -> None:
    """Fail where `TASK.KEY` names no task."""
    section, _, rest = name.partition(".") if isinstance(name, str) else ("", "", "")
    if not rest or section in _SECTIONS:
        return
    tasks = data.get("tasks")
    tasks = tasks if isinstance(tasks, dict) else {}
    if _task(tasks, str(name)) not in tasks:
        hint = nearest(section, [*tasks, *_SECTIONS])
        document.fail((), f"no task or section of the recipe is called {section!r}; {hint}")


def _places(
    data: Mapping[str, Any], name: str | Key, value: object
) -> Iterator[tuple[Key, object]]:
    """Where an override goes, and what goes there."""
    key = (name,) if name in _TOP else name
    if isinstance(key, tuple):
        if key[0] in _NAMED and len(key) == 1 and isinstance(value, str):
            value = {"name": value}
        if key[0] in _SECTIONS and len(key) == 1 and isinstance(value, dict):
            inner = sorted(value.items(), key=lambda item: item[0] != "name")
            yield from (((*key, word), each) for word, each in inner)
        else:
            yield key, value
        return
    tasks = data.get("tasks")
    tasks = tasks if isinstance(tasks, dict) else {}
    section, _, rest = str(name).partition(".")
    if section == "tasks":
        task = _task(tasks, rest)
        yield (("tasks", task, rest[len(task) + 1 :]) if "." in rest else ("tasks", rest)), value
    elif section in _SECTIONS:
        yield tuple(str(name).split(".")), value
    elif rest:
        task = _task(tasks, str(name))
        yield ("tasks", task, str(name)[len(task) + 1 :]), value
    elif name == "scale":
        yield from ((("tasks", task, "scale"), value) for task in tasks)
    else:
        yield ("method", str(name)), value


def _task(tasks: Mapping[str, object], name: str) -> str:
    """The task that `TASK.KEY` is about; a task's name may have dots in it."""
    return max((t for t in tasks if name.startswith(f"{t}.")), key=len, default=name.split(".")[0])


def _put(data: dict[Any, Any], key: Key, value: object) -> Key:
    """Set a value; returns the key of what it took the place of."""
    *above, last = key
    replaced = key
    for depth, part in enumerate(above):
        inner = data.get(part)
        if isinstance(inner, str):  # the short form of a method, or of a task
            inner = {"name" if key[0] in _NAMED else "model": inner}
        inner = inner if isinstance(inner, dict) else {}
        if key[depth:] == (part, "name") and key[0] in _NAMED and inner.get("name") != value:
            inner, replaced = {}, key[: depth + 1]
        data[part] = inner
        data = data[part]
    data[last] = value
    return replaced
