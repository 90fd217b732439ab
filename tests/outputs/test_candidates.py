"""Candidates: what is put into a loaded model is what a merge writes, and it is undone exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.conftest import family_weights, read_checkpoint, write_family  # noqa: E402

import taskvec as tv  # noqa: E402
from taskvec.errors import TaskvecError, UsageError  # noqa: E402
from taskvec.outputs.candidates import candidates  # noqa: E402
from taskvec.recipes.coerce import as_recipe  # noqa: E402

METHODS: list[Any] = [
    "task_arithmetic",
    {"name": "lata", "scheme": "linear"},
    {"name": "ties", "density": 0.4},
    {"name": "dare", "density": 0.5},
    "average",
    "karcher",
]


class Weights(torch.nn.Module):
    """A module with the tensors of a checkpoint under their names."""

    def __init__(self, tensors: dict[str, Any], dtype: Any) -> None:
        super().__init__()
        self.tensors = {
            name: torch.nn.Parameter(torch.from_numpy(np.array(array)).to(dtype))
            for name, array in tensors.items()
        }

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.tensors

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.tensors.items()


@pytest.fixture
def family(tmp_path):
    paths = write_family(tmp_path / "family")
    return tv.Family(
        base=str(paths["base"]),
        instruct=str(paths["instruct"]),
        tasks={"math": str(paths["math"]), "code": str(paths["code"])},
    )


def target_of(family: Any, dtype: Any = torch.float32) -> Weights:
    from pathlib import Path

    return Weights(read_checkpoint(Path(family.edited)), dtype)


def bits(module: Weights) -> dict[str, bytes]:
    return {
        name: tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in module.tensors.items()
    }


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_candidate_has_the_weights_that_merge_writes(family, tmp_path, method, dtype):
    scale = {"math": 0.7, "code": 0.4}
    recipe = as_recipe(family, {"method": method, "scale": scale})
    module = target_of(family, dtype)
    before = bits(module)
    tv.merge(family, tmp_path / "merged", method=method, scale=scale)
    written = read_checkpoint(tmp_path / "merged")
    with candidates(recipe, module) as bench:
        bench.put(recipe)
        for name, tensor in module.tensors.items():
            assert np.array_equal(tensor.detach().float().numpy(), written[name]), name
        assert bits(module) != before
    assert bits(module) == before


def test_candidates_may_be_written_in_other_dtypes(family, tmp_path):
    """One loaded model serves recipes that differ in `out.dtype`, also where nothing is added."""
    scale = {"math": 0.7, "code": 0.4}
    as_stored = as_recipe(family, {"method": "task_arithmetic", "scale": scale})
    narrow = replace(as_stored, out=replace(as_stored.out, dtype="float16"))
    unmerged = narrow.with_scales({"math": 0.0, "code": 0.0})
    module = target_of(family)
    before = bits(module)
    with candidates(as_stored, module) as bench:
        for number, recipe in enumerate((narrow, as_stored, unmerged)):
            out = tmp_path / str(number)
            tv.merge(
                family,
                out,
                method="task_arithmetic",
                scale=dict(recipe.scales),
                dtype=recipe.out.dtype,
            )
            written = read_checkpoint(out)
            bench.put(recipe)
            for name, tensor in module.tensors.items():
                there = np.asarray(written[name], np.float32)
                assert np.array_equal(tensor.detach().float().numpy(), there), (number, name)
    assert bits(module) == before


def test_one_candidate_after_another_leaves_nothing_of_the_first(family):
    module = target_of(family)
    both = {"math": 0.7, "code": 0.4}
    one = as_recipe(family, {"method": "task_arithmetic", "scale": both})
    only_math = one.with_scales({"math": 0.7, "code": 0.0})
    with candidates(one, module) as bench:
        bench.put(only_math)
        alone = bits(module)
        bench.put(one)
        assert bits(module) != alone
        bench.put(only_math)
        assert bits(module) == alone
        bench.put(one.with_scales({"math": 0.0, "code": 0.0}))
        assert bits(module) == bits(target_of(family))


def test_another_method_may_need_the_base(family, tmp_path):
    """The bench was opened for a method that does not read it."""
    scale = {"math": 0.7, "code": 0.4}
    plain = as_recipe(family, {"method": "task_arithmetic", "scale": scale})
    lata = as_recipe(family, {"method": "lata", "scale": scale})
    module = target_of(family)
    tv.merge(family, tmp_path / "merged", method="lata", scale=scale)
    with candidates(plain, module) as bench:
        bench.put(lata)
        written = read_checkpoint(tmp_path / "merged")
        for name, tensor in module.tensors.items():
            assert np.array_equal(tensor.detach().numpy(), written[name]), name


def test_a_table_takes_the_place_of_the_methods(family):
    module = target_of(family)
    recipe = as_recipe(family, {"method": "task_arithmetic", "scale": {"math": 1.0, "code": 1.0}})
    table = tv.lata(tv.scan(family))
    zero = replace(table, weights=0 * table.weights)
    with candidates(recipe, module) as bench:
        assert bench.put(replace(recipe, table=zero)) is zero
        assert bits(module) == bits(target_of(family))


def test_a_failed_candidate_leaves_the_target(family):
    module = target_of(family, torch.float16)
    before = bits(module)
    recipe = as_recipe(family, {"method": "task_arithmetic", "scale": 1.0, "dtype": "float16"})
    with candidates(recipe, module) as bench:
        bench.put(recipe)
        with pytest.raises(TaskvecError, match="overflows float16"):
            bench.put(recipe.with_scales({"math": 1e9, "code": 1.0}))
        assert bits(module) == before


def test_strided_and_shared_parameters(family):
    module = target_of(family)
    name = "model.layers.0.self_attn.q_proj.weight"
    strided = module.tensors[name].detach().t().contiguous().t()
    assert not strided.is_contiguous()
    module.tensors[name] = strided
    recipe = as_recipe(family, {"method": "task_arithmetic", "scale": {"math": 1.0, "code": 0.0}})
    with candidates(recipe, module) as bench:
        bench.put(recipe)
        expected = torch.from_numpy(np.array(family_weights()["math"][name])).bfloat16().float()
        assert torch.allclose(strided, expected, atol=1e-2)
        assert not torch.equal(strided, target_of(family).tensors[name])
    assert torch.equal(strided, target_of(family).tensors[name])


def test_what_is_not_the_target_is_refused(family):
    recipe = as_recipe(family, {"method": "task_arithmetic", "scale": {"math": 1.0, "code": 1.0}})
    module = target_of(family)
    with torch.no_grad():
        module.tensors["odd"][3] += 1
    with (
        pytest.raises(UsageError, match="not the target: tensor 'odd' differs; load the target's"),
        candidates(recipe, module),
    ):
        pass
    del module.tensors["odd"]
    with (
        pytest.raises(UsageError, match="has no tensor 'odd' of the target; merge the recipe"),
        candidates(recipe, module),
    ):
        pass


def test_other_members_are_refused(family):
    recipe = as_recipe(family, {"method": "task_arithmetic", "scale": {"math": 1.0, "code": 1.0}})
    fewer = replace(family, tasks={"math": family.tasks["math"]})
    other = as_recipe(fewer, {"method": "task_arithmetic", "scale": {"math": 1.0}})
    with (
        candidates(recipe, target_of(family)) as bench,
        pytest.raises(UsageError, match="must have the members of its first recipe"),
    ):
        bench.put(other)
