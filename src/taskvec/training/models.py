"""Models to train: opened from a folder for the kind of the data, with loss and examples."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from taskvec import documents
from taskvec.errors import DataError, UsageError
from taskvec.extras import require
from taskvec.running.encoding import Encoder, make_encoder, open_encoder, open_tokenizer
from taskvec.running.loading import find_folder, load, read_config, tell_missing
from taskvec.running.model import preserve_modes
from taskvec.training.data import Classified, Conversations, Data, Documents
from taskvec.training.heads import TEMPLATES, Classifier, ImageTower, linear_probe, zero_shot_head
from taskvec.training.images import Preparation, preparation_of
from taskvec.training.loop import Examples, Objective, find_place
from taskvec.training.objectives import classifying, predicting_tokens
from taskvec.training.settings import TrainingSettings
from taskvec.training.tokens import (
    Fitting,
    answer_rows,
    text_examples,
    token_examples,
    window_rows,
)

HEADS = ("own", "probe", "zero-shot")
HEAD = "head.safetensors"  # in the folder of a run: weight and bias of a head that was made here
_OWN_HEADS = {"text": "ForSequenceClassification", "image": "ForImageClassification"}


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """How a model is asked.

    Attributes:
        fitting: Of texts.
        image_size: Height and width of images; None: what the model expects.
        label_smoothing: Share of the target that is spread evenly.
        head: Of a classifier: `own` (the checkpoint's), `probe` (a linear one, fitted to features
            first), `zero-shot` (of CLIP, from the names of the classes); None: its own if it has
            one for these classes, or else a probe.
        pool: How features become one vector, see `taskvec.training.heads`; None: the mean over
            tokens of texts, the first token of images.
        templates: Of a zero-shot head, with `{}` for the name of the class.
        probe_examples: Most examples that a probe is fitted to, the first of the data in the order
            of the seed.
    """

    fitting: Fitting = Fitting()
    image_size: int | None = None
    label_smoothing: float = 0.0
    head: str | None = None
    pool: str | None = None
    templates: tuple[str, ...] = TEMPLATES
    probe_examples: int = 5000


@dataclass(frozen=True, slots=True)
class Opened:
    """A model that can be trained.

    Attributes:
        core: The torch module whose parameters are selected and named in the vector.
        whole: From the core, or its linearization, to the argument of the objective.
        objective: Its loss.
        encode: From data to examples.
        provenance: What the result depends on, for `run.json`.
        notes: For the user.
        start: Where a vector starts: the folder, or None for the core's own weights.
        freezes_head: Whether the model's own head is frozen even under `all`.
        missing: Parameters of the core that the folder lacks; they do not train.
        files: Content of the folder of a run that a resumed run needs.
    """

    core: Any
    whole: Callable[[Any], Any]
    objective: Objective
    encode: Callable[[Data], Examples]
    provenance: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)
    start: Path | None = None
    freezes_head: bool = False
    missing: tuple[str, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)


def open_language_model(
    model: str | os.PathLike[str] | Any, tokenizer: Any, asking: HeadOptions
) -> Opened:
    """A causal language model, for running text and conversations.

    Args:
        model: A folder, a name on the hub, or a module in memory.
        tokenizer: Of a module in memory.
        asking: How it is asked.
    """
    start: Path | None = None
    missing: tuple[str, ...] = ()
    notes: list[str] = []
    if isinstance(model, (str, os.PathLike)):
        start = find_folder(model)
        encoder = open_encoder(start, os.fspath(model))
        core, missing = load(start, os.fspath(model), "AutoModelForCausalLM")
        tell_missing(os.fspath(model), missing, notes, has_head=True)
    else:
        core = model
        if tokenizer is None:
            raise UsageError("a model in memory needs its tokenizer: give tokenizer=")
        config = getattr(core, "config", None)
        provenance = config.to_dict() if config is not None else {}
        encoder = make_encoder(tokenizer, provenance, {}, "the module")

    def encode(data: Data) -> Examples:
        return _tokens(encoder, data, asking, notes)

    return Opened(
        core,
        lambda core: core,
        predicting_tokens(asking.label_smoothing),
        encode,
        {"kind": "language model", **_record_options(asking)},
        notes,
        start,
        missing=missing,
    )


def _tokens(encoder: Encoder, data: Data, asking: HeadOptions, notes: list[str]) -> Examples:
    identity = {"digest": data.digest}
    if isinstance(data, Documents):
        return token_examples(window_rows(encoder, data, asking.fitting), identity)
    if not isinstance(data, Conversations):
        raise UsageError(f"{data.where}: holds classes, which a language model does not learn")
    rows, dropped = answer_rows(encoder, data, asking.fitting)
    if dropped:
        notes.append(
            f"{data.where}: {dropped:,} of {len(data.items):,} conversations are left out: their "
            "answers are beyond the limit of tokens"
        )
    return token_examples(rows, identity)


def _record_options(asking: HeadOptions) -> dict[str, Any]:
    provenance: dict[str, Any] = {"label_smoothing": asking.label_smoothing}
    provenance |= {"context": asking.fitting.context, "truncate": asking.fitting.truncate}
    return provenance | {"image_size": asking.image_size}


def has_own_head(config: Mapping[str, Any], data: Classified) -> bool:
    """Whether a checkpoint has a head for as many classes as the data have."""
    architectures = config.get("architectures") or [""]
    labels = len(config.get("id2label") or {}) or 2  # transformers' default
    return str(architectures[0]).endswith(_OWN_HEADS[data.kind]) and labels >= len(data.classes)


def open_classifier(
    model: str | os.PathLike[str],
    data: Classified,
    asking: HeadOptions,
    *,
    head: Any = None,
    made: Path | None = None,
    settings: TrainingSettings = TrainingSettings(),
) -> Opened:
    """A classifier of texts or images from a folder.

    Args:
        model: A folder or a name on the hub.
        data: Training data, which has the kind and the classes.
        asking: How it is asked, and what head it has.
        head: A module from features to logits, instead.
        made: File of a head that an earlier run made; taken if it is there.
        settings: Seed and device for fitting a probe.

    Raises:
        UsageError: the head is unknown.
        CheckpointError: it cannot be loaded.
    """
    where = os.fspath(model)
    folder = find_folder(model)
    config = read_config(folder, where)
    notes: list[str] = []
    objective = classifying(asking.label_smoothing)
    kind = "given" if head is not None else _head_kind(where, config, data, asking.head)
    provenance = _record_options(asking) | {"kind": f"classifier of {data.kind}s", "head": kind}
    provenance["classes"] = list(data.classes)
    is_own = kind == "own"
    core, missing = load(folder, where, f"AutoModel{_OWN_HEADS[data.kind] if is_own else ''}")
    _check_takes(core, where, data)
    encode = _encoding(folder, where, config, data, asking, notes)
    tell_missing(where, missing, notes, has_head=kind in ("own", "zero-shot"))
    if is_own:
        notes.append("the head is the model's own, frozen")
        return Opened(
            core,
            lambda core: core,
            objective,
            encode,
            provenance,
            notes,
            folder,
            freezes_head=True,
            missing=missing,
        )
    # Of a model that also has a tower for texts, that for images is asked.
    is_tower = kind == "zero-shot" or (data.kind == "image" and hasattr(core, "get_text_features"))
    pool = asking.pool or ("embed" if is_tower else {"text": "mean", "image": "cls"}[data.kind])
    if kind == "zero-shot":
        pool = "embed"
        provenance["templates"] = list(asking.templates)
    provenance["pool"] = pool
    if head is None and made is not None and made.is_file():
        head = _stored_head(made)
    elif kind == "zero-shot":
        tokenizer = open_tokenizer(folder, where)
        head = zero_shot_head(core, tokenizer, data.classes, asking.templates)
        notes.append(f"the head is zero-shot, from {len(data.classes)} names of classes")
    core = ImageTower(core) if is_tower else core
    if head is None:
        head, note = _fitted_probe(core, pool, encode(data), data, asking, settings)
        notes.append(note)
    files = {} if kind == "given" else {HEAD: _head_bytes(head)}

    def whole(part: Any) -> Any:
        return Classifier(part, head, pool)

    return Opened(
        core, whole, objective, encode, provenance, notes, folder, missing=missing, files=files
    )


def _check_takes(core: Any, where: str, data: Classified) -> None:
    """Refuse data of a kind that a model of transformers does not take."""
    takes_images = core.main_input_name == "pixel_values" or hasattr(core, "get_image_features")
    if takes_images != (data.kind == "image"):
        kinds = ("texts", "images") if data.kind == "image" else ("images", "texts")
        raise UsageError(f"{where}: is a model of {kinds[0]}; {data.where} holds {kinds[1]}")


def _head_kind(where: str, config: Mapping[str, Any], data: Classified, wanted: str | None) -> str:
    """Which head a classifier has.

    Raises:
        UsageError: it cannot have that.
    """
    has_own = has_own_head(config, data)
    if wanted is None:
        return "own" if has_own else "probe"
    if wanted not in HEADS:
        raise UsageError(f"head must be {', '.join(HEADS[:-1])} or {HEADS[-1]}; got {wanted!r}")
    if wanted == "own" and not has_own:
        raise UsageError(
            f"{where}: has no head for {len(data.classes)} classes of {data.kind}s; use probe"
        )
    return wanted


def _fitted_probe(
    core: Any,
    pool: str,
    examples: Examples,
    data: Classified,
    asking: HeadOptions,
    settings: TrainingSettings,
) -> tuple[Any, str]:
    """A linear probe on the features of a model before training, and a note about it."""
    torch = require("torch", "train")
    place = find_place(settings)
    limit = min(asking.probe_examples, len(examples.items))
    rows = np.random.default_rng([settings.seed, 2]).permutation(len(examples.items))[:limit]
    classifier = Classifier(core.to(place.device), torch.nn.Identity(), pool)
    size = settings.micro_batch or settings.batch_size
    features, labels = [], []
    with preserve_modes(core), torch.no_grad():
        core.eval()
        for at in range(0, limit, size):
            batch = examples.collate([examples.items[i] for i in rows[at : at + size]])
            batch = require("accelerate", "train").utils.send_to_device(batch, place.device)
            labels.append(batch.pop("labels"))
            with place.computing():
                features.append(classifier.features(**batch).float())
    x, y = torch.cat(features), torch.cat(labels)
    head = linear_probe(x, y, classes=len(data.classes))
    accuracy = float((head(x).argmax(-1) == y).float().mean())
    return head, (
        f"the head is a linear probe, frozen, fitted to the features of {limit:,} examples "
        f"(accuracy {accuracy:.1%})"
    )


def _head_bytes(head: Any) -> bytes:
    tensors = {name: tensor.detach().cpu() for name, tensor in head.state_dict().items()}
    raw: bytes = require("safetensors.torch", "train").save(tensors)
    return raw


_HEAD = documents.Limits(2**30, 1)


def _stored_head(path: Path) -> Any:
    """A linear head from a file."""
    torch = require("torch", "train")
    tensors = require("safetensors.torch", "train").load(documents.read_bytes(path, _HEAD))
    classes, width = tensors["weight"].shape
    head = torch.nn.Linear(width, classes, bias="bias" in tensors)
    head.load_state_dict(tensors)
    return head


def _encoding(
    folder: Path,
    where: str,
    config: Mapping[str, Any],
    data: Classified,
    asking: HeadOptions,
    notes: list[str],
) -> Callable[[Data], Examples]:
    """From data of the same classes to examples."""
    if data.kind == "image":
        preparation = preparation_of(folder, config, asking.image_size)
        height, width = preparation.size
        notes.append(f"images are resized to {height} × {width} px ({preparation.origin})")
        trained_at = (config.get("vision_config") or config).get("image_size")
        resized = preparation.size != (trained_at, trained_at)
        more = {"interpolate_pos_encoding": True} if resized and _interpolates(config) else {}
        return lambda found: image_examples(preparation, _align_labels(found, data), more)
    tokenizer = open_tokenizer(folder, where)
    return lambda found: text_examples(tokenizer, _align_labels(found, data), asking.fitting, where)


def _interpolates(config: Mapping[str, Any]) -> bool:
    """Whether a model must be asked to stretch its positions over images of another size."""
    transformers = require("transformers", "train")
    kind = transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES.get(config.get("model_type"))
    forward = getattr(getattr(transformers, str(kind), None), "forward", None)
    return forward is not None and "interpolate_pos_encoding" in signature(forward).parameters


def _align_labels(data: Data, like: Classified) -> Classified:
    """Data whose labels are numbered as in other data.

    Raises:
        DataError: a class is not there.
    """
    if not isinstance(data, Classified) or data.kind != like.kind:
        raise UsageError(f"{data.where}: must hold {like.kind}s of classes, as {like.where} does")
    if tuple(data.classes) == tuple(like.classes):
        return data
    found = {data.classes[label] for label in data.labels}
    unknown = sorted(found - set(like.classes))
    if unknown:
        raise DataError(
            f"{data.where}: class {unknown[0]!r} is not among the {len(like.classes)} of "
            f"{like.where}: {', '.join(like.classes)}"
        )
    numbers = {data.classes.index(name): like.classes.index(name) for name in found}
    return Classified(
        data.items,
        [numbers[label] for label in data.labels],
        like.classes,
        data.kind,
        data.where,
        data.digest,
    )


def image_examples(preparation: Preparation, data: Classified, more: Mapping[str, Any]) -> Examples:
    """Images as examples; `more` are further inputs of the model."""
    torch = require("torch", "train")

    def collate(rows: Any) -> dict[str, Any]:
        images = torch.stack([preparation(data.items[i]) for i in rows])
        labels = torch.tensor([data.labels[i] for i in rows])
        return {"pixel_values": images, "labels": labels, **more}

    identity = {"digest": data.digest}
    return Examples(
        range(len(data.items)), collate, lambda batch: len(batch["labels"]), "examples", identity
    )
