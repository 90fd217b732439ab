"""Adapters in a family: as tasks, and in every other role that can have one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests.adapters import deltas, pairs, write_adapter
from tests.conftest import (
    CONFIG,
    Arrays,
    family_weights,
    from_bf16,
    read_checkpoint,
    read_raw,
    to_bf16,
    tuned,
    write_checkpoint,
    write_family,
)

import taskvec as tv
from taskvec.errors import FamilyError, OutputError, TaskvecError, UsageError
from taskvec.outputs.run import run
from taskvec.recipes.located import parse_yaml
from taskvec.recipes.reading import read_recipe
from taskvec.recipes.recipe import TaskSpec
from taskvec.recipes.replay import read_manifest
from taskvec.streaming import CHUNK, RunOptions

WEIGHTS = family_weights()
MODULES = [f"model.layers.{i}.{m}" for i in (0, 2) for m in ("self_attn.q_proj", "mlp.down_proj")]
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
LORA = pairs(WEIGHTS["base"], MODULES)
OTHER = pairs(WEIGHTS["base"], [*MODULES[1:], HEAD], seed=1)


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Path]:
    """The folders of a family, and two adapters."""
    return write_family(tmp_path / "family") | {
        "lora": write_adapter(tmp_path / "lora", LORA),
        "other": write_adapter(tmp_path / "other", OTHER, "BF16"),
    }


def recipe(made: dict[str, Path], tasks: dict[str, Any], method: Any, **keys: Any) -> Any:
    data = {"tasks": tasks, "method": method, **keys}
    text = yaml.safe_dump(json.loads(json.dumps(data, default=str)))
    return read_recipe(parse_yaml(text, "recipe"), made["base"].parent)


def stored(weights: Arrays) -> Arrays:
    """Values of the weights as bfloat16 keeps them, float64."""
    return {name: from_bf16(to_bf16(value)).astype(np.float64) for name, value in weights.items()}


def assert_within_a_step(got: Arrays, expected: Arrays) -> None:
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        nearest = from_bf16(to_bf16(values.astype(np.float32)))
        apart = np.abs(np.asarray(got[name], np.float64) - nearest)
        assert (apart <= abs(nearest) * 2.0**-7 + 2.0**-24).all(), name  # where terms cancel
        assert (apart == 0).mean() > 0.99, name


# --- tasks ---------------------------------------------------------------------------------------


def test_the_merged_sum_is_the_weighted_sum_of_products(
    made: dict[str, Path], tmp_path: Path
) -> None:
    tasks = {
        "a": {"model": made["lora"], "scale": 0.5},
        "b": {"model": made["other"], "scale": -0.25},
        "math": {"model": made["math"], "scale": 0.3},
    }
    run(recipe(made, tasks, "task_arithmetic", instruct=made["instruct"]), tmp_path / "out")
    expected = stored(WEIGHTS["instruct"])
    for name, math in stored(WEIGHTS["math"]).items():
        expected[name] = expected[name] + 0.3 * (math - expected[name])
    brain = {name: from_bf16(to_bf16(values)) for name, values in OTHER.items()}
    for scale, tensors in ((0.5, LORA), (-0.25, brain)):
        for name, delta in deltas(tensors).items():
            expected[name] = expected[name] + scale * delta
    assert_within_a_step(read_checkpoint(tmp_path / "out"), expected)


def test_what_no_adapter_changes_is_copied(made: dict[str, Path], tmp_path: Path) -> None:
    tasks = {"a": {"model": made["lora"], "scale": 0.5}}
    run(recipe(made, tasks, "task_arithmetic", instruct=made["instruct"]), tmp_path / "out")
    before, after = read_raw(made["instruct"]), read_raw(tmp_path / "out")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"{module}.weight" for module in MODULES}


def test_threads_and_blocks_change_no_bit(made: dict[str, Path], tmp_path: Path) -> None:
    """The head is 67,200 elements: two chunks, cut inside a row."""
    tasks = {t: {"model": made[m], "scale": 0.5} for t, m in (("a", "lora"), ("b", "other"))}
    asked = recipe(made, tasks, {"name": "lata"}, instruct=made["instruct"], base=made["base"])
    prints = set()
    for i, (threads, block) in enumerate([(1, CHUNK), (2, CHUNK), (2, 16 * CHUNK)]):
        options = RunOptions(cache="off", threads=threads, block=block)
        prints.add(run(asked, tmp_path / f"out{i}", options=options).fingerprint)
    assert len(prints) == 1


def test_scan_measures_the_products(made: dict[str, Path]) -> None:
    family = tv.Family({"a": made["lora"], "b": made["other"]}, made["instruct"], base=made["base"])
    scan = tv.scan(family, cache="off")
    brain = {name: from_bf16(to_bf16(values)) for name, values in OTHER.items()}
    vectors = deltas(LORA), deltas(brain)
    instruct, base = stored(WEIGHTS["instruct"]), stored(WEIGHTS["base"])
    for i, name in enumerate(scan.names):
        tau = [v.get(name, np.zeros_like(instruct[name])) for v in vectors]
        rows = [instruct[name], instruct[name] - base[name], *tau]
        flat = np.stack([row.ravel() for row in rows])
        size = np.sqrt((flat**2).sum(1))
        np.testing.assert_allclose(
            scan.gram[i], flat @ flat.T, rtol=0, atol=2e-6 * np.outer(size, size).max()
        )
        signs = [np.sign(t) for t in tau]
        assert scan.support[i, 0, 1] == (signs[0] * signs[1] != 0).sum()
        assert abs(scan.agree[i, 0, 1] - (signs[0] * signs[1] > 0).sum()) <= 1


def test_over_base_is_the_model_that_the_adapter_makes_of_it(
    made: dict[str, Path], tmp_path: Path
) -> None:
    tasks = {"a": {"model": made["lora"], "scale": 1.0, "over": "base"}}
    keys = {"instruct": made["instruct"], "base": made["base"]}
    run(recipe(made, tasks, "task_arithmetic", **keys), tmp_path / "out")
    expected = stored(WEIGHTS["base"])
    for name, delta in deltas(LORA).items():
        expected[name] = expected[name] + delta
    assert_within_a_step(read_checkpoint(tmp_path / "out"), expected)


def test_average_takes_the_models_that_adapters_make(made: dict[str, Path], tmp_path: Path) -> None:
    tasks = {"a": {"model": made["lora"], "scale": 0.5}, "m": {"model": made["math"], "scale": 0.5}}
    run(recipe(made, tasks, "average", anchor=made["instruct"]), tmp_path / "out")
    expected = {n: v.astype(np.float64) for n, v in stored(WEIGHTS["instruct"]).items()}
    for name, delta in deltas(LORA).items():
        expected[name] = expected[name] + delta
    math = stored(WEIGHTS["math"])
    expected = {name: (value + math[name]) / 2 for name, value in expected.items()}
    assert_within_a_step(read_checkpoint(tmp_path / "out"), expected)


# --- other roles ---------------------------------------------------------------------------------


def test_instruct_is_over_the_base(made: dict[str, Path], tmp_path: Path) -> None:
    """LATA's instruction vector is then the product; the result starts from base and adapter."""
    family = tv.Family({"math": made["math"]}, instruct=made["lora"], base=made["base"])
    scan = tv.scan(family, cache="off")
    products = deltas(LORA)
    for i, name in enumerate(scan.names):
        expected = (products[name] ** 2).sum() if name in products else 0
        np.testing.assert_allclose(scan.gram[i, 1, 1], expected, rtol=1e-4, atol=1e-12)
    tv.merge(family, tmp_path / "out", method="task_arithmetic", scale={"math": 0.0})
    expected = stored(WEIGHTS["base"])
    for name, delta in products.items():
        expected[name] = expected[name] + delta
    assert_within_a_step(read_checkpoint(tmp_path / "out"), expected)


