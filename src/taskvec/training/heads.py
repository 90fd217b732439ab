"""Heads: from what a backbone gives to the logits of classes. They are frozen.

```text
zero-shot    W_c = s · n(mean over templates of n(text(template of c))),    logits = W n(image(x))
probe        W, b = argmin mean cross-entropy + l2/2 · ‖W‖²,                logits = W h(x) + b
answers      logits of the language model at the last token, of the tokens that are the classes
```

n(v) = v/‖v‖, and s is CLIP's logit scale. Source of the zero-shot head: Learning Transferable
Visual Models From Natural Language Supervision, arXiv:2103.00020, section 3.1.

A frozen head makes all that is learned go into the backbone, so that a task vector has only names
that every other task's has too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from taskvec.errors import DataError, ParameterError, UsageError, nearest
from taskvec.running.model import preserve_modes

POOLS: Final = ("cls", "mean", "last", "pooler", "embed")
TEMPLATES: Final = ("a photo of a {}.",)
DEAD: Final = 1e-6  # of a feature's largest value, or of the largest deviation, counts as constant


class Classifier(nn.Module):
    """Logits of classes: head(pooled(backbone(inputs))).

    It takes the arguments of the backbone. The backbone may be linearised: pooling and head
    are linear, so the logits are too, except for `embed`, which normalizes.

    Attributes:
        backbone: Any module; the selection decides which of its parameters train.
        head: Frozen.
        pool: One of `POOLS`; see `pooled`.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, pool: str) -> None:
        super().__init__()
        _check_pool(pool)
        self.backbone = backbone
        self.head = head.requires_grad_(False)
        self.pool = pool

    def features(self, *args: Any, **kwargs: Any) -> Tensor:
        """The input of the head; shape (batch, dimensions)."""
        if getattr(getattr(self.backbone, "config", None), "use_cache", False):
            kwargs.setdefault("use_cache", False)
        output = self.backbone(*args, **kwargs)
        return pool_features(output, self.pool, kwargs.get("attention_mask"))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits; shape (batch, classes)."""
        logits: Tensor = self.head(self.features(*args, **kwargs))
        return logits


class ImageTower(nn.Module):
    """Images to embeddings, by a model that has a tower for images and one for texts.

    Its parameters are the model's own, and named as in it, so that their task vector is the
    model's. The projection into the common space is among them; the tower for texts is not.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take the tower out of CLIP or SigLIP of transformers, or of a model of open_clip.

        Raises:
            UsageError: the model has none.
        """
        super().__init__()
        parts = dict(model.named_children())
        own = [name for name in ("vision_model", "visual_projection", "visual") if name in parts]
        if not own:
            raise UsageError(
                f"{type(model).__name__} has no tower for images (vision_model or visual); give "
                "CLIP or SigLIP of transformers, or a model of open_clip"
            )
        for name in own:
            self.add_module(name, parts[name])

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Embeddings, not normalised; shape (batch, dimensions).

        Args:
            pixel_values: Shape (batch, channels, height, width).
            **kwargs: For a tower of transformers.
        """
        parts = dict(self.named_children())
        if "visual" in parts:
            found = parts["visual"](pixel_values)
            embedding: Tensor = found[0] if isinstance(found, tuple) else found
            return embedding
        embedding = parts["vision_model"](pixel_values=pixel_values, **kwargs).pooler_output
        projection = parts.get("visual_projection", nn.Identity())
        return projection(embedding)  # type: ignore[no-any-return]


class AnswerHead(nn.Module):
    """Tokens of a vocabulary as classes."""

    ids: Tensor

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("ids", torch.tensor(list(ids)))

    def forward(self, logits: Tensor) -> Tensor:
        """Logits of the classes, from those of the vocabulary in the last dimension."""
        return logits[..., self.ids]


