"""`finetune`: from a model, data and a selection of parameters to a task vector."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from taskvec.errors import ParameterError, UsageError, nearest
from taskvec.extras import require
from taskvec.layers import Override, override
from taskvec.outputs.run import run
from taskvec.recipes.coerce import as_recipe
from taskvec.recipes.recipe import Family
from taskvec.running.model import without_bars
from taskvec.streaming import RunOptions
from taskvec.training import run_folder as folder
from taskvec.training.data import (
    Classified,
    Conversations,
    Documents,
    Reading,
    hold_out,
    inputs_of,
    read_data,
)
from taskvec.training.loop import Examples, Objective, is_first_process
from taskvec.training.lora import adapted_weights, add_lora, wants_lora
from taskvec.training.models import HEAD, HeadOptions, Opened, open_classifier, open_language_model
from taskvec.training.objectives import classifying
from taskvec.training.run import Record, RunOutput, TrainingJob, run_training
from taskvec.training.selection import ParameterSelection, describe, freeze_rest, select
from taskvec.training.settings import TrainingSettings, check_settings
from taskvec.training.vector_file import save_vector

# Own choice: the larger steps and smaller batches that instruction tuning is mostly done with.
LANGUAGE = TrainingSettings(steps=1000, batch_size=16, learning_rate=2e-5)


@dataclass(frozen=True, slots=True)
class Finetuned:
    """The result of `finetune`.

    Attributes:
        vector: θ − θ0 of the trained parameters, by name; on the CPU.
        selection: The trained parameters.
        records: One for each step and each validation.
        module: The trained module, inside its head and linearization.
        path: File of the vector; None if it was not written.
    """

    vector: Mapping[str, Any]
    selection: ParameterSelection
    records: Sequence[Record]
    module: Any
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A model and its parameters that train.

    Attributes:
        module: The argument of the objective.
        selection: The parameters that train, by their names in the vector.
        within: The same by their names in `module`.
        vector: Returns the present θ − θ0.
        save: Writes the vector to a file.
    """

    module: Any
    selection: ParameterSelection
    within: ParameterSelection
    vector: Callable[[], dict[str, Any]]
    save: Callable[[Path, bool], object]


def finetune(
    model: Any,
    data: Any,
    *,
    train: str | Sequence[str] = "attention",
    layers: Sequence[Mapping[str, Any]] = (),
    validation: Any = None,
    objective: Objective | None = None,
    tokenizer: Any = None,
    head: Any = None,
    linearised: bool = False,
    settings: TrainingSettings | Mapping[str, Any] | None = None,
    reading: Reading = Reading(),
    asking: HeadOptions = HeadOptions(),
    output: RunOutput = RunOutput(),
) -> Finetuned:
    """Fine-tune a model; the result is a task vector.

    Args:
        model: A folder, a name on the hub, or any torch module, which is trained in place. To
            resume from a folder, give the module with its initial weights.
        data: A file, a folder or `hub:NAME[:CONFIG[:SPLIT]]` (see `taskvec.training.data`); or
            `Examples`; or a sequence, such as a data set of torch, of items that torch's
            `default_collate` puts together.
        train: What trains; see `taskvec.training.selection` and `taskvec.training.lora`.
        layers: Overrides of the layer table, as in a recipe.
        validation: As `data`; or a share of the data, such as 0.1, that is held out.
        objective: From module and batch to the mean loss, or to a `BatchLoss`; None: the next
            token, or cross-entropy over classes.
        tokenizer: Of a module, where the data are texts.
        head: Of a classifier in a folder: from features to logits, frozen.
        linearised: Train the model's tangent at its present weights (arXiv 2305.12827).
        settings: How to train; a mapping changes some of the defaults, which are those of
            `TrainingSettings`, and `LANGUAGE` for language models.
        reading: How data are read.
        asking: How the model is asked.
        output: What is written.

    Raises:
        RecipeError: an override is wrong.
        UsageError: the arguments are contradictory or incomplete.
        DataError: data are missing or malformed.
        OutputError: the folder is occupied, holds another run, or cannot be written.
        TaskvecError: a loss is not finite, memory ran out, or anything else foreseen.
    """
    if output.out is not None:
        places = [source for source in (data, validation) if isinstance(source, (str, Path))]
        inputs = [path for source in places for path in inputs_of(source)]
        inputs += [Path(model).expanduser()] if isinstance(model, (str, os.PathLike)) else []
        folder.refuse_overlap(output.out, inputs)
        if is_first_process():  # others may be later than what it writes
            folder.refuse_other(output.out, force=output.force)
        if output.saves_model and not isinstance(model, (str, os.PathLike)):
            raise UsageError("saving the model needs a model in a folder")
    overrides = tuple(override(entry) for entry in layers)
    learned, measured = _read(data, validation, reading)
    settings = settings_for(learned, settings)
    check_settings(settings)
    made = None if output.out is None or output.force else output.out / HEAD
    opened = _open(model, learned, tokenizer, head, asking, settings, made)
    examples = as_examples(learned, opened)
    checked = None if measured is None else as_examples(measured, opened)
    required = {name: p.requires_grad for name, p in opened.core.named_parameters()}
    prepared = _prepare(opened, train, overrides, linearised=linearised, seed=settings.seed)
    for line in (describe(prepared.selection), *opened.notes):
        output.on_message(line)
    provenance = {
        "train": train if isinstance(train, str) else ",".join(train),
        **opened.provenance,
    }
    provenance |= {"linearised": True} if linearised else {}
    provenance |= {"layers": [dict(entry) for entry in layers]} if layers else {}
    loss = opened.objective if objective is None else objective
    job = TrainingJob(
        prepared.module, prepared.within, loss, examples, checked, provenance, opened.files
    )
    sources = {"model": model, "data": data, "validation": validation}
    about = {name: str(each) for name, each in sources.items() if isinstance(each, (str, Path))}
    try:
        records = run_training(
            job, settings, output, lambda out: about | _finish(out, prepared, opened, output)
        )
    finally:
        for name, parameter in opened.core.named_parameters():
            parameter.requires_grad_(required.get(name, False))
            parameter.grad = None
    path = None if output.out is None else output.out / folder.VECTOR
    return Finetuned(prepared.vector(), prepared.selection, records, prepared.module, path)


