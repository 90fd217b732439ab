"""One declaration each: a flag is the keyword of the same name in Python, with the same default."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import click
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("optuna")

import taskvec as tv
from taskvec import coefficients, disentanglement, training
from taskvec.cli.commands import Option, make_group
from taskvec.cli.verbs import VERBS
from taskvec.coefficients.fit.settings import FitSettings
from taskvec.coefficients.splits import Splitting
from taskvec.evaluation.evaluate import EvaluationOptions
from taskvec.evaluation.task import SampleSettings, Tools
from taskvec.training.data import Reading
from taskvec.training.models import HeadOptions
from taskvec.training.run import RunOutput
from taskvec.training.settings import TrainingSettings
from taskvec.training.tokens import Fitting

RECIPE = (tv.Family, tv.merge)
ASKING = (EvaluationOptions, SampleSettings, Tools)
READING = (Reading, HeadOptions, Fitting)
IN_PYTHON: dict[str, tuple[Callable[..., Any], ...]] = {
    "scan": (tv.scan, *RECIPE), "plan": (tv.plan, *RECIPE), "merge": RECIPE,
    "forget": (tv.forget, *RECIPE), "extract": (tv.extract, *RECIPE), "inspect": (tv.inspect,),
    "verify": (tv.verify,), "eval": (*ASKING, tv.evaluate),
    "search": (Splitting, *ASKING, coefficients.search, *RECIPE),
    "sweep": (*ASKING, coefficients.measure_sweep, *RECIPE),
    "pairs": (*ASKING, coefficients.measure_pairs, *RECIPE),
    "propose": RECIPE,
    "fit": (FitSettings, tv.fit, *READING, *RECIPE),
    "finetune": (training.finetune, TrainingSettings, RunOutput, *READING),
    "disentangle": (disentanglement.disentanglement_error, disentanglement.task_addition,
                    disentanglement.task_negation, disentanglement.linearity, EvaluationOptions,
                    *READING),
}  # fmt: skip

# Flags without a keyword of their name, each with the reason.
PRINTING = "about what is printed and written, which Python does with the result"
PLURAL = "repeatable, so singular; in Python a mapping or list with the name in the plural"
ELSEWHERE = {
    **dict.fromkeys(("json", "quiet", "verbose", "csv", "plot", "save_table", "save_scan", "full",
                     "sort", "tensors", "list", "update_card"), PRINTING),
    "settings": "any of these by name",
    **dict.fromkeys(("scheme", "granularity", "threshold", "normalize_weights"),
                    "parameters of the method: tv.method('lata', scheme=…)"),
    **dict.fromkeys(("no_cache", "rescan"), "values of `cache`"),
    "faithful": "about mergekit's configurations, which Python converts by itself",
    "model_dtype": "`dtype`; the name is that of outputs in recipes",
    **{f"out_{key}": f"`{key}`; `extract` has one of its own" for key in ("form", "rank", "rest")},
    **dict.fromkeys(("task", "teacher", "weight", "template"), PLURAL),
    **dict.fromkeys(("expect", "reference"), "compare models; Python has one model at a time"),
    **dict.fromkeys(("ray_address", "ray_workers"), "arguments of `RayExecutor`"),
    "proposal": "Python returns all proposals",
    "vary": "the second argument of `measure_sweep`",
    "measure": "the second argument of `measure_pairs`; a function each in `disentanglement`",
    "save": "`saves_model`",
    "by_task": "`search='by-task'`",
    **dict.fromkeys(("points", "low", "high"), "`alphas` or `scales`: the coefficients themselves"),
    **dict.fromkeys(("control", "plain"), "tasks are objects with their data"),
    "linearised": "`disentanglement.linearised`",
    "single": "compares models; Python has one model at a time",
}  # fmt: skip
# Defaults that differ, by verb and flag.
DIFFERENT = {
    ("disentangle", "methods"): "a mapping by name in Python",
    **{(verb, "seed"): "the recipe's" for verb in ("search", "sweep", "pairs", "fit")},
}


def options(verb: str) -> list[Option]:
    group = make_group()
    command = group.get_command(click.Context(group), verb)
    assert command is not None
    return [param for param in command.params if isinstance(param, Option)]


def keywords(verb: str) -> dict[str, Any]:
    """Default by keyword; the first declaration of a name counts."""
    found: dict[str, Any] = {}
    for declaration in IN_PYTHON[verb]:
        for name, parameter in inspect.signature(declaration).parameters.items():
            found.setdefault(name, parameter.default)
    return found


def is_default(option: Option, default: Any) -> bool:
    """Whether a flag that is not given means Python's default."""
    if default in (None, (), inspect.Parameter.empty) or repr(default) == "<factory>":
        return True  # not given, required, or made anew
    if option.is_flag or option.multiple:
        return bool(option.default is True) == bool(default)
    is_given = isinstance(option.default, (str, int, float))
    shown = str(option.default) if is_given else (option.shown or "").partition(";")[0]
    is_number = isinstance(default, (int, float))
    return float(shown) == default if is_number and shown[:1] in "-0123456789" else shown == default


@pytest.mark.parametrize("verb", IN_PYTHON)
def test_a_flag_is_a_keyword_with_the_same_default(verb):
    known = keywords(verb)
    own = {option.name: option for option in options(verb)}
    assert {name for name in own if name not in known and name not in ELSEWHERE} == set()
    compared = (own.keys() & known.keys()) - {"settings", "data", "tasks"}  # other things in Python
    different = {name for name in compared if not is_default(own[name], known[name])}
    assert different == {name for of, name in DIFFERENT if of == verb}


def test_every_exception_is_needed():
    used = {o.name for verb in IN_PYTHON for o in options(verb) if o.name not in keywords(verb)}
    assert set(ELSEWHERE) - used == set()
    no_python = {
        "clean",
        "report",
        "demo",
        "import",
        "methods",
        "zoo",
        "schema",
        "completion",
        "help",
    }
    assert set(VERBS) - set(IN_PYTHON) == no_python
