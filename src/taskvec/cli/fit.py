"""`taskvec fit RECIPE`: layer weights from a few prompts, as a recipe that merges."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

from taskvec.cli.commands import JSON, Arguments, Option, Verb, given_of, pairs_of
from taskvec.cli.evaluating import DEVICE, LOADED_DTYPE
from taskvec.cli.finetune import IMAGE_SIZE, POOL, TRUNCATE
from taskvec.cli.options import FAMILY, READING, RECIPE, RUNNING, fields_from
from taskvec.cli.printing import answer, show
from taskvec.cli.progress import Steps
from taskvec.cli.recipe import recipe_only, running
from taskvec.cli.streams import warn
from taskvec.errors import TaskvecWarning, UsageError
from taskvec.extras import require

if TYPE_CHECKING:
    from taskvec.coefficients.fit.fitted import Fitted
    from taskvec.methods.table import Table

SOURCES_HEAD, DESCENT_HEAD, MODELS_HEAD = "Prompts", "Descent", "Memory"


def run(args: Arguments) -> int:
    """Run this verb."""
    prompts = pairs_of(args.prompts, "--prompts", "NAME=FILE")
    teachers = pairs_of(args.teacher, "--teacher", "NAME=TEACHER")
    weights = pairs_of(args.weight, "--weight", "NAME=NUMBER")
    fields = fields_from(args)
    # --granularity is that of the fit here, not the method's.
    about_recipe = Arguments(**{**vars(args), "granularity": None})
    recipe = recipe_only(
        about_recipe, args.recipe, needs_scales=False, method={"name": "task_arithmetic"}
    )
    require("torch", "train")

    from taskvec.coefficients.fit.api import fit
    from taskvec.training.data import Reading
    from taskvec.training.models import HeadOptions
    from taskvec.training.tokens import Fitting

    settings = given_of(args, SETTINGS)
    if args.threads is not None:
        require("torch", "train").set_num_threads(args.threads)
    with Steps(args) as bar, _shown_warnings():
        found = fit(
            recipe,
            prompts=prompts,
            teachers=teachers,
            weights={name: _number(text, name) for name, text in weights.items()},
            objective=args.objective,
            start=_start(args.start),
            settings=settings | {"seed": recipe.seed, "dtype": args.model_dtype},
            reading=Reading(args.format, fields, seed=recipe.seed),
            asking=HeadOptions(
                Fitting(args.context, args.truncate), args.image_size, pool=args.pool
            ),
            out=Path(args.out).expanduser(),
            progress=lambda label, *about: bar.tell(f"fit {label}", *about),
            running=running(args),
        )
    if args.json:
        answer(found.to_json())
    else:
        _print(found, args.out)
    return 0


def _number(text: str, source: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--weight {source}={text}: must be a number") from None


def _start(text: str) -> float | str | Table:
    """A number, a word, or the table of a file."""
    from taskvec.methods.table import load_table

    if text in START_WORDS:
        return text
    try:
        return float(text)
    except ValueError:
        path = Path(text).expanduser()
    if not path.is_file():
        raise UsageError(
            f"--start {text}: must be a number, {', '.join(START_WORDS)}, or the file of a table; "
            "there is no such file"
        )
    return load_table(path)


@contextmanager
def _shown_warnings() -> Iterator[None]:
    """Print what `fit` warns of, each warning when it is given."""
    before = warnings.showwarning

    def shown(message: Warning | str, category: type[Warning], *about: Any, **more: Any) -> None:
        if issubclass(category, TaskvecWarning):
            warn([str(message)])
        else:
            before(message, category, *about, **more)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=TaskvecWarning)
        warnings.showwarning = shown
        yield


def _print(found: Fitted, out: str) -> None:
    from taskvec.coefficients.fit.fitted import RECIPE as RECIPE_FILE
    from taskvec.coefficients.fit.fitted import RECORD, TABLE
    from taskvec.evaluation.intervals import span

    held_out = sum(source.held_out for source in found.sources.values())
    print(f"Loss on {held_out:,} held-out prompts; 95 % intervals:")
    names = list(found.sources)
    show(
        [
            (each.name, span(each.loss), *(span(each.sources[name]) for name in names),
             "–" if each.gain is None else span(each.gain, "+"))
            for each in found.standings
        ],
        ("weights", "loss", *names, "gain over one weight"),
    )  # fmt: skip
    print(f"\nChosen: {_why(found)}\n")
    _print_weights(found)
    print(f"{out}/: {TABLE}, {RECIPE_FILE}, {RECORD}")
    print(f"Merge: taskvec merge {Path(out) / RECIPE_FILE} OUT")


def _why(found: Fitted) -> str:
    from taskvec.coefficients.fit.fitted import LAYERS
    from taskvec.evaluation.intervals import span

    gain = found.standings[-1].gain
    if gain is None or found.standings[-1].name != LAYERS:
        return "one weight for each task (granularity model)"
    if found.chosen == LAYERS:
        return (
            f"weights by {found.settings['granularity']}: their gain over one weight for each task "
            f"is {span(gain, '+')}"
        )
    return (
        "one weight for each task: the interval of the gain of weights by "
        f"{found.settings['granularity']}, {span(gain, '+')}, is not above 0"
    )


def _print_weights(found: Fitted) -> None:
    """The weights of every task, and what those of layers go with."""
    from taskvec.evaluation.intervals import span

    known = {
        (each.task, each.against): each.correlation
        for each in found.explanation
        if not math.isnan(each.correlation.value)
    }
    against = list(dict.fromkeys(name for _, name in known))
    rows = []
    for task in found.table.tasks:
        values = list(found.table.of(task).values())
        agreement = found.correlations.get(task, math.nan)
        rows.append(
            (task, fmean(values), min(values), max(values),
             None if math.isnan(agreement) else agreement)
        )  # fmt: skip
    show(rows, ("task", "mean weight", "lowest", "highest", "rank correlation of seeds"))
    if against:
        print("\nRank correlation (Spearman) of weights by layer with:")
        show(
            [
                (task, *(span(known[task, name], "+") if (task, name) in known else "–"
                         for name in against))
                for task in found.table.tasks
            ],
            ("task", *against),
        )  # fmt: skip
    print()


START_WORDS = ("lata", "recipe")
# Settings of `FitSettings` by their names; a flag that is not given leaves its default.
SETTINGS = (
    Option("--granularity", heading=DESCENT_HEAD, show_default="tensor",
           words=("model", "block", "module", "tensor", "projection"),
           help="what has a weight of its own"),
    Option("--steps", type=int, metavar="N", heading=DESCENT_HEAD, show_default="120",
           help="updates of the weights; half as many for one weight a task"),
    Option("--rate", type=float, metavar="RATE", heading=DESCENT_HEAD, show_default="0.05",
           help="learning rate of Adam"),
    Option("--low", type=float, metavar="WEIGHT", heading=DESCENT_HEAD, show_default="-2",
           help="smallest weight"),
    Option("--high", type=float, metavar="WEIGHT", heading=DESCENT_HEAD, show_default="2",
           help="largest weight"),
    Option("--stay", type=float, metavar="WEIGHT", heading=DESCENT_HEAD, show_default="0",
           help="pull to the start"),
    Option("--seeds", type=int, metavar="N", heading=DESCENT_HEAD, show_default="2",
           help="descents, with --seed, --seed + 1, …; the best is taken"),
    Option("--hidden", type=float, metavar="WEIGHT", heading=DESCENT_HEAD, show_default="0",
           help="weight of the distance of hidden states, for language models"),
    Option("--batch-size", type=int, metavar="N", heading=DESCENT_HEAD, show_default="8",
           help="prompts of each source in a step"),
    Option("--measure-every", type=int, metavar="N", heading=DESCENT_HEAD, show_default="10",
           help="steps between two measurements on held-out prompts"),
    Option("--held-out", type=float, metavar="SHARE", heading=SOURCES_HEAD, show_default="0.25",
           help="share of the prompts to hold out"),
    Option("--max-new-tokens", type=int, metavar="N", heading=SOURCES_HEAD, show_default="128",
           help="longest answer that a teacher generates"),
    Option("--context", type=int, metavar="N", heading=SOURCES_HEAD,
           show_default="what the model reads", help="most tokens of a prompt with its answer"),
    Option("--micro-batch", type=int, metavar="N", heading=MODELS_HEAD, show_default="all",
           help="prompts at once; fewer need less memory"),
    Option("--checkpointing", is_flag=True, heading=MODELS_HEAD,
           help="compute activations again in the backward pass, for less memory"),
    Option("--hold/--no-hold", default=None, heading=MODELS_HEAD, show_default="by free memory",
           help="hold task vectors in memory, or read them at every step"),
    DEVICE,
)  # fmt: skip

VERB = Verb(
    "fit", run, [
        RECIPE,
        Option("--prompts", metavar="NAME=FILE", multiple=True, required=True,
               heading=SOURCES_HEAD,
               help="prompts of a source: a task's name, keep, or any other with a --teacher; "
               "repeatable"),
        Option("--teacher", metavar="NAME=TEACHER", multiple=True, heading=SOURCES_HEAD,
               show_default="the task of that name; the target for keep",
               help="whose answers a source teaches: a task, target, a model, or answers (those "
               "in the file); repeatable"),
        Option("--weight", metavar="NAME=NUMBER", multiple=True, heading=SOURCES_HEAD,
               show_default="1", help="weight of a source in the loss; repeatable"),
        Option("--objective", default="kl", heading=DESCENT_HEAD,
               words=("kl", "likelihood", "entropy"),
               help="divergence from teachers, likelihood of the given answers, or entropy "
               "without teachers"),
        Option("--start", metavar="NUMBER|lata|recipe|FILE", default="0.5", heading=DESCENT_HEAD,
               help="weights to start from: a number, LATA's or the recipe's weights (both need "
               "scales), or a table"),
        *SETTINGS, LOADED_DTYPE,
        TRUNCATE, IMAGE_SIZE, POOL, *READING,
        Option("-o", "--out", type=click.Path(), metavar="DIR", required=True, heading="Output",
               help="table, recipe and record; the same command continues in it"),
        *(option for option in FAMILY if option.name != "granularity"), *RUNNING, JSON,
    ],
    extra="train",
    page="""\
Fits the weight of every layer so that the merge answers like each fine-tune on its own prompts and
like the target elsewhere; [how](../how-to/fit-layer-weights.md). It writes a recipe with these
weights, ready for `taskvec merge`. `--granularity` is that of the fit; that of LATA's weights, for
`--start recipe`, is `--set granularity=…`. `--truncate`, `--image-size` and `--pool` are for
classifiers and encoders. `--seed` also decides which prompts are held out.
`--threads` also limits torch on the CPU, where the number of threads may change the last digits.
`--json` prints what goes to `fit.json`.""",
)  # fmt: skip
