"""The check that transformers can load a stack takes no code from its config."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tests.conftest import CONFIG

transformers = pytest.importorskip("transformers")

from taskvec.family.loads import check_loads  # noqa: E402

STRANGER = "stranger/kernel"


def model(config):
    return SimpleNamespace(config=config, tensors={}, where="m")


def test_implementations_of_a_config_are_not_fetched(monkeypatch):
    asked = []

    def for_model(**config):
        asked.append(config)
        raise ValueError("enough")

    monkeypatch.setattr(transformers.AutoConfig, "for_model", for_model)
    keys = {"attn_implementation": STRANGER, "_experts_implementation": STRANGER,
            "auto_map": {"AutoConfig": "x.Y"}}  # fmt: skip
    config = {**CONFIG, "architectures": ["LlamaForCausalLM"], **keys, "text_config": dict(keys)}
    check_loads(model(config), model(config))
    assert asked
    assert STRANGER not in repr(asked)
    assert all("auto_map" not in each for each in asked)


@pytest.mark.parametrize("name", ["pipeline", "AutoModel", "Trainer"])
def test_what_is_not_a_model_is_not_called(monkeypatch, name):
    monkeypatch.setattr(transformers.AutoConfig, "for_model", lambda **config: pytest.fail(name))
    config = {**CONFIG, "architectures": [name]}
    check_loads(model(config), model(config))
