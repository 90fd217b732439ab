"""Methods on whole matrices and whole tensors: their pieces, and odd cases block by block."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from taskvec.errors import OutputError, ParameterError
from taskvec.methods import METHODS, iso_cts, matrices, sce
from taskvec.methods.method import Block, Inputs


def block(vectors, scales=None, target=None, parameters=None, dtype=np.float64, name=None) -> Block:
    defaults = {p.name: p.default for p in METHODS[name].parameters} if name else {}
    vectors = np.array(vectors, dtype)
    tasks = tuple("abc"[: len(vectors)])
    return Block(
        name="w",
        target=np.zeros(vectors.shape[1:], dtype) if target is None else np.array(target, dtype),
        vectors=vectors,
        tasks=tasks,
        scales=np.array(scales or [1.0] * len(vectors), dtype),
        parameters={task: defaults | (parameters or {}) for task in tasks},
    )


def combined(name: str, *args, **kwargs):
    combine = METHODS[name].combine
    assert combine is not None
    return combine(block(*args, **kwargs, name=name))


def low_rank(seed: int, rank: int, shape=(9, 6)) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(shape[0], rank)) @ random.normal(size=(rank, shape[1]))


# Decompositions


def test_zero_singular_values_are_left_out():
    matrix = low_rank(0, 2)
    left, values, right = matrices.decompose(matrix, "w")
    assert (left.shape, values.shape, right.shape) == ((9, 2), (2,), (2, 6))
    np.testing.assert_allclose((left * values) @ right, matrix, atol=1e-13)
    assert matrices.decompose(np.zeros((3, 2)), "w")[1].shape == (0,)


def test_what_cannot_be_decomposed_is_told():
    for value in (np.inf, np.nan):  # LAPACK gives NaN for the one and an error for the other
        with pytest.raises(OutputError) as caught:
            matrices.decompose(np.full((2, 2), value), "model.w")
        assert str(caught.value) == (
            "tensor 'model.w': its task vectors are too large to be decomposed; "
            "lower the scale or set out.precision to float64"
        )


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)])
def test_orthogonal_is_the_polar_factor(shape):
    matrix = np.random.default_rng(1).normal(size=shape)
    tall = matrix if shape[0] >= shape[1] else matrix.T
    sizes, vectors = np.linalg.eigh(tall.T @ tall)
    expected = tall @ (vectors / np.sqrt(sizes)) @ vectors.T
    got = matrices.orthogonal(matrix, "w")
    np.testing.assert_allclose(got if tall is matrix else got.T, expected, atol=1e-13)


def test_blas_has_one_thread_inside_and_what_it_had_outside():
    from threadpoolctl import threadpool_info, threadpool_limits

    def numbers():
        return {p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"}

    with threadpool_limits(2, user_api="blas"), ThreadPoolExecutor(1) as pool:
        entered, leave = threading.Barrier(2, timeout=9), threading.Event()

        def work():
            with matrices.one_blas_thread():
                entered.wait()
                leave.wait(9)
                return numbers()

        other = pool.submit(work)
        with matrices.one_blas_thread():
            entered.wait()
            assert numbers() == {1}
        assert numbers() == {1}  # the other is still inside
        leave.set()
        assert other.result() == {1}
        assert numbers() == {2}


# TSV


def test_tsv_takes_shared_directions_once():
    """The published code would add a direction that rounding decides, of the task's own size."""
    vector = low_rank(2, 6)
    left, values, right = np.linalg.svd(vector, full_matrices=False)
    expected = (left[:, :3] * values[:3]) @ right[:3]
    np.testing.assert_allclose(combined("tsv", [vector, vector]) / expected, 1, rtol=1e-9)
    np.testing.assert_allclose(
        combined("tsv", [vector, vector], dtype=np.float32), expected, atol=1e-4
    )


def test_tsv_leaves_room_only_for_tasks_that_change_the_matrix():
    vector, nothing = low_rank(3, 6), np.zeros((9, 6))
    np.testing.assert_allclose(combined("tsv", [vector, nothing]), vector, atol=1e-13)
    both = combined("tsv", [vector, low_rank(4, 6)], [0.5, 0.0])
    np.testing.assert_array_equal(both, 0.5 * vector)


def test_tsv_of_tasks_that_are_orthogonal_keeps_them():
    """Directions of different tasks that do not meet need no change: TSV is their sum."""
    random = np.random.default_rng(5)
    left = np.linalg.qr(random.normal(size=(9, 6)))[0]
    right = np.linalg.qr(random.normal(size=(6, 6)))[0]
    one = (left[:, :3] * [3, 2, 1]) @ right[:3]
    two = (left[:, 3:] * [5, 4, 0.5]) @ right[3:]
    np.testing.assert_allclose(combined("tsv", [one, two], [0.5, -2]), 0.5 * one - 2 * two,
                               atol=1e-13)  # fmt: skip


def test_tsv_averages_what_has_too_few_rows_or_is_no_matrix():
    random = np.random.default_rng(6)
    for shape in ((2, 7), (7, 1), (4,), (), (2, 3, 2)):
        vectors = random.normal(size=(3, *shape))
        expected = np.tensordot([0.5, 1, -2], vectors, 1) / 3
        np.testing.assert_allclose(combined("tsv", vectors, [0.5, 1, -2]), expected, atol=1e-15)


# Iso


def test_iso_c_raises_no_direction_that_is_not_there():
    left, values, right = np.linalg.svd(low_rank(7, 2), full_matrices=False)
    for dtype in (np.float32, np.float64):
        got = combined("iso_c", [low_rank(7, 2), np.zeros((9, 6))], dtype=dtype)
        np.testing.assert_allclose(got, values[:2].mean() * left[:, :2] @ right[:2], atol=1e-5)


