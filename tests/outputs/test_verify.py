"""Identity by content: manifests, verifying and replaying, scans that no longer fit the weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import read_file, read_raw, write_checkpoint, write_safetensors

import taskvec as tv
from taskvec.checkpoints.folder import FileIdentity
from taskvec.errors import CheckpointError, StaleError
from taskvec.merging import scans
from taskvec.outputs.manifest import RECIPE_FILE
from taskvec.recipes.replay import MANIFEST_FILE, read_manifest

Q1 = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
Check = tuple[str, str, str]


@pytest.fixture
def made(tmp_path: Path, family: dict[str, Path]) -> Path:
    """A folder merged by LATA from both tasks; the head is only copied."""
    tv.merge(
        whole(family),
        tmp_path / "out",
        method={"name": "lata", "scheme": "linear"},
        scale={"math": 0.5, "code": -0.25},
    )
    return tmp_path / "out"


def whole(family: dict[str, Path]) -> tv.Family:
    tasks = {"math": family["math"], "code": family["code"]}
    return tv.Family(tasks, base=family["base"], instruct=family["instruct"], exclude=(HEAD,))


def alter(folder: Path, name: str, element: int = 0) -> None:
    """Change one weight in place: header, size and times stay."""
    path = folder / "model.safetensors"
    before = path.stat()
    header, data = read_file(path)
    place = path.stat().st_size - len(data) + header[name]["data_offsets"][0] + 2 * element
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def checks(folder: Path, **options: Any) -> dict[str, tuple[str, str]]:
    return {c.what: (c.outcome, c.detail) for c in tv.verify(folder, **options)}


# --- verify --------------------------------------------------------------------------------------

ROLES = ["anchor", "base", "target", "task:code", "task:math"]


def test_all_is_the_same(made):
    found = checks(made, replay=True)
    assert found.pop("output") == ("same", "32 tensors")
    assert found.pop("target") == ("same", "32 tensors")
    assert found.pop("replay") == ("same", "32 tensors")
    assert found.pop("files") == ("same", "1 files")
    assert found == dict.fromkeys(
        ["anchor", "base", "task:code", "task:math"], ("same", "31 tensors")
    )
    assert list(checks(made, inputs=False)) == ["output", "files"]


@pytest.mark.parametrize(
    ("name", "element"), [(Q1, 0), (EMBEDDING, 67_199), (HEAD, 3), ("temperature", 0)]
)
def test_output_was_tampered_with(made, cli, name, element):
    alter(made, name, element)
    assert checks(made)["output"] == ("different", f"tensor {name!r} (1 of 32 differ)")
    code, out, err = cli("verify", made, "--quiet")
    assert (code, err) == (1, "")
    assert f"output       different  tensor {name!r} (1 of 32 differ)\n" in out
    assert "task 'math'  same       31 tensors\n" in out


def test_output_got_another_tensor(made):
    header, _ = read_file(made / "model.safetensors")
    assert HEAD in header
    write_checkpoint(made, {**{n: np.zeros(1) for n in read_raw(made)}, "new": np.zeros(1)})
    assert checks(made)["output"] == ("different", "has 'new', which the manifest does not know")


def test_output_lost_a_tensor(made):
    kept = {n: np.zeros(1) for n in read_raw(made) if n != Q1}
    write_checkpoint(made, kept)
    assert checks(made)["output"] == ("different", f"lacks {Q1!r} (1 tensors missing)")


def test_output_whose_shapes_were_changed(made):
    """The same bytes under another header."""
    path = made / "model.safetensors"
    header, data = read_file(path)
    header[HEAD]["shape"] = header[HEAD]["shape"][::-1]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert checks(made)["output"] == ("different", "dtypes or shapes of tensors")


def test_output_with_nan(made):
    path = made / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2:] = b"\xc0\x7f"
    path.write_bytes(content)
    outcome, detail = checks(made)["output"]
    assert outcome == "different"
    assert "holds nan at element " in detail


def test_output_in_other_shards_is_the_same(made, tmp_path):
    placed = {}
    for i, (name, (dtype, shape, raw)) in enumerate(read_raw(made).items()):
        file = f"model-0000{i % 3 + 1}-of-00003.safetensors"
        placed.setdefault(file, {})[name] = np.frombuffer(raw, "<f2").reshape(shape)
        assert dtype == "BF16"
    (made / "model.safetensors").unlink()
    for file, tensors in placed.items():
        write_safetensors(made / file, tensors, "F16")  # bits as they are; the dtype is put right
        content = (made / file).read_bytes()
        (made / file).write_bytes(content.replace(b'"dtype": "F16", ', b'"dtype": "BF16",'))
    index = {"weight_map": {name: file for file, tensors in placed.items() for name in tensors}}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checks(made, replay=True)["output"] == ("same", "32 tensors")


@pytest.mark.parametrize(("member", "role"), [("math", "task:math"), ("base", "base")])
def test_input_was_changed(made, family, cli, member, role):
    alter(family[member], Q1, 5)
    found = checks(made)
    assert found[role] == ("different", f"tensor {Q1!r} (1 of 31 differ)")
    assert found["output"][0] == "same"
    assert cli("verify", made, "--quiet")[0] == 1
    assert cli("verify", made, "--quiet", "--no-inputs")[0] == 0


def test_input_became_nan(made, family, cli):
    weights = {n: np.full((2,), np.nan) for n in read_raw(family["math"])}
    write_checkpoint(family["math"], weights)
    assert checks(made)["task:math"][0] == "different"


def test_input_is_gone(made, family, cli):
    gone = family["code"].rename(family["code"].with_name("moved"))
    code, out, err = cli("verify", made, "--json", "--quiet")
    assert (code, err) == (3, "")
    found = {c["what"]: c for c in json.loads(out)}
    assert found["task:code"] == {
        "what": "task:code",
        "outcome": "absent",
        "detail": f"{family['code']}: no such folder or file; a model is a folder, a .safetensors "
        "file, or org/name on the hub",
    }
    assert {c["outcome"] for what, c in found.items() if what != "task:code"} == {"same"}
    assert cli("verify", made, "--no-inputs")[0] == 0
    code, out, _ = cli("verify", made, "--no-inputs", "--replay", "--json")
    assert code == 3
    assert [check["outcome"] for check in json.loads(out)] == ["same", "same", "absent"]
    gone.rename(family["code"])
    assert cli("verify", made, "--replay")[0] == 0


def test_tampered_and_gone_is_tampered(made, family, cli):
    alter(made, Q1)
    family["code"].rename(family["code"].with_name("moved"))
    assert cli("verify", made)[0] == 1


def test_replay_notices_an_edited_table(made, cli):
    manifest = json.loads((made / MANIFEST_FILE).read_text())
    manifest["table"]["weights"]["math"][Q1] = 0.123
    (made / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert cli("verify", made)[0] == 0
    code, out, _ = cli("verify", made, "--replay", "--json")
    assert code == 1
    assert json.loads(out)[-1] == {
        "what": "replay", "outcome": "different", "detail": f"tensor {Q1!r} (1 of 32 differ)",
    }  # fmt: skip


def test_folder_without_manifest(family, cli):
    assert cli("verify", family["math"]) == (
        1, "", f"taskvec: error: {family['math']}: holds no {MANIFEST_FILE}; it was not written by "
        "taskvec\n",
    )  # fmt: skip
    assert cli("verify", "/no/such/folder")[0] == 1


def test_tasks_are_in_the_order_of_the_recipe(made):
    """`made` names math before code."""
    roles = [check.what for check in tv.verify(made) if check.what.startswith("task:")]
    assert roles == ["task:math", "task:code"]


def test_folder_that_does_not_exist(tmp_path, cli):
    """A misspelled folder is not one that another program wrote."""
    code, _, err = cli("verify", tmp_path / "mergd")
    assert code == 1
    assert f"{tmp_path / 'mergd'}: no such file or folder" in err


def test_folder_without_weights(made, cli):
    (made / "model.safetensors").unlink()
    code, out, err = cli("verify", made)
    assert (code, out) == (1, "")
    assert err.startswith(f"taskvec: error: {made}: holds no safetensors file")


def edits() -> list[tuple[str, Callable[[dict[str, Any]], object]]]:
    """Ways to spoil a manifest."""
    ways: list[tuple[str, Callable[[dict[str, Any]], object]]] = []
    for part in ("format", "recipe", "table", "members", "output", "versions"):
        ways.append((f"without {part}", lambda m, p=part: m.pop(p)))
        ways.append((f"{part} a list", lambda m, p=part: m.update({p: []})))
    for part in ("digests", "fingerprint"):
        ways.append((f"output without {part}", lambda m, p=part: m["output"].pop(p)))
        ways.append((f"member without {part}", lambda m, p=part: m["members"]["base"].pop(p)))
        ways.append(
            (f"member with {part} of 3", lambda m, p=part: m["members"]["base"].update({p: 3}))
        )
    ways.append(("member without path", lambda m: m["members"]["base"].pop("path")))
    ways.append(("member of nothing", lambda m: m["members"].update({"base": None})))
    ways.append(("digest a number", lambda m: m["output"]["digests"].update({Q1: 1})))
    ways.append(("recipe without tasks", lambda m: m["recipe"].pop("tasks")))
    ways.append(("recipe with more", lambda m: m["recipe"].update({"more": 1})))
    ways.append(("table of nothing", lambda m: m["table"].update({"weights": {}})))
    ways.append(("table with a word", lambda m: m["table"]["weights"]["math"].update({Q1: "x"})))
    ways.append(("table with target a number", lambda m: m["table"].update({"target": 3})))
    ways.append(("table of one task", lambda m: m["table"]["weights"].pop("math")))
    ways.append(
        ("table lacking a tensor", lambda m: [c.pop(Q1) for c in m["table"]["weights"].values()])
    )
    return ways


@pytest.mark.parametrize(("name", "edit"), edits())
def test_spoilt_manifest(made, cli, tmp_path, name, edit):
    """One line, and nothing that Python says."""
    manifest = json.loads((made / MANIFEST_FILE).read_text())
    edit(manifest)
    (made / MANIFEST_FILE).write_text(json.dumps(manifest))
    for arguments in (
        ["verify", made, "--replay"],
        ["merge", made / MANIFEST_FILE, tmp_path / "two"],
    ):
        code, _, err = cli(*arguments, "--quiet")
        assert code in (1, 2, 3)
        assert err.count("\n") <= 1
        assert code == 3 or err.startswith("taskvec: error: ")
    assert not (tmp_path / "two").exists()


def test_manifest_that_is_no_json(made):
    (made / MANIFEST_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_manifest(made)


# --- what a manifest holds, and replay -----------------------------------------------------------


def test_what_a_manifest_holds(made, family):
    manifest = read_manifest(made)
    assert set(manifest["versions"]) == {"taskvec", "numpy", "numba", "python", "machine"}
    assert manifest["recipe"]["tasks"]["math"] == {
        "model": str(family["math"]), "scale": 0.5, "scheme": "linear", "granularity": "tensor",
        "threshold": 0.95, "normalize_weights": "none",
    }  # fmt: skip
    assert manifest["recipe"]["seed"] == 0
    assert sorted(manifest["members"]) == ROLES
    assert manifest["members"]["base"]["path"] == str(family["base"])
    assert (
        manifest["members"]["anchor"]["digests"][Q1] == manifest["members"]["target"]["digests"][Q1]
    )
    assert set(manifest["output"]["digests"]) == set(read_raw(made))
    assert set(manifest["table"]["weights"]) == {"math", "code"}
    assert all(len(d) == 32 for d in manifest["output"]["digests"].values())


def test_recipe_beside_the_result_makes_it_again(made, tmp_path, cli):
    assert cli("merge", made / RECIPE_FILE, tmp_path / "two")[0] == 0
    assert read_raw(tmp_path / "two") == read_raw(made)


@pytest.mark.parametrize(
    "flags", [[], ["--shard-size", "50kB"], ["--dtype", "float32", "--precision", "float64"]]
)
def test_manifest_is_replayed_bit_for_bit(tmp_path, family, cli, flags, monkeypatch):
    roles = ["--base", family["base"], "--instruct", family["instruct"], "--target", family["code"]]
    tasks = [
        "--task",
        f"math={family['math']}:0.5",
        "--exclude",
        HEAD,
        "--normalize-weights",
        "mean",
    ]
    assert cli("merge", tmp_path / "one", *roles, *tasks, *flags)[0] == 0
    monkeypatch.chdir("/")
    assert cli("merge", tmp_path / "one" / MANIFEST_FILE, tmp_path / "two")[0] == 0
    one = {p.name: p.read_bytes() for p in (tmp_path / "one").glob("*.safetensors*")}
    two = {p.name: p.read_bytes() for p in (tmp_path / "two").glob("*.safetensors*")}
    assert one == two
    assert len(one) == (1 if "--shard-size" not in flags else 4)
    first, second = read_manifest(tmp_path / "one"), read_manifest(tmp_path / "two")
    assert first["output"] == second["output"]
    assert first["members"] == second["members"]
    assert first["table"] == second["table"]
    assert cli("verify", tmp_path / "two", "--replay")[0] == 0


def test_manifest_of_a_given_table_is_replayed(tmp_path, family, cli):
    """The weights are those of the table, although the recipe names a method."""
    roles = [
        "--instruct",
        family["instruct"],
        "--task",
        f"math={family['math']}:1",
        "--method",
        "task_arithmetic",
    ]
    names = [n for n, (dtype, _, _) in read_raw(family["math"]).items() if dtype == "BF16"]
    lines = ["tensor,math", *(f"{name},{i / 40}" for i, name in enumerate(names))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    assert cli("merge", tmp_path / "one", *roles, "--table", tmp_path / "t.csv")[0] == 0
    assert cli("merge", tmp_path / "one" / MANIFEST_FILE, tmp_path / "two")[0] == 0
    assert read_raw(tmp_path / "one") == read_raw(tmp_path / "two")


def test_manifest_takes_no_flags(made, tmp_path, cli):
    path = made / MANIFEST_FILE
    assert cli("merge", path, tmp_path / "two", "--dtype", "float16") == (
        2, "", f"taskvec: error: {path}: a manifest is replayed as it is; remove --dtype float16\n",
    )  # fmt: skip


@pytest.mark.parametrize(("member", "name", "role"), [
    ("math", Q1, "task 'math'"), ("code", EMBEDDING, "task 'code'"), ("instruct", HEAD, "target"),
])  # fmt: skip
def test_replay_of_other_weights_is_refused(made, tmp_path, family, cli, member, name, role):
    alter(family[member], name, 2)
    assert cli("merge", made / MANIFEST_FILE, tmp_path / "two") == (
        1, "", f"taskvec: error: {role} ({family[member]}): weights of tensor {name!r} are not "
        "those that were measured before; scan again (--rescan)\n",
    )  # fmt: skip
    assert not (tmp_path / "two").exists()


# --- scans that no longer fit --------------------------------------------------------------------


@pytest.mark.parametrize(("member", "role"), [
    ("math", "task 'math'"), ("instruct", "instruct"), ("base", None),
])  # fmt: skip
def test_table_of_an_earlier_scan_is_stale(tmp_path, family, member, role):
    """Weights changed; header, size and modification time did not."""
    members = whole(family)
    table = tv.lata(tv.scan(members), scheme="linear")
    name = max(table.of("math"), key=table.of("math").get)
    alter(family[member], name, 1)
    scale = {"math": 0.5, "code": 0.5}
    if role is None:  # the merge does not read the base; it only said what the weights are
        tv.merge(members, tmp_path / "out", table=table, scale=scale)
        return
    with pytest.raises(StaleError) as caught:
        tv.merge(members, tmp_path / "out", table=table, scale=scale)
    assert str(caught.value) == (
        f"{role} ({family[member]}): weights of tensor {name!r} are not those that were "
        "measured before; scan again (--rescan)"
    )
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["family"]


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every pass over weights for statistics."""
    passes: list[int] = []
    real = scans.collect

    def counted(*args: Any, **options: Any) -> Any:
        passes.append(1)
        return real(*args, **options)

    monkeypatch.setattr(scans, "collect", counted)
    return passes


