"""Tasks of lm-evaluation-harness: equal to its own evaluator over its own model class."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")

from tests.evaluation import tiny  # noqa: E402

from taskvec import zoo  # noqa: E402
from taskvec.errors import DataError, MissingExtraError, TaskvecError, UsageError  # noqa: E402
from taskvec.evaluation import harness  # noqa: E402
from taskvec.evaluation.comparison import compare  # noqa: E402
from taskvec.evaluation.evaluate import EvaluationOptions, Result, evaluate_with, prepare  # noqa: E402
from taskvec.evaluation.task import SampleSettings, Tools  # noqa: E402
from taskvec.running.model import Model, load, open_stored  # noqa: E402

WORDS = ("the gate", "the fox", "a hen", "the red hen")
QUESTIONS = [
    {
        "question": f"Which of the {i} is red",
        "choices": [WORDS[(i + j) % 4] for j in range(3)],
        "label": i % 3,
        "answer": WORDS[i % 4],
    }
    for i in range(11)
]
TEXTS = [  # no two windows alike: the harness takes the one for the other
    {
        "page": " ".join(
            f"The old hen sees gate {i + n}, a red fox sees {i * i} hens." for i in range(n)
        )
    }
    for n in (1, 3, 8)
]
METRICS = """
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "Question: {{question}}?\\nAnswer:"
doc_to_choice: choices
doc_to_target: label
"""
TASKS = {
    "choice": CHOICE + METRICS + "metadata: {version: 2.5}\n",
    "odd": CHOICE.replace("choices", '["the gate", "a hen"]').replace("label", "'{{label % 2}}'")
    + """
metric_list:
  - {metric: f1, aggregation: f1, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
""",
    "answer": """
output_type: generate_until
doc_to_text: "Question: {{question}}?\\nAnswer:"
doc_to_target: " {{answer}}"
generation_kwargs: {until: ["\\n", "gate"], max_gen_toks: 6, do_sample: false, top_p: 0.9}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: number, filter: [{function: regex, regex_pattern: "([0-9])"}, {function: take_first}]}
""",
    "last": """
output_type: loglikelihood
doc_to_text: "Question: {{question}}? "
doc_to_target: "{{answer}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: page
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
""",
    "begun": """
output_type: generate_until
doc_to_text: "Question: {{question}}?"
doc_to_target: "{{answer}}"
gen_prefix: "Answer: the"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Task files and their data; datasets keeps what it made of them there too."""
    import datasets

    path = tmp_path_factory.mktemp("tasks")
    for name, rows in (("questions", QUESTIONS), ("texts", TEXTS)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (path / f"{name}.jsonl").write_text(lines)
    for name, text in TASKS.items():
        write_task(path, name, text)
    kept, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, path / "cache"
    yield path
    datasets.config.HF_DATASETS_CACHE = kept


def write_task(path: Path, name: str, text: str) -> None:
    data = path / ("texts.jsonl" if name.startswith("text") else "questions.jsonl")
    (path / f"{name}.yaml").write_text(
        f"task: tiny_{name}\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        f"test_split: test\nfewshot_split: test\n{text}"
    )


def ours(model: Model, folder: Path, *names: str, **about: Any) -> list[Result]:
    settings = SampleSettings(
        **{key: about.pop(key) for key in ("shots", "seed", "apply_chat_template") if key in about}
    )
    options = EvaluationOptions(include_path=folder, settings=settings, **about)
    prepared = prepare([f"harness:tiny_{name}" for name in names], options)
    return evaluate_with(lambda: model, model.encoder, prepared, options, where="tiny")


def theirs(
    model: Model, folder: Path, *names: str, shots: int | None = None, chat: bool = False
) -> list[dict[str, Any]]:
    """The harness's own results over its own model class, by its own evaluator.

    It puts the beginning-of-sequence token in front of what a chat template made without one, as
    transformers does not; and in front of a text, whose first token it then predicts from itself.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    quiet = contextlib.ExitStack()
    with quiet, warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
        quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
        lm = HFLM(
            pretrained=model.module, tokenizer=model.encoder.tokenizer, batch_size=16,
            add_bos_token=False if chat or names == ("text",) else None,
        )  # fmt: skip
        found: dict[str, Any] = simple_evaluate(
            model=lm, tasks=[f"tiny_{name}" for name in names], num_fewshot=shots,
            apply_chat_template=chat, fewshot_random_seed=0, bootstrap_iters=0, random_seed=0,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        )  # fmt: skip
    return [
        _theirs(found["results"][f"tiny_{name}"], found["samples"][f"tiny_{name}"])
        for name in names
    ]


