"""Adapter folders: what each tensor of them changes in a model, against the formulas in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.adapters import SCALING, deltas, pair, write_adapter
from tests.conftest import Arrays, from_bf16, to_bf16, write_checkpoint, write_safetensors

from taskvec import patterns
from taskvec.checkpoints.adapter_changes import difference
from taskvec.checkpoints.adapters import is_adapter, open_adapter, scaling_of
from taskvec.checkpoints.folder import open_checkpoint
from taskvec.checkpoints.source import Source, added
from taskvec.errors import CheckpointError, FamilyError
from taskvec.family.matching import fitted

ATTENTION, MLP, HEAD = "model.layers.0.self_attn", "model.layers.0.mlp", "classifier"
EMBEDDING = "model.embed_tokens"
MERGE = "merge it in PEFT (merge_and_unload, save_pretrained) and give the whole model"


def weights(seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = {
        f"{EMBEDDING}.weight": (20, 6), f"{ATTENTION}.q_proj.weight": (6, 6),
        f"{ATTENTION}.q_proj.bias": (6,), f"{ATTENTION}.k_proj.weight": (3, 6),
        f"{MLP}.up_proj.weight": (9, 6), "model.norm.weight": (6,), f"{HEAD}.weight": (2, 6),
        f"{HEAD}.bias": (2,), "model.conv.weight": (5, 3, 2, 2),
    }  # fmt: skip
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def over(tmp_path: Path) -> Source:
    return open_checkpoint(write_checkpoint(tmp_path / "over", weights(), "F32"))


def read(source: Source, name: str) -> np.ndarray[Any, Any]:
    view = source.view(name)
    return view.read(0, int(np.prod(view.shape))).reshape(view.shape)


def put(folder: Path, over: Source, tensors: Arrays, **config: Any) -> Source:
    return difference(open_adapter(write_adapter(folder, tensors, **config)), over)


def assert_close(got: Any, expected: Any, steps: int = 8) -> None:
    size = abs(np.asarray(expected)).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=steps * size * 2.0**-24)


# --- products ------------------------------------------------------------------------------------


def test_linear_layers_become_differences(tmp_path: Path, over: Source) -> None:
    tensors = pair(f"{ATTENTION}.k_proj", 3, 6) | pair(f"{MLP}.up_proj", 9, 6)
    source = put(tmp_path / "lora", over, tensors)
    assert source.is_difference
    assert list(source.tensors) == [f"{MLP}.up_proj.weight", f"{ATTENTION}.k_proj.weight"]
    for name, expected in deltas(tensors).items():
        view = source.view(name)
        assert (view.is_difference, view.dtype.name) == (True, "F32")
        assert_close(read(source, name), expected)


def test_any_stretch_has_the_same_bits(tmp_path: Path, over: Source) -> None:
    source = put(tmp_path / "lora", over, pair(f"{MLP}.up_proj", 9, 6))
    view = source.view(f"{MLP}.up_proj.weight")
    whole = view.read(0, 54)
    for start in range(0, 54, 5):
        for stop in range(start, 55, 7):
            assert view.read(start, stop).tobytes() == whole[start:stop].tobytes()


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"lora_alpha": 10}, 10 / 4),
        ({"use_rslora": True}, 6 / 2),
        (
            {"rank_pattern": {"up_proj": 4}, "r": 99, "alpha_pattern": {r"layers\.0\.mlp.*": 5}},
            5 / 4,
        ),
        ({"alpha_pattern": {"k_proj": 3, "^model.layers.0.mlp.up_proj": 7, "up_proj": 1}}, 7 / 4),
        ({"alpha_pattern": {"proj": 3, "model.layers.0.mlp": 7}}, 6 / 4),  # fits no whole name
    ],
    ids=["alpha", "rslora", "rank pattern", "first pattern that fits", "no part of a name"],
)
def test_scaling(tmp_path: Path, over: Source, config: dict[str, Any], scaling: float) -> None:
    tensors = pair(f"{MLP}.up_proj", 9, 6)
    source = put(tmp_path / "lora", over, tensors, **config)
    (expected,) = deltas(tensors, scaling).values()
    assert_close(read(source, f"{MLP}.up_proj.weight"), expected)


def test_layers_stored_the_other_way_round(tmp_path: Path) -> None:
    """Conv1D of GPT-2 is (in, out): by shape where that says so, by the config where square."""
    tensors = pair("h.0.c_fc", 9, 6) | pair("h.0.c_proj", 6, 6)
    stored = {"h.0.c_fc.weight": np.ones((6, 9), "f4"), "h.0.c_proj.weight": np.ones((6, 6), "f4")}
    expected = deltas(tensors)
    for name, config, flag in (
        ("by config", {}, True),
        ("by model", {"model_type": "gpt2"}, False),
    ):
        folder = write_checkpoint(tmp_path / name / "over", stored, "F32", config=config)
        source = put(tmp_path / name, open_checkpoint(folder), tensors, fan_in_fan_out=flag)
        for weight in stored:
            assert_close(read(source, weight), expected[weight].T)
    source = put(tmp_path / "by config", open_checkpoint(tmp_path / "by config/over"), tensors)
    assert_close(read(source, "h.0.c_proj.weight"), expected["h.0.c_proj.weight"])


@pytest.mark.parametrize(
    ("config", "is_turned"),
    [({"model_type": "llama"}, False), ({"model_type": "own", "auto_map": {}}, True)],
)
def test_a_flag_does_not_turn_square_linear_layers(tmp_path, config, is_turned) -> None:
    """PEFT ignores fan_in_fan_out on linear layers, and leaves it in the config of QLoRA."""
    tensors = pair("layers.0.self_attn.q_proj", 6, 6)
    name = "layers.0.self_attn.q_proj.weight"
    stored = {name: np.ones((6, 6), "f4")}
    over = open_checkpoint(write_checkpoint(tmp_path / "over", stored, "F32", config=config))
    source = put(tmp_path / "lora", over, tensors, fan_in_fan_out=True)
    expected = deltas(tensors)[name]
    assert_close(read(source, name), expected.T if is_turned else expected)


@pytest.mark.parametrize("rows", [20, 6])
def test_embeddings(tmp_path: Path, rows: int) -> None:
    """Stored as (in, out), which the shape of six tokens does not say."""
    stored = {f"{EMBEDDING}.weight": np.ones((rows, 6), "f4")}
    over = open_checkpoint(write_checkpoint(tmp_path / "over", stored, "F32"))
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(4, rows)).astype("f4"), rng.normal(size=(6, 4)).astype("f4")
    tensors = {f"{EMBEDDING}.lora_embedding_A": a, f"{EMBEDDING}.lora_embedding_B": b}
    source = put(tmp_path / "lora", over, tensors)
    expected = SCALING * (b.astype(float) @ a.astype(float)).T
    assert_close(read(source, f"{EMBEDDING}.weight"), expected)


def test_convolutions(tmp_path: Path, over: Source) -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(4, 3, 2, 2)).astype("f4"), rng.normal(size=(5, 4, 1, 1)).astype("f4")
    tensors = {"model.conv.lora_A.weight": a, "model.conv.lora_B.weight": b}
    source = put(tmp_path / "lora", over, tensors)
    expected = SCALING * np.einsum("or,rihw->oihw", b[:, :, 0, 0].astype(float), a.astype(float))
    assert_close(read(source, "model.conv.weight"), expected)


def test_bfloat16_adapters_are_not_rounded_again(tmp_path: Path, over: Source) -> None:
    tensors = pair(f"{MLP}.up_proj", 9, 6)
    folder = write_adapter(tmp_path / "lora", tensors, "BF16")
    source = difference(open_adapter(folder), over)
    stored = {name: from_bf16(to_bf16(values)) for name, values in tensors.items()}
    (expected,) = deltas(stored).values()
    assert_close(read(source, f"{MLP}.up_proj.weight"), expected)


def test_float64_adapters_are_float64(tmp_path: Path, over: Source) -> None:
    tensors = pair(f"{MLP}.up_proj", 9, 6)
    source = difference(open_adapter(write_adapter(tmp_path / "lora", tensors, "F64")), over)
    (expected,) = deltas(tensors).values()
    assert source.view(f"{MLP}.up_proj.weight").dtype.name == "F64"
    np.testing.assert_allclose(read(source, f"{MLP}.up_proj.weight"), expected, rtol=1e-14)


def test_dora(tmp_path: Path, over: Source) -> None:
    tensors = pair(f"{MLP}.up_proj", 9, 6)
    lengths = np.linspace(0.5, 2, 9).astype("f4")
    source = put(
        tmp_path / "lora", over, tensors | {f"{MLP}.up_proj.lora_magnitude_vector": lengths},
        use_dora=True,
    )  # fmt: skip
    name = f"{MLP}.up_proj.weight"
    (delta,) = deltas(tensors).values()
    moved = weights()[name].astype(float) + delta
    expected = lengths[:, None] * moved / np.sqrt((moved**2).sum(1, keepdims=True))
    view = source.view(name)
    assert not view.is_difference
    assert_close(read(source, name), expected)
    whole = view.read(0, 54)
    for start, stop in ((0, 0), (5, 8), (6, 12), (50, 54), (1, 53)):
        assert view.read(start, stop).tobytes() == whole[start:stop].tobytes()


# --- whole tensors, biases, tokens ---------------------------------------------------------------


@pytest.mark.parametrize("written", ["{}.weight", "{}.modules_to_save.weight",
                                     "{}.modules_to_save.default.weight"])  # fmt: skip
def test_modules_to_save_take_the_place_of_the_models(
    tmp_path: Path, over: Source, written: str
) -> None:
    new = np.arange(12, dtype="f4").reshape(2, 6)
    tensors = pair(f"{MLP}.up_proj", 9, 6) | {written.format(HEAD): new}
    source = put(tmp_path / "lora", over, tensors, modules_to_save=[HEAD])
    view = source.view(f"{HEAD}.weight")
    assert not view.is_difference
    assert (read(source, f"{HEAD}.weight") == new).all()
    assert (read(added(over, source), f"{HEAD}.weight") == new).all()


def test_trained_biases(tmp_path: Path, over: Source) -> None:
    """As PEFT writes `bias: all`: of adapted layers, of others, and copies of a saved module."""
    bias, other, old = np.arange(6, dtype="f4"), np.ones(2, "f4"), np.full(2, 9, "f4")
    tensors = pair(f"{ATTENTION}.q_proj", 6, 6) | {
        f"{ATTENTION}.q_proj.base_layer.bias": bias,
        f"{HEAD}.bias": other,
        f"{HEAD}.modules_to_save.bias": other,
        f"{HEAD}.original_module.bias": old,
    }
    source = put(tmp_path / "lora", over, tensors, bias="all")
    assert (read(source, f"{ATTENTION}.q_proj.bias") == bias).all()
    assert (read(source, f"{HEAD}.bias") == other).all()
    assert len(source.tensors) == 3


def test_bias_of_the_adapter_itself(tmp_path: Path, over: Source) -> None:
    bias = np.arange(6, dtype="f4")
    tensors = pair(f"{ATTENTION}.q_proj", 6, 6) | {f"{ATTENTION}.q_proj.lora_B.bias": bias}
    source = put(tmp_path / "lora", over, tensors, lora_bias=True)
    assert source.view(f"{ATTENTION}.q_proj.bias").is_difference
    assert (read(source, f"{ATTENTION}.q_proj.bias") == SCALING * bias).all()


def test_tokens_that_were_trained(tmp_path: Path, over: Source) -> None:
    rows = np.arange(18, dtype="f4").reshape(3, 6)
    tensors = {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": rows}
    source = put(tmp_path / "lora", over, tensors, trainable_token_indices=[7, 2, 19])
    expected = weights()[f"{EMBEDDING}.weight"].copy()
    expected[[7, 2, 19]] = rows
    view = source.view(f"{EMBEDDING}.weight")
    assert not view.is_difference
    for start in range(0, 120, 5):
        for stop in range(start, 121, 11):
            assert (view.read(start, stop) == expected.ravel()[start:stop]).all()


def test_tokens_by_module_and_of_another_dtype(tmp_path: Path) -> None:
    over = open_checkpoint(write_checkpoint(tmp_path / "over", weights(), "BF16"))
    rows = np.full((1, 6), 0.1, "f4")
    tensors = {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": rows}
    source = put(
        tmp_path / "lora", over, tensors, trainable_token_indices={"embed_tokens": [4], "x": [1]}
    )
    expected = from_bf16(to_bf16(weights()[f"{EMBEDDING}.weight"]))
    expected[4] = rows
    assert (read(source, f"{EMBEDDING}.weight") == expected).all()


def test_weights_that_the_adapter_brings_along(tmp_path: Path, over: Source) -> None:
    """PEFT stores an adapted embedding's own weights too: those count, whatever lies below."""
    name = f"{EMBEDDING}.weight"
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(4, 20)).astype("f4"), rng.normal(size=(6, 4)).astype("f4")
    tensors = {f"{EMBEDDING}.lora_embedding_A": a, f"{EMBEDDING}.lora_embedding_B": b}
    plain = read(put(tmp_path / "plain", over, tensors), name)
    same = tensors | {f"{EMBEDDING}.base_layer.weight": weights()[name]}
    assert read(put(tmp_path / "same", over, same), name).tobytes() == plain.tobytes()
    other = weights()[name] + np.float32(0.25)
    moved = put(tmp_path / "moved", over, tensors | {f"{EMBEDDING}.base_layer.weight": other})
    assert_close(read(added(over, moved), name), other + plain.astype(float))


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_names_with_the_adapters_name_and_without_prefix(
    tmp_path: Path, over: Source, prefix: str
) -> None:
    tensors = pair(f"{MLP}.up_proj", 9, 6)
    folder = write_adapter(tmp_path / "lora", tensors)
    named = {prefix + n.replace(".weight", ".mine.weight"): v for n, v in tensors.items()}
    write_safetensors(folder / "adapter_model.safetensors", named, dict.fromkeys(named, "F32"))
    source = difference(open_adapter(folder), over)
    (expected,) = deltas(tensors).values()
    assert_close(read(source, f"{MLP}.up_proj.weight"), expected)


