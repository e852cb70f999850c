"""Writes down what a committed round was: its clients, their weights and bytes, its change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.federation.aggregation_error import Norms, measure_change
from fedlora.federation.compression import Compression, packed_bytes
from fedlora.federation.messages import Broadcast, ClientUpdate
from fedlora.federation.participants import Federation
from fedlora.federation.records import ClientRecord, LayerRecord, Outcome, RoundRecord
from fedlora.federation.uplink import ERROR
from fedlora.lowrank import Deltas
from fedlora.methods.values import ServerState


@dataclass(frozen=True)
class Answer:
    """What is remembered of an update when its tensors are gone.

    Args:
        num_examples: rows it was trained on.
        rank: of its adapter; None where it trained no module.
        nbytes: of the tensors that travelled.
        metrics: what the local training reported.
    """

    num_examples: int
    rank: int | None
    nbytes: int
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Rejection:
    """Why a client of a round does not count.

    Args:
        reason: in words.
        outcome: what became of it.
    """

    reason: str
    outcome: Outcome = "failed"


def answer_of(update: ClientUpdate, compression: Compression = "none") -> Answer:
    """What is remembered of an update.

    Args:
        update: of a client.
        compression: what it was rounded to.
    """
    rank = max((x.rank for x in update.adapter.values()), default=None)
    nbytes = packed_bytes(update.tensors, compression)
    return Answer(update.num_examples, rank, nbytes, dict(update.metrics))


def client_records(
    federation: Federation,
    broadcasts: Mapping[int, Broadcast],
    answers: Mapping[int, Answer],
    rejected: Mapping[int, Rejection],
    total_weight: float,
) -> tuple[ClientRecord, ...]:
    """One record for every client that was asked, in client order.

    Args:
        federation: who takes part.
        broadcasts: client -> what it was sent.
        answers: client -> what is remembered of its update.
        rejected: client -> why it does not count.
        total_weight: the sum of the weights of those that count.
    """
    records = []
    for client, sent in sorted(broadcasts.items()):
        answer, rejection = answers.get(client), rejected.get(client)
        if answer is None and rejection is None:
            rejection = Rejection("")  # the round was closed without it
        weight = 0.0
        if answer is not None and rejection is None and total_weight > 0:
            fixed = federation.agreement.fixed_weight
            weight = fixed or federation.weight(answer.num_examples) / total_weight
        records.append(
            ClientRecord(
                client=client,
                rank=sent.rank,
                num_examples=answer.num_examples if answer else federation.num_examples[client],
                weight=weight,
                bytes_down=sent.nbytes,
                bytes_up=answer.nbytes if answer else 0,
                metrics=answer.metrics if answer else {},
                rejected=rejection.reason if rejection else "",
                outcome=rejection.outcome if rejection else "counted",
            )
        )
    return tuple(records)


def _error_of_updates(clients: tuple[ClientRecord, ...]) -> float | None:
    """The mean of `compression_error` over the clients that count, by their weights."""
    told = [(c.weight, c.metrics.get(ERROR)) for c in clients if c.weight]
    known = [(weight, error) for weight, error in told if isinstance(error, float)]
    total = sum(weight for weight, _ in known)
    return sum(weight * error for weight, error in known) / total if total else None


def round_record(
    federation: Federation,
    before: ServerState,
    after: ServerState,
    wanted: Deltas,
    clients: tuple[ClientRecord, ...],
    truncation_error: float,
    rounding_error: float = 0.0,
) -> RoundRecord:
    """The record of a round.

    Args:
        federation: who takes part, and how the server steps.
        before: the state before the round.
        after: the state after it.
        wanted: `sum_k p_k (M_k - M_k_start)`.
        clients: their records.
        truncation_error: of what was sent.
        rounding_error: of what was sent, where messages are compressed.
    """
    change = measure_change(before, after, wanted)
    compressed = federation.agreement.compression != "none"
    plain = federation.server_learning_rate == 1.0 and not federation.server_momentum

    def error(norms: Norms) -> float | None:
        """A server optimiser's step is not meant to be the clients' sum."""
        return norms.missed / norms.wanted if plain and norms.wanted > 0 else None

    return RoundRecord(
        round=after.round,
        clients=clients,
        aggregation_error=error(change.total),
        truncation_error=truncation_error,
        update_norm=change.total.size,
        global_rank=global_rank(after),
        layers={name: LayerRecord(error(x), x.size) for name, x in change.modules.items()},
        compression_error_up=_error_of_updates(clients) if compressed else None,
        compression_error_down=rounding_error if compressed else None,
    )


def global_rank(state: ServerState) -> int:
    """The largest rank bound of a module of `base_delta + adapter`, which is never formed."""
    bounds: dict[str, int] = {}
    for deltas in (state.base_delta, state.adapter):
        for name, x in deltas.items():
            bounds[name] = min(bounds.get(name, 0) + x.rank, *x.shape)
    return max(bounds.values(), default=0)