def test_iso_of_tasks_that_cancel_leaves_the_target():
    vector = low_rank(8, 6)
    for name, parameters in (("iso_c", {}), ("iso_cts", {"common_share": 1.0})):
        got = combined(name, [vector, -vector], target=np.ones((9, 6)), parameters=parameters)
        np.testing.assert_array_equal(got, 1)


def test_iso_cts_of_one_task_is_iso_c():
    vector = [low_rank(9, 6)]
    for share in (0.0, 0.5, 1.0):
        got = combined("iso_cts", vector, [-1.5], parameters={"common_share": share})
        np.testing.assert_allclose(got, combined("iso_c", vector, [-1.5]), atol=1e-13)


@pytest.mark.parametrize("rank", range(1, 40))
@pytest.mark.parametrize("tasks", [1, 2, 3, 7])
def test_iso_cts_shares_out_every_direction(rank, tasks):
    for share in (0.0, 0.3, 0.8, 1.0):
        common, own = iso_cts.sizes(rank, share, tasks)
        assert common + own * tasks == rank
        assert min(common, own) >= 0
        if rank >= 2 * tasks:
            assert abs(common - share * rank) <= tasks / 2 + 1 or common == rank % tasks


# SCE


def test_the_largest_values_and_of_equal_ones_the_first():
    assert sce.largest(np.array([[1.0, 3], [3, 3]]), 2).tolist() == [[False, True], [True, False]]
    assert not sce.largest(np.array([1.0, 2]), 0).any()
    assert sce.largest(np.array([0.0, 2]), 2).tolist() == [False, True]
    assert sce.largest(np.zeros(0), 0).shape == (0,)


def test_sce_selects_nothing_where_tasks_agree():
    vector = np.random.default_rng(0).normal(size=(30, 40))
    single = np.float32(vector)
    assert ((single + single + single) / np.float32(3) != single).any()  # not even the mean is it
    got = combined("sce", [vector] * 3, parameters={"density": 0.5}, dtype=np.float32)
    np.testing.assert_array_equal(got, 0)


def test_sce_of_one_task_needs_density_one():
    def inputs(density, scales):
        tasks = tuple(sorted(scales))
        given = {p.name: p.default for p in sce.PARAMETERS} | {"density": density}
        return Inputs(tasks, ("w",), scales, dict.fromkeys(tasks, given))

    for scales in ({"a": 1.0}, {"a": 1.0, "b": 0.0}):
        with pytest.raises(ParameterError) as caught:
            sce.decide(inputs(0.1, scales))
        assert str(caught.value) == (
            "sce selects entries that vary across tasks; got one, a (those of λ = 0 do not count); "
            "add a task, or set density to 1"
        )
        sce.decide(inputs(1.0, scales))
    vector = [low_rank(1, 3)]
    with pytest.raises(ParameterError, match=r"got one in tensor 'w', a \(those of λ = 0 do not"):
        combined("sce", vector * 2, [1.0, 0.0], parameters={"density": 0.5})  # by layer, say
    got = combined("sce", vector, [-1.0], parameters={"density": 1.0})
    np.testing.assert_array_equal(got, -vector[0])


def test_sce_of_light_vectors_weighs_tasks_alike_below_the_floor():
    vectors = np.array([[1.0, 3, 0, 0], [1, -1, 2, 0]])  # mean squares 2.5 and 1.5
    at, above = ({"density": 1, "floor": floor} for floor in (4.0, 4.01))
    np.testing.assert_allclose(combined("sce", vectors, parameters=at), [1, 1.875, 0.75, 0])
    np.testing.assert_allclose(combined("sce", vectors, parameters=above), [1, 1.5, 1, 0])
    mean = above | {"merge": "mean"}
    np.testing.assert_allclose(combined("sce", vectors, parameters=mean), [1, 3, 2, 0])


def test_sce_counts_what_varies_where_it_is_told_to():
    vectors = np.array([[1.0, 2, 3, 5, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]])  # 3 of 8 vary
    of_all, varying = ({"density": 0.3, "share_of": word} for word in ("all", "varying"))
    assert np.flatnonzero(combined("sce", vectors, parameters=of_all)).tolist() == [2, 3]
    assert np.flatnonzero(combined("sce", vectors, parameters=varying)).tolist() == [3]


# RAM


def test_a_task_of_scale_zero_is_none_that_changes_an_entry():
    vectors = np.random.default_rng(0).normal(size=(2, 3, 4))
    for name in ("ram", "ram_plus"):
        got = combined(name, vectors, [0.5, 0.0], parameters={"epsilon": 0, "r": 1, "alpha": 1})
        np.testing.assert_array_equal(got, 0.5 * vectors[0])


# Arcee Fusion


def test_arcee_fusion_takes_one_task():
    parameters = {"a": {}, "b": {}}
    with pytest.raises(ParameterError) as caught:
        METHODS["arcee_fusion"].decide(Inputs(("a", "b"), ("w",), {"a": 1.0, "b": 1.0}, parameters))
    assert str(caught.value) == (
        "arcee_fusion takes one task; got a, b; merge one, then give the result as the target of "
        "the next"
    )


def test_arcee_fusion_sees_divergences_that_float32_would_lose():
    random = np.random.default_rng(0)
    target, vector = random.normal(size=(40, 64)), 1e-5 * random.normal(size=(40, 64))
    single = combined("arcee_fusion", [vector], target=target, dtype=np.float32)
    double = combined("arcee_fusion", [vector], target=target)
    assert np.array_equal(single != target.astype(np.float32), double != target)
