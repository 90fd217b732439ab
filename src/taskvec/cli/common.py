"""What several verbs share: the family on the command line, progress bars, tables of text."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec.errors import OutputError, UsageError

if TYPE_CHECKING:
    from taskvec.recipes.mergekit.work import Note
    from taskvec.recipes.recipe import Recipe
    from taskvec.streaming import RunOptions

ROLES = ("base", "instruct", "anchor", "target")
METHOD_FLAGS = ("scheme", "granularity", "threshold", "normalize_weights")


def add_family(parser: argparse.ArgumentParser) -> None:
    """The flags that can stand for a recipe."""
    group = parser.add_argument_group("instead of a recipe")
    group.add_argument(
        "--base", metavar="DIR", help="model before instruction tuning (LATA needs it)"
    )
    group.add_argument("--instruct", metavar="DIR", help="model that the tasks were tuned from")
    group.add_argument(
        "--anchor", metavar="DIR", help="the same, for families without instruction tuning"
    )
    group.add_argument("--target", metavar="DIR", help="model to edit (default: instruct)")
    group.add_argument(
        "--task",
        metavar="NAME=DIR[:SCALE]",
        action="append",
        default=[],
        help="a fine-tune and its λ; repeatable",
    )
    group.add_argument("--method", metavar="NAME", help="see `taskvec methods`")
    group.add_argument("--scheme", help="lata: linear | logarithmic | threshold")
    group.add_argument("--granularity", help="lata: tensor | module | block")
    group.add_argument("--threshold", help="lata: σ, in [-1, 1]")
    group.add_argument("--normalize-weights", help="lata: none | mean | norm")
    group.add_argument(
        "--include", metavar="PATTERN", action="append", default=[], help="tensors to edit"
    )
    group.add_argument(
        "--exclude", metavar="PATTERN", action="append", default=[], help="tensors to leave alone"
    )
    group.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pickled weights (.bin, .pt), without running what is in them",
    )
    group.add_argument(
        "--vocabulary", help="where token rows differ: refuse | truncate-padding | by-token | union"
    )
    group.add_argument("--new-tokens", help="tokens of tasks alone under union: copy | drop")


def add_output(parser: argparse.ArgumentParser) -> None:
    """The flags about how a result is written."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--dtype", help="bfloat16 | float16 | float32 | float64 (default: the target's)"
    )
    group.add_argument("--shard-size", metavar="SIZE", help="largest file, such as 5GB")
    group.add_argument("--precision", help="arithmetic: float32 (default) | float64")
    group.add_argument("--force", action="store_true", help="replace a folder that is not empty")
    group.add_argument(
        "--table", metavar="FILE", help="layer weights (CSV or JSON) instead of the method's"
    )


def add_running(parser: argparse.ArgumentParser) -> None:
    """The flags about how to run."""
    group = parser.add_argument_group("running")
    group.add_argument(
        "--threads", type=_positive, metavar="N", help="default: the processors, at most 8"
    )
    group.add_argument(
        "--no-cache", action="store_true", help="neither take nor keep a scan in the cache"
    )
    group.add_argument(
        "--rescan", action="store_true", help="scan anew even if a kept scan looks right"
    )
    group.add_argument("--quiet", action="store_true", help="no progress bars")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0; got {text!r}")
    return int(text)


def recipe_from(
    args: argparse.Namespace,
    recipe: str | None,
    *,
    needs_scales: bool = True,
    method: dict[str, Any] | None = None,
) -> Recipe:
    """The recipe of a command: a file, a manifest (with its table), or flags.

    Args:
        args: Parsed; flags that are given beside a file take its place in the recipe.
        recipe: Path of a recipe or manifest; None if flags stand for one.
        needs_scales: Whether a task without λ is an error.
        method: Method where neither the file nor the flags name one.

    Raises:
        RecipeError: anything wrong in it.
        UsageError: neither a recipe nor tasks, or a flag that does not go with it.
    """
    from taskvec.recipes.located import Document, parse_yaml
    from taskvec.recipes.mergekit.convert import convert
    from taskvec.recipes.mergekit.schema import is_config
    from taskvec.recipes.reading import read_recipe, read_text
    from taskvec.recipes.replay import MANIFEST_FILE, read_manifest, recipe_of

    flags = _flags(args)
    if recipe is not None and Path(recipe).name == MANIFEST_FILE:
        if flags:
            raise UsageError(
                f"{recipe}: a manifest is replayed as it is; remove --{next(iter(flags))}"
            )
        return recipe_of(read_manifest(Path(recipe)), recipe)
    if recipe is None:
        if "tasks" not in flags:
            raise UsageError("give a recipe, or --task NAME=DIR[:SCALE] and the roles it needs")
        data: dict[str, Any] = {"method": method or {"name": "lata"}}
        _overlay(data, flags)
        document = Document(data, "command line")
        return read_recipe(document, Path.cwd(), needs_scales=needs_scales)
    document, folder = parse_yaml(read_text(recipe), recipe), Path(recipe).absolute().parent
    if is_config(document.data):
        imported = convert(document, Path.cwd())
        tell(recipe, imported.notes)
        document, folder = Document(imported.recipe, recipe), Path.cwd()
    if not isinstance(document.data, dict):
        document.fail((), "a recipe is a mapping with tasks and a method; this is not")
    if method is not None:
        document.data.setdefault("method", method)
    _overlay(document.data, flags)
    return read_recipe(document, folder, needs_scales=needs_scales)