def settings_for(
    data: Any, settings: TrainingSettings | Mapping[str, Any] | None
) -> TrainingSettings:
    """The settings for a kind of data.

    Raises:
        UsageError: a setting is unknown.
    """
    if isinstance(settings, TrainingSettings):
        return settings
    default = LANGUAGE if isinstance(data, (Documents, Conversations)) else TrainingSettings()
    known = list(asdict(default))
    for name in settings or {}:
        if name not in known:
            raise UsageError(f"settings: {name!r} is unknown; {nearest(name, known)}")
    return replace(default, **(settings or {}))


def _read(data: Any, validation: Any, reading: Reading) -> tuple[Any, Any]:
    if isinstance(data, (str, Path)):
        data = read_data(data, reading)
    if isinstance(validation, (str, Path)):
        return data, read_data(validation, reading)
    if isinstance(validation, float):
        if not isinstance(data, (Documents, Conversations, Classified)):
            raise UsageError("validation as a share needs data from a file; give validation data")
        return hold_out(data, validation, reading.seed)
    return data, validation


def _open(
    model: Any,
    data: Any,
    tokenizer: Any,
    head: Any,
    asking: HeadOptions,
    settings: TrainingSettings,
    made: Path | None,
) -> Opened:
    """The model, opened for the kind of the data."""
    if isinstance(data, (Documents, Conversations)):
        return open_language_model(model, tokenizer, asking)
    if isinstance(model, (str, os.PathLike)):
        if not isinstance(data, Classified):
            raise UsageError(
                "a model in a folder needs data from a file or the hub; or load the model"
            )
        return open_classifier(model, data, asking, head=head, made=made, settings=settings)
    if isinstance(data, Classified):
        raise UsageError("a classifier in memory needs a sequence of examples as data")
    objective = classifying(asking.label_smoothing)
    return Opened(model, lambda core: core, objective, as_examples, {})


def as_examples(data: Any, opened: Opened | None = None) -> Examples:
    """Data as examples; the items of a sequence are collated by torch."""
    if isinstance(data, Examples):
        return data
    if opened is not None and isinstance(data, (Documents, Conversations, Classified)):
        return opened.encode(data)
    collate = require("torch.utils.data", "train").default_collate
    return Examples(data, collate, _first_size)


def _first_size(batch: Any) -> int:
    while not hasattr(batch, "shape"):
        batch = next(iter(batch.values() if hasattr(batch, "values") else batch))
    return int(batch.shape[0])


