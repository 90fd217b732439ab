"""Addition and negation agree with what NumPy gives on a linear probe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.disentanglement.toys import batches

from taskvec.disentanglement import (
    Addition,
    ModelTask,
    Negation,
    addition,
    classification,
    coefficients,
    task_addition,
    task_negation,
)
from taskvec.disentanglement.accuracy import Accuracies, Counts
from taskvec.disentanglement.records import Records
from taskvec.errors import DataError, UsageError
from taskvec.evaluation.intervals import Figure, wilson

SCALES = coefficients(11, 0, 1)
NAMES = ("one", "two", "three")


class Probe:
    """A linear probe of random features, and data that vectors of random directions half solve."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.module = torch.nn.Linear(6, 4).double()
        self.start = self.module.weight.detach().numpy(), self.module.bias.detach().numpy()
        draw = np.random.default_rng(5)
        self.tunes, self.data = {}, {}
        for place, name in enumerate(NAMES):
            weight = self.start[0] + draw.normal(size=(4, 6))
            bias = self.start[1] + draw.normal(size=4)
            self.tunes[name] = {"weight": torch.tensor(weight), "bias": torch.tensor(bias)}
            for split in ("validation", "test"):
                found = batches(10 * place + (split == "test"), (40, 40, 23))
                for x, y in found:  # two of three labels are the fine-tune's
                    own = (x.numpy() @ weight.T + bias).argmax(-1)
                    y[: 2 * len(y) // 3] = torch.tensor(own[: 2 * len(y) // 3])
                self.data[split, name] = found

    def tasks(self, split: str) -> dict[str, ModelTask]:
        return {name: classification(name, self.data[split, name]) for name in NAMES}

    def right(self, split: str, name: str, scales: dict[str, float]) -> Any:
        """Whether each example is right, by the formula."""
        weight, bias = self.start
        for task, scale in scales.items():
            weight = weight + scale * (self.tunes[task]["weight"].numpy() - self.start[0])
            bias = bias + scale * (self.tunes[task]["bias"].numpy() - self.start[1])
        return np.concatenate(
            [
                (x.numpy() @ weight.T + bias).argmax(-1) == y.numpy()
                for x, y in self.data[split, name]
            ]
        )

    def accuracy(self, split: str, name: str, scales: dict[str, float]) -> float:
        return float(self.right(split, name, scales).mean())

    def normalised(self, split: str, scales: dict[str, float]) -> float:
        shares = [self.accuracy(split, t, scales) / self.accuracy(split, t, {t: 1}) for t in NAMES]
        return float(np.mean(shares))


@pytest.fixture(scope="module")
def probe() -> Probe:
    return Probe()


def added(probe: Probe, **options: Any) -> Addition:
    arguments: Any = {"scales": SCALES} | options
    found = task_addition(
        probe.module, probe.tunes, probe.tasks("validation"), probe.tasks("test"), **arguments
    )
    return found["task_arithmetic"]


def test_addition_by_one_coefficient(probe: Probe) -> None:
    found = added(probe)
    by_hand = [probe.normalised("validation", dict.fromkeys(NAMES, s)) for s in SCALES]
    np.testing.assert_allclose([each.normalised for each in found.tried], by_hand, rtol=1e-12)
    best = SCALES[int(np.argmax(by_hand))]
    assert 0 < best < 1
    assert found.scales == dict.fromkeys(NAMES, best)
    for name in NAMES:
        accuracy = probe.accuracy("test", name, found.scales)
        single = probe.accuracy("test", name, {name: 1})
        assert found.accuracy[name].value == pytest.approx(accuracy)
        bounds = (found.accuracy[name].low, found.accuracy[name].high)
        assert bounds == wilson(round(accuracy * 103), 103)
        assert found.normalised[name].value == pytest.approx(accuracy / single)
        assert found.single[name].value == pytest.approx(single)
        assert found.pretrained[name].value == pytest.approx(probe.accuracy("test", name, {}))
    assert found.mean_normalised.value == pytest.approx(probe.normalised("test", found.scales))
    assert found.mean_accuracy.value == pytest.approx(
        np.mean([found.accuracy[t].value for t in NAMES])
    )


def test_intervals_of_shares_are_paired(probe: Probe) -> None:
    """The spread of a ratio on the same examples, by another generator of resamples."""
    found = added(probe)
    rng = np.random.default_rng(99)
    drawn = []
    for name in NAMES:
        merged = probe.right("test", name, dict(found.scales))
        single = probe.right("test", name, {name: 1})
        picks = rng.integers(0, 103, (20_000, 103))
        drawn.append(merged[picks].mean(1) / single[picks].mean(1))
        low, high = np.quantile(drawn[-1], (0.025, 0.975))
        assert found.normalised[name].low == pytest.approx(low, abs=0.02)
        assert found.normalised[name].high == pytest.approx(high, abs=0.02)
    low, high = np.quantile(np.mean(drawn, 0), (0.025, 0.975))
    assert found.mean_normalised.low == pytest.approx(low, abs=0.01)
    assert found.mean_normalised.high == pytest.approx(high, abs=0.01)


def test_a_share_of_the_same_answers_is_one_without_doubt() -> None:
    counts = Counts(np.array([1.0, 0, 1, 1, 0, 0]), np.ones(6))
    nothing: Any = None
    accuracies = Accuracies(nothing, {"test": {"one": nothing}}, Records(None), 0)
    assert accuracies.share("test", "one", counts, counts) == Figure(1.0, 1.0, 1.0, 6)


def test_addition_by_task_climbs_from_the_best_shared_coefficient(probe: Probe) -> None:
    shared, found = added(probe), added(probe, search="by-task")
    best = dict(shared.scales)
    while True:
        start = dict(best)
        for name in sorted(NAMES):
            tries = [{**best, name: s} for s in SCALES]
            values = [probe.normalised("validation", each) for each in tries]
            if max(values) > probe.normalised("validation", best) + 1e-12:
                best = tries[int(np.argmax(values))]
        if best == start:
            break
    assert found.scales == best != shared.scales
    assert found.tried[: len(SCALES)] == shared.tried
    scales = [tuple(each.scales.values()) for each in found.tried]
    assert len(set(scales)) == len(scales)


def test_the_search_by_task_goes_round_until_nothing_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """−10 (a − b)² − (1 − a)² in steps of 0.1: from (0, 0) one step a round, up to (0.5, 0.5)."""

    def tried(_: object, method: object, scales: dict[str, float]) -> addition.Tried:
        a, b = scales.values()
        return addition.Tried(dict(scales), {}, -10 * (a - b) ** 2 - (1 - a) ** 2)

    monkeypatch.setattr(addition._Run, "tried", tried)
    names: Any = SimpleNamespace(space=SimpleNamespace(tasks=("a", "b")))
    run = addition._Run(names, [i / 10 for i in range(11)])
    found = run.by_task("task_arithmetic", [run.tried("task_arithmetic", {"a": 0.0, "b": 0.0})])
    assert max(found, key=lambda each: each.normalised).scales == {"a": 0.5, "b": 0.5}


def test_other_methods_merge_the_same_vectors(probe: Probe) -> None:
    methods = {"plain": "task_arithmetic", "ties": {"name": "ties", "density": 0.5}}
    found = task_addition(
        probe.module,
        probe.tunes,
        probe.tasks("validation"),
        probe.tasks("test"),
        methods=methods,
        scales=SCALES,
    )
    assert list(found) == ["plain", "ties"]
    assert replace(found["plain"], method="task_arithmetic") == added(probe)
    assert found["plain"].single == found["ties"].single
    assert found["plain"].tried != found["ties"].tried
    assert found["plain"].tried[0] == found["ties"].tried[0]  # λ = 0 is θ0 by any method


def test_negation_keeps_the_control(probe: Probe) -> None:
    found = negated(probe)
    start = probe.accuracy("validation", "two", {})
    rows = [[probe.accuracy("validation", t, {"one": -s}) for t in ("one", "two")] for s in SCALES]
    np.testing.assert_allclose([[t.target, t.control] for t in found.tried], rows, rtol=1e-12)
    allowed = [i for i, (_, control) in enumerate(rows) if control >= 0.77 * start]
    assert 1 < len(allowed) < len(SCALES)
    best = SCALES[min(allowed, key=lambda i: rows[i][0])]
    assert found.scale == best > 0
    assert found.target is not None
    assert found.control is not None
    assert found.control_share is not None
    assert found.target.value == pytest.approx(probe.accuracy("test", "one", {"one": -best}))
    control = probe.accuracy("test", "two", {"one": -best})
    assert found.control.value == pytest.approx(control)
    assert found.control_share.value == pytest.approx(control / probe.accuracy("test", "two", {}))
    assert found.pretrained["target"].value == pytest.approx(probe.accuracy("test", "one", {}))


def roles(probe: Probe, split: str) -> dict[str, ModelTask]:
    tasks = probe.tasks(split)
    return {"target": tasks["one"], "control": tasks["two"]}


def negated(probe: Probe, **options: Any) -> Negation:
    arguments: Any = {"scales": SCALES, "keep": 0.77} | options
    found = task_negation(
        probe.module,
        probe.tunes["one"],
        roles(probe, "validation"),
        roles(probe, "test"),
        **arguments,
    )
    return found["task_arithmetic"]


def test_negation_says_when_nothing_keeps_the_control(probe: Probe) -> None:
    found = negated(probe, scales=(0.9, 1.0), keep=1.0)
    assert (found.scale, found.target, found.control) == (None, None, None)
    assert found.note == "no coefficient keeps 100% of the control; the smallest is 0.9"
    assert found.to_json()["target"] is None
    only_zero = negated(probe, scales=(0.0, 0.9, 1.0), keep=1.0)
    assert only_zero.scale == 0
    assert only_zero.note == (
        "no coefficient above 0 keeps 100% of the control; nothing is subtracted"
    )


def test_negation_says_when_test_data_disagree(probe: Probe) -> None:
    for keep in np.arange(0.5, 1, 0.01):
        found = negated(probe, keep=float(keep))
        assert found.control_share is not None
        if found.scale and found.control_share.value < keep:
            assert "on test data the control keeps" in found.note
            return
    pytest.fail("validation and test data agree everywhere")


def test_both_go_on_where_they_were(
    probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taskvec.disentanglement import accuracy

    asked = accuracy._ask
    left = [20]

    def stops(task: Any, module: Any) -> Any:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return asked(task, module)

    for measure in (added, negated):
        left[0] = 20
        monkeypatch.setattr(accuracy, "_ask", stops)
        with pytest.raises(KeyboardInterrupt):
            measure(probe, out=tmp_path)
        monkeypatch.undo()
        assert measure(probe, out=tmp_path) == measure(probe)
        left[0] = 0
        monkeypatch.setattr(accuracy, "_ask", stops)
        assert measure(probe, out=tmp_path) == measure(probe, out=tmp_path)
        monkeypatch.undo()


def test_what_cannot_be_meant_is_refused(probe: Probe) -> None:
    with pytest.raises(UsageError, match=r"search must be in shared \| by-task; got 'all'"):
        added(probe, search="all")
    with pytest.raises(UsageError, match=r"scales must be finite numbers; got \[nan\]"):
        added(probe, scales=[float("nan")])
    with pytest.raises(UsageError, match="lata compares with the step from base to instruct"):
        added(probe, methods={"lata": "lata"})
    with pytest.raises(UsageError, match=r"keep must be in \(0, 1\]; got 95"):
        negated(probe, keep=95)
    with pytest.raises(UsageError, match=r"must not be negative; got \[-1\]"):
        negated(probe, scales=[-1])
    with pytest.raises(
        UsageError, match="validation must have data of target and control; got one"
    ):
        task_negation(probe.module, probe.tunes["one"], {"one": roles(probe, "test")["target"]}, {})


def test_data_without_labels_or_a_useless_single_model_are_told(probe: Probe) -> None:
    bare = {t: classification(t, [x for x, _ in probe.data["test", t]]) for t in NAMES}
    with pytest.raises(DataError, match="data of task 'one' have no labels; accuracy needs them"):
        task_addition(probe.module, probe.tunes, bare, bare)
    own = {}
    for name in NAMES:
        weight, bias = (probe.tunes[name][part] for part in ("weight", "bias"))
        wrong = [
            (x, ((x @ weight.T + bias).argmax(-1) + 1) % 4) for x, _ in probe.data["test", name]
        ]
        own[name] = classification(name, wrong)
    with pytest.raises(
        DataError, match="model of 'one' has no correct answer on its validation data"
    ):
        task_addition(probe.module, probe.tunes, own, own)
