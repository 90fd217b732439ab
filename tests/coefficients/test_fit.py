"""Fitting: weights that are known are found, runs go on to the same bits, faults have a line."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import yaml

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from tests.coefficients.fit_models import PROMPTS, Made, weight  # noqa: E402
from tests.evaluation import tiny  # noqa: E402

import taskvec as tv  # noqa: E402
from taskvec.coefficients.fit import api, directions, objective  # noqa: E402
from taskvec.errors import DataError, OutputError, TaskvecError, UsageError  # noqa: E402

QUICK = {"max_new_tokens": 6, "batch_size": 8, "seeds": 1, "held_out": 0.4}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    found = Made(tmp_path_factory.mktemp("family"))
    found.save("planted", {"a": weight(0), "b": weight(1)})
    found.save("both", {"a": lambda name: 1.0, "b": lambda name: 1.0})
    return found


HEARD: list[str] = []  # what `fit` warned of, as it did


def said(text):
    return any(text in heard for heard in HEARD)


def fitted(made, prompts=None, *, tasks=(), family=None, settings=None, **about):
    HEARD.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("always", category=UserWarning)
        warnings.showwarning = lambda text, *_: HEARD.append(str(text))
        return tv.fit(
            made.family(*tasks) if family is None else family,
            prompts={"a": PROMPTS} if prompts is None else prompts,
            settings=QUICK | (settings or {}),
            **about,
        )


def test_weights_that_are_known_are_found(made):
    """The teacher is instruct with one task in each block."""
    found = fitted(
        made,
        {"x": PROMPTS},
        teachers={"x": str(made.folder / "planted")},
        settings={"granularity": "block", "steps": 60, "rate": 0.05},
    )
    assert found.chosen == "layers"
    for task, inside in (("a", 0), ("b", 1)):
        for name, value in found.table.of(task).items():
            if name in made.taus[task]:
                assert value == pytest.approx(float(f"layers.{inside}." in name), abs=0.12), name
    gain = found.standing("layers").gain
    assert gain.low > 0
    assert found.standing("layers").loss.value < 0.1 * found.standing("one weight").loss.value
    curve = found.curves[-1]
    assert curve.name == "seed 0"
    assert len(curve.losses) == 60
    assert curve.measured[0][0] == 0
    assert min(v for _, v in curve.measured) == dict(curve.measured)[curve.step]


def test_a_fine_tune_of_its_own_teacher_needs_weight_one(made):
    found = fitted(made, tasks=("a",), settings={"granularity": "model", "steps": 80})
    assert found.chosen == "one weight"
    assert set(found.table.of("a").values()) == {found.table.of("a")["lm_head.weight"]}
    assert found.table.of("a")["lm_head.weight"] == pytest.approx(1, abs=0.1)
    assert found.standing("target").loss.value > 10 * found.standing("one weight").loss.value


def test_held_out_losses_are_those_of_the_merge(made, tmp_path):
    """Measured again on the written table, with logits of whole models and NumPy."""
    found = fitted(made, tasks=("a",), settings={"steps": 8})
    out = tmp_path / "merged"
    tv.merge(made.family("a"), out, table=found.table, scale={"a": 1.0})
    model, teacher = (tiny.wrap(tiny.llama(made.words, scale=0.3), made.words) for _ in range(2))
    for each, path in ((model, out), (teacher, made.folder / "a")):
        from safetensors.torch import load_file

        each.module.load_state_dict(load_file(path / "model.safetensors"))
    from taskvec.running.generation import Query, answers

    asked = [Query(teacher.encoder.prompt(text), 6) for text in PROMPTS]
    replies = answers(teacher, asked)
    rows = []
    for query, reply in zip(asked, replies, strict=True):
        after = teacher.encoder.encode(reply.text)
        after += [made.words.eos_token_id] if reply.ended == "end" else []
        rows.append((list(query.tokens), after))
    _, held_out = api.split(rows, "a", 0.4, 0)
    total, count = 0.0, 0
    for before, after in held_out:
        ids = torch.tensor([before + after])
        with torch.no_grad():
            log_p, log_q = (
                each.module(ids).logits[0, len(before) - 1 : -1].double().log_softmax(-1)
                for each in (teacher, model)
            )
        kept, tokens = log_p.topk(256)
        rest = [torch.log1p(-x.exp().sum(-1)) for x in (kept, log_q.gather(-1, tokens))]
        total += float((kept.exp() * (kept - log_q.gather(-1, tokens))).sum())
        total += float((rest[0].exp() * (rest[0] - rest[1])).nan_to_num(0).sum())
        count += len(after)
    name = "layers" if found.chosen == "layers" else "one weight"
    assert found.standing(name).loss.value == pytest.approx(total / count, rel=1e-3)
    assert found.standing(name).loss.n == len(held_out)


def test_where_layers_bring_nothing_one_weight_is_written(made):
    found = fitted(made, tasks=("a",), settings={"steps": 1, "rate": 1e-9})
    assert said("layers bring nothing: held-out loss falls by")
    assert found.chosen == "one weight"
    assert len(set(found.table.of("a").values())) == 1
    assert any("layers bring nothing" in text for text in found.table.warnings)


def test_seeds_differ_and_are_compared(made):
    found = fitted(made, settings={"steps": 6, "seeds": 2, "batch_size": 3}, prompts={
        "a": PROMPTS, "b": PROMPTS})  # fmt: skip
    one, other = found.seeds
    assert not np.array_equal(one.weights, other.weights)
    assert set(found.correlations) == {"a", "b"}
    assert all(-1 <= value <= 1 for value in found.correlations.values())
    again = fitted(made, settings={"steps": 6, "seeds": 2, "batch_size": 3}, prompts={
        "b": PROMPTS, "a": PROMPTS})  # fmt: skip
    np.testing.assert_array_equal(again.table.weights, found.table.weights)


@pytest.mark.parametrize(
    "change", [{"micro_batch": 3}, {"hold": False}, {"checkpointing": True}, {"micro_batch": 1}]
)
def test_how_a_step_is_worked_out_does_not_matter(made, change):
    base = fitted(made, tasks=("a",), settings={"steps": 5})
    other = fitted(made, tasks=("a",), settings={"steps": 5} | change)
    np.testing.assert_allclose(other.seeds[0].weights, base.seeds[0].weights, atol=2e-3)
    np.testing.assert_allclose(other.curves[-1].losses, base.curves[-1].losses, rtol=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.7, 100.0])
def test_task_vectors_are_held_as_far_as_memory_allows(made, monkeypatch, share):
    held, read, rooms = [], [], []
    pack, most = directions.TaskDirections.pack, directions.most_held

    def record(self, name, device, *, hold):
        (held if hold else read).append(self.held_bytes(name))
        return pack(self, name, device, hold=hold)

    def room(device, parameter_bytes):
        rooms.append(most(device, parameter_bytes))
        assert rooms[-1] == share * parameter_bytes
        return rooms[-1]

    monkeypatch.setattr(directions.TaskDirections, "pack", record)
    monkeypatch.setattr(directions, "HELD_SHARE", share)
    monkeypatch.setattr(directions, "most_held", room)
    fitted(made, tasks=("a",), settings={"steps": 1})
    assert sum(held) <= rooms[0]
    assert bool(held) == (share > 0)
    assert bool(read) == (share < 100)


@pytest.mark.parametrize("granularity", ["block", "module", "projection"])
def test_a_layer_has_one_weight(made, granularity):
    found = fitted(made, tasks=("a",), settings={"steps": 3, "granularity": granularity})
    table = found.seeds[0].of("a")
    name = "model.layers.0.self_attn.{}_proj.weight"
    same = {
        "block": (name.format("q"), "model.layers.0.mlp.up_proj.weight"),
        "module": (name.format("q"), name.format("v")),
        "projection": ("model.layers.0.input_layernorm.weight",
                       "model.layers.0.post_attention_layernorm.weight"),
    }[granularity]  # fmt: skip
    assert table[same[0]] == table[same[1]]
    assert table[name.format("q")] != table["model.layers.1.self_attn.q_proj.weight"]
    if granularity == "projection":
        assert table[name.format("q")] != table[name.format("v")]


def test_weights_stay_within_bounds_and_near_the_start(made):
    tight = fitted(made, tasks=("a",), settings={"steps": 12, "rate": 0.5, "low": 0.4, "high": 0.6})
    assert tight.seeds[0].weights.min() >= 0.4
    assert tight.seeds[0].weights.max() <= 0.6
    assert any("ended at" in text for text in tight.warnings)
    free = fitted(made, tasks=("a",), settings={"steps": 20})
    pulled = fitted(made, tasks=("a",), settings={"steps": 20, "stay": 50.0})
    spread = [np.abs(each.seeds[0].weights - 0.5).mean() for each in (free, pulled)]
    assert spread[1] < 0.5 * spread[0]


def test_starts(made, tmp_path):
    family = replace(made.family("a"), base=made.instruct)
    recipe = made.folder / "r.yaml"
    recipe.write_text(
        f"base: {made.folder / 'b'}\ninstruct: {made.instruct}\n"
        f"tasks:\n  a: {{model: {made.folder / 'a'}, scale: 0.8}}\nmethod: lata\n"
    )
    directions = api.open_directions(str(recipe))
    assert directions.start(0.3).tolist() == np.full((1, len(directions.names)), 0.3).tolist()
    lata = tv.lata(tv.scan(directions.recipe.family))
    np.testing.assert_allclose(directions.start("recipe"), 0.8 * lata.weights)
    np.testing.assert_allclose(directions.start("lata"), 0.8 * lata.weights)
    np.testing.assert_allclose(directions.start(lata), lata.weights)
    assert directions.start({"a": -1})[0, 0] == -1
    with pytest.raises(UsageError, match="needs a scale of task 'a'"):
        api.open_directions(family).start("recipe")
    with pytest.raises(UsageError, match="start must have a number for each of a; got z"):
        directions.start({"z": 1.0})


def test_a_task_that_is_subtracted_starts_below_zero(made):
    recipe = made.folder / "minus.yaml"
    recipe.write_text(
        f"instruct: {made.instruct}\ntasks:\n  a: {{model: {made.folder / 'a'}, scale: -1}}\n"
        "method: task_arithmetic\n"
    )
    assert (api.open_directions(recipe).start(0.5) == -0.5).all()


def test_given_answers_are_learned_and_what_is_kept_is_kept(made):
    """A source of given answers, and the target's own replies with a weight."""
    answered = [{"text": text} for text in PROMPTS[:10]]
    pairs = [(text, " gate") for text in PROMPTS[10:]]
    found = fitted(
        made,
        {"x": pairs, "keep": answered},
        teachers={"x": "answers"},
        weights={"keep": 2.0},
        settings={"steps": 10},
    )
    assert found.sources["x"].loss == "likelihood"
    assert found.sources["x"].generated == 0
    assert found.sources["keep"].teacher == "target"
    assert found.sources["keep"].generated == 10
    assert found.sources["keep"].weight == pytest.approx(2 / 3)
    target = found.standing("target").sources
    assert target["keep"].value == pytest.approx(0, abs=1e-6)
    assert target["x"].value > 1
    assert found.standing("layers").loss.value < found.standing("start").loss.value


