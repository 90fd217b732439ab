"""Collect: what lies under some paths, read by the rooms that wrote it, as one document."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from taskvec import documents
from taskvec.errors import TaskvecError, UsageError
from taskvec.methods.table import Table, load_table, table_from_json
from taskvec.recipes.replay import MANIFEST_FILE, read_manifest
from taskvec.recipes.writing import recipe_text
from taskvec.reporting.document import (
    FamilyData,
    FitData,
    MemberData,
    MergeData,
    RecordData,
    ReportData,
    TableData,
    TrainingData,
)
from taskvec.reporting.families import family_data
from taskvec.reporting.scores import TEXT_BUDGET, evaluation_data
from taskvec.statistics.scan import Scan

# Files that are looked for in a folder; another file is read where its own path is given.
NAMES = (
    MANIFEST_FILE, "results.json", "trials.json", "fit.json", "run.json", "pairs.json",
    "sweep-*.json", "*scan*.json",
)  # fmt: skip
JOURNALS = ("metrics.jsonl", "study.jsonl")
FEW = 5000  # files below a folder that are looked at
EXPECTED = (
    "a scan (--save-scan), a merged folder, or what eval, search, sweep, pairs, fit, finetune or "
    "disentangle wrote"
)


@dataclass
class _Found:
    """Parts of the document by its fields, while files are read."""

    parts: dict[str, list[Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    budget: int = field(default_factory=lambda: TEXT_BUDGET)

    def add(self, name: str, part: Any) -> None:
        self.parts.setdefault(name, []).append(part)


def collect(given: Sequence[str | Path | Scan]) -> ReportData:
    """Read everything that a report can show.

    Args:
        given: Files, folders that are searched, and scans.

    Raises:
        UsageError: a path does not exist, or nothing to report is found under it.
        TaskvecError: a file is damaged.
    """
    found = _Found()
    for each in given:
        if isinstance(each, Scan):
            found.add("families", family_data(each, "a scan in memory"))
            continue
        path = Path(os.path.expanduser(each))  # noqa: PTH111 (unlike Path's, leaves ~nobody)
        files = [path] if path.is_file() else list(_files(path))
        recognized = [_read(file, found) for file in files]
        if not any(recognized):
            raise UsageError(f"{path}: {_why_nothing(path)}; expected {EXPECTED}")
    names = [Path(each).name for each in given if not isinstance(each, Scan)]
    parts: dict[str, Any] = _complete(found.parts)
    return ReportData(
        title=", ".join(name or "report" for name in names) or "report",
        version=version("taskvec"),
        sources=[str(file) for file in found.files],
        notes=found.notes,
        **parts,
    )


def watched(paths: Sequence[str]) -> Iterator[Path]:
    """Files that change while something runs: those that are read, and journals beside them."""
    for each in paths:
        path = Path(os.path.expanduser(each))  # noqa: PTH111
        yield from [path] if path.is_file() else (*_files(path), *_files(path, JOURNALS))


def _why_nothing(path: Path) -> str:
    if not path.exists():
        return "no such file or folder"
    return "holds nothing to report" if path.is_dir() else "is not a file that a report can show"


def _files(folder: Path, patterns: Sequence[str] = NAMES) -> Iterator[Path]:
    """Files with a known name below a folder, in order; links to folders are not followed."""
    seen = 0
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            seen += 1
            if seen > FEW:
                raise UsageError(
                    f"{folder}: holds more than {FEW:,} files; give the folders that taskvec wrote"
                )
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                yield Path(where) / name


def _read(path: Path, found: _Found) -> bool:
    """Read a file; false if it is none of those that a report shows."""
    if path.suffix == ".csv":
        found.add("tables", _table(load_table(path), path.stem, path))
        found.files.append(path)
        return True
    data = documents.read_object(path, documents.MEASURED, UsageError)
    for keys, read in _READERS:
        if keys <= data.keys():
            with_errors(path, lambda chosen=read: chosen(path, data, found))  # type: ignore[misc]
            found.files.append(path)
            return True
    return False


def with_errors(path: Path | str, read: Callable[[], Any]) -> Any:
    """What a function returns; an unexpected shape of a file's data becomes an error.

    Raises:
        UsageError: a key is missing, or a value has another type.
    """
    try:
        return read()
    except TaskvecError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"{path}: is damaged, or of another version: {type(error).__name__}: {reason}; "
            "run the command that wrote it again"
        ) from error


def _scan(path: Path, data: Mapping[str, Any], found: _Found) -> None:
    from taskvec.merging.scans import load_scan

    found.add("families", family_data(load_scan(path), str(path)))


def _manifest(path: Path, data: Mapping[str, Any], found: _Found) -> None:
    manifest = read_manifest(path)
    recipe = manifest["recipe"]
    folder = path.parent
    name = folder.name or folder.resolve().name
    table = table_from_json(manifest["table"], str(path))
    tasks = recipe.get("tasks") or {}
    members = {
        role: MemberData(path=member["path"], fingerprint=member["fingerprint"])
        for role, member in manifest["members"].items()
    }
    found.add(
        "merges",
        MergeData(
            name=name,
            path=str(folder),
            method=str(recipe["method"]["name"]),
            decided_by=str(manifest.get("decided_by", "table")),
            recipe=recipe,
            recipe_text=recipe_text(recipe, f"The recipe of {documents.plain(name)}"),
            command=f"taskvec merge {folder / MANIFEST_FILE} OUT",
            fingerprint=manifest["output"]["fingerprint"],
            members=members,
            versions=manifest["versions"],
            table=_table(table, name, path, _scales(tasks)),
        ),
    )


def _scales(tasks: Mapping[str, Any]) -> dict[str, float]:
    """λ by task; tasks whose λ differs by layer are left out."""
    scales = {name: task.get("scale") for name, task in tasks.items() if isinstance(task, dict)}
    return {name: float(s) for name, s in scales.items() if isinstance(s, (int, float))}


def _table(
    table: Table, name: str, path: Path, scales: Mapping[str, float] | None = None
) -> TableData:
    weights = {task: list(table.of(task).values()) for task in table.tasks}
    return TableData(
        name=name,
        path=str(path),
        names=list(table.names),
        weights=weights,
        scales=dict(scales or {}),
    )


def _evaluation(path: Path, data: Mapping[str, Any], found: _Found) -> None:
    part, used, left = evaluation_data(path, data, found.budget)
    found.budget -= used
    if left:
        found.notes.append(
            f"{path.parent}: {left:,} samples are left out of the sample browser, to keep the "
            "page small; give fewer evaluations"
        )
    found.add("evaluations", part)


def _fit(path: Path, data: Mapping[str, Any], found: _Found) -> None:
    file = path.with_name("table.csv")
    name = path.parent.name or "fit"
    table = _table(load_table(file), name, file) if file.is_file() else None
    found.add("fits", FitData(path=str(path), table=table, record=dict(data)))


def _training(path: Path, data: Mapping[str, Any], found: _Found) -> None:
    from taskvec.training.run_folder import metrics

    curves: dict[str, list[list[float | None]]] = {}
    for record in metrics(path.parent).read():
        for key, value in record.items():
            if key != "step" and isinstance(value, (int, float)):
                curves.setdefault(key, []).append([float(record["step"]), float(value)])
    found.add("trainings", TrainingData(path=str(path), settings=data["settings"], curves=curves))


def _record(kind: str) -> Callable[[Path, Mapping[str, Any], _Found], None]:
    def add(path: Path, data: Mapping[str, Any], found: _Found) -> None:
        found.add(kind, RecordData(path=str(path), data=dict(data)))

    return add


_Reader = Callable[[Path, Mapping[str, Any], _Found], None]
_READERS: tuple[tuple[set[str], _Reader], ...] = (
    ({"recipe", "table", "output", "members"}, _manifest),
    ({"tensors", "tasks", "has_base"}, _scan),
    ({"axes", "trials", "goals"}, _record("searches")),
    ({"sweep", "points", "measures"}, _record("sweeps")),
    ({"pairs", "tasks"}, _record("pairs")),
    ({"descents", "chosen", "sources"}, _fit),
    ({"reference", "tasks", "findings"}, _evaluation),
    ({"model", "error"}, _record("disentanglements")),
    ({"model", "addition"}, _record("disentanglements")),
    ({"model", "negation"}, _record("disentanglements")),
    ({"model", "linearity"}, _record("disentanglements")),
    ({"settings"}, _training),
)


def _complete(parts: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Parts whose names differ; a merge without a scan brings the cached scan of its family."""
    merges: list[MergeData] = parts.get("merges", [])
    if merges and not parts.get("families"):
        cached = [scan for merge in merges if (scan := _cached(merge)) is not None]
        parts["families"] = cached[:1]
    for kind in ("merges", "tables"):
        parts[kind] = _told_apart(parts.get(kind, []))
    return parts


def _cached(merge: MergeData) -> FamilyData | None:
    """The scan that a merge of local models left in the cache; None if there is none."""
    from taskvec.merging.prepare import open_with_base
    from taskvec.merging.scans import cached_scan
    from taskvec.recipes.located import Document as Located
    from taskvec.recipes.reading import read_recipe

    if not all(Path(member.path).exists() for member in merge.members.values()):
        return None
    try:
        recipe = read_recipe(Located(merge.recipe, merge.path), Path("/"))
        scan = cached_scan(open_with_base(recipe))
    except (TaskvecError, OSError):
        return None
    return None if scan is None else family_data(scan, "the cached scan")


def _told_apart(parts: list[Any]) -> list[Any]:
    """Parts with different names: a name that occurs twice gets its folder."""
    names = [part.name for part in parts]
    taken: set[str] = set()
    out = []
    for part in parts:
        name = part.name
        if names.count(name) > 1:
            path = Path(part.path)
            name = f"{path.parent.name}/{name}" if path.parent.name else name
        number, stem = 2, name
        while name in taken:
            name, number = f"{stem} ({number})", number + 1
        taken.add(name)
        out.append(part.model_copy(update={"name": name}))
    return out
