"""A merge written as a LoRA adapter: exact stacks, ranks, what has no place, plan and verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.adapters import PREFIX, deltas, pair, write_adapter
from tests.conftest import CONFIG, Arrays, run_cli, write_checkpoint
from tests.quantisers import FORMATS, write_quantised

import taskvec as tv
from taskvec.errors import TaskvecError, UsageError

BLOCK = "model.layers.0."
Q, UP, HEAD = f"{BLOCK}self_attn.q_proj", f"{BLOCK}mlp.up_proj", "lm_head"
NORM, EMBED = f"{BLOCK}input_layernorm.weight", "model.embed_tokens.weight"
SHAPES = {f"{Q}.weight": (24, 16), f"{UP}.weight": (40, 16), f"{HEAD}.weight": (30, 16),
          NORM: (16,), EMBED: (30, 16), f"{Q}.bias": (24,)}  # fmt: skip


def weights(seed: int = 0, scale: float = 0.1) -> Arrays:
    rng = np.random.default_rng(seed)
    return {n: rng.normal(0, scale, s).astype(np.float32) for n, s in SHAPES.items()}


def adapter(folder: Path, modules: list[str], rank: int, seed: int, **config: Any) -> Arrays:
    """An adapter, and what it changes at scale 1, float64."""
    factors: Arrays = {}
    for module in modules:
        factors |= pair(module, *SHAPES[f"{module}.weight"], rank=rank, seed=seed)
    write_adapter(folder, factors, r=rank, lora_alpha=1.5 * rank, **config)
    return deltas(factors)


@pytest.fixture
def family(tmp_path: Path) -> tuple[tv.Family, dict[str, Arrays]]:
    """An anchor with two adapters of other ranks, one of which leaves a module as it is."""
    write_checkpoint(tmp_path / "anchor", weights(), "F32")
    taus = {
        "code": adapter(tmp_path / "code", [Q, UP], 3, 1),
        "math": adapter(tmp_path / "math", [Q, HEAD], 4, 2),
    }
    tasks = {name: tmp_path / name for name in taus}
    return tv.Family(anchor=tmp_path / "anchor", tasks=tasks), taus


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def products(folder: Path) -> Arrays:
    tensors = {n.removeprefix(PREFIX): x for n, x in
               load_file(folder / "adapter_model.safetensors").items()}  # fmt: skip
    return deltas({n: x.astype(np.float64) for n, x in tensors.items()}, scaling=1.0)


def close(one: Arrays, other: Arrays, atol: float = 1e-7) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert np.allclose(one[name], other[name], rtol=0, atol=atol), name


def summed(taus: dict[str, Arrays], scale: dict[str, float]) -> Arrays:
    names = {name for tau in taus.values() for name in tau}
    return {n: sum(scale[t] * tau[n] for t, tau in taus.items() if n in tau) for n in names}


def test_adapters_are_stacked_exactly(family, tmp_path):
    members, taus = family
    scale = {"code": 0.5, "math": -0.75}
    done = tv.merge(members, tmp_path / "out", method="task_arithmetic", scale=scale, form="lora")
    close(products(tmp_path / "out"), summed(taus, scale))
    config = config_of(tmp_path / "out")
    ranks = {m: config["rank_pattern"].get(m, config["r"]) for m in (Q, UP, HEAD)}
    assert ranks == {Q: 7, UP: 3, HEAD: 4}
    alphas = {m: config["alpha_pattern"].get(m, config["lora_alpha"]) for m in (Q, UP, HEAD)}
    assert alphas == ranks  # so that α / r is 1
    assert config["target_modules"] == ["lm_head", "q_proj", "up_proj"]
    assert {row.kept for row in done.factored} == {"stacked"}
    assert done.lost < 1e-12


def test_the_adapter_merged_into_the_target_is_the_merge(family, tmp_path):
    members, _ = family
    rows = {n: {"code": 0.25 + i / 8, "math": 1 - i / 8} for i, n in enumerate(sorted(SHAPES))}
    table = tmp_path / "table.csv"
    lines = [f"{name},{row['code']},{row['math']}" for name, row in rows.items()]
    table.write_text("\n".join(["tensor,code,math", *lines]) + "\n")
    how: dict[str, Any] = {"method": "task_arithmetic", "scale": 0.8, "table": table}
    tv.merge(members, tmp_path / "model", **how)
    tv.merge(members, tmp_path / "lora", form="lora", **how)
    again = tv.Family(anchor=tmp_path / "anchor", tasks={"both": tmp_path / "lora"})
    tv.merge(again, tmp_path / "again", method="task_arithmetic", scale=1)
    close(*(load_file(tmp_path / f / "model.safetensors") for f in ("again", "model")), atol=1e-7)


def test_a_rank_cuts_the_sum_and_the_error_is_told(family, tmp_path):
    members, taus = family
    done = tv.merge(members, tmp_path / "out", method="task_arithmetic", scale=1, form="lora",
                    rank=5)  # fmt: skip
    tau, found = summed(taus, {"code": 1, "math": 1}), products(tmp_path / "out")
    kept = {row.name: row for row in done.factored}
    assert {n: row.kept for n, row in kept.items()} == {
        f"{Q}.weight": "lora", f"{UP}.weight": "stacked", f"{HEAD}.weight": "stacked"
    }  # fmt: skip
    values = np.linalg.svd(tau[f"{Q}.weight"], compute_uv=False)
    best = np.sqrt((values[5:] ** 2).sum() / (values**2).sum())
    assert kept[f"{Q}.weight"].error == pytest.approx(best, rel=1e-4)
    lost = sum(((tau[n] - found[n]) ** 2).sum() for n in tau) / sum(
        (t**2).sum() for t in tau.values()
    )
    assert done.lost == pytest.approx(lost, rel=1e-4)
    manifest = json.loads((tmp_path / "out" / "taskvec-manifest.json").read_text())
    assert manifest["adapter"]["error"] == pytest.approx(np.sqrt(lost), rel=1e-4)
    assert {row["name"] for row in manifest["adapter"]["tensors"]} == tau.keys()


def test_scale_zero_and_equal_members_leave_nothing(family, tmp_path):
    members, taus = family
    tv.merge(members, tmp_path / "out", method="task_arithmetic", form="lora",
             scale={"code": 0, "math": 1})  # fmt: skip
    close(products(tmp_path / "out"), taus["math"])
    with pytest.raises(UsageError, match="changes nothing"):  # which no --rest helps
        tv.merge(members, tmp_path / "none", method="task_arithmetic", scale=0, form="lora")
    assert not (tmp_path / "none").exists()


@pytest.fixture
def full(tmp_path: Path) -> tv.Family:
    """A whole fine-tune of two linear weights, beside an adapter."""
    anchor = weights()
    rng = np.random.default_rng(5)
    tuned = dict(anchor)
    for name in (f"{Q}.weight", f"{UP}.weight"):
        tuned[name] = anchor[name] + rng.normal(0, 0.01, SHAPES[name]).astype(np.float32)
    write_checkpoint(tmp_path / "anchor", anchor, "F32")
    write_checkpoint(tmp_path / "whole", tuned, "F32")
    adapter(tmp_path / "lora", [Q], 2, 1)
    return tv.Family(anchor=tmp_path / "anchor", tasks={n: tmp_path / n for n in ("whole", "lora")})


def test_whole_fine_tunes_need_a_rank(full, tmp_path):
    with pytest.raises(UsageError) as caught:
        tv.merge(full, tmp_path / "out", method="task_arithmetic", scale=1, form="lora")
    assert repr(f"{UP}.weight") in str(caught.value)
    assert "rank" in str(caught.value)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare", "karcher", "average"])
def test_methods_that_are_no_sum_are_compressed(full, tmp_path, method):
    scales = {} if method in ("karcher", "average") else {"scale": 0.7}
    tv.merge(full, tmp_path / "model", method=method, **scales)
    tv.merge(full, tmp_path / "out", method=method, form="lora", rank=16, **scales)
    anchor = load_file(tmp_path / "anchor" / "model.safetensors")
    merged = load_file(tmp_path / "model" / "model.safetensors")
    found = products(tmp_path / "out")
    close(found, {n: merged[n].astype(np.float64) - anchor[n] for n in found}, atol=2e-7)
    assert found.keys() == {f"{Q}.weight", f"{UP}.weight"}


def test_what_has_no_place_is_refused_dropped_or_saved(tmp_path):
    anchor, other = weights(), weights(1)
    tuned = anchor | {n: anchor[n] + 0.01 * other[n] for n in (NORM, EMBED, f"{UP}.weight")}
    write_checkpoint(tmp_path / "anchor", anchor, "F32")
    write_checkpoint(tmp_path / "whole", tuned, "F32")
    family = tv.Family(anchor=tmp_path / "anchor", tasks={"whole": tmp_path / "whole"})
    how: dict[str, Any] = {"method": "ties", "scale": 1, "form": "lora", "rank": 16}
    with pytest.raises(UsageError) as caught:
        tv.merge(family, tmp_path / "out", **how)
    assert EMBED in str(caught.value) or NORM in str(caught.value)
    dropped = tv.merge(family, tmp_path / "dropped", rest="drop", **how)
    assert 0 < dropped.lost < 1
    saved = tv.merge(family, tmp_path / "saved", rest="save", **how)
    assert saved.lost < 1e-9
    tensors = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    tv.merge(family, tmp_path / "model", method="ties", scale=1)
    merged = load_file(tmp_path / "model" / "model.safetensors")
    for name in (NORM, EMBED):
        assert np.array_equal(tensors[PREFIX + name], merged[name])
    assert config_of(tmp_path / "saved")["modules_to_save"] == [
        "model.embed_tokens", f"{BLOCK}input_layernorm"
    ]  # fmt: skip


@pytest.mark.parametrize("rank", [None, 5])
def test_verify_and_replay(family, tmp_path, rank):
    members, _ = family
    out = tmp_path / "out"
    how: dict[str, Any] = {"method": "task_arithmetic", "form": "lora", "rank": rank}
    tv.merge(members, out, scale=0.5, **how)
    assert {c.what: c.outcome for c in tv.verify(out, replay=True)} == dict.fromkeys(
        ("output", "files", "anchor", "target", "task:code", "task:math", "replay"), "same"
    )
    tv.merge(out / "taskvec-manifest.json", tmp_path / "again")  # stacks have the same bits
    if rank is None:
        name = "adapter_model.safetensors"
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    tensors = load_file(out / "adapter_model.safetensors")
    first = f"{PREFIX}{Q}.lora_B.weight"
    tensors[first] = tensors[first] * np.float32(1.01)
    save_file(tensors, out / "adapter_model.safetensors")
    checks = {c.what: c for c in tv.verify(out, inputs=False, replay=True)}
    assert checks["output"].outcome == checks["replay"].outcome == "different"
    assert f"{Q}.weight" in checks["replay"].detail


def test_an_adapter_of_adapters_is_over_a_stored_model(family, tmp_path):
    members, _ = family
    from dataclasses import replace

    over = replace(members, target=tmp_path / "math")
    with pytest.raises(UsageError, match="target"):
        tv.merge(over, tmp_path / "out", method="task_arithmetic", scale=1, form="lora")


def test_command_line(family, tmp_path):
    recipe = {
        "anchor": "anchor", "method": "task_arithmetic", "out": {"form": "lora"},
        "tasks": {"code": {"model": "code", "scale": 1}, "math": {"model": "math", "scale": 1}},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    code, out, err = run_cli("plan", "r.yaml", "--json", cwd=tmp_path)
    assert code == 0, err
    told = json.loads(out)["adapter"]
    sizes = [rank * sum(SHAPES[f"{m}.weight"]) for m, rank in ((Q, 7), (UP, 3), (HEAD, 4))]
    assert told["nbytes"] == 4 * sum(sizes)
    assert (told["matrices"], told["lowest"], told["highest"]) == (3, 3, 7)
    code, out, err = run_cli("plan", "r.yaml", "--rank", 5, cwd=tmp_path)
    assert "rank 3 to 5" in out
    code, out, err = run_cli("merge", "r.yaml", "out", "--json", cwd=tmp_path)
    assert code == 0, err
    told = json.loads(out)
    assert {row["name"] for row in told["factored"]} == {f"{m}.weight" for m in (Q, UP, HEAD)}
    assert told["error"] < 1e-6
    code, out, err = run_cli("merge", "r.yaml", "cut", "--rank", 2, cwd=tmp_path)
    assert code == 0, err
    assert "not in the adapter" in out
    code, out, err = run_cli("merge", "r.yaml", "no", "--form", "model", "--rank", 2, cwd=tmp_path)
    assert code == 2
    assert "rank" in err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_that_of_the_factors(family, tmp_path, dtype):
    members, _ = family
    done = tv.merge(members, tmp_path / "out", method="task_arithmetic", scale=0.3, form="lora",
                    dtype=dtype)  # fmt: skip
    assert 1e-6 < done.lost**0.5 < 2.0**-7
    from taskvec.checkpoints.safetensors import read_header

    names = {i.dtype.config_name for i in read_header(tmp_path / "out/adapter_model.safetensors")}
    assert names == {dtype}


def test_fused_weights_take_adapters_of_their_parts(tmp_path):
    rng = np.random.default_rng(0)
    qkv = f"{BLOCK}self_attn.qkv_proj.weight"
    anchor = {qkv: rng.normal(size=(24, 8)).astype(np.float32)}
    write_checkpoint(tmp_path / "anchor", anchor, "F32")
    parts = {f"{BLOCK}self_attn.{p}.weight": rng.normal(size=(8, 8)).astype(np.float32)
             for p in ("q_proj", "k_proj", "v_proj")}  # fmt: skip
    write_checkpoint(tmp_path / "apart", parts, "F32")
    factors = pair(f"{BLOCK}self_attn.q_proj", 8, 8, seed=1)
    factors |= pair(f"{BLOCK}self_attn.v_proj", 8, 8, seed=2)
    write_adapter(tmp_path / "lora", factors)
    recipe = {
        "anchor": str(tmp_path / "apart"), "target": str(tmp_path / "anchor"),
        "method": "task_arithmetic", "tasks": {"a": {"model": str(tmp_path / "lora"), "scale": 1}},
        "out": {"form": "lora"},
    }  # fmt: skip
    done = tv.merge(recipe, tmp_path / "out")
    change = deltas(factors)
    zero = np.zeros((8, 8))
    expected = np.concatenate(
        [change.get(f"{BLOCK}self_attn.{p}.weight", zero) for p in ("q_proj", "k_proj", "v_proj")]
    )
    close(products(tmp_path / "out"), {qkv: expected})
    assert [row.rank for row in done.factored] == [8]


def test_a_target_that_is_stored_as_in_and_out(tmp_path):
    rng = np.random.default_rng(0)
    module, embed = "transformer.h.0.attn.c_attn", "transformer.wte"
    anchor = {
        f"{module}.weight": rng.normal(size=(8, 24)),
        f"{embed}.weight": rng.normal(size=(30, 8)),
    }
    config = {**CONFIG, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    write_checkpoint(tmp_path / "anchor", anchor, "F32", config=config)
    for seed, name in enumerate(("one", "two")):
        factors = pair(module, 24, 8, seed=seed)
        gen = np.random.default_rng(seed)
        factors[f"{embed}.lora_embedding_A"] = gen.normal(size=(4, 30)).astype(np.float32)
        factors[f"{embed}.lora_embedding_B"] = gen.normal(size=(8, 4)).astype(np.float32)
        write_adapter(tmp_path / name, factors, fan_in_fan_out=True)
    tasks = {name: tmp_path / name for name in ("one", "two")}
    family = tv.Family(anchor=tmp_path / "anchor", tasks=tasks)
    how: dict[str, Any] = {"method": "task_arithmetic", "scale": 0.5}
    tv.merge(family, tmp_path / "model", **how)
    tv.merge(family, tmp_path / "lora", form="lora", **how)
    again = tv.Family(anchor=tmp_path / "anchor", tasks={"both": tmp_path / "lora"})
    tv.merge(again, tmp_path / "again", method="task_arithmetic", scale=1)
    close(*(load_file(tmp_path / f / "model.safetensors") for f in ("again", "model")), atol=2e-6)
    assert config_of(tmp_path / "lora")["fan_in_fan_out"] is True


def test_recipes_of_models_take_no_rank(tmp_path):
    with pytest.raises(TaskvecError, match="rank"):
        tv.merge({"anchor": "x", "tasks": {"a": {"model": "y", "scale": 1}}, "method": "ties",
                  "out": {"rank": 4}}, tmp_path / "out")  # fmt: skip


@pytest.mark.parametrize("format_", ["nf4", "fp8 blocks", "gptq 4"])
def test_adapters_over_a_quantised_target_are_stacked(tmp_path, format_):
    """QLoRA: codes are stored in other shapes than the weight has, which is not said to grow."""
    stored, _, said = FORMATS[format_](np.random.default_rng(0), f"{Q}.weight", (64, 64))
    config = {**CONFIG, "quantization_config": said}
    write_quantised(tmp_path / "anchor", stored, config)
    factors = pair(Q, 64, 64, rank=3)
    write_adapter(tmp_path / "math", factors, r=3, lora_alpha=4.5)
    members = tv.Family(anchor=tmp_path / "anchor", tasks={"math": tmp_path / "math"})
    how = {"method": "task_arithmetic", "scale": 0.5, "form": "lora"}
    done = tv.merge(members, tmp_path / "out", **how)
    assert [(row.name, row.kept, row.rank) for row in done.factored] == [
        (f"{Q}.weight", "stacked", 3)
    ]
    close(products(tmp_path / "out"), summed({"math": deltas(factors)}, {"math": 0.5}))


def test_a_saved_embedding_that_is_tied_is_replayed(tmp_path):
    """The adapter holds the head that PEFT asks for, the target does not."""
    tied = {**CONFIG, "tie_word_embeddings": True}
    for name, seed in (("anchor", 0), ("math", 1)):
        kept = {n: x for n, x in weights(seed).items() if n in (EMBED, f"{Q}.weight")}
        write_checkpoint(tmp_path / name, kept, "F32", config=tied)
    members = tv.Family(anchor=tmp_path / "anchor", tasks={"math": tmp_path / "math"})
    how = {"method": "task_arithmetic", "form": "lora", "rank": 4, "rest": "save"}
    tv.merge(members, tmp_path / "out", scale=0.5, **how)
    assert f"{PREFIX}lm_head.weight" in load_file(tmp_path / "out" / "adapter_model.safetensors")
    checks = tv.verify(tmp_path / "out", replay=True)
    assert [check for check in checks if check.outcome != "same"] == []


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "model._fsdp_wrapped_module."])
def test_an_adapter_over_names_of_a_trainer_is_refused(family, tmp_path, wrapper):
    """PEFT would not find them in the model, and load nothing without an error."""
    members, _ = family
    write_checkpoint(
        tmp_path / "wrapped",
        {wrapper + n.removeprefix("model."): x for n, x in weights().items()},
        "F32",
    )
    over = tv.Family(anchor=tmp_path / "wrapped", tasks=members.tasks)
    with pytest.raises(UsageError, match=r"trainer's wrapper.*whole model"):
        tv.merge(over, tmp_path / "out", method="task_arithmetic", scale=0.5, form="lora")
    assert not (tmp_path / "out").exists()
