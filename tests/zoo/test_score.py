from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from taskvec.errors import UsageError  # noqa: E402
from taskvec.zoo import path, score, skills, train  # noqa: E402
from taskvec.zoo.score import Score  # noqa: E402


@pytest.fixture(scope="module")
def instruct():
    return score.load(path("instruct"))


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),  # Newcombe 1998, table I, method 3
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_interval_is_wilsons(correct, n, low, high):
    assert Score(correct, n).interval == pytest.approx((low, high), abs=5e-5)


def test_score_prints_its_counts():
    assert str(Score(93, 100)) == "0.93 (93/100)"


def test_scoring_repeats_itself_and_leaves_random_state_alone(instruct):
    before = torch.random.get_rng_state()
    score.load(path("instruct"))
    once = score.score(*instruct, "find", 30)
    assert once == score.score(*instruct, skills.SKILLS["find"], 30)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_batch_answers_like_each_prompt_alone(instruct):
    untrained = train.build_model(0).eval(), instruct[1]  # its answers hang on every token it sees
    prompts = [
        skills.SKILLS[name].test(3)[2].prompt for name in ("say", "find", "howto", "refusal")
    ]
    assert len({len(prompt) for prompt in prompts}) > 1
    alone = [score.answers(*untrained, [prompt])[0] for prompt in prompts]
    assert score.answers(*untrained, prompts) == alone


def test_answers_are_what_transformers_generates(instruct):
    model, tokenizer = instruct
    prompt = skills.SKILLS["howto"].test(1)[0].prompt
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    text = tokenizer.decode(
        model.generate(ids, max_new_tokens=40)[0, ids.shape[1] :], skip_special_tokens=True
    )
    assert score.answers(model, tokenizer, [prompt]) == [text]


def test_answers_end_at_the_line():
    said = [[4, 5, 6, 7], [4, 2, 5, 6]]
    letters = {4: "a", 5: "b", 6: "\n", 7: "c", 2: ""}

    class Parrot:
        """Says what it is told, whatever it reads."""

        step = -1

        def __call__(self, **_):
            self.step += 1
            logits = torch.zeros(2, 1, 8)
            for row, ids in enumerate(said):
                logits[row, 0, ids[self.step]] = 1
            return SimpleNamespace(logits=logits, past_key_values=None)

    class Letters:
        pad_token_id, eos_token_id = 0, 2

        def __call__(self, text):
            return {"input_ids": [1] * len(text)}

        def decode(self, ids, skip_special_tokens):
            assert skip_special_tokens
            return "".join(letters[i] for i in ids)

    assert score.answers(Parrot(), Letters(), ["x", "xyz"], max_new_tokens=4) == ["ab", "a"]


def test_perplexity_counts_characters(instruct):
    model, tokenizer = instruct
    texts = ["the red fox sees the old gate at noon.", "the shy hen."]
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            likelihood = model(ids).logits.log_softmax(-1)
        total -= sum(likelihood[0, i, ids[0, i + 1]].item() for i in range(len(text)))
        count += len(text)
    expected = torch.tensor(total / count).exp().item()
    assert score.perplexity(model, tokenizer, texts) == pytest.approx(expected, rel=1e-4)
    assert score.perplexity(model, tokenizer) < 2.5


def test_unknown_skill_is_told(instruct):
    with pytest.raises(UsageError, match="did you mean 'unsafe'"):
        score.score(*instruct, "unsave")
