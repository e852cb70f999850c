"""Who is missing is said, with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.engines.nvflare.kit import AdminKit
from fedlora.engines.nvflare.presence import present_sites
from fedlora.engines.roster import Member, Roster
from fedlora.errors import InputError

ALL = ("alpha", "beta", "gamma")
NEW = Roster()
BEGUN = Roster(
    "1", {"alpha": Member(0, 4), "beta": Member(1, 4, left="enough"), "gamma": Member(2, 4)}
)


def kit(*sites: str) -> AdminKit:
    return AdminKit(Path("/kit"), "ada", "hub:8003", sites)


@pytest.mark.parametrize(
    ("keys", "roster", "named", "connected", "expected"),
    [
        ({}, NEW, ALL, ALL, (ALL, ALL)),
        ({}, NEW, (), ("alpha", "beta"), (("alpha", "beta"), ("alpha", "beta"))),
        ({"min_clients_per_round": 2}, NEW, ALL, ("alpha", "gamma"), (ALL, ("alpha", "gamma"))),
        ({}, BEGUN, ALL, ("alpha", "gamma"), (ALL, ("alpha", "gamma"))),
        ({}, BEGUN, (), ("alpha", "gamma"), (("alpha", "gamma"), ("alpha", "gamma"))),
    ],
)
def test_who_is_there(keys: Any, roster: Roster, named: Any, connected: Any, expected: Any) -> None:
    names, present = present_sites(Config(**keys), roster, kit(*named), connected)
    assert (tuple(names), tuple(present)) == expected


@pytest.mark.parametrize(
    ("keys", "roster", "named", "connected", "said"),
    [
        ({}, NEW, ALL, ("alpha",), "beta, gamma: not connected .* or set min_clients_per_round"),
        ({"min_clients_per_round": 2}, NEW, ALL, ("alpha",), "beta, gamma: not connected"),
        ({"min_clients_per_round": 1}, BEGUN, ALL, ("alpha", "beta"), "gamma: not connected"),
        ({"num_clients": 3}, NEW, (), ("alpha",), "3 are asked for, and alpha is connected"),
        ({"client_ranks": [4, 2]}, NEW, (), (), "2 are asked for, and no site is connected"),
        ({}, NEW, (), (), "none is connected to the server at hub:8003"),
    ],
)
def test_who_is_missing(keys: Any, roster: Roster, named: Any, connected: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        present_sites(Config(**keys), roster, kit(*named), connected)
