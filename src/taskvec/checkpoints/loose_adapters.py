"""LoRA files of other tools than PEFT, recognized by the names of their tensors.

```text
kohya      lora_unet_down_blocks_0_attn_to_q.lora_down.weight, .lora_up.weight, .alpha
diffusers  unet.down_blocks.0.attn.to_q.lora_A.weight, .lora_B.weight         (α by alpha, or = r)
           unet.down_blocks.0.attn.processor.to_q_lora.down.weight, .up.weight
           text_encoder.….q_proj.lora_linear_layer.down.weight, .up.weight
```

The change is (α / r) · up down, as in PEFT. A file without α is read where the tool that writes
such names has a rule for it (kohya's scripts and diffusers: α = r); PEFT's names without PEFT's
config say nothing of α, so they need it beside them. Underscores of kohya's names stand for dots or
for themselves: the names of the model decide which, and nothing is guessed.

Source: kohya-ss/sd-scripts, `networks/lora.py`; diffusers, `loaders/lora_conversion_utils.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from taskvec import documents
from taskvec.checkpoints.folder import Checkpoint, identify
from taskvec.checkpoints.safetensors import TensorInfo, read_header, read_metadata
from taskvec.checkpoints.schema import AdapterConfig
from taskvec.checkpoints.source import widened
from taskvec.checkpoints.views import size
from taskvec.errors import CheckpointError
from taskvec.patterns import Pattern
from taskvec.validation import read_as

_KOHYA: Final = re.compile(r"(?P<root>lora_(?:unet|te\d?|transformer|prior)_)(?P<module>.+)")
_COMPONENT: Final = re.compile(
    r"(?P<root>(?:unet|text_encoder(?:_\d)?|transformer(?:_\d)?|prior|diffusion_model)\.)(?P<module>.+)"
)
_PROCESSOR: Final = re.compile(r"(?P<path>.+)\.processor\.(?P<module>to_\w+?)_lora")
_PARTS: Final = (
    (re.compile(r"(?P<module>.+)\.lora_down\.weight"), "lora_A"),
    (re.compile(r"(?P<module>.+)\.lora_up\.weight"), "lora_B.weight"),
    (re.compile(r"(?P<module>.+)\.lora_A(?:\.default)?\.weight"), "lora_A"),
    (re.compile(r"(?P<module>.+)\.lora_B(?:\.default)?\.weight"), "lora_B.weight"),
    (re.compile(r"(?P<module>.+?)(?:\.lora(?:_linear_layer)?)?\.down\.weight"), "lora_A"),
    (re.compile(r"(?P<module>.+?)(?:\.lora(?:_linear_layer)?)?\.up\.weight"), "lora_B.weight"),
    (re.compile(r"(?P<module>.+)\.alpha"), "alpha"),
)
_METADATA: Final = "lora_adapter_metadata"  # of files that diffusers writes since 0.34


@dataclass(frozen=True, slots=True)
class LooseAdapter:
    """A LoRA file that is in no folder of PEFT.

    Attributes:
        stored: Its tensors under the names of the file.
        modules: Stored name by module, then by part, as in `Adapter`.
        scalings: Factor and rank of each module.
        roots: What of a module's name the model does not have, by module.
        underscored: Modules in whose names underscores may stand for dots.
        indices: See `index`; by `id`.
    """

    stored: Checkpoint
    modules: Mapping[str, Mapping[str, str]]
    scalings: Mapping[str, tuple[float, int]]
    roots: Mapping[str, str]
    underscored: frozenset[str]
    indices: dict[int, dict[str, list[str]]] = field(default_factory=dict, repr=False)

    def index(self, names: Mapping[str, Any]) -> dict[str, list[str]]:
        """Names of a model's weights by what they are with underscores for dots."""
        if id(names) not in self.indices:
            found: dict[str, list[str]] = {}
            for name in names:
                path, dot, leaf = name.rpartition(".")
                found.setdefault(f"{path.replace('.', '_')}{dot}{leaf}", []).append(name)
            self.indices[id(names)] = found
        return self.indices[id(names)]


