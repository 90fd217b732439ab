"""Heads: against NumPy, transformers' own logits, scikit-learn and open_clip."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.foreign_models import in_process

from taskvec import zoo
from taskvec.errors import DataError, ParameterError, UsageError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from taskvec.training.heads import (  # noqa: E402
    Classifier,
    ImageTower,
    answer_head,
    linear_probe,
    pool_features,
    zero_shot_head,
)
from taskvec.training.linearised import Linearised  # noqa: E402

TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "vocab_size": 64, "max_position_embeddings": 20}  # fmt: skip
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
          "intermediate_size": 24, "image_size": 16, "patch_size": 8}  # fmt: skip
CLASSES = ("cat", "dog", "ox")
END = 63


def tokenize(texts: list[str], **kwargs: Any) -> Any:
    """A letter is a token; CLIP reads its text at the token with the largest number."""
    rows = [[*(ord(c) % 60 for c in text), END] for text in texts]
    if "return_tensors" not in kwargs:
        return {"input_ids": rows}
    longest = max(map(len, rows))
    width = max(longest, kwargs["max_length"]) if kwargs["padding"] == "max_length" else longest
    padded = [row + [0] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    found = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
    return transformers.BatchEncoding(found)


def clip(kind: str = "CLIP") -> Any:
    torch.manual_seed(0)
    text = TEXT | ({"eos_token_id": END, "bos_token_id": 1, "pad_token_id": 0})
    if kind == "Siglip":
        config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    else:
        config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    module = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():  # as large as trained ones, so that classes differ
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
        if kind == "Siglip":
            module.logit_bias.fill_(-3.0)
    return module


def images(count: int = 4) -> Any:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_zero_shot_with_one_template_is_the_model_itself(kind: str) -> None:
    model = clip(kind)
    head = zero_shot_head(model, tokenize, CLASSES, ["a {}."])
    found = Classifier(ImageTower(model), head, "embed")(pixel_values=images())
    padding = "max_length" if kind == "Siglip" else True
    texts = [f"a {name}." for name in CLASSES]
    batch = tokenize(texts, return_tensors="pt", padding=padding, max_length=20)
    with torch.no_grad():
        wanted = model(pixel_values=images(), **batch).logits_per_image
    assert wanted.std() > 0.1
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-5, atol=1e-5)


def test_zero_shot_averages_as_numpy_does() -> None:
    model = clip()
    head = zero_shot_head(model, tokenize, CLASSES, ["a {}.", "{}, a pet", "no {}"])
    rows = []
    for name in CLASSES:
        unit = []
        for text in (f"a {name}.", f"{name}, a pet", f"no {name}"):
            batch = tokenize([text], return_tensors="pt", padding=True)
            with torch.no_grad():
                output = model.get_text_features(**batch)
            vector = getattr(output, "pooler_output", output)[0].numpy().astype(np.float64)
            unit.append(vector / np.linalg.norm(vector))
        mean = np.mean(unit, axis=0)
        rows.append(np.exp(model.logit_scale.item()) * mean / np.linalg.norm(mean))
    np.testing.assert_allclose(head.weight.numpy(), rows, rtol=2e-5, atol=1e-5)
    assert head.bias is None
    assert not head.weight.requires_grad


def test_zero_shot_keeps_modes_and_draws_nothing() -> None:
    model = clip().train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = zero_shot_head(model, tokenize, CLASSES)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(zero_shot_head(model, tokenize, CLASSES).weight, first.weight)


@pytest.mark.parametrize(
    ("classes", "templates", "message"),
    [
        ([], ["{}"], "class_names: none is given; give at least one"),
        (CLASSES, [], "templates: none is given; give at least one"),
        (CLASSES, ["a cat"], "templates: 'a cat' has no {} for the name of a class"),
    ],
)
def test_zero_shot_refuses(classes: Any, templates: Any, message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        zero_shot_head(clip(), tokenize, classes, templates)
    assert str(caught.value) == message


def test_zero_shot_text_that_is_too_long() -> None:
    with pytest.raises(DataError) as caught:
        zero_shot_head(clip(), tokenize, ["cat", "hippopotamus"], ["a young {}"])
    assert str(caught.value) == (
        "text 'a young hippopotamus' has 21 tokens; the tower for texts takes 20"
    )


def test_model_without_towers() -> None:
    module = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError) as caught:
        zero_shot_head(module, tokenize, CLASSES)
    assert str(caught.value) == (
        "Linear has no tower for texts; give CLIP or SigLIP of transformers, or a model of "
        "open_clip"
    )
    with pytest.raises(UsageError) as caught:
        ImageTower(module)
    assert str(caught.value) == (
        "Linear has no tower for images (vision_model or visual); give CLIP or SigLIP of "
        "transformers, or a model of open_clip"
    )


def test_tower_has_the_names_of_the_model() -> None:
    model = clip()
    own, tower = dict(model.named_parameters()), dict(ImageTower(model).named_parameters())
    assert tower
    assert all(own[name] is parameter for name, parameter in tower.items())
    rest = {name.split(".")[0] for name in own if name not in tower}
    assert rest == {"logit_scale", "text_model", "text_projection"}


def test_linearised_tower_starts_as_the_tower() -> None:
    model = clip()
    head = zero_shot_head(model, tokenize, CLASSES)
    wanted = Classifier(ImageTower(model), head, "embed")(pixel_values=images())
    tower = ImageTower(model)
    names = [name for name, _ in tower.named_parameters() if "self_attn" in name]
    linear = Classifier(Linearised(tower, names), head, "embed")
    found = linear(pixel_values=images())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert {n for n, p in linear.named_parameters() if p.grad is not None} == {
        f"backbone.tau.{place}" for place in range(len(names))
    }


OPEN_CLIP = """
from torch.nn.functional import normalize
from taskvec.training.heads import Classifier, ImageTower, zero_shot_head

