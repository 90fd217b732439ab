"""`taskvec methods [NAME]`: the methods in groups, or one with its parameters."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from taskvec.cli.commands import JSON, Argument, Arguments, Option, Verb
from taskvec.cli.printing import answer, show
from taskvec.cli.streams import warn
from taskvec.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from taskvec.methods.method import Method
    from taskvec.methods.parameters import Parameter

OURS = "taskvec"


def run(args: Arguments) -> int:
    """Run this verb."""
    from taskvec.methods import METHODS, find_method, overview, plugins

    if args.markdown:
        if args.name or args.json:
            raise UsageError("--markdown is a page of all methods; give it alone")
        sys.stdout.write(overview.markdown(METHODS.values()))
        return 0
    if args.name:
        method = find_method(args.name)
        origin = OURS if args.name in METHODS else plugins.provider(args.name) or OURS
        if args.json:
            answer([_as_json(method, origin)])
        else:
            _describe(method, origin)
        return 0
    others, wrong = plugins.every(METHODS)
    methods = [*METHODS.values(), *(plugin.method for plugin in others)]
    origins = {plugin.method.name: plugin.distribution for plugin in others}
    if args.json:
        answer([_as_json(m, origins.get(m.name, OURS)) for m in methods])
    else:
        _list(methods, origins)
    warn(wrong)
    return 0


def _list(methods: list[Method], origins: Mapping[str, str]) -> None:
    from taskvec.methods import overview

    width = max(len(method.name) for method in methods)
    for group, members in overview.group_methods(methods).items():
        print(group)
        for method in members:
            origin = f"  ({origins[method.name]})" if method.name in origins else ""
            print(f"  {method.name:{width}}  {method.summary}{origin}")
        print()
    print("`taskvec methods NAME` shows formula, source, needs and parameters of one.")


def _describe(method: Method, origin: str) -> None:
    from taskvec.methods import overview

    roles = {"instruct": "instruct (or anchor)"}
    needs = [roles.get(role, role) for role in overview.needs(method)]
    needs += ["tasks"] if method.takes_tasks else []
    scale = "required" if method.default_scale is None else f"default {method.default_scale:g}"
    sign = "may be negative" if method.takes_negative_scale else "not negative"
    print(f"{method.name}: {method.summary}")
    print(f"  {method.formula}    {method.source}")
    print(f"  needs {' and '.join(needs)}", end="")
    print(f"; scale {scale}, {sign}" if method.takes_tasks else "; takes no tasks")
    if method.combine is not None:
        print(f"  sees at once: {method.alignment}")
    if origin != OURS:
        print(f"  from {origin}")
    if method.parameters:
        show(
            [(f"  {p.name}", p.default, p.range, _about(p)) for p in method.parameters],
            ("  parameter", "default", "range", ""),
        )


def _about(parameter: Parameter) -> str:
    return f"{parameter.help}{'; may differ by layer' if parameter.by_layer else ''}"


def _as_json(method: Method, origin: str) -> dict[str, Any]:
    from taskvec.methods import overview

    return {
        "name": method.name,
        "distribution": origin,
        "group": overview.group_of(method),
        "summary": method.summary,
        "formula": method.formula,
        "source": method.source,
        "needs_base": method.needs_base,
        "needs_anchor": method.needs_anchor,
        "default_scale": method.default_scale,
        "negative_scale": method.takes_negative_scale,
        "table": method.takes_table,
        "alignment": method.alignment,
        "parameters": [
            {
                "name": p.name,
                "default": p.default,
                "range": p.range,
                "by_layer": p.by_layer,
                "help": p.help,
            }
            for p in method.parameters
        ],
    }


VERB = Verb(
    "methods", run, [
        Argument("name", required=False, type=str, metavar="[NAME]",
                 help="this one, with its parameters"),
        Option("--markdown", is_flag=True, help="print the page of all methods, docs/methods.md"),
        JSON,
    ],
    page="""\
Lists the methods in groups, a line each, those of [other
distributions](../how-to/write-a-method.md) with where they come from; or one method with its
formula, source, needs and parameters. A plug-in that cannot be used is a warning. `--json` has
`group` and `distribution` as well.""",
)  # fmt: skip
