"""`fit`: layer weights from a few prompts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from taskvec.coefficients.fit.asking import LanguageAsker, checkpointing
from taskvec.coefficients.fit.descent import Descended, Layers, descend
from taskvec.coefficients.fit.directions import (
    TaskDirections,
    check_is_target,
    content_of,
    live_names,
    open_directions,
)
from taskvec.coefficients.fit.explanation import correlations, explain
from taskvec.coefficients.fit.fitted import (
    LAYERS,
    ONE,
    Curve,
    Fitted,
    SourceRecord,
    fitted_recipe,
)
from taskvec.coefficients.fit.held_out import Resamples
from taskvec.coefficients.fit.objective import FitLoss, HeldOutLoss, TaughtSource
from taskvec.coefficients.fit.opening import (
    is_language_model,
    open_input_asker,
    open_language_asker,
)
from taskvec.coefficients.fit.prompts import Asked, Lesson, Teacher, lessons_of
from taskvec.coefficients.fit.settings import MODEL, Descent, FitSettings, layer_of, settings_of
from taskvec.coefficients.fit.steering import Steered
from taskvec.coefficients.fit.teaching import Teachers, answer_prompts, teach
from taskvec.errors import DataError, OutputError, TaskvecWarning, UsageError
from taskvec.files import write_text
from taskvec.journal import Journal
from taskvec.methods.table import Table
from taskvec.recipes.recipe import Family, Recipe
from taskvec.running.model import preserve_modes
from taskvec.streaming import RunOptions
from taskvec.training.data import Reading
from taskvec.training.models import HeadOptions

Array = np.ndarray[Any, Any]
Tell = Callable[[str, int, int, float], object]

# A target this close to a teacher has nothing to learn from it: nats a prompt (the first tokens of
# an answer may decide it, so that a mean over tokens says little), and relative squared distance.
NOTHING, NOTHING_FAR = 0.02, 1e-3
STATE = ".state"


def quiet(label: str, done: int, steps: int, loss: float) -> None:
    """Tell nothing."""


def fit(
    recipe: Recipe | Family | str | os.PathLike[str],
    *,
    prompts: Mapping[str, Any],
    teachers: Mapping[str, Any] | None = None,
    weights: Mapping[str, float] | None = None,
    objective: str = "kl",
    start: float | str | Mapping[str, float] | Table = 0.5,
    settings: FitSettings | Mapping[str, Any] | None = None,
    model: Any = None,
    tokenizer: Any = None,
    heads: Mapping[str, Any] | None = None,
    reading: Reading | None = None,
    asking: HeadOptions | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: Tell = quiet,
    running: RunOptions = RunOptions(),
) -> Fitted:
    """Fit layer weights, so that the merge answers as its teachers do on their own prompts.

    A part of the prompts is held out: it chooses the step of each descent, and says what the
    weights are worth against one weight a task.

    Args:
        recipe: What is merged; a family, or the file of a recipe. Its λ are not needed: a negative
            one says that the task is subtracted, so that the start is negative too.
        prompts: By source, which is a task's name or any other (see
            `taskvec.coefficients.fit.prompts`).
        teachers: By source: a task, `target`, `answers` (those that the prompts have), a folder, or
            a name on the hub. Default: the task of that name; the target for `keep`. A source with
            the target as its teacher may have no prompts: it then has those of all others.
        weights: ω by source; default: 1.
        objective: `kl`; `likelihood`: of the answers that the prompts have; `entropy`: without
            teachers.
        start: Where the descent starts: a number, a number by task, `recipe`, `lata` or a table.
        settings: How; a mapping changes some of the defaults.
        model: A module with the target's weights; None: it is loaded. It is left as it was.
        tokenizer: Of the module.
        heads: Of classifiers, by source: a module from features to logits.
        reading: How files are read.
        asking: How classifiers and encoders are asked.
        out: Folder that gets table, recipe and record, and that an interrupted run goes on from.
        progress: Called after each step with the descent, steps done, steps, and loss.
        running: How members are scanned: threads, cache, and progress.

    Raises:
        UsageError: the request is contradictory or incomplete.
        DataError: prompts are missing, malformed, empty or too long.
        OutputError: the folder holds another fit, or cannot be written.
        TaskvecError: a member is broken, or the loss is not finite at the start.
    """
    run = _Run(settings_of(settings), progress, None if out is None else Path(out))
    directions = open_directions(recipe, running)
    begin = directions.start(start)
    run.settings.check_start(float(begin.min()), float(begin.max()))
    is_language = is_language_model(directions, model)
    negative = [task for task, scale in directions.recipe.scales.items() if scale < 0]
    lessons = lessons_of(
        prompts,
        teachers or {},
        weights or {},
        objective,
        tasks=directions.tasks,
        negative=negative,
        is_language=is_language,
        reading=reading or Reading(),
    )
    run.begin(directions, lessons, begin)
    with ExitStack() as stack:
        if model is not None:
            stack.enter_context(preserve_modes(model))
        if is_language:
            asker: Any = open_language_asker(directions, model, tokenizer, run.settings)
            module, rows = asker.module, None
        elif model is not None:
            raise UsageError("model: classifiers and encoders are loaded from a folder")
        else:
            module, asker, rows = open_input_asker(
                directions, lessons, heads or {}, asking or HeadOptions(), run.settings
            )
        names = live_names(directions, module)
        check_is_target(directions, module, names)
        steered = _steer(run, directions, module, names)
        staff = Teachers(directions, steered, names, run.settings.device, run.settings.dtype)
        stack.callback(staff.become, "target")
        stack.enter_context(steered.steering())
        goal = _teach(run, lessons, asker, rows, staff)
        staff.become("target")
        stack.enter_context(checkpointing(module, run.settings.checkpointing))
        return _descend_all(run, directions, goal, steered, names, begin)


def _steer(run: _Run, directions: TaskDirections, module: Any, names: Mapping[str, str]) -> Steered:
    """The module with its task vectors, in memory or on the disk."""
    packs = directions.packs(names, module, hold=run.settings.hold)
    return Steered(module, packs, len(directions.tasks))


@dataclass(slots=True)
class _Run:
    """How it runs, its warnings, and where states go.

    Attributes:
        settings: How.
        progress: See `fit`.
        out: See `fit`.
        warnings: Issued so far.
        records: By source.
    """

    settings: FitSettings
    progress: Tell
    out: Path | None
    warnings: list[str] = field(default_factory=list)
    records: dict[str, SourceRecord] = field(default_factory=dict)

    def warn(self, text: str) -> None:
        """Warn now, and in the result."""
        self.warnings.append(text)
        warnings.warn(text, TaskvecWarning, stacklevel=4)

    def state(self, name: str) -> Path | None:
        """File of a state."""
        return None if self.out is None else self.out / STATE / name

    def begin(self, directions: TaskDirections, lessons: Sequence[Lesson], begin: Array) -> None:
        """Take up a folder, or refuse that of another fit."""
        if self.out is None:
            return
        record = {
            "settings": {k: v for k, v in asdict(self.settings).items() if k != "hold"},
            "members": directions.fingerprints,
            "sources": {
                each.name: [str(each.teacher), each.weight, each.loss, each.digest]
                for each in lessons
            },
            "start": begin.tolist(),
        }
        path = self.out / STATE / "fit.digest"
        digest = content_of(record)
        if path.is_file() and path.read_text() != digest:
            raise OutputError(
                f"{self.out}: holds a fit of other prompts, members or settings; choose another "
                "folder, or remove it"
            )
        write_text(path, digest)

    def known_answers(self, source: str) -> dict[str, tuple[str, bool]]:
        """Answers that an earlier run generated."""
        known = self._answers(source)
        entries = [] if known is None else known.read()
        return {each["prompt"]: (each["text"], each["is_whole"]) for each in entries}

    def keep_answers(self, source: str, answers: Sequence[tuple[str, str, bool]]) -> None:
        """Keep answers for a run that goes on."""
        known = self._answers(source)
        if known is not None and answers:
            new = [dict(zip(("prompt", "text", "is_whole"), each, strict=True)) for each in answers]
            known.begin([*known.read(), *new])

    def _answers(self, source: str) -> Journal | None:
        path = self.state(f"answers-{content_of({'source': source})}.jsonl")
        return None if path is None else Journal(path)


def _teach(
    run: _Run,
    lessons: Sequence[Lesson],
    asker: Any,
    rows: Mapping[str, Sequence[Any]] | None,
    staff: Teachers,
) -> FitLoss:
    """Sources with rows, split, and what their teachers say."""
    settings = run.settings
    lessons = [_with_prompts(run, lesson, lessons) for lesson in lessons]
    sources = {}
    for lesson in lessons:
        if isinstance(asker, LanguageAsker):
            mine, about = _answer(run, lesson, asker, staff)
        else:
            assert rows is not None
            mine, about = list(rows[lesson.name]), (0, 0, "")
        if len(mine) < 2:
            raise DataError(
                f"prompts of {lesson.name!r}: there is {len(mine)}; give at least two, since a "
                "part is held out"
            )
        train, held_out = split(mine, lesson.name, settings.held_out, settings.seed)
        loss = lesson.loss
        if asker.kind == "features":
            if loss != "kl":
                raise UsageError(f"source {lesson.name!r}: features have no {loss}; give a head")
            loss = "distance"
        source = TaughtSource(lesson.weight, loss, lesson.teacher, train, held_out)
        if loss in ("kl", "distance"):
            with staff.asked(lesson.teacher, asker) as other:
                source.taught = teach(
                    other,
                    lesson.name,
                    [*train, *held_out],
                    hidden=settings.hidden > 0,
                    size=settings.micro_batch,
                )
        if loss == "distance":
            assert source.taught is not None
            squares = [float(each.features.float().square().sum()) for each in source.taught]
            source.scale = max(float(np.mean(squares)), 1e-12)
        sources[lesson.name] = source
        run.records[lesson.name] = SourceRecord(
            str(lesson.teacher),
            loss,
            lesson.weight,
            len(train),
            len(held_out),
            about[0],
            about[1],
            lesson.digest,
            about[2],
        )
    return FitLoss(asker, sources, settings.batch_size, settings.micro_batch, settings.hidden)


def _with_prompts(run: _Run, lesson: Lesson, lessons: Sequence[Lesson]) -> Lesson:
    """A lesson without prompts has those of all others, without their answers."""
    if lesson.prompts is not None:
        return lesson
    others = [each for other in lessons if other.prompts is not None for each in other.prompts]
    if not all(isinstance(each, Asked) for each in others):
        raise UsageError(f"prompts of {lesson.name!r}: the list is empty; give some")
    run.warn(
        f"source {lesson.name!r} has no prompts: the target's answers to those of the other "
        "sources are used, which holds the merge back on their tasks; give prompts of what is to "
        "be kept"
    )
    made = list({each.text: replace(each, answer=None) for each in others}.values())
    return replace(lesson, prompts=made)


def _answer(
    run: _Run, lesson: Lesson, asker: LanguageAsker, staff: Teachers
) -> tuple[list[Any], tuple[int, int, str]]:
    """Rows of a language model's source; how many answers were generated, how many left out."""
    settings = run.settings
    new: list[tuple[str, str, bool]] = []
    teacher = lesson.teacher if lesson.teacher.kind != "none" else Teacher("target")
    found = answer_prompts(
        lesson.name,
        lesson.prompts,
        asker,
        teacher=lambda: staff.asked(teacher, asker),
        known=run.known_answers(lesson.name),
        take=lambda prompt, text, is_whole: new.append((prompt, text, is_whole)),
        max_new_tokens=settings.max_new_tokens,
        context=settings.context,
    )
    run.keep_answers(lesson.name, new)
    if found.left_out:
        run.warn(
            f"prompts of {lesson.name!r}: {found.left_out} of {len(lesson.prompts)} are left out: "
            "too long with their answers, or without an answer"
        )
    digest = content_of({"texts": list(found.texts)})
    return list(found.rows), (found.generated, found.left_out, digest)


