"""What each of mergekit's methods is here, with its parameters, weights and models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from taskvec.methods import METHODS
from taskvec.recipes.mergekit import MARK
from taskvec.recipes.mergekit.models import Recipe, assembled, model_of, names_of, piece_of
from taskvec.recipes.mergekit.schema import OWN, Ingredient
from taskvec.recipes.mergekit.values import Layered, plain
from taskvec.recipes.mergekit.vectors import OURS, TINY, on_vectors
from taskvec.recipes.mergekit.work import Work


def convert(work: Work) -> Recipe:
    """Models, tasks and method of the recipe.

    Raises:
        RecipeError: something is not supported.
    """
    method = work.config.method
    ours = OURS.get(method, method)
    if ours not in METHODS:
        work.document.fail((MARK,), f"method {method} of mergekit has no counterpart here yet")
    if method in ("linear", "slerp", "karcher"):
        return _BUILDERS[method](work)
    if method == "passthrough":
        return _passthrough(work)
    if not work.base and method not in ("nuslerp", "multislerp"):
        work.document.fail((MARK,), f"base_model is missing; mergekit's {method} needs it")
    if not work.inputs and "density" in OWN.get(method, {}):  # task arithmetic without a task
        return {"target": model_of(work, work.base), "method": {"name": "passthrough"}}
    if not work.inputs:
        work.document.fail((MARK,), "base_model is the only model; add one to merge with it")
    return _BUILDERS.get(method, on_vectors)(work)


def draws(recipe: Mapping[str, Any]) -> bool:
    """Whether the method draws random masks."""
    method = recipe["method"]
    name = method if isinstance(method, str) else method["name"]
    return name in ("dare", "dare_ties", "della")


# Averages


def _linear(work: Work) -> Recipe:
    """Weighted sums of models; the base is one of them."""
    weights = {task: work.layered("weight", task) for task in work.inputs}
    is_normalized = work.switch("normalize")
    numbers = {task: weight.number for task, weight in weights.items()}
    lowest = min(weight.lowest for weight in weights.values())
    total = sum(n for n in numbers.values() if n is not None)
    is_constant = None not in numbers.values()
    if lowest < 0:
        if not is_constant:
            what = "negative weights of linear that differ by layer"
            work.document.fail((MARK,), f"{what} are not supported")
        return _sum_of_models(work, weights, total, is_normalized)
    parameters: Recipe = {}
    if not is_normalized and not (is_constant and abs(total - 1) < 1e-12):
        work.note(
            None,
            "normalize: false adds the models as they are weighted, so that all of the model grows",
            "an average: the weights of every tensor are made to sum to 1",
            "merge: sum",
        )
        parameters = {"merge": "sum"} if work.is_faithful else {}
    work.note(
        None,
        "config and tokenizer are those of base_model, or else of any of the models",
        "those of the target",
    )
    scales = {task: work.written(weight) for task, weight in weights.items()}
    recipe = assembled(work, "average", scales, parameters)
    target = _target(work)
    return {"target": target, **recipe}


def _target(work: Work) -> Any:
    """The model whose config and tokenizer a mean of models has."""
    first = next(iter(work.inputs.values()))
    bases = {s.base or work.config.base for s in work.config.slices}
    inputs = list(work.inputs.values())
    is_base = [sources for sources in inputs if {s.reference for s in sources} == bases]
    return model_of(work, is_base[0] if is_base else first)


def _sum_of_models(
    work: Work, weights: Mapping[str, Layered], total: float, is_normalized: bool
) -> Recipe:
    """Σ w_t θ_t with Σ w_t = 1 as θ_1 + Σ w_t (θ_t − θ_1)."""
    if abs(total) < TINY:
        work.document.fail((MARK,), "the weights sum to 0; mergekit divides by that")
    if not is_normalized and abs(total - 1) > 1e-12:
        work.document.fail(
            (MARK,), f"normalize: false with weights that sum to {total:g}, not 1: not supported"
        )
    divisor = total if is_normalized else 1.0
    first, *others = work.inputs
    work.note(
        None,
        f"linear with a negative weight divides by the signed sum of weights, {total:g}",
        f"the same, as task arithmetic that starts from {first!r}; average takes no negative scale",
    )
    work.base = work.inputs.pop(first)
    scales = {t: plain((weights[t].number or 0.0) / divisor) for t in others}
    return assembled(work, "task_arithmetic", scales, {})


def _slerp(work: Work) -> Recipe:
    """The base at 0, the other model at 1."""
    if len(work.inputs) != 1 or not work.base:
        work.document.fail((MARK,), "slerp takes base_model and one other model")
    (other,) = work.inputs
    t = work.layered("t", None)
    if t.lowest < 0 or t.map(lambda x: 1 - x).lowest < 0:
        work.document.fail((MARK,), "t of slerp outside [0, 1] is not supported")
    base = work.base
    work.base = []
    name = _name_of_base(work, base, other)
    work.inputs = {name: base, other: work.inputs[other]}
    scales = {name: work.written(t.map(lambda x: 1 - x)), other: work.written(t)}
    recipe = assembled(work, "slerp", scales, {})
    return {"target": model_of(work, base), **recipe}


def _name_of_base(work: Work, base: list[Ingredient], other: str) -> str:
    (name,) = names_of([base[0].reference])
    return f"{name}-base" if name == other else name


def _karcher(work: Work) -> Recipe:
    tol, steps = work.shared_number("tol"), work.shared_number("max_iter")
    work.note(
        None,
        f"stops after {steps:g} steps, or when a step is below {tol:g} radians",
        "iterates until a step is below 1e-10",
    )
    recipe = assembled(work, "karcher", {}, {})
    return {"target": _target(work), **recipe}


def _nuslerp(work: Work) -> Recipe:
    if len(work.inputs) != 2:
        work.document.fail((MARK,), "nuslerp takes two models besides base_model")
    flat, columns = work.switch("nuslerp_flatten"), work.switch("nuslerp_row_wise")
    if not flat and columns:
        work.note(
            None,
            "nuslerp_row_wise: true takes the angles along columns",
            "the same; along rows by granularity: row",
        )
    kind = "column" if columns else "row"
    return assembled(work, "nuslerp", _relative(work), {} if flat else {"granularity": kind})


def _multislerp(work: Work) -> Recipe:
    if not work.switch("normalize_weights"):
        work.document.fail((MARK,), "normalize_weights: false of multislerp is not supported")
    if len(work.inputs) == 1:
        work.document.fail((MARK,), "multislerp of one model is that model; use passthrough")
    work.note(
        None,
        "the ways from the mean to the models are u − cos θ · m, which cancel: nothing is "
        "interpolated, and the direction is that of the linear mean",
        "by the logarithm on the sphere, as long as the angle",
        "projection: orthogonal",
    )
    eps = work.conditions("eps")[0]
    if eps.key:
        work.note(eps.key, "eps is added to lengths before they divide", "left out")
    parameters = {"projection": "orthogonal"} if work.is_faithful else {}
    return assembled(work, "multislerp", _relative(work), parameters)


def _relative(work: Work) -> dict[str, Any]:
    """Weights of which only the ratio counts."""
    weights = {task: work.layered("weight", task) for task in work.inputs}
    for task, weight in weights.items():
        if weight.lowest < 0:
            work.document.fail(
                (MARK,), f"a negative weight ({task}) of {work.config.method} is not supported"
            )
    return {task: work.written(weight) for task, weight in weights.items()}


def _one(work: Work, name: str) -> str:
    if len(work.inputs) != 1:
        work.document.fail((MARK,), f"{name} takes base_model and one other model")
    return next(iter(work.inputs))


def _nearswap(work: Work) -> Recipe:
    _one(work, "nearswap")
    return assembled(work, "nearswap", {}, {"t": work.for_all("t")})


def _arcee_fusion(work: Work) -> Recipe:
    _one(work, "arcee_fusion")
    work.note(
        None,
        "the threshold of a tensor above 1,000,000 entries is of a sample drawn without a seed",
        "of all entries",
    )
    return assembled(work, "arcee_fusion", {}, {})


def _model_stock(work: Work) -> Recipe:
    if len(work.inputs) < 2:
        work.document.fail((MARK,), "model_stock takes base_model and two other models at least")
    work.note(
        None,
        "where vectors are at more than a right angle the ratio t is negative",
        "0 there: the tensor stays the base's",
    )
    by_filter = work.switch("filter_wise")
    parameters = {"granularity": "filter"} if by_filter else {}
    return assembled(work, "model_stock", {}, parameters)


def _sce(work: Work) -> Recipe:
    share = work.for_all("select_topk")
    is_given = any(condition.key for condition in work.conditions("select_topk"))
    parameters: Recipe = {"density": share} if is_given or work.is_faithful else {}
    work.note(
        None,
        "the sum of what agrees is divided by the energies of the tasks that agree",
        "it is not divided, as in the paper",
        "merge: mean",
    )
    work.note(
        None,
        "where the mean squares of the vectors sum to less than 1e-6, as in a light fine-tune, "
        "tasks weigh alike",
        "by their energies, as everywhere",
        "floor: 1e-6",
    )
    if is_given:
        work.note(
            None,
            "select_topk is a share of the positions that vary, rounded down",
            "of all positions, to the nearest",
            "share_of: varying, except for the rounding",
        )
    else:
        work.note(
            None,
            "select_topk is left at 1.0, which selects everything",
            "0.1, the paper's",
            "density: 1",
        )
    if work.is_faithful:
        parameters |= {"merge": "mean", "share_of": "varying", "floor": 1e-6}
    return assembled(work, "sce", {}, parameters)


def _ram(work: Work) -> Recipe:
    names = ("epsilon",) if work.config.method == "ram" else ("r", "alpha", "epsilon")
    parameters = {name: work.for_all(name) for name in names}
    return assembled(work, OURS.get(work.config.method, "ram"), {}, parameters)


# Layers


def _passthrough(work: Work) -> Recipe:
    """One model, or blocks of several."""
    pieces, sources = [], []
    for slice_ in work.config.slices:
        if len(slice_.sources) != 1:
            work.document.fail(slice_.key, "passthrough takes one source a slice")
        source = slice_.sources[0]
        piece = piece_of(work, source)
        setting = work.config.setting("scale", source, slice_)
        scale = _residual_scale(work, source, setting)
        if scale != 1:
            piece["scale"] = plain(scale)
        pieces.append(piece)
        sources.append(source)
    if sources[0].blocks is None:
        if "scale" in pieces[0]:
            work.document.fail(sources[0].key, "scale of a whole model needs slices")
        target = pieces[0]["model"]
    else:
        is_plain = not any("scale" in piece for piece in pieces)
        target = model_of(work, sources) if is_plain else {"stack": pieces}
    if isinstance(target, dict):
        work.note(
            None,
            "config.json of the first model, or of any",
            "the first piece's, with the number of blocks corrected",
        )
    return {"target": target, "method": {"name": "passthrough"}}


def _residual_scale(work: Work, source: Ingredient, setting: Any) -> float:
    """The factor of what each block adds to the residual stream."""
    by_part = {}
    for condition in setting:
        if len(set(condition.values)) > 1:
            work.document.fail(condition.key, "a gradient of scale is not supported")
        by_part[condition.part] = condition.values[0]
    whole = by_part.pop(None)
    if not by_part and whole == 1:
        return 1.0
    if set(by_part) == {"o_proj", "down_proj"} and len({*by_part.values()}) == 1 and whole == 1:
        return float(next(iter(by_part.values())))
    key = next((c.key for c in setting if c.key), source.key)
    if by_part or work.is_faithful:
        work.document.fail(
            key, "scale of other tensors than o_proj and down_proj, alike, is not supported"
        )
    work.note(
        key,
        f"scale {whole} multiplies every tensor, norms and inner projections too",
        "the output projections only, so that what a block adds is scaled",
    )
    return float(whole)


_BUILDERS: dict[str, Callable[[Work], Recipe]] = {
    "linear": _linear,
    "slerp": _slerp,
    "karcher": _karcher,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "nearswap": _nearswap,
    "arcee_fusion": _arcee_fusion,
    "model_stock": _model_stock,
    "sce": _sce,
    "ram": _ram,
    "ramplus_tl": _ram,
}
