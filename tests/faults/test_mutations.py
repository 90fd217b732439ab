"""Documents that were edited into something else: an error of ours or success, and nothing else.

A mutation replaces, removes, adds or renames one value somewhere in a valid document. The same seed
gives the same mutations; `SEEDS` of each kind are tried.
"""

from __future__ import annotations

import json
import random
import shutil
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests.adapters import pair, write_adapter
from tests.conftest import read_file, write_checkpoint, write_safetensors
from tests.hostile import in_time

import taskvec as tv
from taskvec.errors import TaskvecError
from taskvec.merging.layer_report import weighed_rows
from taskvec.merging.scans import save_scan
from taskvec.recipes.located import parse_yaml
from taskvec.recipes.mergekit.convert import convert
from taskvec.recipes.reading import read_recipe

SEEDS = 13
WIDTH = 4
WORDS = ["<unk>", "<s>", "the", "cat", "sat"]
LOOSE = "lora_adapter_metadata"
PROJECTION = "model.layers.0.self_attn.q_proj"
MADE_UP: list[Any] = [
    None, True, False, 0, -1, 2, 1.5, -0.5, 10**30, 10**400, 1e308, float("nan"), float("-inf"),
    "", "x", "a.b.c", "../x", "(", "*", "[0", "8", "-1", "\ud800", "\0", "e\u0301", "x" * 300,
    [], {}, [None], [[]], [1, 2], ["x"], {"x": 1}, {"": None}, {"0": []}, [{"content": 1}],
]  # fmt: skip
WORDS_OF_YAML = [
    "1:30.5", "190:20:30", "0b12", "0o9", ".nan", "2024-13-45", "!!int x", "!!binary x", "*a",
    "&a [*a]", "<<: 1", "!!set {a, a}", "? [a]", "1e400", "~", "-.inf", "!!timestamp x",
    "!!omap x", "=", "!!null x", "!!bool x", "!!float 1:x",
]  # fmt: skip


@dataclass(frozen=True)
class Document:
    """A valid document, how its file is written, and what reads it."""

    path: Path
    value: Any
    read: Callable[[], object]
    write: Callable[[Path, Any], None] = lambda path, value: _write_json(path, value)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _write_yaml(path: Path, value: Any) -> None:
    text = yaml.safe_dump(value, sort_keys=False)
    for i, word in enumerate(WORDS_OF_YAML):
        text = text.replace(f"YAML{i}END", word)
    path.write_text(text)


def _write_csv(path: Path, value: Any) -> None:
    cells = [row if isinstance(row, list) else [row] for row in value]
    text = "\n".join(",".join(map(str, row)) for row in cells)
    path.write_bytes(text.encode(errors="surrogatepass"))


