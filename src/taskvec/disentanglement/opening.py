"""A model in a folder and data in files, as a module and tasks.

Data are read as for training (`taskvec.training.data`). Running text and conversations ask a causal
language model; classes ask a classifier with a head of its own for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taskvec.disentanglement.tasks import Task, classification
from taskvec.disentanglement.texts import Conversation, Pair, language
from taskvec.errors import DataError, UsageError
from taskvec.evaluation.model import find_device, load, open_stored
from taskvec.training.data import Classified, Conversations, Data, Documents
from taskvec.training.loop import Examples

BATCH = 64  # examples of a classifier at once


@dataclass(frozen=True, slots=True)
class Asking:
    """How a model is loaded and asked.

    Attributes:
        dtype: Of a language model's weights; a classifier is float32.
        device: Such as `cpu`; `auto`: the accelerator, if there is one.
        context: Tokens of a window over a text.
        is_plain: Whether prompts and answers are plain texts, without the chat template.
        image_size: Height and width of images; None: what the model expects.
        batch_tokens: Tokens of a batch; None: by the memory there is.
        batch_size: Examples of a classifier at once.
    """

    dtype: str = "auto"
    device: str = "auto"
    context: int | None = None
    is_plain: bool = False
    image_size: int | None = None
    batch_tokens: int | None = None
    batch_size: int = BATCH


@dataclass(frozen=True, slots=True)
class Batches:
    """Examples put together, as often as is wished, in their order."""

    examples: Examples
    size: int

    def __iter__(self) -> Iterator[Any]:
        items = self.examples.items
        for start in range(0, len(items), self.size):
            yield self.examples.collate(range(start, min(len(items), start + self.size)))


def open_tasks(
    model: str, data: Sequence[Mapping[str, Data]], asking: Asking
) -> tuple[Any, list[dict[str, Task]]]:
    """A loaded model, and data as tasks of it.

    Args:
        model: A folder, or a name on the hub.
        data: By task, such as of several splits.
        asking: How it is asked.

    Raises:
        UsageError: data are of kinds that one model cannot be asked.
        TaskvecError: the model cannot be loaded, or does not fit the data.
    """
    flat = [each for by_task in data for each in by_task.values()]
    kinds = {isinstance(each, Classified) for each in flat}
    if len(kinds) != 1:
        raise UsageError("texts to go on from and classes cannot be asked of one model; give one")
    if kinds == {True}:
        return _classifier(model, data, asking)
    loaded = load(open_stored(model), dtype=asking.dtype, device=asking.device)
    tasks = [
        {
            name: language(
                name,
                _texts(each, asking),
                loaded.encoder,
                context=asking.context,
                batch_tokens=asking.batch_tokens,
            )
            for name, each in by_task.items()
        }
        for by_task in data
    ]
    return loaded.module, tasks


def _texts(data: Data, asking: Asking) -> list[str | Pair | Conversation]:
    if isinstance(data, Documents):
        return list(data.items)
    assert isinstance(data, Conversations)
    if not asking.is_plain:
        return list(data.items)
    pairs: list[str | Pair | Conversation] = []
    for messages, where in zip(data.items, data.places, strict=True):
        *before, (role, answer) = messages
        if role != "assistant":
            raise DataError(f"{where}: the last message must be the assistant's to be an answer")
        pairs.append(("".join(content for _, content in before), answer))
    return pairs


def _classifier(
    model: str, data: Sequence[Mapping[str, Data]], asking: Asking
) -> tuple[Any, list[dict[str, Task]]]:
    from taskvec.training.models import Asking as TrainingAsking
    from taskvec.training.models import open_classifier

    everything = [each for by_task in data for each in by_task.values()]
    # Classes are numbered as where there are most of them.
    widest = max(
        (each for each in everything if isinstance(each, Classified)),
        key=lambda each: len(each.classes),
    )
    opened = open_classifier(model, widest, None, TrainingAsking(image_size=asking.image_size))
    module = opened.core.to(find_device(asking.device))
    tasks = [
        {
            name: classification(name, Batches(opened.encode(each), asking.batch_size))
            for name, each in by_task.items()
        }
        for by_task in data
    ]
    return module, tasks
