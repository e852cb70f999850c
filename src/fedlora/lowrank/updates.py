"""Holds low-rank updates of a weight matrix, as factors or as the matrix itself.

An update that needs more numbers as factors, `r (m + n)`, than as a matrix, `m n`, is held as a
`Dense` matrix; every function of `fedlora.lowrank` takes either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """`dW = B @ A`, LoRA scaling already folded into `B`.

    Args:
        A: `(r, n)`, any floating dtype.
        B: `(m, r)`, the dtype and device of `A`.

    Raises:
        ValueError: the shapes do not fit together.
    """

    A: Tensor  # (r, n)
    B: Tensor  # (m, r)

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ValueError(
                f"low-rank factors do not fit: A is {tuple(self.A.shape)}, B is "
                f"{tuple(self.B.shape)}; expected A (r, n) and B (m, r)"
            )

    @property
    def rank(self) -> int:
        """The number of columns of `B`: an upper bound of the rank of `B @ A`."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`, the shape of `B @ A`."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes both factors occupy."""
        return self.A.nbytes + self.B.nbytes


@dataclass(frozen=True)
class Dense:
    """`dW` as a matrix, for updates whose factors would be larger than that.

    Args:
        W: `(m, n)`, any floating dtype.
    """

    W: Tensor  # (m, n)

    @property
    def rank(self) -> int:
        """`min(m, n)`: an upper bound of the rank."""
        return min(self.W.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`."""
        return self.W.shape[0], self.W.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes the matrix occupies."""
        return self.W.nbytes


Delta = LowRank | Dense
"""An update of one target module, in whichever form is smaller."""


Adapter = Mapping[str, LowRank]
"""Target module name -> its update, always as factors."""


Deltas = Mapping[str, Delta]
"""Target module name -> its update, in either form."""


def wide(value: Tensor) -> Tensor:
    """The tensor in float32 or better: half precision is widened, float64 stays float64."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def zeros(shape: tuple[int, int], rank: int = 0) -> LowRank:
    """`dW = 0` of shape `(m, n)` as float32 factors of this rank, all zero."""
    m, n = shape
    return LowRank(torch.zeros(rank, n), torch.zeros(m, rank))


def to_dense(x: Delta) -> Tensor:
    """The matrix `dW (m, n)`."""
    return wide(x.W) if isinstance(x, Dense) else wide(x.B) @ wide(x.A)


def cheaper_form(x: Delta) -> Delta:
    """The form of `dW` that holds fewer numbers: `Dense` where `r (m + n) > m n`, else as it is."""
    m, n = x.shape
    if isinstance(x, LowRank) and x.rank * (m + n) > m * n:
        return Dense(to_dense(x))
    return x


def prefix(x: LowRank, rank: int) -> LowRank:
    """The first `min(rank, r)` directions (views, not copies)."""
    return LowRank(x.A[:rank], x.B[:, :rank])


def suffix(x: LowRank, rank: int) -> LowRank:
    """All but the first `rank` directions (views, not copies)."""
    return LowRank(x.A[rank:], x.B[:, rank:])


def factor_bytes(deltas: Deltas, factors: str = "AB") -> int:
    """Bytes of the named factors (`"A"`, `"B"`, `"AB"`) of all updates; dense ones count whole."""
    total = 0
    for x in deltas.values():
        if isinstance(x, LowRank):
            total += x.A.nbytes * ("A" in factors) + x.B.nbytes * ("B" in factors)
        else:
            total += x.nbytes
    return total


def nbytes(deltas: Deltas) -> int:
    """Bytes of all updates together."""
    return sum(x.nbytes for x in deltas.values())


def scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    """LoRA's scale `s`: `alpha / r`, or `alpha / sqrt(r)` for rsLoRA (arXiv 2312.03732)."""
    return alpha / (rank**0.5 if use_rslora else rank)


def fold(a: Tensor, b: Tensor, scale: float) -> LowRank:
    """LoRA's trained `A (r, n)`, `B (m, r)` under scale s as an update `dW = s B A`.

    The factors are copied, in float32.
    """
    return LowRank(a.detach().float().clone(), b.detach().float() * scale)


def unfold(x: LowRank, scale: float) -> tuple[Tensor, Tensor]:
    """An update as the `A (r, n)`, `B (m, r)` that LoRA trains under scale s. Both are copies."""
    return x.A.detach().clone(), x.B.detach() / scale
