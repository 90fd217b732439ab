"""Training with LoRA through PEFT: which layers get factors comes from the layer table.

`--train lora` adapts what `attention` selects; `lora:linear`, `lora:attention-qv` what those do.
The factors B and A are what trains: W stays as it is, and τ = (α/r) B A.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from taskvec.errors import ParameterError
from taskvec.extras import require
from taskvec.layers import Override
from taskvec.training.rows import axis_of, is_linear, is_multihead, whole_of
from taskvec.training.selection import ParameterSelection, select

if TYPE_CHECKING:
    from torch import Tensor, nn

PREFIX = "lora"


def wants_lora(train: str | Sequence[str]) -> bool:
    """Whether `train` is `lora` or `lora:` and what is adapted."""
    return isinstance(train, str) and (train == PREFIX or train.startswith(f"{PREFIX}:"))


def add_lora(
    module: nn.Module,
    train: str = PREFIX,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    layers: Sequence[Override] = (),
) -> tuple[nn.Module, ParameterSelection]:
    """Put LoRA factors on linear layers of a module.

    Args:
        module: Changed in place: its linear layers are wrapped.
        train: `lora`, or `lora:` and entries of `select` that mean whole weights of linear layers.
        rank: r, of every layer.
        alpha: α; what the factors make is scaled by α / r.
        dropout: Share of a layer's inputs that its factors do not see in training.
        layers: Overrides of the layer table.

    Returns:
        The `PeftModel` around the module, and its factors as what trains.

    Raises:
        ParameterError: a value is out of range, or a parameter is not the weight of a linear layer
            that PEFT wraps.
    """
    peft = require("peft", "train")
    if rank < 1 or not alpha > 0 or not 0 <= dropout < 1:
        raise ParameterError(
            "lora: rank must be at least 1, alpha above 0, dropout in [0, 1); "
            f"got {rank}, {alpha:g}, {dropout:g}"
        )
    inner = train.removeprefix(PREFIX).removeprefix(":") or "attention"
    chosen = select(module, inner, layers)
    for name in chosen.names:
        _check_target(module, name, chosen)
    transposed = {axis_of(module, name) == 1 for name in chosen.names}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=[name.removesuffix(".weight") for name in chosen.names],
        fan_in_fan_out=transposed == {True},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, at what PEFT asks it
        model = peft.get_peft_model(module, config)
    parameters = dict(model.named_parameters())
    names = tuple(name for name, parameter in parameters.items() if parameter.requires_grad)
    sizes = {name: prod(parameter.shape) for name, parameter in parameters.items()}
    return model, ParameterSelection(names, {}, sum(sizes[n] for n in names), sum(sizes.values()))


def _check_target(module: nn.Module, name: str, chosen: ParameterSelection) -> None:
    if name in chosen.rows:
        raise ParameterError(
            f"lora: {name!r} covers more than the selection; LoRA factors need a whole layer: "
            "use lora:attention"
        )
    is_inside = is_multihead(module.get_submodule(whole_of(module, name)))
    if not name.endswith(".weight") or is_inside or not is_linear(module, name):
        raise ParameterError(
            f"lora: {name!r} is not the weight of a linear layer that PEFT supports; "
            "train it without lora"
        )


def has_lora(module: nn.Module) -> bool:
    """Whether `add_lora` made the module; PEFT is not imported to find out."""
    return hasattr(module, "peft_config") and hasattr(module, "get_base_model")


def adapted_weights(model: Any) -> dict[str, Tensor]:
    """W + (α/r) B A of every adapted layer, float32, by the name of W in the bare module."""
    torch = require("torch", "train")
    found = {}
    for path, layer in model.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight"):
            with torch.no_grad():
                change = layer.get_delta_weight(model.active_adapter)
                weight = layer.get_base_layer().weight
                found[f"{path}.weight"] = weight.detach().float() + change.float()
    return found