def test_entropy_needs_no_teacher(made):
    found = fitted(made, {"x": PROMPTS}, objective="entropy", settings={"steps": 10})
    assert found.sources["x"].loss == "entropy"
    assert found.standing("layers").loss.value <= found.standing("start").loss.value


def test_hidden_states_count_where_they_are_asked_for(made):
    plain = fitted(made, tasks=("a",), settings={"steps": 2})
    hidden = fitted(made, tasks=("a",), settings={"steps": 2, "hidden": 1.0})
    assert hidden.curves[0].losses[0] > plain.curves[0].losses[0]


def test_keep_without_prompts_has_those_of_the_others(made):
    found = fitted(
        made,
        {"a": PROMPTS[:8], "b": PROMPTS[8:]},
        teachers={"keep": "target"},
        settings={"steps": 2},
    )
    assert said("source 'keep' has no prompts")
    keep = found.sources["keep"]
    assert keep.train + keep.held_out == len(PROMPTS)


# --- what is written, and going on --------------------------------------------------------------


def test_what_is_written(made, tmp_path):
    found = fitted(made, settings={"steps": 4}, prompts={"a": PROMPTS, "b": PROMPTS},
                   out=tmp_path / "fit")  # fmt: skip
    table = tv.load_table(tmp_path / "fit" / "table.csv")
    np.testing.assert_array_equal(table.weights, found.table.weights)
    recipe = yaml.safe_load((tmp_path / "fit" / "recipe.yaml").read_text())
    assert recipe["table"] == "table.csv"
    assert (tmp_path / "fit" / "recipe.schema.json").is_file()
    assert {t: each["scale"] for t, each in recipe["tasks"].items()} == {"a": 1.0, "b": 1.0}
    record = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert record["settings"]["steps"] == 4
    assert record["sources"]["a"]["prompts"]
    assert record["sources"]["a"]["answers"]
    assert record["members"] == dict(found.fingerprints)
    assert set(record["held_out"]) == {"target", "start", "one weight", "layers"}
    assert record["chosen"] == found.chosen
    frame = found.to_pandas()
    assert len(frame) == 2 * len(found.table.names)
    assert {"task", "tensor", "block", "weight", "seed 0"} <= set(frame.columns)
    out = tmp_path / "merged"
    tv.merge(made.family(), out, table=found.table, scale={"a": 1.0, "b": 1.0})
    assert len(repr(found)) < 300


