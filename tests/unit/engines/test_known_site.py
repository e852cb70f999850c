"""A site that has lost its model is asked once more, and sent all of it."""

from __future__ import annotations

import pytest

from fedlora.engines.carrier import SiteError
from fedlora.engines.known_site import with_all_where_lost


@pytest.mark.parametrize(
    ("held", "kinds", "asked"),
    [
        (3, [], [3]),
        (3, ["lost"], [3, None]),
        (None, [], [None]),
    ],
)
def test_what_is_lost_is_sent_whole(
    held: int | None, kinds: list[str], asked: list[int | None]
) -> None:
    rounds: list[int | None] = []

    def ask(held: int | None) -> str:
        rounds.append(held)
        if kinds:
            raise SiteError(kinds.pop(), "it rests on another model")
        return "trained"

    assert with_all_where_lost(ask, held) == "trained"
    assert rounds == asked


@pytest.mark.parametrize(
    ("held", "kinds", "outcome"),
    [
        (3, ["failed"], "failed"),
        (None, ["lost"], "lost"),  # it was sent all of it already
        (3, ["busy", "lost"], "busy"),
    ],
)
def test_anything_else_is_the_outcome(held: int | None, kinds: list[str], outcome: str) -> None:
    def ask(held: int | None) -> str:
        raise SiteError(kinds.pop(), "no")

    with pytest.raises(SiteError) as raised:
        with_all_where_lost(ask, held)
    assert raised.value.kind == outcome
    assert not kinds