def pool_features(output: Any, pool: str, attention_mask: Tensor | None = None) -> Tensor:
    """One vector for each example, from the output of a backbone.

    - `cls`: the first token's; `last`: the last token's that is not padding; `mean`: the mean over
      those. A language model that gives no hidden states has its logits pooled.
    - `pooler`: the model's own pooler.
    - `embed`: the embedding in the space of images and texts, normalised to length 1.

    Args:
        output: A `ModelOutput` of transformers, or a tensor: of shape (batch, tokens, dimensions),
            or, for `pooler` and `embed`, (batch, dimensions).
        pool: One of `POOLS`.
        attention_mask: 1 for tokens, 0 for padding; shape (batch, tokens). None: no padding.

    Raises:
        ParameterError: `pool` is not one of `POOLS`.
        UsageError: the output has nothing that can be pooled so.
    """
    _check_pool(pool)
    if pool in ("pooler", "embed"):
        embedding = _field(output, pool, ("pooler_output" if pool == "pooler" else "image_embeds",))
        return embedding if pool == "pooler" else functional.normalize(embedding, dim=-1)
    states = _field(output, pool, ("last_hidden_state", "logits"))
    if pool == "cls":
        return states[:, 0]
    if attention_mask is None:
        return states[:, -1] if pool == "last" else states.mean(1)
    if pool == "last":
        places = torch.arange(states.shape[1], device=states.device)
        last = (attention_mask * places).argmax(-1)
        return states[torch.arange(len(states), device=states.device), last]
    mask = attention_mask.to(states.dtype).unsqueeze(-1)
    return (states * mask).sum(1) / mask.sum(1)


def _field(output: Any, pool: str, names: tuple[str, ...]) -> Tensor:
    """The part of an output that is pooled: the first of the names, or the output itself."""
    ndim = 3 if len(names) == 2 else 2
    is_tensor = isinstance(output, Tensor)
    found = output if is_tensor else next((output[name] for name in names if name in output), None)
    if found is None or found.ndim != ndim:
        given = f"a tensor of shape {list(output.shape)}" if is_tensor else ", ".join(output)
        raise UsageError(
            f"pool {pool!r}: needs {' or '.join(names)}, with {ndim} dimensions; the backbone "
            f"gives {given}; choose another of {', '.join(POOLS)}"
        )
    tensor: Tensor = found
    return tensor


def _check_pool(pool: str) -> None:
    if pool not in POOLS:
        raise ParameterError(f"pool: got {pool!r}; {nearest(pool, POOLS)}")


@torch.no_grad()
def zero_shot_head(
    model: Any,
    tokenizer: Any,
    class_names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
) -> nn.Linear:
    """A head for normalised image embeddings (pool `embed`) from the names of classes.

    Args:
        model: CLIP or SigLIP of transformers, or a model of open_clip: anything with `encode_text`.
        tokenizer: Its tokenizer.
        class_names: As they stand in a sentence.
        templates: Sentences with `{}` where the name goes; their embeddings are averaged.

    Returns:
        Frozen, float32, with a bias only if the model has one (SigLIP's is the same for all).

    Raises:
        ParameterError: classes or templates are empty, or a template has no `{}`.
        UsageError: the model has no tower for texts.
        DataError: a text is longer than the tower takes.
    """
    if not class_names or not templates:
        what = "class_names" if not class_names else "templates"
        raise ParameterError(f"{what}: none is given; give at least one")
    for template in templates:
        if "{}" not in template:
            raise ParameterError(f"templates: {template!r} has no {{}} for the name of a class")
    if not hasattr(model, "encode_text") and not hasattr(model, "get_text_features"):
        raise UsageError(
            f"{type(model).__name__} has no tower for texts; give CLIP or SigLIP of transformers, "
            "or a model of open_clip"
        )
    weights = []
    with preserve_modes(model):
        model.eval()
        for name in class_names:
            texts = [template.replace("{}", name) for template in templates]
            each = functional.normalize(_text_embeddings(model, tokenizer, texts).float(), dim=-1)
            weights.append(functional.normalize(each.mean(0), dim=0))
    weight = torch.stack(weights) * model.logit_scale.exp().float()
    bias = getattr(model, "logit_bias", None)
    return _frozen(weight, None if bias is None else bias.float().expand(len(weight)))