def tokenize(texts):
    rows = [[1, *(2 + ord(c) % 20 for c in text[:5]), 31] for text in texts]
    return torch.tensor([row + [0] * (8 - len(row)) for row in rows])

def compared(model):
    model, images = model.eval(), torch.randn(3, 3, 28, 28)
    head = zero_shot_head(model, tokenize, ["cat", "dog"], ["{}s", "a {}"])
    tower = ImageTower(model)
    rows = []
    with torch.no_grad():
        for name in ("cat", "dog"):
            each = model.encode_text(tokenize([f"{name}s", f"a {name}"]), normalize=True)
            rows.append(normalize(each.mean(0), dim=0))
        wanted = model.logit_scale.exp() * model.encode_image(images, normalize=True)
        wanted = wanted @ torch.stack(rows).T
        if model.logit_bias is not None:
            wanted = wanted + model.logit_bias
        found = Classifier(tower, head, "embed")(images)
    own = dict(model.named_parameters())
    same = all(own[name] is parameter for name, parameter in tower.named_parameters())
    return {"found": found.tolist(), "wanted": wanted.tolist(), "same": same}

known = models()
print(json.dumps({name: compared(known[name]) for name in ("open_clip", "open_clip-coca")}))
"""


def test_models_of_open_clip() -> None:
    for found in in_process(OPEN_CLIP).values():
        np.testing.assert_allclose(found["found"], found["wanted"], rtol=1e-5, atol=1e-5)
        assert np.std(found["wanted"]) > 0.1
        assert found["same"]


def blobs(seed: int, count: int = 90) -> tuple[Any, Any]:
    """Three classes that overlap, in five dimensions of unlike size, and one that is constant."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    x = rng.normal(size=(count, 6)) + labels[:, None] * [1.0, -0.5, 0.2, 0, 0, 0]
    x = x * [1, 10, 0.1, 3, 1, 0] + [0, 5, 0, -2, 0, 7]
    return torch.tensor(x), torch.tensor(labels)


