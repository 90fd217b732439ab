"""What the tests of the evaluation share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from tests.evaluation.judge_server import Stub


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    for name in [name for name in os.environ if name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    it = Stub()
    yield it
    it.stop()