def _prepare(
    opened: Opened,
    train: str | Sequence[str],
    layers: Sequence[Override],
    *,
    linearised: bool,
    seed: int,
) -> _Prepared:
    """Find the parameters that train, and prepare the model for training."""
    core = opened.core
    if wants_lora(train):
        if linearised:
            raise UsageError("lora cannot be combined with linearised; choose one")
        return _with_lora(opened, str(train), layers, seed)
    selection = _select(opened, train, layers)
    start = {name: core.get_parameter(name).detach().cpu().clone() for name in selection.names}
    anchor = start if opened.start is None else opened.start
    if linearised:
        return _linearise(opened, selection, start, anchor)
    freeze_rest(core, selection)
    module = opened.whole(core)

    def vector() -> dict[str, Any]:
        now = {name: core.get_parameter(name).detach().cpu() for name in selection.names}
        return {name: now[name] - start[name] for name in now}

    return _Prepared(
        module,
        selection,
        _within(module, core, selection),
        vector,
        lambda path, force: save_vector(
            core, anchor, selection, path, task=path.parent.name, force=force
        ),
    )


def _select(
    opened: Opened, train: str | Sequence[str], layers: Sequence[Override]
) -> ParameterSelection:
    entries = [train] if isinstance(train, str) else list(train)
    entries += _without_missing(opened)
    if opened.freezes_head and not any("heads" in entry for entry in entries):
        try:
            return select(opened.core, [*entries, "!heads"], layers)
        except ParameterError:  # the table knows no head, so that none is among what trains
            pass
    return select(opened.core, entries, layers)


def _without_missing(opened: Opened) -> list[str]:
    """Entries that deselect randomly initialized parameters, which no task vector can contain."""
    there = {name for name, _ in opened.core.named_parameters()}
    return [f"!{name}" for name in opened.missing if name in there]


def _within(module: Any, part: Any, selection: ParameterSelection) -> ParameterSelection:
    """A selection of a part of a module, in the names of the module."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    called = {name: names[id(part.get_parameter(name))] for name in selection.names}
    rows = {called[name]: rows for name, rows in selection.rows.items()}
    return replace(selection, names=tuple(called.values()), rows=rows)


def _linearise(
    opened: Opened, selection: ParameterSelection, start: Mapping[str, Any], anchor: Any
) -> _Prepared:
    from taskvec.training.linearised import Linearised

    core = opened.core
    linear = Linearised(core, selection.names, rows=selection.rows)
    module = opened.whole(linear)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    within = replace(selection, names=tuple(names[id(tau)] for tau in linear.tau), rows={})

    def vector() -> dict[str, Any]:
        return {name: tau.detach().cpu() for name, tau in linear.vector().items()}

    def save(path: Path, force: bool) -> None:
        torch = require("torch", "train")
        with torch.no_grad():
            for name, tau in linear.vector().items():
                core.get_parameter(name).add_(tau)
        try:
            save_vector(core, anchor, selection, path, task=path.parent.name, force=force)
        finally:
            with torch.no_grad():
                for name, value in start.items():
                    core.get_parameter(name).copy_(value)

    return _Prepared(module, selection, within, vector, save)


def _with_lora(opened: Opened, train: str, layers: Sequence[Override], seed: int) -> _Prepared:
    torch = require("torch", "train")
    anchor = opened.start
    if anchor is None:
        raise UsageError("lora is for models in folders; add_lora wraps a module in memory")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = [train if ":" in train else f"{train}:attention", *_without_missing(opened)]
        core, selection = add_lora(opened.core, ",".join(adapted), layers=layers)
    module = opened.whole(core)

    def vector() -> dict[str, Any]:
        base: Any = core
        weights = dict(base.get_base_model().named_parameters())
        return {
            name: tensor.cpu() - weights[name.removesuffix(".weight") + ".base_layer.weight"].cpu()
            for name, tensor in adapted_weights(core).items()
        }

    return _Prepared(
        module,
        selection,
        _within(module, core, selection),
        vector,
        lambda path, force: save_vector(
            core, anchor, selection, path, task=path.parent.name, force=force
        ),
    )


def _finish(out: Path, prepared: _Prepared, opened: Opened, output: RunOutput) -> dict[str, Any]:
    """Write the vector, and the model if requested; returns notes about the run."""
    vector = out / folder.VECTOR
    with without_bars(require("transformers", "train")):
        prepared.save(vector, True)
    if output.saves_model:
        assert opened.start is not None
        family = Family(anchor=opened.start, tasks={out.name: vector})
        whole = as_recipe(family, {"method": "task_arithmetic", "scale": 1.0})
        run(whole, out / folder.MODEL, RunOptions(force=True))
    selection = prepared.selection
    return {
        "trains": describe(selection),
        "parameters": selection.parameters,
        "total": selection.total,
        "names": list(selection.names),
        "versions": {name: version(name) for name in ("taskvec", "torch", "transformers")},
    }
