"""Evaluating: what is found before weights are loaded, resuming, records, candidates."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.evaluation import made_up  # noqa: E402

import taskvec as tv  # noqa: E402
from taskvec import zoo  # noqa: E402
from taskvec.errors import (  # noqa: E402
    CheckpointError,
    DataError,
    OutputError,
    TaskvecError,
    UsageError,
)
from taskvec.evaluation import evaluate as module  # noqa: E402
from taskvec.evaluation import tasks as registry  # noqa: E402
from taskvec.evaluation.comparison import compare  # noqa: E402
from taskvec.evaluation.evaluate import EvaluationOptions, evaluate_with, prepare  # noqa: E402
from taskvec.evaluation.loading import Models  # noqa: E402
from taskvec.evaluation.records import begin_replies, part_of, read_replies  # noqa: E402
from taskvec.evaluation.task import Metric, Sample, SampleSettings, Score, Tools, each  # noqa: E402
from taskvec.recipes.coerce import as_recipe  # noqa: E402
from taskvec.running.model import load, open_stored  # noqa: E402
from taskvec.running.requests import Likelihood, WholeText  # noqa: E402


@pytest.fixture(scope="module")
def stored():
    return open_stored(zoo.path("instruct"))


@pytest.fixture(scope="module")
def model(stored):
    return load(stored)


@pytest.fixture
def known(monkeypatch):
    """Tasks that can be asked for in a test."""
    found: dict[str, Any] = {"made-up": made_up.make()}
    monkeypatch.setattr(module, "find_task", lambda name: found.get(name) or registry.task(name))
    return found


def run(model: Any, options: EvaluationOptions, where: str = "m", stamp: str = "s") -> Any:
    prepared = prepare(["made-up"], options)
    (result,) = evaluate_with(
        lambda: model, model.encoder, prepared, options, where=where, stamp=stamp
    )
    return result


def never() -> Any:
    raise AssertionError("the model was loaded")


def test_every_kind_of_request_gets_its_reply(known, model):
    result = run(model, EvaluationOptions())
    assert [sample.id for sample in result.samples] == [f"s{i}" for i in range(made_up.N)]
    for i, (answer, likely, text) in enumerate(result.replies):
        assert 1 <= answer.tokens <= 8
        assert likely.tokens == 2  # the space in front of the number is part of it
        assert text.tokens == 39 * (i + 1)  # over 128 tokens: several windows
    assert result.figures["perplexity"].value == pytest.approx(
        math.exp(
            sum(s.values["nll"] for s in result.scores)
            / sum(s.values["tokens"] for s in result.scores)
        )
    )
    assert result.main.n == made_up.N
    assert result.about["tokens_read"] > 0


def test_limit_draws_by_the_seed(known):
    (few,) = prepare(["made-up"], EvaluationOptions(limit=5))
    (again,) = prepare(["made-up"], EvaluationOptions(limit=5))
    (other,) = prepare(["made-up"], EvaluationOptions(limit=5, settings=SampleSettings(seed=1)))
    ids = [[sample.id for sample in each.samples] for each in (few, again, other)]
    assert ids[0] == ids[1] != ids[2]
    assert ids[0] != [f"s{i}" for i in range(5)]
    assert ids[0] == sorted(ids[0], key=lambda name: int(name[1:]))
    assert few.available == made_up.N


def test_records_say_what_was_asked_and_replied(known, model, tmp_path):
    result = run(model, EvaluationOptions(out=tmp_path), where="org/model")
    path = tmp_path / "org-model" / "made-up.jsonl"
    header, *lines = map(json.loads, path.read_text().splitlines())
    assert header["task"] == "made-up"
    assert header["n"] == made_up.N
    assert not list(path.parent.glob("*.part"))
    assert [line["id"] for line in lines] == [f"s{i}" for i in range(made_up.N)]
    first = lines[0]
    assert first["scores"] == dict(result.scores[0].values)
    assert first["notes"] == {"said": result.replies[0][0].text}
    assert first["requests"][0]["text"] == "Q: say ab?\nA: "
    assert first["reference"] == {"right": "0"}
    assert [list(reply) for reply in first["replies"]] == [
        ["text", "tokens", "ended"],
        ["log_likelihood", "tokens", "is_greedy"],
        ["log_likelihood", "tokens", "is_greedy"],
    ]


def test_a_finished_run_is_not_asked_again(known, model, tmp_path):
    options = EvaluationOptions(out=tmp_path)
    first = run(model, options)
    prepared = prepare(["made-up"], options)
    (again,) = evaluate_with(never, model.encoder, prepared, options, where="m", stamp="s")
    assert again.replies == first.replies
    assert again.figures == first.figures
    assert again.about["kept"] == made_up.N


@pytest.mark.parametrize(
    "change",
    [
        {"stamp": "t"},
        {"options": {"context": 64}},
        {"options": {"dtype": "bfloat16"}},
        {"options": {"limit": 3}},
        {"task": {"version": 2}},
    ],
    ids=str,
)
def test_replies_to_anything_else_are_not_taken(known, model, tmp_path, change):
    run(model, EvaluationOptions(out=tmp_path))
    known["made-up"] = made_up.make(**change.get("task", {}))
    options = replace(EvaluationOptions(out=tmp_path), **change.get("options", {}))
    assert run(model, options, stamp=change.get("stamp", "s")).about["kept"] == 0


def test_results_say_how_the_model_was_asked(known, model, tmp_path):
    result = run(
        model, EvaluationOptions(out=tmp_path, truncate=True, dtype="float32", device="cpu")
    )
    header = json.loads((tmp_path / "m" / "made-up.jsonl").read_text().splitlines()[0])
    for told in (result.to_json(), header):
        assert (told["truncate"], told["dtype"], told["device"]) == (True, "float32", "cpu")


def test_a_model_without_identity_is_always_asked(known, model, tmp_path):
    for _ in range(2):
        assert run(model, EvaluationOptions(out=tmp_path), stamp="").about["kept"] == 0


def test_an_interrupted_run_goes_on(known, model, tmp_path):
    """Stopped in the middle, with a last line that was cut short."""
    options = EvaluationOptions(out=tmp_path / "a", batch_tokens=300)
    whole = run(model, EvaluationOptions(out=tmp_path / "b", batch_tokens=300))

    class StoppedError(Exception):
        pass

    taken = []

    class Stopping:
        def __call__(self, label: str, total: int) -> Any:
            from contextlib import nullcontext

            def advance(done: int) -> None:
                taken.append(done)
                if len(taken) > 5:
                    raise StoppedError

            return nullcontext(advance)

    with pytest.raises(StoppedError):
        run(model, replace(options, progress=Stopping()))
    (path,) = (tmp_path / "a" / "m").glob("made-up.jsonl.*.part")
    lines = path.read_text().splitlines(keepends=True)
    assert 2 < len(lines) < made_up.N
    path.write_text("".join(lines)[:-20])
    asked = []

    def counted(*arguments: Any, **options: Any) -> Any:
        asked.append(len(arguments[1]))
        return original(*arguments, **options)

    original = module.replies_to
    module.replies_to = counted
    try:
        result = run(model, options)
    finally:
        module.replies_to = original
    assert result.about["kept"] == len(lines) - 2
    assert asked == [made_up.N - len(lines) + 2]
    for mine, theirs in zip(result.replies, whole.replies, strict=True):
        assert mine[0] == theirs[0]
        assert mine[1].log_likelihood == pytest.approx(theirs[1].log_likelihood, abs=1e-4)
    assert not path.exists()


def test_broken_replies_come_back_as_they_were(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"key": "k"}\n{"id": "a", "replies": [{"log_likelihood": null, "tokens": 2, '
        '"is_greedy": false}]}\n'
    )
    (reply,) = read_replies(path, "k")["a"]
    assert math.isnan(reply.log_likelihood)
    assert read_replies(path, "other") == {}


@pytest.mark.parametrize("value", [-1.5, -math.inf])
def test_likelihoods_come_back_as_they_were(tmp_path, value):
    path = tmp_path / "x.jsonl"
    said = Likelihood(value, 2, is_greedy=False)
    begin_replies(path, {"key": "k"}, {})("a", [said])
    for line in part_of(path, "k").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read_replies(path, "k") == {"a": [said]}


def test_replies_outlast_a_journal_that_cannot_be_begun(tmp_path, monkeypatch):
    """As on a full disk: the replies of the run before are still there."""
    path = tmp_path / "x.jsonl"
    said = Likelihood(-1.0, 2, is_greedy=False)
    begin_replies(path, {"key": "k"}, {})("a", [said])

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    kept = read_replies(path, "k")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OutputError, match="cannot be written: No space left"):
            begin_replies(path, {"key": "k"}, kept)
    assert read_replies(path, "k") == {"a": [said]}


def test_results_name_the_judge_that_was_given(known, model):
    from taskvec.evaluation.judges import parse_judge

    judge = parse_judge("prefixes:xstest")
    assert run(model, EvaluationOptions(tools=Tools(judge=judge))).about["judge"] == judge.name
    assert run(model, EvaluationOptions()).about["judge"] is None


def test_a_model_on_the_hub_is_fetched_first(known, monkeypatch):
    """Its name is what results call it; its files are those of the snapshot."""
    from taskvec.checkpoints.hub import hub_name
    from taskvec.running import model as models

    asked = []

    def fetch(name: Any) -> Any:
        asked.append(str(name))
        return name, zoo.path("math")

    assert hub_name("org/model@main") is not None
    monkeypatch.setattr(models, "fetch", fetch)
    results = tv.evaluate("org/model@main", ["zoo:math"], limit=10)
    assert asked == ["org/model@main"]
    assert results["zoo:math"].model == "org/model@main"
    assert results["zoo:math"].main.value > 0.8


def test_other_settings_leave_an_unfinished_run_alone(tmp_path):
    """A mistyped option, and then the first command again: it goes on."""
    path = tmp_path / "x.jsonl"
    said = Likelihood(-1.0, 2, is_greedy=False)
    for key in ("first key", "other key"):
        begin_replies(path, {"key": key}, {})(key, [said])
    assert read_replies(path, "first key") == {"first key": [said]}


def test_two_samples_of_one_name_are_refused(known):
    twice = [Sample("a", (WholeText("x"),)), Sample("a", (WholeText("y"),))]
    known["made-up"] = made_up.make(samples=lambda rows, settings: twice)
    with pytest.raises(UsageError, match="task 'made-up' gives two samples the id 'a'"):
        prepare(["made-up"], EvaluationOptions())


def test_recipes_with_stages_are_refused_before_anything_is_loaded(tmp_path):
    recipe = tmp_path / "r.yaml"
    one = f"{{math: {{model: {zoo.path('math')}, scale: 1}}}}"
    recipe.write_text(
        f"stages:\n  s:\n    anchor: {zoo.path('instruct')}\n    method: task_arithmetic\n"
        f"    tasks: {one}\nanchor: {zoo.path('instruct')}\ntarget: stage:s\n"
        f"method: task_arithmetic\ntasks: {one}\n"
    )
    with pytest.raises(UsageError, match="cannot have stages; merge the recipe and evaluate"):
        tv.evaluate(tv.load_recipe(recipe), ["zoo:math"])


def test_what_does_not_fit_is_told_before_weights_are_loaded(known, stored):
    known["made-up"] = made_up.make(
        samples=lambda rows, settings: [
            Sample("a", (made_up.Prompt("x" * 200, 8),)),
        ]
    )
    options = EvaluationOptions()
    with pytest.raises(TaskvecError) as raised:
        evaluate_with(never, stored.encoder, prepare(["made-up"], options), options, where="m")
    assert str(raised.value) == (
        f"task 'made-up': {zoo.path('instruct')}: a sample needs 209 tokens, the model's context "
        "is 128; take fewer shots, or cut samples at the front (--truncate)"
    )


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"needs": ("code",)}, "runs generated programs; allow that with --allow-code"),
        ({"fewest_tokens": 512}, "needs a context of 512 tokens; .*instruct has 128"),
    ],
)
def test_tasks_that_cannot_be_done_are_refused(known, stored, fields, text):
    known["made-up"] = made_up.make(**fields)
    options = EvaluationOptions()
    with pytest.raises(UsageError, match=text):
        evaluate_with(never, stored.encoder, prepare(["made-up"], options), options, where="m")
    if "code" in fields.get("needs", ()):
        prepare(["made-up"], EvaluationOptions(tools=Tools(allow_code_execution=True)))


def test_a_model_without_a_chat_template(known, stored):
    known["made-up"] = made_up.make(needs=("chat",))
    tokenizer = stored.encoder.tokenizer
    template, tokenizer.chat_template = tokenizer.chat_template, None
    options = EvaluationOptions()
    try:
        with pytest.raises(UsageError, match=r"asks in conversations; .* has no chat template"):
            evaluate_with(never, stored.encoder, prepare(["made-up"], options), options, where="m")
    finally:
        tokenizer.chat_template = template


@pytest.mark.parametrize(
    ("names", "options", "text"),
    [
        ([], {}, "no task is named"),
        (["made-up", "made-up"], {}, "'made-up' is named twice"),
        (["made-up"], {"limit": 0}, "limit must be 1 or more; got 0"),
        (["made-up"], {"context": 0}, "context must be 1 or more; got 0"),
        (["made-up"], {"stride": -1}, "stride must be 1 or more; got -1"),
        (["made-up"], {"batch_tokens": 0}, "batch_tokens must be 1 or more; got 0"),
        (["made-up"], {"settings": SampleSettings(draws=0)}, "draws must be 1 or more; got 0"),
        (["made-up"], {"settings": SampleSettings(shots=-1)}, "shots must be 0 or more; got -1"),
        (["made-up"], {"settings": SampleSettings(seed=-1)}, "seed must be 0 or more; got -1"),
        (["made-up"], {"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16"),
        (["zoo:meth"], {}, "no task 'zoo:meth'; did you mean 'zoo:math'"),
        (["fish:meth"], {}, "no distribution brings tasks called 'fish:…'; installed: zoo"),
    ],
)
def test_wrong_requests(known, names, options, text):
    with pytest.raises(UsageError, match=text):
        prepare(names, EvaluationOptions(**options))


def test_data_without_anything_to_ask(known):
    known["made-up"] = made_up.make(samples=lambda rows, settings: [])
    with pytest.raises(DataError, match="task 'made-up': its data hold nothing to ask"):
        prepare(["made-up"], EvaluationOptions())


@pytest.mark.parametrize("value", [math.nan, math.inf, -2.0, 0.0])
def test_shares_of_nothing_that_can_be_shared(known, model, value):
    """JSON has no NaN; and of a log-likelihood the worse model would have the larger share."""
    task = made_up.make(
        metrics=(Metric("x", "mean"),), score=each(lambda sample, replies: Score({"x": value}))
    )
    known["made-up"] = task
    result = run(model, EvaluationOptions(limit=2))
    (alone, _) = compare({"a": [result], "b": [result]}, singles={"made-up": "a"})["made-up"]
    told = json.dumps(alone.to_json(), allow_nan=False)
    assert json.loads(told)["share_of_single"] is None


def test_stride_and_context(known, model):
    with pytest.raises(UsageError, match="stride must be 1 to the context, 64; got 65"):
        run(model, EvaluationOptions(context=64, stride=65))
    narrow = run(model, EvaluationOptions(context=64, stride=16))
    wide = run(model, EvaluationOptions(context=128))
    assert narrow.about["context"] == 64
    assert narrow.about["stride"] == 16
    assert wide.about["stride"] == 128
    tokens = [[reply[2].tokens for reply in each.replies] for each in (narrow, wide)]
    assert tokens[0] == tokens[1]


def test_empty_text_is_told(known, model):
    known["made-up"] = made_up.make(
        samples=lambda rows, settings: [Sample("a", (WholeText(""),))],
    )
    with pytest.raises(DataError, match="sample 'a': its text is empty"):
        run(model, EvaluationOptions())


def test_models_that_cannot_be_opened(tmp_path):
    options = EvaluationOptions()
    with Models(options) as models:
        for make, text in (
            (lambda folder: None, "no such folder"),
            (lambda folder: folder.mkdir(), r"config\.json: (cannot be read|is not JSON)"),
            (
                lambda folder: (folder / "config.json").write_text("{"),
                r"config\.json: (cannot be read|is not JSON)",
            ),
            (lambda folder: (folder / "config.json").write_text("{}"), "no tokenizer that can be"),
        ):
            folder = tmp_path / "model"
            make(folder)
            with pytest.raises(CheckpointError, match=text):
                models.evaluate(str(folder), [], "x")
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text("{}")
        with pytest.raises(CheckpointError, match="is an adapter; evaluate a recipe that has it"):
            models.evaluate(str(adapter), [], "x")


def test_weights_that_cannot_be_loaded(known, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(zoo.path("math"), folder)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"model: cannot be loaded: "):
        tv.evaluate(folder, ["made-up"])


def test_weights_that_are_not_there_are_not_made_up(known, tmp_path):
    """transformers draws them at random and goes on."""
    folder = tmp_path / "model"
    shutil.copytree(zoo.path("math"), folder)
    tensors = load_file(folder / "model.safetensors")
    gone = {name for name in tensors if name.endswith("down_proj.weight")}
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError,
        match=r"model: lacks 'model.layers.0.mlp.down_proj.weight' \(8 such\), which would be "
        "random; give a folder that was saved as LlamaForCausalLM",
    ):
        tv.evaluate(folder, ["made-up"])


def test_a_device_that_is_not_there(known):
    with pytest.raises(UsageError, match="there is no device 'gpu7'; give cpu, cuda"):
        tv.evaluate(zoo.path("math"), ["made-up"], device="gpu7")


def test_python(known, model, tmp_path):
    """A folder, a loaded module, a recipe and a family; the last two are merged in memory."""
    family = tv.Family(
        instruct=zoo.path("instruct"), tasks={"math": zoo.path("math"), "code": zoo.path("code")}
    )
    scale = {"math": 0.7, "code": 0.7}
    tv.merge(family, tmp_path / "merged", method="task_arithmetic", scale=scale)
    tasks = ["zoo:math", "zoo:text"]
    folder = tv.evaluate(tmp_path / "merged", tasks, limit=30)
    merged = tv.evaluate(family, tasks, table="task_arithmetic", scale=scale, limit=30)
    assert {task: result.figures for task, result in folder.items()} == {
        task: result.figures for task, result in merged.items()
    }
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"anchor: {zoo.path('instruct')}\nmethod: task_arithmetic\ntasks:\n"
        f"  math: {{model: {zoo.path('math')}, scale: 0.7}}\n"
        f"  code: {{model: {zoo.path('code')}, scale: 0.7}}\n"
    )
    read = tv.evaluate(tv.load_recipe(recipe), tasks, limit=30)
    assert read["zoo:math"].figures == folder["zoo:math"].figures
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    in_memory = tv.evaluate(model.module, ["zoo:text"], tokenizer=model.encoder.tokenizer)
    assert in_memory["zoo:text"].main.value != folder["zoo:text"].main.value
    assert all(torch.equal(before[k], v) for k, v in model.module.state_dict().items())
    with pytest.raises(UsageError, match="needs its tokenizer: give tokenizer="):
        tv.evaluate(model.module, ["zoo:text"])
    with pytest.raises(UsageError, match="scale goes with a family"):
        tv.evaluate(tmp_path / "merged", ["zoo:text"], scale=scale)


def test_a_module_stays_in_the_mode_that_it_was_in(known):
    """A check in the middle of a training run must not switch dropout off for the rest of it."""
    loaded = load(open_stored(zoo.path("math")))
    module, tokenizer = loaded.module, loaded.encoder.tokenizer
    module.train()
    frozen = module.model.layers[0].eval()
    before = [part.training for part in module.modules()]
    assert True in before
    tv.evaluate(module, ["zoo:math"], tokenizer=tokenizer, limit=1)
    assert [part.training for part in module.modules()] == before
    assert not frozen.training


@pytest.mark.parametrize(
    ("model", "arguments", "text"),
    [
        (zoo.path("math"), {"tasks": "zoo:math"}, r"must be a list; give \['zoo:math'\]"),
        (None, {}, "the model must be a folder, .*; got NoneType"),
        ({"a": 1}, {}, "the model must be a folder, .*; got dict"),
        (zoo.path("math"), {"table": "lata"}, "table goes with a family"),
        (zoo.path("math"), {"tokenizer": "x"}, "tokenizer goes with a module"),
        (zoo.path("math"), {"data": "/nowhere"}, "data: there is no folder /nowhere; give one"),
        (
            zoo.path("math"),
            {"data": {"gsmk8": "x"}},
            "data are given for 'gsmk8', which is not",
        ),
        (torch.nn.Linear(2, 2), {"tokenizer": "x"}, "must be a causal language model of transf"),
    ],
)
def test_what_cannot_be_meant(model, arguments, text):
    with pytest.raises(UsageError, match=text):
        tv.evaluate(model, **({"tasks": ["zoo:math"]} | arguments))


def test_a_module_without_weights(model):
    with torch.device("meta"):
        empty = type(model.module)(model.module.config)
    with pytest.raises(UsageError, match="on the meta device, without values; load them"):
        tv.evaluate(empty, ["zoo:math"], tokenizer=model.encoder.tokenizer)


def test_candidates_share_one_loaded_model(known, monkeypatch):
    loads: list[Path] = []
    from taskvec.evaluation import loading

    def counted(stored: Any, **how: Any) -> Any:
        loads.append(stored.folder)
        return load(stored, **how)

    monkeypatch.setattr(loading, "load", counted)

    family = tv.Family(instruct=zoo.path("instruct"), tasks={"math": zoo.path("math")})
    options = EvaluationOptions(limit=20)
    prepared = prepare(["zoo:math"], options)
    rates = []
    with Models(options) as models:
        for scale in (0.0, 1.0, 0.0):
            recipe = as_recipe(family, {"method": "task_arithmetic", "scale": {"math": scale}})
            (result,) = models.evaluate(recipe, prepared, f"λ = {scale}")
            rates.append(result.main.value)
        assert len(loads) == 1
        (alone,) = models.evaluate(zoo.path("math"), prepared, "math")
    assert len(loads) == 2
    assert rates[0] == rates[2] == 0.0
    assert rates[1] == alone.main.value > 0.8


@pytest.mark.parametrize("named", ["~/member", "{home}/member"])
def test_a_candidate_is_asked_again_if_a_member_changes(tmp_path, monkeypatch, named):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(zoo.path("math"), tmp_path / "member")
    family = tv.Family(instruct=zoo.path("instruct"), tasks={"math": named.format(home=tmp_path)})

    def ask() -> Any:
        how = {"scale": {"math": 1.0}, "limit": 4, "out": tmp_path / "out"}
        return tv.evaluate(family, ["zoo:math"], **how)["zoo:math"]

    assert (ask().about["kept"], ask().about["kept"]) == (0, 4)
    assert ask().main.value == 1
    weights = "model.safetensors"
    shutil.copy(zoo.path("code") / weights, tmp_path / "member" / weights)
    changed = ask()
    assert (changed.about["kept"], changed.main.value) == (0, 0)
