"""The training loop: AdamW with a linear warm-up, a cosine decay and clipped gradients.

It trains any torch module on anything that can be drawn and put together, and knows no files. What
a step does depends on the seed, the number of the step and the weights alone, so that a run that
resumes from stored weights gives the bits of one that was never interrupted (on the CPU, with as
many threads). accelerate moves batches, knows what out of memory looks like, and adds up over
processes; the Trainer of transformers was the alternative, and wants models and data of its kind.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from taskvec.errors import TaskvecError, UsageError
from taskvec.extras import require
from taskvec.running.model import find_device, preserve_modes
from taskvec.training.settings import TrainingSettings, learning_rate_at


class BatchLoss(NamedTuple):
    """The result of an objective on a batch.

    Attributes:
        loss: Mean over the counted items of the batch; a scalar with a gradient.
        correct: Number of correct predictions among them; None if unknown.
    """

    loss: Any
    correct: Any = None


Objective = Callable[[Any, Any], Any]  # module, batch → mean loss, or an `BatchLoss`


@dataclass(frozen=True, slots=True)
class Examples:
    """Examples for training or validation.

    Attributes:
        items: Any sequence; only `len` and indexing are used.
        collate: Makes a batch of items: tensors in mappings, tuples and lists.
        count: Number of counted items in a batch, such as answer tokens or images; means over
            several batches are weighted by it.
        unit: Of the count: `examples` or `tokens`.
        identity: For the record: `n` and, if known, a digest.
    """

    items: Sequence[Any]
    collate: Callable[[Sequence[Any]], Any]
    count: Callable[[Any], int]
    unit: str = "examples"
    identity: Mapping[str, Any] = field(default_factory=dict)


class StepResult(NamedTuple):
    """Figures of a step before the update.

    Attributes:
        loss: Mean over the counted items, in nats.
        correct: Accuracy; None if unknown.
        grad_norm: Of the gradient before clipping.
        counted: Number of counted items.
    """

    loss: float
    correct: float | None
    grad_norm: float
    counted: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where to compute: this process among those of one run.

    Attributes:
        device: Of torch.
        bfloat16: Whether arithmetic is bfloat16 where autocast allows.
        rank: Number of this process.
        processes: How many there are, as `accelerate launch` starts them.
    """

    device: Any
    bfloat16: bool
    rank: int = 0
    processes: int = 1

    def total(self, tensor: Any) -> Any:
        """Sum of a tensor over the processes."""
        if self.processes == 1:
            return tensor
        return require("accelerate", "train").utils.reduce(tensor, "sum")

    def totals(self, *numbers: float) -> list[float]:
        """Sums of numbers over the processes."""
        if self.processes == 1:
            return list(numbers)
        torch = require("torch", "train")
        sums = self.total(torch.tensor(numbers, dtype=torch.float64, device=self.device))
        return [float(number) for number in sums]

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.processes > 1:
            require("accelerate", "train").PartialState().wait_for_everyone()

    def computing(self) -> Any:
        """A context for running the model."""
        torch = require("torch", "train")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)


def find_place(settings: TrainingSettings) -> Place:
    """The device of this process; several processes are joined by accelerate.

    Raises:
        UsageError: the device does not exist, or the batch cannot be divided between processes.
    """
    torch = require("torch", "train")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rank = 0
    if processes > 1:
        state = require("accelerate", "train").PartialState(cpu=settings.device == "cpu")
        device, rank = state.device, state.process_index
        if settings.batch_size % processes:
            raise UsageError(
                f"batch_size must be a multiple of the {processes} processes; "
                f"got {settings.batch_size}"
            )
    else:
        device = find_device(settings.device)
    narrow = settings.precision == "bfloat16"
    if settings.precision == "auto" and device.type != "cpu":
        narrow = device.type != "cuda" or torch.cuda.is_bf16_supported()
    return Place(device, narrow, rank, processes)


def draw_examples(step: int, count: int, settings: TrainingSettings) -> list[int]:
    """The examples of a step: the next of an endless row of shuffled rounds through all of them.

    Args:
        step: From 0.
        count: How many examples there are.
        settings: Batch size and seed.
    """
    first = step * settings.batch_size
    rounds = range(first // count, (first + settings.batch_size - 1) // count + 1)
    orders = [np.random.default_rng([settings.seed, turn]).permutation(count) for turn in rounds]
    start = first - rounds[0] * count
    return [int(i) for i in np.concatenate(orders)[start : start + settings.batch_size]]


def is_first_process() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def make_optimizer(trained: Mapping[str, Any], settings: TrainingSettings) -> Any:
    """AdamW over parameters by name."""
    torch = require("torch", "train")
    return torch.optim.AdamW(
        list(trained.values()), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )


def find_gradient(
    module: Any,
    parameters: Sequence[Any],
    objective: Objective,
    examples: Examples,
    settings: TrainingSettings,
    place: Place,
    step: int,
) -> StepResult:
    """The gradient of a step, clipped, in the parameters; no weight is changed.

    Args:
        module: Of torch, on the device of `place`, in training mode.
        parameters: What trains.
        objective: From module and batch to mean loss, or an `BatchLoss`.
        examples: What is trained on.
        settings: How.
        place: Where.
        step: From 0.

    Raises:
        TaskvecError: the loss or the gradient is not finite, or memory ran out.
        UsageError: the loss does not depend on what trains.
    """
    torch = require("torch", "train")
    rows = draw_examples(step, len(examples.items), settings)[place.rank :: place.processes]
    size = settings.micro_batch or len(rows)
    for parameter in parameters:
        parameter.grad = None
    with explain_memory_errors(step, size, place), _seed_step(settings, step, place):
        loss, correct, count = _gradient(module, objective, examples, rows, size, place)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = place.total(parameter.grad)
        _check_finite(step, "loss", loss)
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip).item()
        _check_finite(step, "norm of the gradient", norm)
    return StepResult(loss, correct, norm, count)


