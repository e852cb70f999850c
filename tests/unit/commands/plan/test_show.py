"""What a plan looks like: how long things take in words, and tables that fit into 80 columns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from fedlora.client.planned_memory import ClientMemory
from fedlora.commands.plan.show import _clients, _excluded, duration
from fedlora.runs.planning.plan import Plan, PlannedClient


@pytest.mark.parametrize(("seconds", "shown"), [(2.55, "2.5 s"), (90, "1.5 min"), (7200, "2.0 h")])
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_clients_that_need_the_same_share_a_line_of_80_columns() -> None:
    memory = ClientMemory(500_000_000, 13_500_000_000, 0, 999_900_000, 888_800_000, 777_700_000)
    clients: list[Any] = [
        PlannedClient(k, 256, 16, 99, memory, 999_900_000, 1.0) for k in range(12)
    ]
    console = Console(width=80)
    with console.capture() as caught:
        console.print(_clients(cast(Plan, SimpleNamespace(clients=clients))))
    lines = [line.strip() for line in caught.get().splitlines()]
    assert "all: with 500.0 MB for Python and its libraries" in caught.get()
    (row,) = [line for line in lines if " 256 " in line]
    assert row.split("  ")[0] == "0 +11"
    assert row.endswith("999.9 MB")
    assert "13.5 GB" in row
    assert "…" not in row


def test_methods_are_left_out_with_their_reasons() -> None:
    excluded = {"fedit": "one rank", "hetlora": "own weights; leave it out", "ffa": "one rank"}
    wanted = "Not with these settings: fedit, ffa (one rank); hetlora (own weights)."
    assert _excluded(excluded) == wanted


def test_memory_that_is_not_known_is_a_dash() -> None:
    clients: list[Any] = [PlannedClient(k, 4, 2, 9 * k, None, 6_000_000_000, None) for k in (0, 1)]
    console = Console(width=80)
    with console.capture() as caught:
        console.print(_clients(cast(Plan, SimpleNamespace(clients=clients))))
    rows = [line.split() for line in caught.get().splitlines() if " - " in line]
    assert [row[-2:] for row in rows] == [["no", "rows"], ["6.0", "GB"]]
