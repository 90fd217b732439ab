"""Points of weight space: θ0 + Σ_t α_t τ_t in a loaded module, which is θ0 again afterwards.

θ0 are the module's own weights. Points are candidates of the engine: computed in float32 from
stored vectors (float64 where the module is that) and rounded once to the module's dtype, so that
the same point has the same bits, independent of what was there before. Any method of the library
can take the place of the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash

from taskvec.checkpoints.memory import held_in_memory, view_of
from taskvec.checkpoints.quantised import plain
from taskvec.checkpoints.views import size
from taskvec.errors import UsageError
from taskvec.family.members import open_members
from taskvec.methods.table import Table
from taskvec.outputs.candidates import Bench, candidates
from taskvec.recipes.coerce import as_recipe
from taskvec.recipes.recipe import Family, Model, Recipe
from taskvec.running.model import preserve_modes
from taskvec.streaming import RunOptions

BLOCK = 1 << 22  # elements that a digest reads at once


@dataclass(frozen=True, slots=True, eq=False)
class Points:
    """A module that can be put at points of weight space.

    Attributes:
        module: In evaluation mode.
        tasks: Names of the vectors, sorted.
        recipe: Task arithmetic of all vectors.
        bench: Writes the weights.
    """

    module: Any
    tasks: tuple[str, ...]
    recipe: Recipe
    bench: Bench

    def at(self, alphas: Mapping[str, float], *, table: Table | None = None) -> None:
        """Put the module at θ0 + Σ_t α_t τ_t.

        Args:
            alphas: By task; a task that is not named has 0.
            table: Weights by task and tensor that τ is multiplied with; None: 1.
        """
        self.put(self.recipe, alphas, table=table)

    def put(
        self, recipe: Recipe, scales: Mapping[str, float], *, table: Table | None = None
    ) -> None:
        """Put a merge of the vectors by any method into the module.

        Args:
            recipe: As from `by`.
            scales: λ by task; a task that is not named has 0.
            table: Weights by task and tensor that take the place of the method's own.
        """
        scales = {task: float(scales.get(task, 0.0)) for task in self.tasks}
        if any(scales.values()):
            self.bench.put(replace(recipe.with_scales(scales), table=table))
        else:
            self.bench.restore()

    def by(self, method: str | Mapping[str, Any]) -> Recipe:
        """The recipe of a method over the same vectors.

        Args:
            method: By name, or as in a recipe.

        Raises:
            UsageError: the method is unknown, or lacks something that it needs.
        """
        options = {"method": method, "scale": 1.0, "seed": self.recipe.seed, **_output(self.module)}
        recipe = as_recipe(self.recipe.family, options)
        if recipe.needs_base and recipe.family.base is None:
            raise UsageError(
                f"{recipe.method.name} compares with the step from base to instruct; give base"
            )
        return recipe

    def vector(self, task: str) -> dict[str, Any]:
        """τ of a task by parameter of the module, at least in float32; without zeros.

        The module is at θ0 before and afterwards.
        """
        start = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        self.at({task: 1.0})
        found = {}
        for name, parameter in self.module.named_parameters():
            wide = parameter.detach()
            wide = wide.float() if wide.element_size() < 4 else wide
            difference = wide - start[name].to(wide.dtype)
            if difference.any():
                found[name] = difference
        self.at({})
        return found

    def identity(self) -> str:
        """Digest of θ0, of every vector and of the base, by content."""
        seen = xxhash.xxh3_128()
        family = self.recipe.family
        members = open_members(family, needs_base=family.base is not None, needs_anchor=True)
        for role, source in sorted(members.sources.items()):
            for name in sorted(source.tensors):
                view = source.view(name)
                seen.update(f"{role}{name}{view.dtype.name}{view.shape}".encode())
                for start in range(0, size(view), BLOCK):
                    block = view.read(start, min(size(view), start + BLOCK))
                    seen.update(np.ascontiguousarray(block).data)
        return str(seen.hexdigest())


@contextmanager
def points(
    module: Any, vectors: Mapping[str, Model], *, base: Model | None = None, seed: int = 0
) -> Iterator[Points]:
    """Points of weight space around a loaded module.

    The module is in evaluation mode meanwhile. Afterwards, also if something was raised, its
    weights are what they were, bit for bit, and its parts are in the mode that they were in.

    Args:
        module: θ0; a `torch.nn.Module` on any device.
        vectors: By task: a file of `taskvec extract`, or a fine-tune of the module (a folder, a
            hub name, an adapter, a module, a state dict).
        base: Model before instruction tuning, for methods that need it.
        seed: Of methods that draw random numbers.

    Raises:
        UsageError: no vectors are given.
        TaskvecError: one of them is broken, or does not fit the module.
    """
    if not vectors:
        raise UsageError("no task vectors are given; give at least one")
    family = Family(tasks=dict(vectors), anchor=_hold_weights(module), base=base)
    options = {"method": "task_arithmetic", "scale": 1.0, "seed": seed, **_output(module)}
    recipe = as_recipe(family, options)
    with preserve_modes(module), candidates(recipe, module, RunOptions(cache="off")) as bench:
        module.eval()
        yield Points(module, tuple(sorted(vectors)), recipe, bench)


def _hold_weights(module: Any) -> Any:
    """A copy of a module's weights as a source, because the module's own are overwritten."""
    held = held_in_memory(module)
    tensors = module.state_dict()
    copies = {n: view_of(n, tensors[n].detach().cpu().clone(), held.where) for n in held.views}
    return plain(replace(held, views=copies))


def _output(module: Any) -> dict[str, object]:
    """Arithmetic as wide as the widest parameter."""
    is_wide = any(str(p.dtype) == "torch.float64" for p in module.parameters())
    return {"precision": "float64" if is_wide else "float32"}
