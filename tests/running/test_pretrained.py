"""Checkpoints that ask transformers to run or to fetch code."""

from __future__ import annotations

import ast
import builtins
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from taskvec import zoo  # noqa: E402
from taskvec.errors import CheckpointError, TaskvecError  # noqa: E402
from taskvec.evaluation.judges import parse_judge  # noqa: E402
from taskvec.running.encoding import open_tokenizer  # noqa: E402
from taskvec.running.loading import load as load_as  # noqa: E402
from taskvec.running.model import load, open_stored  # noqa: E402
from taskvec.running.pretrained import load_module  # noqa: E402

ROOT = Path(__file__).parents[2]
CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path({ran!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class C(LlamaConfig): model_type = "own"
class M(LlamaForCausalLM): config_class = C
class T(PreTrainedTokenizerFast): pass
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a model and its tokenizer."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in zoo.path("math").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A user who answers y to whatever is asked."""
    asked: list[str] = []

    def answer(prompt: str = "") -> str:
        asked.append(prompt)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    return asked


MAPS = {
    "config.json": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoModel": "own.M"},
    "tokenizer_config.json": {"AutoTokenizer": ["own.T", "own.T"]},
}


@pytest.mark.parametrize("file", MAPS)
@pytest.mark.parametrize("is_known", [True, False])
def test_nothing_asks_whether_to_run_code(
    model: Path, tmp_path: Path, yes: list[str], file: str, is_known: bool
) -> None:
    (model / "own.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    change(model / file, auto_map=MAPS[file])
    if not is_known:
        change(model / "config.json", model_type="own")
        change(model / "tokenizer_config.json", tokenizer_class="Own")
    for open_it in (
        lambda: load(open_stored(model)),
        lambda: load_as(model, "it", "AutoModel"),
        lambda: load_as(model, "it", "LlamaForCausalLM"),
        lambda: open_tokenizer(model, "it"),
        lambda: parse_judge(f"classifier:{model}"),
    ):
        with suppress(TaskvecError):
            open_it()
    assert yes == []
    assert not (tmp_path / "ran").exists()


def test_a_model_that_needs_its_code_is_refused(model: Path) -> None:
    change(model / "config.json", auto_map=MAPS["config.json"], model_type="own")
    with pytest.raises(CheckpointError, match="architecture that transformers has"):
        load_as(model, "it", "AutoModel")


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize(
    "value", ["someone/kernel", "someone/kernel@main:attention", "flash_attention_2"]
)
def test_an_attention_that_is_fetched_is_ignored(
    model: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any
) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(
        "transformers.modeling_utils.lazy_import_flash_attention",
        lambda name, **_: fetched.append(name),
    )
    change(model / "config.json", **{key: value})
    loaded = load(open_stored(model)).module
    assert loaded.config._attn_implementation == "sdpa"
    assert fetched == []


def test_an_attention_of_a_tower_that_is_fetched_is_ignored(tmp_path: Path) -> None:
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    config = transformers.CLIPConfig(
        text_config=text | {"intermediate_size": 8, "max_position_embeddings": 4},
        vision_config={
            "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 8, "image_size": 4, "patch_size": 2,
        },
        projection_dim=4,
    )  # fmt: skip
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["_attn_implementation"] = {"vision_config": "someone/kernel", "text_config": "eager"}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    module, _ = load_module(tmp_path, "CLIPModel")
    assert module.config.vision_config._attn_implementation == "sdpa"
    assert module.config.text_config._attn_implementation == "eager"


@pytest.mark.parametrize("value", ["eager", "sdpa"])
def test_an_attention_of_transformers_stays(model: Path, value: str) -> None:
    change(model / "config.json", _attn_implementation=value)
    assert load(open_stored(model)).module.config._attn_implementation == value


@pytest.mark.parametrize("value", ["deepgemm", "sonicmoe", "someone/kernel"])
def test_experts_that_are_fetched_are_ignored(model: Path, value: str) -> None:
    change(model / "config.json", experts_implementation=value)
    config = load(open_stored(model)).module.config
    assert config._experts_implementation in ("eager", "grouped_mm")


@pytest.mark.parametrize("method", ["mxfp4", "fp8", "eetq", "someone/kernel", None, ["gptq"]])
def test_a_quantisation_that_may_fetch_code_is_refused(model: Path, method: Any) -> None:
    change(model / "config.json", quantization_config={"quant_method": method})
    with pytest.raises(CheckpointError, match="may fetch code"):
        load(open_stored(model))


def test_an_adapter_beside_the_weights_is_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "megatron_core": "own"}')
    for open_it in (
        lambda: load(open_stored(model)),
        lambda: load_as(model, "it", "AutoModel"),
        lambda: parse_judge(f"classifier:{model}"),
    ):
        with pytest.raises(CheckpointError, match=r"adapter_config\.json beside config\.json"):
            open_it()


# Only one place loads


LOADERS = ("from_pretrained", "from_config", "load_dataset")


@pytest.mark.parametrize("folder", ["src", "benchmarks"])
def test_every_call_that_loads_refuses_code(folder: str) -> None:
    seen = 0
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            name = getattr(getattr(node, "func", None), "attr", "")
            if name not in LOADERS:
                continue
            assert isinstance(node, ast.Call)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert given.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
            seen += 1
    assert seen