def _text_embeddings(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Embeddings of texts, not normalised; shape (texts, dimensions)."""
    device = model.logit_scale.device
    if hasattr(model, "encode_text"):
        found: Tensor = model.encode_text(tokenizer(texts).to(device))
        return found
    config = model.config.text_config
    # SigLIP reads its last position, and was trained with padding up to it.
    limit = config.max_position_embeddings
    filled = {"padding": "max_length", "max_length": limit}
    padding = filled if "siglip" in config.model_type else {"padding": True}
    batch = tokenizer(texts, **padding, return_tensors="pt").to(device)
    if batch["input_ids"].shape[1] > limit:
        lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
        longest = lengths.index(max(lengths))
        raise DataError(
            f"text {texts[longest]!r} has {max(lengths)} tokens; the tower for texts takes {limit}"
        )
    output = model.get_text_features(**batch)
    embeddings: Tensor = getattr(output, "pooler_output", output)  # a tensor before transformers 5
    return embeddings


def linear_probe(
    features: Tensor, labels: Tensor, *, classes: int | None = None, l2: float = 1e-3
) -> nn.Linear:
    """Logistic regression on frozen features.

    It minimises mean cross-entropy + l2/2 · ‖W‖² over features brought to mean 0 and deviation 1,
    which is folded into the weights afterwards. A feature whose deviation is at most `DEAD` of its
    largest value, or of the largest deviation of all, is left as it is and gets weights near 0
    (MiniLM-L6 has three, of deviation 2e-9 and less beside 0.3): brought to deviation 1 it would
    get weights of 1e8 and more, and fine-tuning would begin with gradients as large. This is
    convex, and solved by L-BFGS in float64 from zero, without drawing anything. Not ridge
    regression, whose closed form is faster: its outputs are near the labels, 0 and 1, so that the
    softmax of them is nearly uniform, and fine-tuning under such a frozen head would begin by
    stretching features.

    Args:
        features: Shape (examples, dimensions).
        labels: Classes, from 0, shape (examples,).
        classes: How many there are; None: one more than the largest label.
        l2: Weight of the penalty, above 0. scikit-learn's C is 1/(examples · l2).

    Returns:
        Frozen, float32, on the device of the features.

    Raises:
        ParameterError: `l2` is not above 0.
        DataError: shapes do not fit, a feature is not finite, or there are fewer than two classes.
    """
    if not l2 > 0:
        raise ParameterError(
            f"l2: got {l2}, expected above 0, or separable classes have no optimum"
        )
    labels = labels.to(features.device)
    classes = _check_data(features, labels, classes)
    x = features.detach().double()
    mean, deviation = x.mean(0), x.std(0, correction=0)
    dead = deviation <= DEAD * torch.maximum(x.abs().amax(0), deviation.max())
    deviation[dead] = 1.0
    x = (x - mean) / deviation
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=1000,
        history_size=20,
        tolerance_grad=1e-8,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = functional.cross_entropy(x @ weight.T + bias, labels)
        loss = loss + l2 / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        folded = weight / deviation
        return _frozen(folded.float(), (bias - folded @ mean).float())


def _check_data(features: Tensor, labels: Tensor, classes: int | None) -> int:
    """The number of classes."""
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(features):
        raise DataError(
            f"features have shape {list(features.shape)} and labels {list(labels.shape)}; expected "
            "(examples, dimensions) and (examples,)"
        )
    finite = features.isfinite().all(1)
    if not finite.all():
        raise DataError(f"features of example {int(finite.int().argmin())} are not finite")
    least, most = int(labels.min()), int(labels.max())
    count = most + 1 if classes is None else classes
    if least < 0 or most >= count:
        raise DataError(f"labels are {least} to {most}; expected 0 to {count - 1}")
    if count < 2:
        raise DataError("labels: all are 0; a probe needs at least two classes")
    return count


def answer_head(tokenizer: Any, answers: Sequence[str]) -> AnswerHead:
    """A head for a causal language model (pool `last`): its answers as classes.

    Args:
        tokenizer: The model's.
        answers: As the model would write them, so mostly with a space in front; one token each.

    Raises:
        ParameterError: the list is empty, an answer is not one token, or two are the same.
    """
    if not answers:
        raise ParameterError("answers: none is given; give one for each class")
    ids: list[int] = []
    for answer in answers:
        found = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if len(found) != 1:
            raise ParameterError(
                f"answers: {answer!r} is {len(found)} tokens, expected one; ask so that "
                "one token answers, such as a letter"
            )
        if found[0] in ids:
            raise ParameterError(
                f"answers: {answer!r} and {answers[ids.index(found[0])]!r} are the same token"
            )
        ids.append(found[0])
    return AnswerHead(ids)


def _frozen(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    head = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, device="meta")
    head.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        head.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return head
