"""From a command line to a recipe and to how it runs: the one place that the verbs go through."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec.cli.commands import Arguments
from taskvec.cli.printing import announce_compiling, show
from taskvec.cli.progress import Bars
from taskvec.cli.streams import say, warn
from taskvec.errors import UsageError

if TYPE_CHECKING:
    from taskvec.recipes.mergekit.work import Note
    from taskvec.recipes.recipe import Recipe
    from taskvec.streaming import RunOptions

# Options of a recipe's keys, by key; what they hold is a word.
_KEYS = {
    "method": ("method", "name"),
    **{name: ("method", name) for name in
       ("scheme", "granularity", "threshold", "normalize_weights")},
    "vocabulary": ("vocabulary",), "new_tokens": ("new_tokens",), "seed": ("seed",),
    "dtype": ("out", "dtype"), "shard_size": ("out", "shard_size"),
    "precision": ("out", "precision"),
    "out_form": ("out", "form"), "out_rank": ("out", "rank"), "out_rest": ("out", "rest"),
}  # fmt: skip
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
USUAL_SCALE = 5.0  # beyond it, λ is rather a slip than a choice

Flags = dict[Any, tuple[object, str]]  # value and flag, by key of a recipe or name of a setting


def has_family(args: Arguments) -> bool:
    """Whether the flags describe a family, so that no recipe is needed."""
    return bool(args.task) or any(
        getattr(args, name) is not None for name in ("base", "instruct", "anchor", "target")
    )


def recipe_from(
    args: Arguments,
    recipe: str | None,
    *,
    needs_scales: bool = True,
    method: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe of a command: a file, a manifest (with its table), or flags.

    Args:
        args: Flags that are given beside a file replace what it has.
        recipe: Path of a recipe, mergekit configuration or manifest; None if flags stand for one.
        needs_scales: Whether a task without λ is an error.
        method: Method where neither the file nor the flags name one.

    Raises:
        RecipeError: anything wrong in it; about a flag, it names the flag.
        UsageError: neither a recipe nor tasks, or a flag that does not go with it.
    """
    from taskvec.recipes.located import Document, parse_yaml
    from taskvec.recipes.mergekit import is_config
    from taskvec.recipes.overrides import with_overrides
    from taskvec.recipes.reading import read_recipe, read_text
    from taskvec.recipes.replay import MANIFEST_FILE, read_manifest, recipe_of

    flags = _flags(args)
    is_faithful = getattr(args, "faithful", False)
    if recipe is not None and Path(recipe).name == MANIFEST_FILE:
        for flag in [*(flag for _, flag in flags.values()), *(["--faithful"] * is_faithful)]:
            raise UsageError(f"{recipe}: a manifest is replayed as it is; remove {flag}")
        return recipe_of(read_manifest(Path(recipe)), recipe)
    if recipe is None:
        if not args.task and not _is_taskless(args):
            raise UsageError("give a recipe, or --task NAME=MODEL[:SCALE] and the roles it needs")
        document, folder = Document({}, "command line"), Path.cwd()
        method = method or {"name": "lata"}
    else:
        document, folder = parse_yaml(read_text(recipe), recipe), Path(recipe).absolute().parent
    if is_config(document.data):
        from taskvec.recipes.mergekit.convert import convert

        imported = convert(document, Path.cwd(), faithful=is_faithful)
        if not getattr(args, "quiet", False):
            show_differences(str(recipe), imported.notes)
        document, folder = Document(imported.recipe, str(recipe)), Path.cwd()
    elif is_faithful:
        raise UsageError("--faithful goes with a mergekit configuration; this is a recipe of ours")
    if method is not None and isinstance(document.data, dict):
        document.data.setdefault("method", dict(method))
    document = with_overrides(
        document,
        {key: value for key, (value, _) in flags.items()},
        flags={key: flag for key, (_, flag) in flags.items()},
    )
    return read_recipe(document, folder, needs_scales=needs_scales)


