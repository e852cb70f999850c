"""Defines what an aggregation rule takes and gives: starts, encoded updates, sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedlora.lowrank import Adapter, Deltas, LowRank, add_all, nbytes

DENSE = "dense/"
"""Marks dense parameters among the factors of a sum: they are averaged like them, by every rule."""


@dataclass(frozen=True)
class Prepared:
    """What a round broadcasts, to all clients or to those of one rank.

    Args:
        adapter: the global adapter; empty where the rule resets it.
        leading: its leading directions, which starts are cut from: see `Broadcast`.
        error: `||S - S_hat||_F / ||S||_F`, where less than the global update S is sent.
    """

    adapter: Deltas
    leading: Adapter
    error: float = 0.0


@dataclass(frozen=True)
class RoundNumbers:
    """The numbers of a round that every client may know, and that `encode` needs.

    Args:
        widths: target module -> the largest rank that any client trains there. Factors are padded
            to it, so that those of all clients have one shape.
        levels: the distinct ranks of the federation, ascending.
    """

    widths: Mapping[str, int]
    levels: tuple[int, ...]


@dataclass(frozen=True)
class Training:
    """What a rule asks of a client's local training; the trainer and the worker read it.

    Args:
        trains: which factors are trained, "AB", "A" or "B", by round, over and over; the others
            stay as they started.
        keeps: a trained factor that stays with its client and is trained on in its next round:
            "" or "B".
        tail_penalty: lambda of `lambda sum_modules ||s B[:, t:]||_F ||A[t:]||_F`, which is added to
            the loss, with `t = tail_from * rank`.
        tail_from: gamma, the share of the rank that is no tail.
        prunes: after training, a client whose tail (the sum above) has shrunk goes on with rank
            `tail_from * rank`.
    """

    trains: tuple[str, ...] = ("AB",)
    keeps: str = ""
    tail_penalty: float = 0.0
    tail_from: float = 1.0
    prunes: bool = False

    def trained(self, round: int) -> str:
        """The factors trained in a round, counted from 1."""
        return self.trains[(round - 1) % len(self.trains)]

    def sent(self, round: int) -> str:
        """The factors a client sends up in a round."""
        return "".join(factor for factor in self.trained(round) if factor not in self.keeps)


@dataclass(frozen=True)
class Start:
    """What a client makes of a broadcast: what it trains, and what lies frozen beside it.

    Args:
        adapter: what it trains.
        private: what is frozen and this client's alone, as factors of small rank.
        shared: what is frozen and common to all clients of the round: the broadcast's `adapter`
            itself, so that it has to be added to the base only once.
    """

    adapter: Adapter
    private: Adapter = field(default_factory=dict)
    shared: Deltas = field(default_factory=dict)

    @property
    def frozen(self) -> Deltas:
        """All that lies frozen beside the adapter, `shared + private`."""
        return add_all([self.shared, self.private])


@dataclass(frozen=True)
class Encoded:
    """What a rule needs of an update, or a weighted sum of that.

    Args:
        factors: tensors that are summed element by element.
        products: low-rank updates that are summed as matrices, `sum_k p_k dW_k`.
        weights: small tensors, summed like `factors`, that say by how much weight a module or a
            direction was trained. A rule divides or shifts its sums by them. They are no
            parameters, and a server optimiser leaves them alone.
    """

    factors: Mapping[str, Tensor] = field(default_factory=dict)
    products: Deltas = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Increment:
    """What one round changes of one module of a global adapter S whose directions are followed.

    Whoever has S and its basis V computes from it those after the round: see `methods.tracking`.

    Args:
        stack: what is appended, `B_new (m, r)` and `A_new (r, n)`.
        weights: `(j,)`, by how much of itself each of the first j leading directions changes.
        turn: `(L', L + r)`, the next basis as combinations of `[V; A_new]`; None: it stays.
    """

    stack: LowRank
    weights: Tensor
    turn: Tensor | None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name; none where it changes nothing."""
        named = {"A": self.stack.A, "B": self.stack.B, "weights": self.weights}
        return {} if self.turn is None else {**named, "turn": self.turn}

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(value.nbytes for value in self.tensors.values())


Increments = Mapping[str, Increment]
"""Target module name -> what a round changes of it."""


@dataclass(frozen=True)
class Change:
    """What one round has changed of the global model.

    Args:
        merge: what it has added to `base_delta`.
        increments: how it has changed the adapter, of a rule that follows its directions; a module
            that has none can only be sent whole.
    """

    merge: Deltas = field(default_factory=dict)
    increments: Increments = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return nbytes(self.merge) + sum(x.nbytes for x in self.increments.values())


@dataclass(frozen=True)
class Aggregate:
    """The outcome of a rule: the next trainable global adapter, and what is merged for good.

    Args:
        adapter: the global adapter of the next round; empty = fresh LoRA initialisation.
        merge: what is added to the frozen side `base_delta`; empty = nothing.
        leading: leading directions of the adapter, of a rule that follows them.
        increments: how adapter and leading directions came from those before, where a module's
            change is smaller than the module.
    """

    adapter: Deltas
    merge: Deltas = field(default_factory=dict)
    leading: Adapter = field(default_factory=dict)
    increments: Increments = field(default_factory=dict)


@dataclass(frozen=True)
class ServerState:
    """All the server knows between two rounds; what a checkpoint holds.

    Args:
        round: rounds committed so far.
        adapter: the global adapter (in full, whatever was sent of it).
        base_delta: what was merged into the frozen side.
        dense: averaged dense parameters.
        last_merge: what the last committed round added to `base_delta`.
        last_seen: client -> last round it was sent a broadcast for.
        momentum: the server optimiser's velocity.
        ranks: client -> its rank, as far as it has pruned it.
        leading: leading directions of the adapter, of a rule that follows them; a module may lack
            (a run that an earlier version began): its are found anew.
        changes: round -> what it has changed, of the last rounds, as far as clients may lack it.
        unsent: what rounding has left out of what was handed out, where messages are compressed; it
            comes with a later round.
    """

    round: int
    adapter: Deltas
    base_delta: Deltas = field(default_factory=dict)
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    last_merge: Deltas = field(default_factory=dict)
    last_seen: Mapping[int, int] = field(default_factory=dict)
    momentum: Encoded = field(default_factory=Encoded)
    ranks: Mapping[int, int] = field(default_factory=dict)
    leading: Adapter = field(default_factory=dict)
    changes: Mapping[int, Change] = field(default_factory=dict)
    unsent: Deltas = field(default_factory=dict)

    @property
    def levels(self) -> tuple[int, ...]:
        """The distinct ranks of all clients, ascending."""
        return tuple(sorted(set(self.ranks.values())))