def test_a_merge_notices_that_members_changed_since(made, tmp_path):
    found = fitted(made, tasks=("a",), settings={"steps": 2})
    other = shutil.copytree(made.folder / "b", tmp_path / "other")
    family = tv.Family(instruct=made.instruct, tasks={"a": other})
    with pytest.raises(TaskvecError, match="task 'a'"):
        tv.merge(family, tmp_path / "merged", table=found.table, scale={"a": 1.0})


class KilledError(Exception):
    pass


@pytest.mark.parametrize("at", [("one weight", 2), ("seed 0", 3), ("seed 1", 1), ("seed 1", 5)])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(made, tmp_path, at):
    settings = {"steps": 6, "seeds": 2, "measure_every": 2, "batch_size": 4}
    whole = fitted(made, tasks=("a",), settings=settings)

    def stop(label, done, steps, loss):
        if (label, done) == at:
            raise KilledError

    with pytest.raises(KilledError):
        fitted(made, tasks=("a",), settings=settings, out=tmp_path / "fit", progress=stop)
    steps = []
    found = fitted(
        made, tasks=("a",), settings=settings, out=tmp_path / "fit",
        progress=lambda label, done, *rest: steps.append((label, done)),
    )  # fmt: skip
    np.testing.assert_array_equal(found.table.weights, whole.table.weights)
    assert found.curves == whole.curves
    assert len(steps) < 3 + 6 + 6 or at == ("one weight", 2)


