"""The loop and its folder on a small module, against PyTorch written out, and through stops."""

import dataclasses
import json
import math
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from taskvec.errors import CheckpointError, DataError, OutputError, TaskvecError, UsageError
from taskvec.training.api import finetune
from taskvec.training.loop import BatchLoss, Examples, draw_examples
from taskvec.training.run import RunOutput
from taskvec.training.settings import TrainingSettings, learning_rate_at

STEPS = TrainingSettings(steps=12, batch_size=6, learning_rate=1e-2, seed=3)


def module(*, dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.BatchNorm1d(8), nn.Linear(8, 3)
        )


def pairs(count=20, seed=0):
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=random)
    return list(zip(inputs, torch.randint(0, 3, (count,), generator=random), strict=True))


def curve(records, without=()):
    return [{key: r[key] for key in r if key not in ("seconds", *without)} for r in records]


def test_steps_are_adamw_with_warmup_cosine_and_clipping():
    settings = TrainingSettings(
        steps=12, batch_size=6, learning_rate=0.05, weight_decay=0.2, clip=0.3, seed=5
    )
    trained, expected = module(), module()
    data = pairs()
    result = finetune(trained, data, train="all", settings=settings)

    expected.train()
    expected[3].eval()  # its running statistics are no part of a task vector
    names = [name for name, _ in expected.named_parameters()]
    moments = {name: [torch.zeros(()), torch.zeros(())] for name in names}
    for step in range(12):
        rows = draw_examples(step, 20, settings)
        inputs = torch.stack([data[i][0] for i in rows])
        labels = torch.stack([data[i][1] for i in rows])
        loss = functional.cross_entropy(expected(inputs), labels)
        grads = torch.autograd.grad(loss, list(expected.parameters()))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        warm = 0.05 * (step + 1) / 3
        rate = warm if step < 3 else 0.025 * (1 + math.cos(math.pi * (step - 3) / 9))
        record = result.records[step]
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert record["lr"] == pytest.approx(rate)
        for name, grad in zip(names, grads, strict=True):
            grad = grad * min(1.0, 0.3 / (norm + 1e-6))
            first, second = moments[name]
            moments[name] = [0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2]
            m = moments[name][0] / (1 - 0.9 ** (step + 1))
            v = moments[name][1] / (1 - 0.999 ** (step + 1))
            parameter = expected.get_parameter(name).data
            parameter.mul_(1 - rate * 0.2).sub_(rate * m / (v.sqrt() + 1e-8))
    for name, parameter in trained.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=1e-4, atol=1e-6)
        start = module().get_parameter(name)
        assert torch.equal(result.vector[name], parameter.detach() - start)
    assert torch.equal(trained[3].running_mean, torch.zeros(8))


def test_rows_go_round_all_examples_and_differ_by_round():
    settings = TrainingSettings(batch_size=6, seed=1)
    rows = [i for step in range(10) for i in draw_examples(step, 20, settings)]
    rounds = [rows[at : at + 20] for at in range(0, 60, 20)]
    assert all(sorted(each) == list(range(20)) for each in rounds)
    assert rounds[0] != rounds[1]
    few = draw_examples(0, 2, settings)  # a batch may hold an example more than once
    assert sorted(few) == [0, 0, 0, 1, 1, 1]


def test_default_warmup_is_the_published_500_of_2000():
    assert learning_rate_at(0, TrainingSettings()) == pytest.approx(1e-5 / 500)
    assert learning_rate_at(499, TrainingSettings()) == pytest.approx(1e-5)
    assert learning_rate_at(1250, TrainingSettings()) == pytest.approx(5e-6)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_micro_batches_give_the_same_steps(micro_batch):
    """Also where what counts differs between them: the mean is over all of the batch."""

    def collate(items):
        inputs = torch.stack([x for x, _ in items])
        return inputs, torch.tensor([y for _, y in items]), inputs[:, 0] > -0.3

    def objective(net, batch):
        inputs, labels, wanted = batch
        return functional.cross_entropy(net(inputs)[wanted], labels[wanted])

    examples = Examples(pairs(), collate, lambda batch: int(batch[2].sum()), "tokens")
    results = []
    for size in (None, micro_batch):
        settings = TrainingSettings(steps=5, batch_size=8, learning_rate=1e-2, micro_batch=size)
        results.append(
            finetune(module(), examples, train="all", objective=objective, settings=settings)
        )
    whole, parts = results
    for name in whole.vector:
        torch.testing.assert_close(parts.vector[name], whole.vector[name], rtol=1e-3, atol=1e-6)
    assert [r["tokens"] for r in parts.records] == [r["tokens"] for r in whole.records]
    assert [r["loss"] for r in parts.records] == pytest.approx([r["loss"] for r in whole.records])


