import numpy as np
import pytest
from tests.coefficients.made_up_scans import scan_of

from taskvec.coefficients import propose
from taskvec.coefficients.closed_form import FORMULAS, vectors_of
from taskvec.errors import UsageError
from taskvec.methods.table import Table

E = np.eye(6)


def scales(tasks, name, table=None):
    return list(propose(scan_of(tasks), table).scales[name].values())


def table_of(scan, weights, origin="table made.csv"):
    return Table(scan.tasks, scan.names, np.array(weights, float), origin=origin)


@pytest.mark.parametrize("name", ["radius", "radius_shared"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_orthogonal_tasks_get_one_over_the_root_of_their_number(name, count):
    tasks = {f"t{i}": [3 * E[i]] for i in range(count)}
    assert scales(tasks, name) == pytest.approx([1 / np.sqrt(count)] * count)


@pytest.mark.parametrize("name", ["radius", "radius_shared"])
@pytest.mark.parametrize("count", [2, 5])
def test_equal_tasks_get_one_over_their_number(name, count):
    tasks = {f"t{i}": [np.arange(6.0)] for i in range(count)}
    assert scales(tasks, name) == pytest.approx([1 / count] * count)


@pytest.mark.parametrize("name", ["radius", "radius_shared"])
@pytest.mark.parametrize("cosine", [-1.0, -0.8, -0.5])
def test_tasks_in_conflict_are_not_amplified(name, cosine):
    other = cosine * E[0] + np.sqrt(1 - cosine**2) * E[1]
    assert scales({"a": [E[0]], "b": [other]}, name) == pytest.approx([1, 1])


def test_two_equal_tasks_beside_another_count_as_one():
    found = propose(scan_of({"a": [E[0]], "b": [E[0]], "c": [E[1]]}))
    # q = ½, ½, 1; Σ q τ = (1, 1), whose length is √2.
    assert list(found.scales["radius"].values()) == pytest.approx(np.array([0.5, 0.5, 1]) / 2**0.5)
    assert list(found.shares["radius"].values()) == pytest.approx([0.5**0.5] * 3)


def test_a_longer_orthogonal_vector_gets_the_same_scale():
    tasks = {"a": [E[0]], "b": [4 * E[1]]}
    assert scales(tasks, "radius") == pytest.approx([0.5**0.5] * 2)


def test_a_shorter_vector_gets_less_where_a_longer_one_does_its_work():
    a, b = E[0], 3 * (0.9 * E[0] + np.sqrt(1 - 0.81) * E[1])
    q = np.array([1 / (1 + 2.7), 1 / (1 + 0.3)])
    expected = np.minimum(1, q * np.sqrt((1 + 9) / 2) / np.linalg.norm(q[0] * a + q[1] * b))
    found = propose(scan_of({"a": [a], "b": [b]}))
    assert list(found.scales["radius"].values()) == pytest.approx(expected)
    merged = expected[0] * a + expected[1] * b
    assert found.shares["radius"] == pytest.approx({"a": merged @ a, "b": merged @ b / 9})


def test_the_merge_lies_as_far_as_a_fine_tune():
    rng = np.random.default_rng(0)
    tau = rng.normal(size=(3, 2, 50)) * np.array([1, 2, 3])[:, None, None]
    found = propose(scan_of({"a": list(tau[0]), "b": list(tau[1]), "c": list(tau[2])}))
    wanted = np.sqrt(np.mean(np.square(tau).sum((1, 2))))
    for name in ("radius", "radius_shared"):
        scale = np.array(list(found.scales[name].values()))
        assert np.linalg.norm(np.einsum("t,tnx->nx", scale, tau)) == pytest.approx(wanted)


def test_layer_weights_that_shorten_a_vector_are_made_up_for():
    scan = scan_of({"a": [E[0], E[1]], "b": [E[2], E[3]]})
    found = propose(scan, table_of(scan, [[0.5, 0.5], [1, 1]]))
    assert found.scales["radius"] == pytest.approx({"a": 2**0.5, "b": 0.5**0.5})
    alone = scan_of({"a": [E[0], E[1]]})  # half of it is left: √2 makes it as long as it was
    assert propose(alone, table_of(alone, [[1, 0]])).scales["radius"]["a"] == pytest.approx(2**0.5)
    assert propose(alone, table_of(alone, [[1, 0]])).shares["radius"]["a"] == pytest.approx(
        0.5**0.5
    )


def test_published_proposals():
    tasks = {"a": [3 * E[0]], "b": [4 * E[1] + 0 * E[0]]}
    assert scales(tasks, "metagpt") == pytest.approx([9 / 25, 16 / 25])
    assert scales(tasks, "nan") == pytest.approx([4 / 7, 3 / 7])
    assert scales(tasks, "average") == [0.5, 0.5]
    assert scales(tasks, "constant_0.3") == [0.3, 0.3]
    assert scales(tasks, "constant_0.5") == [0.5, 0.5]


def test_published_proposals_take_the_vectors_that_are_merged():
    scan = scan_of({"a": [3 * E[0]], "b": [4 * E[1]]})
    found = propose(scan, table_of(scan, [[1], [0.75]])).scales
    assert found["metagpt"] == pytest.approx({"a": 0.5, "b": 0.5})
    assert found["nan"] == pytest.approx({"a": 0.5, "b": 0.5})


def test_lengths_overlaps_and_conflicts_by_hand():
    rng = np.random.default_rng(1)
    tau = rng.normal(size=(2, 3, 40)) * (rng.random((2, 3, 40)) < 0.5)
    weights = np.array([[1, 0.5, 0], [-1, 1, 2]])
    scan = scan_of({"a": list(tau[0]), "b": list(tau[1])})
    v = vectors_of(scan, table_of(scan, weights * [[1], [1]]))
    pure = (weights[:, :, None] * tau).reshape(2, -1)
    flat = tau.reshape(2, -1)
    assert v.norm == pytest.approx(np.linalg.norm(flat, axis=1))
    assert v.pure_norm == pytest.approx(np.linalg.norm(pure, axis=1))
    assert v.cosine[0, 1] == pytest.approx(pure[0] @ pure[1] / np.prod(v.pure_norm))
    assert v.overlap[0, 1] == pytest.approx(pure[1] @ flat[0] / (flat[0] @ flat[0]))
    both = (pure[0] != 0) & (pure[1] != 0)
    assert v.conflict[0, 1] == pytest.approx((pure[0] * pure[1] < 0)[both].mean())


def test_a_table_is_taken_by_name_not_by_place():
    scan = scan_of({"a": [E[0], 2 * E[1]], "b": [E[2], 2 * E[3]]})
    table = Table(("b", "a"), scan.names[::-1], np.array([[1.0, 2.0], [3.0, 4.0]]))
    pure = [np.hypot(4, 2 * 3), np.hypot(2, 2 * 1)]
    assert vectors_of(scan, table).pure_norm == pytest.approx(pure)


def test_every_formula_is_told_with_its_source():
    told = propose(scan_of({"a": [E[0]], "b": [E[1]]})).to_json()
    assert list(told["proposals"]) == list(FORMULAS)
    assert all(p["source"] and p["summary"] for p in told["proposals"].values())
    assert told["vectors"]["a"]["sign_conflict"] == {"b": None}
    assert told["vectors"]["a"]["cosine"] == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize(
    ("tasks", "weights", "text"),
    [
        ({"a": [E[0]], "b": [0 * E[0]]}, None,
         "task 'b' is identical to the anchor, so no λ can be proposed; remove it"),
        ({"a": [E[0]], "b": [E[1]]}, [[1], [0]],
         "table made.csv: the weights remove or reverse task 'b' (share 0), so "
         "no λ can be proposed; give another scheme, threshold or table"),
        ({"a": [E[0]]}, [[-1]], "table made.csv: the weights remove or reverse task 'a' "
         "(share -1), so no λ can be proposed; give another scheme, threshold or table"),
    ],
)  # fmt: skip
def test_vectors_without_length_are_refused(tasks, weights, text):
    scan = scan_of(tasks)
    with pytest.raises(UsageError) as error:
        propose(scan, None if weights is None else table_of(scan, weights))
    assert str(error.value) == text


def test_a_table_that_does_not_fit_is_refused():
    scan = scan_of({"a": [E[0]]})
    with pytest.raises(UsageError, match=r"made\.csv: has tasks b; the merge has a"):
        propose(scan, Table(("b",), scan.names, np.ones((1, 1)), origin="table made.csv"))
