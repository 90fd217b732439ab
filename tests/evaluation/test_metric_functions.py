"""`evaluate` and `search` take functions and tasks beside names, and show results in short."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from tests.evaluation import made_up, tiny  # noqa: E402

import taskvec as tv  # noqa: E402
from taskvec import zoo  # noqa: E402
from taskvec.errors import UsageError  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return tiny.model(context=256)


def ask(model, *tasks, **options):
    tokenizer = model.encoder.tokenizer
    return tv.evaluate(model.module, tasks, tokenizer=tokenizer, name="m", **options)


def norm(module, tokenizer):
    """Of the first parameter."""
    assert tokenizer("a")["input_ids"]
    return next(module.parameters()).norm()


def sizes(module, tokenizer):
    return {"vocabulary": len(tokenizer), "tensors": sum(1 for _ in module.parameters())}


def test_functions_tasks_and_names_in_one_list(model, tmp_path):
    found = ask(model, norm, made_up.make(), sizes, out=tmp_path)
    assert list(found) == ["norm", "made-up", "sizes"]
    assert found["norm"].main.value == pytest.approx(
        norm(model.module, model.encoder.tokenizer).item()
    )
    assert found["sizes"].to_json()["main"] == "vocabulary"
    figures = found["sizes"].to_json()["figures"]
    tensors = sum(1 for _ in model.module.parameters())
    assert figures["tensors"] == {"value": tensors, "interval": [None, None], "n": 1}
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["made-up.jsonl"]


def test_results_are_short_and_become_frames(model):
    found = ask(model, made_up.make(), sizes)
    assert len(repr(found)) < 500
    assert "made-up" in repr(found)
    assert "n = 12" in repr(found["made-up"])
    frame = found.to_pandas()
    assert list(frame["task"]) == ["made-up"] * 3 + ["sizes"] * 2
    assert frame["value"].tolist()[3:] == [len(model.encoder.tokenizer), frame["value"][4]]
    assert "<td>made-up</td>" in found._repr_html_()
    samples = found["made-up"].to_pandas()
    assert list(samples["id"]) == [f"s{i}" for i in range(12)]
    assert "long" in samples.columns


def test_a_function_leaves_the_mode_as_it_was(model):
    model.module.train()
    try:
        ask(model, lambda module, tokenizer: float(module.eval() is None))
        assert model.module.training
    finally:
        model.module.eval()


@pytest.mark.parametrize("returned", [None, "x", {}, {"a": "x"}, [1, 2]])
def test_what_is_not_a_number(model, returned):
    with pytest.raises(UsageError, match="must return a number, or numbers by name"):
        ask(model, lambda module, tokenizer: returned)


def test_one_function_twice_or_without_a_list(model):
    with pytest.raises(UsageError, match="named twice"):
        ask(model, norm, norm)
    for one in (norm, made_up.make(), "zoo:math"):
        with pytest.raises(UsageError, match="must be a list"):
            tv.evaluate(model.module, one, tokenizer=model.encoder.tokenizer)


def test_search_by_a_function(tmp_path):
    pytest.importorskip("optuna")
    from taskvec.coefficients import search

    family = {
        "anchor": zoo.path("instruct"),
        "method": "task_arithmetic",
        "tasks": {"math": {"model": str(zoo.path("math"))}},
    }
    recipe = tmp_path / "recipe.yaml"
    import yaml

    recipe.write_text(yaml.safe_dump({**family, "anchor": str(family["anchor"])}))
    start = None

    def distance(module, tokenizer):
        """How near the candidate is to the first, the target, at most 0."""
        nonlocal start
        now = torch.cat([p.detach().flatten() for p in module.parameters()])
        start = now.clone() if start is None else start
        return -abs(float((now - start).norm()) - 1)

    found = search(
        recipe,
        vary={"scale.math": "0:0.4:0.2"},
        maximize=[distance],
        sampler="grid",
        out=tmp_path / "study",
    )
    frame = found.to_pandas()
    assert sorted(frame["scale.math"]) == [0.0, 0.2, 0.4]
    best = frame.loc[frame["distance"].idxmax(), "scale.math"]
    assert found.choice.winner.point["scale.math"] == best
    assert len(repr(found)) < 200
