"""What a judge is asked and how its words are read; the endpoint is played."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fedlora.commands.eval.judge import Judge, case, rating
from fedlora.errors import InputError


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("Good. Rating: [[7]]", 7.0),
        ("[1] is wrong. Rating: [[8.5]] or [[3]]", 8.5),
        ("Rating: [6]", 6.0),
        ("Rating: [[11]]", None),
        ("Rating: seven", None),
    ],
)
def test_ratings(words: str, wanted: float | None) -> None:
    assert rating(words) == wanted


def test_the_form_follows_turns_and_references() -> None:
    forms = {
        (turns, bool(reference)): case(["q"] * turns, ["a"] * turns, reference)
        for turns in (1, 2)
        for reference in (None, ["r"] * turns)
    }
    assert {key: it.form for key, it in forms.items()} == {
        (1, False): "single-v1",
        (1, True): "single-math-v1",
        (2, False): "single-v1-multi-turn",
        (2, True): "single-math-v1-multi-turn",
    }
    assert "[The Start of Reference Answer]\nr\n" in forms[1, True].user
    assert "### Assistant A:\na" in forms[2, False].user


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


def test_an_address_has_to_be_one() -> None:
    with pytest.raises(InputError, match="--judge_url: localhost:8000: expected http"):
        Judge("localhost:8000", "gpt")
