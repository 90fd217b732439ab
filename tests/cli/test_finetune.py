"""`taskvec finetune` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("torch")
pytest.importorskip("accelerate")

from safetensors.torch import load_file
from tests.training import tiny_models as tiny

SMALL = ("--steps", 4, "--batch-size", 4, "--quiet")


@pytest.fixture
def given(tmp_path):
    """A language model and questions with answers."""
    return tiny.gpt2(tmp_path / "gpt2"), "--data", tiny.pairs(tmp_path / "a.jsonl")


def test_what_is_said(cli, given, tmp_path):
    code, out, err = cli(
        "finetune", *given, *SMALL, "--validation", 0.25, "--out", tmp_path / "out"
    )
    assert code == 0, err
    assert err == "taskvec: trains 4 tensors, 2,048 of 9,264 parameters (22.1 %)\n"
    lines = out.splitlines()
    assert lines[0].split() == ["step", "validation", "loss", "accuracy"]
    assert [line.split()[0] for line in lines[1:3]] == ["0", "4"]
    assert lines[3].startswith(f"{tmp_path}/out/vector.safetensors  (4 steps; ")
    assert len(lines) == 4


def test_json_and_the_vector_as_a_task(cli, given, tmp_path):
    code, out, err = cli("finetune", *given, *SMALL, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told.keys() == {
        "path", "tensors", "parameters", "total", "steps", "loss", "validations", "seconds",
    }  # fmt: skip
    metrics = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [1, 2, 3, 4]
    assert json.loads(metrics[-1]).keys() == {
        "step", "loss", "accuracy", "lr", "grad_norm", "tokens", "seconds",
    }  # fmt: skip
    code, _, err = cli(
        "merge", tmp_path / "merged", "--anchor", given[0], "--method", "task_arithmetic",
        "--task", f"t={told['path']}:0.5", "--quiet",
    )  # fmt: skip
    assert code == 0, err


def test_every_setting(cli, tmp_path):
    model, data = tiny.vit(tmp_path / "vit"), tiny.shapes(tmp_path / "a.npz")
    code, _, err = cli(
        "finetune", model, "--data", data, "--train", "mlp,norms", "--validation", data,
        "--format", "npz", "--fields", "image=x,label=y", "--limit", 12, "--image-size", 8,
        "--head", "probe", "--pool", "mean", "--steps", 3, "--batch-size", 6, "--micro-batch", 2,
        "--learning-rate", 0.01, "--weight-decay", 0, "--warmup-steps", 1, "--clip", 2,
        "--seed", 5, "--precision", "float32", "--device", "cpu", "--label-smoothing", 0.1,
        "--out", tmp_path / "out", "--save", "model", "--save-every", 2, "--validate-every", 1,
        "--quiet",
    )  # fmt: skip
    assert code == 0, err
    told = json.loads((tmp_path / "out/run.json").read_text())["settings"]
    expected = {
        "steps": 3, "batch_size": 6, "learning_rate": 0.01, "weight_decay": 0.0, "warmup_steps": 1,
        "clip": 2.0, "seed": 5, "precision": "float32", "label_smoothing": 0.1, "image_size": 8,
        "pool": "mean", "head": "probe", "train": "mlp,norms", "classes": ["across", "down"],
    }  # fmt: skip
    assert {key: told[key] for key in expected} == expected
    assert told["data"]["n"] == 12
    metrics = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [0, 1, 1, 2, 2, 3, 3]
    assert (tmp_path / "out/model/model.safetensors").is_file()
    vector = load_file(tmp_path / "out/vector.safetensors")
    assert not any("attention" in name for name in vector)


def test_names_from_a_recipe(cli, tmp_path):
    model, data = tiny.codegen(tmp_path / "codegen"), tiny.pairs(tmp_path / "a.jsonl")
    names = tmp_path / "names.yaml"
    names.write_text("layers:\n  - {pattern: 'attn\\.', module: attention}\n")
    given = (model, "--data", data, *SMALL, "--out", tmp_path / "out")
    code, _, err = cli("finetune", *given, "--layers", names)
    assert code == 0, err
    assert err.startswith("taskvec: trains 4 tensors")
    assert refused(cli, 2, *given, "--layers", tmp_path / "no.yaml") == (
        f"{tmp_path}/no.yaml: cannot be read: No such file or directory"
    )


def refused(cli, code, *args):
    got, out, err = cli("finetune", *args)
    assert (got, out) == (code, "")
    return err.splitlines()[-1].removeprefix("taskvec: error: ")


def test_exit_codes_and_messages(cli, given, tmp_path):
    out = ("--out", tmp_path / "out", *SMALL)
    assert refused(cli, 2, *given, *out, "--learning-rate", 0) == (
        "learning_rate must be above 0; got 0.0"
    )
    assert refused(cli, 2, *given, *out, "--steps", 0) == "steps must be above 0; got 0"
    assert refused(cli, 2, *given, *out, "--fields", "prompt") == (
        "--fields takes USE=NAME,…; got 'prompt'"
    )
    assert refused(cli, 2, *given, *out, "--train", "norms,x").startswith(
        "train 'x' is neither a preset"
    )
    assert refused(cli, 1, *given[:2], tmp_path / "no", *out) == (
        f"{tmp_path}/no: no such file or folder"
    )
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty.jsonl").write_text("")
    assert refused(cli, 1, *given[:2], tmp_path / "empty.jsonl", *out) == (
        f"{tmp_path}/empty.jsonl: holds no examples"
    )


def test_a_loss_that_is_not_finite(cli, given, tmp_path):
    out = ("--out", tmp_path / "out", *SMALL)
    err = refused(cli, 1, *given, *out, "--learning-rate", 1e30, "--warmup-steps", 0)
    assert err == (
        "step 2: the loss is nan; the weights are left as they were before this step; try a "
        "smaller learning rate, or look at the data of this step"
    )
    assert not (tmp_path / "out/vector.safetensors").exists()


def test_another_setting_in_the_same_folder(cli, given, tmp_path):
    out = ("--out", tmp_path / "out", *SMALL)
    assert cli("finetune", *given, *out)[0] == 0
    assert refused(cli, 1, *given, *out, "--seed", 1) == (
        f"{tmp_path}/out: holds a run of other settings: seed is 0 there and 1 here; give another "
        "folder, or --force, which removes that run"
    )
    assert cli("finetune", *given, *out, "--seed", 1, "--force")[0] == 0


def test_a_place_that_is_occupied_is_told_before_anything_is_loaded(cli, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").write_text("kept")
    given = (tmp_path / "nowhere", "--data", tiny.pairs(tmp_path / "a.jsonl"), "--out")
    assert refused(cli, 1, *given, other) == (
        f"{other}: is not empty; --force replaces the whole folder"
    )
    for force in ((), ("--force",)):
        assert refused(cli, 1, *given, other / "mine", *force) == (
            f"{other}/mine: is a file; give the path of a folder"
        )
    assert (other / "mine").read_text() == "kept"


def test_labels_out_of_range(cli, tmp_path):
    model, data = tiny.bert(tmp_path / "bert"), tmp_path / "a.jsonl"
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = tmp_path / "b.jsonl"
    more.write_text(json.dumps({"text": "b", "label": 5}) + "\n")
    out = ("--out", tmp_path / "out", *SMALL)
    assert refused(cli, 1, model, "--data", data, "--validation", more, *out) == (
        f"{more}: class '5' is not among the 2 of {data}: 0, 1"
    )
    more.write_text(data.read_text() + json.dumps({"text": "b", "label": -1}) + "\n")
    assert refused(cli, 1, model, "--data", more, *out) == (
        f"{more}: a label is -1; number classes from 0, or name them"
    )


def test_a_run_that_goes_on_says_so(cli, given, tmp_path):
    out = (*given, *SMALL, "--out", tmp_path / "out")
    assert "resumes" not in cli("finetune", *out)[2]
    assert cli("finetune", *out)[2].splitlines()[-1] == (
        f"taskvec: {tmp_path}/out: all 4 steps are already done"
    )


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (signal.SIGINT, "interrupted"),
        pytest.param(signal.SIGKILL, "", marks=pytest.mark.slow),
    ],
)
def test_stopped_and_gone_on(given, tmp_path, number, word):
    """In processes of their own: the curve and the vector are those of a run without a stop."""

    def start(out):
        steps = ("--steps", 60, "--batch-size", 4, "--save-every", 5, "--quiet", "--out", out)
        arguments = map(str, ("finetune", *given, *steps))
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "taskvec", *arguments],
            env=environment, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    run = start(tmp_path / "parts")
    metrics = tmp_path / "parts/metrics.jsonl"
    until = time.monotonic() + 240
    while time.monotonic() < until and run.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 12:
            break
        time.sleep(0.002)
    run.send_signal(number)
    err = run.communicate(timeout=240)[1]
    assert run.returncode == (130 if word else -number)
    if word:
        assert err.splitlines()[-1] == (
            f"taskvec: {word}; the same command continues where it stopped"
        )
    assert not (tmp_path / "parts/vector.safetensors").exists()
    for out in ("parts", "whole"):
        again = start(tmp_path / out)
        assert again.communicate(timeout=240)[1].startswith("taskvec: trains 4 tensors")
        assert again.returncode == 0

    def curve(out):
        lines = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return [{key: r[key] for key in r if key != "seconds"} for r in records]

    assert curve("parts") == curve("whole")
    vectors = [load_file(tmp_path / out / "vector.safetensors") for out in ("parts", "whole")]
    assert all((vectors[0][name] == vectors[1][name]).all() for name in vectors[1])
