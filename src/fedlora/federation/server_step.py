"""Takes the server's step along what the clients' updates came to: learning rate and momentum."""

from __future__ import annotations

from dataclasses import replace

from fedlora.lowrank import add_all, drop_null_directions, scale_all
from fedlora.methods.values import Encoded
from fedlora.threads import map_modules


def step(
    total: Encoded, velocity: Encoded, rate: float, momentum: float
) -> tuple[Encoded, Encoded]:
    """`v' = mu v + total`, and what is applied, `eta v'` (FedAvgM, arXiv 1909.06335).

    Args:
        total: `sum_k p_k encode_k`, the rule's shift included.
        velocity: v, of the round before.
        rate: eta.
        momentum: mu; 0 keeps no velocity.

    Returns:
        `eta v'` and `v'`.
    """
    applied = total
    if momentum:
        factors = {name: momentum * value for name, value in velocity.factors.items()}
        for name, value in total.factors.items():
            factors[name] = value + factors[name] if name in factors else value
        products = add_all([total.products, scale_all(velocity.products, momentum)])
        velocity = Encoded(factors, map_modules(drop_null_directions, products))
        applied = velocity
    if rate != 1.0:
        applied = replace(
            applied,
            factors={name: rate * value for name, value in applied.factors.items()},
            products=scale_all(applied.products, rate),
        )
    return applied, velocity
