"""Holds what a run returns, and what it tells a callback after each round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.federation.records import RoundRecord
from fedlora.lowrank import Deltas
from fedlora.methods.values import ServerState


@dataclass(frozen=True)
class RoundResult:
    """What a callback is told after a round.

    Args:
        record: the round.
        metrics: its line in `metrics.jsonl`.
        state: the server's state after it.
    """

    record: RoundRecord
    metrics: Mapping[str, Any]
    state: ServerState


Callbacks = Sequence[Callable[[RoundResult], None]]


@dataclass(frozen=True)
class Result:
    """What a run returns.

    Args:
        output_dir: the run's directory.
        final_dir: the final adapter as a PEFT directory.
        adapter: the final global update, target module -> update.
        metrics: the lines of `metrics.jsonl`, in order.
        best_round: the round with the best metric; None without an evaluation.
    """

    output_dir: Path
    final_dir: Path
    adapter: Deltas
    metrics: list[dict[str, Any]]
    best_round: int | None

    @property
    def evaluations(self) -> dict[int, dict[str, Any]]:
        """Round -> global evaluation, round 0 being the base."""
        return {
            line["round"]: line["evaluation"] for line in self.metrics if line.get("evaluation")
        }
