"""Files of a model folder that belong to the model besides its weights, by their names.

Everything does, except four kinds: weights and their indices (of this model, or of another copy
of it), what training and other programs leave behind, pictures and pages about the model, and
folders that hold a copy of it in another format. A module of sentence-transformers
(`2_Dense/`, as `modules.json` names it) is carried over with its own weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Final

from taskvec import documents

MODULES: Final = "modules.json"
_WEIGHTS: Final = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|onnx|onnx_data|h5|msgpack|ot|tflite|mlmodel|npz|pdparams"
    r"|data|mlpackage|nemo|rten|engine|xml|pkl|pickle)|.*\.index(\.\w+)?\.json",
    re.IGNORECASE,
)
_LEFT_BEHIND: Final = re.compile(
    r"\..*|(trainer_state|(all|train|eval|test|predict)_results|training_args)\.(json|bin)"
    r"|(optimizer|scheduler|scaler|rng_state|random_states).*|events\.out.*|.*\.(log|lock|tmp|bak)"
    r"|adapter_(config|model).*|taskvec-manifest\.json|taskvec\.yaml|mergekit_config\.ya?ml|latest"
    r"|zero_to_fp32\.py|wandb.*|consolidated.*|(hf_)?quant(ize)?_config\.json"
)
_ABOUT: Final = re.compile(
    r"(?i:README(\..*)?|.*\.(png|jpe?g|gif|webp|svg|mp4|mov|webm|wav|mp3|flac|pdf|ipynb|html))"
)
# Folders that are left behind, or hold copies of the model in another format or at another time.
_FOLDERS: Final = re.compile(
    r"\..*|__pycache__|runs|logs|wandb|checkpoint-\d+|global_step\d+|epoch.*|original|onnx|openvino"
    r"|coreml|gguf|tflite|tensorrt|metal|mlx|flax|assets|images|figures|examples|eval_results?|results"
)
_MODULE: Final = re.compile(r"\d+_\w+")  # how sentence-transformers names the folder of a module
_DEEPEST: Final = 4


def belongs(name: str, modules: Collection[str] = ()) -> bool:
    """Whether a file belongs to the model besides its weights.

    Args:
        name: Its path in the folder.
        modules: Folders of modules with their own weights, if known.

    >>> [belongs(n) for n in ("source.spm", "1_Pooling/config.json", "model.fp16.safetensors")]
    [True, True, False]
    """
    path = PurePosixPath(name)
    *folders, file = path.parts
    if len(folders) > _DEEPEST or any(_FOLDERS.fullmatch(each) for each in folders):
        return False
    if _ABOUT.fullmatch(file) or _LEFT_BEHIND.fullmatch(file):
        return False
    if not _WEIGHTS.fullmatch(file):
        return True
    in_module = any(_MODULE.fullmatch(each) for each in folders[:1])
    return in_module or any(name.startswith(f"{module}/") for module in modules)


def belongings(folder: Path) -> tuple[list[str], list[str]]:
    """Files of a folder that belong to its model besides the weights, and those left out, sorted.

    A folder with its own config and weights is another model and left out, unless it is a module.
    A folder that is left out whole is listed by its name; READMEs and names with a leading dot are
    not listed.
    """
    modules = modules_of(folder)
    found: list[str] = []
    left: list[str] = []
    for name, is_whole_folder in _walk(folder, modules):
        if is_whole_folder:
            left.append(f"{name}/")
        elif belongs(name, modules):
            found.append(name)
        elif not re.match(r"(?i)\.|README", PurePosixPath(name).name):
            left.append(name)
    return sorted(found), sorted(left)


def module_weights(folder: Path) -> list[str]:
    """Weights of modules that are carried over as they are, by their paths in the folder."""
    return [name for name in belongings(folder)[0] if "/" in name and _WEIGHTS.fullmatch(name)]


def modules_of(folder: Path) -> list[str]:
    """Folders of the modules that `modules.json` of sentence-transformers names."""
    if not os.path.lexists(folder / MODULES):
        return []
    listed = documents.read_json(folder / MODULES, documents.CONFIG, of=folder)
    paths = (
        [m.get("path") for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
    )
    return [
        path.strip("/")
        for path in paths
        if isinstance(path, str) and path.strip("/") and ".." not in PurePosixPath(path).parts
    ]


def _walk(folder: Path, modules: Collection[str], inside: str = "") -> Iterable[tuple[str, bool]]:
    """Files by their paths in the folder, and folders that are left out whole."""
    try:
        entries = sorted(os.scandir(folder / inside if inside else folder), key=lambda e: e.name)
    except OSError:
        return
    for entry in entries:
        name = f"{inside}/{entry.name}" if inside else entry.name
        if not _is_folder(entry):
            yield name, False
            continue
        if entry.is_symlink():
            documents.inside(Path(entry.path), folder)
        if _FOLDERS.fullmatch(entry.name):
            if not entry.name.startswith((".", "__")):
                yield name, True
        elif name.count("/") >= _DEEPEST or (name not in modules and _is_model(Path(entry.path))):
            yield name, True
        else:
            yield from _walk(folder, modules, name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder; a link that leads in a circle is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_model(folder: Path) -> bool:
    """Whether a folder is another model."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 (names are all that is wanted)
    except OSError:
        return False
    return _MODULE.fullmatch(folder.name) is None and (
        "config.json" in names and any(_WEIGHTS.fullmatch(name) for name in names)
    )
