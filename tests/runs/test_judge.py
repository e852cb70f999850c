"""The judge as the client of an endpoint."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fedlora.commands.eval.judge import Judge, case


def test_an_endpoint_that_knows_no_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    openai = pytest.importorskip("openai")
    judge = Judge("http://localhost:1/v1", "gpt", key="secret")
    asked: list[dict[str, Any]] = []

    def create(**named: Any) -> Any:
        asked.append(named)
        if "temperature" in named:
            response = SimpleNamespace(request=None, status_code=400, headers={})
            raise openai.BadRequestError("no temperature here", response=response, body=None)
        message = SimpleNamespace(content="Rating: [[5]]")
        return SimpleNamespace(choices=[SimpleNamespace(message=message)])

    monkeypatch.setattr(judge._client.chat.completions, "create", create)
    one = case(["q"], ["a"], None)
    assert judge.ask(one) == judge.ask(one) == "Rating: [[5]]"
    assert ["temperature" in named for named in asked] == [True, False, False]
    assert "secret" not in repr(judge)
