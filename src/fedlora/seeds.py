"""Draws every random number of a run from a stream that is named after its purpose.

A draw depends on `(seed, round, client, purpose)` and on nothing else: not on the order in which
clients are trained, not on how often a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a stream of random numbers is for. Values are part of a run's identity: only append."""

    SHARED_INIT = 0
    CLIENT_INIT = 1
    SAMPLING = 2
    RANKS = 3
    PARTITION = 4
    HOLDOUT = 5
    BATCHES = 6
    DROPOUT = 7
    EVALUATION = 8
    HEAD = 9
    TRAIN_ROWS = 10
    EVAL_ROWS = 11
    ORDER = 12


SERVER = 0
"""The client number of draws that belong to no client; their purposes are the server's own."""


def generator(seed: int, round: int, client: int, purpose: Purpose) -> np.random.Generator:
    """The stream of `(seed, round, client, purpose)`; all non-negative."""
    return np.random.default_rng([seed, round, client, int(purpose)])


def integer(seed: int, round: int, client: int, purpose: Purpose) -> int:
    """One 63-bit integer of that stream, to seed a library's own generator with."""
    return int(generator(seed, round, client, purpose).integers(2**63 - 1))


def fresh_factors(
    seed: int,
    round: int,
    client: int,
    purpose: Purpose,
    shapes: Mapping[str, tuple[int, int]],
) -> Callable[[str, int], Tensor]:
    """LoRA's initial `A`, for every module of `shapes`.

    Returns:
        A function of `(module, rank)` that gives `A (rank, n)` in float32, uniform within
        `+-1/sqrt(n)` (PEFT's default, `kaiming_uniform_` with `a = sqrt(5)`). A smaller rank of the
        same module gets the leading rows of a larger one.
    """
    index = {name: i for i, name in enumerate(sorted(shapes))}

    def draw(name: str, rank: int) -> Tensor:
        rng = np.random.default_rng([seed, round, client, int(purpose), index[name]])
        n = shapes[name][1]
        bound = n**-0.5
        values = rng.uniform(-bound, bound, size=(rank, n))
        return torch.from_numpy(values.astype(np.float32))

    return draw
