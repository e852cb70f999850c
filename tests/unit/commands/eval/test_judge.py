"""What a judge is asked and how its words are read; the endpoint is played."""

from __future__ import annotations

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


def test_an_address_has_to_be_one() -> None:
    with pytest.raises(InputError, match="--judge_url: localhost:8000: expected http"):
        Judge("localhost:8000", "gpt")