def _theirs(results: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "figures": {
            key.removesuffix(",none"): value
            for key, value in results.items()
            if isinstance(value, float) and "stderr" not in key
        },
        "samples": samples,
        "responses": [
            [each[0] for each in sample["resps"]]
            for sample in samples
            if sample["filter"] == samples[0]["filter"]
        ],
    }


KINDS: dict[str, dict[str, Any]] = {
    "begins": {"adds_bos": True},
    "does not begin": {"adds_bos": False},
    "has no beginning": {"bos": None},
}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Model:
    return tiny.model(context=200, **KINDS[request.param])


def check_likelihoods(result: Result, expected: dict[str, Any]) -> None:
    for replies, responses in zip(result.replies, expected["responses"], strict=True):
        for reply, (total, is_greedy) in zip(replies, responses, strict=True):
            assert reply.log_likelihood == pytest.approx(total, abs=1e-4)
            assert reply.is_greedy == is_greedy
    for score, sample in zip(result.scores, expected["samples"], strict=True):
        for metric in sample["metrics"]:
            sign = -1 if metric == "perplexity" else 1
            assert score.values[metric] == pytest.approx(sign * sample[metric], abs=1e-4)


def check_answers(result: Result, expected: dict[str, Any]) -> None:
    answers = [[reply.text for reply in replies] for replies in result.replies]
    assert answers == expected["responses"]
    assert len({text for (text,) in answers}) > 1
    for i, score in enumerate(result.scores):
        (filtered,) = score.notes["filtered"]
        for sample in (each for each in expected["samples"] if each["doc_id"] == i):
            assert filtered[sample["filter"]] == sample["filtered_resps"][0]
            assert score.values[f"exact_match,{sample['filter']}"] == sample["exact_match"]


def check_figures(result: Result, expected: dict[str, Any]) -> None:
    assert set(result.figures) == set(expected["figures"])
    for name, value in expected["figures"].items():
        assert result.figures[name].value == pytest.approx(value, rel=1e-4), name


# Equal to the harness


@pytest.mark.parametrize(("chat", "shots"), [(False, None), (False, 2), (True, 2)])
def test_replies_and_scores_are_the_harnesss(
    model: Model, folder: Path, chat: bool, shots: int | None
) -> None:
    names = ("choice", "last", "answer")
    expected = theirs(model, folder, *names, shots=shots, chat=chat)
    results = ours(model, folder, *names, shots=shots, apply_chat_template=chat)
    for result, other, check in zip(
        results, expected, (check_likelihoods, check_likelihoods, check_answers), strict=True
    ):
        check(result, other)
        check_figures(result, other)


def test_a_trained_model_is_scored_as_by_the_harness(folder: Path) -> None:
    model = load(open_stored(zoo.path("math")))
    expected = theirs(model, folder, "choice", "answer")
    choice, answer = ours(model, folder, "choice", "answer")
    check_likelihoods(choice, expected[0])
    check_answers(answer, expected[1])


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_the_harnesss(kind: str, folder: Path) -> None:
    model = tiny.model(context=24, **KINDS[kind])
    (expected,) = theirs(model, folder, "text")
    (result,) = ours(model, folder, "text")
    assert max(reply.tokens for (reply,) in result.replies) > 3 * model.encoder.context
    for (reply,), (total,) in zip(result.replies, expected["responses"], strict=True):
        assert reply.log_likelihood == pytest.approx(total, rel=1e-5)
    check_figures(result, expected)
    assert [m.kind for m in result.metrics] == ["perplexity", "perplexity", "ratio"]


