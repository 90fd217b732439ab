"""A merged folder is an ordinary Hugging Face folder: transformers loads it like any other."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tests.conftest import read_checkpoint, read_raw, run_cli

from taskvec.cli.main import main

transformers = pytest.importorskip("transformers")

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {
        w: i for i, w in enumerate(["<unk>", "</s>", "a", "b", "c", "what", "is", "+", "1", "2"])
    }
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    made.chat_template = TEMPLATE
    return made


def model(seed: int, like: Any = None, tied: bool = False) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=1, pad_token_id=1, tie_word_embeddings=tied,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config)
    if like is not None:
        state = {n: w + 0.02 * torch.randn_like(w) for n, w in like.state_dict().items()}
        made.load_state_dict(state)
        if tied:
            made.tie_weights()
    made.generation_config.temperature = 0.7
    made.generation_config.do_sample = True
    return made


def save(folder: Path, made: Any, dtype: torch.dtype, **options: Any) -> Path:
    made.to(dtype).save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    made.to(torch.float32)
    return folder


def save_family(root: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> dict[str, Path]:
    tied = options.pop("tied", False)
    base = model(0, tied=tied)
    instruct = model(1, like=base, tied=tied)
    members = {"base": base, "instruct": instruct, "math": model(2, like=instruct, tied=tied)}
    return {name: save(root / name, made, dtype, **options) for name, made in members.items()}


def arguments(out: Path, family: dict[str, Path], *flags: Any) -> list[str]:
    roles = ["--base", family["base"], "--instruct", family["instruct"]]
    words = ["merge", out, *roles, "--task", f"math={family['math']}:0.5", "--quiet", *flags]
    return [str(word) for word in words]


def merge(out: Path, family: dict[str, Path], *flags: Any) -> None:
    assert main(arguments(out, family, *flags)) == 0


def load(folder: Path, caplog: pytest.LogCaptureFixture) -> Any:
    """The model; nothing may be warned about."""
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            made, about = transformers.AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True, dtype="auto"
            )
    finally:
        transformers.utils.logging.disable_propagation()
    assert [r.getMessage() for r in caplog.records] == []
    assert not any(about.values()), about
    return made


def test_merged_model_works(tmp_path, caplog):
    family = save_family(tmp_path)
    code, _, err = run_cli(*arguments(tmp_path / "out", family))
    assert code == 0, err
    made = load(tmp_path / "out", caplog)
    assert made.dtype == torch.bfloat16
    stored = read_checkpoint(tmp_path / "out")
    for name, weight in made.state_dict().items():
        np.testing.assert_array_equal(weight.float().numpy(), stored[name])
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = loaded("what is 1 + 2", return_tensors="pt")
    logits = made(**ids).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0
    text = loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert text == "<user> a\n"
    answer = made.generate(**ids, max_new_tokens=3, do_sample=False, temperature=None)
    assert answer.shape[1] > ids["input_ids"].shape[1]
    assert made.generation_config.do_sample is True
    assert made.generation_config.temperature == 0.7


def test_files_of_the_target_are_carried_over(tmp_path):
    family = save_family(tmp_path)
    target = family["instruct"]
    (target / "additional_chat_templates").mkdir()
    (target / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (target / "LICENSE.txt").write_text("do as you please")
    (target / "trainer_state.json").write_text("{}")
    (target / "training_args.bin").write_bytes(b"pickle")
    (target / "optimizer.pt").write_bytes(b"pickle")
    (family["math"] / "math_only.json").write_text("{}")
    (target / "README.md").write_text("---\nlicense: mit\n---\nthe target's own card\n")
    merge(tmp_path / "out", family)
    written = {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert written == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "additional_chat_templates/tools.jinja", "LICENSE.txt", "README.md",
        "model.safetensors", "taskvec.yaml", "taskvec-manifest.json",
    }  # fmt: skip
    for name in written - {
        "README.md",
        "model.safetensors",
        "taskvec.yaml",
        "taskvec-manifest.json",
    }:
        assert (tmp_path / "out" / name).read_bytes() == (target / name).read_bytes()
    assert "the target's own card" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_of_the_result_stands_in_the_config(tmp_path, caplog, dtype):
    family = save_family(tmp_path)
    before = json.loads((family["instruct"] / "config.json").read_text())
    merge(tmp_path / "out", family, "--dtype", dtype)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == before | {"dtype": dtype}
    assert {kind for kind, _, _ in read_raw(tmp_path / "out").values()} == {DTYPES[dtype]}
    assert str(load(tmp_path / "out", caplog).dtype) == f"torch.{dtype}"


def test_dtype_in_a_config_of_an_earlier_transformers(tmp_path):
    family = save_family(tmp_path)
    path = family["instruct"] / "config.json"
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    config["vision_config"] = {"torch_dtype": "bfloat16", "hidden_size": 1}
    path.write_text(json.dumps(config))
    merge(tmp_path / "out", family, "--dtype", "float16")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config | {
        "torch_dtype": "float16", "vision_config": {"torch_dtype": "float16", "hidden_size": 1},
    }  # fmt: skip


def test_shards_with_index(tmp_path, caplog):
    family = save_family(tmp_path)
    merge(tmp_path / "one", family)
    merge(tmp_path / "many", family, "--shard-size", "2kB")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(
        len(raw) for _, _, raw in read_raw(tmp_path / "one").values()
    )
    assert read_raw(tmp_path / "many") == read_raw(tmp_path / "one")
    one, many = load(tmp_path / "one", caplog), load(tmp_path / "many", caplog)
    assert all(torch.equal(w, many.state_dict()[n]) for n, w in one.state_dict().items())


def test_inputs_in_shards_give_the_same_bytes(tmp_path):
    """However transformers cut the inputs, the files written are the same."""
    single = save_family(tmp_path / "single")
    sharded = save_family(tmp_path / "sharded", max_shard_size="3kB")
    assert (sharded["math"] / "model.safetensors.index.json").exists()
    assert not (single["math"] / "model.safetensors.index.json").exists()
    for size in ("5GB", "2kB"):
        merge(tmp_path / f"a{size}", single, "--shard-size", size)
        merge(tmp_path / f"b{size}", sharded, "--shard-size", size)
        a = {p.name: p.read_bytes() for p in (tmp_path / f"a{size}").glob("*.safetensors*")}
        b = {p.name: p.read_bytes() for p in (tmp_path / f"b{size}").glob("*.safetensors*")}
        assert a == b


def test_tied_embeddings(tmp_path, caplog):
    """transformers stores them once; the result has them once, and they are tied again."""
    family = save_family(tmp_path, tied=True)
    assert "lm_head.weight" not in read_raw(family["math"])
    merge(tmp_path / "out", family)
    assert set(read_raw(tmp_path / "out")) == set(read_raw(family["math"]))
    made = load(tmp_path / "out", caplog)
    assert made.lm_head.weight is made.model.embed_tokens.weight


def test_merged_model_is_the_sum(tmp_path, caplog):
    """Against the formula in float64, over the weights that transformers reads."""
    family = save_family(tmp_path, torch.float32)
    merge(tmp_path / "out", family, "--method", "task_arithmetic")
    start, task = read_checkpoint(family["instruct"]), read_checkpoint(family["math"])
    made = load(tmp_path / "out", caplog)
    for name, weight in made.state_dict().items():
        expected = start[name] + 0.5 * (task[name].astype("f8") - start[name])
        np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-6, atol=1e-7)


# --- the model card ------------------------------------------------------------------------------


def card(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def licensed(family: dict[str, Path], **licences: str) -> None:
    for member, licence in licences.items():
        (family[member] / "README.md").write_text(f"---\nlicense: {licence}\n---\n# card\n")


def test_card(tmp_path):
    family = save_family(tmp_path)
    licensed(family, base="mit", instruct="mit", math="mit")
    merge(tmp_path / "my-model", family, "--scheme", "linear")
    front, text = card(tmp_path / "my-model")
    assert front == {
        "library_name": "transformers", "license": "mit",
        "tags": ["task-arithmetic", "merge", "taskvec", "lata"],
    }  # fmt: skip
    assert text.startswith("# my-model\n")
    assert "linear" in text
    assert "| math | 0.5 |" in text
    assert str(tmp_path) not in (tmp_path / "my-model" / "README.md").read_text()


@pytest.mark.parametrize("licences", [
    {}, {"base": "mit", "instruct": "mit", "math": "apache-2.0"},
    {"base": "mit", "instruct": "mit"},
])  # fmt: skip
def test_card_states_a_licence_only_where_all_agree(tmp_path, licences):
    family = save_family(tmp_path)
    licensed(family, **licences)
    merge(tmp_path / "out", family)
    front, text = card(tmp_path / "out")
    assert "license" not in front
    assert f"| task 'math' | math | {licences.get('math', 'not stated')} |" in text


@pytest.mark.parametrize(
    "readme", ["---\n: broken: [\n---\n", "---\n- a list\n---\n", "no front matter", "---\n"]
)
def test_card_of_a_member_that_cannot_be_read(tmp_path, readme):
    family = save_family(tmp_path)
    (family["math"] / "README.md").write_text(readme)
    (family["base"] / "README.md").write_bytes(b"\xff\xfe")
    merge(tmp_path / "out", family)
    assert "| task 'math' | math | not stated |" in card(tmp_path / "out")[1]
