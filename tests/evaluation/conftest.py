"""What the tests of the evaluation share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.evaluation.judge_server import Stub


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    it = Stub()
    yield it
    it.stop()