def stopping_at(step, number=signal.SIGINT):
    """Items that interrupt when the first of a step is asked for."""
    data = pairs()

    class Items:
        asked = 0

        def __len__(self):
            return 20

        def __getitem__(self, i):
            self.asked += 1
            if self.asked == 6 * step + 3:
                signal.raise_signal(number)
            return data[i]

    return Items()


@pytest.mark.parametrize(("at", "save_every"), [(0, 100), (5, 100), (7, 2), (11, 100)])
def test_interrupted_and_resumed_is_bit_equal(tmp_path, at, save_every):
    validation = pairs(9, seed=1)
    whole = finetune(
        module(dropout=0.3),
        pairs(),
        train="all",
        validation=validation,
        settings=STEPS,
        output=RunOutput(tmp_path / "whole", validate_every=4),
    )
    output = RunOutput(tmp_path / "parts", save_every=save_every, validate_every=4)

    def run(data):
        torch.rand(at)  # the caller's random numbers do not matter
        return finetune(
            module(dropout=0.3),
            data,
            train="all",
            validation=validation,
            settings=STEPS,
            output=output,
        )

    with pytest.raises(KeyboardInterrupt):
        run(stopping_at(at))
    lines = (tmp_path / "parts/metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["step"] for line in lines) == at
    parts = run(pairs())
    assert curve(parts.records) == curve(whole.records)
    assert [r["step"] for r in parts.records if "validation_loss" in r] == [0, 4, 8, 12]
    for name, tensor in whole.vector.items():
        assert torch.equal(parts.vector[name], tensor)
    stored = [
        json.loads(line) for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()
    ]
    assert curve(stored) == curve(whole.records)


def test_a_state_behind_the_metrics_takes_the_later_lines_away(tmp_path):
    """As after a kill: the state is older than the last line, which may be cut."""
    output = RunOutput(tmp_path / "run", save_every=5)

    def run(data):
        return finetune(module(), data, train="all", settings=STEPS, output=output)

    with pytest.raises(KeyboardInterrupt):
        run(stopping_at(5))
    state = (tmp_path / "run/state.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        run(stopping_at(3))  # its 4th step is the 9th
    (tmp_path / "run/state.safetensors").write_bytes(state)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    whole = finetune(module(), pairs(), train="all", settings=STEPS)
    parts = run(pairs())
    assert curve(parts.records) == curve(whole.records)


def test_random_numbers_of_the_caller_are_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    finetune(module(dropout=0.5), pairs(), train="all", settings=STEPS)
    assert torch.equal(torch.rand(3), expected)


def test_the_module_is_left_in_its_mode_and_its_gradients_as_they_were():
    net = module()
    net[0].weight.requires_grad_(False)
    net.eval()
    finetune(net, pairs(), train="*.weight", settings=STEPS)
    assert not any(part.training for part in net.modules())
    assert not net[0].weight.requires_grad
    assert net[0].bias.requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_what_does_not_train_is_bit_identical():
    net = module()
    finetune(net, pairs(), train="0.weight", settings=STEPS)
    changed = [
        n for n, p in net.named_parameters() if not torch.equal(p, module().get_parameter(n))
    ]
    assert changed == ["0.weight"]


def refusal(kind, **more):
    arguments = {"train": "all", "settings": STEPS} | more
    data = arguments.pop("data", pairs())
    net = arguments.pop("module", module())
    with pytest.raises(kind) as caught:
        finetune(net, data, **arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"steps": 0}, "steps must be above 0; got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0; got 0.0"),
        ({"learning_rate": -1e-3}, "learning_rate must be above 0; got -0.001"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0; got nan"),
        ({"batch_size": 0}, "batch_size must be above 0; got 0"),
        ({"micro_batch": 0}, "micro_batch must be above 0; got 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0; got -1.0"),
        ({"clip": 0.0}, "clip must be above 0; got 0.0"),
        ({"steps": 5, "warmup_steps": 5}, "warmup_steps must be less than the 5 steps; got 5"),
        ({"precision": "half"}, "precision must be auto, float32 or bfloat16; got 'half'"),
        ({"device": "cuda"}, "device 'cuda' is not available here; give cpu, or auto"),
    ],
)
def test_settings_out_of_range(settings, text):
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    assert refusal(UsageError, settings=TrainingSettings(**settings)) == text


