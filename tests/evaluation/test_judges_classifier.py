"""The judge that is a text-classification checkpoint, on tiny random models."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from taskvec.errors import CheckpointError, UsageError  # noqa: E402
from taskvec.evaluation.judges import parse_judge  # noqa: E402
from taskvec.evaluation.judges.classifier import ClassifierJudge  # noqa: E402
from taskvec.evaluation.judges.verdict import Verdict  # noqa: E402
from taskvec.running.model import find_device  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "how", "take", "two", "pillows", "no", "never", "ok"]
EXCHANGES = [
    ("how", "take two pillows"),
    ("how two", "no"),
    ("take pillows", "never never never ok"),
    ("pillows", ""),
] * 5  # more than a batch
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A folder with a tiny BERT for sequence classification, and a tokenizer of whole words."""

    def build(labels: list[str], longest: int | None = 16, pad: bool = True, **config: Any) -> Path:
        torch.manual_seed(4)
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=len(WORDS),
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=16,
                max_position_embeddings=18,
                id2label=dict(enumerate(labels)),
                label2id={label: i for i, label in enumerate(labels)},
                initializer_range=0.8,
                **config,
            )
        )
        model.save_pretrained(tmp_path / "model")
        vocabulary = {word: i for i, word in enumerate(WORDS)}
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        words.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=words,
            model_max_length=longest,
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            **({"pad_token": "[PAD]"} if pad else {}),
        ).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return build


def logits(folder: Path, first: str, second: str | None = None) -> np.ndarray[Any, Any]:
    """Of one text or pair, by itself, from ids that are worked out here."""

    def ids(text: str) -> list[int]:
        return [WORDS.index(word) for word in text.split()]

    one = [2, *ids(first), 3]
    two = [*ids(second), 3] if second is not None else []
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        out = model(
            input_ids=torch.tensor([one + two]),
            token_type_ids=torch.tensor([[0] * len(one) + [1] * len(two)]),
        ).logits
    return np.asarray(out[0].double().numpy())


