"""`taskvec disentangle` on classifiers: CLIP with zero-shot heads, BERT and ViT with probes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("accelerate")

from tests.training import tiny_models as tiny

from taskvec.training import HeadOptions, RunOutput, finetune

GRID = ("--points", 3, "--low", 0, "--high", 1, "--quiet")
TEMPLATE = "one {}, two {} and a cat"


def lights(path):
    """Images of 8 × 8 px, dark or light: two classes of other names than those of stripes."""
    grey = np.arange(24)[:, None, None, None] % 2 * 150 * np.ones((1, 8, 8, 3))
    noise = np.random.default_rng(1).integers(0, 50, grey.shape)
    classes = np.array(["dark", "light", "none"])
    np.savez(path, x=(grey + noise).astype(np.uint8), y=np.arange(24) % 2, classes=classes)
    return path


def lengths(path):
    """Texts of two classes, told apart by their length."""
    rows = [f"{'long' if i % 2 else 'short'}\t{'a b c d e f' if i % 2 else 'x'} {i}"
            for i in range(16)]  # fmt: skip
    path.write_text("\n".join(["label\ttext", *rows]) + "\n")
    return path


@pytest.fixture(scope="module", params=["clip", "bert"])
def trained(request, tmp_path_factory):
    """A model, and two tasks that it was trained on, as paths; and what the training measured."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "clip":
        model, head = tiny.clip(folder / "clip"), "zero-shot"
        data = {"one": tiny.shapes(folder / "a.npz"), "two": lights(folder / "b.npz")}
    else:
        model, head = tiny.bert(folder / "bert"), "probe"
        data = {"one": tiny.reviews(folder / "a.tsv"), "two": lengths(folder / "b.tsv")}
    vectors, accuracies = {}, {}
    for task, path in data.items():
        run = finetune(
            model, path, train="linear", validation=path,
            asking=HeadOptions(head=head, templates=(TEMPLATE,)),
            settings={"steps": 4, "batch_size": 8, "learning_rate": 0.3},
            output=RunOutput(folder / task),
        )  # fmt: skip
        vectors[task] = run.path
        accuracies[task] = [
            r["validation_accuracy"] for r in run.records if "validation_accuracy" in r
        ]
    return SimpleNamespace(model=model, head=head, data=data, vectors=vectors, told=accuracies)


def arguments(trained, *tasks):
    pairs = {"--task": {t: trained.vectors[t] for t in tasks}}
    pairs |= {"--data": trained.data, "--validation": trained.data}
    return [
        x for flag, by in pairs.items() for t, path in by.items() for x in (flag, f"{t}={path}")
    ]


def head_of(trained):
    own = ("--template", TEMPLATE) if trained.head == "zero-shot" else ()
    return ("--head", trained.head, *own)


@pytest.mark.parametrize("asked", [True, False])
def test_error_and_addition(cli, trained, tmp_path, asked):
    """Models with one vector are as right as the training found them, under the same heads."""
    head = head_of(trained) if asked else ()  # else that beside the vector
    code, out, err = cli(
        "disentangle", trained.model, *arguments(trained, "one", "two"), *GRID, *head,
        "--measure", "error,addition", "--out", tmp_path / "out",
    )  # fmt: skip
    assert (code, err) == (0, "")
    told = json.loads((tmp_path / "out/results.json").read_text())
    (found,) = told["addition"]
    assert trained.told["one"][0] != trained.told["one"][1]
    for task, (before, after) in trained.told.items():
        assert found["pretrained"][task]["value"] == pytest.approx(before)
        assert found["single"][task]["value"] == pytest.approx(after)
    cells = {tuple(cell["alphas"].values()): cell for cell in told["error"]["cells"]}
    assert len(cells) == 9
    assert max(cell["error"]["value"] for cell in cells.values()) > 0
    assert all(cell["error"]["value"] == 0 for at, cell in cells.items() if 0 in at[:1] == at[1:])
    assert "task addition (shared), on test data" in out