def test_nothing_to_train_on():
    assert refusal(DataError, data=[]) == "there are no examples for training; check the data"
    assert (
        refusal(DataError, validation=[]) == "there are no examples for validation; check the data"
    )


def test_weights_too_coarse_for_small_steps():
    text = refusal(UsageError, module=module().bfloat16())
    assert text == (
        "parameter '0.weight' is bfloat16, in which small steps are lost; load the model in "
        "float32 (arithmetic can still be bfloat16: precision)"
    )


def test_labels_out_of_range():
    wrong = [(x, y + 1) for x, y in pairs()]
    assert refusal(DataError, data=wrong) == (
        "a label is 3; the model has 3 classes, 0 to 2; look at the data, or at the head"
    )


def test_a_loss_that_depends_on_nothing():
    text = refusal(UsageError, objective=lambda net, batch: torch.zeros(()))
    assert text == "the loss does not depend on any parameter that trains"


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_loss_that_is_not_finite_keeps_the_last_state(tmp_path, value, shown):
    steps = 0

    def objective(net, batch):
        nonlocal steps
        steps += 1
        loss = functional.cross_entropy(net(batch[0]), batch[1])
        return loss * value if steps == 8 else loss

    output = RunOutput(tmp_path / "run", save_every=3)
    text = refusal(TaskvecError, objective=objective, output=output)
    assert text == (
        f"step 8: the loss is {shown}; the weights are left as they were before this step; try a "
        "smaller learning rate, or look at the data of this step"
    )
    whole = finetune(module(), pairs(), train="all", settings=STEPS)
    again = finetune(module(), pairs(), train="all", settings=STEPS, output=output)
    assert curve(again.records, ["accuracy"]) == curve(whole.records, ["accuracy"])


def test_out_of_memory_says_what_helps_and_keeps_the_last_state(tmp_path):
    steps = 0

    def objective(net, batch):
        nonlocal steps
        steps += 1
        if steps == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return functional.cross_entropy(net(batch[0]), batch[1])

    output = RunOutput(tmp_path / "run", save_every=3)
    text = refusal(TaskvecError, objective=objective, output=output)
    assert text == (
        "step 8: out of memory on cpu with 6 examples at once; give a smaller --micro-batch, such "
        "as 3: the steps stay the same"
    )
    smaller = TrainingSettings(steps=12, batch_size=6, micro_batch=3, learning_rate=1e-2, seed=3)
    again = finetune(module(), pairs(), train="all", settings=smaller, output=output)
    assert [r["step"] for r in again.records] == list(range(1, 13))


def test_an_objective_may_know_how_many_are_right():
    def objective(net, batch):
        return BatchLoss(functional.cross_entropy(net(batch[0]), batch[1]), torch.tensor(2))

    records = finetune(module(), pairs(), train="all", objective=objective, settings=STEPS).records
    assert [r["accuracy"] for r in records] == [pytest.approx(1 / 3)] * 12


def occupied(tmp_path, **more):
    return refusal(OutputError, output=RunOutput(tmp_path / "run"), **more)