def softmax(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.exp(x) / np.exp(x).sum()


def ps(verdicts: list[Verdict]) -> list[float]:
    assert all(verdict.score is not None for verdict in verdicts)
    return [(verdict.score - 1) / 4 for verdict in verdicts if verdict.score is not None]


@pytest.mark.parametrize("pad", [True, False])
def test_the_answer_alone_is_judged_by_the_softmax_of_its_label(make: Make, pad: bool) -> None:
    folder = make(["safe", "unsafe", "unclear"], pad=pad)
    verdicts = parse_judge(f"classifier:{folder}")(EXCHANGES)
    expected = [softmax(logits(folder, answer))[1] for _, answer in EXCHANGES]
    assert ps(verdicts) == pytest.approx(expected, abs=1e-5)
    assert [v.harmful for v in verdicts] == [p >= 0.5 for p in expected]
    assert len({round(p, 3) for p in expected}) > 2
    assert verdicts[0].reason == f"p(unsafe) = {expected[0]:.4f}"


def test_a_pair_is_question_and_answer(make: Make) -> None:
    folder = make(["safe", "unsafe"])
    verdicts = parse_judge(f"classifier:{folder}?input=pair")(EXCHANGES)
    expected = [softmax(logits(folder, q, a))[1] for q, a in EXCHANGES]
    assert ps(verdicts) == pytest.approx(expected, abs=1e-5)
    alone = ps(parse_judge(f"classifier:{folder}?input=answer")(EXCHANGES))
    assert ps(verdicts) != pytest.approx(alone, abs=1e-3)


def test_the_label_is_named_in_upper_or_lower_case(make: Make) -> None:
    folder = make(["Fine", "Awful"])
    first = parse_judge(f"classifier:{folder}:awful")
    other = parse_judge(f"classifier:{folder}:FINE")
    assert first.name == f"classifier:{folder}:Awful?input=answer"
    sums = [a + b for a, b in zip(ps(first(EXCHANGES)), ps(other(EXCHANGES)), strict=True)]
    assert sums == pytest.approx([1] * len(EXCHANGES))


@pytest.mark.parametrize(
    ("labels", "config"),
    [(["toxic"], {}), (["toxic", "rude"], {"problem_type": "multi_label_classification"})],
)
def test_labels_that_do_not_exclude_each_other_have_a_sigmoid(
    make: Make, labels: list[str], config: dict[str, str]
) -> None:
    folder = make(labels, **config)
    expected = [1 / (1 + math.exp(-logits(folder, answer)[0])) for _, answer in EXCHANGES]
    assert ps(parse_judge(f"classifier:{folder}")(EXCHANGES)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("longest", [16, None])
def test_long_answers_are_cut_to_what_the_model_takes(make: Make, longest: int | None) -> None:
    folder = make(["safe", "unsafe"], longest=longest)
    (verdict,) = parse_judge(f"classifier:{folder}")([("how", "no " * 14 + "pillows " * 50)])
    assert ps([verdict]) == pytest.approx([softmax(logits(folder, "no " * 14))[1]], abs=1e-5)


def test_no_number_is_no_verdict(make: Make) -> None:
    folder = make(["safe", "unsafe"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.bias[1] = math.nan
    model.save_pretrained(folder)
    (verdict,) = parse_judge(f"classifier:{folder}")([("q", "no")])
    assert verdict == Verdict(None, None, "no verdict: p(unsafe) is nan")


def test_progress_is_told(make: Make) -> None:
    done: list[int] = []
    parse_judge(f"classifier:{make(['safe', 'unsafe'])}")(EXCHANGES, advance=done.append)
    assert done == [16, 4]


# Mistakes


def error_of(kind: type[Exception], text: str) -> str:
    with pytest.raises(kind) as caught:
        parse_judge(text)
    return str(caught.value)


def test_a_device_is_found_before_anything_is_asked(make: Make) -> None:
    """`auto` is the default of the command line, and no name that torch knows."""
    folder = make(["safe", "unsafe"])
    judge = parse_judge(f"classifier:{folder}", device="auto")
    assert isinstance(judge, ClassifierJudge)
    assert judge.device == str(find_device("auto"))
    assert len(judge([("q", "a")])) == 1
    with pytest.raises(UsageError, match="there is no device 'gpu7'"):
        parse_judge(f"classifier:{folder}", device="gpu7")


def test_an_unknown_label_is_told_with_those_that_are_there(make: Make) -> None:
    folder = make(["good", "bad"])
    assert error_of(UsageError, f"classifier:{folder}:evil") == (
        f"judge classifier:{folder}: has no label 'evil'; its labels: good, bad; "
        f"name one as classifier:{folder}:LABEL"
    )


@pytest.mark.parametrize("labels", [["LABEL_0", "LABEL_1"], ["toxic", "unsafe"]])
def test_labels_that_do_not_say_which_is_harmful(make: Make, labels: list[str]) -> None:
    folder = make(labels)
    assert error_of(UsageError, f"classifier:{folder}") == (
        f"judge classifier:{folder}: does not say which label means harmful; "
        f"its labels: {', '.join(labels)}; name one as classifier:{folder}:LABEL"
    )


@pytest.mark.parametrize("rest", ["", ":x", "m?input=both", "m?inputs=pair", "m:x?input=pair&b=1"])
def test_a_text_that_is_no_classifier(rest: str) -> None:
    assert error_of(UsageError, f"classifier:{rest}") == (
        f"judge classifier:{rest}: "
        "must be classifier:FOLDER_OR_HUB_NAME[:LABEL][?input=answer or ?input=pair]"
    )


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    text = error_of(CheckpointError, f"classifier:{tmp_path / 'absent'}")
    assert text.startswith(f"{tmp_path / 'absent'}: ")
    assert "give a folder" in text


def test_a_model_that_is_no_classifier(tmp_path: Path) -> None:
    config = transformers.BertConfig(architectures=["BertForMaskedLM"])
    config.save_pretrained(tmp_path)
    assert error_of(CheckpointError, f"classifier:{tmp_path}") == (
        f"judge classifier:{tmp_path}: is BertForMaskedLM, not a model for sequence classification"
    )


def test_a_head_that_is_not_there_is_not_made_up(make: Make) -> None:
    folder = make(["safe", "unsafe"])
    backbone = transformers.BertModel.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    backbone.save_pretrained(folder)
    config.save_pretrained(folder)  # which still names the class with the head
    with pytest.raises(CheckpointError) as caught:
        parse_judge(f"classifier:{folder}")([("q", "no")])
    assert str(caught.value) == (
        f"judge classifier:{folder}: lacks 'classifier.weight' (2 such), which would be random; "
        "give a folder that was saved as BertForSequenceClassification"
    )


def test_pickled_weights_are_not_read(make: Make) -> None:
    folder = make(["safe", "unsafe"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded: "):
        parse_judge(f"classifier:{folder}")([("q", "no")])
