"""Names on the hub: what is one, what is downloaded, and what is told when it cannot be.

The real huggingface_hub talks to a server on this machine.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tests.checkpoints.hub_server import Hub, Repository, commit_of, serving
from tests.conftest import read_raw, run_cli, write_checkpoint, write_family

import taskvec as tv
from taskvec.checkpoints import hub as module
from taskvec.checkpoints.hub import HubName, choose, fetch, hub_name
from taskvec.errors import CheckpointError, MissingExtraError
from taskvec.family.opening import open_model
from taskvec.recipes.reading import load_recipe

client = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")

FIRST, SECOND = commit_of("first"), commit_of("second")
WEIGHTS = {"model.norm.weight": np.ones(4, np.float32)}


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a small family under `lab/`; `lab/math` has moved on from its first commit."""
    folders = write_family(tmp_path / "made")
    repositories = {
        f"lab/{name}": Repository({FIRST: files_of(folder)}, {"main": FIRST})
        for name, folder in folders.items()
    }
    old = repositories["lab/math"].commits[FIRST]
    new = files_of(write_checkpoint(tmp_path / "new", WEIGHTS))
    repositories["lab/math"] = Repository(
        {FIRST: old, SECOND: new}, {"main": SECOND, "v1": FIRST, "refs/pr/1": FIRST}
    )
    with serving(Hub(repositories)) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(module, "_commits", {})
        for variable in ("HF_TOKEN", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.delenv(variable, raising=False)
        yield served


def refusal(name: str, error: type[Exception] = CheckpointError, **options: bool) -> str:
    with pytest.raises(error) as caught:
        open_model(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is a name ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubName("org/name")),
        ("meta-llama/Meta-Llama-3.1-8B", HubName("meta-llama/Meta-Llama-3.1-8B")),
        ("org/name@v1", HubName("org/name", "v1")),
        ("org/name@refs/pr/1", HubName("org/name", "refs/pr/1")),
        ("org/name@main:unet", HubName("org/name", "main", "unet")),
        ("org/name@main:a/b/", HubName("org/name", "main", "a/b")),
        ("org/name@main:x.safetensors", HubName("org/name", "main", "x.safetensors")),
        ("name", None),
        ("a/b/c", None),
        ("./org/name", None),
        ("../org/name", None),
        ("/org/name", None),
        ("~/name", None),
        ("~org/name", None),
        ("org/", None),
        ("org/name.safetensors", None),
        ("org/name.bin", None),
        ("org/recipe.yaml", None),
        ("org/na me", None),
        ("org/a--b", None),
        ("org/a..b", None),
        ("org/" + "x" * 100, None),
        ("org/name@main:../x", None),
        ("org/name@../../x", None),
        ("https://huggingface.co/org/name", None),
        (Path("org/name"), None),
        (3, None),
    ],
)
def test_what_is_a_name(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name(text) == expected
    if expected is not None:
        assert str(expected) == text.rstrip("/")


def test_what_is_here_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "org" / "beside").mkdir(parents=True)
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert hub_name("org/here") is None
    assert hub_name("org/beside") == HubName("org/beside")
    assert hub_name("org/beside", tmp_path / "recipes") is None


def test_folder_of_that_name_wins_without_a_look_at_the_hub(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "lab" / "math", WEIGHTS)
    assert open_model("lab/math").where == str(tmp_path / "lab" / "math")
    assert hub.requests == 0


# --- downloading ---------------------------------------------------------------------------------


def test_a_model_is_downloaded_once(hub, tmp_path):
    opened = open_model("lab/base")
    assert opened.where == f"lab/base@{FIRST}"
    assert opened.config["model_type"] == "llama"
    assert sorted(hub.downloads) == ["config.json", "model.safetensors"]
    snapshot = tmp_path / "cache" / "models--lab--base" / "snapshots" / FIRST
    assert opened.inputs == (snapshot,)
    assert read_raw(snapshot) == read_raw(tmp_path / "made" / "base")
    open_model("lab/base")
    assert len(hub.downloads) == 2


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1", FIRST])
def test_revisions(hub, revision):
    assert list(open_model("lab/math").tensors) == list(WEIGHTS)
    opened = open_model(f"lab/math@{revision}")
    assert opened.where == f"lab/math@{FIRST}"
    assert len(opened.tensors) > 20


def test_a_branch_is_taken_at_one_commit(hub):
    fetch(HubName("lab/math"))
    hub.repositories["lab/math"].branches["main"] = FIRST  # somebody pushes
    assert fetch(HubName("lab/math"))[0] == HubName("lab/math", SECOND)


