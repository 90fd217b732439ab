"""The files of a model folder besides its weights: config, tokenizer, chat template, model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from taskvec.checkpoints.folder import INDEX
from taskvec.checkpoints.source import Source
from taskvec.dtypes import DType

# What a model needs to be loaded and used; not training state, other formats, READMEs.
_PATTERNS = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
_LEFT_OUT = (
    INDEX,
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "adapter_config.json",
    "taskvec-manifest.json",
    "pytorch_model.bin.index.json",
)
_FOLDERS = ("additional_chat_templates",)


def companions(target: Source, dtype: DType | None) -> dict[str, bytes]:
    """Files to write beside the weights, by relative name.

    Args:
        target: The member whose config, tokenizer and chat template the result has.
        dtype: Element type of the result where it is not the target's own; the config then says so.
    """
    found = _files(target.folder) if target.folder is not None else {}
    stored = json.loads(found["config.json"]) if "config.json" in found else {}
    config = dict(target.config)
    if dtype is not None:
        config = with_dtype(config, dtype)
    if config != stored:
        found["config.json"] = json.dumps(config, indent=2).encode() + b"\n"
    return found | dict(target.files)


def is_companion(name: str) -> bool:
    """Whether a file of a model folder, by its relative path there, belongs to its weights."""
    path = PurePosixPath(name)
    if len(path.parts) == 2:
        return path.parts[0] in _FOLDERS
    return (
        len(path.parts) == 1
        and any(path.match(pattern) for pattern in _PATTERNS)
        and name not in _LEFT_OUT
        and not name.endswith(".index.json")
    )


def _files(model: Path) -> dict[str, bytes]:
    """Files of a model folder that belong to its weights, by relative name."""
    if not model.is_dir():
        return {}
    found: dict[str, bytes] = {}
    for pattern in _PATTERNS:
        for path in sorted(model.glob(pattern)):
            if path.is_file() and path.name not in _LEFT_OUT:
                found[path.name] = path.read_bytes()
    for folder in _FOLDERS:
        for path in sorted((model / folder).glob("*")):
            found[f"{folder}/{path.name}"] = path.read_bytes()
    return found


def with_dtype(config: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    """The config with another dtype, also in the configs of its towers; nothing if it is empty."""
    if not config:
        return {}
    name = "torch_dtype" if "torch_dtype" in config else "dtype"
    return _replaced({**config, name: None}, dtype)


def _replaced(config: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            out[key] = dtype.config_name
        else:
            out[key] = _replaced(value, dtype) if isinstance(value, dict) else value
    return out


def _front_matter(model: Source) -> dict[str, Any]:
    """Metadata of a model card; empty if there is none that can be read."""
    import yaml

    if model.folder is None:
        return {}
    try:
        text = (model.folder / "README.md").read_text()
    except (OSError, UnicodeDecodeError):
        return {}
    if not text.startswith("---\n"):
        return {}
    try:
        data = yaml.safe_load(text[4:].split("\n---", 1)[0])
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def model_card(
    name: str,
    members: Mapping[str, Source],
    *,
    method: str,
    formula: str,
    scales: Mapping[str, float],
) -> bytes:
    """README.md with the hub's metadata.

    A licence is given only where all members state the same one; otherwise they are listed.

    Args:
        name: Title.
        members: Model by role, in words.
        method: Name of the method.
        formula: The merged model in symbols.
        scales: λ by task.
    """
    import yaml

    licences = {
        who: str(_front_matter(model).get("license", "not stated"))
        for who, model in members.items()
    }
    agreed = set(licences.values()) if licences else set()
    metadata: dict[str, Any] = {
        "base_model": sorted({display_name(model) for model in members.values()}),
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["task-arithmetic", "merge", "taskvec", method],
    }
    if len(agreed) == 1 and agreed != {"not stated"}:
        metadata["license"] = agreed.pop()
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=True, allow_unicode=True).strip(),
        "---",
        f"# {name}",
        "",
        f"Made by [taskvec](https://pypi.org/project/taskvec/) with `{method}`: {formula}.",
        "",
        *_table(
            ("member", "model", "licence"),
            [(who, display_name(model), licences[who]) for who, model in members.items()],
        ),
        "",
        *_table(
            ("task", "scale λ"), [(task, f"{scale:g}") for task, scale in sorted(scales.items())]
        ),
        "",
        "`taskvec.yaml` is the recipe, `taskvec-manifest.json` what was read and written; "
        "`taskvec verify` checks this folder against it.",
        "",
    ]
    return "\n".join(lines).encode()


def display_name(model: Source) -> str:
    """How a card names a model: never by where it lay on the machine that merged."""
    is_path = Path(model.where).is_absolute()
    return Path(model.where).name if is_path else model.where


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
