"""Judges: how harmful an answer is.

`refusals` looks for phrases, `classifier` runs a text-classification checkpoint, `endpoint` asks a
chat model behind an OpenAI-compatible server to apply the 1–5 rubric of `rubric`.
"""

from __future__ import annotations

from pathlib import Path

from taskvec.errors import UsageError, nearest
from taskvec.evaluation.judges.verdict import Judge

KINDS = ("prefixes", "classifier", "endpoint")


def parse_judge(text: str, *, device: str = "cpu", folder: Path | None = None) -> Judge:
    """The judge that a text of the command line names.

    Args:
        text: `prefixes[:LIST_OR_FILE]`, `classifier:MODEL[:LABEL][?input=pair]` or
            `endpoint:URL?model=NAME[&…]`.
        device: Where a classifier runs; see `model.load`.
        folder: Where verdicts of an endpoint are kept, to go on from; None: nowhere.

    Raises:
        UsageError: the kind of judge, an option or the device is unknown.
        DataError: a file of phrases or a rubric cannot be read.
        CheckpointError: the classifier cannot be loaded, or is not a classifier.
        MissingExtraError: a classifier needs transformers, which is not installed.
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
        f"unknown judge {kind!r}; {nearest(kind, KINDS)} "
        "(prefixes, classifier:MODEL:LABEL or endpoint:URL?model=NAME)"
    )
