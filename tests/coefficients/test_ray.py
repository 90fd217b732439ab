"""Candidates scored by the workers of a local cluster, of which one is killed in the middle."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("ray") is None:  # not imported here: the executor must be first
    pytest.skip("needs ray", allow_module_level=True)
pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("optuna")

from tests.coefficients.made_up import Formula, job, peak

from taskvec.coefficients.api import run_search
from taskvec.coefficients.ray_executor import RayExecutor
from taskvec.coefficients.scoring import Local
from taskvec.errors import CheckpointError, TaskvecError, UsageError

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _paths():
    """Workers are processes of their own, which must find these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        patch.setenv("RAY_AUTH_MODE", "disabled")  # or Ray keeps a token in the home folder
        yield


class Deadly(Formula):
    """Ends its process at one λ: the first time, or always. Notes who scored what."""

    def __init__(self, job, folder, deadly, *, always):
        super().__init__(self._score)
        self.folder, self.deadly, self.always = folder, deadly, always

    def _score(self, recipe):
        scale = None if recipe is None else recipe.scales["math"]
        with (self.folder / f"{scale}").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.2)
        tries = len((self.folder / f"{scale}").read_text().split())
        if scale == self.deadly and (self.always or tries == 1):
            os.kill(os.getpid(), 9)
        if scale == 0.8:
            raise CheckpointError("out of paper")
        return peak().score(recipe)


def listening() -> set[str]:
    """Addresses that processes of this user's session listen on, from the kernel's tables."""
    found = set()
    for table, width in (("tcp", 8), ("tcp6", 32)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A":
                found.add(f"{local[:width]}:{local[width + 1 :]}")
    return found


LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


def test_a_worker_is_killed_while_it_scores(tmp_path):
    """Its candidate is scored by another; one that kills twice is recorded; errors are kept."""
    notes = tmp_path / "notes"
    notes.mkdir()
    before = listening()
    made = job("scale=0.5:0.9:0.1")
    once = partial(Deadly, folder=notes, deadly=0.6, always=False)
    always = partial(Deadly, folder=notes, deadly=0.9, always=True)
    beyond = set()

    class Watched(RayExecutor):
        def next(self):
            outcome = super().next()
            beyond.update(a for a in listening() - before if not a.startswith(LOOPBACK))
            return outcome

    executor = partial(Watched, workers=2, local=once)
    found = run_search(made, tmp_path / "once", executor=executor)
    assert not sys.modules["ray"].is_initialized()
    assert beyond == set()
    assert found.recipe.scales["math"] == 0.7
    errors = {t["point"]["scale"]: t["error"] for t in found.record["trials"] if t["error"]}
    assert errors == {0.8: "out of paper"}
    killed, scored = (notes / "0.6").read_text().split()
    assert killed != scored
    everyone = {pid for path in notes.iterdir() for pid in path.read_text().split()}
    assert len(everyone) == 3  # two, and the one that took the place of the killed

    executor = partial(RayExecutor, workers=2, local=always)
    found = run_search(made, tmp_path / "always", executor=executor)
    (error,) = [t["error"] for t in found.record["trials"] if t["point"]["scale"] == 0.9]
    assert error.startswith("2 workers ended over it: ")
    assert len((notes / "0.9").read_text().split()) == 1 + 2  # the first search scored it once
    assert found.record["tried"] == 3


def test_models_on_workers_score_as_here(tmp_path):
    """The zoo, by two workers and by this process: the same values, the same winner."""
    made = job("scale=0.5:0.7:0.2", maximize=["zoo:math", "zoo:code"], keep=["zoo:text"])
    here = run_search(made, tmp_path / "here", executor=Local)
    there = run_search(made, tmp_path / "there", executor=partial(RayExecutor, workers=2))
    for one, other in zip(here.record["trials"], there.record["trials"], strict=True):
        assert one["values"] == other["values"]
    assert here.record["test"] == there.record["test"]
    assert here.recipe == there.recipe


def test_what_cannot_be_started(monkeypatch):
    with pytest.raises(UsageError, match="ray workers must be 1 or more; got 0"):
        RayExecutor(job("scale=0:1"), workers=0)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
        patch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
        with (
            pytest.raises(TaskvecError, match="Ray was imported before the search, and would"),
            RayExecutor(job("scale=0:1")),
        ):
            pass

    def refuse(**about):
        raise ConnectionError("nobody\nis there")

    fake = SimpleNamespace(is_initialized=lambda: False, init=refuse, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", fake)
    with (
        pytest.raises(
            TaskvecError, match=r"no Ray cluster can be reached at 127\.0\.0\.1:1: nobody$"
        ),
        RayExecutor(job("scale=0:1"), address="127.0.0.1:1"),
    ):
        pass
