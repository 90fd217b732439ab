"""Whether transformers can load a model: built and filled on the meta device, without weights.

Asked of stacks before anything is written, where transformers is installed: a config that describes
other blocks than the weights have is found here, and not when the result is loaded.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from taskvec.checkpoints.source import Source
from taskvec.errors import FamilyError
from taskvec.layers import classify

_FETCHED = (
    *("attn_implementation", "_attn_implementation", "auto_map", "quantization_config"),
    *("experts_implementation", "_experts_implementation"),
)
_REMEDY = "choose pieces whose blocks the config can describe, or correct the config"


def check_loads(model: Source, like: Source) -> None:
    """Raise `FamilyError` if transformers can load a model, but not what was made of it.

    Nothing is checked where transformers or torch is not installed, or does not have the class.

    Args:
        model: What is to be loaded.
        like: The model that it was made of.
    """
    if find_spec("transformers") is None or find_spec("torch") is None:
        return
    problem = _problem(model)
    if problem is not None and _problem(like) is None:
        raise FamilyError(f"{model.where}: {problem}; {_REMEDY}")


def _problem(model: Source) -> str | None:
    """Why transformers cannot build the model or fill it with these tensors, if it cannot."""
    transformers, torch = import_module("transformers"), import_module("torch")
    cls = getattr(transformers, (model.config.get("architectures") or [""])[0], None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        return None
    if "model_type" not in model.config:
        return None
    with _silent(transformers):
        try:
            config = transformers.AutoConfig.for_model(**_own_code_only(model.config))
            with torch.device("meta"):
                cls(config)
        except Exception as error:  # any error about a config that a class rejects
            what = f"{type(error).__name__}: {str(error)[:200]}"
            return f"transformers cannot build {cls.__name__} from the config ({what})"
        found = _filled(model, cls, config, torch)
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        odd = sorted(str(each[0] if isinstance(each, tuple) else each) for each in found[kind])
        odd = [n for n in odd if kind != "unexpected_keys" or classify(n).block is not None]
        if odd:
            return (
                f"transformers finds {len(odd)} {kind.replace('_', ' ')} in it, such as "
                f"{odd[0]!r}: config and weights describe different blocks"
            )
    return None


def _own_code_only(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what may make transformers fetch code, also in the configs of its towers."""
    return {
        key: _own_code_only(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _FETCHED
    }


def _filled(model: Source, cls: Any, config: Any, torch: Any) -> dict[str, Any]:
    """What transformers says of tensors of these names and shapes, if it can be asked."""
    tensors = {name: torch.empty(info.shape, device="meta") for name, info in model.tensors.items()}
    nothing: dict[str, Any] = dict.fromkeys(
        ("missing_keys", "mismatched_keys", "unexpected_keys"), ()
    )
    try:
        _, found = cls.from_pretrained(
            None, config=config, state_dict=tensors, device_map={"": "meta"},
            output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False,
        )  # fmt: skip
    except Exception:  # a version that cannot do this: the class was built, which is most of it
        return nothing
    return nothing | dict(found)


@contextlib.contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    log, bar = transformers.utils.logging, transformers.utils.logging.is_progress_bar_enabled()
    level = log.get_verbosity()
    log.set_verbosity(logging.CRITICAL)
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()