def test_metrics_that_are_no_means_are_the_harnesss_with_an_interval(folder: Path) -> None:
    model = tiny.model(context=200)
    (expected,) = theirs(model, folder, "odd")
    (result,) = ours(model, folder, "odd")
    check_figures(result, expected)
    for figure in result.figures.values():
        assert figure.low < figure.value < figure.high
    (other,) = ours(tiny.model(context=200, seed=1), folder, "odd")
    row = compare({"a": [result], "b": [other]}, reference="a")["harness:tiny_odd"][1]
    change = other.main.value - result.main.value
    assert row.difference is not None
    assert row.difference.value == pytest.approx(change)
    assert row.difference.low <= change <= row.difference.high


def test_documents_without_a_metric_do_not_count_in_it(folder: Path) -> None:
    (folder / "some.py").write_text(
        "def results(doc, replies):\n"
        "    found = {'acc': 0.25 * doc['label']}\n"
        "    return found if doc['label'] else found | {'first': len(doc['answer'])}\n"
    )
    write_task(
        folder,
        "some",
        CHOICE
        + """
process_results: !function some.results
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: first, aggregation: mean, higher_is_better: false}
""",
    )
    model = tiny.model(context=200)
    (expected,) = theirs(model, folder, "some")
    (result,) = ours(model, folder, "some")
    check_figures(result, expected)
    assert [(m.kind, m.higher_is_better) for m in result.metrics] == [
        ("mean", True),
        ("mean", False),
    ]
    assert (result.figures["acc"].n, result.figures["first"].n) == (11, 4)


def test_an_answer_that_the_task_begins_goes_on(folder: Path) -> None:
    model = tiny.model(template="<s>" + tiny.TEMPLATE, context=200)
    (expected,) = theirs(model, folder, "begun", chat=True)
    (result,) = ours(model, folder, "begun", apply_chat_template=True)
    assert [[reply.text for reply in replies] for replies in result.replies] == expected[
        "responses"
    ]
    (request,) = result.samples[0].requests
    assert model.encoder.rendered(request.text).endswith("<assistant>Answer: the")


# Like our own tasks


def test_a_result_says_what_was_asked(folder: Path) -> None:
    model = tiny.model(context=200)
    first, second = ours(model, folder, "text", "choice", shots=None, seed=3)
    assert [first.task, second.task] == ["harness:tiny_text", "harness:tiny_choice"]
    about = second.to_json()
    assert about["version"] == 2.5
    assert about["lm_eval"]
    assert (about["n"], about["available"], about["seed"]) == (11, 11, 3)
    assert (about["shots"], about["apply_chat_template"]) == (0, False)
    assert about["main"] == "acc"
    assert [metric.kind for metric in second.metrics] == ["rate", "rate"]
    assert second.samples[4].reference == {"target": 1}
    (json_again,) = [json.loads(json.dumps(about))]
    assert json_again == about


def test_a_limit_draws_by_the_seed_and_changes_no_prompt(folder: Path) -> None:
    model = tiny.model(context=200)
    (whole,) = ours(model, folder, "choice", shots=2)
    (some,) = ours(model, folder, "choice", shots=2, limit=4)
    expected = random.Random("0:harness:tiny_choice").sample(range(11), 4)
    assert [sample.id for sample in some.samples] == [str(i) for i in sorted(expected)]
    prompts = {sample.id: sample.requests for sample in whole.samples}
    assert all(sample.requests == prompts[sample.id] for sample in some.samples)
    assert (some.about["n"], some.about["available"]) == (4, 11)
    values = {
        sample.id: score.values for sample, score in zip(whole.samples, whole.scores, strict=True)
    }
    assert [score.values for score in some.scores] == [values[s.id] for s in some.samples]