def test_subfolders_and_single_files(hub, tmp_path):
    stored = files_of(write_checkpoint(tmp_path / "x", WEIGHTS))
    weights = stored["model.safetensors"]
    other = files_of(write_checkpoint(tmp_path / "y", {"w": np.ones(2)}))["model.safetensors"]
    hub.repositories["lab/image"] = Repository(
        {
            FIRST: {
                "model_index.json": b"{}",
                "all.safetensors": other,
                "unet/config.json": b'{"unet": 1}',
                "unet/diffusion_pytorch_model.safetensors": weights,
                "unet/diffusion_pytorch_model.fp16.safetensors": weights,
                "vae/config.json": b'{"vae": 1}',
                "vae/diffusion_pytorch_model.safetensors": weights,
            }
        },
        {"main": FIRST},
    )
    opened = open_model("lab/image@main:unet")
    assert (opened.where, opened.config) == (f"lab/image@{FIRST}:unet", {"unet": 1})
    expected = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    assert sorted(hub.downloads) == expected
    single = open_model("lab/image@main:all.safetensors")
    assert (single.where, single.folder) == (f"lab/image@{FIRST}:all.safetensors", None)
    assert sorted(hub.downloads) == ["all.safetensors", *expected]


def test_names_with_brackets_are_no_patterns(hub, tmp_path):
    stored = files_of(write_checkpoint(tmp_path / "x", WEIGHTS))
    stored |= {"[config].json": b'{"a": 1}'}
    hub.repositories["lab/odd"] = Repository({FIRST: stored}, {"main": FIRST})
    open_model("lab/odd")
    assert "[config].json" in hub.downloads


