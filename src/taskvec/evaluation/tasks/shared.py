"""What tasks have in common: ids of samples, worked examples, replies of one kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from taskvec.errors import DataError, UsageError
from taskvec.evaluation.data import DataRow
from taskvec.evaluation.task import Replies, RowsByRole, Sample, SampleSettings
from taskvec.running.requests import Answer, Likelihood


def with_ids(rows: Sequence[DataRow], *keys: str) -> list[tuple[str, DataRow]]:
    """Rows with the ids of their samples.

    Args:
        rows: Of one data set, in order.
        keys: Fields that may hold the data's own id; the first that is there counts. Without any,
            the id is the row number.

    Raises:
        DataError: an id is there twice.
    """
    found: dict[str, DataRow] = {}
    for number, row in enumerate(rows):
        name = str(next((row.data[key] for key in keys if key in row.data), number))
        if name in found:
            raise DataError(
                f"{row.where}: id {name!r} is there already, at {found[name].where}; "
                "every row needs an id of its own"
            )
        found[name] = row
    return list(found.items())


def nonblank_text(row: DataRow, *keys: str) -> str:
    """The text under the first of these keys that is there.

    Raises:
        DataError: there is none, it is no text, or it is blank.
    """
    text = row.text(*keys)
    if not text.strip():
        raise DataError(f"{row.where}: {keys[0]!r} must not be blank")
    return text


def worked_examples(
    task: str, rows: RowsByRole, settings: SampleSettings, own: int
) -> Sequence[DataRow]:
    """The rows of worked examples: the first of the train data.

    Args:
        task: Its name, for messages.
        rows: Of the task, by role.
        settings: Says how many, or nothing.
        own: How many where the user does not say.

    Raises:
        DataError: there are not so many.
    """
    wanted = own if settings.shots is None else settings.shots
    train = rows.get("train", ())
    if wanted > len(train):
        raise DataError(
            f"task {task!r}: {wanted} worked examples are wanted, and its train data have "
            f"{len(train)}; put train data beside the test data, or ask for fewer by --shots"
        )
    return train[:wanted]


def refuse_shots(task: str, settings: SampleSettings) -> None:
    """For tasks that have no worked examples, or always the same.

    Raises:
        UsageError: the user asked for some.
    """
    if settings.shots:
        raise UsageError(
            f"task {task!r} takes no worked examples; got --shots {settings.shots}, "
            "so leave that out"
        )


def one_each(
    task: str, *keys: str
) -> Callable[[Callable[[str, DataRow], Sample]], Callable[[RowsByRole, SampleSettings], Any]]:
    """The `Task.samples` of a task without worked examples that asks one sample for each row.

    Args:
        task: Its name, for messages.
        keys: See `with_ids`.
    """

    def decorate(
        ask: Callable[[str, DataRow], Sample],
    ) -> Callable[[RowsByRole, SampleSettings], list[Sample]]:
        def samples(rows: RowsByRole, settings: SampleSettings) -> list[Sample]:
            refuse_shots(task, settings)
            return [ask(name, row) for name, row in with_ids(rows["test"], *keys)]

        return samples

    return decorate


def likelihoods(replies: Replies) -> list[Likelihood]:
    """Replies to requests that are all continuations or documents."""
    return cast("list[Likelihood]", list(replies))


def answers(replies: Replies) -> list[Answer]:
    """Replies to requests that are all prompts."""
    return cast("list[Answer]", list(replies))
