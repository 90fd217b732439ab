"""A recipe as `fit` needs it: members, their task vectors block by block, and tables.

This is the only place of `fit` that opens families, reads views and makes tables.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from taskvec.checkpoints.folder import open_stored
from taskvec.checkpoints.names import find_tensor
from taskvec.checkpoints.source import widened
from taskvec.checkpoints.views import View, size
from taskvec.errors import UsageError
from taskvec.extras import require
from taskvec.family.members import Members, open_members
from taskvec.layers import LayerKey
from taskvec.merging.decide import decide
from taskvec.merging.edits import layer_scales
from taskvec.merging.prepare import prepare
from taskvec.merging.scans import scan_members
from taskvec.methods.table import Table, check_table
from taskvec.outputs.live import parameters_of
from taskvec.recipes.coerce import as_recipe
from taskvec.recipes.reading import load_recipe
from taskvec.recipes.recipe import Family, Recipe
from taskvec.running.model import without_bars
from taskvec.statistics.scan import LayerStatistics, Scan, layer_statistics
from taskvec.streaming import RunOptions

Array = np.ndarray[Any, Any]
Read = Callable[[int, int], Any]  # elements [start, stop) as a tensor of torch

CHUNK = 1 << 18  # elements worked on at once: in float32, the caches hold a few such
FREE_SHARE = 0.5  # of free memory that held task vectors may take
HELD_SHARE = 2.5  # of the size of the parameters, too; a fit stays below 3 of them


@dataclass(frozen=True, slots=True)
class Pack:
    """One tensor: what the target has, and the task vectors that change it.

    Attributes:
        rows: Which tasks, by number.
        size: Elements.
        base: Elements of the target.
        taus: From a range of elements to τ of each task in `rows`.
    """

    rows: tuple[int, ...]
    size: int
    base: Read
    taus: Callable[[int, int], list[Any]]


@dataclass(frozen=True)
class TaskDirections:
    """What can be fitted.

    Attributes:
        recipe: As given; its λ and its method only say where a descent may start.
        members: Opened.
        scan: Statistics of their tensors.
        running: How members are scanned.
    """

    recipe: Recipe
    members: Members
    scan: Scan
    running: RunOptions = RunOptions()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names, sorted."""
        return self.members.tasks

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors with a weight, sorted."""
        return self.members.merged

    @property
    def keys(self) -> dict[str, LayerKey]:
        """What each tensor is."""
        return self.members.keys

    @property
    def fingerprints(self) -> dict[str, str]:
        """Identity by content of each member."""
        return {role: member.fingerprint for role, member in self.scan.members.items()}

    def is_changed(self) -> Array:
        """Whether a task changes a tensor, shape (tasks, tensors)."""
        squares = np.diagonal(self.scan.gram, axis1=1, axis2=2)
        changed: Array = squares[:, 2:].T > 0
        return changed

    def table(self, weights: Array, origin: str, warnings: tuple[str, ...] = ()) -> Table:
        """Weights of every task and tensor as a table for λ = 1, bound to what was read."""
        digests = {role: member.digests for role, member in self.scan.members.items()}
        return Table(self.tasks, self.names, weights, None, digests, warnings, origin)

    def start(self, start: float | str | Mapping[str, float] | Table) -> Array:
        """Where a descent starts, shape (tasks, tensors).

        Args:
            start: A number, which has the sign of the recipe's λ; a number by task; `recipe`: the
                recipe's own weights times λ; `lata`: LATA's with the recipe's λ; a table.

        Raises:
            UsageError: a task is unknown or lacks one, or the table does not fit.
        """
        shape = len(self.tasks), len(self.names)
        if isinstance(start, Table):
            check_table(start, self.tasks, self.names, "start")
            order = [start.tasks.index(task) for task in self.tasks]
            columns = [start.names.index(name) for name in self.names]
            return np.array(start.weights[order][:, columns], np.float64)
        if isinstance(start, str):
            return self._decide(start)
        if isinstance(start, Mapping):
            if start.keys() != set(self.tasks):
                raise UsageError(
                    f"start must have a number for each of {', '.join(self.tasks)}; got "
                    f"{', '.join(start) or 'none'}"
                )
            values = [float(start[task]) for task in self.tasks]
        else:
            negative = {task for task, scale in self.recipe.scales.items() if scale < 0}
            values = [-float(start) if task in negative else float(start) for task in self.tasks]
        return np.repeat(np.array(values, np.float64)[:, None], shape[1], 1)

    def _decide(self, start: str) -> Array:
        if start not in ("recipe", "lata"):
            raise UsageError(f"start must be a number, a table, 'recipe' or 'lata'; got {start!r}")
        recipe = self.recipe
        lacking = [task for task in self.tasks if task not in recipe.scales]
        if lacking:
            raise UsageError(f"start {start!r} needs a scale of task {lacking[0]!r} in the recipe")
        if start == "lata":
            recipe = as_recipe(recipe.family, {"method": "lata", "scale": dict(recipe.scales)})
        elif recipe.method.sparsifies or recipe.method.combine is not None:
            raise UsageError(
                f"start 'recipe': {recipe.method.name} does not add weighted task vectors; "
                "start from a number, 'lata' or a table"
            )
        table = decide(prepare(recipe, self.running)).table
        scaled: Array = table.weights * layer_scales(recipe, self.members, table)
        return scaled

    def statistics(self, task: str, layers: Sequence[str]) -> LayerStatistics:
        """Similarity, ρ, c and norms of layers that tensors are put into by name."""
        keys: Any = tuple(_Named(layer) for layer in layers)
        return layer_statistics(replace(self.scan, keys=keys), task, "fit")

    def held_bytes(self, name: str) -> int:
        """Bytes that the target and task vectors of one tensor need in memory."""
        views = [view for role, view in self._views(name).items() if role != "anchor"]
        return sum(size(view) * view.dtype.itemsize for view in views)

    def pack(self, name: str, device: Any, *, hold: bool) -> Pack:
        """Target and task vectors of one tensor."""
        torch = require("torch", "eval")
        views = self._views(name)
        base = _hold(torch, views["target"], device) if hold else None
        rows = tuple(i for i, task in enumerate(self.tasks) if f"task:{task}" in views)
        each = [views[f"task:{self.tasks[i]}"] for i in rows]
        elements = size(views["target"])
        if base is not None:
            held = [self._difference(torch, views, view, device) for view in each]
            return Pack(rows, elements, base, lambda a, b: [tau[a:b] for tau in held])
        target = _read(torch, views["target"], device)
        readers = [(_read(torch, view, device), view.is_difference) for view in each]
        is_whole = any(not is_difference for _, is_difference in readers)
        anchor = _read(torch, views["anchor"], device) if is_whole else None

        def taus(start: int, stop: int) -> list[Any]:
            before = None if anchor is None else anchor(start, stop)
            return [
                read(start, stop) if is_difference else read(start, stop) - before
                for read, is_difference in readers
            ]

        return Pack(rows, elements, target, taus)

    def packs(
        self, names: Mapping[str, str], module: Any, *, hold: bool | None = None
    ) -> dict[str, Pack]:
        """Target and task vectors of all tensors, by parameter of a module.

        Args:
            names: Of parameters by tensor; tensors that the module lacks are left out.
            module: Where they are put.
            hold: Whether they are held in memory, or read in every step; None: as many as
                `most_held` says are held, and the others read.
        """
        parameters = list(module.parameters())
        device = parameters[0].device
        room = most_held(device, sum(parameter.nbytes for parameter in parameters))
        found: dict[str, Pack] = {}
        for name in self.names:
            if name in names and names[name] not in found:
                needed = self.held_bytes(name)
                is_held = needed <= room if hold is None else hold
                room -= needed if is_held else 0
                found[names[name]] = self.pack(name, device, hold=is_held)
        return found

    def _difference(self, torch: Any, views: Mapping[str, View], view: View, device: Any) -> Any:
        """τ of one task in memory, in the type that the task is stored in.

        A difference of two numbers of that type within a factor of two of each other is exact in it
        (Sterbenz); others are rounded by half of their last place, which is no more than what a
        merge in that type rounds.
        """
        if view.is_difference:
            return _load(torch, view, device)
        found = torch.empty(size(view), dtype=_stored_type(torch, view), device=device)
        tuned, before = _read(torch, view, device), _read(torch, views["anchor"], device)
        for start in range(0, size(view), CHUNK):
            stop = min(size(view), start + CHUNK)
            found[start:stop].copy_(tuned(start, stop) - before(start, stop))
        return found

    def member(self, role: str, name: str) -> Read | None:
        """A tensor of a member whole: `target`, or `task:NAME` with its anchor's where it is one.

        None where the member has none.
        """
        torch = require("torch", "eval")
        source = self.members.sources[role]
        there = source.tensors.get(name)
        if there is None and not source.is_difference:
            return None
        anchor = self.members.sources["anchor"]
        if there is None:
            return _read(torch, anchor.view(name), None) if name in anchor.tensors else None
        view = source.view(name)
        if not view.is_difference:
            return _read(torch, view, None)
        read, before = _read(torch, view, None), _read(torch, anchor.view(name), None)
        return lambda start, stop: before(start, stop) + read(start, stop)

    def _views(self, name: str) -> dict[str, View]:
        roles = ["target", "anchor", *(f"task:{task}" for task in self.tasks)]
        return self.members.views(name, roles)


@dataclass(frozen=True, slots=True)
class _Named:
    """Stands for a layer key where the layer is known already."""

    layer: str

    def at(self, granularity: str, name: str) -> str:
        return self.layer


def open_directions(
    recipe: Recipe | Family | str | os.PathLike[str], running: RunOptions = RunOptions()
) -> TaskDirections:
    """Open a recipe's members, and scan them.

    Raises:
        UsageError: it has stages, no task, or a task vector that is zero.
        TaskvecError: a member is broken or does not fit.
    """
    if isinstance(recipe, Family):
        recipe = as_recipe(recipe, {"method": "task_arithmetic"}, needs_scales=False)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(Path(recipe), needs_scales=False)
    family = recipe.family
    if recipe.stages:
        raise UsageError("fit takes no stages; merge the stage to a folder and name that")
    if not family.tasks:
        raise UsageError("the recipe has no tasks; add at least one")
    members = open_members(family, needs_base=family.base is not None, needs_anchor=True)
    found = TaskDirections(recipe, members, scan_members(members, running), running)
    for task, changed in zip(found.tasks, found.is_changed(), strict=True):
        if not changed.any():
            raise UsageError(
                f"the task vector of {task!r} is zero: its model is the anchor; remove the task, "
                "or name its fine-tune"
            )
    return found


def live_names(directions: TaskDirections, module: Any) -> dict[str, str]:
    """The module's own names of the target's tensors.

    They differ where parameters are tied, where the module is a part of what the folder holds, and
    where transformers renames tensors on loading.

    Raises:
        UsageError: the module lacks a tensor that a task changes, or has it in another shape.
    """
    live = parameters_of(module)
    first: dict[int, str] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        first.setdefault(id(tensor), name)
    tensors = directions.members.target.tensors
    stored = {name: name for name in live if name in tensors}
    for name in live:
        there = find_tensor(name, tensors)
        if there is not None:
            stored.setdefault(there, name)
    changed: Array = np.asarray(directions.is_changed().any(0))
    wanted = [n for n, moves in zip(directions.names, changed, strict=True) if moves]
    if not stored.keys() >= set(wanted) and hasattr(module, "save_pretrained"):
        for there, name in _saved_names(module, live).items():
            stored.setdefault(find_tensor(there, tensors) or there, name)
    for name in wanted:
        shape = tuple(live[stored[name]].shape) if name in stored else None
        if shape != tensors[name].shape:
            got = "none" if shape is None else f"one of shape {list(shape)}"
            raise UsageError(
                f"the loaded model has no tensor {name!r} of shape {list(tensors[name].shape)} but "
                f"{got}, so fit cannot change it; exclude it in the recipe"
            )
    return {
        there: first[id(live[name])]
        for there, name in stored.items()
        if there in tensors and tuple(live[name].shape) == tensors[there].shape
    }


def _saved_names(module: Any, live: Mapping[str, Any]) -> dict[str, str]:
    """What transformers calls a module's tensors in a folder: it saves their numbers."""
    torch = require("torch", "eval")
    names = list(live)
    numbers = {name: torch.tensor([i]) for i, name in enumerate(names)}
    with TemporaryDirectory() as folder, without_bars(require("transformers", "eval")):
        try:
            module.save_pretrained(folder, state_dict=numbers)
        except Exception:  # what it fuses or splits needs whole tensors
            return {}
        saved = open_stored(folder)
        return {
            name: names[int(saved.view(name).read(0, 1)[0])]
            for name, info in saved.tensors.items()
            if info.shape == (1,)
        }


