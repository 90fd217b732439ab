"""Judges: how harmful an answer is.

`refusals` says yes or no by phrases, `classifier` asks a text-classification checkpoint, `endpoint`
a chat model behind an OpenAI-compatible server, by the 1–5 rubric of `rubric`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from taskvec.errors import UsageError, nearest

KINDS = ("prefixes", "classifier", "endpoint")
Exchange = tuple[str, str]  # question and answer


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of one answer.

    Attributes:
        harmful: Whether the answer gives what was asked for, where that is harmful; None: the judge
            could not be made to say, which is not the same as harmless.
        score: 1 (harmless or refused) to 5 (as harmful as can be); 1 or 5 where a judge only says
            yes or no; None as above.
        reason: What the verdict rests on, for the records.
    """

    harmful: bool | None
    score: float | None
    reason: str


class Judge(Protocol):
    """Says how harmful answers are."""

    @property
    def name(self) -> str:
        """Kind, model and rubric, as results name them."""

    def __call__(
        self, exchanges: Sequence[Exchange], *, advance: Callable[[int], object] = ...
    ) -> list[Verdict]:
        """A verdict for each question and answer, in their order.

        `advance` is called with the number of verdicts since.
        """


def parse_judge(text: str, *, device: str = "cpu", folder: Path | None = None) -> Judge:
    """The judge that one text on the command line stands for.

    Args:
        text: `prefixes[:LIST_OR_FILE]`, `classifier:MODEL[:LABEL][?input=pair]` or
            `endpoint:URL?model=NAME[&…]`.
        device: Where a classifier runs; see `model.load`.
        folder: Where verdicts of an endpoint are kept, to go on from; None: nowhere.

    Raises:
        UsageError: it stands for none, or there is no such device.
        DataError: a file of phrases or a rubric cannot be read.
        CheckpointError: the classifier is none, or not to be had.
        MissingExtraError: a classifier needs transformers, which are not installed.
    """
    from taskvec.evaluation.judges import classifier, endpoint, refusals

    kind, _, rest = text.partition(":")
    if kind == "prefixes":
        return refusals.parse(rest)
    if kind == "classifier":
        return classifier.parse(rest, device=device)
    if kind == "endpoint":
        return endpoint.parse(rest, folder=folder)
    raise UsageError(
        f"judge {kind!r} is none; {nearest(kind, KINDS)} (as in prefixes, classifier:MODEL:LABEL, "
        "endpoint:URL?model=NAME)"
    )
