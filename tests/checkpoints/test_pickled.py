"""Pickled weights: read where they are allowed, never run."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import CONFIG, family_weights, read_raw, to_bf16, write_checkpoint, write_family

import taskvec as tv
from taskvec.checkpoints import pickled
from taskvec.checkpoints.pickled import is_pickled, open_pickled
from taskvec.errors import CheckpointError, MissingExtraError, StaleError
from taskvec.family.opening import open_model

torch = pytest.importorskip("torch")

INDEX = "pytorch_model.bin.index.json"
TRY_OUT = pickled._try_out


@pytest.fixture(autouse=True)
def trust(monkeypatch):
    """Most files here are harmless; a child that imports torch for each would take a minute."""
    monkeypatch.setattr(pickled, "_try_out", lambda *_: None)


WEIGHTS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}
REMEDY = (
    "holds only pickled weights, which can run code when loaded; allow_pickle: true "
    "(--allow-pickle) reads them without running what is in them; or convert them to safetensors"
)


def state(tensors: Any, dtype: Any = torch.bfloat16) -> dict[str, Any]:
    return {name: torch.from_numpy(np.array(array)).to(dtype) for name, array in tensors.items()}


def write_pickled(folder: Path, tensors: Any, shards: int = 1) -> Path:
    """A folder as transformers wrote it before safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if shards == 1:
        torch.save(state(tensors), folder / "pytorch_model.bin")
        return folder
    placed = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        mine = {name: tensors[name] for name in list(tensors)[i::shards]}
        torch.save(state(mine), folder / file)
        placed |= dict.fromkeys(mine, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))
    return folder


def refusal(path: Path, allow: bool = True, error: type[Exception] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        open_model(path, allow_pickle=allow)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_same_result_as_from_safetensors(tmp_path, shards, cli):
    weights = family_weights()
    expected = write_family(tmp_path / "safe", weights)
    given = {n: write_pickled(tmp_path / "pickled" / n, w, shards) for n, w in weights.items()}
    for members, out, flags in ((expected, "a", []), (given, "b", ["--allow-pickle"])):
        roles = [f"--{role}={members[role]}" for role in ("base", "instruct")]
        tasks = [f"--task=math={members['math']}:0.5", f"--task=code={members['code']}:-0.5"]
        code, _, err = cli("merge", tmp_path / out, *roles, *tasks, "--quiet", *flags)
        assert code == 0, err
    assert read_raw(tmp_path / "b") == read_raw(tmp_path / "a")
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == CONFIG
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        p.name for p in (tmp_path / "b").iterdir()
    }
    found = {check.what: check.outcome for check in tv.verify(tmp_path / "b", replay=True)}
    assert set(found.values()) == {"same"}


def test_single_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save(state(WEIGHTS), tmp_path / "last.pt")
    torch.save({"other": torch.ones(1)}, tmp_path / "first.pt")
    opened = open_model(tmp_path / "last.pt", allow_pickle=True)
    assert (opened.where, opened.folder) == (f"{tmp_path}/last.pt", None)
    assert (opened.inputs, opened.config) == ((tmp_path / "last.pt",), {})
    assert opened.view("a").read(1, 5).tolist() == to_bf16(WEIGHTS["a"]).ravel()[1:5].tolist()


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module", "params"])
def test_weights_beside_other_things(tmp_path, key):
    training = {"epoch": 3, key: state(WEIGHTS), "optimizer": {"state": {0: torch.ones(2)}}}
    torch.save(training, tmp_path / "last.pth")
    assert list(open_model(tmp_path, allow_pickle=True).tensors) == ["a", "b"]


def test_training_state_beside_weights_is_no_weights(tmp_path):
    write_pickled(tmp_path, WEIGHTS)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "weights.bin")
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        (tmp_path / name).write_bytes(b"anything")
    assert list(open_model(tmp_path, allow_pickle=True).tensors) == ["a", "b"]


def test_safetensors_are_preferred(tmp_path):
    write_checkpoint(tmp_path, {"safe": np.ones(2, np.float32)})
    write_pickled(tmp_path, WEIGHTS)
    assert not is_pickled(tmp_path)
    assert list(open_model(tmp_path, allow_pickle=True).tensors) == ["safe"]


def test_tensors_that_share_storage_and_have_strides(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"t": whole.t(), "w": whole, "row": whole[1]}, tmp_path / "m.pt")
    opened = open_pickled(tmp_path / "m.pt")
    assert opened.view("t").read(0, 12).tolist() == whole.t().flatten().tolist()
    assert opened.view("w").read(2, 6).tolist() == [2, 3, 4, 5]
    assert opened.view("row").read(0, 4).tolist() == [4, 5, 6, 7]


