"""LoRA adapters as PEFT writes them: a task vector as it lies on disk.

`open_adapter` reads and checks the folder, `difference` says what it changes in the model that it
is put over: for a module with the matrices A (r, in) and B (out, r)

    τ = s · B A,    s = α / r,  or α / √r with `use_rslora`

in float32, without the rounding to the adapter's own dtype that PEFT does when it merges. Rank and
α may differ by module (`rank_pattern`, `alpha_pattern`: the first pattern that fits the end of the
module's name). What PEFT stores whole (`modules_to_save`, biases) takes the place of the model's.

LoRA on parameters (`target_parameters`), as those of experts in one tensor, has the matrices of all
experts in one: see `expert_changes`. Files of other tools than PEFT: see `loose_adapters`.

Source: PEFT 0.21, `tuners/lora/layer.py`, `utils/save_and_load.py`; LoRA, arXiv:2106.09685.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taskvec import documents
from taskvec.checkpoints.folder import INDEX, PICKLED_REMEDY, SINGLE, Checkpoint, identify
from taskvec.checkpoints.loose_adapters import LooseAdapter, open_loose
from taskvec.checkpoints.memory import Held
from taskvec.checkpoints.names import Names
from taskvec.checkpoints.pickled import open_pickled_adapter
from taskvec.checkpoints.safetensors import TensorInfo, read_header
from taskvec.checkpoints.schema import AdapterConfig
from taskvec.errors import CheckpointError
from taskvec.patterns import Pattern
from taskvec.validation import read_as

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|token_adapter\.trainable_tokens_delta|base_layer|original_module"
    r"|modules_to_save)(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
MERGE = "merge it in PEFT (merge_and_unload, save_pretrained) and give the whole model"
# Settings that change what the matrices mean, and how to call them.
_REFUSED = {
    "layer_replication": "replicated layers",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# Settings with which an adapter is no change of weights: what it adds depends on the input.
_DYNAMIC = {
    "alora_invocation_tokens": "activated LoRA, which changes only what follows some tokens",
    "arrow_config": "Arrow, which routes between adapters",
}
# Initialisations that take their matrices out of the model's weights.
_CHANGES_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
              "vocab.*", "merges.txt", "*.tiktoken", "spiece.model")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Adapter:
    """An opened adapter folder.

    Attributes:
        where: Path or hub name; for messages and manifests.
        stored: Its tensors under the names of the file.
        config: `adapter_config.json`.
        modules: Stored name by module, then by part (`lora_A`, `base_layer.weight` …).
        whole: Stored name of every tensor that takes the place of the model's, by its name there.
        loose: Of a file that is in no folder of PEFT, what its names say.
        indices: Names of the models that it was put over, by `id`.
    """

    where: str
    stored: Checkpoint | Held
    config: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, str]]
    whole: Mapping[str, str]
    loose: LooseAdapter | None = None
    indices: dict[int, Names] = field(default_factory=dict, repr=False)

    def tokenizer(self) -> dict[str, bytes]:
        """Tokenizer and chat template, which training leaves beside an adapter; may be none."""
        folder = self.stored.folder
        if folder is None:
            return {}
        found = {path for pattern in _TOKENIZER for path in folder.glob(pattern)}
        return {
            path.name: documents.read_bytes(path, documents.TOKENIZER, of=folder)
            for path in sorted(found)
            if not path.is_dir()
        }


def open_loose_adapter(path: Path) -> Adapter | None:
    """A LoRA file of another tool than PEFT; None if it is not one. See `open_loose`."""
    loose = open_loose(path)
    if loose is None:
        return None
    return Adapter(str(path), loose.stored, {"scalings": loose.scalings}, loose.modules, {}, loose)


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    folder = Path(os.path.expanduser(path))  # noqa: PTH111 (unlike Path's, leaves ~nobody)
    is_model = (folder / SINGLE).exists() or (folder / INDEX).exists()
    return (folder / CONFIG).exists() and not is_model


def open_adapter(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Adapter:
    """Open an adapter folder and check what can be checked without the model that it is over.

    Args:
        path: The folder.
        allow_pickle: Whether `adapter_model.bin` may be read if there is no other file.

    Raises:
        CheckpointError: broken files, or a kind of adapter that is not supported.
    """
    folder = Path(os.path.expanduser(path)).absolute()  # noqa: PTH111
    config = documents.read_object(folder / CONFIG, documents.CONFIG, of=folder)
    _check_kind(str(folder), config)
    stored = _stored(folder, allow_pickle=allow_pickle)
    modules, whole = _sorted_parts(str(folder), stored.tensors)
    return Adapter(str(folder), stored, config, modules, whole)


def _stored(folder: Path, *, allow_pickle: bool) -> Checkpoint | Held:
    """The tensors of an adapter folder."""
    if (folder / WEIGHTS).exists():
        identity = identify(folder / WEIGHTS)
        infos = {info.name: info for info in read_header(folder / WEIGHTS)}
        if not infos:
            raise CheckpointError(
                f"{folder}: {WEIGHTS} holds no tensors; is the download complete?"
            )
        return Checkpoint(
            path=folder,
            tensors={name: infos[name] for name in sorted(infos)},
            config={},
            stored=(identity,),
            _file_of=dict.fromkeys(infos, WEIGHTS),
        )
    if not (folder / PICKLED).exists():
        others = sorted(p.name for p in folder.glob("adapter_model*"))
        got = f"got {others[0]}; save it as one safetensors file" if others else "download it again"
        raise CheckpointError(f"{folder}: holds no {WEIGHTS}; {got}")
    if not allow_pickle:
        raise CheckpointError(f"{folder / PICKLED}: {PICKLED_REMEDY}")
    return open_pickled_adapter(folder / PICKLED)


def scaling_of(config: Mapping[str, Any], module: str) -> tuple[float, int]:
    """The factor s and the rank r of a module by the config.

    >>> scaling_of({"r": 8, "lora_alpha": 16, "rank_pattern": {"k_proj": 4}}, "layers.0.k_proj")
    (4.0, 4)
    """

    def matching(key: str, default: Any) -> Any:
        for pattern, value in (config.get(key) or {}).items():
            where = f"{key} {pattern[:60]!r}"
            fits = Pattern(rf"\A(.*\.)?({pattern})$", where, CheckpointError)
            if fits.search(module) is not None:
                return value
        return default

    rank = matching("rank_pattern", config.get("r", 8))
    alpha = matching("alpha_pattern", config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), rank


def _check_kind(where: str, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        said = f"is a {kind} adapter" if kind else f"{CONFIG} does not say peft_type"
        raise CheckpointError(f"{where}: {said}; only LoRA is supported: {MERGE}")
    for key, meaning in _DYNAMIC.items():
        if config.get(key):
            raise CheckpointError(
                f"{where}: {key} ({meaning}) cannot be merged into weights by any tool; load it "
                "beside the model with PEFT"
            )
    for key, meaning in _REFUSED.items():
        if config.get(key):
            raise CheckpointError(f"{where}: {key} ({meaning}) is not supported; {MERGE}")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_MODEL):
        raise CheckpointError(
            f"{where}: init_lora_weights {start!r} changed the model that the adapter is over when "
            "training began; save it with path_initial_model_for_weight_conversion, which makes "
            f"an ordinary LoRA of it, or {MERGE}"
        )
    read_as(AdapterConfig, config, f"{where}/{CONFIG}", "use the one that was saved with it")


def _sorted_parts(
    where: str, tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Parts of adapted modules, and whole tensors: see `Adapter`."""
    modules: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    copies: dict[str, str] = {}
    names: set[str] = set()
    for stored in tensors:
        called = stored.removeprefix(PREFIX)
        match = _PART.fullmatch(called)
        if match is None:
            if ".lora_" in called or "." not in called:
                raise CheckpointError(f"{where}: tensor {stored!r} is not recognized; {MERGE}")
            whole[called] = stored
            continue
        module, part, leaf = match["module"], match["part"], match["leaf"]
        names |= {match["adapter"]} - {None}
        if part == "original_module":
            continue  # what modules_to_save replaced
        if part == "modules_to_save":
            copies[f"{module}.{leaf}"] = stored
        elif part == "base_layer" and leaf == "bias":
            whole[f"{module}.bias"] = stored
        else:
            is_named = part in ("base_layer", "lora_B")
            modules.setdefault(module, {})[f"{part}.{leaf}" if is_named else part] = stored
    if len(names) > 1:
        raise CheckpointError(
            f"{where}: holds adapters {', '.join(sorted(names))}; save each in its own folder"
        )
    return modules, copies | whole