def open_loose(path: Path) -> LooseAdapter | None:
    """The LoRA factors of a file, or of a folder with one such file; None if it holds no such.

    Raises:
        CheckpointError: factors without their counterpart, or no scale.
    """
    file = _file(path)
    if file is None:
        return None
    infos = {info.name: info for info in read_header(file)}
    found = _modules(infos)
    if found is None:
        return None
    stored = Checkpoint(
        path=file.parent,
        tensors={name: infos[name] for name in sorted(infos)},
        config={},
        stored=(identify(file),),
        _file_of=dict.fromkeys(infos, file.name),
        single=file.name,
    )
    alpha_of = _alpha_without_tensor(file)
    modules: dict[str, dict[str, str]] = {}
    scalings, roots, underscored = {}, {}, set()
    for module, parts in found.items():
        for part in ("lora_A", "lora_B.weight"):
            if part not in parts:
                raise CheckpointError(
                    f"{file}: has no {part.partition('.')[0]} of module {module!r} (kohya: "
                    "lora_down and lora_up); the file is incomplete"
                )
        rank = infos[parts["lora_A"]].shape[0] if infos[parts["lora_A"]].shape else 0
        if rank < 1:
            raise CheckpointError(f"{file}: tensor {parts['lora_A']!r} has no rank; save it again")
        alpha = _alpha(stored, parts["alpha"]) if "alpha" in parts else alpha_of(module, rank)
        modules[module] = {part: name for part, name in parts.items() if part != "alpha"}
        scalings[module] = alpha / rank, rank
        for pattern in (_KOHYA, _COMPONENT):
            match = pattern.fullmatch(module)
            if match is not None:
                roots[module] = match["root"]
                if pattern is _KOHYA:
                    underscored.add(module)
                break
    return LooseAdapter(stored, modules, scalings, roots, frozenset(underscored))


def _file(path: Path) -> Path | None:
    """The only file of weights, where no config says that this is a model or an adapter."""
    if path.is_file():
        return path if path.suffix == ".safetensors" else None
    if not path.is_dir() or (path / "config.json").exists() or any(path.glob("*.index.json")):
        return None
    files = list(path.glob("*.safetensors"))
    return files[0] if len(files) == 1 and not (path / "adapter_config.json").exists() else None


def _modules(infos: Mapping[str, TensorInfo]) -> dict[str, dict[str, str]] | None:
    """Stored names by module and part; None if a tensor is no part of a LoRA of these tools."""
    found: dict[str, dict[str, str]] = {}
    for name in infos:
        matches = ((pattern.fullmatch(name), part) for pattern, part in _PARTS)
        match, kind = next(((m, part) for m, part in matches if m is not None), (None, ""))
        if match is None:
            return None
        found.setdefault(_module(match["module"]), {})[kind] = name
    known = all(
        _KOHYA.fullmatch(module) or _COMPONENT.fullmatch(module) or "alpha" in parts
        or any(".processor." in name or "lora_linear_layer" in name for name in parts.values())
        for module, parts in found.items()
    )  # fmt: skip
    return found if known and found else None


def _module(name: str) -> str:
    """A module without what older versions of diffusers put into its name.

    >>> _module("unet.mid_block.attn1.processor.to_out_lora")
    'unet.mid_block.attn1.to_out.0'
    """
    name = name.removeprefix("base_model.model.")
    match = _PROCESSOR.fullmatch(name)
    if match is None:
        return name
    module = "to_out.0" if match["module"] == "to_out" else match["module"]
    return f"{match['path']}.{module}"


def _alpha(stored: Checkpoint, name: str) -> float:
    view = stored.view(name)
    if size(view) != 1 or not view.dtype.is_float:
        raise CheckpointError(f"{stored.where}: {name!r} is no number; download the file again")
    alpha = float(widened(view.read(0, 1), view.dtype)[0])
    if not 0 < alpha < float("inf"):
        raise CheckpointError(f"{stored.where}: {name!r} is {alpha:g}; α is above 0")
    return alpha


def _alpha_without_tensor(file: Path) -> Callable[[str, int], float]:
    """What says α of a module that has no tensor for it: the file's metadata, or α = r."""
    where = f"{file}: {_METADATA}"
    text = read_metadata(file).get(_METADATA) or "{}"
    about = documents.as_object(documents.parse_json(text, documents.CONFIG, where), where)

    @cache
    def config_of(root: str) -> AdapterConfig:
        mine = {k.removeprefix(root): v for k, v in about.items() if k.startswith(root)}
        return read_as(AdapterConfig, mine, where, "save the file again")

    def alpha_of(module: str, rank: int) -> float:
        match = _COMPONENT.fullmatch(module)
        root = match["root"] if match is not None else ""
        config, rest = config_of(root), module.removeprefix(root)
        for pattern, alpha in (config.alpha_pattern or {}).items():
            at = f"{file}: {root}alpha_pattern {pattern[:60]!r}"
            if Pattern(rf"\A(.*\.)?({pattern})$", at, CheckpointError).search(rest) is not None:
                return alpha
        return config.lora_alpha if "lora_alpha" in config.model_fields_set else rank

    return alpha_of


def resolve(called: str, root: str, names: Mapping[str, list[str]]) -> list[str]:
    """Tensors of a model that a name with underscores for dots may mean.

    Args:
        called: Name of the weight of a module, as kohya's scripts write it.
        root: What stands before it.
        names: Tensors of the model by their names with underscores.
    """
    wanted = called.removeprefix(root)
    if wanted in names:
        return names[wanted]
    return [name for each, of in names.items() if each.endswith(f"_{wanted}") for name in of]
