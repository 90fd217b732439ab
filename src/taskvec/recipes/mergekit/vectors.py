"""Task arithmetic of mergekit, and what it has to sparsify task vectors and to elect signs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from taskvec.methods import METHODS
from taskvec.recipes.mergekit import MARK
from taskvec.recipes.mergekit.models import Recipe, assembled, block_count, tensor_names
from taskvec.recipes.mergekit.values import Layered, joined, plain
from taskvec.recipes.mergekit.work import Work

OURS = {
    "linear": "average",
    "dare_linear": "dare",
    "della_linear": "della",
    "breadcrumbs_ties": "breadcrumbs",
    "ramplus_tl": "ram_plus",
}
ELECTING = ("ties", "dare_ties", "della", "breadcrumbs_ties")
BY_RANK = "each entry by its own probability"
PAPERS_GAMMA = 0.007
TINY = 1e-8  # below which mergekit takes a sum of weights for 0


def on_vectors(work: Work) -> Recipe:
    """Task arithmetic and the methods that sparsify."""
    method = work.config.method
    name = OURS.get(method, method)
    scales, merge = _scales(work)
    parameters: Recipe = {}
    if method == "task_arithmetic":
        return assembled(work, name, scales, {})
    parameters |= _selection(work)
    if method in ELECTING:
        if "breadcrumbs" in method:
            parameters["elect"] = "mass"
        parameters["merge"] = merge
    elif method == "della_linear":
        parameters |= {"elect": "none", "merge": "sum"}
    return assembled(work, name, scales, parameters)


def _scales(work: Work) -> tuple[dict[str, Any], str]:
    """λ of every task, and how what agrees is combined."""
    method = work.config.method
    weights = {task: work.layered("weight", task) for task in work.inputs}
    lambda_ = work.layered("lambda", None)
    numbers = [weight.number for weight in weights.values()]
    if method in ELECTING and len(weights) > 1:
        work.note(None, "where the votes on a sign sum to 0, plus is elected", "neither is")
    if method in ELECTING and (len({*numbers}) > 1 or None in numbers):
        work.note(
            None,
            "signs are elected by weighted vectors, so that a task of small weight hardly counts",
            "the same; the paper elects before weighing",
        )
    if not work.switch("normalize"):
        product = {
            task: _join(
                work,
                lambda x, y: x * y,
                {f"weight of {task}": weight, "lambda": lambda_},
                is_linear=True,
            )
            for task, weight in weights.items()
        }
        return {task: work.written(scale) for task, scale in product.items()}, "sum"
    lowest = min(weight.lowest for weight in weights.values())
    if method not in ELECTING:
        return _normalize(work, weights, lambda_, lowest), "sum"
    if len({*numbers}) == 1 and None not in numbers:
        return _equal(work, numbers[0] or 0.0, lambda_), "mean"
    if lambda_.number != 1:
        work.document.fail(
            (MARK,), "lambda with normalize and weights that differ is not supported; leave it out"
        )
    if lowest < 0:
        if work.is_faithful:
            work.document.fail(
                (MARK,),
                "negative weights under normalize divide by a signed sum, which turns vectors "
                "around; this is not reproduced; set normalize: false",
            )
        work.note(
            None,
            "normalize divides by the signed sum of weights: a negative weight turns others around",
            "divided by the sum of |weight| of the tasks that agree; every task keeps its sign",
        )
    if len(weights) == 1:
        work.note(
            None,
            "normalize cancels the weight of the only model, in every layer",
            "the same, by merge: weighted; with merge: mean the weight counts",
        )
    return {task: work.written(weight) for task, weight in weights.items()}, "weighted"


def _normalize(
    work: Work, weights: Mapping[str, Layered], lambda_: Layered, lowest: float
) -> dict[str, Any]:
    """λ w_t / Σ w, place by place, where no signs are elected."""
    numbers = [weight.number for weight in weights.values()]
    known = [number for number in numbers if number is not None]
    is_constant = len(known) == len(numbers)
    if lowest < 0:
        signed, whole = (f", {t:g}" if is_constant else "" for t in (sum(known), _size(known)))
        work.note(
            None,
            f"normalize divides by the signed sum of weights{signed}",
            f"by the sum of |weight|{whole}; signs stay",
            "scale",
        )

    def share(task: int, lambda_: float, *weights: float) -> float:
        total = sum(weights) if work.is_faithful else _size(weights)
        return lambda_ * weights[task] / (total if abs(total) >= TINY else 1.0)

    values = {"lambda": lambda_} | {f"weight of {task}": w for task, w in weights.items()}
    return {
        task: work.written(_join(work, partial(share, i), values, is_linear=is_constant))
        for i, task in enumerate(weights)
    }


def _size(weights: Iterable[float]) -> float:
    return sum(map(abs, weights))


def _join(
    work: Work, change: Callable[..., float], values: Mapping[str, Layered], *, is_linear: bool
) -> Layered:
    """A function of `weight` and `lambda`, place by place."""
    tensors = partial(tensor_names, work)
    found = joined(change, values, block_count(work), tensors, work.pattern, is_linear=is_linear)
    if isinstance(found, str):
        work.document.fail((MARK,), found)
    return found


def _equal(work: Work, weight: float, lambda_: Layered) -> dict[str, Any]:
    """Equal weights cancel under normalize."""
    scale = lambda_ if weight > 0 else lambda_.map(lambda _: 0.0)
    if weight < 0:
        scale = lambda_ if work.is_faithful else lambda_.map(lambda x: -x)
        work.note(
            None,
            f"normalize cancels the weight {weight:g}: the task vectors are added, not subtracted",
            "subtracted",
            f"scale: {_shown(lambda_)}",
        )
    elif weight not in (0, 1):
        work.note(
            None,
            f"normalize cancels equal weights; {weight:g} does nothing",
            f"the same, as scale {_shown(scale)} and merge: mean; lower scale for less of each",
        )
    return dict.fromkeys(work.inputs, work.written(scale))


def _shown(values: Layered) -> object:
    return "by layer" if values.number is None else plain(values.number)


def _selection(work: Work) -> Recipe:
    """Density and what belongs to it."""
    method = work.config.method
    is_random = method.startswith(("dare", "della"))
    densities: Recipe = {}
    found: dict[str, Recipe] = {}
    for task in work.inputs:
        density, key = work.own("density", task)
        if not key:
            _note_density(work, task)
        if key or work.is_faithful:
            densities[task] = work.written(density)
        if method.startswith("della"):
            _della(work, task, density, key != (), found)
        if method.startswith("breadcrumbs"):
            _breadcrumbs(work, task, density, key != (), found)
    parameters: Recipe = {"density": densities} if densities else {}
    parameters |= {name: value for name, value in found.items() if value}
    is_rescaled = work.switch("rescale")
    if not is_random:
        if is_rescaled:
            work.document.fail((MARK,), f"rescale: true of {method} is not supported")
        work.note(
            None,
            "density × entries is rounded down; of equal entries at the cut, any are kept",
            "to the nearest; the first ones are kept",
        )
        if method == "ties":
            parameters |= _scope(work, densities)
        return parameters
    if not is_rescaled:
        return parameters | {"rescale": "none"}
    name, ours = ("DARE", "by 1/density") if method.startswith("dare") else ("DELLA", BY_RANK)
    work.note(
        None,
        f"what {name} keeps is rescaled until the tensor has its L1 norm again",
        f"{ours}, as in the paper",
        "rescale: l1",
    )
    return parameters | ({"rescale": "l1"} if work.is_faithful else {})


def _scope(work: Work, densities: Recipe) -> Recipe:
    """What entries are ranked within under `ties`."""
    theirs = "entries are ranked within each tensor"
    if any(isinstance(density, dict) for density in densities.values()):
        work.note(None, theirs, "the same, by scope: tensor, because a density differs by layer")
        return {"scope": "tensor"}
    ours = "over the whole model, as in the authors' code"
    work.note(None, theirs, ours, "scope: tensor")
    return {"scope": "tensor"} if work.is_faithful else {}


def _note_density(work: Work, task: str) -> None:
    name = OURS.get(work.config.method, work.config.method)
    default = next(p.default for p in METHODS[name].parameters if p.name == "density")
    work.note(
        work.inputs[task][0].key,
        f"density of {task} is left at 1.0, which drops nothing",
        f"{default:g}, the default of {name}",
        "density: 1",
    )


def _della(
    work: Work, task: str, density: Layered, is_given: bool, found: dict[str, Recipe]
) -> None:
    """Probabilities there are density ± epsilon, here density ± epsilon / 2."""
    epsilon, key = work.own("epsilon", task)
    if density.lowest >= 1 and (is_given or work.is_faithful):
        found.setdefault("epsilon", {})[task] = 0
        return
    if not key and not work.is_faithful:
        return
    whole = work.written(epsilon.map(lambda half: 2 * half))
    found.setdefault("epsilon", {})[task] = whole
    half = "by layer" if epsilon.number is None else f"{epsilon.number:g}"
    work.note(
        key or None,
        f"epsilon {half} is half the range of probabilities",
        f"the whole range, {'doubled' if isinstance(whole, dict) else whole}, as in the authors' "
        "code",
    )


def _breadcrumbs(
    work: Work, task: str, density: Layered, is_given: bool, found: dict[str, Recipe]
) -> None:
    """Density comes first there: gamma gives way where both are above 1, or density is 1."""
    gamma, key = work.own("gamma", task)
    if not key and not work.is_faithful:
        work.note(
            work.inputs[task][0].key,
            f"gamma of {task} is left at {gamma.lowest:g}",
            "0.007, the paper's",
            f"gamma: {gamma.lowest:g}",
        )
        gamma = gamma.map(lambda _: PAPERS_GAMMA)
        if not is_given or density.highest + PAPERS_GAMMA <= 1:
            return
    if density.highest + gamma.highest > 1 and (is_given or work.is_faithful):
        gamma = _giving_way(work, task, density, gamma)
    found.setdefault("gamma", {})[task] = work.written(gamma)


def _giving_way(work: Work, task: str, density: Layered, gamma: Layered) -> Layered:
    """min(γ, 1 − density), if it does not depend on the number of blocks."""
    most = gamma.number
    if most is None or not density.is_stepwise:
        work.document.fail(
            (MARK,),
            f"density and gamma of {task} that differ by layer and sum to more than 1 in some are "
            "not supported; lower one of them",
        )
    return density.map(lambda share: min(most, 1 - share))