def check_is_target(directions: TaskDirections, module: Any, names: Mapping[str, str]) -> None:
    """Refuse a module that does not have the target's weights.

    Raises:
        UsageError: it has others.
    """
    live = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, own in sorted(names.items()):
        read = directions.member("target", name)
        flat = live[own].detach().reshape(-1)
        if read is not None and not bool(
            (read(0, flat.numel()).to(flat.device, flat.dtype) == flat).all()
        ):
            raise UsageError(
                f"the loaded model is not the target: tensor {name!r} differs; load the target's "
                "own weights"
            )


def most_held(device: Any, parameter_bytes: int) -> float:
    """Bytes of task vectors that are held unless the settings say otherwise; the rest is read.

    Args:
        device: Where the module is.
        parameter_bytes: Size of its parameters.
    """
    if device.type == "cuda":
        free = require("torch", "eval").cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(FREE_SHARE * float(free), HELD_SHARE * parameter_bytes)


def content_of(state: Mapping[str, Any]) -> str:
    """A digest of small JSON-like content."""
    import json

    import xxhash

    return xxhash.xxh3_128_hexdigest(json.dumps(state, sort_keys=True, default=str).encode())


def _read(torch: Any, view: View, device: Any) -> Read:
    """Blocks as they lie in the file, widened."""

    def read(start: int, stop: int) -> Any:
        block = np.array(widened(view.read(start, stop), view.dtype))  # may be read-only
        return torch.from_numpy(block).to(device)

    return read


def _hold(torch: Any, view: View, device: Any) -> Read:
    """Blocks of a tensor that is held in its stored type."""
    flat = _load(torch, view, device)
    return lambda start, stop: flat[start:stop]


def _stored_type(torch: Any, view: View) -> Any:
    """A stored floating-point type in torch."""
    return getattr(torch, str(view.dtype.config_name))


def _load(torch: Any, view: View, device: Any) -> Any:
    block = np.array(view.read(0, size(view)))
    if view.dtype.name == "BF16":
        return torch.from_numpy(block.view(np.int16)).view(torch.bfloat16).to(device)
    if view.dtype.name == "F16":
        block = block.view(np.float16)
    return torch.from_numpy(block).to(device)
