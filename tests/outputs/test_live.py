"""Merging into a model in memory gives what the folder would hold, or changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.adapters import pairs, write_adapter
from tests.conftest import family_weights, read_checkpoint, read_raw
from tests.modules import llama

import taskvec as tv
from taskvec.errors import CheckpointError, OutputError, StaleError, UsageError

torch = pytest.importorskip("torch")

SCALE = {"math": 0.5, "code": -0.25}
NORM = "model.norm.weight"


def family_of(members: Any, **options: Any) -> tv.Family:
    roles = {role: members[role] for role in ("base", "instruct")}
    return tv.Family(tasks={task: members[task] for task in SCALE}, **roles, **options)


def tensors_of(weights: Any, dtype: Any = torch.bfloat16) -> dict[str, Any]:
    return {name: torch.from_numpy(np.array(array)).to(dtype) for name, array in weights.items()}


def raw(value: Any) -> bytes:
    """Stored bytes of a tensor or array, row by row."""
    if isinstance(value, torch.Tensor):
        return value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return np.ascontiguousarray(value).tobytes()


def refusal(
    family: tv.Family, out: Any, error: type[Exception] = UsageError, **options: Any
) -> str:
    """The message; nothing may have been written."""
    before = {name: raw(value) for name, value in contents(out).items()}
    with pytest.raises(error) as caught:
        tv.merge(family, out, **{"scale": SCALE, "method": "task_arithmetic"} | options)
    assert {name: raw(value) for name, value in contents(out).items()} == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(out: Any) -> dict[str, Any]:
    values = out.state_dict() if isinstance(out, torch.nn.Module) else out
    shown = {n: v for n, v in values.items() if not isinstance(v, torch.Tensor) or not v.is_meta}
    return {name: value for name, value in shown.items() if hasattr(value, "dtype")}


# --- the same as a folder ------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_same_bits_as_in_a_folder(tmp_path, family, kind, threads):
    dtype = "float32" if kind == "numpy" else None
    expected = tv.merge(
        family_of(family), tmp_path / "out", method="lata", scale=SCALE, dtype=dtype
    )
    zeros = {n: np.zeros_like(w) for n, w in read_checkpoint(tmp_path / "out").items()}
    out = zeros if kind == "numpy" else tensors_of(zeros)
    merged = tv.merge(family_of(family), out, method="lata", scale=SCALE, threads=threads)
    assert {n: raw(v) for n, v in out.items()} == {
        n: data for n, (_, _, data) in read_raw(tmp_path / "out").items()
    }
    assert merged.path is None
    assert merged.fingerprint == expected.fingerprint
    assert np.array_equal(merged.table.weights, expected.table.weights)


def test_forgetting(tmp_path, family):
    options: dict[str, Any] = {"scale": {"math": 0.5, "code": 1.0}}
    options["method"] = tv.method("lata", scheme="threshold", threshold=0.999)
    tv.forget(family_of(family), tmp_path / "out", **options)
    out = tensors_of(family_weights()["instruct"])
    tv.forget(family_of(family), out, **options)
    assert {n: raw(v) for n, v in out.items()} == {
        n: data for n, (_, _, data) in read_raw(tmp_path / "out").items()
    }


def test_result_is_the_formula():
    weights = family_weights()
    out = {name: array.copy() for name, array in weights["base"].items() if array.ndim}
    members = {who: {n: w for n, w in given.items() if n in out} for who, given in weights.items()}
    tv.merge(family_of(members), out, method="task_arithmetic", scale=SCALE)
    for name, got in out.items():
        start = weights["instruct"][name].astype(np.float64)
        steps = sum(SCALE[t] * (weights[t][name] - start) for t in SCALE)
        np.testing.assert_allclose(got, start + steps, rtol=0, atol=1e-6)


def test_parameters_keep_their_dtype(family):
    out = tensors_of(family_weights()["instruct"])
    out[NORM] = out[NORM].double()
    out["odd"] = out["odd"].to(torch.float16)
    tv.merge(family_of(family), out, method="task_arithmetic", scale=SCALE)
    members = {who: read_checkpoint(folder) for who, folder in family.items()}
    for name, dtype, digits in ((NORM, torch.float64, 1e-7), ("odd", torch.float16, 1e-3)):
        start = members["instruct"][name].astype(np.float64)
        expected = start + sum(SCALE[t] * (members[t][name] - start) for t in SCALE)
        assert out[name].dtype == dtype
        np.testing.assert_allclose(out[name].double().numpy(), expected, rtol=digits, atol=1e-5)


# --- into a member -------------------------------------------------------------------------------


def test_target_is_edited_in_place(tmp_path, family):
    expected = tv.merge(family_of(family), tmp_path / "out", method="lata", scale=SCALE)
    target = tensors_of(family_weights()["instruct"])
    given = family_of(family | {"instruct": target})
    merged = tv.merge(given, target, method="lata", scale=SCALE)
    assert merged.fingerprint == expected.fingerprint
    assert {n: raw(v) for n, v in target.items()} == {
        n: data for n, (_, _, data) in read_raw(tmp_path / "out").items()
    }


def test_scale_of_zero_leaves_the_bytes(family):
    target = tensors_of(family_weights()["instruct"])
    target["odd"][0] = -0.0
    before = {n: raw(v) for n, v in target.items()}
    given = family_of(family | {"instruct": target})
    tv.merge(given, target, method="task_arithmetic", scale=dict.fromkeys(SCALE, 0.0))
    assert {n: raw(v) for n, v in target.items()} == before


def test_adding_and_forgetting_in_place_returns(family):
    weights = family_weights()
    target = {name: np.array(array, np.float64) for name, array in weights["instruct"].items()}
    members = {who: weights[who] for who in ("base", "instruct", *SCALE)}
    given = family_of(members, target=target)
    tv.merge(given, target, method="task_arithmetic", scale=SCALE)
    assert not np.allclose(target[NORM], weights["instruct"][NORM], atol=1e-4)
    tv.merge(given, target, method="task_arithmetic", scale={t: -s for t, s in SCALE.items()})
    for name, array in target.items():
        np.testing.assert_allclose(array, weights["instruct"][name], rtol=0, atol=1e-15)


def test_excluded_tensors_are_the_target_s(family):
    weights = family_weights()
    out = tensors_of(weights["base"])
    tv.merge(family_of(family, exclude=(NORM,)), out, method="task_arithmetic", scale=SCALE)
    assert raw(out[NORM]) == read_raw(family["instruct"])[NORM][2]


def test_strides_of_parameters(family):
    plain, turned = (tensors_of(family_weights()["instruct"]) for _ in range(2))
    name = "model.layers.0.mlp.up_proj.weight"
    turned[name] = turned[name].t().contiguous().t()
    assert not turned[name].is_contiguous()
    array = {n: np.zeros(v.shape, np.float32, order="F") for n, v in plain.items()}
    for out in (plain, turned, array):
        tv.merge(family_of(family), out, method="task_arithmetic", scale=SCALE)
    assert torch.equal(plain[name], turned[name])
    rounded = torch.from_numpy(array[name]).to(torch.bfloat16)
    assert torch.equal(rounded, plain[name])


# --- modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [False, True])
def test_transformers_model_equals_the_folder_loaded(tmp_path, tie):
    transformers = pytest.importorskip("transformers")
    before, after, into = (llama(seed, tie) for seed in range(3))
    before.save_pretrained(tmp_path / "before")
    after.save_pretrained(tmp_path / "after")
    family = tv.Family(anchor=tmp_path / "before", tasks={"t": tmp_path / "after"})
    tv.merge(family, tmp_path / "out", method="task_arithmetic", scale={"t": 0.5})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    merged = tv.merge(family, into, method="task_arithmetic", scale={"t": 0.5})
    expected = loaded.state_dict()
    assert expected.keys() == into.state_dict().keys()
    assert all(torch.equal(expected[n], value) for n, value in into.state_dict().items())
    assert (into.lm_head.weight is into.model.embed_tokens.weight) is tie
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(into(tokens).logits, loaded(tokens).logits)
    assert merged.warnings == ()


def test_gradients_know_that_a_parameter_changed():
    linear = torch.nn.Linear(3, 2, bias=False)
    loss = linear(torch.ones(1, 3, requires_grad=True)).sum()
    start, end = ({"weight": np.full((2, 3), value, np.float32)} for value in (0, 1))
    tv.merge(
        tv.Family(anchor=start, tasks={"t": end}), linear, method="task_arithmetic", scale={"t": 1}
    )
    assert linear.weight.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert linear.weight.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Shared(torch.nn.Module):
    """Two names for one parameter, and no config that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(3, 2, bias=False)
        self.two = torch.nn.Linear(3, 2, bias=False)
        self.two.weight = self.one.weight