@pytest.mark.parametrize(
    ("adapter", "model"),
    [
        ("transformer.h.0.c_fc", "h.0.c_fc"),  # GPT-2 as it was published
        ("layers.0.q_proj", "model.layers.0.q_proj"),  # trained without the head
        ("model.language_model.layers.0.q_proj", "language_model.model.layers.0.q_proj"),
        # ViT and DINOv2 as transformers 5 has them in memory, over files.
        ("vit.layers.3.attention.q_proj", "vit.encoder.layer.3.attention.attention.query"),
        ("vit.layers.3.attention.o_proj", "encoder.layer.3.attention.output.dense"),
        ("layers.3.mlp.fc1", "vit.encoder.layer.3.intermediate.dense"),
        ("layers.3.mlp.fc2", "encoder.layer.3.output.dense"),
        ("encoder.layer.3.attention.v_proj", "encoder.layer.3.attention.attention.value"),
        ("dinov2.encoder.layer.3.mlp.down_proj", "encoder.layer.3.mlp.weights_out"),
        ("layers.3.other", "encoder.layer.3.other"),
    ],
)
def test_one_class_around_the_model_more_or_less(tmp_path: Path, adapter: str, model: str) -> None:
    stored = {f"{model}.weight": np.zeros((9, 6), "f4"), "lm_head.weight": np.zeros((9, 6), "f4")}
    over = open_checkpoint(write_checkpoint(tmp_path / "over", stored, "F32"))
    source = put(tmp_path / "lora", over, pair(adapter, 9, 6))
    assert list(source.tensors) == [f"{model}.weight"]


