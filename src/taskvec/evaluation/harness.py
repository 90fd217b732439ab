"""Tasks of lm-evaluation-harness, asked and kept like our own.

`harness:NAME` makes one of our tasks from one of the harness: its documents, prompts and worked
examples become samples, and its filters and metrics score the replies of our own likelihood and
generation code. So batches, intervals, paired differences, limits and resuming are the same for
all tasks. The harness's own evaluator, which sets the seeds of the whole process, is not used;
its task code runs with random states of its own, which are put back afterwards.

Source: lm-evaluation-harness, github.com/EleutherAI/lm-evaluation-harness, from 0.4.12.
"""

from __future__ import annotations

import io
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from taskvec.errors import DataError, TaskvecError, UsageError
from taskvec.evaluation.figures import items_of
from taskvec.evaluation.task import (
    Answer,
    Continuation,
    Document,
    Likelihood,
    Metric,
    Prompt,
    Replies,
    Reply,
    Request,
    Rows,
    Sample,
    Score,
    Settings,
    Task,
    Text,
    Tools,
)
from taskvec.extras import require

PREFIX = "harness:"
MAX_NEW_TOKENS = 256  # of the harness, where a task names no limit
WEIGHT = " (weight)"
SCALES = {  # of aggregations that are figures of ours; a log-likelihood becomes nats or bits
    "mean": 1.0,
    "perplexity": -1.0,
    "weighted_perplexity": -1.0,
    "bits_per_byte": -1 / math.log(2),
}
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_WITHOUT_EFFECT = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "num_beams": 1, "repetition_penalty": 1}
_SAMPLING = ("top_p", "top_k", "min_p")  # what a greedy answer does not depend on


def harness_tasks(
    names: Sequence[str],
    settings: Settings,
    *,
    include_path: Path | None = None,
    allow_code_execution: bool = False,
) -> dict[str, list[Task]]:
    """Tasks of the harness as ours, by the name that was asked for.

    Args:
        names: With the prefix `harness:`; a group or a tag of the harness gives several tasks.
        settings: How samples are made.
        include_path: Folder of task files of one's own; they come before those of the harness,
            which are not read (that takes seconds) where the folder has all that is asked for.
        allow_code_execution: Whether tasks may run programs that the model wrote.

    Raises:
        MissingExtraError: the harness is not installed.
        UsageError: there is no such task, or it runs programs and may not.
        DataError: its data or its code cannot be loaded.
    """
    manager_of = require("lm_eval.tasks", "harness").TaskManager
    wanted = [name.removeprefix(PREFIX) for name in names]
    with _apart(settings.seed):
        manager = _manager(manager_of, wanted, include_path)
    found = {}
    for name, theirs in zip(names, wanted, strict=True):
        _check(manager, theirs, allow_code_execution)
        try:
            with _apart(settings.seed):
                loaded = manager.load([theirs])["tasks"]
        except Exception as error:  # whatever task code and the libraries of data raise
            raise DataError(
                f"task {name!r} cannot be loaded: {_line(error)}; its data must be in the cache of "
                "datasets, or in local files that a task file in --include-path names"
            ) from error
        found[name] = [
            _task(theirs, inner, settings, allow_code_execution) for theirs, inner in loaded.items()
        ]
    return found


def _manager(manager_of: Any, wanted: Sequence[str], include_path: Path | None) -> Any:
    """An index of task files that has what is wanted, if any has."""
    if include_path is None:
        return manager_of()
    if not include_path.is_dir():
        raise UsageError(f"--include-path {include_path}: no such folder")
    own = manager_of(include_path=str(include_path), include_defaults=False)
    entries = [own.task_index.get(name) for name in wanted]
    # Members of a group may be the harness's own.
    if all(entry is not None and entry.kind.name != "GROUP" for entry in entries):
        return own
    return manager_of(include_path=str(include_path))


def _check(manager: Any, name: str, allow_code_execution: bool) -> None:
    """Refuse an unknown task, and one that says that it runs programs, before its code is read."""
    entry = manager.task_index.get(name)
    if entry is None:
        close = get_close_matches(name, manager.all_tasks, n=1)
        hint = f"did you mean '{PREFIX}{close[0]}'?" if close else "`lm_eval ls tasks` lists them"
        raise UsageError(f"lm-evaluation-harness has no task {PREFIX + name!r}; {hint}")
    if (entry.cfg or {}).get("unsafe_code") and not allow_code_execution:
        raise _unsafe(name)


