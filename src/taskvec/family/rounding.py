"""What quantised members of a family put into task vectors and into the result, in words.

The error of an entry is not known, only how large it is to be expected: the root mean square over
the cell of its code (`codebooks.spreads`), times its scale. Norms are estimated from a sample of
stretches that are spread evenly over the merged tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Final, NamedTuple

import numpy as np

from taskvec.checkpoints.joined import Joined, Section, Zeros
from taskvec.checkpoints.quantised import DEQUANTISED
from taskvec.checkpoints.quantised_views import Quantised
from taskvec.checkpoints.rows import Gathered
from taskvec.checkpoints.source import Derived, Source, Sum, widened
from taskvec.checkpoints.views import View, size
from taskvec.dtypes import DTYPES
from taskvec.statistics.collect import describe

_STRETCHES: Final = 16
_LENGTH: Final = 16_384


class _Norms(NamedTuple):
    vector: float
    errors: float
    entries: int


def is_quantised(source: Source) -> bool:
    """Whether a member, or a model that it is made of, is stored quantised."""
    if isinstance(source, Derived) and source.how == DEQUANTISED:
        return True
    return any(is_quantised(part) for part in source.parts)


def notes_on_rounding(sources: Mapping[str, Source]) -> list[str]:
    """What becomes of a quantised target."""
    if not is_quantised(sources["target"]):
        return []
    return [
        "the target is quantised: the result is not, its weights are 16-bit and its config.json "
        "has no quantization_config; quantise it again where that is wanted"
    ]


def warnings_of_rounding(sources: Mapping[str, Source], names: Sequence[str]) -> Iterator[str]:
    """For each vector between members of which one is quantised: its norm, and the error in it."""
    pairs = [(role, "anchor") for role in sources if role.startswith("task:")]
    pairs += [("anchor", "base")]
    for role, start in pairs:
        found, from_ = sources.get(role), sources.get(start)
        if found is None or from_ is None or found is from_ or found.is_difference:
            continue
        quantised = [each for each in (role, start) if is_quantised(sources[each])]
        norms = _norms(found, from_, names) if quantised else None
        if norms is None or not norms.errors:
            continue
        vector = f"vector of {describe(role)}" if start == "anchor" else "instruction vector"
        yield (
            f"the {vector} contains the rounding of quantised weights "
            f"({', '.join(describe(each) for each in quantised)}): about {norms.errors:.3g} of its "
            f"norm ‖τ‖ = {norms.vector:.3g} (estimated from {norms.entries:,} entries); "
            "use members that are not quantised, or an adapter as the task"
        )


def _norms(end: Source, start: Source, names: Sequence[str]) -> _Norms | None:
    """Norm of a difference, and the expected norm of the rounding errors in it."""
    views = [(end.view(name), start.view(name)) for name in names if name in end.tensors]
    views = [(one, other) for one, other in views if size(one) == size(other)]
    stops = list(accumulate(size(one) for one, _ in views))
    if not stops or not stops[-1]:
        return None
    vector = errors = 0.0
    seen = 0
    length = min(_LENGTH, -(-stops[-1] // _STRETCHES))
    for k in range(_STRETCHES):
        at = stops[-1] * k // _STRETCHES
        place = int(np.searchsorted(stops, at, "right"))
        pair, begin = views[place], at - (stops[place - 1] if place else 0)
        stop = min(begin + length, size(pair[0]))
        one, other = (widened(v.read(begin, stop), v.dtype).astype(np.float64) for v in pair)
        vector += float(np.square(one - other).sum())
        for view in filter(None, map(errors_of, pair)):
            errors += float(np.square(view.read(begin, stop).astype(np.float64)).sum())
        seen += stop - begin
    scale = math.sqrt(stops[-1] / seen)
    return _Norms(scale * math.sqrt(vector), scale * math.sqrt(errors), seen)


def errors_of(view: View) -> View | None:
    """Expected rounding error of each element of a view; None if nothing in it is quantised."""
    if isinstance(view, Quantised):
        return view.errors()
    if isinstance(view, Section):
        whole = errors_of(view.whole)
        return whole and replace(view, whole=whole)
    if isinstance(view, Sum):
        return errors_of(view.weights)
    if isinstance(view, (Joined, Gathered)):
        found = [errors_of(part) for part in view.parts]
        if any(found):
            parts = tuple(
                one or Zeros(part.shape, is_difference=False)
                for one, part in zip(found, view.parts, strict=True)
            )
            return replace(view, parts=parts, dtype=DTYPES["F32"])
    return None