def test_is_adapter(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", pair("x.y", 2, 3))
    assert is_adapter(folder)
    write_checkpoint(folder, weights())
    assert not is_adapter(folder)  # a whole model that was trained as an adapter before
    assert not is_adapter(tmp_path / "nothing")


# --- errors --------------------------------------------------------------------------------------

PAIR = pair(f"{MLP}.up_proj", 9, 6)
UP = f"{MLP}.up_proj"


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"peft_type": "LOHA"}, f"is a LOHA adapter; only LoRA is supported: {MERGE}"),
        ({"peft_type": None}, "adapter_config.json does not say peft_type; only LoRA is supported"),
        ({"use_qalora": True}, "use_qalora (QA-LoRA) is not supported; merge it in PEFT"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens (activated LoRA, which"),
        ({"init_lora_weights": "pissa_niter_4"},
         "init_lora_weights 'pissa_niter_4' changed the model that the adapter is over when "
         "training began; save it with path_initial_model_for_weight_conversion, which makes "
         f"an ordinary LoRA of it, or {MERGE}"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora' changed the model"),
        ({"r": 0}, "r must be above 0"),
        ({"alpha_pattern": {"q": "8"}}, "alpha_pattern.q must be a finite number; got '8'"),
        ({"rank_pattern": ["q"]}, "rank_pattern must be a mapping; got ['q']"),
        ({"rank_pattern": {"(": 8}}, "'(', which is not a regular expression"),
        ({"alpha_pattern": {"(?i)q": 8}}, "'(?i)q', which is not a regular expression"),
    ],
)  # fmt: skip
def test_kinds_that_are_refused(tmp_path: Path, config: dict[str, Any], text: str) -> None:
    folder = write_adapter(tmp_path / "lora", PAIR, **config)
    with pytest.raises(CheckpointError) as error:
        open_adapter(folder)
    assert str(error.value).startswith((f"{folder}: ", f"{folder}/adapter_config.json: "))
    assert text in str(error.value)


@pytest.mark.parametrize("kind", ["eva", "gaussian", "orthogonal", True, False, "mica"])
def test_initialisations_that_leave_the_model_alone(tmp_path: Path, kind: Any) -> None:
    open_adapter(write_adapter(tmp_path / "lora", PAIR, init_lora_weights=kind))


@pytest.mark.parametrize(
    ("tensors", "config", "text"),
    [
        ({f"{UP}.lora_A.weight": PAIR[f"{UP}.lora_A.weight"]}, {},
         f"has no lora_B.weight of module {UP!r}; the file is incomplete"),
        (PAIR, {"r": 8}, f"A and B of '{UP}.weight' have shapes [4, 6] and [9, 4], by "
         "adapter_config.json the rank is 8; use the config that was saved with the weights"),
        (PAIR | {f"{UP}.lora_A.weight": np.ones((4, 6), int)}, {},
         "lora_A.weight' is I64; floats are expected"),
        (PAIR | {f"{UP}.lora_A.weight": np.ones(0, "f4")}, {},
         "have shapes [0] and [9, 4]; shards were not gathered when it was saved; save it again"),
        (PAIR | {f"{UP}.lora_E": np.ones(4, "f4")}, {},
         f"tensor 'base_model.model.{UP}.lora_E' is not recognized; merge it in PEFT"),
        (PAIR, {"use_dora": True}, f"uses DoRA and has no lora_magnitude_vector of {UP!r}"),
        (PAIR | {f"{UP}.lora_A.other.weight": np.ones((4, 6), "f4"),
                 f"{UP}.lora_B.one.weight": np.ones((4, 6), "f4")}, {},
         "holds adapters one, other; save each in its own folder"),
        (PAIR | {f"{UP}.weight": np.ones((9, 6), "f4")}, {},
         f"changes '{UP}.weight' in two ways"),
        ({f"{EMBEDDING}.token_adapter.trainable_tokens_delta": np.ones((2, 6), "f4")},
         {"trainable_token_indices": [1]}, "trainable_token_indices in adapter_config.json do not"),
        ({f"{EMBEDDING}.token_adapter.trainable_tokens_delta": np.ones((1, 6), "f4")},
         {"trainable_token_indices": [20]}, f"trains token 20, which '{EMBEDDING}.weight' has no"),
    ],
)  # fmt: skip
def test_broken_adapters(
    tmp_path: Path, over: Source, tensors: Arrays, config: dict[str, Any], text: str
) -> None:
    with pytest.raises(CheckpointError) as error:
        put(tmp_path / "lora", over, tensors, **config)
    assert str(error.value).startswith(f"{tmp_path / 'lora'}: ")
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (pair("model.layers.7.q_proj", 6, 6),
         "changes 'model.layers.7.q_proj.weight', which the model that it is over ({over}) lacks; "
         f"give the model that it was trained over, or {MERGE}"),
        (pair(f"{MLP}.up_proj", 9, 5),
         f"'base_model.model.{UP}.lora_B.weight' is for a tensor of shape [9, 5], '{UP}.weight' of "
         "the model that it is over ({over}) has [9, 6]; give the model that it was trained over"),
        ({f"{HEAD}.weight": np.ones((3, 6), "f4")}, "is for a tensor of shape [3, 6], 'classifier"),
        ({"score.weight": np.ones((3, 6), "f4")}, "changes 'score.weight', which the model"),
        (pair(f"{ATTENTION}.k_proj", 3, 6) | {f"{ATTENTION}.k_proj.lora_B.bias": np.ones(3, "f4")},
         f"changes '{ATTENTION}.k_proj.bias', which the model"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit(tmp_path: Path, over: Source, tensors: Arrays, text: str) -> None:
    with pytest.raises(FamilyError) as error:
        fitted(put(tmp_path / "lora", over, tensors), over)
    assert text.replace("{over}", over.where) in str(error.value)


def test_tensors_that_the_model_lacks_can_be_excluded(tmp_path: Path, over: Source) -> None:
    tensors = PAIR | {"score.weight": np.ones((3, 6), "f4")}
    adapter = open_adapter(write_adapter(tmp_path / "lora", tensors))
    assert list(difference(adapter, over, exclude=["score.*"]).tensors) == [f"{UP}.weight"]


def test_files_that_are_missing(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", PAIR)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: holds only pickled weights"):
        open_adapter(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors; download it"):
        open_adapter(folder)


def test_identity_is_of_files_and_settings(tmp_path: Path, over: Source) -> None:
    first = put(tmp_path / "lora", over, PAIR)
    again = difference(open_adapter(tmp_path / "lora"), over)
    assert repr(first.identity) == repr(again.identity)
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 7}))
    other = difference(open_adapter(tmp_path / "lora"), over)
    assert repr(first.identity) != repr(other.identity)
    assert set(first.inputs) == {tmp_path / "lora", tmp_path / "over"}