def test_base_is_opened_for_an_adapter_alone(made: dict[str, Path], tmp_path: Path) -> None:
    """Task arithmetic needs no base, but its instruct does; it is watched and kept apart too."""
    family = tv.Family({"math": made["math"]}, instruct=made["lora"], base=made["base"])
    with pytest.raises(OutputError, match="input folder of"):
        tv.merge(family, made["base"] / "out", method="task_arithmetic", scale={"math": 1})
    with pytest.raises(OutputError, match="input folder of"):
        tv.merge(family, made["lora"] / "out", method="task_arithmetic", scale={"math": 1})


def test_target_is_over_the_anchor(made: dict[str, Path], tmp_path: Path) -> None:
    family = tv.Family({"math": made["math"]}, anchor=made["instruct"], target=made["lora"])
    tv.merge(family, tmp_path / "out", method="task_arithmetic", scale={"math": 0.5})
    expected = stored(WEIGHTS["instruct"])
    for name, math in stored(WEIGHTS["math"]).items():
        expected[name] = expected[name] + 0.5 * (math - expected[name])
    for name, delta in deltas(LORA).items():
        expected[name] = expected[name] + delta
    assert_within_a_step(read_checkpoint(tmp_path / "out"), expected)


def test_tokenizer_beside_an_instruct_adapter_is_the_results(
    made: dict[str, Path], tmp_path: Path
) -> None:
    (made["base"] / "tokenizer_config.json").write_text('{"of": "base"}')
    (made["lora"] / "tokenizer_config.json").write_text('{"of": "adapter"}')
    (made["lora"] / "chat_template.jinja").write_text("{{ messages }}")
    family = tv.Family({"math": made["math"]}, instruct=made["lora"], base=made["base"])
    tv.merge(family, tmp_path / "out", method="task_arithmetic", scale={"math": 1})
    assert (tmp_path / "out/tokenizer_config.json").read_text() == '{"of": "adapter"}'
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "out/adapter_config.json").exists()


