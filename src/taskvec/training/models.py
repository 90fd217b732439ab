"""Models to train: opened from a folder as what the data ask for, with their loss and examples."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taskvec.checkpoints.hub import fetch, hub_name
from taskvec.errors import CheckpointError, DataError, UsageError
from taskvec.evaluation.encoding import Encoder, make_encoder, open_encoder
from taskvec.extras import require
from taskvec.training.data import Classified, Conversations, Data, Documents
from taskvec.training.images import Preparation, preparation_of
from taskvec.training.loop import Examples, Objective
from taskvec.training.objectives import classifying, predicting_tokens
from taskvec.training.tokens import (
    Fitting,
    answer_rows,
    text_examples,
    token_examples,
    window_rows,
)

_OWN_HEADS = {"text": "ForSequenceClassification", "image": "ForImageClassification"}


@dataclass(frozen=True, slots=True)
class Asking:
    """How a model is asked.

    Attributes:
        fitting: Of texts.
        image_size: Height and width of images; None: what the model expects.
        label_smoothing: Share of the target that is spread evenly.
    """

    fitting: Fitting = Fitting()
    image_size: int | None = None
    label_smoothing: float = 0.0


@dataclass(frozen=True, slots=True)
class Opened:
    """A model that can be trained.

    Attributes:
        core: What the selection is of and a vector is named after; of torch.
        whole: From the core, or what it was linearised to, to what the objective is called with.
        objective: Its loss.
        encode: From data to examples.
        told: What the result depends on, for the record.
        notes: What people should know.
        start: What a vector starts from: the folder, or None for the core's own weights.
        freezes_head: Whether the model's own head stays as it is though everything trains.
    """

    core: Any
    whole: Callable[[Any], Any]
    objective: Objective
    encode: Callable[[Data], Examples]
    told: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)
    start: Path | None = None
    freezes_head: bool = False


def find_folder(model: str | os.PathLike[str]) -> Path:
    """The folder of a model, fetched from the hub if it is there.

    Raises:
        CheckpointError: there is none.
    """
    named = hub_name(model)
    folder = fetch(named)[1] if named is not None else Path(model).expanduser()
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{model}: no such model; give a folder in Hugging Face layout")
    return folder


def open_language_model(
    model: str | os.PathLike[str] | Any, tokenizer: Any, asking: Asking
) -> Opened:
    """A causal language model, for running text and conversations.

    Args:
        model: A folder, a name on the hub, or a module in memory.
        tokenizer: Of a module in memory.
        asking: How it is asked.
    """
    start = None
    if isinstance(model, (str, os.PathLike)):
        start = find_folder(model)
        encoder = open_encoder(start, os.fspath(model))
        core = load(start, os.fspath(model), "AutoModelForCausalLM")
    else:
        core = model
        if tokenizer is None:
            raise UsageError("a model in memory needs its tokenizer: give tokenizer=")
        config = getattr(core, "config", None)
        told = config.to_dict() if config is not None else {}
        encoder = make_encoder(tokenizer, told, {}, "the module")
    notes: list[str] = []

    def encode(data: Data) -> Examples:
        return _tokens(encoder, data, asking, notes)

    return Opened(
        core,
        lambda core: core,
        predicting_tokens(asking.label_smoothing),
        encode,
        {"kind": "language model", **_told(asking)},
        notes,
        start,
    )


def _tokens(encoder: Encoder, data: Data, asking: Asking, notes: list[str]) -> Examples:
    identity = {"source": data.where, "digest": data.digest}
    if isinstance(data, Documents):
        return token_examples(window_rows(encoder, data, asking.fitting), identity)
    if not isinstance(data, Conversations):
        raise UsageError(f"{data.where}: holds classes, which a language model does not learn")
    rows, dropped = answer_rows(encoder, data, asking.fitting)
    if dropped:
        notes.append(
            f"{data.where}: {dropped:,} conversations are left out: nothing of an answer is left "
            "where they are cut"
        )
    return token_examples(rows, identity)


def _told(asking: Asking) -> dict[str, Any]:
    told: dict[str, Any] = {"label_smoothing": asking.label_smoothing}
    told |= {"context": asking.fitting.context, "truncate": asking.fitting.truncate}
    return told | {"image_size": asking.image_size}


def load(folder: Path, where: str, kind: str, **options: Any) -> Any:
    """A model of transformers in float32, on the CPU, in evaluation mode.

    Args:
        folder: Of the model.
        where: What messages call it.
        kind: Class of transformers, such as `AutoModel`.
        **options: For it.

    Raises:
        CheckpointError: transformers cannot load it as that.
    """
    torch, transformers = require("torch", "train"), require("transformers", "train")
    from taskvec.evaluation.model import without_bars

    try:
        with without_bars(transformers), torch.random.fork_rng(devices=[]):
            module = getattr(transformers, kind).from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, **options
            )
    except Exception as error:  # whatever the many model classes raise
        text = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{where}: cannot be loaded as {kind}: {text}") from error
    return module.eval()


def read_config(folder: Path, where: str) -> dict[str, Any]:
    """The config of a model folder."""
    try:
        return dict(json.loads((folder / "config.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: config.json cannot be read: {error}") from error


def has_own_head(config: Mapping[str, Any], data: Classified) -> bool:
    """Whether a checkpoint has a head for as many classes as the data have."""
    architectures = config.get("architectures") or [""]
    labels = len(config.get("id2label") or {}) or 2  # what transformers takes where nothing is said
    return str(architectures[0]).endswith(_OWN_HEADS[data.kind]) and labels >= len(data.classes)


def open_classifier(
    model: str | os.PathLike[str], data: Classified, head: Any, asking: Asking
) -> Opened:
    """A classifier of texts or images from a folder.

    Args:
        model: A folder or a name on the hub.
        data: What is trained on; says the kind and the classes.
        head: From features to logits, frozen; None: the checkpoint's own, or else a linear probe
            that is fitted to the features of the data first.
        asking: How it is asked.
    """
    where = os.fspath(model)
    folder = find_folder(model)
    config = read_config(folder, where)
    notes: list[str] = []
    encode = _encoding(folder, where, config, data, asking, notes)
    told = {"kind": f"classifier of {data.kind}s", **_told(asking), "classes": list(data.classes)}
    objective = classifying(asking.label_smoothing)
    if head is None and has_own_head(config, data):
        core = load(folder, where, f"AutoModel{_OWN_HEADS[data.kind]}")
        told["head"] = "its own"
        return Opened(
            core, lambda core: core, objective, encode, told, notes, folder, freezes_head=True
        )
    raise UsageError(f"{where}: has no head for these {len(data.classes)} classes; give one")


def _encoding(
    folder: Path,
    where: str,
    config: Mapping[str, Any],
    data: Classified,
    asking: Asking,
    notes: list[str],
) -> Callable[[Data], Examples]:
    """From data of the same classes to examples."""
    if data.kind == "image":
        preparation = preparation_of(folder, config, asking.image_size)
        height, width = preparation.size
        notes.append(f"images are seen at {height} × {width} px ({preparation.origin})")
        return lambda more: image_examples(preparation, _aligned(more, data))
    tokenizer = open_encoder(folder, where).tokenizer
    return lambda more: text_examples(tokenizer, _aligned(more, data), asking.fitting, where)


def _aligned(data: Data, like: Classified) -> Classified:
    """Data whose labels are numbered as in other data.

    Raises:
        DataError: a class is not there.
    """
    if not isinstance(data, Classified) or data.kind != like.kind:
        raise UsageError(f"{data.where}: must hold {like.kind}s of classes, as {like.where} does")
    if tuple(data.classes) == tuple(like.classes):
        return data
    unknown = sorted(set(data.classes) - set(like.classes))
    if unknown:
        raise DataError(
            f"{data.where}: class {unknown[0]!r} is not among the {len(like.classes)} of "
            f"{like.where}: {', '.join(like.classes)}"
        )
    numbers = [like.classes.index(name) for name in data.classes]
    return Classified(
        data.items,
        [numbers[label] for label in data.labels],
        like.classes,
        data.kind,
        data.where,
        data.digest,
    )


def image_examples(preparation: Preparation, data: Classified) -> Examples:
    """Images as examples."""
    torch = require("torch", "train")

    def collate(rows: Any) -> dict[str, Any]:
        images = torch.stack([preparation(data.items[i]) for i in rows])
        return {"pixel_values": images, "labels": torch.tensor([data.labels[i] for i in rows])}

    identity = {"source": data.where, "digest": data.digest}
    return Examples(
        range(len(data.items)), collate, lambda batch: len(batch["labels"]), "examples", identity
    )