# --- files that are in no folder of PEFT, or not in safetensors -----------------------------------


def test_pickled_factors_are_read_where_that_is_allowed(tmp_path: Path, over: Source) -> None:
    torch = pytest.importorskip("torch")
    tensors = pair(f"{ATTENTION}.k_proj", 3, 6)
    safe = put(tmp_path / "safe", over, tensors)
    folder = write_adapter(tmp_path / "pickled", tensors)
    stored = open_adapter(folder).stored
    held = {n: torch.from_numpy(np.array(read(stored, n))) for n in stored.tensors}
    (folder / "adapter_model.safetensors").unlink()
    torch.save(held, folder / "adapter_model.bin")
    assert is_adapter(folder)
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        open_adapter(folder)
    found = difference(open_adapter(folder, allow_pickle=True), over)
    for name in safe.tensors:
        np.testing.assert_array_equal(read(found, name), read(safe, name))


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",), "PEFT"),
        (("unet.down_blocks.0.attn.to_q.lora_B.weight",), "PEFT or diffusers"),
        (("lora_unet_input_blocks_1_1_proj_in.lora_down.weight",
          "lora_unet_input_blocks_1_1_proj_in.alpha"), "kohya"),
        (("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",), "kohya"),
        (("mid_block.attentions.0.proj_in.lora.up.weight",), "diffusers"),
        (("down_blocks.0.attn.processor.to_q_lora.down.weight",), "diffusers"),
        (("lora_unet_x.hada_w1_a",), "LyCORIS"),
        (("unet.x.lokr_w1",), "LyCORIS"),
    ],
)  # fmt: skip
def test_factors_that_are_in_no_folder_are_named(tmp_path, names, kind) -> None:
    write_safetensors(tmp_path / "style.safetensors", {n: np.ones((2, 8)) for n in names}, "F32")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "style.safetensors")
    assert kind in str(caught.value)
    assert "not a whole model" in str(caught.value)
    assert "PEFT folder" in str(caught.value)


