"""A run of training: the loop, with its folder, its validation and its vector."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from taskvec.checkpoints.fingerprint import chunk_digests, fingerprint, tensor_digest
from taskvec.checkpoints.memory import dtype_of, stored
from taskvec.errors import DataError, UsageError
from taskvec.extras import require
from taskvec.files import sync
from taskvec.journal import Journal
from taskvec.outputs.locking import locked
from taskvec.running.model import preserve_modes
from taskvec.training import run_folder as folder
from taskvec.training.loop import (
    Examples,
    Objective,
    Place,
    StepResult,
    change_weights,
    explain_memory_errors,
    find_gradient,
    find_place,
    hold_interrupts,
    make_optimizer,
    measure,
    set_training,
)
from taskvec.training.rows import hold_rows
from taskvec.training.selection import ParameterSelection
from taskvec.training.settings import TrainingSettings, check_settings

_ROUNDING_ONLY = ("device", "micro_batch")  # a resumed run may change these

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunOutput:
    """What is written, and when.

    Attributes:
        out: Folder; None: nothing is written.
        force: Whether its content is removed.
        save_every: Steps between two stored states.
        validate_every: Steps between two validations; None: before the first step and at the end.
        saves_model: Whether the trained model is written beside the vector, as a folder.
        tensorboard: Whether events for TensorBoard are written too.
        on_record: Called with every record of the metrics and the number of steps.
        on_message: Called with lines for the user: what trains, and notes.
    """

    out: Path | None = None
    force: bool = False
    save_every: int = 100
    validate_every: int | None = None
    saves_model: bool = False
    tensorboard: bool = False
    on_record: Callable[[Record, int], object] = lambda record, steps: None
    on_message: Callable[[str], object] = lambda text: None


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """What is trained, on what.

    Attributes:
        module: Of torch; trained in place.
        selection: What trains of it.
        objective: From module and batch to mean loss, or a `BatchLoss`.
        examples: What is trained on.
        validation: What the loss is measured on besides; None: nothing.
        provenance: What else a result depends on, for `run.json`; JSON types.
        files: Small files to put into the folder, by name.
    """

    module: Any
    selection: ParameterSelection
    objective: Objective
    examples: Examples
    validation: Examples | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def trained(self) -> dict[str, Any]:
        """The parameters that train, by name."""
        return {name: self.module.get_parameter(name) for name in self.selection.names}


def run_training(
    job: TrainingJob,
    settings: TrainingSettings,
    output: RunOutput,
    finish: Callable[[Path], Mapping[str, Any]] = lambda out: {},
) -> list[Record]:
    """Train a module in place; record every step and store what a resumed run needs.

    Ctrl-C saves the state after the last whole step.

    Args:
        job: What trains, and on which data.
        settings: Of the optimization.
        output: What is written.
        finish: Writes the results of a finished run into the folder; returns their part of
            `run.json`.

    Returns:
        A record per step and per validation, also of the steps of an earlier, interrupted run.

    Raises:
        UsageError: a setting is invalid, or the dtype of what trains is too coarse.
        DataError: there is nothing to train on.
        OutputError: the folder is occupied, holds another run, or cannot be written.
        TaskvecError: a loss is not finite, or memory ran out; the last saved state remains.
    """
    place = check_job(job, settings, output)
    job.module.to(place.device)
    optimizer = make_optimizer(job.trained, settings)
    out, is_first = output.out, place.rank == 0
    with (
        preserve_modes(job.module),
        hold_rows(job.module, job.selection.rows) as put_back,
        locked(out) if out and is_first else nullcontext(),
    ):
        done = 0
        if out is not None:
            if is_first:
                _begin(job, settings, output, place)
            place.wait()
            done = folder.load_state(out, job.trained, optimizer)
            if done == settings.steps:
                output.on_message(f"{out}: all {done:,} steps are already done")
            elif done:
                output.on_message(f"{out}: resumes after step {done:,} of {settings.steps:,}")

        def update(step: int) -> float:
            rate = change_weights(optimizer, step, settings)
            put_back()
            return rate

        with closing(Log(output, done, settings.steps, writes=is_first)) as log:
            saves = out is not None and is_first
            try:
                for step in _steps(job, settings, output, update, place, log):
                    if saves and (step % output.save_every == 0 or step == settings.steps):
                        _save(job, output, optimizer, log)
            except KeyboardInterrupt:
                if saves:
                    _save(job, output, optimizer, log)
                raise
            if out is not None and saves:
                _finish(job, output, log, finish)
            return log.records


def _finish(
    job: TrainingJob, output: RunOutput, log: Log, finish: Callable[[Path], Mapping[str, Any]]
) -> None:
    """Write the results of the run, unless they exist; store the weights without moments."""
    assert output.out is not None
    out, run = output.out, folder.read_run(output.out)
    wanted = [out / folder.VECTOR, *([out / folder.MODEL] if output.saves_model else [])]
    if "result" in run and all(path.exists() for path in wanted):
        return
    last = {key: record[key] for record in log.records for key in record}
    folder.note(out, run | {"about": finish(out), "result": last})
    folder.save_state(out, job.trained, None, log.done)


def check_job(job: TrainingJob, settings: TrainingSettings, output: RunOutput) -> Place:
    """Check a run before it starts, and find where to compute."""
    check_settings(settings)
    for name in ("save_every", "validate_every"):
        every = getattr(output, name)
        if every is not None and every < 1:
            raise UsageError(f"{name} must be above 0; got {every}")
    for role, examples in (("training", job.examples), ("validation", job.validation)):
        if examples is not None and not len(examples.items):
            raise DataError(f"there are no examples for {role}; check the data")
    for name, parameter in job.trained.items():
        kind = str(parameter.dtype).removeprefix("torch.")
        if kind not in ("float32", "float64"):
            raise UsageError(
                f"parameter {name!r} is {kind}, in which small steps are lost; load the model in "
                "float32 (arithmetic can still be bfloat16: precision)"
            )
    return find_place(settings)


def _steps(
    job: TrainingJob,
    settings: TrainingSettings,
    output: RunOutput,
    update: Callable[[int], float],
    place: Place,
    log: Log,
) -> Iterator[int]:
    """Train; yields the number of steps done after each, when it is validated too."""
    parameters = list(job.trained.values())
    every = output.validate_every or settings.steps
    while log.done < settings.steps:
        if log.done % every == 0:
            _validate(job, settings, place, log)
        set_training(job.module)
        started, step = time.perf_counter(), log.done
        found = find_gradient(
            job.module, parameters, job.objective, job.examples, settings, place, step
        )
        with (
            hold_interrupts(),
            explain_memory_errors(step, settings.micro_batch or settings.batch_size, place),
        ):
            rate = update(step)
            seconds = time.perf_counter() - started
            log.add(_record(step + 1, found, rate, seconds, job.examples.unit))
        yield log.done
    _validate(job, settings, place, log)


def _record(step: int, found: StepResult, rate: float, seconds: float, unit: str) -> Record:
    record: dict[str, Any] = {"step": step, "loss": found.loss}
    if found.correct is not None:
        record["accuracy"] = found.correct
    details = {"lr": rate, "grad_norm": found.grad_norm, unit: found.counted}
    return record | details | {"seconds": round(seconds, 6)}


def _validate(job: TrainingJob, settings: TrainingSettings, place: Place, log: Log) -> None:
    """Measure the validation loss, unless that was done before an interruption."""
    if job.validation is None or log.is_validated:
        return
    loss, correct = measure(job.module, job.objective, job.validation, settings, place)
    record: dict[str, Any] = {"step": log.done, "validation_loss": loss}
    log.add(record if correct is None else record | {"validation_accuracy": correct})


def _begin(job: TrainingJob, settings: TrainingSettings, output: RunOutput, place: Place) -> None:
    """Create or resume the folder; write the settings of the run."""
    assert output.out is not None
    known = {key: value for key, value in asdict(settings).items() if key not in _ROUNDING_ONLY}
    known |= {
        "warmup_steps": settings.warmup,
        "precision": "bfloat16" if place.bfloat16 else "float32",
        "data": _identity(job.examples),
        "validation": None if job.validation is None else _identity(job.validation),
        "start_weights": start_fingerprint(job.module),
        **job.provenance,
    }
    folder.begin(output.out, known, job.files, force=output.force)
    folder.drop_later_records(output.out, folder.stored_steps(output.out))


def _identity(examples: Examples) -> dict[str, Any]:
    return dict(examples.identity) | {"n": len(examples.items)}


def start_fingerprint(module: Any) -> str:
    """Fingerprint of a module's parameters."""
    digests, described = {}, {}
    for name, parameter in module.named_parameters():
        tensor = parameter.detach().cpu().contiguous()
        digests[name] = tensor_digest([chunk_digests(stored(tensor).reshape(-1))])
        described[name] = (dtype_of(name, tensor, "module").name, tuple(tensor.shape))
    return fingerprint(digests, described)