def test_kept_scan_is_used(family, scanned):
    first, second = tv.scan(whole(family)), tv.scan(whole(family))
    assert len(scanned) == 1
    assert json.dumps(first.to_json()) == json.dumps(second.to_json())
    assert first.keys == second.keys


def test_other_method_and_scale_read_no_weights_for_statistics(tmp_path, family, scanned, cli):
    flags = ["--base", family["base"], "--instruct", family["instruct"]]
    for i, scheme in enumerate(["linear", "logarithmic", "threshold"]):
        task = ["--task", f"math={family['math']}:{i}", "--scheme", scheme]
        assert cli("merge", tmp_path / str(i), *flags, *task)[0] == 0
    assert cli("scan", *flags, "--task", f"math={family['math']}")[0] == 0
    assert len(scanned) == 1


@pytest.mark.parametrize("option", ["--no-cache", "--rescan"])
def test_options_of_the_cache(family, scanned, cli, option):
    flags = [
        "--base",
        family["base"],
        "--instruct",
        family["instruct"],
        "--task",
        f"math={family['math']}",
    ]
    assert cli("scan", *flags, option)[0] == 0
    kept = list(Path(os.environ["TASKVEC_CACHE"]).glob("scan-*.json"))
    assert len(kept) == (option == "--rescan")
    assert cli("scan", *flags, option)[0] == 0
    assert len(scanned) == 2


