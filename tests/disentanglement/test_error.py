"""The disentanglement error equals its definition, cell by cell, and leaves the model alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.disentanglement.toys import (
    arrays,
    batches,
    differs,
    fine_tune,
    mlp,
    mlp_logits,
    moved,
    symmetric_kl,
    xi,
)

from taskvec.disentanglement import (
    Disentanglement,
    ModelTask,
    classification,
    coefficients,
    disentanglement_error,
)
from taskvec.disentanglement import error as error_module
from taskvec.disentanglement.tasks import rows_of
from taskvec.errors import DataError, UsageError
from taskvec.evaluation.intervals import wilson
from taskvec.reporting.figures import draw_heat_map

ALPHAS = coefficients(5, -1, 1)
BATCHES = {"one": batches(1), "two": batches(2, (5, 4))}
BY_HAND = {"prediction": differs, "symmetric_kl": symmetric_kl}


def tasks() -> dict[str, ModelTask]:
    return {name: classification(name, BATCHES[name]) for name in BATCHES}


def by_hand(a: float, b: float, distance: str) -> float:
    module = mlp()
    start = arrays(module.state_dict())
    tunes = {"one": arrays(fine_tune(module, 1)), "two": arrays(fine_tune(module, 2))}
    data = {name: np.concatenate([x.numpy() for x, _ in BATCHES[name]]) for name in BATCHES}
    return xi(
        lambda alphas, x: mlp_logits(moved(start, tunes, alphas), x),
        data,
        {"one": a, "two": b},
        BY_HAND[distance],
    )


def measured(module: Any = None, **options: Any) -> Disentanglement:
    module = module or mlp()
    vectors = {"one": fine_tune(module, 1), "two": fine_tune(module, 2)}
    return disentanglement_error(module, vectors, tasks(), **{"alphas": ALPHAS} | options)


@pytest.mark.parametrize("distance", ["prediction", "symmetric_kl"])
def test_equals_the_definition(distance: str) -> None:
    found = measured(distance=distance)
    expected = [[by_hand(a, b, distance) for b in ALPHAS] for a in ALPHAS]
    assert np.max(expected) > 0.5
    np.testing.assert_allclose(found.values, expected, rtol=1e-5, atol=1e-6)


def test_equals_the_definition_on_a_grid_without_zero() -> None:
    alphas = (-0.6, 0.4, 1.0)
    expected = [[by_hand(a, b, "prediction") for b in alphas] for a in alphas]
    np.testing.assert_allclose(measured(alphas=alphas).values, expected, rtol=1e-12)


def test_is_averaged_over_the_examples_that_were_seen() -> None:
    found = measured()
    assert found.examples == {"one": 13, "two": 9}
    assert found.rows == found.examples
    for cell in (cell for row in found.cells for cell in row):
        for task, figure in cell.by_task.items():
            assert figure.value * found.examples[task] == pytest.approx(
                round(figure.value * found.examples[task])
            )


def test_intervals_are_wilsons_and_that_of_their_sum() -> None:
    cell = measured().cells[4][4]
    bounds = []
    for figure in cell.by_task.values():
        assert (figure.low, figure.high) == wilson(round(figure.value * figure.n), figure.n)
        bounds.append((figure.value - figure.low, figure.high - figure.value))
    (l1, u1), (l2, u2) = bounds
    assert cell.error.low == pytest.approx(cell.error.value - (l1**2 + l2**2) ** 0.5)
    assert cell.error.high == pytest.approx(cell.error.value + (u1**2 + u2**2) ** 0.5)


def test_accuracy_is_of_the_point_on_each_tasks_labels() -> None:
    module = mlp()
    start, tune = arrays(module.state_dict()), arrays(fine_tune(module, 1))
    x = np.concatenate([x.numpy() for x, _ in BATCHES["one"]])
    labels = np.concatenate([y.numpy() for _, y in BATCHES["one"]])
    right = mlp_logits(moved(start, {"one": tune}, {"one": 0.5}), x).argmax(-1) == labels
    cell = measured().cells[3][2]
    assert cell.alphas == {"one": 0.5, "two": 0.0}
    assert cell.accuracy["one"].value == pytest.approx(right.mean())


def test_order_of_tasks_swaps_the_axes_only() -> None:
    module = mlp()
    vectors = {"two": fine_tune(module, 2), "one": fine_tune(module, 1)}
    found = disentanglement_error(module, vectors, tasks(), alphas=ALPHAS)
    assert found.tasks == ("two", "one")
    np.testing.assert_array_equal(found.values, measured().values.T)


# A linear model is not disentangled by being linear: what it takes is that the share of the other
# task vector, J τ, vanishes on a task's own inputs.


def linear(bias: bool = False) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(6, 4, bias=bias).double()


def halves(seed: int, half: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs that are zero outside one half of their dimensions."""
    found = batches(seed)
    for x, _ in found:
        x[:, 3 * (1 - half) : 3 * (2 - half)] = 0
    return found


