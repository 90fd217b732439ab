import pytest

torch = pytest.importorskip("torch")

from taskvec.errors import UsageError  # noqa: E402
from taskvec.evaluation.task import SampleSettings  # noqa: E402
from taskvec.evaluation.tasks import task  # noqa: E402
from taskvec.running.model import load, open_stored  # noqa: E402
from taskvec.running.requests import Answer, Prompt  # noqa: E402
from taskvec.zoo import path, skills  # noqa: E402
from taskvec.zoo.tasks import TASKS, score_skills  # noqa: E402


@pytest.fixture(scope="module")
def instruct():
    return load(open_stored(path("instruct")))


def test_every_skill_is_a_task_that_is_found_by_its_name():
    assert [each.name for each in TASKS] == [
        *(f"zoo:{skill}" for skill in skills.SKILLS),
        "zoo:text",
    ]
    assert all(task(each.name) is each for each in TASKS)


def test_a_fewer_questions_are_the_first_of_more(instruct):
    few, many = (score_skills(instruct, ["find"], n)["find"] for n in (20, 30))
    assert few.samples == many.samples[:20]
    assert [s.values for s in few.scores] == [s.values for s in many.scores[:20]]


def test_another_seed_asks_other_questions(instruct):
    asked = [
        {r.text for s in task("zoo:say").samples({}, settings) for r in s.requests}
        for settings in (skills_settings(0), skills_settings(1))
    ]
    assert len(asked[0] & asked[1]) < 75


def skills_settings(seed):
    return SampleSettings(seed=seed)


def test_scores_are_what_the_skill_checks():
    (sample, *_) = task("zoo:math").samples({}, skills_settings(0))
    (request,) = sample.requests
    assert isinstance(request, Prompt)
    right = sample.reference["answer"]
    for text, value in ((right, 1.0), (f" {right} ", 1.0), (right + "0", 0.0), ("", 0.0)):
        (score,) = task("zoo:math").score([sample], [[Answer(text, 1, "end")]], None)
        assert score.values == {"accuracy": value}


def test_perplexity_counts_characters(instruct):
    found = score_skills(instruct, ["text"], 2)["text"]
    tokenizer, total, count = instruct.encoder.tokenizer, 0.0, 0
    for text in skills.held_out_text(2):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            likelihood = instruct.module(ids).logits.log_softmax(-1)
        total -= sum(likelihood[0, i, ids[0, i + 1]].item() for i in range(len(text)))
        count += len(text)
    assert sum(s.values["characters"] for s in found.scores) == count
    assert found.main.value == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)


def test_unknown_skill_is_told(instruct):
    with pytest.raises(UsageError, match="no task 'zoo:unsave'; did you mean 'zoo:unsafe'"):
        score_skills(instruct, ["unsave"])


@pytest.mark.parametrize("name", ["zoo:math", "zoo:text", "advbench", "prompts", "xstest"])
def test_what_takes_no_worked_examples_refuses_them(name):
    with pytest.raises(UsageError, match=f"task '{name}' takes no worked examples; got --shots 2"):
        task(name).samples({"test": []}, SampleSettings(shots=2))