def test_the_seed_chooses_the_worked_examples(folder: Path) -> None:
    def prompts(seed: int) -> list[Any]:
        options = EvaluationOptions(
            include_path=folder, settings=SampleSettings(shots=2, seed=seed)
        )
        (prepared,) = prepare(["harness:tiny_choice"], options)
        return [sample.requests for sample in prepared.samples]

    assert prompts(1) == prompts(1)
    assert prompts(1) != prompts(2)


def test_an_interrupted_run_goes_on(folder: Path, tmp_path: Path) -> None:
    model = tiny.model(context=200)
    options = EvaluationOptions(include_path=folder, out=tmp_path)
    names = ["harness:tiny_choice", "harness:tiny_answer", "harness:tiny_text"]

    def refuse() -> Model:
        raise AssertionError("the model is loaded")

    def run(load: Callable[[], Model]) -> list[Result]:
        prepared = prepare(names, options)
        return evaluate_with(load, model.encoder, prepared, options, where="tiny", stamp="1")

    first, again = run(lambda: model), run(refuse)
    assert [result.figures for result in again] == [result.figures for result in first]
    assert [result.about["kept"] for result in again] == [11, 11, 3]
    lines = (tmp_path / "tiny" / "harness-tiny_choice.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["scores"].keys() == {"acc", "acc_norm"}


def test_one_loaded_model_serves_all_tasks(folder: Path) -> None:
    model, loaded = tiny.model(context=200), []

    def load() -> Model:
        loaded.append(1)
        return model

    options = EvaluationOptions(include_path=folder)
    prepared = prepare(["harness:tiny_choice", "harness:tiny_text"], options)
    evaluate_with(load, model.encoder, prepared, options, where="tiny")
    assert loaded == [1]


def test_the_same_task_scores_several_models(folder: Path) -> None:
    options = EvaluationOptions(include_path=folder)
    prepared = prepare(["harness:tiny_choice"], options)
    one, other = tiny.model(context=200), tiny.model(context=200, seed=1)

    def run(model: Model) -> Result:
        (result,) = evaluate_with(lambda: model, model.encoder, prepared, options, where="tiny")
        return result

    first, second, third = run(one), run(other), run(one)
    assert first.scores == third.scores != second.scores


def test_global_random_states_are_left_alone(folder: Path) -> None:
    (folder / "shuffle.py").write_text(
        "import random\nimport numpy as np\nimport torch\n"
        "def docs(data):\n"
        "    order = list(range(len(data)))\n"
        "    random.shuffle(order)\n    np.random.shuffle(order)\n"
        "    return data.select([order[i] for i in torch.randperm(len(data)).tolist()])\n"
    )
    write_task(folder, "shuffled", CHOICE + METRICS + "process_docs: !function shuffle.docs\n")
    model = tiny.model(context=200)

    def states() -> tuple[object, ...]:
        numpy = np.random.get_state()[1].tolist()  # noqa: NPY002
        return random.getstate(), numpy, torch.get_rng_state().tolist()

    before = states()
    (first,) = ours(model, folder, "shuffled")
    assert states() == before
    random.random()
    np.random.rand()  # noqa: NPY002
    torch.rand(1)
    assert states() != before
    (again,) = ours(model, folder, "shuffled")
    (other,) = ours(model, folder, "shuffled", seed=1)
    plain = [sample.reference for sample in ours(model, folder, "choice")[0].samples]
    order = [sample.requests for sample in first.samples]
    assert order == [sample.requests for sample in again.samples]
    assert order != [sample.requests for sample in other.samples]
    assert plain != [sample.reference for sample in first.samples]


def test_nan_is_never_right(folder: Path) -> None:
    model = tiny.model(context=200)
    with torch.no_grad():
        model.module.lm_head.weight.fill_(math.nan)
    choice, last, text, odd = ours(model, folder, "choice", "last", "text", "odd")
    assert [figure.value for figure in choice.figures.values()] == [0, 0]
    assert last.figures["acc"].value == 0
    assert math.isnan(last.figures["perplexity"].value)
    assert all(math.isnan(figure.value) for figure in text.figures.values())
    assert math.isnan(odd.figures["brier_score"].value)


def test_repeated_answers(folder: Path) -> None:
    (folder / "count.py").write_text(
        "def results(doc, replies):\n    return {'count': len(replies[0])}\n"
    )
    for name, how in (("drawn", "do_sample: true, temperature: 1.5"), ("greedy", "temperature: 0")):
        write_task(
            folder,
            name,
            f"""
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
repeats: 3
generation_kwargs: {{until: ["#"], max_gen_toks: 4, {how}}}
filter_list: [{{name: all, filter: [{{function: take_first_k, k: 3}}]}}]
process_results: !function count.results
metric_list: [{{metric: count, aggregation: mean, higher_is_better: true}}]
""",
        )
    drawn, greedy = ours(tiny.model(context=200), folder, "drawn", "greedy", limit=3)
    for sample, replies in zip(drawn.samples, drawn.replies, strict=True):
        assert [(r.temperature, r.draw) for r in sample.requests] == [(1.5, 0), (1.5, 1), (1.5, 2)]
        assert len({reply.text for reply in replies}) > 1
    assert all(len(sample.requests) == 1 for sample in greedy.samples)  # all are the same
    assert drawn.figures["count,all"].value == greedy.figures["count,all"].value == 3


def test_a_tag_gives_its_tasks_and_a_group_its_members(folder: Path) -> None:
    for name in "ab":
        write_task(folder, f"of_tag_{name}", CHOICE + METRICS + "tag: tiny_tag\n")
    options = EvaluationOptions(include_path=folder)
    names = [p.task.name for p in prepare(["harness:tiny_tag", "harness:tiny_text"], options)]
    assert names == ["harness:tiny_of_tag_a", "harness:tiny_of_tag_b", "harness:tiny_text"]


def test_the_harnesss_own_files_are_read_only_where_they_are_needed(folder: Path) -> None:
    asked = []

    class Manager:
        def __init__(self, include_path: str | None = None, include_defaults: bool = True) -> None:
            asked.append((include_path, include_defaults))
            kinds = {"a": "TASK", "g": "GROUP"} if not include_defaults else {}
            self.task_index = {name: Entry(kind) for name, kind in kinds.items()}

    class Entry:
        def __init__(self, kind: str) -> None:
            self.kind = type("Kind", (), {"name": kind})

    path = str(folder)
    for wanted, expected in (
        (["a"], [(path, False)]),
        (["a", "b"], [(path, False), (path, True)]),
        (["g"], [(path, False), (path, True)]),
    ):
        asked.clear()
        harness._manager(Manager, wanted, folder)
        assert asked == expected
    asked.clear()
    harness._manager(Manager, ["a"], None)
    assert asked == [(None, True)]


# Refusals


def fails(folder: Path, name: str, **about: Any) -> str:
    with pytest.raises(TaskvecError) as caught:
        ours(tiny.model(template=None), folder, name, **about)
    assert type(caught.value) in (UsageError, DataError)
    return str(caught.value)


def test_unknown_tasks(folder: Path) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with pytest.raises(UsageError) as caught:
        harness._check(manager, "tiny_choise", False)
    assert str(caught.value) == (
        "lm-evaluation-harness has no task 'harness:tiny_choise'; "
        "did you mean 'harness:tiny_choice'?"
    )
    with pytest.raises(UsageError, match="'harness:zzz!'; `lm_eval ls tasks` lists them"):
        harness._check(manager, "zzz!", False)
    with pytest.raises(UsageError, match="--include-path /nowhere: no such folder"):
        ours(tiny.model(), Path("/nowhere"), "choice")
    with pytest.raises(UsageError, match="task 'harness:tiny_text' is named twice"):
        ours(tiny.model(), folder, "text", "text")


def test_data_that_are_not_there(folder: Path) -> None:
    (folder / "gone.yaml").write_text(
        "task: tiny_gone\ndataset_path: nobody/nothing\ntest_split: test\n" + CHOICE
    )
    text = fails(folder, "gone")
    assert text.startswith("task 'harness:tiny_gone' cannot be loaded: ")
    assert text.endswith(
        "; its data must be in the cache of datasets, or in local files that a task file in "
        "--include-path names"
    )
    assert "\n" not in text


def test_tasks_that_run_programs(folder: Path) -> None:
    write_task(folder, "runs", "unsafe_code: true" + CHOICE + METRICS)
    assert fails(folder, "runs") == (
        "task 'harness:tiny_runs' runs programs that the model writes, without our guards; allow "
        "that with --allow-code-execution and HF_ALLOW_CODE_EVAL=1, or take a task of our own"
    )
    assert ours(tiny.model(context=200), folder, "runs", tools=Tools(allow_code_execution=True))


def test_what_a_task_or_a_model_cannot_do(folder: Path) -> None:
    assert fails(folder, "choice", apply_chat_template=True) == (
        "task 'harness:tiny_choice' asks in conversations; tiny has no chat template"
    )
    write_task(folder, "zero", CHOICE + METRICS + "num_fewshot: 0\n")
    assert fails(folder, "zero", shots=1) == (
        "task 'harness:tiny_zero' takes no worked examples; leave out --shots"
    )
    assert "task 'harness:tiny_choice': its samples cannot be made: ValueError" in fails(
        folder, "choice", shots=12
    )
    for kwargs, expected in (
        ("{until: ['.'], num_beams: 4}", "generates with num_beams = 4, which is not done"),
        ("{until: ['.'], do_sample: true, top_p: 0.9}", "generates with top_p = 0.9"),
        ("{until: ['.'], typical: 2}", "generates with typical = 2"),
    ):
        beams = TASKS["answer"].replace(
            '{until: ["\\n", "gate"], max_gen_toks: 6, do_sample: false, top_p: 0.9}', kwargs
        )
        write_task(folder, "beams", beams)
        assert expected in fails(folder, "beams")


def test_a_metric_that_fails_says_so(folder: Path) -> None:
    (folder / "broken.py").write_text("def agg(items):\n    raise KeyError('no such thing')\n")
    write_task(
        folder,
        "broken",
        CHOICE
        + "metric_list: [{metric: acc, aggregation: !function broken.agg, higher_is_better: true}]",
    )
    with pytest.raises(DataError, match="'harness:tiny_broken': cannot be scored: KeyError"):
        ours(tiny.model(context=200), folder, "broken")


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MissingExtraError, match=r"lm_eval is not installed.*taskvec\[harness\]"):
        prepare(["harness:arc_easy"], EvaluationOptions())


# On the command line


def test_eval_asks_the_harnesss_tasks(
    cli: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path
) -> None:
    code, out, err = cli(
        "eval", zoo.path("math"), "--tasks", "harness:tiny_choice", "--include-path", folder,
        "--limit", 5, "--out", tmp_path, "--json", "--quiet", "--apply-chat-template",
    )  # fmt: skip
    assert (code, err) == (0, "")
    (row,) = json.loads(out)["tasks"]["harness:tiny_choice"]
    assert row["n"] == 5
    assert row["apply_chat_template"] is True
    assert set(row["figures"]) == {"acc", "acc_norm"}
    assert "lm_eval" in json.loads(out)["versions"]
