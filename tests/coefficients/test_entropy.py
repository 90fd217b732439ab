"""Entropy minimisation: entropy and slopes against NumPy, λ against optima that are known."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import taskvec as tv  # noqa: E402
from taskvec.coefficients.entropy import mean_entropy, minimize_entropy  # noqa: E402
from taskvec.coefficients.fit.settings import Descent  # noqa: E402
from taskvec.errors import TaskvecError, UsageError  # noqa: E402


def descent(granularity="model", *, steps, rate=1e-3):
    """λ in [0, 1], as AdaMerging holds it."""
    return Descent(granularity, steps=steps, rate=rate, low=0.0, high=1.0)


def entropy_by_hand(logits):
    """Mean of −Σ p ln p over all but the last dimension, float64."""
    z = np.asarray(logits, np.float64)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    return float(-(p * np.log(p)).sum(-1).mean())


class Net(torch.nn.Module):
    """Two layers and a tanh between them."""

    def __init__(self, seed=0, width=5, classes=3, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape):
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return torch.nn.Parameter(values.to(dtype))

        self.first, self.bias = drawn(width, 4), drawn(width)
        self.second = drawn(classes, width)

    def features(self, x):
        return torch.tanh(x @ self.first.T + self.bias)

    def forward(self, x):
        return self.features(x) @ self.second.T


def small_vectors(module, tasks=("a", "b"), size=0.3):
    rng = np.random.default_rng(7)
    return {
        task: {
            name: torch.from_numpy(size * rng.normal(size=tuple(p.shape))).to(p.dtype)
            for name, p in module.named_parameters()
        }
        for task in tasks
    }


def inputs(n=6, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, 4)))


def test_entropy_is_that_of_the_softmax():
    z = np.random.default_rng(0).normal(0, 3, (2, 4, 5))
    assert float(mean_entropy(torch.from_numpy(z))) == pytest.approx(entropy_by_hand(z), abs=1e-12)
    assert float(mean_entropy(torch.zeros(3, 8))) == pytest.approx(np.log(8), abs=1e-6)
    narrow = mean_entropy(torch.from_numpy(z).to(torch.bfloat16))
    assert narrow.dtype == torch.float32


@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_lambda_goes_where_adam_takes_it(granularity):
    """The same descent with the sum in autograd's own graph."""
    module = Net()
    vectors = small_vectors(module)
    batches = [inputs(6, 1), inputs(6, 2), inputs(6, 3)]
    how = descent(granularity, steps=7, rate=0.05)
    found = minimize_entropy(module, vectors, batches, start=0.4, descent=how)

    names = sorted(vectors["a"])
    count = 1 if granularity == "model" else len(names)
    scales = torch.full((2, count), 0.4, dtype=torch.float64).requires_grad_()
    adam = torch.optim.Adam([scales], lr=0.05)
    told = []
    for step in range(7):
        weights = {
            name: dict(module.named_parameters())[name].detach()
            + sum(
                scales[i, names.index(name) % scales.shape[1]] * vectors[t][name]
                for i, t in enumerate("ab")
            )
            for name in names
        }
        out = torch.func.functional_call(module, weights, (batches[step % 3],))
        loss = torch.distributions.Categorical(logits=out).entropy().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            scales.clamp_(0, 1)
        told.append(float(loss.detach()))
    assert found.entropy == pytest.approx(told, abs=1e-12)
    expected = scales.detach().numpy()
    if granularity == "model":
        assert found.table is None
        assert list(found.scale.values()) == pytest.approx(expected[:, 0], abs=1e-10)
    else:
        assert found.table.names == tuple(names)
        np.testing.assert_allclose(found.table.weights, expected, atol=1e-10)
        assert found.scale == {"a": 1.0, "b": 1.0}


class Product(torch.nn.Module):
    """Logits x·u·v: with u = λ a and v = (1 − λ) b they are largest at λ = 1/2."""

    def __init__(self):
        super().__init__()
        self.u = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.v = torch.nn.Parameter(torch.full((1,), 4.0, dtype=torch.float64))

    def forward(self, x):
        z = x * self.u * self.v
        return torch.stack([z, -z], -1)


PRODUCT = {"t": {"u": torch.full((1,), 3.0).double(), "v": torch.full((1,), -4.0).double()}}


def test_one_lambda_finds_the_optimum_between_its_bounds():
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    how = descent(steps=400, rate=0.02)
    found = minimize_entropy(Product(), PRODUCT, [x], start=0.2, descent=how)
    assert found.scale["t"] == pytest.approx(0.5, abs=1e-3)
    assert found.entropy[-1] < found.entropy[0]
    assert found.warnings == ()


def test_a_lambda_a_tensor_goes_to_the_bounds_and_says_so():
    """λ_u (1 − λ_v) is largest at 1 and 0."""
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    how = descent("tensor", steps=300, rate=0.05)
    found = minimize_entropy(Product(), PRODUCT, [x], start=0.5, descent=how)
    assert found.table.of("t") == {"u": 1.0, "v": 0.0}
    assert found.warnings == (
        "λ of 't' ended at 0, a bound of its range, in 1 of 2 layers: less entropy may lie beyond, "
        "or nothing but sureness",
        "λ of 't' ended at 1, a bound of its range, in 1 of 2 layers: less entropy may lie beyond, "
        "or nothing but sureness",
    )