def test_probe_is_logistic_regression() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = blobs(0)
    probe = linear_probe(x, y, l2=0.02)
    scaled = x.numpy()[:, :5]
    scaled = (scaled - scaled.mean(0)) / scaled.std(0)
    peer = linear_model.LogisticRegression(C=1 / (90 * 0.02), tol=1e-10, max_iter=1000)
    wanted = peer.fit(scaled, y.numpy()).predict_log_proba(scaled)
    found = probe(x.float()).log_softmax(-1)
    np.testing.assert_allclose(found.numpy(), wanted, atol=2e-5)
    assert not any(parameter.requires_grad for parameter in probe.parameters())


@pytest.mark.parametrize("deviation", [1e-9, 1e-32])
def test_probe_leaves_dead_features_alone(deviation: float) -> None:
    """As some models have; a weight of 1/deviation would make gradients of that size."""
    x, y = blobs(0)
    dead = torch.randn(len(x), 2, generator=torch.Generator().manual_seed(0)) * deviation
    with_dead = linear_probe(torch.cat([x, dead.double()], 1), y)
    assert with_dead.weight[:, 6:].abs().max() < 1e-6
    torch.testing.assert_close(with_dead.weight[:, :6], linear_probe(x, y).weight)


def test_probe_is_at_the_optimum() -> None:
    """The gradient of the written-out objective is zero there, in NumPy."""
    x, y = blobs(1)
    probe = linear_probe(x, y, l2=0.1)
    x, y = x.numpy(), y.numpy()
    scale = np.where(x.std(0) > 1e-9, x.std(0), 1)
    weight = probe.weight.numpy().astype(np.float64) * scale
    logits = x @ probe.weight.numpy().T.astype(np.float64) + probe.bias.numpy()
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    error = (p - np.eye(3)[y]) / len(y)
    standard = (x - x.mean(0)) / scale
    np.testing.assert_allclose(error.T @ standard + 0.1 * weight, 0, atol=1e-6)
    np.testing.assert_allclose(error.sum(0), 0, atol=1e-6)
    assert np.mean(logits.argmax(1) == y) > 0.6


def test_probe_is_the_same_each_time_and_draws_nothing() -> None:
    x, y = blobs(2)
    state = torch.get_rng_state()
    first, second = linear_probe(x, y), linear_probe(x.requires_grad_(), y)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert linear_probe(x, y, classes=5).weight.shape == (5, 6)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (torch.ones(3), [0, 1, 1], {}, "features have shape [3] and labels [3]; expected "
         "(examples, dimensions) and (examples,)"),
        (torch.ones(3, 2), [0, 1], {}, "features have shape [3, 2] and labels [2]; expected "
         "(examples, dimensions) and (examples,)"),
        (torch.tensor([[1.0], [float("nan")]]), [0, 1], {}, "features of example 1 are not finite"),
        (torch.ones(2, 1), [0, 4], {"classes": 3}, "labels are 0 to 4; expected 0 to 2"),
        (torch.ones(2, 1), [0, -1], {}, "labels are -1 to 0; expected 0 to 0"),
        (torch.ones(2, 1), [0, 0], {}, "labels: all are 0; a probe needs at least two classes"),
    ],
)  # fmt: skip
def test_probe_refuses_data(x: Any, y: list[int], options: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        linear_probe(x, torch.tensor(y), **options)
    assert str(caught.value) == message


def test_probe_without_penalty_is_refused() -> None:
    with pytest.raises(ParameterError) as caught:
        linear_probe(*blobs(0), l2=0)
    assert str(caught.value) == (
        "l2: got 0, expected above 0, or separable classes have no optimum"
    )


def test_pools_as_numpy_does() -> None:
    states = torch.arange(24.0).reshape(2, 4, 3)
    right = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    left = right.flip(1)
    x = states.numpy()
    output = transformers.modeling_outputs.BaseModelOutputWithPooling(
        last_hidden_state=states, pooler_output=states[:, 2]
    )
    for given in (output, states):
        assert pool_features(given, "cls").tolist() == x[:, 0].tolist()
        assert pool_features(given, "last").tolist() == x[:, 3].tolist()
        assert pool_features(given, "last", right).tolist() == [x[0, 3].tolist(), x[1, 1].tolist()]
        assert pool_features(given, "last", left).tolist() == x[:, 3].tolist()
        assert pool_features(given, "mean").tolist() == x.mean(1).tolist()
        means = [x[0].mean(0).tolist(), x[1, :2].mean(0).tolist()]
        assert pool_features(given, "mean", right).tolist() == means
    assert pool_features(output, "pooler").tolist() == x[:, 2].tolist()
    np.testing.assert_allclose(
        pool_features(states[:, 0], "embed").numpy(),
        x[:, 0] / np.linalg.norm(x[:, 0], axis=1, keepdims=True),
        rtol=1e-6,
    )


def test_pool_that_there_is_not() -> None:
    with pytest.raises(ParameterError) as caught:
        Classifier(torch.nn.Identity(), torch.nn.Identity(), "pooller")
    assert str(caught.value) == "pool: got 'pooller'; did you mean 'pooler'?"
    output = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=torch.ones(1, 2, 3))
    with pytest.raises(UsageError) as caught:
        pool_features(output, "pooler")
    assert str(caught.value) == (
        "pool 'pooler': needs pooler_output, with 2 dimensions; the backbone gives "
        "last_hidden_state; choose another of cls, mean, last, pooler, embed"
    )
    with pytest.raises(UsageError) as caught:
        pool_features(torch.ones(2, 3), "cls")
    assert str(caught.value) == (
        "pool 'cls': needs last_hidden_state or logits, with 3 dimensions; the backbone gives a "
        "tensor of shape [2, 3]; choose another of cls, mean, last, pooler, embed"
    )


