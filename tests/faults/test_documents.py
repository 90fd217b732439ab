"""Documents of members and users that are something else: one line, before the first weight."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.adapters import pair, write_adapter
from tests.conftest import read_raw, write_family
from tests.faults.states import merging, names
from tests.hostile import KINDS, in_time, pipe

from taskvec import documents
from taskvec.errors import CheckpointError
from taskvec.merging.scans import load_scan
from taskvec.outputs import run as running

BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
)
PIPES = ["pipe", "socket", "device"]


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    with in_time(60):
        yield


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fails when the first weight is about to be read."""
    begun: list[str] = []

    def apply(*_: Any, **__: Any) -> Any:
        begun.append("apply")
        raise AssertionError("weights are read")

    monkeypatch.setattr(running, "apply", apply)
    return begun


def put(path: Path, what: str | bytes | Callable[[Path], object]) -> None:
    """In the place of whatever is there."""
    path.unlink(missing_ok=True)
    if callable(what):
        what(path)
    else:
        path.write_bytes(what if isinstance(what, bytes) else what.encode())


def card(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**31)


# --- decoration ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    ["date: 2024-02-30", BOMB, "a: !!python/object/apply:os.system [id]", "a: !!int x",
     "n: " + "9" * 5000, "? [a]\n: 1"],
    ids=["date", "bomb", "tag", "int", "long", "key"],
)  # fmt: skip
def test_what_stands_beside_the_licence_does_not_matter(tmp_path, family, cli, extra):
    for member in ("instruct", "math", "code"):
        put(family[member] / "README.md", f"---\n{extra}\nlicense: mit\n---\n# card\n")
    code, _, err = cli(*merging(family, tmp_path / "out"))
    assert (code, err) == (0, "")
    assert card(tmp_path / "out")[0]["license"] == "mit"


READMES: dict[str, Any] = {
    "deep": "---\nlicense: mit\na: " + "[" * 100_000 + "\n---\n",
    "closed": "---\nlicense: mit\na: " + "[" * 3000 + "]" * 3000 + "\n---\n",
    "surrogate": '---\nlicense: "\\ud800"\n---\n',
    "not UTF-8": b"---\nlicense: \xff\n---\n",
    "not YAML": "---\nlicense: [\n---\n",
    "too large": "---\nlicense: mit\na: " + "x" * 9_000_000 + "\n---\n",
    "gone": lambda path: path.symlink_to("nothing"),
    "away": lambda path: path.symlink_to("/etc/hostname"),
    "loop": lambda path: path.symlink_to(path),
    **KINDS,
}


@pytest.mark.parametrize("readme", READMES)
def test_a_card_never_fails_a_merge(tmp_path, family, cli, readme):
    put(family["math"] / "README.md", READMES[readme])
    for member in ("instruct", "code"):
        put(family[member] / "README.md", "---\nlicense: mit\n---\n")
    code, _, err = cli(*merging(family, tmp_path / "out"))
    assert code == 0, err
    assert err.count("\n") == 1
    assert f"{family['math']}/README.md" in err
    front, text = card(tmp_path / "out")
    assert "license" not in front
    assert "| task 'math' | math | not stated |" in text
    assert read_raw(tmp_path / "out")


@pytest.mark.parametrize("kind", [*PIPES, "away", "large"])
def test_a_licence_that_cannot_be_carried_over_is_left_out(tmp_path, family, cli, kind):
    """`LICENSE -> /etc/shadow` arrived in the output as a plain file."""
    secret = tmp_path / "secret"
    secret.write_text("root:hash")
    path = family["instruct"] / "LICENSE"
    if kind == "away":
        path.symlink_to(secret)
    else:
        broken(kind)(path)
    (family["instruct"] / "NOTICE.txt").write_text("kept")
    code, _, err = cli(*merging(family, tmp_path / "out"))
    assert code == 0, err
    assert err.count("\n") == 1
    assert "LICENSE of the target is left out" in err
    assert str(path) in err
    assert "LICENSE" not in names(tmp_path / "out")
    assert (tmp_path / "out" / "NOTICE.txt").read_text() == "kept"
    assert not any(b"root:hash" in p.read_bytes() for p in (tmp_path / "out").rglob("*.*"))


