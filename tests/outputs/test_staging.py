"""Writing: layout, journal, publishing; what safetensors reads of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tests.conftest import read_file, read_raw

from taskvec.checkpoints.folder import open_checkpoint
from taskvec.checkpoints.shards import OutputTensor, lay_out
from taskvec.dtypes import DTYPES
from taskvec.errors import OutputError
from taskvec.outputs import staging
from taskvec.outputs.staging import JOURNAL, Staging, staged

F32, BF16, I64 = DTYPES["F32"], DTYPES["BF16"], DTYPES["I64"]
TENSORS = [
    OutputTensor("b", F32, (2, 3)),
    OutputTensor("a", BF16, (5,)),
    OutputTensor("ids", I64, (2,)),
    OutputTensor("empty", F32, (0, 7)),
    OutputTensor("scalar", BF16, ()),
]
VALUES = {
    "a": np.arange(5, dtype="<u2"),
    "b": np.arange(6, dtype="<f4"),
    "ids": np.array([1, -1], "<i8"),
    "empty": np.zeros(0, "<f4"),
    "scalar": np.array([7], "<u2"),
}
ROOMY = 10**9


def write(writer: Staging, names: set[str]) -> None:
    for i, tensor in enumerate(writer.tensors):
        if tensor.name in names:
            writer.write(i, 0, VALUES[tensor.name])
            writer.complete(i, {"output": tensor.name})


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- layout --------------------------------------------------------------------------------------


def test_one_file_when_all_fits():
    (shard,) = lay_out(TENSORS, ROOMY)
    assert shard.file == "model.safetensors"
    assert [t.name for t in shard.tensors] == ["ids", "b", "empty", "a", "scalar"]
    assert shard.nbytes == len(shard.header) + 16 + 24 + 0 + 10 + 2
    assert staging.index_of([shard]) is None


def test_layout_does_not_depend_on_the_order_given():
    assert lay_out(TENSORS[::-1], 20) == lay_out(TENSORS, 20)


def test_shards_hold_at_most_their_size_unless_one_tensor_is_larger():
    shards = lay_out(TENSORS, 20)
    assert [s.file for s in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    held = [[t.name for t in s.tensors] for s in shards]
    assert held == [["ids"], ["b"], ["empty", "a", "scalar"]]
    assert staging.index_of(shards) == {
        "metadata": {"total_size": 52},
        "weight_map": {
            "ids": shards[0].file,
            "b": shards[1].file,
            "empty": shards[2].file,
            "a": shards[2].file,
            "scalar": shards[2].file,
        },
    }


def test_every_tensor_is_aligned_to_its_elements(tmp_path):
    sizes = {"F64": 3, "F32": 1, "BF16": 1, "U8": 1, "I64": 1, "F16": 3}
    tensors = [OutputTensor(f"x{name}", DTYPES[name], (n,)) for name, n in sizes.items()]
    (shard,) = lay_out(tensors, ROOMY)
    header, _ = read_header_of(tmp_path, shard.header, shard.nbytes)
    for name, about in header.items():
        if name != "__metadata__":
            at = len(shard.header) + about["data_offsets"][0]
            assert at % DTYPES[about["dtype"]].itemsize == 0


def read_header_of(folder: Path, header: bytes, size: int) -> tuple[dict, bytes]:
    (folder / "x").write_bytes(header.ljust(size, b"\0"))
    return read_file(folder / "x")


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [ROOMY, 20])
def test_official_library_reads_what_was_written(tmp_path, shard_bytes):
    out = tmp_path / "out"
    with staged(out, lay_out(TENSORS, shard_bytes), "key") as writer:
        write(writer, set(VALUES))
        assert not out.exists()
        writer.add("config.json", b"{}")
        writer.add("sub/file.txt", b"text")
        writer.publish()
    seen = {}
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            seen |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {n: tuple(t.shape) for n, t in seen.items()} == {t.name: t.shape for t in TENSORS}
    assert str(seen["a"].dtype) == "torch.bfloat16"
    assert seen["b"].flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert seen["ids"].tolist() == [1, -1]
    assert {name: raw for name, (_, _, raw) in read_raw(out).items()} == {
        name: array.tobytes() for name, array in VALUES.items()
    }
    assert set(open_checkpoint(out).tensors) == set(VALUES)
    assert (out / "sub" / "file.txt").read_bytes() == b"text"
    assert names_in(tmp_path) == ["out"]
    assert JOURNAL not in names_in(out)


def test_blocks_in_any_order(tmp_path):
    with staged(tmp_path / "out", lay_out(TENSORS, ROOMY), "key") as writer:
        for i, tensor in reversed(list(enumerate(writer.tensors))):
            values = VALUES[tensor.name]
            for start in reversed(range(0, len(values), 2)):
                writer.write(i, start, values[start : start + 2])
            writer.complete(i, {})
        writer.publish()
    assert read_raw(tmp_path / "out")["b"][2] == VALUES["b"].tobytes()


# --- journal -------------------------------------------------------------------------------------


class Killed(BaseException):
    """As little caught as a kill."""


def interrupted(out: Path, done: set[str], key: str = "key", shard_bytes: int = 20) -> None:
    """Leave a staging folder as an interrupted run does."""
    shards = lay_out(TENSORS, shard_bytes)
    with pytest.raises(Killed), staged(out, shards, key) as writer:  # noqa: PT012
        write(writer, done)
        writer.flush()
        raise Killed


def done_of(out: Path, key: str = "key", shard_bytes: int = 20) -> dict[str, dict[str, str]]:
    """What the next run of a job takes up; it is then interrupted too."""
    found = {}
    shards = lay_out(TENSORS, shard_bytes)
    with pytest.raises(Killed), staged(out, shards, key) as writer:  # noqa: PT012
        found = {name: dict(record) for name, record in writer.done.items()}
        raise Killed
    return found


def test_interrupted_run_is_taken_up(tmp_path):
    out = tmp_path / "out"
    interrupted(out, {"a", "b"})
    assert names_in(tmp_path) == [".out.taskvec"]
    assert done_of(out) == {"a": {"output": "a"}, "b": {"output": "b"}}
    with staged(out, lay_out(TENSORS, 20), "key") as writer:
        write(writer, set(VALUES) - set(writer.done))
        writer.publish()
    assert {n: raw for n, (_, _, raw) in read_raw(out).items()} == {
        name: array.tobytes() for name, array in VALUES.items()
    }
    assert names_in(tmp_path) == ["out"]


def test_interrupted_twice(tmp_path):
    interrupted(tmp_path / "out", {"a"})
    interrupted(tmp_path / "out", {"b"})
    assert set(done_of(tmp_path / "out")) == {"a", "b"}


@pytest.mark.parametrize("change", ["key", "layout", "header"])
def test_run_of_another_job_begins_anew(tmp_path, change):
    out = tmp_path / "out"
    interrupted(out, {"a"})
    if change == "header":
        file = tmp_path / ".out.taskvec" / "model-00002-of-00003.safetensors"
        file.write_bytes(b"x" + file.read_bytes()[1:])
    found = done_of(out, "other" if change == "key" else "key", 1 if change == "layout" else 20)
    assert found == {}
    assert len(list((tmp_path / ".out.taskvec").glob("*.safetensors"))) == (
        5 if change == "layout" else 3
    )


@pytest.mark.parametrize("tail", ['{"b": {"outp', '{"b"', "\0\0\0\0", "{", '"'])
def test_journal_whose_last_line_is_half_written(tmp_path, tail):
    interrupted(tmp_path / "out", {"a"})
    journal = tmp_path / ".out.taskvec" / JOURNAL
    journal.write_text(journal.read_text() + tail)
    assert set(done_of(tmp_path / "out")) == {"a"}
    interrupted(tmp_path / "out", {"ids"})
    assert {"a"} <= set(done_of(tmp_path / "out")) <= {"a", "ids"}


@pytest.mark.parametrize("content", ["", "x", "[]", '{"key": "other"}\n', "\xff", '["key"]\n{}'])
def test_journal_that_is_none(tmp_path, content):
    interrupted(tmp_path / "out", {"a"})
    (tmp_path / ".out.taskvec" / JOURNAL).write_text(content, encoding="latin-1")
    assert done_of(tmp_path / "out") == {}


@pytest.mark.parametrize("lost", ["model-00001-of-00003.safetensors", JOURNAL])
def test_staging_that_lacks_a_file(tmp_path, lost):
    interrupted(tmp_path / "out", {"a", "ids"})
    (tmp_path / ".out.taskvec" / lost).unlink()
    assert done_of(tmp_path / "out") == {}


def test_staging_whose_file_was_cut(tmp_path):
    """A crash of the system can leave a file short; what the journal says of it is not believed."""
    interrupted(tmp_path / "out", {"a", "ids"})
    file = tmp_path / ".out.taskvec" / "model-00001-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert done_of(tmp_path / "out") == {}


def test_staging_that_is_a_file(tmp_path):
    (tmp_path / ".out.taskvec").write_text("not ours")
    with pytest.raises(OutputError), staged(tmp_path / "out", lay_out(TENSORS, 20), "key"):
        pass


def test_journal_names_only_what_was_synced(tmp_path, monkeypatch):
    order = []
    real = staging.os.fsync
    monkeypatch.setattr(staging.os, "fsync", lambda fd: (order.append(fd), real(fd))[1])
    out, shards = tmp_path / "out", lay_out(TENSORS, 20)
    with pytest.raises(Killed), staged(out, shards, "key") as writer:  # noqa: PT012
        write(writer, {"a"})
        journal = tmp_path / ".out.taskvec" / JOURNAL
        assert len(journal.read_text().splitlines()) == 1
        order.clear()
        writer.flush()
        assert set(order[:3]) == set(writer._files)
        assert json.loads(journal.read_text().splitlines()[1]) == {"a": {"output": "a"}}
        raise Killed


def test_two_runs_at_once(tmp_path):
    out, shards = tmp_path / "out", lay_out(TENSORS, 20)
    with staged(out, shards, "first") as first:
        with pytest.raises(OutputError) as caught, staged(out, shards, "second"):
            pass
        assert str(caught.value) == f"{out}: another run is writing there; wait for it"
        write(first, set(VALUES))
        first.publish()
    assert read_raw(out)["b"][2] == VALUES["b"].tobytes()
    assert names_in(tmp_path) == ["out"]


def test_failure_removes_the_staging_folder(tmp_path):
    shards = lay_out(TENSORS, 20)
    with pytest.raises(ValueError, match="mine"), staged(tmp_path / "out", shards, "key"):
        raise ValueError("mine")
    assert names_in(tmp_path) == []
