"""Tasks of lm-evaluation-harness, asked and kept like our own.

`harness:NAME` makes one of our tasks from one of the harness: its documents, prompts and worked
examples become samples, and its filters and metrics score the replies of our own likelihood and
generation code. So batches, intervals, paired differences, limits and resuming are the same for
all tasks. The harness's own evaluator, which sets the seeds of the whole process, is not used;
its task code runs with random states of its own, which are put back afterwards.

Source: lm-evaluation-harness, github.com/EleutherAI/lm-evaluation-harness, from 0.4.12.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from taskvec.errors import DataError, TaskvecError, UsageError
from taskvec.evaluation.harness_scores import (
    Asked,
    apart,
    harness_metrics,
    harness_scores,
)
from taskvec.evaluation.task import Replies, RowsByRole, Sample, SampleSettings, Score, Task, Tools
from taskvec.extras import require
from taskvec.journal import finite
from taskvec.running.requests import Continuation, Prompt, Request, Text, WholeText

PREFIX = "harness:"
MAX_NEW_TOKENS = 256  # of the harness, where a task names no limit
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_WITHOUT_EFFECT = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "num_beams": 1, "repetition_penalty": 1}
_SAMPLING = ("top_p", "top_k", "min_p")  # what a greedy answer does not depend on


def harness_tasks(
    names: Sequence[str],
    settings: SampleSettings,
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
    with apart(settings.seed):
        manager = _manager(manager_of, wanted, include_path)
    found = {}
    for name, theirs in zip(names, wanted, strict=True):
        _check(manager, theirs, allow_code_execution)
        try:
            with apart(settings.seed):
                loaded = manager.load([theirs])["tasks"]
        except Exception as error:  # task code and the libraries of data may raise anything
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


def _task(name: str, inner: Any, settings: SampleSettings, allow_code_execution: bool) -> Task:
    """One of our tasks from an `lm_eval.api.task.Task`."""
    if getattr(inner, "UNSAFE_CODE", False) and not allow_code_execution:
        raise _unsafe(name)
    if getattr(inner, "MULTIMODAL", False):
        raise UsageError(f"task {PREFIX + name!r} asks about pictures or sound; only text is asked")
    shots = _shots(name, inner.get_config("num_fewshot"), settings.shots)
    asked: dict[str, Asked] = {}  # by sample

    def samples(rows: RowsByRole, settings: SampleSettings) -> list[Sample]:
        with _name_errors(PREFIX + name, "its samples cannot be made"), apart(settings.seed):
            made = []
            for each, instances in _instances(inner, shots, settings).items():
                requests = [_requests(PREFIX + name, instance) for instance in instances]
                asked[each] = [*zip(instances, map(len, requests), strict=True)]
                made.append(_sample(inner, each, instances, requests))
            return made

    def score(samples: Sequence[Sample], replies: Sequence[Replies], tools: Tools) -> list[Score]:
        with _name_errors(PREFIX + name, "cannot be scored"), apart(tools.seed):
            mine = [asked[sample.id] for sample in samples]
            return harness_scores(inner, mine, replies, tools.advance)

    in_conversations = settings.apply_chat_template and inner.OUTPUT_TYPE != "loglikelihood_rolling"
    return Task(
        name=PREFIX + name,
        summary=f"{name} of lm-evaluation-harness",
        files=(),
        samples=samples,
        score=score,
        metrics=(),
        late_metrics=lambda scores: harness_metrics(inner, scores),
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


def _instances(inner: Any, shots: int, settings: SampleSettings) -> dict[str, list[Any]]:
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


def _sample(
    inner: Any, name: str, instances: Sequence[Any], requests: Sequence[Sequence[Request]]
) -> Sample:
    is_text = inner.OUTPUT_TYPE == "loglikelihood_rolling"  # which the request has already
    reference = {} if is_text else {"target": finite(inner.doc_to_target(instances[0].doc))}
    return Sample(name, tuple(each for some in requests for each in some), reference)


def _requests(task: str, instance: Any) -> list[Request]:
    """Our requests for one of the harness; several where answers are drawn."""
    kind, args = instance.request_type, instance.args
    if kind == "loglikelihood":
        return [Continuation(args[0], args[1])]
    if kind == "loglikelihood_rolling":
        return [WholeText(args[0])]
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


# Errors


@contextmanager
def _name_errors(task: str, what: str) -> Iterator[None]:
    """Errors of the harness's code with the name of the task."""
    try:
        yield
    except TaskvecError:
        raise
    except Exception as error:  # task code may raise anything
        raise DataError(f"task {task!r}: {what}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0].rstrip(": ")