def resident_bytes() -> int:
    """Anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_files_are_mapped_not_read(tmp_path):
    torch.save({"w": torch.zeros(2**25)}, tmp_path / "m.pt")  # 134 MB
    before = resident_bytes()
    opened = open_pickled(tmp_path / "m.pt")
    total = sum(opened.view("w").read(i, i + 2**20).sum() for i in range(0, 2**25, 2**20))
    assert total == 0
    assert resident_bytes() - before < 2**25


def test_format_of_old_torch(tmp_path):
    torch.save(state(WEIGHTS), tmp_path / "m.bin", _use_new_zipfile_serialization=False)
    opened = open_pickled(tmp_path / "m.bin")
    assert opened.view("a").read(0, 6).tolist() == to_bf16(WEIGHTS["a"]).ravel().tolist()


def test_change_on_disk_is_noticed(tmp_path):
    folder = write_pickled(tmp_path / "m", WEIGHTS)
    opened = open_pickled(folder)
    opened.check_unchanged()
    os.utime(folder / "pytorch_model.bin", ns=(1, 1))
    with pytest.raises(StaleError, match=r"pytorch_model\.bin: changed while it was read"):
        opened.check_unchanged()


def test_scans_are_kept_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKVEC_CACHE", str(tmp_path / "cache"))
    folders = [write_pickled(tmp_path / n, family_weights()[n]) for n in ("instruct", "math")]
    family = tv.Family(instruct=folders[0], tasks={"t": folders[1]}, allow_pickle=True)
    tv.scan(family)
    tv.scan(family)
    assert len(list((tmp_path / "cache").glob("*"))) == 1
    write_pickled(folders[1], family_weights()["code"])
    tv.scan(family)
    assert len(list((tmp_path / "cache").glob("*"))) == 2


# --- what is not allowed, or is no weights -------------------------------------------------------


def test_refused_unless_allowed(tmp_path):
    folder = write_pickled(tmp_path / "m", WEIGHTS)
    file = folder / "pytorch_model.bin"
    assert refusal(folder, allow=False) == refusal(file, allow=False) == f"{file}: {REMEDY}"


class Command:
    """Unpickled, this runs a command that leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


class Call(Command):
    """Unpickled, this calls a function that leaves a file."""

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize(("kind", "asked"), [(Command, "posix.system"), (Call, "exec")])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_never_run(tmp_path, kind, asked, zipped, cli):
    written = tmp_path / "written"
    folder = write_pickled(tmp_path / "m", WEIGHTS)
    file = folder / "pytorch_model.bin"
    torch.save(
        {"a": torch.ones(2), "b": kind(written)}, file, _use_new_zipfile_serialization=zipped
    )
    assert f"{file}: {REMEDY}" == refusal(folder, allow=False)
    assert refusal(folder) == (
        f"{file}: is damaged or holds more than weights (asks for {asked}); nothing in it was run; "
        "save its state dict as safetensors if you trust it"
    )
    for flags in ([], ["--allow-pickle"]):
        code, _, _ = cli(
            "merge", tmp_path / "out", f"--instruct={folder}", f"--task=t={folder}:1",
            "--method=task_arithmetic", "--quiet", *flags,
        )  # fmt: skip
        assert code == 1
    assert not written.exists()
    assert not (tmp_path / "out").exists()
    torch.load(file, weights_only=False)  # the file does what it is made for
    assert written.exists()


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ({}, "it is empty"),
        ([1], "it is a list"),
        ({"w": torch.ones(2), "epoch": 3}, "'epoch' is not a tensor"),
        ({"state_dict": {"w": 1.0}}, "'state_dict' is not a tensor"),
    ],
)
def test_what_is_no_state_dict(tmp_path, content, got):
    torch.save(content, tmp_path / "m.pt")
    assert refusal(tmp_path / "m.pt") == (
        f"{tmp_path}/m.pt: is not a state dict ({got}); save the tensors by name, or under "
        "'state_dict'"
    )


@pytest.mark.parametrize("content", [b"", b"PK\3\4 half a zip", b"\x80\x02}q\x00."])
def test_damaged_files(tmp_path, content):
    (tmp_path / "m.bin").write_bytes(content)
    told = refusal(tmp_path / "m.bin")
    assert told.startswith(f"{tmp_path}/m.bin: is ")
    assert told.count("nothing in it was run") + told.count("not a state dict") == 1


def test_several_files_and_nothing_to_say_which(tmp_path):
    for name in ("a.pt", "b.pt"):
        torch.save(state(WEIGHTS), tmp_path / name)
    assert refusal(tmp_path) == (
        f"{tmp_path}: holds several pickled files and no pytorch_model.bin or {INDEX}; "
        "name one of the files"
    )


