"""A run folder of a 16-block family with everything in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from tests.conftest import family_weights, write_family
from tests.reporting.made import write_all

import taskvec as tv
from taskvec.merging.scans import save_scan

BLOCKS = 16


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder; its argument is markup that names and texts have in them."""
    made: dict[str, Path] = {}

    def folder(mark: str = "") -> Path:
        if mark not in made:
            made[mark] = _run(tmp_path_factory.mktemp("run"), mark)
        return made[mark]

    return folder


def _run(root: Path, mark: str) -> Path:
    members = write_family(root / "models", family_weights(BLOCKS))
    tasks = {"math": members["math"], "code": members["code"]}
    family = tv.Family(base=members["base"], instruct=members["instruct"], tasks=tasks)
    out = root / "run"
    out.mkdir()
    scan = tv.scan(family, cache="off")
    tv.merge(family, out / "merged", method="lata", scale=0.5, cache="off")
    if mark:  # as a file from somebody else may have it; recipes refuse such names
        renamed = {f"{role}{mark}" if role == "task:code" else role: member
                   for role, member in scan.members.items()}  # fmt: skip
        scan = replace(scan, tasks=(f"code{mark}", "math"), members=renamed)
        manifest = out / "merged" / "taskvec-manifest.json"
        told = json.loads(manifest.read_text())
        for names in (told["recipe"]["tasks"], told["table"]["weights"]):
            names[f"code{mark}"] = names.pop("code")
        told["decided_by"] += mark
        manifest.write_text(json.dumps(told))
    save_scan(scan, out / "scan.json")
    write_all(out, tv.lata(scan, scheme="linear"), mark)
    return out
