"""Tells who takes part in a federation and with what weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fedlora.federation.exchange import Agreement
from fedlora.methods.rule import Shapes
from fedlora.seeds import SERVER, Purpose, generator


@dataclass(frozen=True)
class Federation:
    """Who takes part, and how the server weighs and steps.

    Args:
        ranks: the adapter rank of every client.
        num_examples: rows of every client; one with none is never asked.
        agreement: what the server and all clients agree on: the rule, its options, the target
            modules, the seed.
        clients_per_round: None = all, an int = so many, a float in (0, 1] = that share.
        client_weights: "examples": p_k in proportion to the rows; "uniform": all alike.
        server_learning_rate: eta in `G' = G + eta v`.
        server_momentum: mu in `v = mu v + sum_k p_k encode_k` (FedAvgM, arXiv 1909.06335).
        modules: the target modules of clients that do not train all of them. What a client does
            not train stays as it is sent: it adds nothing to the sum, its weight counts in full
            (hetlora and raflora weigh module by module, over those who train it).
        compression_feedback: whether what rounding leaves out of a round comes with a later one.
    """

    ranks: Sequence[int]
    num_examples: Sequence[int]
    agreement: Agreement
    clients_per_round: int | float | None = None
    client_weights: Literal["examples", "uniform"] = "examples"
    server_learning_rate: float = 1.0
    server_momentum: float = 0.0
    modules: Mapping[int, frozenset[str]] = field(default_factory=dict)
    compression_feedback: bool = True

    @property
    def shapes(self) -> Shapes:
        """Target module -> `(m, n)`, as agreed."""
        return self.agreement.shapes

    def trained_by(self, client: int) -> frozenset[str] | None:
        """The target modules a client trains; None = all."""
        return self.modules.get(client)

    def weight(self, num_examples: int) -> float:
        """A client's weight before normalisation."""
        rows = max(num_examples, 0)
        return float(rows > 0 if self.client_weights == "uniform" else rows)

    def sample(self, round: int) -> list[int]:
        """The clients of a round, in ascending order, drawn without replacement."""
        able = [k for k, rows in enumerate(self.num_examples) if rows > 0]
        wanted = self.clients_per_round
        if wanted is None:
            return able
        if isinstance(wanted, float):
            wanted = max(1, int(wanted * len(able) + 0.5))
        rng = generator(self.agreement.seed, round, SERVER, Purpose.SAMPLING)
        return sorted(rng.choice(able, size=min(wanted, len(able)), replace=False).tolist())
