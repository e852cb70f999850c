"""Defines what a round leaves in the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Outcome = Literal["counted", "failed", "late", "unneeded"]
"""What became of a client that a round has asked: its update counts; it failed, or its update was
refused; it was not done by the deadline; the round was full before it was done."""


@dataclass(frozen=True)
class ClientRecord:
    """One client's part in a round, for the log.

    Args:
        client: its number.
        rank: of the adapter it was sent.
        num_examples: rows it trained on, or would have.
        weight: its share of the sum; 0 where it does not count.
        bytes_down: sent to it.
        bytes_up: received from it.
        metrics: of its training; empty where no update came.
        rejected: why it does not count; "" where it does.
        outcome: what became of it.
    """

    client: int
    rank: int
    num_examples: int
    weight: float
    bytes_down: int
    bytes_up: int
    metrics: Mapping[str, Any]
    rejected: str = ""
    outcome: Outcome = "counted"


@dataclass(frozen=True)
class LayerRecord:
    """One target module in a round, for the log.

    Args:
        error: as `RoundRecord.aggregation_error`, of this module alone.
        norm: the Frobenius norm of its change.
    """

    error: float | None
    norm: float


@dataclass(frozen=True)
class RoundRecord:
    """One committed round, for the log.

    Args:
        round: counted from 1.
        clients: one record each, in client order.
        aggregation_error: `||dG - sum_k p_k (M_k - M_k_start)||` over the norm of that sum, with dG
            the change of the global model and M_k the product client k ended with; None with a
            server optimiser (its step is not meant to be that sum) or where nothing was learnt.
            Rounding S to float32 sets a floor of about `4e-7 ||S|| / ||dG||`.
        truncation_error: `||S - S_hat|| / ||S||` of what was sent, where a rule truncates it.
        update_norm: the Frobenius norm of dG over all modules.
        global_rank: the largest rank bound of a module of the global update.
        layers: target module -> its part; of modules with more than 256 directions the norms are
            estimates, within 10%.
        compression_error_up: of the clients' updates, where they are compressed: the mean of
            `||lost|| / ||learnt||`, by weight (`federation.uplink`).
        compression_error_down: of what the server handed out: `||lost|| / ||meant||`.
    """

    round: int
    clients: tuple[ClientRecord, ...]
    aggregation_error: float | None
    truncation_error: float
    update_norm: float
    global_rank: int
    layers: Mapping[str, LayerRecord] = field(default_factory=dict)
    compression_error_up: float | None = None
    compression_error_down: float | None = None

    @property
    def bytes_down(self) -> int:
        """Bytes sent to all clients of the round."""
        return sum(c.bytes_down for c in self.clients)

    @property
    def bytes_up(self) -> int:
        """Bytes received from all clients of the round."""
        return sum(c.bytes_up for c in self.clients)
