"""The table of ranks: adapters as they would be served, and what it says."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedlora.adapters.aggregate import save_adapter
from fedlora.adapters.export.ranks import RankCost, spectrum
from fedlora.commands.eval.models import load_models
from fedlora.commands.eval.options import Loading
from fedlora.commands.export.origin import HeldOut, find_origin, with_adapters
from fedlora.commands.export.table import as_json, losses, show_table
from support.merging import peft_saves
from support.runs import loss_of

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


def test_a_cut_adapter_is_measured_as_peft_loads_it(tiny_llama: Path, tmp_path: Path) -> None:
    path = peft_saves(tmp_path / "a", tiny_llama, r=3, target_modules=["q_proj", "up_proj"])
    origin = find_origin(Loading(str(path), dtype="float32", use_cpu=True))
    found = spectrum(origin.adapter.deltas)
    models = load_models(with_adapters(origin.needed(), {"adapter": path}), ["adapter"])
    ids = [5, 9, 14, 20, 33, 41]
    rows = HeldOut([{"input_ids": ids, "labels": ids}], 1, "a row")
    measured = losses(models, origin, found, [1, 2, 3], rows)
    save_adapter(tmp_path / "r1", replace(origin.adapter, deltas=found.cut(1)))
    data: Any = rows.rows
    wanted = [loss_of(str(tiny_llama), where, data) for where in (tmp_path / "r1", path)]
    assert [measured[0], measured[2]] == pytest.approx(wanted, rel=1e-5)
    assert len(set(measured)) == 3
    assert list(models.peft.peft_config) == ["adapter"]  # what was cut is gone
