"""The folder of a run: settings, a line for every step, and the weights from which it resumes.

    OUT/run.json             settings, data, what trains, versions; at the end the results
    OUT/metrics.jsonl        a line for each step and each validation
    OUT/state.safetensors    what trains and AdamW's moments, after the step in its metadata
    OUT/vector.safetensors   at the end: the task vector

Files are replaced atomically. A run with the same settings resumes from the state; one with other
settings is refused with a list of the differences.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from taskvec import documents
from taskvec.checkpoints.memory import dtype_of, stored
from taskvec.checkpoints.safetensors import read_metadata, write_header
from taskvec.errors import CheckpointError, OutputError
from taskvec.extras import require
from taskvec.files import replacing, sync, write_whole
from taskvec.journal import Journal
from taskvec.outputs.staging import refuse_occupied

RUN = "run.json"
METRICS = "metrics.jsonl"
STATE = "state.safetensors"
VECTOR = "vector.safetensors"
MODEL = "model"
_LIMITS = replace(documents.MEASURED, non_finite=True)
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def refuse_overlap(out: Path, inputs: Sequence[Path]) -> None:
    """Refuse a folder that holds an input, or lies in one.

    Raises:
        OutputError: it does.
    """
    place, here = out.resolve(), Path.cwd()
    if place == here or place in here.parents:
        raise OutputError(f"{out}: contains the current folder; give another one")
    for path in inputs:
        other = path.resolve()
        if place == other or place in other.parents or other in place.parents:
            raise OutputError(f"{out}: overlaps the input {path}; write somewhere else")


def refuse_other(out: Path, *, force: bool) -> None:
    """Refuse a place where something else is than a run, before anything is loaded.

    Raises:
        OutputError: it is.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file; give the path of a folder")
    if not (out / RUN).is_file():
        refuse_occupied(out, force=force)


def begin(
    out: Path, settings: Mapping[str, Any], files: Mapping[str, bytes], *, force: bool
) -> None:
    """Make the folder, or take up the run of the same settings that is in it.

    Args:
        out: The folder.
        settings: All that the result depends on; JSON types.
        files: Put into a new folder, by name.
        force: Whether what is there is removed.

    Raises:
        OutputError: something else is there, or a run of other settings.
    """
    if force and out.is_dir():
        shutil.rmtree(out)
    run = _read(out / RUN)
    if run is None:
        refuse_occupied(out, force=force)
        out.mkdir(parents=True, exist_ok=True)
        run = {"settings": dict(settings)}
        for name, content in files.items():
            with explain_failure(out, f"{name} was written"):
                write_whole(out / name, content)
        note(out, run)
    differing = _differing(run.get("settings", {}), json.loads(json.dumps(settings)))
    if differing:
        raise OutputError(
            f"{out}: holds a run of other settings: {'; '.join(differing)}; give another folder, "
            "or --force, which removes that run"
        )


def read_run(out: Path) -> dict[str, Any]:
    """The content of `run.json`; empty if it does not exist."""
    return _read(out / RUN) or {}


def _read(path: Path) -> dict[str, Any] | None:
    if not os.path.lexists(path):
        return None
    try:
        return documents.read_object(path, _LIMITS, OutputError)
    except OutputError as error:
        raise OutputError(f"{error}; --force starts again") from error


def _differing(there: Mapping[str, Any], here: Mapping[str, Any], under: str = "") -> list[str]:
    found = []
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differing(old, new, f"{under}{key}.")
        elif old != new:
            found.append(f"{under}{key} is {_short(old)} there and {_short(new)} here")
    return found


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def note(out: Path, run: Mapping[str, Any]) -> None:
    """Write `run.json`."""
    with explain_failure(out, "run.json was written"):
        text = json.dumps(run, indent=2, ensure_ascii=False)
        write_whole(out / RUN, text.encode() + b"\n")


def metrics(out: Path) -> Journal:
    """The records of a run."""
    return Journal(out / METRICS)


def drop_later_records(out: Path, done: int) -> None:
    """Remove records of later steps, and what is not whole."""
    journal = metrics(out)
    if journal.path.is_file():
        journal.begin(
            e for e in journal.read() if isinstance(e.get("step"), int) and e["step"] <= done
        )


def save_state(out: Path, trained: Mapping[str, Any], optimizer: Any, done: int) -> None:
    """Replace the state by the present one; until that is whole, the old one stays.

    Args:
        out: The folder.
        trained: Parameters by name, in the order that the optimiser has them.
        optimizer: AdamW; None: the weights alone, of a run that is finished.
        done: Steps done.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    tensors = {f"weight/{name}": parameter.detach() for name, parameter in trained.items()}
    for name, parameter in trained.items():
        for moment in MOMENTS:  # none yet of what had no gradient
            if optimizer is not None and parameter in optimizer.state:
                tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment]
    with explain_failure(out, f"the state after step {done} was saved"):
        _write(out / STATE, tensors, {"step": str(done)})


def _write(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write a file of tensors whole or not at all, one in memory at a time."""
    described = [
        (name, dtype_of(name, tensor, str(path)), tuple(tensor.shape))
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size())
    ]
    with replacing(path) as draft, draft.open("wb") as file:
        file.write(write_header(described, metadata))
        for name, _, _ in described:  # every one is aligned
            file.write(stored(tensors[name].cpu().contiguous()).data)
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


def stored_steps(out: Path) -> int:
    """Steps after which the state was stored; 0 if it was not.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = out / STATE
    if not path.is_file():
        return 0
    done = read_metadata(path).get("step", "")
    if not done.isdecimal():
        raise CheckpointError(f"{path}: has no number of steps; --force starts again")
    return int(done)


def load_state(out: Path, trained: Mapping[str, Any], optimizer: Any) -> int:
    """Put weights and moments back as they were stored.

    Returns:
        Steps done; 0 if nothing is stored.

    Raises:
        CheckpointError: the file is damaged or of another model.
    """
    path = out / STATE
    done = stored_steps(out)
    if not done:
        return 0
    torch, safetensors = require("torch", "train"), require("safetensors", "train")
    remedy = "--force starts again"
    try:
        with safetensors.safe_open(path, "pt") as file, torch.no_grad():
            names = set(file.keys())
            for name, parameter in trained.items():
                parameter.copy_(file.get_tensor(f"weight/{name}"))
                if f"{MOMENTS[0]}/{name}" in names:
                    moments = {key: file.get_tensor(f"{key}/{name}") for key in MOMENTS}
                    for key in MOMENTS[:2]:  # the count of steps stays in main memory
                        moments[key] = moments[key].to(parameter.device)
                    optimizer.state[parameter] = moments
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be resumed: {error}; {remedy}") from error
    return done


@contextmanager
def explain_failure(where: str | Path, what: str) -> Iterator[None]:
    """Add to a write error what is already stored; `what` completes "as …"."""
    try:
        yield
    except (OSError, OutputError) as failure:
        error = failure.__cause__ if isinstance(failure, OutputError) else failure
        if not isinstance(error, OSError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else f"cannot be written: {error.strerror or error}"
        raise OutputError(
            f"{where}: {why}, as {what}; the last saved state is intact; "
            "free some space, then resume with the same command"
        ) from error
