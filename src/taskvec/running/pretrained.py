"""The one place that loads with transformers: what a checkpoint says is data, never code.

A checkpoint can ask transformers to run code or to fetch it: by `auto_map`, where a question on
standard input is all that stands before it; by an attention, experts or quantisation
implementation that is fetched from the hub; by an adapter beside the weights, whose config names
modules to import. Nothing of that happens here: code is refused without a question,
implementations that are fetched are ignored, the rest is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from taskvec.errors import CheckpointError
from taskvec.extras import require

ATTENTION = ("eager", "sdpa", "flex_attention")  # others are fetched, or need a package
EXPERTS = ("eager", "batched_mm", "grouped_mm")
QUANTISATION = (  # others fetch kernels from the hub
    "awq",
    "bitsandbytes",
    "bitsandbytes_4bit",
    "bitsandbytes_8bit",
    "compressed-tensors",
    "gptq",
    "hqq",
    "quanto",
    "torchao",
)
ADAPTER = "adapter_config.json"


def load_config(folder: Path, kind: Any = None) -> Any:
    """The config of a model folder, as transformers reads it.

    Args:
        folder: In Hugging Face layout; the network is never asked.
        kind: Class of transformers that reads it; default: the one that the config names.

    Raises:
        CheckpointError: the folder asks for something that would run or fetch code.
        OSError: or what else transformers raises: it has no config that can be read.
    """
    if (folder / ADAPTER).is_file() and (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: has {ADAPTER} beside config.json, and transformers would put that adapter "
            f"onto the model; move {ADAPTER} elsewhere, or merge the adapter first"
        )
    config = _from_pretrained(kind or require("transformers", "eval").AutoConfig, folder)
    for each in _with_parts(config):
        _ignore_fetched(each)
    _check_quantisation(folder, getattr(config, "quantization_config", None))
    return config


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        OSError: or what else transformers raises: it has none that can be read without its code.
    """
    return _from_pretrained(require("transformers", "eval").AutoTokenizer, folder)


def load_module(folder: Path, kind: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model of transformers, with its loading info.

    Args:
        folder: In Hugging Face layout; the network is never asked.
        kind: Class of transformers, such as `AutoModel`.
        **options: For it.

    Raises:
        CheckpointError: the folder asks for something that would run or fetch code.
        OSError: or what else transformers raises: it cannot be loaded as that.
    """
    cls = getattr(require("transformers", "eval"), kind)
    config = load_config(folder, getattr(cls, "config_class", None))
    options |= {"config": config, "use_safetensors": True, "output_loading_info": True}
    loaded: tuple[Any, dict[str, Any]] = _from_pretrained(cls, folder, **options)
    return loaded


def load_image_processor(folder: Path) -> Any:
    """The image processor of a model folder, on Pillow, whose results do not depend on torchvision.

    Args:
        folder: In Hugging Face layout; the network is never asked.

    Raises:
        CheckpointError: it can only be loaded by code of its own.
        OSError: or what else transformers raises: it has none that can be read without its code.
    """
    transformers = require("transformers", "train")
    is_old = int(transformers.__version__.partition(".")[0]) < 5
    backend = {"use_fast": False} if is_old else {"backend": "pil"}
    return _from_pretrained(transformers.AutoImageProcessor, folder, **backend)


def _from_pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise CheckpointError(
            f"{folder}: can only be loaded by code of its own (auto_map), which is never run; "
            "give a model of an architecture that transformers has"
        ) from error


def _with_parts(config: Any) -> Iterator[Any]:
    """A config, and those of its towers."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "_attn_implementation"):
            yield from _with_parts(value)


def _ignore_fetched(config: Any) -> None:
    """Leave to transformers what the config would have fetched; a tower's own choice stays."""
    for name, known in (("_attn_implementation", ATTENTION), ("_experts_implementation", EXPERTS)):
        if getattr(config, name, None) not in (None, *known):
            setattr(config, f"{name}_internal", None)


def _check_quantisation(folder: Path, quantisation: Any) -> None:
    if not isinstance(quantisation, dict):
        return
    method = quantisation.get("quant_method")
    if method is None and (quantisation.get("load_in_4bit") or quantisation.get("load_in_8bit")):
        return
    if method not in QUANTISATION:
        raise CheckpointError(
            f"{folder}: is quantised by {method!r}, for which transformers may fetch code from the "
            f"hub; expected one of {', '.join(QUANTISATION)}; use the model before quantisation"
        )