def test_the_module_is_left_as_it_was():
    module = Net().train()
    module.dropout = torch.nn.Dropout(0.5)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    vectors = small_vectors(module)
    del vectors["a"]["second"], vectors["b"]["second"]  # a head that no task changed
    minimize_entropy(module, vectors, [inputs()], descent=descent(steps=2))
    assert module.training
    assert module.dropout.training
    for name, p in module.named_parameters():
        assert p.grad is None
        assert torch.equal(p.detach(), before[name])


def test_dropout_is_off_and_batches_are_gone_through_again():
    module = Net()
    seen = []

    def head(out):
        seen.append(module.training)
        return out

    found = minimize_entropy(
        module.train(),
        small_vectors(module),
        {"x": [(inputs(),), {"x": inputs(4, 2)}]},
        heads=head,
        descent=descent(steps=5),
    )
    assert seen == [False] * 5
    assert len(found.entropy) == 5


class Tied(torch.nn.Module):
    """A head that is the embedding, a buffer, and an output with `logits`."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = torch.nn.Linear(4, 4, bias=False)
        self.embed.weight = torch.nn.Parameter(torch.randn(4, 4, generator=generator))
        self.head = torch.nn.Linear(4, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x):
        class Output:
            logits = self.head(torch.relu(self.embed(x)) + self.shift)

        return Output()


def test_tied_tensors_are_one_and_buffers_follow():
    module = Tied()
    tau = 0.3 * torch.ones(4, 4)
    vectors = {
        "t": {"embed.weight": tau, "head.weight": tau, "shift": torch.full((4,), 2.0)},
    }
    x = torch.eye(4)
    how = descent("tensor", steps=3, rate=0.1)
    found = minimize_entropy(module, vectors, [x], start=0.5, descent=how)
    row = found.table.of("t")
    assert row["embed.weight"] == row["head.weight"] != 0.5
    assert row["shift"] == 0.5  # has no slope
    w = module.embed.weight.detach().numpy() + 0.5 * 0.3
    out = (np.maximum(x.numpy() @ w.T, 0) + 1 + 0.5 * 2) @ w.T
    assert found.entropy[0] == pytest.approx(entropy_by_hand(out), abs=1e-5)


# --- families -----------------------------------------------------------------------------------


def state(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_a_family_gives_its_vectors_and_merge_takes_the_table():
    module = Net(dtype=torch.float32)
    tuned = {task: Net(seed, dtype=torch.float32) for seed, task in ((11, "a"), (12, "b"))}
    family = tv.Family(anchor=state(module), tasks={t: state(m) for t, m in tuned.items()})
    vectors = {
        task: {name: w - state(module)[name] for name, w in state(mine).items()}
        for task, mine in tuned.items()
    }
    how = descent("tensor", steps=20, rate=0.05)
    batches = [inputs().float()]
    found = minimize_entropy(module, family, batches, descent=how)
    again = minimize_entropy(module, vectors, batches, descent=how)
    np.testing.assert_array_equal(found.table.weights, again.table.weights)
    out = state(module)
    tv.merge(family, out, table=found.table, scale=found.scale)
    for name, start in state(module).items():
        expected = start.numpy().astype(np.float64)
        for task in "ab":
            expected = expected + found.table.of(task)[name] * vectors[task][name].numpy()
        np.testing.assert_allclose(out[name].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_module_that_is_not_the_target_is_refused():
    family = tv.Family(anchor=state(Net()), tasks={"a": state(Net(1))})
    with pytest.raises(UsageError, match="the loaded model is not the target: tensor 'bias' diff"):
        minimize_entropy(Net(2), family, [inputs()])


# --- what cannot be meant -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "subject"),
    [
        ({"granularity": "layer"}, "granularity must be in model | block | module | tensor"),
        ({"low": 0.0, "high": 0.0}, "low must be below high"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"rate": float("nan")}, "rate above 0"),
        ({"stay": -1.0}, "stay must be 0 or more"),
    ],
)
def test_a_descent_is_checked(changes, subject):
    with pytest.raises(UsageError) as error:
        Descent(**changes)
    assert subject in str(error.value)


def test_a_start_outside_the_bounds_is_refused():
    with pytest.raises(UsageError, match=r"start must lie within the bounds \[0, 1\]; got 2"):
        minimize_entropy(Net(), small_vectors(Net()), [inputs()], start=2.0)


def refused(vectors, batches, heads=None, error=UsageError):
    with pytest.raises(error) as raised:
        minimize_entropy(Net(), vectors, batches, heads=heads, descent=descent(steps=2))
    return str(raised.value)


def test_what_does_not_fit_is_refused():
    vectors, x = small_vectors(Net()), [inputs()]
    assert refused({"a": {}}, x) == "vectors have no tensor; give at least one task vector"
    assert refused({"a": {"fiirst": torch.ones(5, 4)}}, x) == (
        "the module has no tensor 'fiirst' of task 'a'; did you mean 'first'?"
    )
    assert refused({"a": {"bias": torch.ones(4)}}, x) == (
        "tensor 'bias' of task 'a' has shape (4,); the module has (5,)"
    )
    heads = {"x": lambda out: out}
    assert refused(vectors, {"x": x, "y": x}, heads) == (
        "heads must be given for the sources of the batches, x, y; got x"
    )
    assert "the batches of 'inputs' ended; give a list" in refused(vectors, iter(x))
    bad = [torch.full((2, 4), torch.nan, dtype=torch.float64)]
    assert "the loss is nan at the start" in refused(vectors, bad, error=TaskvecError)
