"""Results of several models: evaluated one after the other, and written down."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from taskvec.errors import UsageError
from taskvec.evaluation.evaluate import EvaluationOptions, Result, TaskSamples, file_name
from taskvec.evaluation.loading import Models, Spec
from taskvec.evaluation.options import VERDICTS_FOLDER
from taskvec.files import write_text

PACKAGES = ("taskvec", "torch", "transformers", "tokenizers", "datasets", "lm_eval", "numpy")
RESULTS_FILE = "results.json"


def evaluate_models(
    models: Mapping[str, Spec], prepared: Sequence[TaskSamples], options: EvaluationOptions
) -> dict[str, list[Result]]:
    """Results by model, in the order of the models, each of every task.

    Args:
        models: Folder, hub name or candidate, by name.
        prepared: Tasks with their samples.
        options: How to evaluate.

    Raises:
        UsageError: records of two models would be one file.
        TaskvecError: a model cannot be opened, merged, loaded, or asked what the tasks ask; found
            before any weights are loaded, as far as it can be.
    """
    _check_names(models)
    with Models(options) as loaded:
        for spec in models.values():
            loaded.check(spec, prepared)
        return {name: loaded.evaluate(spec, prepared, name) for name, spec in models.items()}


def _check_names(models: Iterable[str]) -> None:
    """Refuse names whose records would lie in one folder, or where something else lies."""
    taken = {RESULTS_FILE: "the file of results", VERDICTS_FOLDER: "what judges say"}
    for name in models:
        folder = file_name(name)
        other = taken.setdefault(folder.casefold(), f"model {name!r}")
        if other != f"model {name!r}":
            raise UsageError(
                f"records of model {name!r} would overwrite {other} in {folder}; "
                "give it another name: NAME=MODEL"
            )


def about() -> dict[str, Any]:
    """Versions and machine that results were measured with."""
    return {
        "versions": {"python": platform.python_version()} | _versions(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_results(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `results.json` beside the records.

    Raises:
        OutputError: it cannot be written.
    """
    text = json.dumps(record, indent=1, ensure_ascii=False)
    write_text(folder / RESULTS_FILE, text + "\n")