def touch(path: Path, **times: int) -> None:
    before = path.stat()
    os.utime(
        path, ns=(times.get("atime", before.st_atime_ns), times.get("mtime", before.st_mtime_ns))
    )


@pytest.mark.parametrize("change", ["content", "mtime", "ctime", "rewritten", "copy", "tensors"])
def test_kept_scan_is_not_used_when_files_look_changed(family, scanned, change):
    first = tv.scan(whole(family))
    path = family["math"] / "model.safetensors"
    content, before = path.read_bytes(), path.stat()
    if change == "content":
        alter(family["math"], Q1)  # the change time tells, which nobody can set
    elif change == "mtime":
        touch(path, mtime=before.st_mtime_ns + 1)
    elif change == "ctime":
        path.chmod(0o600)
    elif change == "rewritten":
        path.write_bytes(content)
    elif change == "copy":
        path.unlink()
        path.write_bytes(content)
        touch(path, mtime=before.st_mtime_ns)
    else:
        weights = {n: np.ones(s, np.float32) for n, (_, s, _) in read_raw(family["math"]).items()}
        write_checkpoint(family["math"], weights)
    second = tv.scan(whole(family))
    assert len(scanned) == 2
    same = first.members["task:math"].fingerprint == second.members["task:math"].fingerprint
    assert same == (change not in ("content", "tensors"))


