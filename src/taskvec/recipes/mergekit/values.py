"""Parameters of mergekit that differ by layer, as a recipe has them.

A gradient is a list over the blocks of a slice. mergekit takes the place 0 for everything outside
the blocks, so that final norm and head get the first value of the list; here they get the last
one unless the import is to be faithful.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from taskvec.recipes.depth import interpolated
from taskvec.recipes.located import Document
from taskvec.recipes.mergekit.schema import Setting, Slice
from taskvec.validation import numeric

THEN = "\n"  # between two parts of a name that a pattern looks for, one after the other


@dataclass(frozen=True, slots=True)
class Part:
    """Values of the tensors that one condition fits.

    Attributes:
        depth: Over the blocks; one value if it is the same in all.
        before: Of tensors outside the blocks.
        after: Of final norm and head.
    """

    depth: tuple[float, ...]
    before: float
    after: float

    @property
    def number(self) -> float | None:
        """The value, if there is only one."""
        values = {*self.depth, self.before, self.after}
        return values.pop() if len(values) == 1 else None

    def map(self, change: Callable[[float], float]) -> Part:
        """The same with every value changed."""
        return Part(tuple(map(change, self.depth)), change(self.before), change(self.after))


@dataclass(frozen=True, slots=True)
class Layered:
    """A parameter that may differ by layer.

    Attributes:
        rest: Where no part of a name fits.
        parts: By part of a name, in the order in which they are tried.
    """

    rest: Part
    parts: tuple[tuple[str, Part], ...] = ()

    @property
    def number(self) -> float | None:
        """The value, if it is the same everywhere."""
        values = {part.number for part in self._every}
        return values.pop() if len(values) == 1 else None

    @property
    def lowest(self) -> float:
        """The smallest value."""
        return min(self._values)

    @property
    def highest(self) -> float:
        """The largest value."""
        return max(self._values)

    @property
    def is_stepwise(self) -> bool:
        """Whether no value lies between others, so that `map` may be any function."""
        return all(len(part.depth) == 1 for part in self._every)

    @property
    def _every(self) -> tuple[Part, ...]:
        return (self.rest, *(part for _, part in self.parts))

    @property
    def _values(self) -> list[float]:
        return [x for part in self._every for x in (*part.depth, part.before, part.after)]

    def map(self, change: Callable[[float], float]) -> Layered:
        """The same with every value changed."""
        return Layered(self.rest.map(change), tuple((n, p.map(change)) for n, p in self.parts))

    @property
    def names(self) -> tuple[str, ...]:
        """The parts of a name that have their own values."""
        return tuple(name for name, _ in self.parts)

    def at(self, name: str | None) -> Part:
        """Values where that part of a name is the first that fits; None: where none does."""
        return dict(self.parts).get(name or "", self.rest)

    def to_recipe(self, pattern: Callable[[str], str]) -> Any:
        """As a recipe has it; `pattern` makes a shell pattern of a part of a name."""
        if self.number is not None:
            return plain(self.number)
        rest, number = self.rest, self.rest.number
        data: dict[str, Any]
        if number is not None:
            data = {"depth": plain(number), "outside": plain(number)}
        else:
            data = {
                "depth": _depth(rest),
                "embedding": plain(rest.before),
                "final_norm": plain(rest.after),
                "head": plain(rest.after),
                "outside": plain(rest.before),
            }
        if self.parts:
            data["patterns"] = {}
        for part, values in self.parts:
            value = values.number
            data["patterns"].setdefault(
                pattern(part),
                plain(value)
                if value is not None
                else {"depth": _depth(values), "outside": plain(values.before)},
            )
        return data


def joined(
    change: Callable[..., float],
    values: Mapping[str, Layered],
    blocks: int | None,
    tensors: Callable[[], Collection[str] | None],
    pattern: Callable[[str], str],
    *,
    is_linear: bool = False,
) -> Layered | str:
    """A function of several parameters, place by place.

    Args:
        change: The function, of one number for each parameter.
        values: The parameters, by what a message calls them.
        blocks: How many blocks the model has, if that is known.
        tensors: Gives the names of its tensors, or None if they are not known.
        pattern: See `Layered.to_recipe`.
        is_linear: Whether it is linear in each, so that one gradient may stay one.

    Returns:
        Its values, or why they cannot be written down.
    """
    places = _places([each.names for each in values.values()], tensors, pattern)
    if places is None:
        named = [f"{who} ({', '.join(v.names)})" for who, v in values.items() if v.names]
        return (
            f"the filters of {' and '.join(named)} differ, and which tensors are in more than one "
            "is known only of a model in a folder; use the same filters"
        )
    parts: list[tuple[str | None, Part]] = []
    for where, names in places:
        mine = [each.at(name) for each, name in zip(values.values(), names, strict=True)]
        gradients = [part for part in mine if len(part.depth) > 1]
        if not gradients:
            count = 1
        elif is_linear and len(gradients) == 1:
            count = len(gradients[0].depth)
        elif blocks is None:
            return (
                f"gradients of {' and '.join(values)} are joined block by block, and how many "
                "blocks there are is known only of a model in a folder; give one as a number"
            )
        else:
            count = blocks
        depth = tuple(
            change(*(interpolated(part.depth, block, count) for part in mine))
            for block in range(count)
        )
        before, after = ((change(*(f(part) for part in mine))) for f in (_before, _after))
        parts.append((where, Part(depth, before, after)))
    return Layered(parts[-1][1], tuple((name, part) for name, part in parts if name is not None))


_Names = tuple[str | None, ...]


def _places(
    filters: Sequence[tuple[str, ...]],
    tensors: Callable[[], Collection[str] | None],
    pattern: Callable[[str], str],
) -> list[tuple[str | None, _Names]] | None:
    """Where the filters of several parameters lead: parts of names, with the filter of each.

    The first that fits counts, and None fits the rest. Without the names of tensors there is an
    answer only where all filters are the same.
    """
    if len({names for names in filters if names}) <= 1:
        common = next((names for names in filters if names), ())
        own: list[tuple[str | None, _Names]]
        own = [(n, tuple(n if names else None for names in filters)) for n in common]
        return [*own, (None, (None,) * len(filters))]
    names_of_all = tensors()
    if names_of_all is None:
        return None
    found: list[tuple[str | None, _Names]] = []
    for names in itertools.product(*((*names, None) for names in filters)):
        parts = sorted({name for name in names if name is not None})
        if not parts:
            found.append((None, names))
            continue
        longest = [part for part in parts if all(other in part for other in parts)]
        orders = longest or [THEN.join(order) for order in itertools.permutations(parts)]
        hits = {n for n in names_of_all if all(fnmatchcase(n, pattern(part)) for part in parts)}
        by_order = {o: {n for n in names_of_all if fnmatchcase(n, pattern(o))} for o in orders}
        if hits != {n for fits in by_order.values() for n in fits}:
            return None  # such as parts that overlap
        found += [(order, names) for order, fits in by_order.items() if fits]
    return found


def _before(part: Part) -> float:
    return part.before


def _after(part: Part) -> float:
    return part.after


def layered(
    document: Document, settings: Sequence[Setting], slices: Sequence[Slice], *, faithful: bool
) -> Layered:
    """A numeric parameter over all slices.

    Args:
        document: For messages.
        settings: Of each slice.
        slices: See `Config`.
        faithful: Whether final norm and head get the first value of a gradient.

    Raises:
        RecipeError: a value is not a finite number, or conditions differ between slices.
    """
    shapes = [tuple(c.part for c in setting) for setting in settings]
    if len(set(shapes)) > 1:
        odd = next(s for s, shape in zip(settings, shapes, strict=True) if shape != shapes[0])
        key = next((c.key for c in odd if c.key), slices[0].key)
        document.fail(key, "filters that differ between slices are not supported")
    parts = []
    for i, name in enumerate(shapes[0]):
        values = [_numbers(document, setting, i) for setting in settings]
        depth = values[0] if len(slices) == 1 else _over_slices(values, slices)
        if len(set(depth)) == 1:
            depth = depth[:1]
        after = values[-1][0] if faithful else values[-1][-1]
        parts.append((name, Part(depth, values[0][0], after)))
    named = tuple((name, part) for name, part in parts if name is not None)
    return Layered(parts[-1][1], named)


def _numbers(document: Document, setting: Setting, place: int) -> tuple[float, ...]:
    condition = setting[place]
    found = [numeric(value) for value in condition.values]
    for value in found:
        if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
            document.fail(condition.key, f"must be a finite number; got {value!r}")
    return tuple(float(value) for value in found)  # type: ignore[arg-type]


def _over_slices(values: Sequence[tuple[float, ...]], slices: Sequence[Slice]) -> tuple[float, ...]:
    """The value of every block of the result; a gradient starts again in each slice."""
    found: list[float] = []
    for mine, slice_ in zip(values, slices, strict=True):
        blocks = slice_.sources[0].blocks
        assert blocks is not None
        count = blocks[1] - blocks[0]
        found += [interpolated(mine, block, count) for block in range(count)]
    return tuple(found)


def plain(value: float) -> float | int:
    """The number as a reader would write it."""
    value = float(f"{value:.15g}")  # 1 − 0.3 is 0.7
    return int(value) if value.is_integer() and abs(value) < 1e15 else value


def _depth(part: Part) -> Any:
    values = [plain(value) for value in part.depth]
    return values[0] if len(values) == 1 else values


def whole_pattern(part: str) -> str:
    """A shell pattern that fits what contains the text, as mergekit's filters do.

    >>> whole_pattern("layers.1")
    '*layers.1*'
    """
    return _in_turn(part, lambda each: f"*{_escape(each)}*")


def meant_pattern(part: str) -> str:
    """The same, but numbers at the ends are whole numbers.

    >>> meant_pattern("layers.1"), meant_pattern("self_attn")
    ('*layers.1.*', '*self_attn*')
    """
    return _in_turn(
        part,
        lambda each: (
            f"{'*.' if each[:1].isdigit() else '*'}{_escape(each)}"
            f"{'.*' if each[-1:].isdigit() else '*'}"
        ),
    )


def _in_turn(part: str, pattern: Callable[[str], str]) -> str:
    """Patterns of the parts that stand one after another, as one."""
    first, *others = map(pattern, part.split(THEN))
    return "".join([first, *(other.removeprefix("*") for other in others)])


def _escape(part: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", part)