# --- heads that are tied -------------------------------------------------------------------------


def tied_family(root: Path) -> dict[str, Path]:
    config = CONFIG | {"tie_word_embeddings": True}
    rng = np.random.default_rng(5)
    base = {n: v for n, v in WEIGHTS["base"].items() if n != f"{HEAD}.weight"}
    members = {"base": base, "instruct": tuned(base, rng, 0.01)}
    return {n: write_checkpoint(root / n, w, config=config) for n, w in members.items()}


def merged(made: dict[str, Path], out: Path, *loras: Path) -> tuple[Arrays, tv.Merged]:
    tasks = {f"t{i}": lora for i, lora in enumerate(loras)}
    family = tv.Family(tasks, anchor=made["instruct"])
    result = tv.merge(family, out, method="task_arithmetic", scale=dict.fromkeys(tasks, 1.0))
    return read_checkpoint(out), result


def test_an_adapter_of_a_tied_head_unties_it(tmp_path: Path) -> None:
    made = tied_family(tmp_path)
    lora = pairs(WEIGHTS["base"], [HEAD])
    after, _ = merged(made, tmp_path / "out", write_adapter(tmp_path / "lora", lora))
    before = read_checkpoint(made["instruct"])
    expected = {n: v.astype(np.float64) for n, v in before.items()}
    expected[f"{HEAD}.weight"] = expected[f"{EMBEDDING}.weight"] + deltas(lora)[f"{HEAD}.weight"]
    assert_within_a_step(after, expected)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_an_adapter_of_a_tied_embedding_leaves_the_head(tmp_path: Path) -> None:
    made = tied_family(tmp_path)
    (tmp_path / "out").mkdir()
    made_config = made["instruct"] / "config.json"
    config = json.loads(made_config.read_text()) | {"architectures": ["LlamaForCausalLM"]}
    made_config.write_text(json.dumps(config))
    new = WEIGHTS["base"][f"{EMBEDDING}.weight"] + np.float32(0.5)
    lora = write_adapter(tmp_path / "lora", {f"{EMBEDDING}.weight": new})
    after, _ = merged(made, tmp_path / "out", lora)
    before = read_checkpoint(made["instruct"])
    assert (after[f"{HEAD}.weight"] == before[f"{EMBEDDING}.weight"]).all()
    assert_within_a_step({"e": after[f"{EMBEDDING}.weight"]}, {"e": new.astype(np.float64)})


