"""`finetune` on models in folders and in memory, of every kind."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.training import tiny_models as tiny
from torch import nn
from torch.nn import functional

import taskvec as tv
from taskvec.checkpoints.vectors import open_vector
from taskvec.errors import DataError, OutputError, RecipeError, UsageError
from taskvec.training import HeadOptions, RunOutput, TrainingSettings, finetune
from taskvec.training.api import LANGUAGE, settings_for
from taskvec.training.data import Documents, Reading
from taskvec.training.linearised import Linearised
from taskvec.training.tokens import Fitting

FEW = {"steps": 4, "batch_size": 4, "learning_rate": 1e-2}


def run(model, data, out=None, **more):
    more = {"settings": FEW, "output": RunOutput(out), **more}
    return finetune(model, data, **more)


def merged(model, trained, out, scale=1.0):
    family = tv.Family(anchor=model, tasks={"t": trained.path})
    tv.merge(family, out, method="task_arithmetic", scale={"t": scale}, dtype="float32")
    (file,) = Path(out).glob("*.safetensors")
    return load_file(file)


def test_a_language_model_to_a_vector_that_is_a_task(tmp_path):
    model, data = tiny.gpt2(tmp_path / "gpt2"), tiny.pairs(tmp_path / "a.jsonl")
    said, told = [], []
    trained = run(
        model, data, tmp_path / "out", validation=0.25,
        output=RunOutput(
            tmp_path / "out", on_message=said.append, on_record=lambda *each: told.append(each)
        ),
    )  # fmt: skip
    share = 100 * 2048 / 9264  # of 2 blocks of width 16: qkv 3 · 16², o 16²
    assert said == [f"trains 4 tensors, 2,048 of 9,264 parameters ({share:.1f} %)"]
    assert [(r["step"], of) for r, of in told] == [(s, 4) for s in (0, 1, 2, 3, 4, 4)]
    vector = open_vector(trained.path)
    start = load_file(model / "model.safetensors")
    assert sorted(vector.tensors) == sorted(
        name for name in start if "attn.c_" in name and name.endswith("weight")
    )
    result = merged(model, trained, tmp_path / "merged")
    module = dict(trained.module.named_parameters())
    for name, before in start.items():
        if name in vector.tensors:
            torch.testing.assert_close(result[name], module[name].detach(), rtol=1e-6, atol=1e-7)
            assert not torch.equal(result[name], before.float())
            τ = trained.vector[name]
            torch.testing.assert_close(τ, result[name] - before.float(), rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(result[name], before.float())
    told = json.loads((tmp_path / "out/run.json").read_text())
    assert told["settings"]["data"]["n"] == 9
    assert told["settings"]["learning_rate"] == 1e-2
    assert told["about"]["data"] == str(data)
    assert told["about"]["names"] == list(trained.selection.names)
    assert told["about"]["versions"]["torch"] == torch.__version__
    assert told["result"]["step"] == 4
    assert told["result"]["validation_loss"] == trained.records[-1]["validation_loss"]


def test_rows_of_a_fused_projection_that_do_not_train(tmp_path):
    """Through weight decay, a stop and a second start."""
    model, data = tiny.gpt2(tmp_path / "gpt2"), tiny.pairs(tmp_path / "a.jsonl")
    settings = FEW | {"weight_decay": 0.5}
    whole = run(model, data, tmp_path / "whole", train="attention-qv", settings=settings)

    def stop(record, steps):
        if record["step"] == 2:
            raise KeyboardInterrupt

    output = RunOutput(tmp_path / "parts", on_record=stop)
    with pytest.raises(KeyboardInterrupt):
        run(model, data, train="attention-qv", settings=settings, output=output)
    parts = run(model, data, tmp_path / "parts", train="attention-qv", settings=settings)
    for name, τ in whole.vector.items():
        assert name.endswith("c_attn.weight")
        assert torch.equal(parts.vector[name], τ)
        assert not τ[:, 16:32].any()  # k; GPT-2 stores (in, out)
        assert τ[:, :16].any()
        assert τ[:, 32:].any()


def test_the_trained_model_as_a_folder(tmp_path):
    model, data = tiny.gpt2(tmp_path / "gpt2"), tiny.pairs(tmp_path / "a.jsonl")
    output = RunOutput(tmp_path / "out", saves_model=True)
    trained = run(model, data, train="all", output=output)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert loaded.dtype == torch.bfloat16  # as the model that training started from
    tokens = torch.arange(10)[None]
    trained.module.eval()
    torch.testing.assert_close(
        loaded.float()(tokens).logits, trained.module(tokens).logits, rtol=0.1, atol=0.1
    )
    assert (tmp_path / "out/model/tokenizer.json").is_file()


def test_a_finished_run_is_not_done_again(tmp_path):
    model, data = tiny.gpt2(tmp_path / "gpt2"), tiny.pairs(tmp_path / "a.jsonl")
    first = run(model, data, tmp_path / "out")
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    again = run(model, data, tmp_path / "out")
    assert again.records == first.records
    assert all(torch.equal(again.vector[name], τ) for name, τ in first.vector.items())
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files


def test_running_text(tmp_path):
    model = tiny.gpt2(tmp_path / "gpt2")
    (tmp_path / "a.txt").write_text("a bc def. " * 30)
    trained = run(model, tmp_path / "a.txt", asking=HeadOptions(Fitting(context=32)))
    losses = [record["loss"] for record in trained.records]
    assert losses[-1] < losses[0]
    assert trained.records[0]["tokens"] <= 4 * 31


def test_a_classifier_of_texts_with_its_own_head(tmp_path):
    model, data = tiny.bert(tmp_path / "bert", 2), tiny.reviews(tmp_path / "a.tsv")
    said = []
    trained = run(
        model,
        data,
        train="all",
        output=RunOutput(tmp_path / "out", on_message=said.append),
        validation=data,
    )
    assert said[1] == "the head is the model's own, frozen"
    assert not any("classifier" in name for name in trained.selection.names)
    assert trained.records[-1]["validation_loss"] < trained.records[0]["validation_loss"]
    with_head = run(model, data, train="heads")
    assert {"classifier.weight", "classifier.bias"} <= set(with_head.vector)


def test_a_linear_probe_is_fitted_frozen_and_kept(tmp_path):
    model, data = tiny.vit(tmp_path / "vit"), tiny.shapes(tmp_path / "a.npz")
    said = []
    whole = run(
        model, data, train="attention", output=RunOutput(tmp_path / "whole", on_message=said.append)
    )
    assert said[1:] == [
        "images are resized to 8 × 8 px "
        "(no preprocessor_config.json: mean and deviation of ImageNet)",
        "the head is a linear probe, frozen, fitted to the features of 24 examples "
        "(accuracy 100.0%)",
    ]
    head = load_file(tmp_path / "whole/head.safetensors")
    assert torch.equal(whole.module.head.weight, head["weight"])
    assert all("attention" in name for name in whole.vector)

    def stop(record, steps):
        if record["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, data, output=RunOutput(tmp_path / "parts", on_record=stop))
    parts = run(model, data, tmp_path / "parts")
    assert all(torch.equal(parts.vector[name], τ) for name, τ in whole.vector.items())
    assert load_file(tmp_path / "parts/head.safetensors").keys() == head.keys()


def test_images_of_another_size(tmp_path):
    """Positions are stretched, as ViT does if it is asked to."""
    model, data = tiny.vit(tmp_path / "vit"), tiny.shapes(tmp_path / "a.npz")
    trained = run(model, data, asking=HeadOptions(image_size=12))
    assert len(trained.records) == 4


def test_a_zero_shot_head_of_clip(tmp_path, monkeypatch):
    model, data = tiny.clip(tmp_path / "clip"), tiny.shapes(tmp_path / "a.npz")
    said = []
    asking = HeadOptions(head="zero-shot", templates=("a {}",))
    trained = run(
        model,
        data,
        tmp_path / "out",
        asking=asking,
        output=RunOutput(tmp_path / "out", on_message=said.append),
    )
    assert said[2] == "the head is zero-shot, from 2 names of classes"
    assert all(name.startswith("vision_model.encoder") for name in trained.vector)
    start = load_file(model / "model.safetensors")
    assert set(open_vector(trained.path).tensors) < set(start)
    monkeypatch.delattr("taskvec.training.models.zero_shot_head")
    again = run(model, data, tmp_path / "out", asking=asking)  # the head comes from the folder
    assert again.records == trained.records


def test_a_head_of_ones_own(tmp_path):
    model, data = tiny.vit(tmp_path / "vit"), tiny.shapes(tmp_path / "a.npz")
    head = nn.Linear(16, 2)
    before = head.weight.detach().clone()
    trained = run(model, data, head=head)
    assert torch.equal(trained.module.head.weight, before)
    assert trained.module.pool == "cls"


def test_a_linearised_model(tmp_path):
    """τ is that of training f0 + Jτ; the weights that the tangent is taken at stay."""
    model, data = tiny.vit(tmp_path / "vit"), tiny.shapes(tmp_path / "a.npz")
    trained = run(model, data, tmp_path / "out", linearised=True)
    start = transformers.AutoModel.from_pretrained(model)
    for name, parameter in trained.module.backbone.module.named_parameters():
        assert torch.equal(parameter, start.get_parameter(name))
    into = {name: parameter.detach() for name, parameter in start.named_parameters()}
    result = merged(model, trained, tmp_path / "merged")
    tuned = transformers.AutoModel.from_pretrained(tmp_path / "merged")
    for name, before in into.items():
        τ = trained.vector.get(name, torch.zeros(()))
        torch.testing.assert_close(
            tuned.get_parameter(name).detach(), before + τ, rtol=1e-6, atol=1e-6
        )
    assert len(open_vector(trained.path).tensors) == len(trained.vector) < len(result)
    plain = run(model, data)
    assert trained.records[0]["loss"] == pytest.approx(plain.records[0]["loss"], rel=1e-3)
    assert isinstance(trained.module.backbone, Linearised)
    with pytest.raises(OutputError, match="linearised is true there and null here"):
        run(model, data, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora(tmp_path):
    pytest.importorskip("peft")
    model, data = tiny.bert(tmp_path / "bert", 2), tiny.reviews(tmp_path / "a.tsv")

    def stop(record, steps):
        if record["step"] == 2:
            raise KeyboardInterrupt

    whole = run(model, data, tmp_path / "whole", train="lora")
    with pytest.raises(KeyboardInterrupt):
        run(model, data, train="lora", output=RunOutput(tmp_path / "parts", on_record=stop))
    parts = run(model, data, tmp_path / "parts", train="lora")
    vector = load_file(parts.path)
    assert len(vector) == 8
    for name, τ in whole.vector.items():
        assert torch.equal(parts.vector[name], τ)
        torch.testing.assert_close(vector[name], τ, rtol=1e-3, atol=1e-6)
    with pytest.raises(UsageError, match="lora cannot be combined with linearised; choose one"):
        run(model, data, train="lora", linearised=True)


NAMES = [
    {"pattern": r"h\.(?P<block>\d+)\.attn\.out_proj", "module": "attention", "projection": "o"},
    {"pattern": r"h\.(?P<block>\d+)\.attn\.qkv_proj", "module": "attention"},
]


def test_names_that_the_table_does_not_know(tmp_path):
    model, data = tiny.codegen(tmp_path / "codegen"), tiny.pairs(tmp_path / "a.jsonl")
    expected = {
        f"transformer.h.{block}.attn.{which}_proj.weight"
        for block in (0, 1)
        for which in ("qkv", "out")
    }
    assert set(run(model, data).vector) == expected  # by the words in the names
    trained = run(model, data, tmp_path / "out", layers=NAMES)
    assert set(trained.vector) == set(load_file(trained.path)) == expected
    told = json.loads((tmp_path / "out/run.json").read_text())["settings"]
    assert told["layers"] == NAMES
    with pytest.raises(OutputError, match="layers is "):
        run(model, data, tmp_path / "out", layers=NAMES[::-1])
    with pytest.raises(RecipeError, match="override: key 'module' is missing"):
        run(model, data, layers=[{"pattern": "attn"}])


def test_names_of_a_module_in_memory():
    module = nn.ModuleDict({"mine": nn.Linear(2, 2), "rest": nn.Linear(2, 2)})
    module.forward = lambda x: module["rest"](module["mine"](x))
    names = [{"pattern": "^mine", "module": "mlp"}]
    trained = run(module, [(torch.ones(2), 0), (torch.zeros(2), 1)], train="mlp", layers=names)
    assert set(trained.vector) == {"mine.weight"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_on_names_that_the_table_does_not_know(tmp_path):
    pytest.importorskip("peft")
    model, data = tiny.codegen(tmp_path / "codegen"), tiny.pairs(tmp_path / "a.jsonl")
    trained = run(model, data, train="lora", layers=NAMES)
    assert len(trained.vector) == 4
    assert all("attn" in name for name in trained.vector)


def test_label_smoothing_against_the_formula():
    logits, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    head = nn.Linear(3, 3).double()
    share = 0.3
    log_p = functional.log_softmax(head(logits), -1).detach()
    smooth = torch.full((6, 3), share / 3, dtype=torch.float64)
    smooth[torch.arange(6), labels] += 1 - share
    data = list(zip(logits, labels, strict=True))
    trained = finetune(
        head, data, train="all", asking=HeadOptions(label_smoothing=share),
        settings={"steps": 1, "batch_size": 6},
    )  # fmt: skip
    assert trained.records[0]["loss"] == pytest.approx(
        -float((smooth * log_p).sum(1).mean()), rel=1e-5
    )


def test_a_language_model_in_memory(tmp_path):
    folder, data = tiny.gpt2(tmp_path / "gpt2"), tiny.pairs(tmp_path / "a.jsonl")
    module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    with pytest.raises(UsageError, match="a model in memory needs its tokenizer: give tokenizer="):
        run(module, data)
    made = transformers.AutoTokenizer.from_pretrained(folder)
    trained = run(module, data, tmp_path / "out", tokenizer=made)
    for name, parameter in module.named_parameters():
        expected = trained.vector.get(name, torch.zeros(()))
        assert torch.equal(parameter.detach() - start[name], expected.expand_as(parameter))
    assert open_vector(trained.path).tensors.keys() == trained.vector.keys()


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    data = [(torch.ones(2), 0), (torch.zeros(2), 1)]
    output = RunOutput(tmp_path / "out", tensorboard=True)
    finetune(nn.Linear(2, 2), data, train="all", settings=FEW, output=output)
    assert list((tmp_path / "out/tensorboard").glob("events.*"))


def test_defaults_are_by_kind():
    assert settings_for([], None) == TrainingSettings(2000, 128, learning_rate=1e-5)
    assert settings_for(Documents([], "", ""), {"steps": 3}) == TrainingSettings(
        3, 16, learning_rate=2e-5
    )
    assert settings_for(Documents([], "", ""), None) == LANGUAGE
    assert settings_for(Documents([], "", ""), TrainingSettings()) == TrainingSettings()
    with pytest.raises(UsageError, match="settings: 'step' is unknown; did you mean 'steps'"):
        settings_for([], {"step": 3})


def refusal(kind, *args, **more):
    with pytest.raises(kind) as caught:
        run(*args, **more)
    return str(caught.value)


def test_the_output_never_overlaps_an_input(tmp_path):
    model, data = tiny.vit(tmp_path / "vit"), tiny.shapes(tmp_path / "a.npz")
    for out, other in ((model, model), (model / "out", model), (tmp_path, tmp_path / "a.npz")):
        assert refusal(OutputError, model, data, out) == (
            f"{out}: overlaps the input {other}; write somewhere else"
        )
    assert not (model / "out").exists()


def test_classes_that_do_not_fit(tmp_path):
    model = tiny.bert(tmp_path / "bert", 2)
    data = tiny.reviews(tmp_path / "a.tsv")
    other = tmp_path / "b.tsv"
    other.write_text("label\ttext\nneutral\tso\n")
    assert refusal(DataError, model, data, validation=other) == (
        f"{other}: class 'neutral' is not among the 2 of {data}: neg, pos"
    )
    images = tiny.shapes(tmp_path / "a.npz")
    assert refusal(UsageError, model, data, validation=images) == (
        f"{images}: must hold texts of classes, as {data} does"
    )
    three = tmp_path / "c.tsv"
    three.write_text("label\ttext\na\tx\nb\ty\nc\tz\n")
    assert refusal(UsageError, model, three, asking=HeadOptions(head="own")) == (
        f"{model}: has no head for 3 classes of texts; use probe"
    )
    assert refusal(UsageError, model, three, asking=HeadOptions(head="new")) == (
        "head must be own, probe or zero-shot; got 'new'"
    )


def test_validation_labels_are_numbered_as_those_of_training(tmp_path):
    """The first class of a file that lacks some is not their first."""
    model, data = tiny.bert(tmp_path / "bert", 2), tiny.reviews(tmp_path / "a.tsv")
    positive = tmp_path / "b.tsv"
    positive.write_text("label\ttext\n" + "pos\tit is fine 1\n" * 3)
    trained = run(model, data, validation=positive)
    module = trained.module
    made = transformers.AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        logits = module(**made("it is fine 1", return_tensors="pt")).logits
    expected = -float(functional.log_softmax(logits, -1)[0, 1])
    assert trained.records[-1]["validation_loss"] == pytest.approx(expected, rel=1e-5)


def test_what_does_not_go_together(tmp_path):
    model, data = tiny.vit(tmp_path / "vit"), tiny.shapes(tmp_path / "a.npz")
    texts = tiny.reviews(tmp_path / "a.tsv")
    language = tiny.gpt2(tmp_path / "gpt2")
    pairs = tiny.pairs(tmp_path / "a.jsonl")
    assert refusal(UsageError, model, [(torch.ones(2), 0)]) == (
        "a model in a folder needs data from a file or the hub; or load the model"
    )
    assert refusal(UsageError, nn.Linear(2, 2), data) == (
        "a classifier in memory needs a sequence of examples as data"
    )
    assert refusal(UsageError, nn.Linear(2, 2), [(torch.ones(2), 0)], validation=0.5) == (
        "validation as a share needs data from a file; give validation data"
    )
    assert refusal(UsageError, language, pairs, validation=texts) == (
        f"{texts}: holds classes, which a language model does not learn"
    )
    output = RunOutput(tmp_path / "out", saves_model=True)
    assert refusal(UsageError, nn.Linear(2, 2), [(torch.ones(2), 0)], output=output) == (
        "saving the model needs a model in a folder"
    )
    missing = tmp_path / "no"
    with pytest.raises(tv.TaskvecError) as caught:
        run(missing, data)
    assert str(caught.value) == f"{missing}: no such model; give a folder in Hugging Face layout"
    with pytest.raises(tv.TaskvecError) as caught:
        run(model, pairs)
    assert str(caught.value).startswith(f"{model}: ")


def test_a_conversation_cut_to_nothing_is_told(tmp_path):
    model = tiny.gpt2(tmp_path / "gpt2")
    data = tiny.pairs(tmp_path / "a.jsonl", 2)
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "a" * 90, "response": "b"}) + "\n")
    assert f"{data}, line 3: has " in refusal(DataError, model, data)
    said = []
    run(
        model,
        data,
        asking=HeadOptions(Fitting(truncate=True)),
        output=RunOutput(on_message=said.append),
    )
    assert said[1].startswith(f"{data}: 1 of 3 conversations are left out: ")


def test_reading_draws_by_its_seed(tmp_path):
    model, data = tiny.gpt2(tmp_path / "gpt2"), tiny.pairs(tmp_path / "a.jsonl")
    losses = {
        seed: run(model, data, reading=Reading(limit=4, seed=seed)).records[0]["loss"]
        for seed in (0, 0, 1)
    }
    assert np.ptp(list(losses.values())) > 0
