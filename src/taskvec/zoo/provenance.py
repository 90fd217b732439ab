"""Provenance of a trained zoo: training, scores and task vectors of each member.

Kept in ``provenance.json`` beside the models. Needs the extra ``eval`` (torch, transformers).
"""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from taskvec import documents
from taskvec.running.model import load, open_stored
from taskvec.zoo import MEMBERS, skills
from taskvec.zoo.tasks import score_skills

N = 100  # questions per skill
THRESHOLD = 0.95
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def read(folder: Path) -> dict[str, Any]:
    """The provenance beside the models in a folder; empty if the file does not exist."""
    file = folder / "provenance.json"
    return documents.read_object(file, documents.MEASURED) if file.exists() else {}


def note_member(folder: Path, name: str, training: dict[str, Any]) -> None:
    """Score a stored member on every skill; store the scores and the training settings."""
    model = load(open_stored(folder / name))
    results = score_skills(model, [*skills.SKILLS, "text"], N)
    text = results.pop("text")
    notes = {
        "training": training,
        "versions": _versions(),
        "scores": {
            "n": N,
            "correct": {skill: round(N * result.main.value) for skill, result in results.items()},
        },
        "perplexity_per_character": round(text.main.value, 4),
    }
    known = read(folder)  # read late: members may be trained side by side
    known.setdefault("members", {})[name] = notes
    _write(folder, known)


def note_family(folder: Path) -> None:
    """Store similarities, ρ and c of every task vector, over the stored weights."""
    known = read(folder)
    known["members"] = {name: known["members"][name] for name in MEMBERS}
    known["task_vectors"] = {
        name: geometry(folder, name)
        for name, member in MEMBERS.items()
        if member.parent == "instruct"
    }
    _write(folder, known)


def geometry(folder: Path, task: str) -> dict[str, Any]:
    """How a task vector lies to the instruction vector.

    Args:
        folder: Holds the members ``base``, ``instruct`` and the task.
        task: Name of a member tuned from ``instruct``.

    Returns:
        ``norm_ratio`` and ``task_cosine`` over the whole model (ρ and c), ``layers`` (number of
        tensors), ``similarity_quantiles`` (quantile: similarity of a tensor) and
        ``share_at_or_below_0.95`` of the tensors.
    """
    base, anchor, tuned = (
        {k: v.double().flatten() for k, v in load_file(folder / name / "model.safetensors").items()}
        for name in ("base", "instruct", task)
    )
    similarity = similarities(base, anchor, tuned)
    instruction = torch.cat([anchor[name] - base[name] for name in base])
    task_vector = torch.cat([tuned[name] - anchor[name] for name in base])
    values = torch.tensor(list(similarity.values()), dtype=torch.float64)
    return {
        "norm_ratio": round(_ratio(task_vector, instruction), 4),
        "task_cosine": round(_cosine(task_vector, instruction), 4),
        "layers": len(values),
        "similarity_quantiles": {str(q): round(values.quantile(q).item(), 5) for q in QUANTILES},
        f"share_at_or_below_{THRESHOLD}": round((values <= THRESHOLD).double().mean().item(), 4),
    }


def similarities(
    base: dict[str, torch.Tensor], anchor: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Cosine of complex (tuned − base) and instruction vector (anchor − base), tensor by tensor.

    Args:
        base: Tensor name to values, one-dimensional, float64; the others have the same form.
        anchor: The instruction-tuned model.
        tuned: A fine-tune of it.

    Returns:
        Tensor name to similarity in [-1, 1].
    """
    return {name: _cosine(tuned[name] - base[name], anchor[name] - base[name]) for name in base}


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one @ other) / math.sqrt(float(one @ one) * float(other @ other))


def _ratio(one: torch.Tensor, other: torch.Tensor) -> float:
    return math.sqrt(float(one @ one) / float(other @ other))


def _versions() -> dict[str, str]:
    import tokenizers
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def _write(folder: Path, known: dict[str, Any]) -> None:
    text = json.dumps(known, indent=2, ensure_ascii=False)
    (folder / "provenance.json").write_text(text + "\n", "utf-8")
