"""The table of ranks: adapters as they would be served, and what it says."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from fedlora.adapters.export.ranks import RankCost, spectrum
from fedlora.adapters.saved_adapter import load_adapter
from fedlora.commands.export.table import as_json, cut_adapters, show_table
from support.merging import made

COSTS = [RankCost(8, 0.25, 0.9375, 1000), RankCost(16, 1e-4, 1 - 1e-8, 2000), RankCost(20, 0, 1, 9)]


def shown(loss: list[float] | None, chosen: int | None) -> list[list[str]]:
    out = io.StringIO()
    show_table(COSTS, loss, chosen, Console(file=out, width=100))
    return [line.split() for line in out.getvalue().splitlines() if line.strip()]


def test_a_line_for_each_rank() -> None:
    head, _, *rows = shown([2.0, 1.5, 1.25], 16)
    assert head == ["rank", "rel.", "error", "energy", "bytes", "loss"]
    assert rows == [
        ["8", "2.5e-01", "93.75%", "1.0", "KB", "2.0000"],
        ["16", "1.0e-04", "99.999999%", "2.0", "KB", "1.5000", "written"],
        ["20", "0", "100%", "9", "B", "1.2500", "full"],
    ]
    assert "loss" not in shown(None, None)[0]
    assert shown(None, 20)[-1][-2:] == ["full,", "written"]


def test_the_same_for_programs() -> None:
    assert as_json(COSTS, None)[0] == {"rank": 8, "error": 0.25, "energy": 0.9375, "nbytes": 1000}
    assert [row["loss"] for row in as_json(COSTS, [2.0, 1.5, 1.25])] == [2.0, 1.5, 1.25]


def test_every_rank_but_the_last_is_written_as_it_would_be_served(tmp_path: Path) -> None:
    adapter = made({"a.q_proj": ((9, 8), 6), "b.q_proj": ((9, 8), 2)})
    found = spectrum(adapter.deltas)
    paths = cut_adapters(adapter, found, [1, 4, 6], tmp_path)
    assert list(paths) == ["rank-1", "rank-4"]
    back = load_adapter(paths["rank-4"])
    assert {name: x.rank for name, x in back.deltas.items()} == {"a.q_proj": 4, "b.q_proj": 2}