def _save(job: TrainingJob, output: RunOutput, optimizer: Any, log: Log) -> None:
    assert output.out is not None
    log.sync()
    folder.save_state(output.out, job.trained, optimizer, log.done)


class Log:
    """The records of a run, in memory and in its folder.

    Attributes:
        records: All of them.
        done: Steps done.
        steps: Steps in all.
    """

    def __init__(self, output: RunOutput, done: int, steps: int, *, writes: bool) -> None:
        """Take up the records up to a step.

        Args:
            output: Where they go.
            done: Steps done.
            steps: Steps in all.
            writes: Whether this process writes them.
        """
        self.done, self.steps = done, steps
        self.on_record = output.on_record
        self.records: list[Record] = []
        self._journal: Journal | None = None
        self._board: Any = None
        if output.out is not None:
            self.records += folder.metrics(output.out).read()
            if writes:
                self._journal = folder.metrics(output.out)
                if output.tensorboard:
                    self._board = _board(output.out, done)

    @property
    def is_validated(self) -> bool:
        """Whether there is a validation after the last step."""
        last = [record for record in self.records if record["step"] == self.done]
        return any("validation_loss" in record for record in last)

    def add(self, record: Record) -> None:
        """A record of a step, or of a validation."""
        self.done = record["step"]
        self.records.append(record)
        if self._journal is not None:
            with folder.explain_failure(self._journal.path, f"step {self.done} was noted"):
                self._journal.add(record)
        if self._board is not None:
            for key in record.keys() - {"step"}:
                self._board.add_scalar(key, record[key], self.done)
        self.on_record(record, self.steps)

    def sync(self) -> None:
        """Put the records on the disk."""
        if self._journal is not None:
            with folder.explain_failure(self._journal.path, f"step {self.done} was noted"):
                sync(self._journal.path)

    def close(self) -> None:
        """Close the files of TensorBoard."""
        if self._board is not None:
            self._board.close()


def _board(out: Path, done: int) -> Any:
    board = require("torch.utils.tensorboard", "train")
    return board.SummaryWriter(out / "tensorboard", purge_step=done + 1)