def change_weights(optimizer: Any, step: int, settings: TrainingSettings) -> float:
    """Update the weights by the gradient; returns the learning rate."""
    rate = learning_rate_at(step, settings)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return rate


def _gradient(
    module: Any,
    objective: Objective,
    examples: Examples,
    rows: Sequence[int],
    size: int,
    place: Place,
) -> tuple[float, float | None, int]:
    """Add the gradient of the mean loss of a batch to the parameters; loss, accuracy, count."""
    batches = [
        examples.collate([examples.items[i] for i in rows[at : at + size]])
        for at in range(0, len(rows), size)
    ]
    counts = [examples.count(batch) for batch in batches]
    (count,) = place.totals(sum(counts))
    total, right, is_known = 0.0, 0.0, True
    for batch, mine in zip(batches, counts, strict=True):
        if mine == 0:
            continue
        outcome = _outcome(module, objective, batch, place)
        if not outcome.loss.requires_grad:
            raise UsageError("the loss does not depend on any parameter that trains")
        (outcome.loss * (mine / count)).backward()
        total += outcome.loss.item() * mine
        is_known = is_known and outcome.correct is not None
        right += 0 if outcome.correct is None else float(outcome.correct)
    total, right = place.totals(total, right)
    return total / max(count, 1), right / max(count, 1) if is_known else None, int(count)


def _outcome(module: Any, objective: Objective, batch: Any, place: Place) -> BatchLoss:
    batch = require("accelerate", "train").utils.send_to_device(batch, place.device)
    with place.computing():
        found = objective(module, batch)
    return found if isinstance(found, BatchLoss) else BatchLoss(found)


def measure(
    module: Any, objective: Objective, examples: Examples, settings: TrainingSettings, place: Place
) -> tuple[float, float | None]:
    """Mean loss and share predicted rightly over all examples; the module stays in its mode.

    Every process measures everything, so all have the same result.
    """
    torch = require("torch", "train")
    size = settings.micro_batch or settings.batch_size
    total, right, count = 0.0, 0.0, 0
    is_known = True
    with preserve_modes(module), torch.no_grad():
        module.eval()
        for at in range(0, len(examples.items), size):
            stop = min(at + size, len(examples.items))
            batch = examples.collate([examples.items[i] for i in range(at, stop)])
            mine = examples.count(batch)
            if mine == 0:
                continue
            outcome = _outcome(module, objective, batch, place)
            total += float(outcome.loss) * mine
            is_known = is_known and outcome.correct is not None
            right += 0.0 if outcome.correct is None else float(outcome.correct)
            count += mine
    return total / max(count, 1), right / max(count, 1) if is_known else None


def set_training(module: Any) -> None:
    """Training mode, except for layers with running statistics."""
    module.train()
    for part in module.modules():
        if getattr(part, "running_mean", None) is not None:
            part.eval()


@contextlib.contextmanager
def _seed_step(settings: TrainingSettings, step: int, place: Place) -> Iterator[None]:
    """Random numbers of a step; the caller's random state is restored."""
    torch = require("torch", "train")
    is_accelerator = place.device.type == "cuda"
    seeds = np.random.SeedSequence([settings.seed, step, place.rank]).generate_state(1, np.uint64)
    with torch.random.fork_rng(devices=[place.device] if is_accelerator else []):
        torch.manual_seed(int(seeds[0] >> np.uint64(1)))
        yield


@contextlib.contextmanager
def explain_memory_errors(step: int, size: int, place: Place) -> Iterator[None]:
    """Report that memory ran out, with a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_out_of_memory = require("accelerate", "train").utils.memory.should_reduce_batch_size
        if not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise
        raise TaskvecError(
            f"step {step + 1}: out of memory on {place.device} with {size} examples at once; "
            f"give a smaller --micro-batch, such as {max(size // 2, 1)}: the steps stay the same"
        ) from error


def _check_finite(step: int, what: str, value: float) -> None:
    if not math.isfinite(value):
        raise TaskvecError(
            f"step {step + 1}: the {what} is {value}; the weights are left as they were before "
            "this step; try a smaller learning rate, or look at the data of this step"
        )


@contextlib.contextmanager
def hold_interrupts() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the block is complete."""
    if threading.current_thread() is not threading.main_thread():  # they do not reach others
        yield
        return
    came: list[int] = []
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not None]
    handlers = {n: signal.signal(n, lambda number, _: came.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])