def _write_metadata(path: Path, value: Any) -> None:
    header, data = read_file(path)
    text = json.dumps(header | {"__metadata__": value}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    is_list = isinstance(value, list)
    items = value.items() if isinstance(value, dict) else enumerate(value if is_list else ())
    for key, inner in items:
        yield from _places(inner, (*at, key))


def mutated(value: Any, rng: random.Random, made_up: list[Any]) -> Any:
    """The value with one change."""
    value = json.loads(json.dumps(value))
    by_depth: dict[int, list[tuple[Any, ...]]] = {}
    for place in _places(value):
        by_depth.setdefault(len(place), []).append(place)
    *above, key = rng.choice(by_depth[rng.choice(list(by_depth))]) or (None,)
    new = rng.choice(made_up)
    if key is None:
        return new
    holder = value
    for part in above:
        holder = holder[part]
    change = rng.random()
    if change < 0.15:
        del holder[key]
    elif change < 0.25 and isinstance(holder, dict):
        holder[rng.choice(["x", "", "0", "name", key + "_", "\udcff"])] = holder.pop(key)
    elif change < 0.3:
        holder[key] = [holder[key]]
    else:
        holder[key] = new
    return value


def _where(error: Exception) -> str:
    """What an error is, and the last line of ours that it went through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "taskvec" in f.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    return f"{place} {type(error).__name__}: {str(error)[:100]}"


def _tokenizer(words: list[str], added: list[str]) -> dict[str, Any]:
    entries = [{"id": len(words) + i, "content": word, "special": False, "single_word": False,
                "lstrip": False, "rstrip": False, "normalized": True}
               for i, word in enumerate(added)]  # fmt: skip
    vocab = {word: i for i, word in enumerate(words)}
    return {"model": {"type": "WordLevel", "vocab": vocab}, "added_tokens": entries}


def _model(folder: Path, seed: int, added: list[str]) -> Path:
    rng, rows = np.random.default_rng(seed), len(WORDS) + len(added)
    shapes = {"model.embed_tokens.weight": (rows, WIDTH), "lm_head.weight": (rows, WIDTH),
              f"{PROJECTION}.weight": (WIDTH, WIDTH), "model.norm.weight": (WIDTH,)}  # fmt: skip
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": rows,
              "num_hidden_layers": 1, "hidden_size": WIDTH, "tie_word_embeddings": False,
              "text_config": {"vocab_size": rows, "dtype": "float32"}}  # fmt: skip
    weights = {n: rng.normal(0, 1, shape).astype(np.float32) for n, shape in shapes.items()}
    write_checkpoint(folder, weights, "F32", shards=2, config=config)
    decoder = {str(len(WORDS) + i): {"content": w, "special": False} for i, w in enumerate(added)}
    files = {
        "tokenizer.json": _tokenizer(WORDS, added),
        "tokenizer_config.json": {"tokenizer_class": "T5Tokenizer", "extra_ids": 0,
                                  "added_tokens_decoder": decoder},
        "special_tokens_map.json": {"unk_token": "<unk>", "bos_token": {"content": "<s>"},
                                    "additional_special_tokens": ["<s>"]},
        "added_tokens.json": {w: len(WORDS) + i for i, w in enumerate(added)},
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "x"}],
        "generation_config.json": {"eos_token_id": 1},
    }  # fmt: skip
    for name, value in files.items():
        _write_json(folder / name, value)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutations")


@pytest.fixture(scope="module")
def documents(root: Path) -> dict[str, Document]:
    """Every kind of document that people write, edit or exchange."""
    places = {n: _model(root / n, i, []) for i, n in enumerate(["base", "instruct", "code"])}
    places["math"] = _model(root / "math", 3, ["<new>", "<other>"])
    out, cache = root / "out", {"cache": "off"}
    factors = pair(PROJECTION, WIDTH, WIDTH, rank=2)
    adapter = write_adapter(
        root / "adapter", factors, r=2, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3},
        target_modules=["q_proj"], base_model_name_or_path="instruct",
    )  # fmt: skip

    loose = root / "loose.safetensors"
    named = {f"transformer.{name}": values for name, values in factors.items()}
    about = {"transformer.lora_alpha": 3, "transformer.alpha_pattern": {"q_proj": 2}}
    write_safetensors(loose, named, "F32")
    _write_metadata(loose, {LOOSE: json.dumps(about)})

    def merged(task: str = "math", **options: Any) -> object:
        shutil.rmtree(out, ignore_errors=True)
        roles = {"anchor": root / "instruct", "base": root / "base", "vocabulary": "union"}
        family = tv.Family({task: root / task, "code": root / "code"}, **roles)
        return tv.merge(family, out, method="lata", scale=0.5, **cache, **options)

    scan = tv.scan(tv.Family({"code": root / "code"}, anchor=root / "instruct", base=root / "base"))
    save_scan(scan, root / "scan.json")
    table = tv.lata(scan)
    table.save(root / "table.json")
    table.save(root / "table.csv")
    family = tv.Family(
        {"math": root / "math"}, anchor=root / "instruct", vocabulary="union"
    )  # rows of new tokens in the file
    tv.extract(family, root / "vector.safetensors")
    merged()
    made = shutil.copytree(out, root / "made")

    def of(path: Path, read: Callable[[], object], **more: Any) -> Document:
        return Document(path, json.loads(path.read_text()), read, **more)

    def scanned() -> object:
        found = tv.load_scan(root / "scan.json")
        return [tv.lata(found), *(weighed_rows(found, g, 0.9) for g in ("tensor", "block"))]

    def tabled(name: str) -> Callable[[], object]:
        return lambda: [tv.load_table(root / name).save(root / "copy.csv"), repr(name)]

    def checked() -> object:
        return tv.verify(made, inputs=True, replay=True, **cache)

    def replayed() -> object:
        shutil.rmtree(out, ignore_errors=True)
        return tv.merge(made / "taskvec-manifest.json", out, **cache)

    def recipe() -> object:
        return tv.plan(root / "recipe.yaml")

    def imported() -> object:
        path = root / "mergekit.yaml"
        found = convert(parse_yaml(path.read_text(), str(path)), root)
        return read_recipe(parse_yaml(yaml.safe_dump(found.recipe), str(path)), root)

    math, instruct = places["math"], places["instruct"]
    ties = {"merge_method": "ties", "base_model": "instruct", "dtype": "float32",
            "models": [{"model": "code", "parameters": {"weight": [0.5, 1], "density": 0.5}},
                       {"model": "instruct"}],
            "parameters": {"normalize": True, "weight": [{"filter": "mlp", "value": 1}]},
            "tokenizer_source": "union"}  # fmt: skip
    whole = {"base": "base", "instruct": {"model": "instruct", "hub": "org/x"},
             "tasks": {"code": {"model": "code", "scale": {"depth": [0.2, 0.8], "outside": 0}}},
             "method": {"name": "lata", "scheme": "linear", "threshold": 0.9},
             "include": ["model.*"], "exclude": ["*.norm.weight"],
             "layers": [{"pattern": "odd(?P<block>\\d+)", "tower": "x", "module": "mlp"}],
             "out": {"dtype": "float32", "shard_size": "5GB", "precision": "float32"},
             "vocabulary": "by-token", "seed": 3,
             "stages": {"s": {"instruct": "instruct", "method": "task_arithmetic",
                              "tasks": {"a": {"model": "code", "scale": 1}}}}}  # fmt: skip
    found = {
        "config": of(math / "config.json", merged),
        "config of the target": of(instruct / "config.json", merged),
        "index": of(math / "model.safetensors.index.json", merged),
        "modules": of(math / "modules.json", merged),
        "modules of the target": of(instruct / "modules.json", merged),
        "adapter": of(
            adapter / "adapter_config.json", lambda: [merged("adapter"), tv.inspect(adapter)]
        ),
        "scan": of(root / "scan.json", scanned),
        "table": of(root / "table.json", tabled("table.json")),
        "manifest": of(made / "taskvec-manifest.json", checked),
        "manifest replayed": of(made / "taskvec-manifest.json", replayed),
        "recipe": Document(root / "recipe.yaml", whole, recipe, _write_yaml),
        "mergekit": Document(root / "mergekit.yaml", ties, imported, _write_yaml),
    }
    for name in TOKENIZERS:
        found[name] = of(math / f"{name}.json", merged)
        found[f"{name} of the target"] = of(instruct / f"{name}.json", merged)
    rows = [line.split(",") for line in (root / "table.csv").read_text().splitlines()]
    found["table as CSV"] = Document(root / "table.csv", rows, tabled("table.csv"), _write_csv)
    vector = root / "vector.safetensors"
    metadata = read_file(vector)[0]["__metadata__"]
    read = lambda: [tv.inspect(vector), merged("vector.safetensors")]  # noqa: E731
    found["vector"] = Document(vector, metadata, read, _write_metadata)
    new = json.loads(metadata["new_tokens"])
    found["alphas of a loose adapter"] = Document(
        loose, about, lambda: merged("loose.safetensors"),
        lambda path, value: _write_metadata(path, {LOOSE: json.dumps(value)}),
    )  # fmt: skip
    found["new tokens of a vector"] = Document(
        vector, new, read,
        lambda path, value: _write_metadata(path, metadata | {"new_tokens": json.dumps(value)}),
    )  # fmt: skip
    return found


TOKENIZERS = ("tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens")
KINDS = [
    "config", "config of the target", "index", "modules", "modules of the target", "adapter",
    "alphas of a loose adapter", "scan", "table", "table as CSV", "manifest", "manifest replayed",
    "recipe", "mergekit", "vector", "new tokens of a vector", *TOKENIZERS,
    *(f"{name} of the target" for name in TOKENIZERS),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_document_is_an_error_of_ours_or_fine(documents, kind):
    document = documents[kind]
    is_yaml = document.write is _write_yaml
    made_up = [*MADE_UP, *(f"YAML{i}END" for i in range(len(WORDS_OF_YAML)))]
    if document.path.suffix != ".yaml":
        document.write(document.path, document.value)
    else:
        _write_yaml(document.path, document.value)
    document.read()  # as it is
    before, odd = document.path.read_bytes(), {}
    for seed in range(SEEDS):
        rng = random.Random(f"{kind} {seed}")
        value = mutated(document.value, rng, made_up if is_yaml else MADE_UP)
        try:
            document.write(document.path, value)
        except (UnicodeEncodeError, yaml.YAMLError, TypeError):
            continue  # no such file can be
        try:
            with in_time(60), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                document.read()
        except TaskvecError:
            pass
        except Exception as error:
            odd.setdefault(_where(error), []).append(seed)
        finally:
            document.path.write_bytes(before)
    assert odd == {}