def test_token_is_used(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    open_model("lab/base")
    assert "Bearer hf_secret" in hub.tokens


# --- which files ---------------------------------------------------------------------------------

COMPANIONS = [
    "README.md",
    "additional_chat_templates/tool.jinja",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
]
SHARDED = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
BINS = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
NEVER = [
    ".gitattributes", "consolidated.safetensors", "consolidated.00.pth", "gguf/model.gguf",
    "model.Q4_K_M.gguf", "model.fp16.safetensors", "onnx/model.onnx", "original/params.json",
    "original/consolidated.00.pth", "tf_model.h5", "flax_model.msgpack", "trainer_state.json",
    "training_args.bin", "runs/events.out", "model.fp16-00001-of-00002.safetensors",
    "model.safetensors.index.fp16.json", "picture.png",
]  # fmt: skip
ADAPTER = ["adapter_config.json", "adapter_model.bin"]
INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (["model.safetensors"], ["model.safetensors"]),
        ([*SHARDED, INDEX], [*SHARDED, INDEX]),
        (["model.safetensors", *SHARDED, INDEX], ["model.safetensors"]),
        ([*SHARDED, INDEX, *BINS, BIN_INDEX, "pytorch_model.bin"], [*SHARDED, INDEX]),
        (["weights.safetensors", "weights.fp16.safetensors"], ["weights.safetensors"]),
        (
            ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"],
            ["adapter_config.json", "adapter_model.safetensors"],
        ),
        (["adapter_config.json", "adapter_model.safetensors", "model.safetensors"],
         ["model.safetensors"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("allow_pickle", [False, True])
def test_one_copy_of_the_weights_is_chosen(there, wanted, allow_pickle):
    got = choose([*NEVER, *there, *COMPANIONS], HubName("o/n"), allow_pickle=allow_pickle)
    assert got == sorted([*wanted, *COMPANIONS])


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (["pytorch_model.bin"], ["pytorch_model.bin"]),
        ([*BINS, BIN_INDEX], [*BINS, BIN_INDEX]),
        (ADAPTER, ADAPTER),
    ],
)
def test_pickled_weights_are_chosen_where_they_are_allowed(there, wanted):
    got = choose([*NEVER, *there, *COMPANIONS], HubName("o/n"), allow_pickle=True)
    assert got == sorted([*wanted, *COMPANIONS])
    with pytest.raises(CheckpointError) as caught:
        choose([*NEVER, *there, *COMPANIONS], HubName("o/n"), allow_pickle=False)
    assert str(caught.value) == (
        f"o/n: has only pickled weights ({wanted[wanted == ADAPTER]}), "
        "which can run code when loaded; allow_pickle: true (--allow-pickle) reads them without "
        "running what is in them"
    )


def test_only_the_subfolder_counts():
    there = ["config.json", "model.safetensors", "unet/config.json", "unet/model.safetensors"]
    name = HubName("o/n", "main", "unet")
    assert choose(there, name, allow_pickle=False) == there[2:]
    name = HubName("o/n", "main", "vae")
    with pytest.raises(CheckpointError, match=r"^o/n@main:vae: the repository has no vae$"):
        choose(there, name, allow_pickle=False)


def test_no_weights():
    with pytest.raises(CheckpointError) as caught:
        choose(["config.json", "model.gguf"], HubName("o/n"), allow_pickle=True)
    assert str(caught.value) == (
        "o/n: has no weights in safetensors (of 2 files, such as config.json); give the repository "
        "of the original weights, or a subfolder"
    )


# --- errors --------------------------------------------------------------------------------------


def test_no_such_model(hub):
    assert refusal("lab/absent") == (
        "lab/absent: no such folder, and no such model on the hub; if it is private, log in (hf "
        "auth login, or HF_TOKEN)"
    )


def test_no_such_revision(hub):
    assert refusal("lab/base@v9") == (
        "lab/base@v9: the repository has no revision 'v9'; see its branches and tags"
    )


def test_gated_model(hub):
    hub.repositories["lab/base"].refuses = "GatedRepo"
    assert refusal("lab/base") == (
        f"lab/base: is gated; accept its terms on {hub.endpoint}/lab/base and log in (hf auth "
        "login, or HF_TOKEN)"
    )


def test_hub_in_trouble(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries again
    hub.repositories["lab/base"].refuses = "ServerError"
    assert refusal("lab/base") == "lab/base: the hub answered with status 503; try again later"


def test_no_network(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    told = refusal("lab/base")
    assert told.startswith(
        "lab/base: no such folder, and http://127.0.0.1:9 cannot be reached (ConnectError: "
    )
    assert told.endswith("; set HF_HUB_OFFLINE=1 to use what is in the cache")


def test_too_little_disk_is_known_before_anything_is_downloaded(hub, tmp_path, monkeypatch):
    hub.sizes = {"model.safetensors": 10**15, "config.json": 0}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=12_345_000))
    assert refusal("lab/base") == (
        f"lab/base: needs 1,000,000,000.00 MB in the hub's cache ({tmp_path}/cache), 12.35 MB are "
        "free; free some space, or move the cache with HF_HOME"
    )
    assert hub.downloads == []


def test_what_is_in_the_cache_needs_no_room(hub):
    open_model("lab/base")
    hub.sizes["model.safetensors"] = 10**15
    hub.repositories["lab/base"].commits[SECOND] = hub.repositories["lab/base"].commits[FIRST]
    assert open_model(f"lab/base@{SECOND}").where == f"lab/base@{SECOND}"  # shares the blob


def test_full_disk(hub, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(client, "snapshot_download", full)
    assert refusal("lab/base") == (
        f"lab/base: the disk of the hub's cache ({tmp_path}/cache) is full; free some space"
    )


def test_without_the_extra(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert refusal("lab/base", MissingExtraError) == (
        "lab/base: no such folder or file; on the hub: huggingface_hub is not installed; this "
        "needs: pip install 'taskvec[hub]'"
    )


# --- offline -------------------------------------------------------------------------------------


def test_offline_takes_what_is_in_the_cache(hub, monkeypatch):
    open_model("lab/base")
    open_model("lab/math@v1")
    asked = hub.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(module, "_commits", {})
    assert open_model("lab/base").where == f"lab/base@{FIRST}"
    assert open_model("lab/math@v1").where == f"lab/math@{FIRST}"
    assert open_model(f"lab/math@{FIRST}").where == f"lab/math@{FIRST}"
    assert hub.requests == asked


@pytest.mark.parametrize("name", ["lab/code", "lab/math", f"lab/math@{SECOND}"])
def test_offline_without_it(hub, monkeypatch, tmp_path, name):
    open_model("lab/math@v1")
    asked = hub.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(name) == (
        f"{name}: no such folder, and not in the hub's cache ({tmp_path}/cache); nothing is "
        "downloaded while HF_HUB_OFFLINE is set"
    )
    assert hub.requests == asked


def test_offline_without_the_subfolder(hub, monkeypatch, tmp_path):
    open_model("lab/base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = f"{tmp_path}/cache/models--lab--base/snapshots/{FIRST}"
    assert refusal("lab/base@main:unet") == (
        f"lab/base@{FIRST}:unet: unet of it is not in the hub's cache ({snapshot})"
    )


# --- recipes, command line, manifests ------------------------------------------------------------


def test_recipes_keep_names_and_prefer_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipes = tmp_path / "recipes"
    (recipes / "lab" / "here").mkdir(parents=True)
    (recipes / "r.yaml").write_text(
        "instruct: lab/instruct\ntarget: lab/here\nmethod: task_arithmetic\n"
        "tasks:\n  math: {model: 'lab/math@v1:sub', scale: 0.5}\n"
        "  code: {model: ./lab/code, scale: 1}\n"
    )
    recipe = load_recipe(recipes / "r.yaml")
    family = recipe.family
    assert family.start == "lab/instruct"
    assert family.target == str(recipes / "lab" / "here")
    assert family.models["math"] == "lab/math@v1:sub"
    assert Path(str(family.models["code"])) == recipes / "lab" / "code"
    said = recipe.to_dict()
    assert said["instruct"] == "lab/instruct"
    assert said["tasks"]["math"]["model"] == "lab/math@v1:sub"


@pytest.mark.parametrize(
    ("given", "model", "scale"),
    [
        ("m=lab/math", "lab/math", None),
        ("m=lab/math:0.5", "lab/math", 0.5),
        ("m=lab/math@v1:0.5", "lab/math@v1", 0.5),
        ("m=lab/math@v1:sub:-0.5", "lab/math@v1:sub", -0.5),
        ("m=lab/math@v1:sub", "lab/math@v1:sub", None),
    ],
)
def test_task_flags_keep_names(given, model, scale, tmp_path, monkeypatch):
    from taskvec.cli.recipe import _flags

    monkeypatch.chdir(tmp_path)
    flags = _flags(SimpleNamespace(task=[given], base="lab/base", instruct="folder"))
    entry = {"model": model} | ({} if scale is None else {"scale": scale})
    assert flags[("tasks", "m")] == (entry, f"--task {given}")
    assert flags[("base",)] == ("lab/base", "--base")
    assert flags[("instruct",)] == (str(tmp_path / "folder"), "--instruct")


def test_merge_by_names_equals_merge_by_folders(hub, tmp_path):
    made = tmp_path / "made"
    options = {"scale": {"math": 0.5}}
    roles = {role: made / role for role in ("base", "instruct")}
    by_folder = tv.Family(tasks={"math": made / "math"}, **roles)
    tv.merge(by_folder, tmp_path / "folders", method="lata", **options)
    by_name = tv.Family(base="lab/base", instruct="lab/instruct", tasks={"math": "lab/math@v1"})
    tv.merge(by_name, tmp_path / "names", method="lata", **options)
    assert read_raw(tmp_path / "names") == read_raw(tmp_path / "folders")

    manifest = json.loads((tmp_path / "names" / "taskvec-manifest.json").read_text())
    assert {role: m["path"] for role, m in manifest["members"].items()} == {
        "anchor": f"lab/instruct@{FIRST}",
        "base": f"lab/base@{FIRST}",
        "target": f"lab/instruct@{FIRST}",
        "task:math": f"lab/math@{FIRST}",
    }
    assert manifest["recipe"]["tasks"]["math"]["model"] == f"lab/math@{FIRST}"
    assert manifest["recipe"]["base"] == f"lab/base@{FIRST}"
    head = (tmp_path / "names" / "README.md").read_text().split("---")[1]
    assert "- lab/math\n" in head
    assert FIRST not in head


def test_verify_and_replay_take_the_same_commit(hub, tmp_path, monkeypatch):
    family = tv.Family(instruct="lab/instruct", tasks={"code": "lab/code"})
    tv.merge(family, tmp_path / "out", method="task_arithmetic", scale={"code": 0.5})
    code = hub.repositories["lab/code"]
    code.commits[SECOND], code.branches["main"] = code.commits[FIRST] | {"x.txt": b""}, SECOND
    code.commits[SECOND]["model.safetensors"] = hub.repositories["lab/base"].commits[FIRST][
        "model.safetensors"
    ]
    monkeypatch.setattr(module, "_commits", {})  # another process
    checks = tv.verify(tmp_path / "out", replay=True)
    assert {check.outcome for check in checks} == {"same"}
    assert len(checks) == 6
    assert open_model("lab/code").where == f"lab/code@{SECOND}"


def test_environment_variables_and_the_command_line(hub, tmp_path):
    env = {
        "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_other", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    family = ["--instruct=lab/instruct", "--task=math=lab/math@v1:0.5", "--method=task_arithmetic"]
    code, _, err = run_cli("merge", "out", *family, "--quiet", cwd=tmp_path, **env)
    assert code == 0, err
    assert (tmp_path / "home" / "hub" / "models--lab--math" / "snapshots" / FIRST).is_dir()
    assert "Bearer hf_other" in hub.tokens
    asked = hub.requests
    manifest = tmp_path / "out" / "taskvec-manifest.json"
    env["HF_HUB_OFFLINE"] = "1"
    code, _, err = run_cli("merge", manifest, "again", "--quiet", cwd=tmp_path, **env)
    assert code == 0, err
    assert read_raw(tmp_path / "again") == read_raw(tmp_path / "out")
    assert hub.requests == asked