def test_a_saved_module_that_was_not_gathered_is_said(tmp_path: Path, over: Source) -> None:
    tensors = pair(f"{ATTENTION}.k_proj", 3, 6) | {f"{HEAD}.weight": np.zeros((0,))}
    with pytest.raises(CheckpointError, match="shards were not gathered"):
        put(tmp_path / "lora", over, tensors)


def test_a_pattern_fits_what_it_leaves_out(tmp_path: Path, over: Source) -> None:
    """A head of another task, which the model does not have, or has in another shape."""
    tensors = pair(f"{ATTENTION}.k_proj", 3, 6) | pair("regressor", 1, 6)
    tensors |= {"score.weight": np.ones((1, 6)), f"{HEAD}.weight": np.ones((7, 5))}
    adapter = open_adapter(write_adapter(tmp_path / "lora", tensors))
    source = difference(adapter, over, exclude=["score.*", "classifier.*", "regressor.*"])
    assert list(source.tensors) == [f"{ATTENTION}.k_proj.weight"]
    assert sorted(source.left_out) == [f"{HEAD}.weight", "regressor.weight", "score.weight"]
    with pytest.raises(FamilyError):
        difference(adapter, over, exclude=["score.*"])


def test_names_of_memory_and_of_files(tmp_path: Path) -> None:
    """Qwen2.5-VL: an adapter has the names of memory, the published files have others."""
    q, qkv = "model.layers.0.self_attn.q_proj.weight", "visual.blocks.0.attn.qkv.weight"
    shapes = {q: (4, 4), qkv: (6, 4)}
    files = {n: np.ones(shape, np.float32) for n, shape in shapes.items()}
    over = open_checkpoint(write_checkpoint(tmp_path / "over", files, "F32"))
    tensors = pair("model.language_model.layers.0.self_attn.q_proj", 4, 4)
    tensors |= pair("model.visual.blocks.0.attn.qkv", 6, 4)
    assert sorted(put(tmp_path / "lora", over, tensors).tensors) == sorted(shapes)


def test_a_pattern_of_a_config_may_not_cost_years(monkeypatch):
    monkeypatch.setattr(patterns, "_SECONDS", 1)
    config = {"r": 8, "lora_alpha": 8, "rank_pattern": {"(a+)+b": 4}}
    with pytest.raises(CheckpointError, match=r"rank_pattern.*\(a\+\)\+b.*more than 1 s"):
        scaling_of(config, "a" * 100)
    patterns._close_children()