def test_kept_scan_that_fits_only_from_outside_is_noticed(
    tmp_path, family, scanned, cli, monkeypatch
):
    """A file system without change times: the kept scan is taken, and found stale when merging."""
    monkeypatch.setattr(
        FileIdentity,
        "of",
        classmethod(lambda cls, path, stat=None: cls(path.name, path.stat().st_size, 0, 0, 0)),
    )
    flags = [
        "--base",
        family["base"],
        "--instruct",
        family["instruct"],
        "--task",
        f"math={family['math']}:1",
    ]
    assert cli("scan", *flags)[0] == 0
    alter(family["math"], EMBEDDING, 66_000)
    code, out, err = cli("merge", tmp_path / "out", *flags)
    assert (code, out) == (1, "")
    assert err == (
        f"taskvec: error: task 'math' ({family['math']}): weights of tensor {EMBEDDING!r} are "
        "not those that were measured before; scan again (--rescan)\n"
    )
    assert len(scanned) == 1
    assert cli("merge", tmp_path / "out", *flags, "--rescan")[0] == 0
    assert len(scanned) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 99}',
                                     '{"format": 1, "tasks": [], "tensors": []}'])  # fmt: skip
def test_kept_scan_that_is_broken_is_made_anew(family, scanned, content):
    first = tv.scan(whole(family))
    (kept,) = Path(os.environ["TASKVEC_CACHE"]).glob("scan-*.json")
    kept.write_text(content)
    assert tv.scan(whole(family)).to_json() == first.to_json()
    assert len(scanned) == 2


