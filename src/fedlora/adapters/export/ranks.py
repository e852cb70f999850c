"""Measures what a smaller rank of an update costs, over all its modules together, and cuts it.

With the singular values `s_1 >= s_2 >= ...` of every module's update `dW`, the best approximation
of rank R in all modules is off by

    error(R)  = sqrt(sum_modules sum_{i > R} s_i^2 / sum_modules ||dW||_F^2)
    energy(R) = 1 - error(R)^2

They come from the r x r core between two QR factors (`lowrank.refactor`), in float64; no m x n
matrix is made where factors are smaller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.errors import InputError
from fedlora.lowrank import (
    Deltas,
    Dense,
    LowRank,
    balance,
    prefix,
    refactor,
    subtract,
    total_norm,
)

SMALLEST = 8
"""Where the table of ranks begins, unless the update itself has fewer directions."""


@dataclass(frozen=True)
class RankCost:
    """A line of the table: what the update is worth at one rank.

    Args:
        rank: the most directions of any module.
        error: `||dW - dW_R||_F / ||dW||_F` over all modules.
        energy: the share of the squared singular values that is kept.
        nbytes: of the adapter in float32, with what is trained whole.
    """

    rank: int
    error: float
    energy: float
    nbytes: int


@dataclass(frozen=True)
class Spectrum:
    """An update by its singular directions.

    Args:
        directions: module -> factors in the form of `refactor`, the largest direction first, in
            float64.
        squares: module -> squared singular values `(r,)`, in float64; what was dropped as
            numerically zero counts in `total` alone.
        total: `sum_modules ||dW||_F^2`.
    """

    directions: Mapping[str, LowRank]
    squares: Mapping[str, Tensor]
    total: float

    @property
    def rank(self) -> int:
        """The most directions of any module, at least 1: the rank at which nothing is lost."""
        return max([1, *(x.rank for x in self.directions.values())])

    def error(self, rank: int) -> float:
        """The relative error `||dW - dW_R||_F / ||dW||_F` over all modules; 0 for `dW = 0`."""
        if self.total == 0.0:
            return 0.0
        lost = sum(float(values[rank:].sum()) for values in self.squares.values())
        return math.sqrt(lost / self.total)

    def rank_for(self, energy: float) -> int:
        """The smallest rank, one for all modules, that keeps this share of the energy.

        Raises:
            InputError: the share is not above 0 and at most 1.
        """
        if not 0.0 < energy <= 1.0:
            raise InputError(f"--energy: {energy}: expected a share above 0 and at most 1")
        if energy == 1.0:
            return self.rank
        fitting = (r for r in range(1, self.rank) if 1.0 - self.error(r) ** 2 >= energy)
        return next(fitting, self.rank)

    def cost(self, rank: int, beside: int = 0, padded: bool = False) -> RankCost:
        """What a rank costs.

        Args:
            rank: R.
            beside: bytes of what is trained whole.
            padded: every module has rank R, if need be with rows of zeros.
        """
        sizes = [
            (rank if padded else max(1, min(rank, x.rank))) * sum(x.shape)
            for x in self.directions.values()
        ]
        error = self.error(rank)
        return RankCost(rank, error, 1.0 - error**2, 4 * sum(sizes) + beside)

    def cut(self, rank: int) -> dict[str, LowRank]:
        """Every module's best approximation of at most this rank, as float32 factors.

        Each direction's weight is shared evenly between its two factors, so that neither leaves the
        range of half precision, in which some programs hold them.
        """
        return {name: _float32(balance(prefix(x, rank))) for name, x in self.directions.items()}


def spectrum(deltas: Deltas) -> Spectrum:
    """The singular directions of every module's update.

    Directions whose singular value is at most float32's epsilon times the module's largest are
    rounding of the factors and are dropped.

    Args:
        deltas: module -> its update `(m, n)`, in either form.
    """
    directions, squares, total = dict[str, LowRank](), dict[str, Tensor](), 0.0
    for name, x in deltas.items():
        exact = refactor(_float64(x))
        values = exact.B.square().sum(dim=0)  # (r,)
        total += float(values.sum())
        keep = int((values.sqrt() > torch.finfo(torch.float32).eps * _largest(values)).sum())
        directions[name], squares[name] = prefix(exact, keep), values[:keep]
    return Spectrum(directions, squares, total)


def _float64(x: LowRank | Dense) -> LowRank | Dense:
    return Dense(x.W.double()) if isinstance(x, Dense) else LowRank(x.A.double(), x.B.double())


def _float32(x: LowRank) -> LowRank:
    return LowRank(x.A.float(), x.B.float())


def _largest(squares: Tensor) -> float:
    """The largest singular value; 0 where there is none."""
    return math.sqrt(float(squares[0])) if squares.numel() else 0.0


def pad(x: LowRank, rank: int) -> LowRank:
    """The same `dW` as factors of exactly this rank, with rows and columns of zeros at the end.

    Args:
        x: `A (r, n)`, `B (m, r)`.
        rank: at least r; it may be more than `min(m, n)`.

    Raises:
        ValueError: the rank is below r.
    """
    missing = rank - x.rank
    if missing < 0:
        raise ValueError(f"cannot pad factors of rank {x.rank} to rank {rank}")
    (m, n), empty = x.shape, x.A.new_zeros
    return LowRank(torch.cat([x.A, empty(missing, n)]), torch.cat([x.B, empty(m, missing)], dim=1))


def ranks_to_show(full: int, others: Sequence[int] = ()) -> list[int]:
    """The ranks of the table: powers of two from 8 on (from 1 where there are no more), then all.

    Args:
        full: the rank at which nothing is lost.
        others: ranks that are asked for; those beyond `full` lose nothing either and are left out.
    """
    begin = SMALLEST if full > SMALLEST else 1
    powers = {begin << i for i in range(full.bit_length()) if begin << i < full}
    return [*sorted(powers | {rank for rank in others if 0 < rank < full}), full]


def relative_distance(one: Deltas, other: Deltas) -> float:
    """`||one - other||_F / ||other||_F` over all modules, through Gram matrices in float64.

    It is accurate to about 1e-8, as `lowrank.norm` is.

    Raises:
        ValueError: they have other modules.
    """
    if one.keys() != other.keys():
        raise ValueError("updates of different modules")
    lost = total_norm({name: subtract(x, other[name]) for name, x in one.items()})
    size = total_norm(other)
    return lost / size if size else lost
