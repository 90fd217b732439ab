"""A model in a folder, vectors and data in files, as a module, fine-tunes and tasks.

Data are read as for training (`taskvec.training.data`). Running text and conversations ask a causal
language model; classes ask a classifier. Its head is, for each task, the first of these that there
is, unless one is asked for: that of the run which the vector is from (`head.safetensors` beside
it); the model's own; a linear probe, fitted to the features that the pre-trained model has of the
task's validation data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from taskvec.checkpoints.adapters import Adapter
from taskvec.disentanglement.tasks import ModelTask, classification
from taskvec.disentanglement.texts import Conversation, Pair, language
from taskvec.errors import DataError, UsageError
from taskvec.extras import require
from taskvec.family.opening import open_model
from taskvec.outputs.run import run
from taskvec.recipes.coerce import as_recipe
from taskvec.recipes.recipe import Family, Model
from taskvec.running.loading import find_folder
from taskvec.running.model import find_device, load, open_stored
from taskvec.training.data import Classified, Conversations, Data, Documents
from taskvec.training.loop import Examples

BATCH = 64  # examples of a classifier at once


@dataclass(frozen=True, slots=True)
class MeasuringOptions:
    """How a model is loaded and run.

    Attributes:
        dtype: Of a language model's weights; a classifier is float32.
        device: Such as `cpu`; `auto`: the accelerator, if there is one.
        context: Tokens of a window over a text.
        is_plain: Whether prompts and answers are plain texts, without the chat template.
        image_size: Height and width of images; None: what the model expects.
        batch_tokens: Tokens of a batch; None: by the memory there is.
        batch_size: Examples of a classifier at once.
        head: Of a classifier: `own`, `probe`, `zero-shot` (of CLIP, from the names of classes), or
            `features` for none: representations are compared. None: see the module.
        templates: Of a zero-shot head that is made, with `{}` for the name of the class; none: that
            of `finetune`.
    """

    dtype: str = "auto"
    device: str = "auto"
    context: int | None = None
    is_plain: bool = False
    image_size: int | None = None
    batch_tokens: int | None = None
    batch_size: int = BATCH
    head: str | None = None
    templates: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Batches:
    """Batches of examples, in their order, any number of times.

    Attributes:
        examples: Which.
        size: Of a batch.
        has_labels: Whether batches have their labels.
    """

    examples: Examples
    size: int
    has_labels: bool = True

    def __iter__(self) -> Iterator[Any]:
        items = self.examples.items
        for start in range(0, len(items), self.size):
            chosen = range(start, min(len(items), start + self.size))
            batch = self.examples.collate([items[i] for i in chosen])
            yield batch if self.has_labels else {k: batch[k] for k in batch if k != "labels"}


def open_tasks(
    model: str,
    vectors: Mapping[str, str],
    data: Mapping[str, Data],
    validation: Mapping[str, Data],
    asking: MeasuringOptions,
) -> tuple[Any, dict[str, ModelTask], dict[str, ModelTask]]:
    """A loaded model, and data as tasks of it.

    Args:
        model: A folder, or a name on the hub.
        vectors: Files or folders by task; beside them the heads that they were trained under lie.
        data: By task.
        validation: Other data of the same tasks, or of some.
        asking: How the model is asked.

    Returns:
        The module, the tasks of `data`, and those of `validation`.

    Raises:
        UsageError: data are of kinds that one model cannot be asked, or a head is not to be had.
        TaskvecError: the model cannot be loaded, or does not fit the data.
    """
    kinds = {isinstance(each, Classified) for each in (*data.values(), *validation.values())}
    if len(kinds) != 1:
        raise UsageError(
            "prompts to continue and classes cannot be evaluated in one model; give one kind"
        )
    if kinds == {True}:
        return _classifier(model, vectors, data, validation, asking)
    if asking.head is not None:
        raise UsageError(f"head {asking.head!r} is for classes; texts are asked of the model's own")
    loaded = load(open_stored(model), dtype=asking.dtype, device=asking.device)
    tasks, others = (
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
        for by_task in (data, validation)
    )
    return loaded.module, tasks, others


def open_vectors(
    model: str, module: Any, vectors: Mapping[str, str], scratch: Path
) -> dict[str, Model]:
    """Vectors under the module's names of the tensors.

    transformers renames tensors of some models on loading, and leaves out a head that is not asked
    for. Of such models the fine-tunes are written, loaded and removed again.

    Args:
        model: Where the module is from.
        module: As `open_tasks` gave it.
        vectors: Files or folders by task.
        scratch: Folder that fine-tunes are written into.

    Raises:
        TaskvecError: a vector is broken or does not fit the model.
    """
    stored = open_model(str(find_folder(model)))
    if isinstance(stored, Adapter) or stored.tensors.keys() <= module.state_dict().keys():
        return dict(vectors)
    found: dict[str, Model] = {}
    for task, vector in vectors.items():
        scratch.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=scratch, prefix=".tuned-") as place:
            folder = Path(place) / "model"
            family = Family(anchor=str(find_folder(model)), tasks={task: vector})
            whole = {"method": "task_arithmetic", "scale": 1.0, "dtype": "float32"}
            run(as_recipe(family, whole), folder)
            found[task] = _loaded_like(module, folder, str(vector))
    return found


def _loaded_like(module: Any, folder: Path, where: str) -> Mapping[str, Any]:
    """The state dict of a folder, loaded as a module was."""
    from taskvec.running.loading import load as load_as
    from taskvec.training.heads import ImageTower

    is_tower = isinstance(module, ImageTower)
    loaded, _ = load_as(folder, where, "AutoModel" if is_tower else type(module).__name__)
    state: Mapping[str, Any] = (ImageTower(loaded) if is_tower else loaded).state_dict()
    return state


def _texts(data: Data, asking: MeasuringOptions) -> list[str | Pair | Conversation]:
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
    model: str,
    vectors: Mapping[str, str],
    data: Mapping[str, Data],
    validation: Mapping[str, Data],
    asking: MeasuringOptions,
) -> tuple[Any, dict[str, ModelTask], dict[str, ModelTask]]:
    """One module, and a head for each task."""
    core: Any = None
    found: tuple[dict[str, ModelTask], dict[str, ModelTask]] = {}, {}
    everything = (*data.values(), *validation.values())
    # A model's own head numbers classes as the data do that have most of them.
    widest = max(everything, key=lambda each: len(getattr(each, "classes", ())))
    for name in dict.fromkeys((*data, *validation)):
        own = data.get(name, validation.get(name, widest))
        opened = _open(model, name, vectors.get(name), own, widest, validation.get(name), asking)
        if core is not None and type(core) is not type(opened.core):
            raise UsageError(
                f"task {name!r} needs a {type(opened.core).__name__}, another a "
                f"{type(core).__name__}; give all tasks one kind of head (--head)"
            )
        core = opened.core.to(find_device(asking.device)) if core is None else core
        head, forward = _head_of(opened, core)
        for split, tasks in zip((data, validation), found, strict=True):
            if name in split:
                batches = Batches(opened.encode(split[name]), asking.batch_size)
                if asking.head == "features":
                    batches = replace(batches, has_labels=False)
                tasks[name] = classification(name, batches, head=head, forward=forward)
    return core, *found


def _open(
    model: str,
    name: str,
    vector: str | None,
    own: Data,
    widest: Data,
    fitted_on: Data | None,
    asking: MeasuringOptions,
) -> Any:
    """A classifier for one task; a new head numbers classes as the data do."""
    from taskvec.training import run_folder as folder
    from taskvec.training.models import HEAD, open_classifier
    from taskvec.training.models import HeadOptions as Head

    options = Head(image_size=asking.image_size, head=asking.head)
    options = replace(options, templates=asking.templates or options.templates)
    if asking.head == "features":
        identity = require("torch.nn", "train").Identity()
        return open_classifier(model, _as_classes(own), replace(options, head=None), head=identity)
    made = None if vector is None else Path(vector).expanduser().parent / HEAD
    if asking.head is None and made is not None and made.is_file():
        run = folder.read_run(made.parent)["settings"]
        like = replace(
            _as_classes(widest),
            items=(),
            labels=(),
            classes=run["classes"],
            where=f"the head beside {vector}",
        )
        options = replace(options, head=run["head"], pool=run["pool"])
        return open_classifier(model, like, options, made=made)
    if asking.head in (None, "own") and (asking.head or _has_own(model, widest)):
        return open_classifier(model, _as_classes(widest), options)
    if asking.head not in (None, "probe"):
        return open_classifier(model, _as_classes(own), options)
    if fitted_on is None:
        raise UsageError(
            f"task {name!r}: a linear probe is fitted to validation data; give --validation "
            f"{name}=PATH, or another --head"
        )
    return open_classifier(model, _as_classes(fitted_on), replace(options, head="probe"))


def _has_own(model: str, data: Data) -> bool:
    from taskvec.running.loading import read_config
    from taskvec.training.models import has_own_head

    return has_own_head(read_config(find_folder(model), model), _as_classes(data))


def _as_classes(data: Data) -> Classified:
    assert isinstance(data, Classified)
    return data


def _head_of(opened: Any, core: Any) -> tuple[Any, Any]:
    """The head of a classifier, and how to get features from its module."""
    from taskvec.training.heads import Classifier

    classifier = opened.whole(core)
    if not isinstance(classifier, Classifier):
        return None, None

    def forward(module: Any, inputs: Mapping[str, Any]) -> Any:
        return Classifier(module, classifier.head, classifier.pool).features(**inputs)

    return classifier.head.to(next(core.parameters()).device), forward
