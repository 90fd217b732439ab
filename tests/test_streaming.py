"""The streaming loop: every element once, every result, no thread left behind."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskvec.streaming import BLOCK, CHUNK, Stretch, cut, default_threads, stream

sizes_of = st.lists(st.integers(0, 40) | st.integers(0, 5 * CHUNK), max_size=20)


@settings(max_examples=300, deadline=None)
@given(sizes_of, st.sampled_from([CHUNK, 2 * CHUNK, BLOCK]))
def test_units_cover_every_element_once_in_order(sizes, block):
    units = list(cut(sizes, block))
    stretches = [stretch for unit in units for stretch in unit]
    covered = {}
    for tensor, start, stop in stretches:
        assert start == covered.get(tensor, 0)  # begins where the last stretch ended
        assert start <= stop
        covered[tensor] = stop
    assert covered == dict(enumerate(sizes))
    assert [s.tensor for s in stretches] == sorted(s.tensor for s in stretches)
    assert len(set(stretches)) == len(stretches)
    for unit in units:
        assert unit
        assert sum(stop - start for _, start, stop in unit) <= block
        for _, start, _ in unit:
            assert start % CHUNK == 0
        if len(unit) > 1:  # runs are of whole tensors
            assert all((s.start, s.stop) == (0, sizes[s.tensor]) for s in unit)


def test_many_small_tensors_are_few_units():
    assert len(list(cut([10] * 20_000))) == 1
    assert len(list(cut([CHUNK] * 32))) == 2


def test_an_empty_tensor_is_seen():
    assert list(cut([0])) == [[Stretch(0, 0, 0)]]
    assert list(cut([])) == []


def test_there_is_a_thread_at_least():
    assert 1 <= default_threads() <= 8


# --- threads ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    left = set(threading.enumerate()) - before
    assert not left


def units(count):
    return iter([[Stretch(i, 0, 1)] for i in range(count)])


def same(unit):
    return unit[0].tensor


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 100])
def test_every_result_comes_once(threads, count):
    assert sorted(stream(units(count), lambda: same, threads)) == list(range(count))


def test_a_worker_a_thread():
    made = []

    def make():
        made.append(threading.current_thread())
        return same

    list(stream(units(10), make, 3))
    assert len(made) == len(set(made)) == 3


def test_results_may_be_none():
    assert list(stream(units(3), lambda: lambda unit: None, 2)) == [None] * 3


class OopsError(Exception):
    pass


@pytest.mark.parametrize("threads", [1, 2])
def test_a_worker_that_fails(threads):
    def work(unit):
        if same(unit) == 50:
            raise OopsError("unit 50")
        return same(unit)

    with pytest.raises(OopsError, match="unit 50"):
        list(stream(units(1_000), lambda: work, threads))


def test_a_worker_that_cannot_be_made():
    def make():
        raise OopsError("no scratch space")

    with pytest.raises(OopsError, match="no scratch space"):
        list(stream(units(10), make, 2))


def test_units_that_fail():
    def broken():
        yield from units(3)
        raise OopsError("no more units")

    with pytest.raises(OopsError, match="no more units"):
        list(stream(broken(), lambda: same, 2))


def test_an_interruption_in_a_thread_is_raised():
    def work(unit):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(stream(units(10), lambda: work, 2))


def test_a_failure_stops_the_others_after_their_unit():
    seen = []

    def work(unit):
        seen.append(same(unit))
        if same(unit) == 0:
            raise OopsError
        time.sleep(0.01)

    with pytest.raises(OopsError):
        list(stream(units(10_000), lambda: work, 2))
    assert len(seen) < 100


def test_closing_early_ends_threads_that_wait_for_room():
    """Nobody takes the results any more: the queue is full, and threads must not hang on it."""
    worked = []

    def work(unit):
        worked.append(same(unit))
        return same(unit)

    results = stream(units(10_000), lambda: work, 2)
    next(results)
    time.sleep(0.05)
    results.close()
    assert len(worked) < 100  # bounded: results do not pile up either


def test_a_consumer_that_fails():
    def consume():
        for _ in stream(units(1_000), lambda: same, 2):
            raise OopsError

    with pytest.raises(OopsError):
        consume()