def test_negation(cli, trained, tmp_path):
    code, out, err = cli(
        "disentangle", trained.model, *arguments(trained, "one"), *GRID, *head_of(trained),
        "--measure", "negation", "--control", "two", "--out", tmp_path / "out",
    )  # fmt: skip
    assert (code, err) == (0, "")
    (found,) = json.loads((tmp_path / "out/results.json").read_text())["negation"]["one"]
    assert found["pretrained"]["target"]["value"] == pytest.approx(trained.told["one"][0])
    assert found["pretrained"]["control"]["value"] == pytest.approx(trained.told["two"][0])
    lines = out.splitlines()
    assert lines[0] == "task negation of one, 95% of two kept; on test data"
    assert "['" not in out
    assert "[" in lines[2]


def test_features_of_tasks_with_other_classes(cli, trained, tmp_path):
    code, out, err = cli(
        "disentangle", trained.model, *arguments(trained, "one", "two"), *GRID,
        "--head", "features", "--distance", "symmetric_kl", "--out", tmp_path / "out",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "disentanglement error (symmetric_kl)" in out


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, at what PEFT asks it
@pytest.mark.parametrize("which", ["vit", "dinov2"])
def test_adapters_of_models_of_images(cli, tmp_path, which):
    """A vector that was trained by LoRA, and an adapter as PEFT saves it."""
    pytest.importorskip("peft")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from taskvec.training.lora import add_lora

    model, data = getattr(tiny, which)(tmp_path / which), tiny.shapes(tmp_path / "a.npz")
    code, _, err = cli(
        "finetune", model, "--data", data, "--train", "lora", "--steps", 4, "--batch-size", 8,
        "--learning-rate", 0.05, "--quiet", "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    adapted, selection = add_lora(transformers.AutoModel.from_pretrained(model), "lora:linear")
    with torch.no_grad():
        for name in selection.names:
            adapted.get_parameter(name).add_(0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    given = SimpleNamespace(
        data={"one": data, "two": data},
        vectors={"one": tmp_path / "run/vector.safetensors", "two": tmp_path / "adapter"},
    )
    code, _, err = cli(
        "disentangle", model, *arguments(given, "one", "two"), *GRID, "--out", tmp_path / "out"
    )
    assert code == 0, err
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    given.vectors["two"] = tmp_path / "merged"
    code, _, err = cli(
        "disentangle", model, *arguments(given, "one", "two"), *GRID, "--out", tmp_path / "again"
    )
    assert code == 0, err
    files = [(tmp_path / out / "error.csv").read_text() for out in ("out", "again")]
    assert files[0] == files[1]


def test_other_classes_than_those_of_the_head_beside_the_vector(cli, trained, tmp_path):
    data = [f"--data=one={trained.data['two']}", f"--data=two={trained.data['two']}"]
    tasks = [f"--task={task}={path}" for task, path in trained.vectors.items()]
    code, _, err = cli("disentangle", trained.model, *tasks, *data, *GRID, "--out", tmp_path / "o")
    assert code == 1
    assert f"of the head beside {trained.vectors['one']}: " in err


def test_data_of_a_kind_that_the_model_does_not_take(cli, tmp_path):
    image, text = tiny.shapes(tmp_path / "a.npz"), tiny.reviews(tmp_path / "a.tsv")
    vit, bert = tiny.vit(tmp_path / "vit"), tiny.bert(tmp_path / "bert")
    for model, data, kinds in ((vit, text, "images texts"), (bert, image, "texts images")):
        code, _, err = cli("finetune", model, "--data", data, "--out", tmp_path / "out")
        takes, holds = kinds.split()
        assert code == 2
        assert err == f"taskvec: error: {model}: is a model of {takes}; {data} holds {holds}\n"


def test_clip_does_not_classify_texts(cli, tmp_path):
    model, data = tiny.clip(tmp_path / "clip"), tiny.reviews(tmp_path / "a.tsv")
    code, _, err = cli("finetune", model, "--data", data, "--out", tmp_path / "out")
    assert code == 2
    assert err == f"taskvec: error: {model}: is a model of images; {data} holds texts\n"