def half_tune(module: torch.nn.Linear, seed: int, half: int) -> dict[str, torch.Tensor]:
    """A fine-tune that moved only the columns that read one half."""
    tuned = fine_tune(module, seed, 2.0)
    other = slice(3 * (1 - half), 3 * (2 - half))
    tuned["weight"][:, other] = module.weight.detach()[:, other]
    return tuned


def test_is_zero_for_a_linear_model_whose_tasks_see_other_inputs() -> None:
    module = linear()
    vectors = {"one": half_tune(module, 1, 0), "two": half_tune(module, 2, 1)}
    data = {
        "one": classification("one", halves(1, 0)),
        "two": classification("two", halves(2, 1)),
    }
    for distance in ("prediction", "symmetric_kl"):
        found = disentanglement_error(module, vectors, data, alphas=ALPHAS, distance=distance)
        np.testing.assert_array_equal(found.values, np.zeros((5, 5)))
    mixed = {"one": data["two"], "two": data["one"]}  # each vector on the other's inputs
    found = disentanglement_error(module, vectors, mixed, alphas=ALPHAS)
    assert found.values.max() > 0


def test_is_not_zero_for_a_linear_model_whose_tasks_share_inputs() -> None:
    module = linear()
    vectors = {"one": fine_tune(module, 1, 2.0), "two": fine_tune(module, 2, 2.0)}
    found = disentanglement_error(module, vectors, tasks(), alphas=ALPHAS)
    assert found.values[4][4] > 0
    assert found.values[2][2] == 0


# The model is left alone


