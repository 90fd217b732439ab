"""Batches as large as is good: limited by memory on an accelerator, by the caches on a CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from taskvec.errors import TaskvecError
from taskvec.extras import require

T = TypeVar("T")

CPU_TOKENS = 2048  # beyond, a forward pass gets no faster and reaches out of the caches
CPU_GENERATED = 16_384  # a step reads all weights for each batch, so that many rows share them
SHARE = 0.6  # of the free memory of an accelerator


def tokens_at_once(module: Any, asked: int | None = None, *, generating: bool = False) -> int:
    """Tokens of a batch.

    On an accelerator a token is counted with its logits in float32 twice, and its hidden states of
    one layer ten times.

    Args:
        module: The model, where it will run.
        asked: What the user says; taken as it is.
        generating: Whether answers are generated, or texts read.
    """
    if asked is not None:
        return asked
    device = next(module.parameters()).device
    if device.type == "cpu":
        return CPU_GENERATED if generating else CPU_TOKENS
    torch = require("torch", "eval")
    config = module.config.get_text_config()
    itemsize = next(module.parameters()).element_size()
    a_token = 8 * config.vocab_size + 10 * itemsize * config.hidden_size
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 << 30
    return max(CPU_TOKENS, min(1 << 17, int(SHARE * free / a_token)))


def by_length(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Places in batches, the longest first, none of more than `tokens` with its padding.

    >>> list(by_length([3, 9, 4, 5], 10))
    [[1], [3, 2], [0]]
    """
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def halving(batch: list[int], work: Callable[[list[int]], list[T]], where: str) -> list[T]:
    """The results of a batch, in halves where there is too little memory for the whole.

    Raises:
        TaskvecError: not even one fits.
    """
    torch = require("torch", "eval")
    try:
        return work(batch)
    except torch.OutOfMemoryError:
        pass
    except RuntimeError as error:  # what the allocator of the CPU raises
        if "allocate memory" not in str(error):
            raise
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    if len(batch) == 1:
        raise TaskvecError(
            f"{where}: not enough memory for one sample; use a shorter context (--context), "
            "a narrower --dtype, or --device cpu"
        )
    middle = len(batch) // 2
    return halving(batch[:middle], work, where) + halving(batch[middle:], work, where)
