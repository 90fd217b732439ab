"""Numbers that differ between the tensors of one task: over depth, outside the blocks, by pattern.

```yaml
scale:
  depth: [0.2, 0.5, 0.8]                   # first block to last, linearly between
  embedding: 0.2                           # outside the blocks, each by name
  final_norm: 0.8
  head: 0.8
  outside: 1                               # what else there is outside the blocks
  patterns: {"*.mlp.*": 0.3}               # before all else; the first that fits
  times: 1                                 # factor of the whole
```

The scale of tensor n of task t is λ_t(n) = times × the value found for n. It stands wherever λ_t
stands in a method's formula. Parameters that are declared `by_layer`, such as densities, have the
same form.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from taskvec.errors import UsageError
from taskvec.layers import LayerKey

Array = np.ndarray[Any, Any]

PLACES = ("embedding", "final_norm", "head")  # modules with their own value


@dataclass(frozen=True, slots=True)
class Values:
    """Values of tensors inside and outside the blocks.

    Attributes:
        depth: Over the blocks of each tower, first to last; empty: none is given.
        outside: Of tensors in no block; None: none is given.
    """

    depth: tuple[float, ...] = ()
    outside: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a recipe has it."""
        depth = {"depth": list(self.depth)} if self.depth else {}
        return depth | ({} if self.outside is None else {"outside": self.outside})


@dataclass(frozen=True, slots=True)
class Profile:
    """A number of one task tensor by tensor: a parameter, or what its λ is multiplied with.

    Attributes:
        rest: Values of tensors that no pattern fits.
        places: Value by module (`PLACES`), instead of `rest.outside`.
        patterns: Values by shell pattern of tensor names, in the order in which they are tried.
    """

    rest: Values = field(default_factory=Values)
    places: Mapping[str, float] = field(default_factory=dict)
    patterns: Mapping[str, Values] = field(default_factory=dict)

    @property
    def lowest(self) -> float:
        """The smallest value in it."""
        every = (self.rest, *self.patterns.values())
        outside = [v.outside for v in every if v.outside is not None]
        return min([*self.places.values(), *outside, *(x for v in every for x in v.depth)])

    def to_dict(self) -> dict[str, Any]:
        """As a recipe has it."""
        patterns = {pattern: values.to_dict() for pattern, values in self.patterns.items()}
        data = self.rest.to_dict() | dict(self.places)
        return data | ({"patterns": patterns} if patterns else {})


def factors(
    profiles: Mapping[str, Profile],
    tasks: Sequence[str],
    names: Sequence[str],
    keys: Mapping[str, LayerKey],
) -> Array:
    """What λ of each task is multiplied with for each tensor.

    Args:
        profiles: By task; 1 everywhere for a task that has none.
        tasks: Task names.
        names: Tensors that are merged.
        keys: Where every tensor of the model sits; depth is counted over all of them.

    Returns:
        shape (tasks, names), float64.

    Raises:
        UsageError: no value is given for a tensor, or a pattern fits none.
    """
    found = np.ones((len(tasks), len(names)))
    for row, task in enumerate(tasks):
        if task in profiles:
            found[row] = _values(profiles[task], f"scale of task {task!r}", names, keys)
    return found


def by_tensor(
    parameters: Mapping[str, Mapping[str, Any]], names: Sequence[str], keys: Mapping[str, LayerKey]
) -> dict[str, dict[str, Any]]:
    """Parameters as methods have them: values by tensor instead of a profile.

    Args:
        parameters: By task, as a recipe has them.
        names: See `factors`.
        keys: See `factors`.

    Raises:
        UsageError: see `factors`.
    """

    def resolved(task: str, parameter: str, value: Any) -> Any:
        if not isinstance(value, Profile):
            return value
        return dict(
            zip(names, _values(value, f"{parameter} of task {task!r}", names, keys), strict=True)
        )

    return {
        task: {name: resolved(task, name, value) for name, value in mine.items()}
        for task, mine in parameters.items()
    }


def block_counts(keys: Iterable[LayerKey]) -> dict[str, int]:
    """How many blocks each tower has."""
    counts: dict[str, int] = {}
    for key in keys:
        if key.block is not None:
            counts[key.tower] = max(counts.get(key.tower, 0), key.block + 1)
    return counts


def interpolated(values: Sequence[float], block: int, blocks: int) -> float:
    """The value of one block, linearly between the values given; a single block has the last one.

    >>> [interpolated([0.0, 1.0, 0.5], block, 5) for block in range(5)]
    [0.0, 0.5, 1.0, 0.75, 0.5]
    """
    if blocks == 1:
        return values[-1]
    place = block * (len(values) - 1) / (blocks - 1)
    first = math.floor(place)
    if place == first:
        return values[first]
    share = place - first
    return (1 - share) * values[first] + share * values[first + 1]


def _values(
    profile: Profile, what: str, names: Sequence[str], keys: Mapping[str, LayerKey]
) -> list[float]:
    """The value of each tensor."""
    for pattern in profile.patterns:
        if not any(fnmatchcase(name, pattern) for name in keys):
            raise UsageError(f"{what}: pattern {pattern!r} fits no tensor")
    blocks = block_counts(keys.values())
    return [_value(profile, what, name, keys[name], blocks) for name in names]


def _value(
    profile: Profile, what: str, name: str, key: LayerKey, blocks: Mapping[str, int]
) -> float:
    fits = next((p for p in profile.patterns if fnmatchcase(name, p)), None)
    values = profile.rest if fits is None else profile.patterns[fits]
    if key.block is not None and values.depth:
        return interpolated(values.depth, key.block, blocks[key.tower])
    if key.block is None and fits is None and key.module in profile.places:
        return profile.places[key.module]
    if key.block is None and values.outside is not None:
        return values.outside
    where = what if fits is None else f"pattern {fits!r} of {what}"
    if key.block is not None:
        raise UsageError(f"{where} has no value for {name!r}; give depth: [FIRST, LAST]")
    kind = f"{key.module}: NUMBER" if fits is None and key.module in PLACES else "outside: NUMBER"
    raise UsageError(f"{where} has no value for {name!r}, which is in no block; give {kind}")
