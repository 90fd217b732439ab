"""`--seed` reaches all that is random, and the recipe's own seed does where no flag is given."""

from __future__ import annotations

import pytest

from taskvec import zoo
from taskvec.cli.commands import Arguments, make_group
from taskvec.errors import UsageError
from taskvec.recipes.recipe import Recipe


def parsed(name: str, *words: object) -> Arguments:
    """The values of a command line, as the verb gets them."""
    group = make_group()
    command = group.get_command(group.make_context("taskvec", [name]), name)
    assert command is not None
    return Arguments(**command.make_context(name, list(map(str, words))).params)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"instruct: {zoo.path('instruct')}\nmethod: {{name: dare, density: 0.5}}\nseed: 3\n"
        f"tasks:\n  math: {{model: {zoo.path('math')}, scale: 0.5}}\n"
    )
    return path


@pytest.mark.parametrize(("flags", "seed"), [((), 3), (("--seed", 7), 7)])
def test_recipes_of_eval(recipe, flags, seed):
    pytest.importorskip("torch")
    from taskvec.cli.eval import _spec

    candidate = _spec(parsed("eval", recipe, *flags), str(recipe))
    assert isinstance(candidate, Recipe)
    assert candidate.seed == seed


@pytest.mark.parametrize(("flags", "seed"), [((), 3), (("--seed", 7), 7)])
def test_samples_of_a_search(cli, recipe, tmp_path, monkeypatch, flags, seed):
    pytest.importorskip("torch")
    pytest.importorskip("optuna")
    seen = []

    def run(job, out, **how):
        seen.append((job.seed, job.options.settings.seed, job.space.recipe.seed))
        raise UsageError("enough")

    monkeypatch.setattr("taskvec.coefficients.api.run_search", run)
    asked = ("--maximize", "zoo:math", "--select-n", 2, "--test-n", 2, "--out", tmp_path / "out")
    cli("search", recipe, *asked, *flags)
    assert seen == [(seed, seed, seed)]


@pytest.mark.parametrize(("flags", "seed"), [((), 3), (("--seed", 7), 7)])
def test_random_projections_of_an_adapter(cli, recipe, tmp_path, monkeypatch, flags, seed):
    seen = []

    def write(recipe, out, wanted, shape, options):
        seen.append((recipe.seed, shape.seed))
        raise UsageError("enough")

    monkeypatch.setattr("taskvec.vectors.extract.write_difference", write)
    cli("extract", recipe, tmp_path / "out", "--form", "lora", "--rank", 2, *flags)
    assert seen == [(seed, seed)]


def test_a_vector_takes_a_seed(cli, recipe, tmp_path):
    assert cli("extract", recipe, tmp_path / "math.safetensors", "--seed", 7)[0] == 0


def test_methods_that_draw_in_disentangle():
    pytest.importorskip("torch")
    from taskvec.disentanglement.weights import points
    from taskvec.running.model import load, open_stored

    module = load(open_stored(zoo.path("instruct")), device="cpu").module
    with points(module, {"math": zoo.path("math")}, seed=7) as space:
        assert space.by("dare").seed == 7
