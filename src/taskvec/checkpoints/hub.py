"""Models on the Hugging Face hub: `org/name`, `org/name@revision`, `org/name@revision:subfolder`.

Downloading is huggingface_hub's: its cache, its environment variables (HF_HOME, HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE …). Only what a model needs is taken, one copy of its weights, and a
revision is resolved to a commit first, so that all files are of one and a replay takes the same.
The subfolder may be a single `.safetensors` file.
"""

from __future__ import annotations

import errno
import glob
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from taskvec import documents
from taskvec.checkpoints import folder, pickled
from taskvec.checkpoints.companions import is_companion
from taskvec.errors import CheckpointError, MissingExtraError
from taskvec.extras import require

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_NAME = re.compile(
    rf"(?P<repository>{_PART}/{_PART})(@(?P<revision>[\w./-]+)(:(?P<subfolder>[\w./ +-]+))?)?",
    re.ASCII,
)
_FILE = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|gguf|git|json|ya?ml)")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# Copies of the weights for other programs, or at another precision.
_COPIES = re.compile(r"consolidated.*|.*\.(fp16|fp32|bf16|non_ema|ema)[.-].*|adapter_model.*")
_REFERENCE = documents.Limits(1024, 1)
# Commits by repository and revision, as this process took them: a scan and a merge read the same
# weights although somebody pushes to the branch between them.
_commits: dict[tuple[str, str | None], str] = {}


@dataclass(frozen=True, slots=True)
class HubName:
    """A model on the hub.

    Attributes:
        repository: `org/name`.
        revision: Branch, tag or commit; None for the default branch.
        subfolder: Where in the repository the model lies; empty for its root.
    """

    repository: str
    revision: str | None = None
    subfolder: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision or 'main'}" if self.revision or self.subfolder else ""
        return self.repository + revision + (f":{self.subfolder}" if self.subfolder else "")


def hub_name(model: object, relative_to: Path | None = None) -> HubName | None:
    """The hub name that a model is given by; None where it is anything else.

    What exists on this machine is never looked up on the hub, nor is what begins with `./`, `../`,
    `/` or `~`, or a name that ends like a file's.

    Args:
        model: As a recipe or a family names it.
        relative_to: A folder beside the current one where a path of that name may lie.

    >>> str(hub_name("org/name@main:unet")), hub_name("./org/name"), hub_name("name")
    ('org/name@main:unet', None, None)
    """
    match = _NAME.fullmatch(model) if isinstance(model, str) else None
    if match is None:
        return None
    repository, subfolder = match["repository"], (match["subfolder"] or "").strip("/")
    odd = ".." in repository or "--" in repository
    outside = ".." in PurePosixPath(subfolder).parts + PurePosixPath(match["revision"] or "").parts
    if odd or outside or len(repository) > 96 or _FILE.fullmatch(repository):
        return None
    if Path(match[0]).exists() or (relative_to is not None and (relative_to / match[0]).exists()):
        return None
    return HubName(repository, match["revision"], subfolder)


def resolved(name: HubName) -> HubName:
    """The name with the commit that this process took it at, if it has taken it."""
    return replace(name, revision=_commits.get((name.repository, name.revision), name.revision))


def fetch(name: HubName, *, allow_pickle: bool = False) -> tuple[HubName, Path]:
    """Download what is not in the cache yet.

    Args:
        name: Which model.
        allow_pickle: Whether pickled weights may be taken where there are no others.

    Returns:
        The name with its commit, and the folder (or the file) in the cache.

    Raises:
        CheckpointError: the hub does not know it, it is gated or cannot be reached; no weights that
            can be read; too little disk; offline, it is not cached.
        MissingExtraError: huggingface_hub is not installed.
    """
    asked, name = name, resolved(name)
    hub = _client(name)
    with _in_words(name, hub):
        if hub.constants.HF_HUB_OFFLINE:
            root = _cached(name, hub)
        else:
            files = _needed(name, hub, allow_pickle=allow_pickle)
            patterns = [glob.escape(file) for file in files]
            root = Path(
                hub.snapshot_download(
                    name.repository, revision=name.revision, allow_patterns=patterns
                )
            )
    _commits[asked.repository, asked.revision] = root.name  # a snapshot's folder is its commit
    name = resolved(asked)
    path = root / name.subfolder
    if not path.exists():
        raise CheckpointError(f"{name}: {name.subfolder} of it is not in the hub's cache ({root})")
    return name, path


def _cached(name: HubName, hub: ModuleType) -> Path:
    """The snapshot in the cache, complete or not.

    huggingface_hub itself takes a snapshot for incomplete in which files were left out on purpose.
    """
    there = _cache(name, hub)
    reference = there / "refs" / (name.revision or "main")
    commit = _commit_of(reference) if reference.is_file() else name.revision
    snapshot = there / "snapshots" / (commit or "main")
    if not snapshot.is_dir():
        raise CheckpointError(
            f"{name}: no such folder, and not in the hub's cache ({there.parent}); nothing is "
            "downloaded while HF_HUB_OFFLINE is set"
        )
    return snapshot


def _commit_of(reference: Path) -> str:
    """The commit that a branch or tag of the cache stands for."""
    commit = documents.read_text(reference, _REFERENCE).strip()
    if not re.fullmatch(r"[0-9A-Za-z_-]{1,128}", commit):
        raise CheckpointError(f"{reference}: is not the name of a commit; download the model again")
    return commit