def test_a_folder_of_another_fit_is_refused(made, tmp_path):
    fitted(made, tasks=("a",), settings={"steps": 1}, out=tmp_path / "fit")
    with pytest.raises(OutputError, match="holds a fit of other prompts, members or settings"):
        fitted(made, tasks=("a",), settings={"steps": 2}, out=tmp_path / "fit")


def test_the_module_that_was_given_is_left_as_it_was(made):
    words = made.words
    module = tiny.llama(words, scale=0.3)
    before = {name: p.clone() for name, p in module.state_dict().items()}
    module.train()
    found = fitted(made, tasks=("a",), settings={"steps": 2}, model=module, tokenizer=words)
    assert module.training
    for name, p in module.state_dict().items():
        assert torch.equal(p, before[name])
    again = fitted(made, tasks=("a",), settings={"steps": 2})
    np.testing.assert_array_equal(found.table.weights, again.table.weights)


# --- faults -------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_descent(made, monkeypatch):
    step = objective.FitLoss.step

    def broken(self, number, seed):
        value = step(self, number, seed)
        return math.nan if number == 3 else value

    monkeypatch.setattr(objective.FitLoss, "step", broken)
    found = fitted(made, tasks=("a",), settings={"steps": 6, "measure_every": 1})
    assert len(found.curves[-1].losses) == 3
    assert np.isfinite(found.table.weights).all()
    assert any("not finite at step 4" in text for text in found.warnings)


