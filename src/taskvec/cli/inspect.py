"""`taskvec inspect MODEL`: what a checkpoint, an adapter or a vector holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from taskvec.cli.commands import JSON, Argument, Arguments, Option, Verb
from taskvec.cli.options import ALLOW_PICKLE, THREADS
from taskvec.cli.printing import answer, gigabytes, show, show_lines, some
from taskvec.cli.progress import Bars


def run(args: Arguments) -> int:
    """Run this verb."""
    from taskvec.vectors.inspection import inspect

    inspection = inspect(
        args.model,
        norms=args.norms,
        allow_pickle=args.allow_pickle,
        threads=args.threads,
        progress=Bars(args, name=Path(args.model).name),
    )
    result = inspection.to_json(tensors=args.tensors)
    if args.json:
        answer(result)
    else:
        _print(result, norms=args.norms)
    return 0


def _print(result: dict[str, Any], *, norms: bool) -> None:
    gb = gigabytes
    if "layers" in result:
        rows = [
            (
                row["name"],
                row["dtype"],
                "×".join(map(str, row["shape"])) or "scalar",
                f"{row['tower']}/{'–' if row['block'] is None else row['block']}",
                row["module"],
                *(row.get(c) for c in ("norm", "largest", "zeros", "nan", "infinite") if norms),
            )
            for row in result["layers"]
        ]
        head = ("tensor", "dtype", "shape", "block", "module")
        show(rows, head + (("norm", "max |w|", "zeros", "NaN", "∞") if norms else ()))
        print()
    show(
        [
            (
                row["tower"],
                row["module"],
                row["tensors"],
                row["parameters"],
                gb(row["bytes"]),
                *(row.get(c) for c in ("norm", "largest") if norms),
            )
            for row in result["modules"]
        ],
        ("tower", "module", "tensors", "parameters", "size", *(("norm", "max |w|") * norms)),
    )
    print()
    dtypes = ", ".join(f"{dtype} {count:,}" for dtype, count in result["dtypes"].items())
    blocks = ", ".join(f"{tower} {count}" for tower, count in result["blocks"].items())
    about = ", ".join(f"{key} {_word(value)}" for key, value in result["about"].items())
    lines = [
        ("kind", f"{result['kind']}{': ' if about else ''}{about}"),
        ("tensors", f"{result['tensors']:,} ({dtypes}), {result['parameters']:,} parameters, "
         f"{gb(result['bytes'])}"),
        ("blocks", blocks or "none"),
    ]  # fmt: skip
    if result["files"]:
        lines.append(("files", f"{len(result['files'])}: {some(list(result['files']), 3)}"))
    lines += [("tied", f"head {head} to {to}") for head, to in result["tied"].items()]
    for key, label in (("not_float", "not float"), ("other", "other")):
        if result[key]:
            lines.append((label, f"{len(result[key])}: {some(result[key])}"))
    lines += [("identical", some(names)) for names in result.get("identical", [])]
    if "nan" in result:
        lines.append(("NaN", f"{result['nan']:,}; infinite {result['infinite']:,}"))
    show_lines(lines)


def _word(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


VERB = Verb(
    "inspect", run, [
        Argument("model", metavar="MODEL",
                 help="folder, .safetensors file, adapter, or name on the hub"),
        Option("--tensors", is_flag=True, help="list every tensor"),
        Option("--norms", is_flag=True,
               help="read the weights: norms, largest magnitudes, zeros, NaN, infinity, identical "
               "tensors"),
        ALLOW_PICKLE, THREADS, JSON,
    ],
    page="Reads headers alone, unless `--norms` is given, which counts NaN and infinity instead of "
    "refusing\nthem. With `--tensors`, `--json` has every tensor under `layers`.",
)  # fmt: skip