def test_kept_scan_that_was_cut_is_made_anew(family, scanned):
    tv.scan(whole(family))
    (kept,) = Path(os.environ["TASKVEC_CACHE"]).glob("scan-*.json")
    data = json.loads(kept.read_text())
    data["tensors"].pop(Q1)
    kept.write_text(json.dumps(data))
    assert Q1 in tv.scan(whole(family)).names
    assert len(scanned) == 2


def test_cache_that_cannot_be_written_is_no_error(family, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TASKVEC_CACHE", str(tmp_path / "file" / "cache"))
    assert tv.scan(whole(family)).tasks == ("code", "math")


def test_member_changed_while_it_was_scanned(family, monkeypatch):
    real = scans.collect

    def then_change(*args: Any, **options: Any) -> Any:
        result = real(*args, **options)
        alter(family["math"], Q1)
        return result

    monkeypatch.setattr(scans, "collect", then_change)
    with pytest.raises(StaleError, match="changed while it was read; run again when it is at rest"):
        tv.scan(whole(family))
    assert not list(Path(os.environ["TASKVEC_CACHE"]).glob("*"))


def test_the_recipe_in_a_folder_has_no_absolute_path_and_may_move_along(
    made, tmp_path, family, cli
):
    text = (made / RECIPE_FILE).read_text()
    assert str(tmp_path) not in text
    assert str(family["math"]) not in text
    assert cli("merge", made / RECIPE_FILE, tmp_path / "again")[0] == 0
    assert read_raw(tmp_path / "again") == read_raw(made)
