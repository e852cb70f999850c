"""Turns a run's lines into the series that trackers show, name -> value.

Series by round: `eval/*` (the global evaluation), `general/*` (held-out general text), `privacy/*`,
`train/*` (loss, aggregation error, norm of the update, bytes ...), `seconds/*`, and for each client
`client/K/*` (loss, steps ...), `client/K/eval_*` and `client/K/personal_*`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedlora.runs.events import Event

Values = dict[str, float]
"""Name of a series -> its value at one step or round."""

MOST_CLIENTS = 256
"""Clients with series of their own; more would drown any dashboard."""


def _numbers(prefix: str, figures: Mapping[str, Any]) -> Values:
    """The finite numbers among figures, their names under a prefix."""
    return {
        f"{prefix}{key}": float(x)
        for key, x in figures.items()
        if isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
    }


_OF_A_ROUND = (
    "aggregation_error",
    "truncation_error",
    "update_norm",
    "global_rank",
    "bytes_up",
    "bytes_down",
)


def round_values(line: Event) -> Values:
    """A line of `metrics.jsonl` (of event `start` or `round`) as series, name -> value."""
    clients = line.get("clients") or []
    out = _numbers("train/", {key: line.get(key) for key in _OF_A_ROUND})
    weighed = [
        (c["weight"], loss)
        for c in clients
        if c["weight"] and (loss := c["metrics"].get("loss")) is not None
    ]
    if weighed:
        out["train/loss"] = sum(w * loss for w, loss in weighed) / sum(w for w, _ in weighed)
    if clients:
        out["train/clients"] = float(len(clients))
        unneeded = sum(c.get("outcome") == "unneeded" for c in clients)
        out["train/rejected"] = float(sum(bool(c.get("rejected")) for c in clients) - unneeded)
    parts = (("eval/", "evaluation"), ("general/", "general_evaluation"), ("privacy/", "privacy"))
    for prefix, key in (*parts, ("seconds/", "seconds")):
        out |= _numbers(prefix, line.get(key) or {})
    for c in clients:
        if c["client"] < MOST_CLIENTS:
            own = {**c["metrics"], "rank": c["rank"], "bytes_up": c["bytes_up"]}
            out |= _numbers(f"client/{c['client']}/", own)
    for prefix, key in (("eval_", "client_evaluations"), ("personal_", "personal_evaluations")):
        for client, scores in (line.get(key) or {}).items():
            if int(client) < MOST_CLIENTS:
                out |= _numbers(f"client/{client}/{prefix}", scores)
    return out


def most_steps(line: Event) -> int:
    """Steps of the client that trained longest in a round."""
    return max((int(c["metrics"].get("steps") or 0) for c in line["clients"]), default=0)
