"""Heat maps of the disentanglement error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taskvec.reporting.figures import new_figure, save_figure

UNITS = {"prediction": "ξ", "symmetric_kl": "ξ, symmetric KL in nats"}


def draw_heat_map(told: Mapping[str, Any], path: Path) -> None:
    """The error by coefficient; a square marks where coefficients mostly lie, 0 to 1.

    After figure 3 of arXiv:2305.12827.

    Args:
        told: As `Disentanglement.to_json` gives it.
        path: File to write.

    Raises:
        UsageError, MissingExtraError, OutputError: see `save_figure`.
    """
    one, two = told["tasks"]
    alphas = told["alphas"]
    flat = [cell["error"]["value"] for cell in told["cells"]]
    k = len(alphas)
    values = [[_number(flat[i * k + j]) for i in range(k)] for j in range(k)]
    figure, axes = new_figure(4.8, 4.0)
    axis = axes[0][0]
    image = axis.pcolormesh(alphas, alphas, values, shading="nearest", vmin=0, cmap="magma_r")
    axis.plot([0, 1, 1, 0, 0], [0, 0, 1, 1, 0], color="tab:red", linewidth=1.2)
    axis.set_aspect("equal")
    axis.set_xlabel(f"α of {one}")
    axis.set_ylabel(f"α of {two}")
    figure.colorbar(image, ax=axis, label=UNITS[told["distance"]])
    save_figure(figure, path)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