# --- what a model needs --------------------------------------------------------------------------


def broken(kind: str) -> Callable[[Path], object]:
    """Something in the place of a document."""
    kinds: dict[str, Callable[[Path], object]] = {
        **KINDS,
        "away": lambda path: path.symlink_to("/etc/hostname"),
        "loop": lambda path: path.symlink_to(path),
        "gone": lambda path: path.symlink_to("nothing"),
        "large": large,
    }
    return kinds[kind]


@pytest.mark.parametrize("kind", [*PIPES, "away", "loop", "gone", "large"])
@pytest.mark.parametrize(
    "file",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt",
     "chat_template.jinja", "modeling.py", "additional_chat_templates/tools.jinja"],
)  # fmt: skip
def test_companions_are_opened_before_the_first_weight(
    tmp_path, family, cli, untouched, kind, file
):
    path = family["instruct"] / file
    path.parent.mkdir(exist_ok=True)
    put(path, broken(kind))
    code, out, err = cli(*merging(family, tmp_path / "out"))
    assert (code, out, err.count("\n"), untouched) == (1, "", 1, [])
    assert err.startswith(f"taskvec: error: {path}: ")
    assert kind not in ("pipe", "socket") or f"cannot be read: is a {kind}" in err
    assert names(tmp_path) == ["family"]


