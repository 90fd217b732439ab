"""The target as a module that can be asked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taskvec.coefficients.fit.asking import InputAsker, LanguageAsker, chat_end
from taskvec.coefficients.fit.directions import TaskDirections
from taskvec.coefficients.fit.prompts import Lesson
from taskvec.coefficients.fit.settings import FitSettings
from taskvec.errors import UsageError
from taskvec.extras import require
from taskvec.running.loading import find_folder, read_config
from taskvec.running.model import find_device, load, open_stored, wrap
from taskvec.training.data import Classified
from taskvec.training.models import HeadOptions, open_classifier

_LANGUAGE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def is_language_model(directions: TaskDirections, model: Any) -> bool:
    """Whether the target answers with tokens.

    Raises:
        UsageError: the target is in memory, and was not given as a module.
    """
    if model is not None:
        return hasattr(model, "generate") and hasattr(model, "config")
    folder = _folder(directions)
    name = str((read_config(folder, str(folder)).get("architectures") or [""])[0])
    return name.endswith(_LANGUAGE)


def open_language_asker(
    directions: TaskDirections, model: Any, tokenizer: Any, settings: FitSettings
) -> LanguageAsker:
    """The target as a language model.

    Args:
        directions: Members.
        model: A module with the target's weights; None: it is loaded.
        tokenizer: Of the module.
        settings: Device and dtype.
    """
    if model is not None:
        found = wrap(model, tokenizer, "model")
    else:
        stored = open_stored(_folder(directions))
        found = load(stored, dtype=settings.dtype, device=settings.device)
    return LanguageAsker(found.module, found.encoder, chat_end(found.encoder))


def open_input_asker(
    directions: TaskDirections,
    lessons: Sequence[Lesson],
    heads: Mapping[str, Any],
    asking: HeadOptions,
    settings: FitSettings,
) -> tuple[Any, InputAsker, dict[str, list[Any]]]:
    """The target as a classifier or an encoder: its module, who asks it, and rows by source.

    A source has the head that is given for it, the checkpoint's own, or none: then features are
    compared.

    Raises:
        UsageError: some sources have a head and others none.
    """
    torch = require("torch", "train")
    device = find_device(settings.device)
    core: Any = None
    wholes, collate, rows, kinds = {}, {}, {}, {}
    folder = _folder(directions)
    for lesson in lessons:
        data: Classified = lesson.prompts
        head = heads.get(lesson.name)
        if head is None and not _has_own_head(folder):
            head = torch.nn.Identity()
        opened = open_classifier(folder, data, asking, head=head)
        kinds[lesson.name] = "features" if isinstance(head, torch.nn.Identity) else "logits"
        core = opened.core.to(device) if core is None else core
        wholes[lesson.name] = opened.whole(core)
        if hasattr(wholes[lesson.name], "to"):
            wholes[lesson.name].to(device)
        examples = opened.encode(data)
        collate[lesson.name], rows[lesson.name] = examples.collate, list(examples.items)
    if len(set(kinds.values())) > 1:
        without = next(name for name, kind in kinds.items() if kind == "features")
        raise UsageError(f"heads: source {without!r} has none, others have; give all or none")
    return core, InputAsker(wholes, collate, device, next(iter(kinds.values()))), rows


def _has_own_head(folder: Path) -> bool:
    name = str((read_config(folder, str(folder)).get("architectures") or [""])[0])
    return name.endswith(("ForSequenceClassification", "ForImageClassification"))


def _folder(directions: TaskDirections) -> Path:
    target = directions.recipe.family.edited
    if not isinstance(target, (str, os.PathLike)):
        raise UsageError(
            "the target is in memory; give model=, a module with its weights, and tokenizer= of a "
            "language model"
        )
    return find_folder(target)