def test_other_settings_are_refused_with_what_differs(tmp_path):
    output = RunOutput(tmp_path / "run")
    finetune(module(), pairs(), train="all", settings=STEPS, output=output)
    other = TrainingSettings(steps=12, batch_size=6, learning_rate=2e-2, seed=4)
    assert occupied(tmp_path, settings=other) == (
        f"{tmp_path}/run: holds a run of other settings: learning_rate is 0.01 there and 0.02 "
        "here; seed is 3 there and 4 here; give another folder, or --force, which removes that run"
    )
    assert "start_weights is" in occupied(tmp_path, module=module(dropout=0.1).double())
    forced = RunOutput(tmp_path / "run", force=True)
    finetune(module(), pairs(), train="all", settings=other, output=forced)
    assert json.loads((tmp_path / "run/run.json").read_text())["settings"]["seed"] == 4


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    assert occupied(tmp_path) == (
        f"{tmp_path}/run: is not empty; --force replaces the whole folder"
    )


def test_a_damaged_state(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        finetune(
            module(),
            stopping_at(5),
            train="all",
            settings=STEPS,
            output=RunOutput(tmp_path / "run"),
        )
    path = tmp_path / "run/state.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    text = refusal(CheckpointError, output=RunOutput(tmp_path / "run"))
    assert text.startswith(f"{path}: cannot be resumed: ")
    assert text.endswith("; --force starts again")


def test_a_full_disk_keeps_the_state_before(tmp_path, monkeypatch):
    output = RunOutput(tmp_path / "run", save_every=3)
    saved = 0
    fsync = __import__("os").fsync

    def full(fd):
        nonlocal saved
        saved += 1
        if saved == 8:
            raise OSError(28, "No space left on device")
        fsync(fd)

    monkeypatch.setattr("taskvec.training.run_folder.os.fsync", full)
    text = refusal(OutputError, output=output)
    assert text.startswith(
        f"{tmp_path}/run: the disk is full, as the state after step 9 was saved; "
    )
    assert text.endswith("; free some space, then resume with the same command")
    assert [path.name for path in Path(output.out).iterdir() if path.name.startswith(".")] == []
    whole = finetune(module(), pairs(), train="all", settings=STEPS)
    again = finetune(module(), pairs(), train="all", settings=STEPS, output=output)
    assert curve(again.records) == curve(whole.records)


def test_bfloat16_arithmetic_keeps_float32_weights():
    settings = TrainingSettings(steps=12, batch_size=6, learning_rate=1e-2, precision="bfloat16")
    narrow = finetune(module(), pairs(), train="all", settings=settings)
    wide = finetune(
        module(), pairs(), train="all", settings=dataclasses.replace(settings, precision="float32")
    )
    assert narrow.records[0]["loss"] == pytest.approx(wide.records[0]["loss"], rel=2e-2)
    assert narrow.records[0]["loss"] != wide.records[0]["loss"]
    assert all(τ.dtype == torch.float32 for τ in narrow.vector.values())


@pytest.mark.parametrize("name", ["save_every", "validate_every"])
def test_how_often_something_is_done(name):
    assert refusal(UsageError, output=RunOutput(**{name: 0})) == f"{name} must be above 0; got 0"


def test_the_current_folder_is_no_output(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    for out in (tmp_path, tmp_path / "in"):
        assert refusal(OutputError, output=RunOutput(out, force=True)) == (
            f"{out}: contains the current folder; give another one"
        )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no such device")
def test_a_full_disk_under_the_metrics(tmp_path):
    output = RunOutput(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        finetune(module(), stopping_at(5), train="all", settings=STEPS, output=output)
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.unlink()
    metrics.symlink_to("/dev/full")
    text = refusal(OutputError, output=output)
    assert text.startswith(f"{metrics}: the disk is full, as step 6 was noted; ")
    assert text.endswith("free some space, then resume with the same command")


def test_a_signal_that_comes_in_an_update_is_held_until_it_is_whole(tmp_path):
    went_on = []

    def interrupt(record, steps):
        if record["step"] == 5:
            signal.raise_signal(signal.SIGINT)
            went_on.append(record["step"])

    output = RunOutput(tmp_path / "run", on_record=interrupt)
    with pytest.raises(KeyboardInterrupt):
        finetune(module(), pairs(), train="all", settings=STEPS, output=output)
    assert went_on == [5]
    again = finetune(
        module(), pairs(), train="all", settings=STEPS, output=RunOutput(tmp_path / "run")
    )
    whole = finetune(module(), pairs(), train="all", settings=STEPS)
    assert curve(again.records) == curve(whole.records)
