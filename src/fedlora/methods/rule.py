"""Defines what an aggregation rule is, and holds the pieces that several rules share.

A rule is pure functions. With `p_k` the weights, renormalised over the clients that counted,

    encode(update_k, start_k, ...)    what of client k's *change* the rule needs
    finish(sum_k p_k encode_k, ...)   the next global adapter, and what is merged for good

The server sees a rule's input only through that weighted sum. So secure aggregation and central
differential privacy, which replace many updates by one sum, need to know no rule; and a server
optimiser acts on the sum, whatever the rule. `Encoded` says how each entry is summed: `factors`
element by element, `products` as matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from fedlora.lowrank import Adapter, Delta, Deltas, LowRank, add, balance, prefix, refactor, suffix
from fedlora.state import Aggregate, Encoded, ServerState, Start

Shapes = Mapping[str, tuple[int, int]]
"""Target module name -> `(m, n)`."""

Fresh = Callable[[str, int], Tensor]
"""`(module, rank) -> A (rank, n)`, LoRA's random initialisation."""


def bounded(default: Any, *, training: bool = False, **bounds: float) -> Any:
    """A field of a rule's options.

    Args:
        default: its value where none is given; None may then be given too.
        training: it acts on what clients are sent or how they train, not on the sum.
        bounds: `ge`, `gt` and `le`, as pydantic calls them. A number is always finite.
    """
    return field(default=default, metadata={"training": training, "bounds": bounds})


def check_bounds(options: Any) -> None:
    """Hold a rule's options against their bounds.

    Raises:
        ValueError: which option lies outside, and where it has to lie.
    """
    for f in fields(options):
        value, bounds = getattr(options, f.name), f.metadata.get("bounds", {})
        ge, gt, le = (bounds.get(name) for name in ("ge", "gt", "le"))
        if value is None or (
            math.isfinite(value)
            and (ge is None or value >= ge)
            and (gt is None or value > gt)
            and (le is None or value <= le)
        ):
            continue
        if le is None:
            finite = "" if isinstance(value, int) else ", and finite"
            where = f"at least {ge}{finite}" if gt is None else f"greater than {gt}{finite}"
        else:
            where = f"above {gt} and at most {le}" if ge is None else f"between {ge} and {le}"
        verb = "lie" if where.startswith("between") else "be"
        raise ValueError(f"{f.name}: {value} must {verb} {where}")


@dataclass(frozen=True)
class NoOptions:
    """The rule has no options."""


@dataclass(frozen=True)
class Prepared:
    """What a round broadcasts: see `Broadcast`. `error` is `||S - S_hat|| / ||S||`."""

    adapter: Deltas
    leading: Adapter
    error: float = 0.0


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


def as_usual(options: Any) -> Training:
    """Both factors are trained and sent."""
    return Training()


def both_factors(round: int, seen: bool) -> str:
    """Both factors are sent down in every round."""
    return "AB"


def no_fixed_weight(options: Any) -> float | None:
    """Weights are the clients' shares."""
    return None


@dataclass(frozen=True)
class Rule:
    """One aggregation rule.

    Args:
        name: what `method:` in a configuration says.
        title: one line on what it does.
        paper: the source.
        exact_when: when the global model changes by exactly `sum_k p_k (M_k - M_k_start)`.
        mixed_ranks: whether clients may train different ranks.
        downlink: what a client is sent in a round.
        secure_sum: what `encode` gives and a secure sum has to carry: factors, products or both.
        initial: `(shapes, rank, fresh, given) -> (adapter, base_delta)`, the global model before
            round 1; `rank` is the largest client's, `given` an adapter to go on from (or empty).
        prepare: `(state, rank, options) -> Prepared`, once a round; `rank` the largest client's.
        cut: `(prepared, rank, options) -> Prepared`, what of it a client of this rank is sent.
        start: `(adapter, leading, shapes, rank, fresh, options) -> Start`, at the client.
        encode: `(update, start, state, options) -> Encoded`, at the server.
        finish: `(sum, state, rank, options) -> Aggregate`; `rank` the largest client's.
        sums_learnt: the products that `encode` gives are `M_k - M_k_start` itself, so that it need
            not be summed beside them to tell the aggregation error.
        training: `options -> Training`, what it asks of the local training.
        sent_down: `(round, seen) -> "AB", "A" or "B"`, the factors a client lacks at the beginning
            of a round; `seen`: it took part in the round before.
        fixed_weight: `options ->` a constant that replaces every p_k, or None.
        server_optimiser: whether a server learning rate or momentum has a meaning: not where
            `finish` divides by a sum of weights of its own.
        server_momentum: whether a server momentum has a meaning: not where the factors that are
            trained, or the directions they belong to, are other ones in every round.
        one_shot: whether it can combine adapters that were trained apart, without a shared start.
        options: a frozen dataclass of the rule's own configuration keys, `bounded` where not every
            value is possible; its `__post_init__` is `check_bounds`.
    """

    name: str
    title: str
    paper: str
    exact_when: str
    mixed_ranks: bool
    downlink: str
    secure_sum: Literal["factors", "products", "factors and products"]
    initial: Callable[[Shapes, int, Fresh, Adapter], tuple[Deltas, Deltas]]
    prepare: Callable[[ServerState, int, Any], Prepared]
    cut: Callable[[Prepared, int, Any], Prepared]
    start: Callable[[Deltas, Adapter, Shapes, int, Fresh, Any], Start]
    encode: Callable[[Adapter, Start, ServerState, Any], Encoded]
    finish: Callable[[Encoded, ServerState, int, Any], Aggregate]
    sums_learnt: bool = False
    training: Callable[[Any], Training] = as_usual
    sent_down: Callable[[int, bool], str] = both_factors
    fixed_weight: Callable[[Any], float | None] = no_fixed_weight
    server_optimiser: bool = True
    server_momentum: bool = True
    one_shot: bool = True
    options: type[Any] = NoOptions