def _unsafe(name: str) -> UsageError:
    return UsageError(
        f"task {PREFIX + name!r} runs programs that the model writes, without our guards; allow "
        "that with --allow-code-execution and HF_ALLOW_CODE_EVAL=1, or take a task of our own"
    )


def _task(name: str, inner: Any, settings: Settings, allow_code_execution: bool) -> Task:
    """One of our tasks from an `lm_eval.api.task.Task`."""
    if getattr(inner, "UNSAFE_CODE", False) and not allow_code_execution:
        raise _unsafe(name)
    if getattr(inner, "MULTIMODAL", False):
        raise UsageError(f"task {PREFIX + name!r} asks about pictures or sound; only text is asked")
    shots = _shots(name, inner.get_config("num_fewshot"), settings.shots)
    asked: dict[str, list[Any]] = {}  # requests of the harness by sample

    def samples(rows: Rows, settings: Settings) -> list[Sample]:
        with _told(PREFIX + name, "its samples cannot be made"), _apart(settings.seed):
            asked.update(_instances(inner, shots, settings))
            return [_sample(PREFIX + name, inner, each, asked[each]) for each in asked]

    def score(samples: Sequence[Sample], replies: Sequence[Replies], tools: Tools) -> list[Score]:
        with _told(PREFIX + name, "cannot be scored"), _apart(tools.seed):
            mine = [asked[sample.id] for sample in samples]
            return _scores(PREFIX + name, inner, mine, replies, tools)

    in_conversations = settings.apply_chat_template and inner.OUTPUT_TYPE != "loglikelihood_rolling"
    return Task(
        name=PREFIX + name,
        summary=f"{name} of lm-evaluation-harness",
        files=(),
        samples=samples,
        score=score,
        metrics=(),
        late_metrics=lambda scores: _metrics(inner, scores),
        needs=("chat",) if in_conversations else (),
        version=inner.VERSION,
        source="lm-evaluation-harness",
        about={
            "lm_eval": version("lm_eval"),
            "shots": shots,
            "apply_chat_template": in_conversations,
        },
    )


def _shots(name: str, own: int | None, asked: int | None) -> int:
    """Worked examples in front of a question; the harness holds to 0 where a task says so."""
    if asked and own == 0:
        raise UsageError(f"task {PREFIX + name!r} takes no worked examples; leave out --shots")
    return (own or 0) if asked is None else asked


# Samples


def _instances(inner: Any, shots: int, settings: Settings) -> dict[str, list[Any]]:
    """The harness's requests of every document, in the order that its metrics take them in."""
    inner.set_config(key="num_fewshot", value=shots)
    inner.set_fewshot_seed(seed=settings.seed)
    chat = settings.apply_chat_template
    inner.build_all_requests(
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        chat_template=_conversation if chat else None,
    )
    found: dict[str, list[Any]] = {}
    for instance in inner.instances:
        found.setdefault(str(instance.doc_id), []).append(instance)
    return {each: sorted(mine, key=lambda one: int(one.idx)) for each, mine in found.items()}


def _conversation(messages: Sequence[Mapping[str, str]], **_: Any) -> Text:
    """What the harness takes for a chat template: the model's comes later, with the model."""
    return tuple((message["role"], message["content"]) for message in messages)


def _sample(task: str, inner: Any, name: str, instances: Sequence[Any]) -> Sample:
    requests = [request for each in instances for request in _requests(task, each)]
    is_text = inner.OUTPUT_TYPE == "loglikelihood_rolling"  # which the request has already
    reference = {} if is_text else {"target": _plain(inner.doc_to_target(instances[0].doc))}
    return Sample(name, tuple(requests), reference)


