"""What rules keep and send, and how many numbers that is."""

from __future__ import annotations

from fedlora.methods import METHODS
from support.simulated import (
    SHAPES,
)

STEPPED = [name for name, rule in METHODS.items() if rule.server_optimiser]


WITH_MOMENTUM = [name for name in STEPPED if METHODS[name].server_momentum]


KEEPS_FACTORS = ["fedit", "zero_pad", "hetlora", "ffa", "rolora", "fedsa", "fedsvd", "lora_fair"]


# What travels up in odd and in even rounds.
SENDS = dict.fromkeys(METHODS, ("AB", "AB")) | {
    "ffa": ("B", "B"),
    "rolora": ("B", "A"),
    "fedsa": ("A", "A"),
    "fedsvd": ("B", "B"),
}


def numbers(rank: int, factors: str) -> int:
    """How many numbers the factors of an adapter have."""
    return rank * sum(n * ("A" in factors) + m * ("B" in factors) for m, n in SHAPES.values())
