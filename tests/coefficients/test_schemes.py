import json

import numpy as np
import pytest
from tests.coefficients.made_up_scans import scan_of

from taskvec.coefficients.schemes import suggest_scheme
from taskvec.errors import UsageError
from taskvec.journal import finite

RNG = np.random.default_rng(0)
INSTRUCTION = [np.ones(40) for _ in range(20)]


def vector(ratio, cosine):
    """A task vector in a layer with this ρ and c against the instruction vector."""
    own = RNG.normal(size=40)
    own -= own.mean()
    own *= np.sqrt(40) / np.linalg.norm(own)
    return ratio * (cosine * np.ones(40) + np.sqrt(1 - cosine**2) * own)


def suggested(tasks, granularity="tensor"):
    return suggest_scheme(scan_of(tasks, INSTRUCTION), granularity)


def similarity(ratio, cosine):
    return (1 + ratio * cosine) / np.sqrt(1 + 2 * ratio * cosine + ratio**2)


SAME_LENGTH = [vector(0.5, c) for c in np.linspace(0, 0.6, 20)]  # layers differ by c alone
GROUPS = [vector(0.5, c) for c in (*np.linspace(0, 0.1, 10), *np.linspace(0.8, 0.9, 10))]
MIXED = RNG.permutation(np.linspace(0.2, 0.6, 20))
OTHERS_LENGTH = [vector(r, c) for r, c in zip(MIXED, np.linspace(0, 0.9, 20), strict=True)]


def test_without_a_base_nothing_is_suggested():
    found = suggest_scheme(scan_of({"a": [vector(1, 0)]}))
    assert (found.scheme, found.threshold) == (None, None)
    assert found.reasons == ("no base: similarities cannot be known",)


def test_similarities_close_together_are_noise():
    found = suggested({"a": [vector(0.1, c) for c in np.linspace(0.2, 0.5, 20)]})
    assert found.scheme is None
    spread = similarity(0.1, 0.5) - similarity(0.1, 0.2)
    assert found.reasons == (
        f"a: similarities spread over {spread:.4f}, less than 0.01: ranks amplify noise",
    )


def test_ranks_that_only_say_how_far_a_layer_moved_are_no_reason():
    found = suggested({"a": [vector(r, 0.2) for r in np.linspace(0.2, 0.9, 20)]})
    assert found.scheme is None
    assert found.reasons == (
        "a: similarity orders layers as −ρ does (rank correlation 1.00, 0.9 or more): "
        "it says how far a layer moved, not what it repeats",
    )


def test_a_task_that_repeats_little_is_no_reason():
    found = suggested({"a": [vector(0.5, c) for c in np.linspace(-0.4, 0.4, 20)]})
    assert found.scheme is None
    assert found.reasons[0].startswith("a: c = ")
    assert found.reasons[0].endswith("less than 0.1: little of the task vector repeats "
                                     "instruction tuning")  # fmt: skip


def test_two_groups_are_parted_in_the_gap():
    found = suggested({"a": GROUPS})
    low, high = similarity(0.5, 0.1), similarity(0.5, 0.8)
    assert found.scheme == "threshold"
    assert found.threshold == pytest.approx((low + high) / 2)
    assert found.shapes["a"].gap == pytest.approx((low, high))


def test_one_layer_far_off_is_not_a_group():
    found = suggested({"a": [*(vector(0.5, c) for c in np.linspace(0, 0.1, 19)), vector(0.5, 0.9)]})
    assert found.shapes["a"].gap[1] < similarity(0.5, 0.11)
    assert found.scheme != "threshold"


def test_spread_similarities_that_tell_more_than_length_are_ranked():
    found = suggested({"a": SAME_LENGTH, "b": OTHERS_LENGTH})
    assert (found.scheme, found.threshold) == ("logarithmic", None)
    assert found.shapes["b"].moved < 0.9


def test_tasks_that_disagree_get_none():
    found = suggested({"a": SAME_LENGTH, "b": GROUPS})
    assert found.scheme is None
    assert found.reasons[-1] == "tasks disagree (a logarithmic, b threshold)"


def test_groups_that_no_threshold_parts_for_all_get_none():
    higher = [vector(0.2, c) for c in (*np.linspace(0, 0.1, 10), *np.linspace(0.8, 0.9, 10))]
    found = suggested({"a": GROUPS, "b": higher})
    assert found.scheme is None
    assert found.reasons[-1] == "no σ lies between the groups of every task"


def test_layers_are_those_of_the_granularity_and_what_a_task_left_alone_is_no_layer():
    tasks = {"a": [*SAME_LENGTH[:19], np.zeros(40)]}
    assert suggested(tasks, "block").shapes["a"].layers == 19
    assert suggested({"a": SAME_LENGTH, "b": [np.zeros(40)] * 20}).scheme == "logarithmic"


def test_one_layer_has_no_shape():
    found = suggest_scheme(scan_of({"a": [vector(1, 0.5)]}, INSTRUCTION[:1]))
    assert found.scheme is None


def test_the_suggestion_is_told_as_json():
    told = json.loads(json.dumps(finite(suggested({"a": GROUPS}))))
    assert told["scheme"] == "threshold"
    assert told["shapes"]["a"]["layers"] == 20
    assert told["reasons"][0].startswith("a: two groups of layers")


def test_an_unknown_granularity_is_refused():
    with pytest.raises(UsageError) as error:
        suggested({"a": GROUPS}, "row")
    assert str(error.value) == "granularity must be one of tensor, module, block; got 'row'"
