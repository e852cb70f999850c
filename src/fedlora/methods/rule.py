"""Defines what an aggregation rule is.

A rule is pure functions. With `p_k` the weights, renormalised over the clients that counted,

    encode(update_k, start_k, ...)              what of client k's *change* the rule needs
    total = sum_k p_k encode_k
    finalize(total + shift(total, ...), ...)    the next global adapter, and what is merged for good

`encode` reads what a client has: its update, what it started from, and the round's public numbers.
So it can be computed where the data is, or by the server. What only the server knows (the
directions of the global adapter that a client of small rank was never sent) is the rule's `shift`.
It is linear in what was encoded, so it can be added to every update or once to their sum.

The server sees a rule's input only through that sum. So secure aggregation and central differential
privacy, which replace many updates by one sum, need to know no rule; and a server optimiser acts
on the sum, whatever the rule. `Encoded` says how each entry is summed: `factors` and `weights`
element by element, `products` as matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import Tensor

from fedlora.lowrank import Adapter, Deltas
from fedlora.methods.values import (
    Aggregate,
    Encoded,
    Prepared,
    RoundNumbers,
    ServerState,
    Start,
    Training,
)

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


def as_usual(options: Any) -> Training:
    """Both factors are trained and sent."""
    return Training()


def both_factors(round: int, seen: bool) -> str:
    """Both factors are sent down in every round."""
    return "AB"


def no_fixed_weight(options: Any) -> float | None:
    """Weights are the clients' shares."""
    return None


def not_followed(options: Any) -> bool:
    """Clients are sent the adapter anew in every round."""
    return False


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
        secure_sum: what of the clients' parameters `encode` gives, and a secure sum has to carry
            beside the weights: factors, products or both.
        initial: `(shapes, rank, fresh, given) -> (adapter, base_delta)`, the global model before
            round 1; `rank` is the largest client's, `given` an adapter to go on from (or empty).
        broadcast: `(state, rank, options) -> Prepared`, what a round sends, made once; `rank` is
            the largest client's.
        for_rank: `(prepared, rank, options) -> Prepared`, what of it clients of this rank are sent.
        client_init: `(adapter, leading, shapes, rank, fresh, options) -> Start`, what a client
            makes of it.
        encode: `(update, start, numbers, options) -> Encoded`, a pure function of what a client
            has, computed by it or by the server.
        finalize: `(total, state, rank, options) -> Aggregate`; `rank` is the largest client's.
        shift: `(encoded, state, options) -> Encoded`, what the server adds to an encoded update or
            to a sum of them, linear in it; None where nothing is to be added.
        sums_learnt: the products that `encode` gives are `M_k - M_k_start` itself, so that it need
            not be summed beside them to tell the aggregation error.
        training: `options -> Training`, what it asks of the local training.
        sent_down: `(round, seen) -> "AB", "A" or "B"`, the factors a client lacks at the beginning
            of a round; `seen`: it took part in the round before.
        followed: `options ->` whether clients keep the global adapter, whose leading directions are
            followed (`methods.tracking`), and are sent what the rounds have changed of it.
        fixed_weight: `options ->` a constant that replaces every p_k, or None.
        server_optimiser: whether a server learning rate or momentum has a meaning: not where
            `finalize` divides by a sum of weights of its own.
        server_momentum: whether a server momentum has a meaning: not where the factors that are
            trained, or the directions they belong to, are other ones in every round.
        feedback: where updates are compressed, how a client makes up for what rounding has lost:
            it adds it to its next update as a product (`encode` reads of an update nothing but
            `B A`, so that factors may be others of the same product), factor by factor (row i of A
            means the same in the next round), or not at all (neither holds).
        one_shot: whether it can combine adapters that were trained apart, without a shared start.
        plain_sum: of such adapters it makes `sum_k p_k dW_k` and nothing else, so that
            `fedlora.aggregate` need not ask `finalize` for what only a next round needs.
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
    broadcast: Callable[[ServerState, int, Any], Prepared]
    for_rank: Callable[[Prepared, int, Any], Prepared]
    client_init: Callable[[Deltas, Adapter, Shapes, int, Fresh, Any], Start]
    encode: Callable[[Adapter, Start, RoundNumbers, Any], Encoded]
    finalize: Callable[[Encoded, ServerState, int, Any], Aggregate]
    shift: Callable[[Encoded, ServerState, Any], Encoded] | None = None
    sums_learnt: bool = False
    training: Callable[[Any], Training] = as_usual
    sent_down: Callable[[int, bool], str] = both_factors
    followed: Callable[[Any], bool] = not_followed
    fixed_weight: Callable[[Any], float | None] = no_fixed_weight
    server_optimiser: bool = True
    server_momentum: bool = True
    feedback: Literal["product", "factors", "none"] = "factors"
    one_shot: bool = True
    plain_sum: bool = False
    options: type[Any] = NoOptions