def shared_family(first: float, second: float) -> tv.Family:
    def both(a: float, b: float) -> dict[str, Any]:
        values = {"one.weight": a, "two.weight": b}
        return {name: np.full((2, 3), value, np.float32) for name, value in values.items()}

    return tv.Family(anchor=both(0, 0), tasks={"t": both(first, second)})


def test_shared_parameters_are_written_once():
    module = Shared()
    merged = tv.merge(shared_family(1, 1), module, method="task_arithmetic", scale={"t": 0.5})
    assert module.one.weight.tolist() == [[0.5] * 3] * 2
    assert module.two.weight is module.one.weight
    separate = {n: np.zeros((2, 3), np.float32) for n in ("one.weight", "two.weight")}
    other = tv.merge(shared_family(1, 1), separate, method="task_arithmetic", scale={"t": 0.5})
    assert merged.fingerprint == other.fingerprint


def test_shared_parameters_in_place():
    module = Shared()
    with torch.no_grad():
        module.one.weight.fill_(1.0)
    family = shared_family(1, 1)
    family = tv.Family(anchor=family.anchor, target=module, tasks=family.tasks)
    tv.merge(family, module, method="task_arithmetic", scale={"t": 0.5})
    assert module.one.weight.tolist() == [[1.5] * 3] * 2  # and not 2.0


