"""Clients that come into a running federation, or leave it for good."""

from __future__ import annotations

from typing import get_type_hints

import pytest

from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.exchange import Agreement
from fedlora.federation.participants import Federation
from fedlora.federation.server import Server, initial_state
from fedlora.methods import METHODS
from fedlora.runs.engine import Joined, Left
from fedlora.runs.events import Join, Leave
from fedlora.runs.membership import admit, as_line, dismiss, in_words, with_all_ranks

JOINED = Joined(client=2, name="c", rank=2, rows=7, eval_rows=1, tokens=70)
LEFT = Left(client=0, name="a", reason="done")


@pytest.fixture
def server() -> Server:
    rule = METHODS["exact"]
    agreement = Agreement(rule, rule.options(), {"q": (4, 4)}, 0)
    federation = Federation([4, 2], [10, 20], agreement)
    return Server(federation, initial_state(federation), Mean())


def test_who_has_joined_is_asked_and_who_has_left_is_not(server: Server) -> None:
    admit(server, JOINED)
    assert list(server.plan()) == [0, 1, 2]
    assert server.state.ranks == {0: 4, 1: 2, 2: 2}
    dismiss(server, LEFT)
    assert list(server.plan()) == [1, 2]
    assert list(server.federation.ranks) == [4, 2, 2], "numbers stay as they are"


def test_a_state_that_is_older_than_a_client_gets_its_rank(server: Server) -> None:
    before = server.state
    admit(server, JOINED)
    assert with_all_ranks(before, server.federation).ranks == server.state.ranks


def test_both_are_lines_and_notices() -> None:
    for change, kind in ((JOINED, Join), (LEFT, Leave)):
        line = as_line(change, 3)  # type: ignore[arg-type]
        assert line.keys() == get_type_hints(kind).keys()
        assert line["round"] == 3
    assert in_words(JOINED, 3) == "client 2 (c) takes part from round 4 on: rank 2, 7 rows"
    assert in_words(LEFT, 3) == "client 0 (a) has left after round 3: done"
