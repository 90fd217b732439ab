"""Options that several verbs share, each declared once."""

from __future__ import annotations

import click

from taskvec.cli.commands import Argument, Arguments, Option, WholeNumber, pairs_of

FAMILY_HEAD, OUTPUT_HEAD, RUNNING_HEAD = "Family", "Output", "Running"

RECIPE = Argument(
    "recipe", required=False, metavar="[RECIPE]",
    help="recipe (YAML), mergekit configuration or manifest; or give --task and roles",
)  # fmt: skip
PATHS = Argument(
    "paths", nargs=-1, metavar="[RECIPE] OUT",
    help="recipe, mergekit configuration or manifest; and the folder to write",
)  # fmt: skip
OUT = Option(
    "-o", "--out", type=click.Path(), metavar="PATH", heading=OUTPUT_HEAD,
    help="what to write, instead of the positional OUT",
)  # fmt: skip

ALLOW_PICKLE = Option(
    "--allow-pickle", is_flag=True, heading=FAMILY_HEAD,
    help="read pickled weights (.bin, .pt) without executing their code",
    more="[how](../how-to/model-sources.md#pickled-weights)",
)  # fmt: skip

FAMILY = (
    Option("--base", metavar="MODEL", heading=FAMILY_HEAD,
           help="model before instruction tuning; LATA needs it"),
    Option("--instruct", metavar="MODEL", heading=FAMILY_HEAD,
           help="model that the tasks were tuned from"),
    Option("--anchor", metavar="MODEL", heading=FAMILY_HEAD,
           help="the same role under its general name, for families without instruction tuning"),
    Option("--target", metavar="MODEL", heading=FAMILY_HEAD, show_default="the anchor",
           help="model to edit"),
    Option("--task", metavar="NAME=MODEL[:SCALE]", multiple=True, heading=FAMILY_HEAD,
           help="a fine-tune and its λ; repeatable, every name once"),
    Option("--method", metavar="NAME", heading=FAMILY_HEAD, show_default="lata",
           help="merge method; `taskvec methods` lists them"),
    Option("--scheme", heading=FAMILY_HEAD, words=("linear", "logarithmic", "threshold"),
           help="layer weights of lata; short for --set scheme=…"),
    Option("--granularity", heading=FAMILY_HEAD, words=("tensor", "module", "block"),
           help="what a layer of lata is; short for --set granularity=…"),
    Option("--threshold", metavar="SIGMA", heading=FAMILY_HEAD,
           help="σ of lata, in [-1, 1]; short for --set threshold=…"),
    Option("--normalize-weights", heading=FAMILY_HEAD, words=("none", "mean", "norm"),
           help="how lata normalizes its weights; short for --set normalize_weights=…"),
    Option("--set", "settings", metavar="NAME=VALUE", multiple=True, heading=FAMILY_HEAD,
           help="any parameter of the method (density=0.3), one of a task (math.density=0.2), or "
           "any key of a recipe (out.dtype=bf16); repeatable"),
    Option("--seed", type=WholeNumber(min=0), metavar="N", heading=FAMILY_HEAD,
           show_default="the recipe's, or 0", help="seed of everything that is random"),
    Option("--include", metavar="PATTERN", multiple=True, heading=FAMILY_HEAD,
           help="names of tensors to edit, as a shell pattern; repeatable"),
    Option("--exclude", metavar="PATTERN", multiple=True, heading=FAMILY_HEAD,
           help="names of tensors to leave alone; repeatable"),
    Option("--vocabulary", heading=FAMILY_HEAD, show_default="refuse",
           words=("refuse", "truncate-padding", "by-token", "union"),
           help="what to do where members have different token rows",
           more="[how](../how-to/vocabularies.md)"),
    Option("--new-tokens", heading=FAMILY_HEAD, show_default="copy", words=("copy", "drop"),
           help="with --vocabulary union: tokens that only tasks have"),
    ALLOW_PICKLE,
)  # fmt: skip

OUT_DTYPE = Option(
    "--dtype", heading=OUTPUT_HEAD, show_default="the target's, tensor by tensor",
    words=("bfloat16", "float16", "float32", "float64"), help="element type of the result",
)  # fmt: skip
SHARD_SIZE = Option(
    "--shard-size", metavar="SIZE", heading=OUTPUT_HEAD, show_default="5GB",
    help="largest file, with its unit: 5GB, 500MB",
)  # fmt: skip
PRECISION = Option(
    "--precision", heading=OUTPUT_HEAD, show_default="float32",
    words=("float32", "float64"), help="precision of the arithmetic",
)  # fmt: skip
FORCE = Option(
    "--force", is_flag=True, heading=OUTPUT_HEAD,
    help="replace what is at the output path, the whole of it",
)  # fmt: skip
COPY_CODE = Option(
    "--copy-code", is_flag=True, heading=OUTPUT_HEAD,
    help="copy the target's *.py files into the output; without it, a config whose auto_map names "
    "such a file is a warning",
)  # fmt: skip
TABLE = Option(
    "--table", type=click.Path(), metavar="FILE", heading=OUTPUT_HEAD,
    help="layer weights (CSV or JSON) to use instead of the method's",
)  # fmt: skip
FAITHFUL = Option(
    "--faithful", is_flag=True, heading=OUTPUT_HEAD,
    help="a mergekit configuration gives what mergekit gives, traps included, except for the bits "
    "of random masks",
)  # fmt: skip
ADAPTER = (
    Option("--form", "out_form", heading=OUTPUT_HEAD, show_default="model", words=("model", "lora"),
           help="a whole model, or a LoRA adapter over the target",
           more="[how](../how-to/use-adapters.md#one-adapter-out-of-several)"),
    Option("--rank", "out_rank", type=int, metavar="R", heading=OUTPUT_HEAD,
           show_default="the sum of the adapters' ranks",
           help="with --form lora: largest rank of a matrix"),
    Option("--rest", "out_rest", heading=OUTPUT_HEAD, show_default="refuse",
           words=("refuse", "drop", "save"),
           help="with --form lora: what to do with tensors that have no place in an adapter"),
)  # fmt: skip
OUTPUT = (OUT, OUT_DTYPE, SHARD_SIZE, PRECISION, *ADAPTER, FORCE, COPY_CODE, TABLE, FAITHFUL)

THREADS = Option(
    "--threads", type=WholeNumber(min=1), metavar="N", heading=RUNNING_HEAD,
    show_default="the processors, at most 8", help="worker threads; changes no bit of the result",
)  # fmt: skip
RUNNING = (
    THREADS,
    Option("--no-cache", is_flag=True, heading=RUNNING_HEAD,
           help="neither read nor write cached scans"),
    Option("--rescan", is_flag=True, heading=RUNNING_HEAD,
           help="scan again even if a cached scan matches"),
)  # fmt: skip


def fields_from(args: Arguments) -> dict[str, str]:
    """Names of fields by use, from `--fields`.

    Raises:
        UsageError: an entry is not USE=NAME.
    """
    texts = [text for text in (args.fields or "").split(",") if text]
    return pairs_of(texts, "--fields", "USE=NAME,…")


DATA_HEAD = "Format of data"
READING = (
    Option("--format", heading=DATA_HEAD, show_default="by file name and fields",
           words=("text", "chat", "classes", "lines", "folder", "npz", "idx"),
           help="what the data are"),
    Option("--fields", metavar="USE=NAME,…", heading=DATA_HEAD,
           help="names of fields: messages, prompt, response, text, image, label"),
)  # fmt: skip
