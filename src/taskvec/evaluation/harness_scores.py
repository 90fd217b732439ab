"""What the metrics of lm-evaluation-harness say of our replies.

The filters and metrics of a task of the harness give each document its items. Means, ratios and
perplexities of items are figures of ours, with intervals; other aggregations stay the harness's.
"""

from __future__ import annotations

import io
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import numpy as np

from taskvec.evaluation.intervals import items_of
from taskvec.evaluation.task import Metric, Replies, Score
from taskvec.extras import require
from taskvec.journal import finite
from taskvec.running.requests import Answer, Likelihood, Reply

WEIGHT = " (weight)"
SCALES = {  # of aggregations that are figures of ours; a log-likelihood becomes nats or bits
    "mean": 1.0,
    "perplexity": -1.0,
    "weighted_perplexity": -1.0,
    "bits_per_byte": -1 / math.log(2),
}

Asked = Sequence[tuple[Any, int]]  # requests of the harness, each with the number of ours


def harness_scores(
    inner: Any,
    asked: Sequence[Asked],
    replies: Sequence[Replies],
    advance: Callable[[int], object],
) -> list[Score]:
    """The items of every document.

    Args:
        inner: An `lm_eval.api.task.Task`.
        asked: The requests for each document.
        replies: To each document, in the order of its requests.
        advance: Called with the documents scored since.

    Returns:
        Scores with items and filtered answers in their notes.
    """
    documents = [[instance for instance, _ in each] for each in asked]
    for each, mine in zip(asked, replies, strict=True):
        left = iter(mine)
        for instance, count in each:
            own = [_response(instance, next(left)) for _ in range(count)]
            instance.resps = own * instance.repeats if count == 1 else own
            instance.filtered_resps = {}
    inner._instances = [instance for instances in documents for instance in instances]
    inner.apply_filters()
    notes: list[dict[str, Any]] = []
    for instances, mine in zip(documents, replies, strict=True):
        broken = any(_is_nan(reply) for reply in mine)
        filtered = [finite(one.filtered_resps) for one in instances if _generates(one)]
        notes.append({"items": _items(inner, instances, broken=broken), "filtered": filtered})
        advance(1)
    metrics = harness_metrics(inner, [Score({}, note) for note in notes])
    if not any(_is_nan(reply) for mine in replies for reply in mine):
        for metric in metrics:  # an aggregation that fails does so here, with its reason
            if metric.aggregate is not None:
                _aggregation(inner, metric.name)(items_of(metric.name, notes))
    return [Score(_values(inner, metrics, note["items"]), note) for note in notes]


def _generates(instance: Any) -> bool:
    return bool(instance.request_type == "generate_until")


def _response(instance: Any, reply: Reply) -> Any:
    """A reply as the harness has it."""
    if isinstance(reply, Answer):
        return reply.text
    if instance.request_type == "loglikelihood_rolling":
        return reply.log_likelihood
    return (reply.log_likelihood, reply.is_greedy)


def _is_nan(reply: Reply) -> bool:
    return isinstance(reply, Likelihood) and math.isnan(reply.log_likelihood)


def _items(inner: Any, instances: Sequence[Any], *, broken: bool) -> dict[str, Any]:
    """What the harness gives one document in each metric, by metric and filter.

    Where a likelihood is NaN, which of them is the largest means nothing: nothing is right then.
    """
    found = {}
    for name in instances[0].filtered_resps:
        responses = [each.filtered_resps[name] for each in instances]
        for metric, item in inner.process_results(instances[0].doc, responses).items():
            label = str(metric) if name == "none" else f"{metric},{name}"
            if broken and isinstance(item, (bool, int, float, np.number)):
                item = 0.0 if inner.higher_is_better().get(metric, True) else math.nan
            found[label] = finite(item)
    return found


def harness_metrics(inner: Any, scores: Sequence[Score]) -> tuple[Metric, ...]:
    """Metrics that the scores have, in the order of the first document that has them."""
    every = [score.notes["items"] for score in scores]
    labels = dict.fromkeys(label for items in every for label in items)
    return tuple(
        _metric(inner, label, [items[label] for items in every if label in items])
        for label in labels
    )


def _metric(inner: Any, label: str, items: Sequence[Any]) -> Metric:
    """How the harness makes one figure of a metric.

    Means, ratios and perplexities are figures of ours; anything else is done by its own
    function.
    """
    up = inner.higher_is_better().get(label.partition(",")[0], True)
    how = _how(inner, label)
    if how in SCALES and all(isinstance(item, list) for item in items):
        kind = "ratio" if how == "bits_per_byte" else "perplexity"
        return Metric(label, kind, up, per=label + WEIGHT)
    if how in ("mean", "perplexity") and all(
        isinstance(item, (int, float, type(None))) for item in items
    ):
        is_rate = how == "mean" and all(item in (0, 1) for item in items)
        return Metric(label, "rate" if is_rate else how, up)
    return Metric(label, "own", up, aggregate=_quiet(_aggregation(inner, label)))


def _values(inner: Any, metrics: Sequence[Metric], items: Mapping[str, Any]) -> dict[str, float]:
    """The values of one document that its metrics are worked out from."""
    found = {}
    for metric in metrics:
        if metric.aggregate is None and metric.name in items:
            item = items[metric.name]
            value, *weight = item if isinstance(item, list) else [item]
            found[metric.name] = SCALES[_how(inner, metric.name)] * _number(value)
            if metric.per:
                found[metric.per] = _number(weight[0])
    return found


def _aggregation(inner: Any, label: str) -> Callable[[Sequence[Any]], Any]:
    """The harness's function from the items of all documents to one value."""
    own = inner.aggregation().get(label.partition(",")[0])
    found: Callable[[Sequence[Any]], Any] = own or _aggregation_named("mean")
    return found


def _how(inner: Any, label: str) -> str:
    """Which of `SCALES` an aggregation is; empty: none."""
    own = _aggregation(inner, label)
    return next((name for name in SCALES if own is _aggregation_named(name)), "")


def _aggregation_named(name: str) -> Any:
    return require("lm_eval.api.registry", "harness").get_aggregation(name)


def _quiet(own: Callable[[Sequence[Any]], Any]) -> Callable[[Sequence[Any]], float]:
    """An aggregation for resamples, some of which have no value, such as those of one class."""

    def aggregate(items: Sequence[Any]) -> float:
        try:
            with apart(0):
                return float(own(items))
        except Exception:  # it may raise anything
            return math.nan

    return aggregate


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


# The harness's code and ours


@contextmanager
def apart(seed: int) -> Iterator[None]:
    """Code of the harness runs with this seed, prints nothing, and leaves no random state behind.

    Task code shuffles with the generators of the whole process.
    """
    torch = require("torch", "eval")
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with (
        warnings.catch_warnings(),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
        torch.random.fork_rng(devices=[]),
    ):
        warnings.simplefilter("ignore")
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