def whole(prepared: Prepared, rank: int, options: Any) -> Prepared:
    """Everyone is sent the same."""
    return prepared


def fresh_start(shapes: Shapes, rank: int, fresh: Fresh) -> dict[str, LowRank]:
    """LoRA's initialisation for every module: `A (rank, n)` random, `B (m, rank)` zero."""
    out = {}
    for name, (m, _) in shapes.items():
        a = fresh(name, rank)
        out[name] = LowRank(a, a.new_zeros(m, rank))
    return out


def fill(x: LowRank, a: Tensor) -> LowRank:
    """`x` with the directions of `A = a (j, n)`, `B = 0` appended: the same update, rank r + j."""
    a = a.to(x.A)
    return LowRank(torch.cat([x.A, a]), torch.cat([x.B, x.B.new_zeros(x.B.shape[0], len(a))], 1))


def change(update: Adapter, start: Adapter) -> dict[str, Delta]:
    """`M_k - M_k_start` for every module: what a client learnt, as products."""
    out: dict[str, Delta] = {}
    for name, trained in update.items():
        began = start[name]  # of higher rank where the client has pruned
        moved = began.B.any(dim=0)  # directions that begin with B = 0 contribute nothing
        out[name] = add([trained, LowRank(began.A[moved], -began.B[:, moved])])
    return out


# --- rules that average factors: all clients continue from one shared adapter ---


def shared_initial(
    shapes: Shapes, rank: int, fresh: Fresh, given: Adapter
) -> tuple[Deltas, Deltas]:
    """One random `A` for all (independent draws would average to nothing), `B = 0`.

    A given adapter is continued: its leading `rank` directions are trained on, filled up with
    fresh ones where it has fewer, and what it has beyond them is merged.
    """
    adapter, beyond = dict(fresh_start(shapes, rank, fresh)), {}
    for name, x in given.items():
        exact = refactor(x)
        x = balance(prefix(exact, rank))
        if exact.rank > rank:
            beyond[name] = suffix(exact, rank)
        adapter[name] = fill(x, fresh(name, rank)[x.rank :])
    return adapter, beyond


def prepare_as_is(state: ServerState, rank: int, options: Any) -> Prepared:
    """The global adapter itself, held as factors."""
    leading = {n: x for n, x in state.adapter.items() if isinstance(x, LowRank)}
    assert len(leading) == len(state.adapter), "a rule that averages factors keeps factors"
    return Prepared(leading, leading)


def cut_to_rank(prepared: Prepared, rank: int, options: Any) -> Prepared:
    """The first `rank` directions: what a client of that rank trains."""
    leading = {name: prefix(x, rank) for name, x in prepared.leading.items()}
    return Prepared(leading, leading, prepared.error)


def prefix_start(
    adapter: Deltas, leading: Adapter, shapes: Shapes, rank: int, fresh: Fresh, options: Any
) -> Start:
    """The first `rank` directions of the shared adapter; what lies beyond them is not seen."""
    return Start({name: prefix(leading[name], rank) for name in shapes})


def whole_start(
    adapter: Deltas, leading: Adapter, shapes: Shapes, rank: int, fresh: Fresh, options: Any
) -> Start:
    """The first `rank` directions of the shared adapter, the others frozen beside them."""
    trained = {name: prefix(leading[name], rank) for name in shapes}
    beyond = {name: suffix(leading[name], rank) for name in shapes if leading[name].rank > rank}
    return Start(trained, beyond)


def change_of_factors(
    update: Adapter, start: Start, state: ServerState, options: Any
) -> dict[str, Tensor]:
    """`A_k - start.A`, `B_k - start.B`, with zeros where a client has no such direction.

    Unlike `padded_change` nothing is diluted: what a client does not train does not change.
    """
    factors: dict[str, Tensor] = {}
    for name, trained in update.items():
        current, began = state.adapter[name], start.adapter[name]
        assert isinstance(current, LowRank)
        a, b = torch.zeros_like(current.A), torch.zeros_like(current.B)
        a[: trained.rank] = trained.A - began.A  # (r, n)
        b[:, : trained.rank] = trained.B - began.B  # (m, r)
        factors[f"{name}.A"], factors[f"{name}.B"] = a, b
    return factors


def padded_change(update: Adapter, start: Start, state: ServerState, options: Any) -> Encoded:
    """`pad(A_k) - A`, `pad(B_k) - B`: factors padded with zeros to the global rank, as a change.

    A module that the client does not train is not in `update`, and does not change.
    """
    factors: dict[str, Tensor] = {}
    for name, trained in update.items():
        current = state.adapter[name]
        assert isinstance(current, LowRank)
        a, b = -current.A, -current.B
        a[: trained.rank] += trained.A  # (r, n)
        b[:, : trained.rank] += trained.B  # (m, r)
        factors[f"{name}.A"], factors[f"{name}.B"] = a, b
    return Encoded(factors=factors)


def add_factors(total: Encoded, state: ServerState, rank: int, options: Any) -> Aggregate:
    """`A + sum.A`, `B + sum.B`; a module that nobody trained stays."""
    adapter = {}
    for name, current in state.adapter.items():
        assert isinstance(current, LowRank)
        if f"{name}.A" not in total.factors:
            adapter[name] = current
            continue
        adapter[name] = LowRank(
            current.A + total.factors[f"{name}.A"], current.B + total.factors[f"{name}.B"]
        )
    return Aggregate(adapter)