def test_the_module_is_the_same_afterwards_bit_for_bit() -> None:
    module = mlp().float().train()
    module[1].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    vectors = {"one": fine_tune(module, 1), "two": fine_tune(module, 2)}
    data = {
        name: classification(name, [(x.float(), y) for x, y in BATCHES[name]]) for name in BATCHES
    }
    disentanglement_error(module, vectors, data, alphas=ALPHAS)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert (module.training, module[0].training, module[1].training) == (True, True, False)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_the_module_is_the_same_after_an_error() -> None:
    module = mlp()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    calls = 0

    def fails(module: Any, x: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise RuntimeError("out of patience")
        return module(x)

    data = tasks() | {"two": classification("two", BATCHES["two"], forward=fails)}
    vectors = {"one": fine_tune(module, 1), "two": fine_tune(module, 2)}
    with pytest.raises(RuntimeError, match="out of patience"):
        disentanglement_error(module, vectors, data, alphas=ALPHAS)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_row_with_a_nan_differs_from_every_other() -> None:
    def breaks(module: Any, x: Any) -> Any:
        out = module(x)
        out[0, 2] = torch.nan
        return out

    data = tasks() | {"one": classification("one", BATCHES["one"], forward=breaks)}
    module = mlp()
    vectors = {"one": fine_tune(module, 1), "two": fine_tune(module, 2)}
    found = disentanglement_error(module, vectors, data, alphas=(0.0,))
    assert found.cells[0][0].broken == 3
    assert found.values[0][0] == pytest.approx(3 / 13)
    apart = disentanglement_error(module, vectors, data, alphas=(0.0,), distance="symmetric_kl")
    assert np.isnan(apart.values[0][0])
    assert apart.to_json()["cells"][0]["error"]["value"] is None


# Resuming


class Counted:
    """Counts how often a model is run, and stops after a while."""

    def __init__(self, stop: int | None = None) -> None:
        self.runs, self.stop = 0, stop

    def __call__(self, module: Any, x: Any) -> Any:
        self.runs += 1
        if self.runs == self.stop:
            raise KeyboardInterrupt
        return module(x)


@pytest.mark.parametrize("distance", ["prediction", "symmetric_kl"])
@pytest.mark.parametrize("damaged", [False, True])
def test_goes_on_where_it_was(tmp_path: Path, distance: str, damaged: bool) -> None:
    module = mlp()
    vectors = {"one": fine_tune(module, 1), "two": fine_tune(module, 2)}

    def run(counted: Counted) -> Disentanglement:
        data = {t: classification(t, BATCHES[t], forward=counted) for t in BATCHES}
        options: Any = {"alphas": ALPHAS, "distance": distance, "out": tmp_path}
        return disentanglement_error(module, vectors, data, **options)

    with pytest.raises(KeyboardInterrupt):
        run(Counted(71))  # 5 batches a point: the fifteenth point is under way
    (cells,) = tmp_path.glob("cells.*.jsonl")
    assert len(cells.read_text().splitlines()) == 14
    if damaged:  # the last line and the answers of a single-task model
        cells.write_text(cells.read_text()[:-20])
        next(iter(tmp_path.glob("single.*/1.1.0.npy"))).write_bytes(b"")
    again = Counted()
    assert run(again) == measured(distance=distance)
    # Damaged: one more cell, and one more single-task model, on its own data of 3 batches.
    assert again.runs == (11 * 5 if not damaged else 12 * 5 + 3)
    last = Counted()
    assert run(last) == measured(distance=distance)
    assert last.runs == 0


def test_other_weights_or_data_or_settings_do_not_go_on(tmp_path: Path) -> None:
    measured(out=tmp_path)
    measured(out=tmp_path, distance="symmetric_kl")
    measured(mlp(1), out=tmp_path)
    module = mlp()
    vectors = {"one": fine_tune(module, 1), "two": fine_tune(module, 3)}
    disentanglement_error(module, vectors, tasks(), alphas=ALPHAS, out=tmp_path)
    data = tasks() | {"two": classification("two", batches(4))}
    vectors["two"] = fine_tune(module, 2)
    disentanglement_error(module, vectors, data, alphas=ALPHAS, out=tmp_path)
    assert len(list(tmp_path.glob("cells.*.jsonl"))) == 5
    measured(out=tmp_path, alphas=(0.25,))  # more cells of the same
    assert len(list(tmp_path.glob("cells.*.jsonl"))) == 5


def test_every_point_is_asked_once() -> None:
    counted = Counted()
    module = mlp()
    vectors = {"one": fine_tune(module, 1), "two": fine_tune(module, 2)}
    data = {t: classification(t, BATCHES[t], forward=counted) for t in BATCHES}
    disentanglement_error(module, vectors, data, alphas=ALPHAS)
    assert counted.runs == 25 * 5  # both sides anew would be 2 · 25 · 5


# What is written


def test_csv_has_a_line_for_each_cell() -> None:
    found = measured()
    lines = list(csv.reader(io.StringIO(found.to_csv())))
    assert lines[0] == ["alpha one", "alpha two", "error", "low", "high", "error one", "error two",
                        "accuracy one", "accuracy two"]  # fmt: skip
    assert len(lines) == 26
    for line in lines[1:]:
        a, b, value, low, high, *terms = map(float, line)
        assert value == found.values[ALPHAS.index(a)][ALPHAS.index(b)] == sum(terms[:2])
        assert low <= value <= high


def test_heat_map_is_drawn_with_the_first_task_along_x(tmp_path: Path) -> None:
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    from taskvec.reporting.studies import error_spec

    found = measured()
    spec = error_spec(found.to_json())
    (rows,) = spec["datasets"].values()
    across, up = (spec["layer"][0]["encoding"][axis] for axis in "xy")
    assert (across["title"], up["title"]) == ("α of one", "α of two")
    by_place = {(row[across["field"]], row[up["field"]]): row["value"] for row in rows}
    for i, one in enumerate(ALPHAS):
        for j, two in enumerate(ALPHAS):
            assert by_place[one, two] == found.values[i][j]
    draw_heat_map(found.to_json(), tmp_path / "xi.png")
    assert (tmp_path / "xi.png").read_bytes().startswith(b"\x89PNG")


# What is refused


def test_needs_two_tasks_with_data() -> None:
    module = mlp()
    vector = fine_tune(module, 1)
    data, both = tasks(), {"one": vector, "zwei": vector}
    with pytest.raises(UsageError, match="is of two tasks; got 1: one"):
        disentanglement_error(module, {"one": vector}, tasks())
    with pytest.raises(UsageError, match="task 'two' has data but no vector; give both under one"):
        disentanglement_error(
            module, {"one": vector, "zwei": vector}, {**tasks(), "zwei": tasks()["one"]}
        )
    with pytest.raises(UsageError, match="task 'zwei' has a vector but no data"):
        disentanglement_error(module, both, {"one": data["one"]})


def test_refuses_a_distance_or_a_grid_that_is_none() -> None:
    with pytest.raises(UsageError, match=r"must be in prediction \| symmetric_kl; got 'euclid'"):
        measured(distance="euclid")
    with pytest.raises(UsageError, match=r"finite numbers, each once; got \[0.0, 0.0\]"):
        measured(alphas=(0.0, 0.0))
    with pytest.raises(UsageError, match=r"points between two ends; got 0 of \[-2, 2\]"):
        coefficients(0)
    with pytest.raises(UsageError, match=r"got 5 of \[2, -2\]"):
        coefficients(5, 2, -2)


def test_default_grid_meets_zero() -> None:
    alphas = coefficients()
    assert len(alphas) == 15
    assert (alphas[0], alphas[7], alphas[14]) == (-2.0, 0.0, 2.0)
    np.testing.assert_allclose(alphas, np.linspace(-2, 2, 15), atol=1e-15)


def test_refuses_data_that_cannot_be_asked_twice() -> None:
    def once() -> Iterator[Any]:
        yield from BATCHES["one"]

    with pytest.raises(UsageError, match="'one' can be gone through only once; give a list"):
        classification("one", once())
    with pytest.raises(DataError, match="data of task 'one' are empty"):
        classification("one", [])

    class Shuffled:
        times = 0

        def __iter__(self) -> Iterator[Any]:
            self.times += 1
            yield from BATCHES["one"][:: 1 if self.times == 1 else -1]

    data = tasks() | {"one": classification("one", Shuffled())}
    module = mlp()
    vectors = {"one": fine_tune(module, 1), "two": fine_tune(module, 2)}
    with pytest.raises(DataError, match="'one' came otherwise than before, by content or in order"):
        disentanglement_error(module, vectors, data)


def test_refuses_outputs_that_are_no_logits() -> None:
    module = mlp()
    vectors = {"one": fine_tune(module, 1), "two": fine_tune(module, 2)}

    def refused(**options: Any) -> dict[str, ModelTask]:
        return tasks() | {"one": classification("one", **{"batches": BATCHES["one"]} | options)}

    with pytest.raises(UsageError, match=r"logits of shape \(rows, classes\); got Tensor"):
        disentanglement_error(module, vectors, refused(head=lambda z: z[:, 0]))
    few = [(x, y[:-1]) for x, y in BATCHES["one"]]
    with pytest.raises(DataError, match=r"task 'one': \[4\] labels for 5 rows of logits"):
        disentanglement_error(module, vectors, refused(batches=few))
    high = [(x, y + 4) for x, y in BATCHES["one"]]
    with pytest.raises(DataError, match="labels must be in 0 to 3, as there are 4 logits; got "):
        disentanglement_error(module, vectors, refused(batches=high))


def test_distance_of_rows_without_any_probability_is_not_nan() -> None:
    one = np.array([[0.0, -np.inf]])
    assert error_module.distances(one, one, "symmetric_kl") == [0.0]


def test_rows_that_are_not_taken_to_the_end_leave_gradients_on():
    task = classification("toy", [torch.zeros(2, 3), torch.ones(2, 3)])
    rows = rows_of(task, torch.nn.Linear(3, 2))
    first = next(rows)
    assert torch.is_grad_enabled()
    assert not first.logits.requires_grad
