"""`taskvec.scan` and `taskvec.plan`: what can be known before a merge."""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

from taskvec.keywords import takes
from taskvec.merging.prepare import open_with_base, prepare
from taskvec.merging.scans import scan_members
from taskvec.merging.steps import Prepared
from taskvec.recipes.coerce import (
    FormKeywords,
    Given,
    PlanKeywords,
    RecipeKeywords,
    RunKeywords,
    as_recipe,
    run_options,
)
from taskvec.statistics.scan import Scan


@takes(RunKeywords)
def scan(recipe: Given, **options: Unpack[RunKeywords]) -> Scan:
    """Read a family's weights once and keep what LATA and its analysis need.

    Args:
        recipe: A family, with `instruct` (or `anchor`), and with `base` for instruction vectors; or
            a recipe, or its path.
        {options}

    Returns:
        Statistics of every floating-point tensor.

    Raises:
        TaskvecError: a member is broken or does not fit; NaN or infinite weights.
    """
    how = run_options(options)
    members = open_with_base(as_recipe(recipe, method="task_arithmetic", needs_scales=False), how)
    return replace(scan_members(members, how), warnings=members.warnings)


@takes(RecipeKeywords, FormKeywords, RunKeywords)
def plan(recipe: Given, **options: Unpack[PlanKeywords]) -> Prepared:
    """What a merge would read, write and hold in memory. Only headers are read.

    Args:
        recipe: As in `merge`; λ may be missing.
        {options}

    Returns:
        The opened `members`, the `shards` to be written, and the `estimate`.

    Raises:
        TaskvecError: a member is broken or does not fit.
    """
    return prepare(as_recipe(recipe, options, needs_scales=False), run_options(options))