def test_a_folder_of_templates_that_leads_away(tmp_path, family, cli, untouched):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").write_text("secret")
    (family["instruct"] / "additional_chat_templates").symlink_to(tmp_path / "secrets")
    code, _, err = cli(*merging(family, tmp_path / "out"))
    assert (code, err.count("\n"), untouched) == (1, 1, [])
    assert "additional_chat_templates: is a link out of its folder" in err


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{"a": ' + "[" * 500 + "]" * 500 + "}", "nested more than 100 levels deep"),
        ('{"a": ' * 100_000, "nested more than 100 levels deep"),
        (r'{"a": "\ud800"}', "half of a surrogate pair"),
        ('{"a": ' + "9" * 10_000 + "}", "digits"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_json_of_a_member(tmp_path, cli, untouched, content, what, file):
    family = write_family(tmp_path / "family", shards=2)
    put(family["math"] / file, content)
    code, _, err = cli(*merging(family, tmp_path / "out"))
    assert (code, err.count("\n"), untouched) == (1, 1, [])
    assert err.startswith(f"taskvec: error: {family['math']}/{file}: ")
    assert what in err


def test_infinity_in_a_config_is_carried_over(tmp_path, family, cli):
    """As state-space models have it."""
    config = json.loads((family["instruct"] / "config.json").read_text())
    text = json.dumps(config | {"time_step_limit": [0.0, float("inf")]})
    put(family["instruct"] / "config.json", text)
    assert cli(*merging(family, tmp_path / "out", "--dtype", "float32"))[0] == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["time_step_limit"] == [0.0, float("inf")]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_no_files(tmp_path, family, cli, untouched, kind):
    put(family["math"] / "model.safetensors", KINDS[kind])
    code, _, err = cli(*merging(family, tmp_path / "out"))
    assert (code, err.count("\n"), untouched) == (1, 1, [])
    assert f"{family['math']}/model.safetensors: " in err


@pytest.mark.parametrize("kind", PIPES)
def test_an_index_that_is_no_file(tmp_path, cli, kind):
    family = write_family(tmp_path / "family", shards=2)
    put(family["math"] / "model.safetensors.index.json", KINDS[kind])
    code, _, err = cli(*merging(family, tmp_path / "out"))
    assert (code, err.count("\n")) == (1, 1)
    assert f"index.json: cannot be read: is a {kind}" in err


def test_weights_and_their_index_may_lie_elsewhere(tmp_path, cli):
    """Shards on another disk are read, and nothing of them is published as it is."""
    family = write_family(tmp_path / "family", shards=2)
    assert cli(*merging(family, tmp_path / "one"))[0] == 0
    (tmp_path / "disk").mkdir()
    for path in [*family["instruct"].glob("*.safetensors"), *family["instruct"].glob("*.index.*")]:
        shutil.move(path, tmp_path / "disk" / path.name)
        path.symlink_to(tmp_path / "disk" / path.name)
    assert cli(*merging(family, tmp_path / "two"))[0] == 0
    assert read_raw(tmp_path / "one") == read_raw(tmp_path / "two")


@pytest.mark.parametrize("kind", [*PIPES, "away"])
@pytest.mark.parametrize("file", ["adapter_config.json", "tokenizer.json", "chat_template.jinja"])
def test_documents_of_an_adapter(tmp_path, family, cli, untouched, kind, file):
    """Training leaves a tokenizer beside an adapter; of a target it goes into the output."""
    adapter = write_adapter(tmp_path / "adapter", pair("model.layers.0.self_attn.q_proj", 24, 24))
    put(adapter / file, broken(kind))
    code, _, err = cli(
        "merge", tmp_path / "out", "--method", "task_arithmetic", "--instruct", family["instruct"],
        "--target", adapter, "--task", f"math={family['math']}:0.5",
    )  # fmt: skip
    assert (code, err.count("\n"), untouched) == (1, 1, []), err
    assert f"{adapter}/{file}: " in err


def test_nothing_of_a_member_but_weights_is_read_after_the_first_weight(
    tmp_path, family, cli, monkeypatch
):
    put(family["instruct"] / "tokenizer.json", "{}")
    put(family["math"] / "README.md", "---\nlicense: mit\n---\n")
    real = running.apply

    def apply(*args: Any, **options: Any) -> Any:
        for name in ("README.md", "tokenizer.json", "config.json"):
            for folder in family.values():
                put(folder / name, pipe)
        return real(*args, **options)

    monkeypatch.setattr(running, "apply", apply)
    assert cli(*merging(family, tmp_path / "out"))[0] == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert "| task 'math' | math | mit |" in card(tmp_path / "out")[1]


def test_a_disk_that_fails_under_a_companion(tmp_path, family, cli, monkeypatch, untouched):
    put(family["instruct"] / "tokenizer.json", "{}")
    real = documents.open_regular

    def open_regular(path: Path, flags: int = 0) -> int:
        if Path(path).name == "tokenizer.json":
            raise OSError(5, os.strerror(5))
        return real(path, flags)

    monkeypatch.setattr(documents, "open_regular", open_regular)
    code, _, err = cli(*merging(family, tmp_path / "out"))
    assert (code, untouched) == (1, [])
    assert err == (
        f"taskvec: error: {family['instruct']}/tokenizer.json: cannot be read: Input/output error\n"
    )


# --- documents of users --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use", ["recipe", "import", "table", "table.json", "manifest"])
def test_documents_of_users(tmp_path, family, cli, kind, use):
    path = tmp_path / {"table": "t.csv", "table.json": "t.json",
            "manifest": "taskvec-manifest.json"}.get(use, "r.yaml")  # fmt: skip
    KINDS[kind](path)
    commands = {
        "recipe": ["merge", path, tmp_path / "out"],
        "import": ["import", path],
        "manifest": ["merge", path, tmp_path / "out"],
    }
    command = commands.get(use) or merging(family, tmp_path / "out", "--table", path)
    code, out, err = cli(*command)
    assert code == (1 if use == "manifest" else 2), err
    assert (out, err.count("\n")) == ("", 1), err
    assert str(path) in err
    assert kind in err or path.is_dir()
    assert "out" not in names(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scan_that_is_no_file(tmp_path, kind):
    path = tmp_path / "scan.json"
    KINDS[kind](path)
    with pytest.raises(CheckpointError, match=rf"scan.json: cannot be read: .*{kind}.*scan file"):
        load_scan(path)