def test_shared_parameters_with_two_results():
    told = refusal(shared_family(1, 2), Shared(), scale={"t": 0.5})
    assert told == (
        "out: 'two.weight' and 'one.weight' share their memory, but the results differ; untie "
        "them first"
    )


# --- what is refused, with nothing written -------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda out: out.pop(NORM),
            f"lacks tensor {NORM!r} of the result (1 missing); give a model of the same "
            "architecture",
        ),
        (
            lambda out: out.update(extra=torch.ones(2)),
            "has tensor 'extra', which the result lacks (1 extra); give a model of the same "
            "architecture",
        ),
        (
            lambda out: out.update({NORM: torch.ones(3)}),
            f"tensor {NORM!r} has shape [3], the result has [24]; give a model of the same "
            "architecture",
        ),
        (
            lambda out: out.update({NORM: torch.ones(24, dtype=torch.int64)}),
            f"tensor {NORM!r} is I64, the result is BF16; give a model of the same architecture",
        ),
        (
            lambda out: out.update({NORM: np.broadcast_to(np.float32(1), 24)}),
            f"array {NORM!r} is read-only; give a copy of it",
        ),
        (
            lambda out: out.update({NORM: 1}),
            f"{NORM!r} must be a NumPy array or a torch tensor; got int",
        ),
        (
            lambda out: out.update({NORM: out["model.embed_tokens.weight"][0]}),
            f"'model.embed_tokens.weight' and {NORM!r} share part of their memory; give each "
            "its own",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit(family, change, message):
    out = tensors_of(family_weights()["base"])
    change(out)
    told = refusal(family_of(family), out)
    assert told.removeprefix("out: ") == message


def test_weights_that_are_not_there(family):
    out = tensors_of(family_weights()["base"]) | {NORM: torch.ones(24, device="meta")}
    assert refusal(family_of(family), out, CheckpointError) == (
        f"out: tensor {NORM!r} is on the device meta, its weights are not there; load the model "
        "whole"
    )


def test_dtype_is_for_folders(family):
    out = tensors_of(family_weights()["base"])
    assert refusal(family_of(family), out, dtype="float32") == (
        "dtype is for a folder; parameters in memory keep theirs: remove it"
    )


def test_state_dict_that_is_made_up(family):
    class Odd(torch.nn.Module):
        def state_dict(self, *_: Any, **__: Any) -> Any:
            return {"w": torch.ones(2)}

    assert refusal(family_of(family), Odd()) == (
        "out: 'w' of its state dict is not a parameter or buffer"
    )


def test_failures_during_the_work_leave_everything_as_it_was(family):
    weights = family_weights()
    out = tensors_of(weights["base"])
    broken = tensors_of(weights["math"])
    broken["temperature"] = torch.tensor(float("nan"), dtype=torch.bfloat16)  # the last by name
    told = refusal(family_of(family | {"math": broken}), out, CheckpointError)
    assert told.startswith("task 'math' (<in memory>): tensor 'temperature' holds nan at ")
    half = tensors_of(weights["base"], torch.float16)
    told = refusal(family_of(family), half, OutputError, scale={"math": 1e9, "code": 0.0})
    assert "overflows float16; lower the scale" in told


def test_weights_that_changed_since_the_scan(family):
    weights = family_weights()
    math = tensors_of(weights["math"])
    given = family_of(family | {"math": math})
    table = tv.lata(tv.scan(given))
    math[NORM] += 1
    told = refusal(given, tensors_of(weights["base"]), StaleError, table=table)
    assert told.startswith(f"task 'math' (<in memory>): weights of tensor {NORM!r} are not")


def test_what_is_read_elsewhere_is_not_written_over(family):
    weights = family_weights()
    target = tensors_of(weights["instruct"])
    name = "model.layers.0.self_attn.q_proj.weight"
    other = "model.layers.1.self_attn.q_proj.weight"
    moved = target | {name: target[other], other: target[name]}
    given = family_of(family, target=moved)
    assert refusal(given, target) == (
        f"out: tensor {name!r} of target is made of other tensors of out, which are written over; "
        "give a copy as out"
    )
    tv.merge(
        given, {n: v.clone() for n, v in target.items()}, method="task_arithmetic", scale=SCALE
    )


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_over_the_model_that_is_edited(tmp_path, family, dora):
    module = "model.layers.0.mlp.up_proj"
    weights = family_weights()["instruct"]
    factors = pairs(weights, [module])
    if dora:
        rows = np.linalg.norm(weights[f"{module}.weight"], axis=1)
        factors |= {f"{module}.lora_magnitude_vector": rows.astype(np.float32)}
    adapter = write_adapter(tmp_path / "adapter", factors, use_dora=dora)
    options: dict[str, Any] = {"scale": {"t": 0.5}}
    given = tv.Family(instruct=family["instruct"], tasks={"t": adapter})
    tv.merge(given, tmp_path / "out", method="task_arithmetic", **options)
    model = tensors_of(weights)
    itself = tv.Family(instruct=model, tasks={"t": adapter})
    out = {n: v.clone() for n, v in model.items()} if dora else model
    if dora:  # reads norms of rows of the weights that would be written over
        assert "made of other tensors of out" in refusal(itself, model, **options)
    tv.merge(itself, out, method="task_arithmetic", **options)
    assert {n: raw(v) for n, v in out.items()} == {
        n: data for n, (_, _, data) in read_raw(tmp_path / "out").items()
    }
