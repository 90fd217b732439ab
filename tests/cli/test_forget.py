"""`taskvec forget`."""

from __future__ import annotations

import pytest
from tests.cli.conftest import strict
from tests.conftest import read_raw

from taskvec.merging import scans


def test_forget_is_merge_with_the_sign_turned(tmp_path, family, cli):
    roles = ["--base", family["base"], "--instruct", family["instruct"], "--target", family["code"]]
    method = ["--scheme", "threshold"]
    assert cli("forget", tmp_path / "a", *roles, "--task", f"math={family['math']}:0.5")[0] == 0
    assert (
        cli("merge", tmp_path / "b", *roles, *method, "--task", f"math={family['math']}:-0.5")[0]
        == 0
    )
    assert read_raw(tmp_path / "a") == read_raw(tmp_path / "b")


def test_forget_takes_a_recipe_without_method(tmp_path, family, cli, recipe):
    recipe.write_text(recipe.read_text().replace("method: lata\n", ""))
    assert cli("merge", recipe, tmp_path / "m")[0] == 2
    code, out, _ = cli("forget", recipe, tmp_path / "f", "--json")
    assert code == 0
    assert strict(out)["decided_by"].startswith("lata")


def test_forgetting_nothing_writes_nothing_unless_forced(tmp_path, cli, flags, family):
    """No layer has a similarity of at most -1, so every weight is 0."""
    out = tmp_path / "out"
    code, text, err = cli("forget", out, *flags, "--threshold", "-1")
    assert (code, text) == (3, "")
    assert err.splitlines()[-1].startswith(f"taskvec: error: {out}: not written: every layer has ")
    assert "--threshold" in err
    assert "--force" in err
    assert not out.exists()
    assert cli("forget", out, *flags, "--threshold", "-1", "--force")[0] == 0
    assert read_raw(out) == read_raw(family["instruct"])


def test_forgetting_some_layers_is_no_failure(tmp_path, cli, flags):
    assert cli("forget", tmp_path / "out", *flags, "--threshold", "0.95")[0] == 0


@pytest.mark.parametrize(("threshold", "expected"), [("0.95", 0), ("-1", 3)])
def test_forgetting_scans_the_weights_once(threshold, expected, tmp_path, cli, flags, monkeypatch):
    read, calls = scans.collect, []
    monkeypatch.setattr(scans, "collect", lambda *a, **k: calls.append(1) or read(*a, **k))
    asked = ["forget", tmp_path / "out", *flags, "--threshold", threshold, "--no-cache"]
    assert cli(*asked)[0] == expected
    assert len(calls) == 1
