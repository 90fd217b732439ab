"""Every method of ours passes the suite that `taskvec.testing` ships, and the suite can fail."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from taskvec.errors import ParameterError, TaskvecError
from taskvec.methods import METHODS
from taskvec.methods.parameters import Parameter
from taskvec.methods.selection import mask_key
from taskvec.testing import MethodConformance

# Parameters at which one task at λ = 1 gives its fine-tune; a density is 1 there anyway.
WHOLE = {
    "breadcrumbs": {"gamma": 0},
    "della": {"epsilon": 0},
    "lata": {"scheme": "threshold", "threshold": 1},
    "nearswap": {"t": 1e9},
}
DRAWS = {"dare", "dare_ties", "della"}
# By method and test, why it is not promised. A test that holds all the same fails.
EQUAL = "singular values are made equal: the vector of one task too becomes another"
DOES_NOT_HOLD: dict[str, dict[str, str]] = {
    "arcee_fusion": {"test_one_task_at_scale_one": "entries that do not stand out are left out"},
    "iso_c": {"test_one_task_at_scale_one": EQUAL},
    "iso_cts": {"test_one_task_at_scale_one": EQUAL},
}


class TestMethods(MethodConformance):
    @pytest.fixture(autouse=True, params=METHODS)
    def _method(self, request: pytest.FixtureRequest) -> None:
        name = request.param
        self.method = METHODS[name]
        self.whole = WHOLE.get(name, {})
        self.draws = name in DRAWS
        self.does_not_hold = DOES_NOT_HOLD.get(name, {})


def test_what_is_said_of_methods_is_of_methods_that_there_are() -> None:
    tests = {name for name in vars(MethodConformance) if name.startswith("test_")}
    assert {*WHOLE, *DRAWS, *DOES_NOT_HOLD} <= {*METHODS}
    assert all({*known} <= tests for known in DOES_NOT_HOLD.values())


# The suite fails for methods that are wrong. Each is task arithmetic with one thing spoilt.


def added(block):
    scales = block.scales.reshape(-1, *[1] * block.target.ndim)
    return block.target + (scales * block.vectors).sum(0)


def of_names(block):
    """The task that is called `a` counts twice."""
    extra = [v for task, v in zip(block.tasks, block.vectors, strict=True) if task == "a"]
    return added(block) + sum(extra, np.zeros_like(block.target))


def of_block(block):
    """A mean over whatever happens to be looked at."""
    return added(block) + (block.vectors.mean() if block.target.size else 0)


def drawn(block):
    keys = [mask_key(block.seed, task, block.name) for task in block.tasks]
    return added(block) + np.float32(1e-2) * np.random.default_rng(keys).random()


def divided(block):
    """By a norm, which is 0 where no task changes a tensor."""
    norm = np.linalg.norm(block.vectors)
    return added(block) + 0 * block.vectors.sum(0) / norm


def of_sum(block):
    """By the norm of a sum, which is 0 where tasks cancel."""
    change = added(block) - block.target
    norm = np.linalg.norm(change)
    return added(block) + 0 * change / (norm if block.vectors.any() else 1)


def broken(block):
    if block.parameters["a"]["power"] == 1:
        raise ParameterError("power of wrong\nmust be below 1")
    return added(block)


def first_leads(inputs):
    """The task that the recipe names first counts twice."""
    first = next(iter(inputs.scales))
    weights = [[2.0 if task == first else 1.0] * len(inputs.names) for task in inputs.tasks]
    return replace(PLAIN.decide(inputs), weights=np.array(weights))


TURNS = itertools.count(1)


def unsteady(block):
    """Other bits every time."""
    return block.target + np.tensordot(next(TURNS) % 7 * block.scales, block.vectors, 1)


def other_target(inputs):
    table = PLAIN.decide(inputs)
    return replace(table, target=np.full(len(table.names), 0.9))


def of_mapping(inputs):
    """One more where a parameter differs by layer, or may."""
    table, power = PLAIN.decide(inputs), inputs.parameters["a"]["power"]
    return replace(table, weights=table.weights + isinstance(power, dict))


def never(inputs):
    raise ParameterError("wrong takes no tasks")


PLAIN = replace(METHODS["task_arithmetic"], name="wrong")
POWER = Parameter("power", 0.5, "", low=0, high=1)
WRONG = {
    "test_declaration": [
        (replace(PLAIN, parameters=(POWER, POWER)), "its parameter 'power' is declared twice"),
        (replace(PLAIN, summary="two\nlines"), "summary, source and formula must be texts"),
        (replace(PLAIN, name="ties"), "taskvec's own method has that name"),
        (replace(PLAIN, alignment="matrix"), "alignment must be in element"),
        (replace(PLAIN, parameters=(replace(POWER, choices=("b",), by_layer=True),)),
         "its parameter 'power' is a word, which cannot differ by layer"),
    ],
    "test_every_dtype_shape_and_number_of_tasks": [
        (replace(PLAIN, decide=never), "runs with none of 1, 2 and 3 tasks"),
        (replace(PLAIN, combine=lambda b: added(b) * np.float32(1.01)), "'still' is off by"),
        (replace(PLAIN, combine=lambda b: added(b).sum(keepdims=True)),
         r"failed in tensor '.*': combine gave shape \(1,\), expected \("),
        (replace(PLAIN, combine=divided), "invalid value encountered in divide"),
    ],
    "test_order_of_tasks": [(replace(PLAIN, decide=first_leads), "other bits in .*turned round")],
    "test_names_of_tasks": [(replace(PLAIN, combine=of_names), "tasks renamed: .* is off by")],
    "test_threads_and_blocks": [
        (replace(PLAIN, combine=of_block), "other bits in .*is its alignment right"),
    ],
    "test_scale_zero": [(replace(PLAIN, decide=other_target), "other bits in .*λ = 0")],
    "test_degenerate_tasks_and_scales": [
        (replace(PLAIN, combine=of_sum), "failed in tensor '.*': RuntimeWarning: "),
        (replace(PLAIN, combine=lambda b: added(b) * (1 - 1e-3 * (b.vectors == 0).all())),
         "other bits in .*tasks that change nothing"),
    ],
    "test_one_task_at_scale_one": [
        (replace(PLAIN, combine=lambda b: (b.target + added(b)) / 2), "λ = 1, BF16: .* is off by"),
    ],
    "test_negative_scale": [
        (replace(PLAIN, combine=lambda b: b.target + abs(b.scales[0]) * b.vectors[0]),
         "λ = −1 of 1 tasks points along their vectors"),
    ],
    "test_the_manifest_repeats_the_merge": [
        (replace(PLAIN, combine=unsteady), "verify replay: "),
    ],
    "test_ends_of_parameters": [
        (replace(PLAIN, combine=broken, parameters=(POWER,)),
         "power = 1.* is refused in more than one line"),
    ],
    "test_parameters_by_layer": [
        (replace(PLAIN, decide=of_mapping, parameters=(replace(POWER, by_layer=True),)),
         "other bits in .*: power by layer, the same everywhere"),
        (replace(PLAIN, decide=lambda i: 2 * i.parameters["a"]["power"],
                 parameters=(replace(POWER, by_layer=True),)), "decide gave 1.0, not a Table"),
    ],
    "test_seed": [
        (replace(PLAIN, combine=drawn), "set draws = True if it draws"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("test", "method", "told"),
    [(test, *case) for test, cases in WRONG.items() for case in cases],
)
def test_a_wrong_method_is_told(test, method, told):
    class Suite(MethodConformance):
        pass

    Suite.method = method
    with pytest.raises((AssertionError, TaskvecError, RuntimeWarning), match=told):
        getattr(Suite(), test)()


def test_every_test_of_the_suite_is_seen_to_fail():
    assert {*WRONG} == {name for name in vars(MethodConformance) if name.startswith("test_")}


def test_a_method_for_two_tasks_runs_with_two_and_a_method_that_draws_is_told():
    def two_only(inputs):
        if len(inputs.tasks) != 2:
            raise ParameterError(f"wrong takes 2 tasks; got {len(inputs.tasks)}")
        return PLAIN.decide(inputs)

    class Suite(MethodConformance):
        method = replace(PLAIN, decide=two_only)

    suite = Suite()
    for name in WRONG:
        getattr(suite, name)()
    assert suite._numbers() == [2]
    Suite.draws = True
    with pytest.raises(AssertionError, match="gives the same bits with another seed"):
        suite.test_seed()


def test_what_is_excused_must_not_hold():
    class Suite(MethodConformance):
        method = replace(PLAIN, combine=of_names)
        does_not_hold: ClassVar = {"test_names_of_tasks": "a leads", "test_seed": "no reason"}

    Suite().test_names_of_tasks()
    with pytest.raises(AssertionError, match=r"test_seed is listed in does_not_hold \(no reason\)"):
        Suite().test_seed()


def test_the_suite_needs_no_pytest():
    code = "import sys, taskvec.testing; print({'pytest', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