def split(rows: Sequence[Any], name: str, share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Rows to learn from and rows to measure; at least one of each."""
    count = min(max(1, round(len(rows) * share)), len(rows) - 1)
    order = np.random.default_rng([seed, crc32(name.encode()), 5]).permutation(len(rows))
    held = set(order[:count].tolist())
    return [r for i, r in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def _descend_all(
    run: _Run,
    directions: TaskDirections,
    goal: FitLoss,
    steered: Steered,
    names: Mapping[str, str],
    begin: Array,
) -> Fitted:
    """The descents, and what came of them."""
    settings = run.settings
    one_of = _layers(directions, names, MODEL)
    layers = _layers(directions, names, settings.granularity)

    def measured(by_tensor: Array) -> dict[str, HeldOutLoss]:
        steered.put(_by_own(directions, names, by_tensor))
        return goal.measure()

    at_target = measured(np.zeros_like(begin))
    at_start = measured(begin)
    _check_teaching(run, goal, at_target, at_start)

    def down(label: str, which: _Which, how: Descent, seed: int) -> Descended:
        found = descend(
            steered,
            which.layers,
            which.mean(begin),
            lambda step: goal.step(step, seed),
            how,
            measure=lambda: goal.total(goal.measure()),
            every=settings.measure_every,
            state=run.state(f"{label.replace(' ', '-')}.npz"),
            tell=lambda step, loss: run.progress(label, step, how.steps, loss),
        )
        for text in found.warnings:
            run.warn(f"{label}: {text}")
        return found

    one = down(ONE, one_of, settings.one_weight, settings.seed)
    one_table = one_of.by_tensor(one.weights)
    runs = {ONE: one}
    tables: list[Array] = []
    if settings.granularity != MODEL:
        for seed in range(settings.seed, settings.seed + settings.seeds):
            runs[f"seed {seed}"] = down(f"seed {seed}", layers, settings, seed)
        tables = [layers.by_tensor(each.weights) for each in list(runs.values())[1:]]
    draws = Resamples(at_start, {n: s.weight for n, s in goal.sources.items()}, settings.seed)
    at_one = measured(one_table)
    standings = [
        draws.standing("target", at_target, at_one),
        draws.standing("start", at_start, at_one),
        draws.standing(ONE, at_one, None),
    ]
    weights, chosen, best = one_table, ONE, one_table
    if tables:
        if len(tables) > 1:
            for label, table in zip(list(runs)[1:], tables, strict=True):
                standings.append(draws.standing(label, measured(table), at_one))
        # Not the mean of all descents: its held-out loss was higher in 5 of 6 fits of the zoo.
        best = tables[int(np.argmin([goal.total(measured(table)) for table in tables]))]
        standings.append(draws.standing(LAYERS, measured(best), at_one))
        gain = standings[-1].gain
        assert gain is not None
        if gain.low > 0:
            weights, chosen = best, LAYERS
        else:
            run.warn(
                f"layers bring nothing: held-out loss falls by {gain.value:.4f} "
                f"[{gain.low:.4f}, {gain.high:.4f}] against one weight a task; one weight a task "
                "is written"
            )
    _warn_of_bounds(run, directions, weights)
    origin = f"fit by {settings.granularity if chosen == LAYERS else MODEL}"
    per_layer = [layers.mean(table) for table in tables]
    result = Fitted(
        table=directions.table(weights, origin, tuple(run.warnings)),
        chosen=chosen,
        recipe=fitted_recipe(directions.recipe),
        settings=asdict(settings),
        sources=run.records,
        standings=standings,
        curves=[Curve(name, each.losses, each.measured, each.step) for name, each in runs.items()],
        seeds=[directions.table(table, origin) for table in tables],
        correlations=correlations(directions.tasks, per_layer, layers.layers.moves)
        if tables
        else {},
        explanation=explain(directions, layers.names, layers.mean(best), settings.seed)
        if tables
        else [],
        fingerprints=directions.fingerprints,
        warnings=tuple(run.warnings),
    )
    if run.out is not None:
        result.write(run.out)
    return result


@dataclass(frozen=True, slots=True)
class _Which:
    """Layers of a granularity.

    Attributes:
        names: Layer of each tensor.
        columns: Its number, in order of first tensor.
        layers: For a descent.
    """

    names: Sequence[str]
    columns: Array
    layers: Layers

    def mean(self, by_tensor: Array) -> Array:
        """Mean over the tensors of each layer, shape (tasks, layers)."""
        sums = np.zeros(self.layers.moves.shape)
        np.add.at(sums.T, self.columns, by_tensor.T)
        found: Array = sums / np.bincount(self.columns)
        return found

    def by_tensor(self, weights: Array) -> Array:
        """Weights of tensors from those of layers."""
        return weights[:, self.columns]


def _layers(directions: TaskDirections, names: Mapping[str, str], granularity: str) -> _Which:
    """Which weight each tensor has; tensors that are one parameter share theirs."""
    index: dict[str, int] = {}
    of: dict[str, int] = {}
    layers, columns = [], []
    layer_by_own: dict[str, str] = {}
    for name in directions.names:
        layer = layer_of(directions.keys[name], name, granularity)
        own = names.get(name, name)
        layer = layer_by_own.setdefault(own, layer)
        layers.append(layer)
        columns.append(index.setdefault(layer, len(index)))
        of[own] = columns[-1]
    moves = np.zeros((len(directions.tasks), len(index)), bool)
    for column, changed in zip(columns, directions.is_changed().T, strict=True):
        moves[:, column] |= changed
    return _Which(layers, np.array(columns), Layers(of, moves))


def _by_own(
    directions: TaskDirections, names: Mapping[str, str], by_tensor: Array
) -> dict[str, Array]:
    numbered = reversed(list(enumerate(directions.names)))
    return {names[name]: by_tensor[:, i] for i, name in numbered if name in names}


def _check_teaching(
    run: _Run,
    goal: FitLoss,
    at_target: Mapping[str, HeldOutLoss],
    at_start: Mapping[str, HeldOutLoss],
) -> None:
    """Say before the descent which sources have nothing to teach.

    Raises:
        UsageError: none has.
    """
    teaching = 0
    for name, source in goal.sources.items():
        if source.teacher.kind == "target" or source.loss == "entropy":
            teaching += source.loss == "entropy"
            continue
        value, least = float(at_target[name].sums.mean()), NOTHING
        if source.loss == "distance":
            least = NOTHING_FAR
        if value >= least:
            teaching += 1
            continue
        run.warn(
            f"source {name!r} teaches nothing: the target's loss there is {value:.4f} a prompt "
            f"(the start's {float(at_start[name].sums.mean()):.4f}), so it already answers as "
            f"{source.teacher}; give prompts that it answers wrongly"
        )
    if not teaching:
        raise UsageError(
            "no source teaches anything: the target answers all prompts as their teachers do "
            "already, so that the best weights are 0; give prompts of what is to be added or "
            "removed"
        )


def _warn_of_bounds(run: _Run, directions: TaskDirections, weights: Array) -> None:
    """Say where weights ended at a bound."""
    settings = run.settings
    for task, mine, moves in zip(directions.tasks, weights, directions.is_changed(), strict=True):
        for bound in (settings.low, settings.high):
            if count := int((mine[moves] == bound).sum()):
                run.warn(
                    f"weights of {task!r} ended at {bound:g}, a bound, in {count} of "
                    f"{int(moves.sum())} tensors; widen the bounds to see whether more helps"
                )