def recipe_only(args: Arguments, recipe: str | None, **options: Any) -> Recipe:
    """As `recipe_from`, for verbs that choose weights themselves.

    Raises:
        UsageError: it is a manifest, whose weights are fixed.
    """
    from taskvec.recipes.replay import MANIFEST_FILE

    if recipe is not None and Path(recipe).name == MANIFEST_FILE:
        raise UsageError(f"{recipe}: the weights of a manifest are fixed; give a recipe")
    return recipe_from(args, recipe, **options)


def _is_taskless(args: Arguments) -> bool:
    return args.method == "passthrough" and args.target is not None


def _flags(args: Arguments) -> Flags:
    """What the flags say of a recipe, each with its flag."""
    from taskvec.recipes.overrides import read_setting

    given = {name: getattr(args, name, None) for name in _KEYS}
    flags: Flags = {
        _KEYS[name]: (value, f"--{name.removeprefix('out_').replace('_', '-')} {value}")
        for name, value in given.items()
        if value is not None
    }
    size = given["shard_size"]
    if size is not None and re.fullmatch(_NUMBER, size.strip()):
        raise UsageError(f"--shard-size {size}: has no unit; write {size}GB or {size}MB")
    for role in ("base", "instruct", "anchor", "target"):
        if getattr(args, role, None) is not None:
            flags[(role,)] = (_model(getattr(args, role)), f"--{role}")
    for text in getattr(args, "task", ()):
        name, entry = _task(text)
        if ("tasks", name) in flags:
            raise UsageError(f"--task {name} is given twice; give each task a name of its own")
        flags[("tasks", name)] = (entry, f"--task {text}")
    for key in ("include", "exclude"):
        if getattr(args, key, ()):
            flags[(key,)] = (list(getattr(args, key)), f"--{key}")
    if getattr(args, "allow_pickle", False):
        flags[("allow_pickle",)] = (True, "--allow-pickle")
    for text in getattr(args, "settings", ()):
        setting, value = read_setting(text)
        flags[setting] = (value, f"--set {text}")
    return flags


def _task(text: str) -> tuple[str, dict[str, Any]]:
    """Name and entry of `NAME=MODEL[:SCALE]`."""
    name, _, rest = text.partition("=")
    if not name or not rest:
        raise UsageError(f"--task takes NAME=MODEL or NAME=MODEL:SCALE; got {text!r}")
    match = re.fullmatch(rf"(.+):({_NUMBER}|[-+]?(?i:nan|inf|infinity))", rest)
    if match is None or (match[2].lower().strip("+-")[0] in "ni" and Path(rest).exists()):
        return name, {"model": _model(rest)}
    return name, {"model": _model(match[1]), "scale": float(match[2])}


def _model(path: str) -> str:
    """A model of a flag: a name on the hub, or a path relative to the current folder."""
    from taskvec.checkpoints.hub import hub_name

    if hub_name(path) is not None:
        return path
    return str(Path(os.path.expanduser(path)).absolute())  # noqa: PTH111 (leaves ~nobody)


def running(args: Arguments, name: str = "") -> RunOptions:
    """How to run; `name` is the model that bars name."""
    from taskvec.streaming import RunOptions

    announce_compiling()
    return RunOptions(
        force=getattr(args, "force", False),
        copy_code=getattr(args, "copy_code", False),
        cache="off" if args.no_cache else "renew" if args.rescan else "use",
        threads=args.threads,
        progress=Bars(args, name=name),
    )


def warn_of_scales(recipe: Recipe) -> None:
    """Warn of λ that are far from what anybody uses, where λ is not a share of the whole."""
    if recipe.method.needs_anchor:
        warn(
            [
                f"scale of task {task!r} is {scale:g}; usual values are between -2 and 2"
                for task, scale in recipe.scales.items()
                if abs(scale) > USUAL_SCALE
            ]
        )


def show_differences(source: str, notes: list[Note] | tuple[Note, ...]) -> None:
    """Where a mergekit configuration means something else here: one table, to standard error."""
    import sys

    if not notes:
        return
    say(f"{source}: what differs from mergekit 0.1.5")
    rows = [("" if n.line is None else str(n.line), n.theirs, n.ours, n.switch) for n in notes]
    show(rows, ("line", "mergekit", "here", "to get mergekit's"), sys.stderr)
