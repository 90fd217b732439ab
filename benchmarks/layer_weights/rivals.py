"""Tables of layer weights that need no data: LATA in all its forms, and its controls.

Every table is a function of a scan. The controls share LATA's ranking, and rank by something else:

    lata        dissimilarity, 1 − s_l        (arXiv 2502.20186)
    reversed    similarity: what LATA drops comes first
    norm ratio  ρ_l = ‖τ_t‖ / ‖τ_instr‖
    depth       number of the block; tensors before the blocks first, behind them last
    random      a seeded draw
    LiNeS       w_l = α + (1 − α) · l / (L − 1), the same for all tensors of a block (2410.17146)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from taskvec.methods.lata import drop_above, linear, logarithmic
from taskvec.methods.table import Table
from taskvec.statistics.scan import LayerStatistics, Scan, layer_statistics

Array = np.ndarray[Any, Any]

SCHEMES = ("linear", "logarithmic", "threshold", "threshold median")
GRANULARITIES = ("tensor", "module", "block")
CONTROLS = ("reversed", "norm ratio", "depth")
DRAWS = (0, 1, 2)  # of random ranks
ALPHAS = (0.0, 0.25, 0.5, 0.75)  # of LiNeS
THRESHOLD = 0.95


@dataclass(frozen=True)
class Variant:
    """One way to weight layers.

    Attributes:
        order: What layers are ranked by: `lata`, `reversed`, `norm ratio`, `depth` or `random N`.
        scheme: One of `SCHEMES`.
        granularity: Tensors that share a weight.
        outside: Whether tensors outside the blocks are ranked too; if not, they get weight 0.
        normalize: Whether each task's vector keeps its norm.
    """

    order: str = "lata"
    scheme: str = "logarithmic"
    granularity: str = "tensor"
    outside: bool = True
    normalize: bool = False

    @property
    def name(self) -> str:
        outside = "all" if self.outside else "blocks"
        norm = "norm" if self.normalize else "none"
        return f"{self.order}, {self.scheme}, {self.granularity}, {outside}, {norm}"


def variants() -> dict[str, Variant]:
    """LATA in every form, and its controls in the form of the defaults."""
    found = [
        Variant("lata", scheme, granularity, outside, normalize)
        for scheme in SCHEMES
        for granularity in GRANULARITIES
        for outside in (True, False)
        for normalize in (False, True)
    ]
    for order in (*CONTROLS, *(f"random {draw}" for draw in DRAWS)):
        found += [Variant(order, scheme) for scheme in ("linear", "logarithmic")]
    return {each.name: each for each in found}


def few() -> dict[str, Variant]:
    """Forms of LATA that differ most, and the controls by logarithmic ranks."""
    found = [
        Variant(),
        Variant(granularity="module"),
        Variant(granularity="block"),
        Variant(outside=False),
        Variant(scheme="linear"),
        Variant(scheme="threshold median"),
    ]
    found += [Variant(order) for order in (*CONTROLS, "random 0")]
    return {each.name: each for each in found}


def default() -> dict[str, Variant]:
    """LATA's defaults alone, without controls."""
    return {Variant().name: Variant()}


def tables(scan: Scan, chosen: Mapping[str, Variant]) -> dict[str, Table]:
    """Weights by name: plain task arithmetic, every variant, and LiNeS."""
    found = {"plain": table_of(scan, np.ones((len(scan.tasks), len(scan.names))), "plain")}
    found |= {name: ranked(scan, variant) for name, variant in chosen.items()}
    return found | {f"LiNeS, α = {alpha:g}": lines(scan, alpha) for alpha in ALPHAS}


def ranked(scan: Scan, variant: Variant) -> Table:
    """Weights of one variant."""
    rows = []
    for number, task in enumerate(scan.tasks):
        known = layer_statistics(scan, task, variant.granularity)
        there = np.isfinite(known.similarity)
        if not variant.outside:
            there &= _in_blocks(scan, known)
        weights = np.zeros(len(known.layers))
        weights[there] = _scheme(variant.scheme, _order(scan, variant, known, number)[there])
        if variant.normalize:
            length = np.linalg.norm(weights * known.task_norm)
            weights = weights * (np.linalg.norm(known.task_norm) / length if length else 1.0)
        rows.append(weights[known.tensor_layer])
    return table_of(scan, np.stack(rows), variant.name)


def lines(scan: Scan, alpha: float) -> Table:
    """LiNeS: weights that rise with depth."""
    depth = depths(scan)
    weights = alpha + (1 - alpha) * depth / max(depth.max(), 1)
    return table_of(scan, np.tile(weights, (len(scan.tasks), 1)), f"LiNeS, α = {alpha:g}")


def depths(scan: Scan) -> Array:
    """Block of each tensor; 0 for what is before the blocks, the last for what is behind."""
    last = max((key.block for key in scan.keys if key.block is not None), default=0)
    behind = ("final_norm", "head")
    return np.array(
        [
            float(key.block if key.block is not None else last * (key.module in behind))
            for key in scan.keys
        ]
    )


def length(scan: Scan, weights: Array) -> float:
    """√(Σ_t ‖w_t ∘ τ_t‖²): how far the weighted vectors reach."""
    squares = np.stack([scan.gram[:, 2 + t, 2 + t] for t in range(len(scan.tasks))])
    return float(np.sqrt((weights**2 * squares).sum()))


def table_of(scan: Scan, weights: Array, origin: str) -> Table:
    return Table(scan.tasks, scan.names, weights, origin=origin)


def _order(scan: Scan, variant: Variant, known: LayerStatistics, task: int) -> Array:
    """What takes similarity's place: the layer with the highest gets the lowest weight."""
    if variant.order == "lata":
        return known.similarity
    if variant.order == "reversed":
        return -known.similarity
    if variant.order == "norm ratio":
        return -known.norm_ratio
    if variant.order == "depth":
        found = np.zeros(len(known.layers))
        found[known.tensor_layer] = -depths(scan)
        return found
    draw = int(variant.order.removeprefix("random "))
    return np.random.default_rng([draw, task]).permutation(len(known.layers)).astype(float)


def _scheme(scheme: str, order: Array) -> Array:
    if scheme == "linear":
        return linear(order)
    if scheme == "logarithmic":
        return logarithmic(order)
    return drop_above(order, THRESHOLD if scheme == "threshold" else float(np.median(order)))


def _in_blocks(scan: Scan, known: LayerStatistics) -> Array:
    found = np.zeros(len(known.layers), bool)
    found[known.tensor_layer] = [key.block is not None for key in scan.keys]
    return found
