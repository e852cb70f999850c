"""A run's lines as series of numbers."""

from __future__ import annotations

import math

from fedlora.runs.tracker_series import most_steps, round_values
from support.trackers import (
    a_round,
    apart,  # noqa: F401
)


def test_a_line_as_values() -> None:
    found = round_values(a_round(1))
    assert all(isinstance(x, float) and math.isfinite(x) for x in found.values())
    assert not any("per_class" in name or "layers" in name for name in found)
    assert most_steps(a_round(1, steps=7)) == 7
    assert round_values({"event": "start", "round": 0}) == {}


def test_many_clients_do_not_drown_a_dashboard() -> None:
    line = a_round(1)
    line["clients"] = [{**line["clients"][0], "client": k} for k in range(10_000)]
    line["client_evaluations"] = {str(k): {"loss": 1.0} for k in range(10_000)}
    found = round_values(line)
    assert len(found) < 256 * 6 + 30
    assert found["train/clients"] == 10_000