def _cache(name: HubName, hub: ModuleType) -> Path:
    """Where the cache keeps a repository."""
    repository = f"models--{name.repository.replace('/', '--')}"
    return Path(hub.constants.HF_HUB_CACHE) / repository


def _needed(name: HubName, hub: ModuleType, *, allow_pickle: bool) -> list[str]:
    """The files to have, after a look whether there is room for those that are not there."""
    info = hub.HfApi().model_info(name.repository, revision=name.revision, files_metadata=True)
    there = [file.rfilename for file in info.siblings]
    wanted = set(choose(there, name, allow_pickle=allow_pickle))
    _check_space([file for file in info.siblings if file.rfilename in wanted], name, hub)
    return sorted(wanted)


def choose(files: Sequence[str], name: HubName, *, allow_pickle: bool) -> list[str]:
    """The files of a repository that make up the model: one copy of the weights, and companions.

    Args:
        files: Every file of the repository, by its path there.
        name: Which model; its subfolder counts.
        allow_pickle: Whether pickled weights may be taken where there are no others.

    Raises:
        CheckpointError: the subfolder is missing, or has no weights that may be read.
    """
    if name.subfolder in files:
        return [name.subfolder]
    prefix = f"{name.subfolder}/" if name.subfolder else ""
    inside = [file[len(prefix) :] for file in files if file.startswith(prefix)]
    if not inside:
        raise CheckpointError(f"{name}: the repository has no {name.subfolder or 'files'}")
    weights = _safetensors(inside)
    if not weights:
        weights = _pickled(inside)
        if not weights:
            raise CheckpointError(
                f"{name}: has no weights in safetensors (of {len(inside)} files, such as "
                f"{min(inside)}); give the repository of the original weights, or a subfolder"
            )
        if not allow_pickle:
            raise CheckpointError(
                f"{name}: has only pickled weights ({weights[0]}), which can run code when loaded; "
                "allow_pickle: true (--allow-pickle) reads them without running what is in them"
            )
    chosen = {*weights, *(f for f in inside if is_companion(f) or f == "README.md")}
    return sorted(prefix + file for file in chosen)


def _safetensors(files: Sequence[str]) -> list[str]:
    """One copy of the weights: a single file, shards and their index, an adapter, or the rest."""
    if folder.SINGLE in files:
        return [folder.SINGLE]
    if folder.INDEX in files:
        shard = re.compile(r"model-\d+-of-\d+\.safetensors")
        return [folder.INDEX, *(f for f in files if shard.fullmatch(f))]
    if _ADAPTER[0] in files and _ADAPTER[1] in files:
        return list(_ADAPTER[:2])
    return [
        f for f in files if f.endswith(".safetensors") and "/" not in f and not _COPIES.fullmatch(f)
    ]


def _pickled(files: Sequence[str]) -> list[str]:
    if pickled.SINGLE in files:
        return [pickled.SINGLE]
    if pickled.INDEX in files:
        shard = re.compile(r"pytorch_model-\d+-of-\d+\.bin")
        return [*(f for f in files if shard.fullmatch(f)), pickled.INDEX]
    return [_ADAPTER[2], _ADAPTER[0]] if {_ADAPTER[0], _ADAPTER[2]} <= set(files) else []


def _check_space(files: Sequence[Any], name: HubName, hub: ModuleType) -> None:
    """Refuse a download that the disk of the cache cannot hold."""
    blobs = _cache(name, hub) / "blobs"
    cache, needed = hub.constants.HF_HUB_CACHE, 0
    for file in files:  # a file that another revision shares is there already
        blob = file.lfs.sha256 if file.lfs is not None else file.blob_id
        needed += 0 if blob and (blobs / blob).exists() else file.size or 0
    place = blobs
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise CheckpointError(
            f"{name}: needs {needed / 1e6:,.2f} MB in the hub's cache ({cache}), "
            f"{free / 1e6:,.2f} MB are free; free some space, or move the cache with HF_HOME"
        )


def _client(name: HubName) -> ModuleType:
    try:
        for part in ("constants", "errors"):  # are no attributes of the package before that
            require(f"huggingface_hub.{part}", "hub")
        return require("huggingface_hub", "hub")
    except MissingExtraError as error:
        raise MissingExtraError(f"{name}: no such folder or file; on the hub: {error}") from error


@contextmanager
def _in_words(name: HubName, hub: ModuleType) -> Iterator[None]:
    """Tell what huggingface_hub raises as a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # its HTTP library, and so the errors, differ by version
        raise CheckpointError(f"{name}: {_reason(error, name, hub)}") from error


def _reason(error: Exception, name: HubName, hub: ModuleType) -> str:
    errors, endpoint = hub.errors, hub.constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        page = f"{endpoint}/{name.repository}"
        return f"is gated; accept its terms on {page} and log in (hf auth login, or HF_TOKEN)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {name.revision!r}; see its branches and tags"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "no such folder, and no such model on the hub; if it is private, log in (hf auth "
            "login, or HF_TOKEN)"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk of the hub's cache ({hub.constants.HF_HUB_CACHE}) is full; free some space"
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"the hub answered with status {status}; try again later"
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    text = " ".join(str(root).split())[:100]
    return (
        f"no such folder, and {endpoint} cannot be reached ({type(root).__name__}: {text}); set "
        "HF_HUB_OFFLINE=1 to use what is in the cache"
    )
