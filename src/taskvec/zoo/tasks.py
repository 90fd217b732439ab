"""The zoo's skills as tasks: `zoo:math`, `zoo:refusal` …, and `zoo:text` for plain text.

They are registered by an entry point, like those of any other distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

from taskvec.evaluation.evaluate import (
    EvaluationOptions,
    Result,
    TaskSamples,
    evaluate_with,
    prepare,
)
from taskvec.evaluation.task import (
    Metric,
    Replies,
    RowsByRole,
    Sample,
    SampleSettings,
    Score,
    Task,
    each,
)
from taskvec.evaluation.tasks.shared import refuse_shots
from taskvec.running.model import Model
from taskvec.running.requests import Answer, Likelihood, Prompt, WholeText
from taskvec.zoo.skills import SKILLS, TEST_SEED, Example, Skill, held_out_text

QUESTIONS = 150  # of every skill
SENTENCES = 100
ANSWER_TOKENS = 40  # more than the longest answer has


def _task(skill: Skill) -> Task:
    def samples(rows: RowsByRole, settings: SampleSettings) -> list[Sample]:
        refuse_shots(f"zoo:{skill.name}", settings)
        return [
            Sample(
                str(number),
                (Prompt(example.prompt, ANSWER_TOKENS, stop=("\n",)),),
                {"answer": example.answer},
            )
            for number, example in enumerate(skill.test(QUESTIONS, TEST_SEED + settings.seed))
        ]

    def score(sample: Sample, replies: Replies) -> Score:
        (request,), (reply,) = sample.requests, replies
        assert isinstance(request, Prompt)
        assert isinstance(reply, Answer)
        example = Example(str(request.text), sample.reference["answer"])
        return Score({"accuracy": float(skill.check(example, reply.text))})

    return Task(
        name=f"zoo:{skill.name}",
        summary=skill.summary,
        files=(),
        samples=samples,
        score=each(score),
        metrics=(Metric("accuracy"),),
        source="taskvec.zoo.skills",
    )


def _text(rows: RowsByRole, settings: SampleSettings) -> list[Sample]:
    refuse_shots("zoo:text", settings)
    texts = held_out_text(SENTENCES, TEST_SEED + settings.seed)
    return [Sample(str(number), (WholeText(text),)) for number, text in enumerate(texts)]


def _nll(sample: Sample, replies: Replies) -> Score:
    (reply,) = replies
    assert isinstance(reply, Likelihood)
    return Score({"nll": -reply.log_likelihood, "characters": reply.tokens})


TASKS: Sequence[Task] = (
    *(_task(skill) for skill in SKILLS.values()),
    Task(
        name="zoo:text",
        summary="perplexity per character of plain text",
        files=(),
        samples=_text,
        score=each(_nll),
        metrics=(
            Metric(
                "perplexity",
                "perplexity",
                higher_is_better=False,
                value="nll",
                per="characters",
            ),
        ),
        source="taskvec.zoo.words",
    ),
)


def score_skills(
    model: Model, skills: Sequence[str], n: int = SENTENCES, *, seed: int = 0
) -> dict[str, Result]:
    """Results of a model in skills, by skill.

    Args:
        model: A member of the zoo, or a merge of some.
        skills: Names of skills, or `text`.
        n: Questions of each skill, 1 to 150; those of a smaller n are among those of a larger.
        seed: Selects the questions. Use another seed to choose something by its score, so that the
            reported numbers come from other questions.

    Raises:
        UsageError: the skill is unknown.
    """
    options = EvaluationOptions(settings=SampleSettings(seed=seed))
    prepared = [
        TaskSamples(each.task, each.samples[:n], each.available)
        for each in prepare([f"zoo:{skill}" for skill in skills], options)
    ]
    where = model.encoder.where
    results = evaluate_with(lambda: model, model.encoder, prepared, options, where=where)
    return dict(zip(skills, results, strict=True))