def test_classifier_trains_its_backbone_only() -> None:
    torch.manual_seed(0)
    backbone = transformers.Dinov2Model(transformers.Dinov2Config(**VISION)).eval()
    with torch.no_grad():
        x = pool_features(backbone(pixel_values=images(12)), "cls")
    labels = torch.arange(12) % 3
    classifier = Classifier(backbone, linear_probe(x, labels), "cls")
    torch.testing.assert_close(classifier.features(pixel_values=images(12)), x)
    logits = classifier(pixel_values=images(12))
    torch.testing.assert_close(logits, classifier.head(x))
    torch.nn.functional.cross_entropy(logits, labels).backward()
    grads = {n: p.grad is not None for n, p in classifier.named_parameters()}
    assert not grads["head.weight"]
    assert grads["backbone.layernorm.weight"]


@pytest.mark.parametrize("linear", [False, True], ids=["model", "linearised"])
def test_answers_of_a_language_model(linear: bool) -> None:
    folder = zoo.path("base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    head = answer_head(tokenizer, ["1", "2", "7"])
    texts = ["1+1=", "10+12="]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }
    with torch.no_grad():
        backbone = Linearised(model, ["model.norm.weight"]) if linear else model
        found = Classifier(backbone, head, "last")(**batch)
        wanted = []
        for row in rows:
            logits = model(input_ids=torch.tensor([row])).logits[0, -1]
            wanted.append([logits[tokenizer.convert_tokens_to_ids(a)].item() for a in "127"])
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "answers: none is given; give one for each class"),
        (["a", "bc"], "answers: 'bc' is 2 tokens, expected one; ask so that one token answers, "
         "such as a letter"),
        (["a", "b", "a"], "answers: 'a' and 'a' are the same token"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be(answers: list[str], message: str) -> None:
    def letters(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}

    with pytest.raises(ParameterError) as caught:
        answer_head(letters, answers)
    assert str(caught.value) == message


def test_language_model_keeps_no_cache() -> None:
    asked = {}

    class Backbone(torch.nn.Module):
        config = SimpleNamespace(use_cache=True)

        def forward(self, **kwargs: Any) -> Any:
            asked.update(kwargs)
            return torch.ones(1, 2, 3)

    Classifier(Backbone(), torch.nn.Identity(), "last")(input_ids=torch.ones(1, 2))
    assert asked["use_cache"] is False