def test_one_file_is_read_rather_than_shards_as_in_transformers(tmp_path):
    folder = write_pickled(tmp_path / "m", WEIGHTS, shards=3)
    torch.save({"only": torch.ones(2)}, folder / "pytorch_model.bin")
    assert list(open_pickled(folder).tensors) == ["only"]


def test_index_that_does_not_fit(tmp_path):
    folder = write_pickled(tmp_path / "m", WEIGHTS, shards=2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["c"] = index["weight_map"]["a"]
    (folder / INDEX).write_text(json.dumps(index))
    assert refusal(folder).startswith(
        f"{folder}: {INDEX} says that 'c' is in pytorch_model-00001-of-00002.bin, where it is not"
    )
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    assert refusal(folder) == (
        f"{folder}: {INDEX} lists pytorch_model-00002-of-00002.bin, which is not there (1 of 2 "
        "shards missing); download it again"
    )


def test_quantised_weights(tmp_path):
    packed = {"w.qweight": torch.zeros(2, 2, dtype=torch.int32)}
    config = CONFIG | {"quantization_config": {"quant_method": "gptq"}}
    for name, weights in (("plain", state(WEIGHTS)), ("packed", packed)):
        (tmp_path / name).mkdir()
        torch.save(weights, tmp_path / name / "pytorch_model.bin")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    assert open_pickled(tmp_path / "plain").config == CONFIG
    refused = refusal(tmp_path / "packed")
    assert refused.startswith(f"{tmp_path / 'packed'}: ")
    assert "'w.qzeros'" in refused


def test_torch_that_is_not_safe_or_not_there(tmp_path, monkeypatch):
    folder = write_pickled(tmp_path / "m", WEIGHTS)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu124")
    assert refusal(folder, error=MissingExtraError) == (
        "torch 2.5.1+cu124 could be made to run code by a pickled file; this needs: pip install "
        "'taskvec[pickle]'"
    )
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert refusal(folder, error=MissingExtraError) == (
        "torch is not installed; this needs: pip install 'taskvec[pickle]'"
    )


# --- files that cost too much: the child that tries them out ---


def pickled_by_hand(folder: Path, opcodes: bytes) -> Path:
    """A file as torch writes it, whose pickle is another."""
    path = save(folder, {"w": torch.zeros(2)})
    with zipfile.ZipFile(path) as written:
        parts = {name: written.read(name) for name in written.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in parts.items():
            file.writestr(name, opcodes if name.endswith("data.pkl") else content)
    return path


def save(folder: Path, content: object) -> Path:
    folder.mkdir()
    torch.save(content, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


# A tuple of a tuple of …, twice each: 2^45 steps to hash as a key.
NESTED = b"\x80\x02})q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(45))


@pytest.mark.parametrize(
    "opcodes",
    [b"\x80\x02](" + b"N" * 20_000_000 + b"e.", NESTED + b"}(h\x2dNu."],
    ids=["very many steps", "a key that cannot be hashed"],
)
def test_a_file_may_not_cost_hours(tmp_path, monkeypatch, opcodes):
    monkeypatch.setattr(pickled, "_try_out", TRY_OUT)
    monkeypatch.setattr(pickled, "_CPU_SECONDS", 1)
    pickled_by_hand(tmp_path / "slow", opcodes)
    with pytest.raises(CheckpointError, match=r"needs more than 1 s.*safetensors"):
        open_pickled(tmp_path / "slow")


def test_a_file_may_not_cost_terabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(pickled, "_try_out", TRY_OUT)
    monkeypatch.setattr(pickled, "_MEMORY_BYTES", 2**26)
    pickled_by_hand(tmp_path / "large", b"\x80\x02](" + b"]" * 2_000_000 + b"e.")
    with pytest.raises(CheckpointError, match=r"needs more than .* GiB .*safetensors"):
        open_pickled(tmp_path / "large")


def test_elements_that_are_repeated_are_not_stored(tmp_path):
    save(tmp_path / "m", {"w": torch.zeros(1).expand(10**6, 10**6)})
    with pytest.raises(CheckpointError, match=r"'w'.*4,000,000,000,000 bytes, 4 are stored"):
        open_pickled(tmp_path / "m")


@pytest.mark.parametrize("of", [torch.zeros(3, dtype=torch.complex64).conj(), torch.arange(4)])
def test_norms_where_no_tensor_is_of_real_numbers(tmp_path, cli, of):
    save(tmp_path / "m", {"w": of})
    code, out, err = cli("inspect", tmp_path / "m", "--norms", "--allow-pickle", "--tensors")
    assert code == 0, err
    assert "max |w|" in out