def recipe_only(args: argparse.Namespace, recipe: str | None, **options: Any) -> Recipe:
    """As `recipe_from`, for verbs that choose weights themselves.

    Raises:
        UsageError: it is a manifest, whose weights are fixed.
    """
    from taskvec.recipes.replay import MANIFEST_FILE

    if recipe is not None and Path(recipe).name == MANIFEST_FILE:
        raise UsageError(f"{recipe}: the weights of a manifest are fixed; give a recipe")
    return recipe_from(args, recipe, **options)


def _overlay(data: dict[str, Any], flags: dict[str, Any]) -> None:
    """Flags beside a recipe replace what it says, key by key."""
    for key, value in flags.items():
        old = data.get(key)
        if key == "method" and isinstance(old, str):
            old = {"name": old}
        renamed = (
            key == "method"
            and isinstance(old, dict)
            and value.get("name", old.get("name")) != old.get("name")
        )
        if isinstance(value, dict) and isinstance(old, dict) and not renamed:
            data[key] = {**old, **value}
        else:
            data[key] = value


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    """A recipe from flags; only the keys that were given."""
    data: dict[str, Any] = {}
    for role in ROLES:
        if getattr(args, role, None) is not None:
            data[role] = _absolute(getattr(args, role))
    for text in getattr(args, "task", []):
        name, _, rest = text.partition("=")
        if not name or not rest:
            raise UsageError(f"--task must be NAME=DIR or NAME=DIR:SCALE; got {text!r}")
        match = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", rest)
        path, scale = (match[1], float(match[2])) if match else (rest, None)
        if name in data.get("tasks", {}):
            raise UsageError(f"--task {name} is given twice; give each task a name of its own")
        entry: dict[str, Any] = {"model": _absolute(path)}
        data.setdefault("tasks", {})[name] = entry | ({} if scale is None else {"scale": scale})
    method = {
        flag: getattr(args, flag) for flag in METHOD_FLAGS if getattr(args, flag, None) is not None
    }
    if getattr(args, "method", None) is not None:
        method = {"name": args.method} | method
    if method:
        data["method"] = method
    for key in ("include", "exclude"):
        if getattr(args, key, None):
            data[key] = getattr(args, key)
    for key in ("vocabulary", "new_tokens"):
        if getattr(args, key, None) is not None:
            data[key] = getattr(args, key)
    if getattr(args, "allow_pickle", False):
        data["allow_pickle"] = True
    out = {
        key: getattr(args, key)
        for key in ("dtype", "shard_size", "precision")
        if getattr(args, key, None)
    }
    if out:
        data["out"] = out
    return data


def _absolute(path: str) -> str:
    from taskvec.checkpoints.hub import hub_name

    if hub_name(path) is not None:
        return path
    return str(Path(os.path.expanduser(path)).absolute())  # noqa: PTH111 (leaves ~nobody)


def options_from(args: argparse.Namespace) -> RunOptions:
    """How to run."""
    from taskvec.streaming import RunOptions

    announce_compiling()
    return RunOptions(
        force=getattr(args, "force", False),
        cache="off" if args.no_cache else "renew" if args.rescan else "use",
        threads=args.threads,
        progress=progress_for(args),
    )


def progress_for(args: argparse.Namespace) -> Any:
    """Bars on standard error, for what takes longer than two seconds."""
    from taskvec.streaming import silent

    return silent if args.quiet else partial(bar, unit="B", unit_scale=True)


@contextmanager
def bar(
    label: str, total: int, *, unit: str, unit_scale: bool = False
) -> Iterator[Callable[[int], object]]:
    """A bar on standard error, for what takes longer than two seconds."""
    from tqdm import tqdm

    with tqdm(
        total=total, desc=label, unit=unit, unit_scale=unit_scale, delay=2, file=sys.stderr
    ) as shown:
        yield shown.update


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Tell what the system says about writing a file as an `OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def tell(source: str, notes: Sequence[Note]) -> None:
    """Where a configuration of mergekit means something else, numbered, to standard error."""
    if notes:
        print(f"taskvec: {source}: what differs from mergekit 0.1.5", file=sys.stderr)
    for number, note in enumerate(notes, start=1):
        print(f"{number}. {note.text}", file=sys.stderr)


@cache
def announce_compiling() -> None:
    """Say why a first run waits, if it comes to that."""
    from taskvec.kernels.jit import when_compiling

    text = "taskvec: compiling kernels, once on this machine …"
    when_compiling(lambda: print(text, file=sys.stderr))


def warn(warnings: Sequence[str]) -> None:
    """Warnings, to standard error."""
    for text in warnings:
        print(f"taskvec: warning: {text}", file=sys.stderr)


def show(rows: Sequence[Sequence[object]], head: Sequence[str]) -> None:
    """Print a table with aligned columns; numbers to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(head), *cells]) for i in range(len(head))]
    right = [
        all(isinstance(row[i], (int, float, type(None))) for row in rows) for i in range(len(head))
    ]
    for line in [list(head), *cells]:
        fields = [
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)
        ]
        print("  ".join(fields).rstrip())


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def gigabytes(count: int) -> str:
    """Bytes for people.

    >>> gigabytes(2_500_000_000), gigabytes(1_200_000), gigabytes(900)
    ('2.50 GB', '1.20 MB', '900 B')
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"