def _requests(task: str, instance: Any) -> list[Request]:
    """Our requests for one of the harness; several where answers are drawn."""
    kind, args = instance.request_type, instance.args
    if kind == "loglikelihood":
        return [Continuation(args[0], args[1])]
    if kind == "loglikelihood_rolling":
        return [Document(args[0])]
    if kind != "generate_until":
        raise UsageError(f"task {task!r} makes requests of a kind {kind!r}, which is not known")
    how = dict(args[1])
    stop, sampled = how.pop("until", None) or [], how.pop("do_sample", None)
    stop = [stop] if isinstance(stop, str) else stop
    limits = [how.pop(key) for key in _LIMITS if how.get(key) is not None]
    temperature = float(how.pop("temperature", 1.0 if sampled else 0.0))
    temperature = 0.0 if sampled is False else temperature
    for key, value in how.items():
        if key not in _WITHOUT_EFFECT or (
            value not in (None, _WITHOUT_EFFECT[key])
            and not (key in _SAMPLING and temperature == 0.0)
        ):
            raise UsageError(f"task {task!r} generates with {key} = {value!r}, which is not done")
    return [
        Prompt(
            text=args[0],
            max_new_tokens=int(limits[0]) if limits else MAX_NEW_TOKENS,
            stop=tuple(text for text in stop if text),
            temperature=temperature,
            draw=draw,
        )
        for draw in range(instance.repeats if temperature > 0 else 1)
    ]


# Scores


def _scores(
    task: str,
    inner: Any,
    asked: Sequence[Sequence[Any]],
    replies: Sequence[Replies],
    tools: Tools,
) -> list[Score]:
    """The harness's metrics of every document's replies."""
    for instances, mine in zip(asked, replies, strict=True):
        left = iter(mine)
        for instance in instances:
            own = [_response(instance, next(left)) for _ in _requests(task, instance)]
            instance.resps = own * instance.repeats if len(own) == 1 else own
            instance.filtered_resps = {}
    inner._instances = [instance for instances in asked for instance in instances]
    inner.apply_filters()
    notes: list[dict[str, Any]] = []
    for instances, mine in zip(asked, replies, strict=True):
        broken = any(_is_nan(reply) for reply in mine)
        filtered = [_plain(one.filtered_resps) for one in instances if _generates(one)]
        notes.append({"items": _items(inner, instances, broken=broken), "filtered": filtered})
        tools.advance(1)
    metrics = _metrics(inner, [Score({}, note) for note in notes])
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
            found[label] = _plain(item)
    return found


def _metrics(inner: Any, scores: Sequence[Score]) -> tuple[Metric, ...]:
    """Metrics that the scores have, in the order of the first document that has them."""
    every = [score.notes["items"] for score in scores]
    labels = dict.fromkeys(label for items in every for label in items)
    return tuple(
        _metric(inner, label, [items[label] for items in every if label in items])
        for label in labels
    )


def _metric(inner: Any, label: str, items: Sequence[Any]) -> Metric:
    """How the harness makes one figure of a metric.

    Means, ratios and perplexities are figures of ours; whatever else it does is done by its own
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
    found: Callable[[Sequence[Any]], Any] = own or _registered("mean")
    return found


def _how(inner: Any, label: str) -> str:
    """Which of `SCALES` an aggregation is; empty: none."""
    own = _aggregation(inner, label)
    return next((name for name in SCALES if own is _registered(name)), "")


def _registered(name: str) -> Any:
    return require("lm_eval.api.registry", "harness").get_aggregation(name)


def _quiet(own: Callable[[Sequence[Any]], Any]) -> Callable[[Sequence[Any]], float]:
    """An aggregation for resamples, some of which have no value, such as those of one class."""

    def aggregate(items: Sequence[Any]) -> float:
        try:
            with _apart(0):
                return float(own(items))
        except Exception:  # whatever it raises
            return math.nan

    return aggregate


# The harness's code and ours


@contextmanager
def _apart(seed: int) -> Iterator[None]:
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


@contextmanager
def _told(task: str, what: str) -> Iterator[None]:
    """Errors of the harness's code with the name of the task."""
    try:
        yield
    except TaskvecError:
        raise
    except Exception as error:  # whatever task code raises
        raise DataError(f"task {task!r}: {what}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0].rstrip(": ")


def _plain(value: Any) -> Any:
    """A value as JSON has it; what is not finite becomes None."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
