"""What is trained for: mean losses over classes and over tokens."""

from __future__ import annotations

from typing import Any

from taskvec.errors import DataError
from taskvec.extras import require
from taskvec.training.loop import BatchLoss, Objective

IGNORED = -100  # target of a token that is not to be learned


def classifying(label_smoothing: float = 0.0) -> Objective:
    """Cross-entropy over classes.

    A batch is `(inputs, labels)`, or a mapping with `labels`, whose other entries the module takes
    by name. The module returns logits of shape (batch, classes), or an object that has `logits`.

    Args:
        label_smoothing: Share of the target that is spread evenly over all classes.
    """
    functional = require("torch.nn.functional", "train")

    def objective(module: Any, batch: Any) -> BatchLoss:
        if hasattr(batch, "keys"):
            labels = batch["labels"]
            found = module(**{name: batch[name] for name in batch if name != "labels"})
        else:
            inputs, labels = batch
            found = module(inputs)
        logits = getattr(found, "logits", found).float()
        _check_labels(labels, logits.shape[-1])
        loss = functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        return BatchLoss(loss, (logits.argmax(-1) == labels).sum())

    return objective


def _check_labels(labels: Any, classes: int) -> None:
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= classes:
        raise DataError(
            f"a label is {least if least < 0 else most}; the model has {classes} classes, "
            f"0 to {classes - 1}; look at the data, or at the head"
        )


def predicting_tokens(label_smoothing: float = 0.0) -> Objective:
    """Cross-entropy over the tokens that are to be learned.

    A batch has `input_ids` and `labels` of shape (batch, tokens), and `attention_mask` if some rows
    are shorter. Labels stand where their tokens do (position i is predicted from those before it),
    and are −100 where nothing is learned.

    Args:
        label_smoothing: Share of the target that is spread evenly over the vocabulary.
    """
    functional = require("torch.nn.functional", "train")

    def objective(module: Any, batch: Any) -> BatchLoss:
        asked = {name: batch[name] for name in batch if name != "labels"}
        found = module(**asked, use_cache=False)
        targets = batch["labels"][:, 1:].flatten()
        logits = getattr(found, "logits", found)[:, :-1].flatten(0, 1)
        wanted = targets != IGNORED  # a head over the whole vocabulary is wide: only what counts
        logits, targets = logits[wanted].float(), targets[wanted]
        loss = functional.cross_entropy(logits, targets, label_smoothing=label_smoothing)
        return BatchLoss(loss, (logits.argmax(-1) == targets).sum())

    return objective