def test_trained_tokens_stay_tied_unless_the_head_is_untied(tmp_path: Path) -> None:
    """PEFT gives trained rows to a tied head too."""
    made = tied_family(tmp_path)
    rows = np.full((1, 24), 3, "f4")
    delta = {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": rows}
    tokens = write_adapter(tmp_path / "tokens", delta, trainable_token_indices=[9])
    after, _ = merged(made, tmp_path / "tied", tokens)
    assert f"{HEAD}.weight" not in after
    assert (after[f"{EMBEDDING}.weight"][9] == 3).all()
    head = write_adapter(tmp_path / "head", pairs(WEIGHTS["base"], [HEAD]))
    untied, _ = merged(made, tmp_path / "untied", tokens, head)
    product = deltas(pairs(WEIGHTS["base"], [HEAD]))[f"{HEAD}.weight"]
    assert (untied[f"{EMBEDDING}.weight"][9] == 3).all()
    np.testing.assert_allclose(untied[f"{HEAD}.weight"][9], 3 + product[9], rtol=2.0**-8)


# --- manifest and verify -------------------------------------------------------------------------


def checks(folder: Path, **options: Any) -> dict[str, str]:
    return {c.what: c.outcome for c in tv.verify(folder, **options)}


@pytest.mark.parametrize(
    ("roles", "over", "method"),
    [
        ({"tasks": {"a": "lora", "b": "other"}, "instruct": "instruct", "base": "base"},
         {}, "lata"),
        ({"tasks": {"a": "lora", "m": "math"}, "instruct": "instruct", "base": "base"},
         {"a": "base"}, "lata"),
        ({"tasks": {"m": "math"}, "instruct": "lora", "base": "base"}, {}, "task_arithmetic"),
        ({"tasks": {"m": "math"}, "anchor": "instruct", "target": "lora"}, {}, "task_arithmetic"),
    ],
    ids=["tasks", "over base", "instruct", "target"],
)  # fmt: skip
def test_verify_and_replay(
    made: dict[str, Path], tmp_path: Path, roles: dict[str, Any], over: Any, method: str
) -> None:
    named = {role: made[name] for role, name in roles.items() if role != "tasks"}
    tasks = {t: TaskSpec(made[name], over=over.get(t)) for t, name in roles["tasks"].items()}
    family = tv.Family(tasks, **named)
    tv.merge(family, tmp_path / "out", method=method, scale=dict.fromkeys(tasks, 0.5))
    assert set(checks(tmp_path / "out", replay=True).values()) == {"same"}
    members = read_manifest(tmp_path / "out")["members"]
    adapted = {
        role for role, m in members.items() if Path(m["path"]) in (made["lora"], made["other"])
    }
    assert {role for role, member in members.items() if member["derived"]} == adapted
    rewritten = {name: values + np.float32(0.001) for name, values in LORA.items()}
    write_adapter(made["lora"], rewritten)
    after = checks(tmp_path / "out", replay=True)
    changed = {role for role, m in members.items() if Path(m["path"]) == made["lora"]}
    assert changed
    assert {role for role, outcome in after.items() if outcome != "same"} == {*changed, "replay"}


def test_verify_says_what_is_absent(made: dict[str, Path], tmp_path: Path) -> None:
    family = tv.Family({"a": made["lora"], "math": made["math"]}, anchor=made["instruct"])
    tv.merge(family, tmp_path / "out", method="task_arithmetic", scale={"a": 0.5, "math": 1})
    (made["lora"] / "adapter_model.safetensors").unlink()
    found = {c.what: (c.outcome, c.detail) for c in tv.verify(tmp_path / "out")}
    assert found["task:a"][0] == "absent"
    assert "holds no adapter_model.safetensors" in found["task:a"][1]
    assert {found[role][0] for role in ("output", "anchor", "target", "task:math")} == {"same"}


def test_the_manifest_is_a_recipe(made: dict[str, Path], tmp_path: Path) -> None:
    tasks = {"a": {"model": made["lora"], "scale": 0.5, "over": "base"}}
    asked = recipe(made, tasks, "lata", instruct=made["instruct"], base=made["base"])
    first = run(asked, tmp_path / "out")
    again = read_recipe(
        parse_yaml((tmp_path / "out/taskvec.yaml").read_text(), "taskvec.yaml"), tmp_path / "out"
    )
    assert again.tasks["a"].over == "base"
    assert run(again, tmp_path / "again").fingerprint == first.fingerprint


# --- errors --------------------------------------------------------------------------------------


def errors(made: dict[str, Path]) -> list[tuple[tv.Family, str, type[TaskvecError], str]]:
    instruct, base, lora, math = made["instruct"], made["base"], made["lora"], made["math"]
    return [
        (tv.Family({"m": math}, instruct, base=lora), "lata", UsageError,
         f"base ({lora}): is an adapter, and the model below it is missing; give the whole model "
         "as base"),
        (tv.Family({"m": math}, lora), "task_arithmetic", UsageError,
         f"anchor ({lora}): is an adapter, and base, which it is over, is missing; give it"),
        (tv.Family({"a": TaskSpec(lora, over="base")}, instruct), "task_arithmetic", UsageError,
         f"task 'a' ({lora}): is an adapter, and base, which it is over, is missing; give it"),
        (tv.Family({"a": lora, "m": math}), "average", UsageError,
         f"task 'a' ({lora}): is an adapter, and instruct (or anchor), which it is over, is "
         "missing; give it"),
        (tv.Family({"m": TaskSpec(math, over="base")}, instruct, base=base), "lata", UsageError,
         f"task 'm' ({math}): is not an adapter; remove `over`"),
    ]  # fmt: skip


@pytest.mark.parametrize("case", range(5))
def test_roles_that_can_have_no_adapter(made: dict[str, Path], tmp_path: Path, case: int) -> None:
    family, method, kind, text = errors(made)[case]
    with pytest.raises(kind) as error:
        tv.merge(family, tmp_path / "out", method=method, scale=dict.fromkeys(family.tasks, 0.5))
    assert text in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model(made: dict[str, Path], tmp_path: Path) -> None:
    lora = write_adapter(tmp_path / "far", pairs({"x.y.weight": np.ones((2, 3))}, ["x.y"]))
    family = tv.Family({"a": lora}, made["instruct"])
    with pytest.raises(FamilyError, match=r"changes 'x.y.weight', which the model that it is over"):
        tv.merge(family, tmp_path / "out", method="task_arithmetic", scale={"a": 1})


def test_nan_in_an_adapter_is_named(made: dict[str, Path], tmp_path: Path) -> None:
    broken = dict(LORA)
    name = f"{MODULES[0]}.lora_A.weight"
    broken[name] = np.where(np.arange(24) == 3, np.nan, broken[name]).astype("f4")
    family = tv.Family({"a": write_adapter(tmp_path / "nan", broken)}, made["instruct"])
    with pytest.raises(TaskvecError, match=rf"task 'a' .*tensor '{MODULES[0]}.weight' holds nan"):
        tv.merge(family, tmp_path / "out", method="task_arithmetic", scale={"a": 1})


def test_a_folder_that_taskvec_cannot_verify_says_what_it_is(made: dict[str, Path]) -> None:
    with pytest.raises(TaskvecError, match="holds no taskvec-manifest"):
        tv.verify(made["lora"])