def test_a_source_that_teaches_nothing_is_said_before_the_descent(made):
    settings = {"steps": 1}
    same = {"x": str(made.instruct)}
    steps = []
    found = fitted(
        made,
        {"x": PROMPTS, "a": PROMPTS},
        tasks=("a",),
        teachers=same,
        settings=settings,
        progress=lambda *a: steps.append(said("source 'x' teaches nothing")),
    )
    assert steps[0]
    assert any("source 'x' teaches nothing" in text for text in found.warnings)
    steps.clear()
    with pytest.raises(UsageError, match="no source teaches anything"):
        fitted(made, {"x": PROMPTS}, tasks=("a",), teachers=same, settings=settings,
               progress=lambda *a: steps.append(a))  # fmt: skip
    assert not steps


def test_a_teacher_of_another_vocabulary_is_refused(made, tmp_path):
    words = tiny.tokenizer()
    words.add_tokens(["<new>"])
    tiny.llama(words).save_pretrained(tmp_path / "other")
    words.save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match=r"vocabulary is not the target's .*'<new>'"):
        fitted(made, {"x": PROMPTS}, teachers={"x": str(tmp_path / "other")})


def test_a_task_vector_that_is_zero_is_refused(made):
    family = tv.Family(instruct=made.instruct, tasks={"a": made.instruct})
    with pytest.raises(UsageError, match="the task vector of 'a' is zero"):
        fitted(made, family=family)


def test_prompts_that_are_too_long(made):
    long = [f"{text} {'the old gate ' * 40}" for text in PROMPTS[:4]]
    with pytest.raises(DataError, match="prompts of 'a': all 4 are longer than 64 tokens"):
        fitted(made, {"a": long}, tasks=("a",))
    found = fitted(made, {"a": [*PROMPTS, *long]}, tasks=("a",), settings={"steps": 1})
    assert said("4 of 24 are left out")
    assert found.sources["a"].left_out == 4


@pytest.mark.parametrize(
    ("settings", "subject"),
    [
        ({"low": 0.6}, "start must lie within the bounds"),
        ({"stepz": 1}, "'stepz' is unknown; did you mean 'steps'?"),
        ({"held_out": 1.0}, "held_out must be between 0 and 1"),
        ({"seeds": 0}, "seeds must be 1 or more"),
        ({"granularity": "layer"}, "granularity must be in"),
    ],
)
def test_settings_are_checked(made, settings, subject):
    with pytest.raises(UsageError) as error:
        fitted(made, settings=settings)
    assert subject in str(error.value)


def test_one_prompt_is_too_few(made):
    with pytest.raises(DataError, match="prompts of 'a': there is 1; give at least two"):
        fitted(made, {"a": PROMPTS[:1]}, tasks=("a",))


def test_a_target_in_memory_needs_a_module(made):
    family = tv.Family(anchor=made.state, tasks={"a": made.folder / "a"})
    with pytest.raises(UsageError, match="the target is in memory; give model="):
        fitted(made, family=family)
