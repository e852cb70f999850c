"""Adds, compares and shortens low-rank updates of a weight matrix.

A LoRA adapter changes a weight `W (m x n)` by `dW = B @ A` with `B (m, r)` and `A (r, n)`; here the
LoRA scaling is already folded into `B`. Sums, norms and truncations of such updates never need the
`m x n` matrix: a sum is a concatenation, a norm is a trace of r x r Gram matrices, and the singular
value decomposition of a long concatenation is that of a small core between two QR factors.

A sum of many updates can need more numbers as factors, `r (m + n)`, than as a matrix, `m n`. From
there on it is held as a `Dense` matrix; every function here takes either.

Arithmetic is done in float32 or better: half precision inputs are widened, float64 stays float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.threads import one_thread


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
    """`dW` as it is: for updates whose factors would be larger than the matrix.

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
    """`dW = 0` of shape `(m, n)` as float32 factors of this rank; of none, unless one is given."""
    m, n = shape
    return LowRank(torch.zeros(rank, n), torch.zeros(m, rank))


def to_dense(x: Delta) -> Tensor:
    """The matrix `dW (m, n)`."""
    return wide(x.W) if isinstance(x, Dense) else wide(x.B) @ wide(x.A)


def scale(x: Delta, factor: float) -> Delta:
    """`factor * dW`. The factor goes into `B`, where the LoRA scaling already is."""
    if isinstance(x, Dense):
        return Dense(wide(x.W) * factor)
    return LowRank(wide(x.A), wide(x.B) * factor)


def add(terms: Sequence[Delta]) -> Delta:
    """`sum_i dW_i`, exactly: `[B_1 | B_2 | ...] [A_1; A_2; ...]`, or dense where that is smaller.

    Args:
        terms: at least one update, all of shape `(m, n)`; none is changed.

    Raises:
        ValueError: no terms, or terms of different shapes.
    """
    if not terms:
        raise ValueError("add needs at least one update")
    m, n = terms[0].shape
    for term in terms:
        if term.shape != (m, n):
            raise ValueError(f"cannot add updates of shapes {(m, n)} and {term.shape}")
    factors = [t for t in terms if isinstance(t, LowRank)]
    if len(factors) == len(terms) and sum(t.rank for t in factors) * (m + n) <= m * n:
        return concat(factors)
    held = [t.W if isinstance(t, Dense) else t.B for t in terms]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in held) else torch.float32
    total = to_dense(terms[0]).to(dtype, copy=True)
    for term in terms[1:]:
        if isinstance(term, Dense):
            total += term.W
        else:
            total.addmm_(term.B.to(dtype), term.A.to(dtype))
    return Dense(total)


def concat(terms: Sequence[LowRank]) -> LowRank:
    """`sum_i dW_i` as factors whatever their size, `[B_1 | B_2 | ...] [A_1; A_2; ...]`.

    Args:
        terms: at least one update, all of shape `(m, n)`.
    """
    if len(terms) == 1:
        return terms[0]
    return LowRank(
        torch.cat([wide(t.A) for t in terms], dim=0),
        torch.cat([wide(t.B) for t in terms], dim=1),
    )


def subtract(x: Delta, y: Delta) -> Delta:
    """`dW_x - dW_y`."""
    return add([x, scale(y, -1.0)])


def inner(x: Delta, y: Delta) -> float:
    """The Frobenius inner product `<dW_x, dW_y> = tr((B_x^T B_y) (A_y A_x^T))`, in float64.

    Raises:
        ValueError: different shapes.
    """
    if x.shape != y.shape:
        raise ValueError(f"no inner product of updates of shapes {x.shape} and {y.shape}")
    if isinstance(x, LowRank) and isinstance(y, LowRank):
        left = x.B.double().T @ y.B.double()  # (r_x, r_y)
        right = x.A.double() @ y.A.double().T  # (r_x, r_y)
        return float((left * right).sum())
    if isinstance(y, LowRank):
        x, y = y, x
    assert isinstance(y, Dense)
    if isinstance(x, LowRank):
        return float(((x.B.double().T @ y.W.double()) * x.A.double()).sum())
    return float((x.W.double() * y.W.double()).sum())


def norm(x: Delta) -> float:
    """The Frobenius norm `||dW||`, through r x r Gram matrices in float64.

    Absolute accuracy is about `1e-8 ||B|| ||A||`: float64 halves its digits under the root.
    """
    return math.sqrt(max(inner(x, x), 0.0))


def total_norm(deltas: Deltas) -> float:
    """`sqrt(sum_modules ||dW||^2)`, the Frobenius norm over all modules."""
    return math.sqrt(sum(max(inner(x, x), 0.0) for x in deltas.values()))


def refactor(x: Delta) -> LowRank:
    """The singular value decomposition of `dW`, as factors: `A = V^T`, `B = U diag(s)`.

    For factors: `B = Q_b R_b`, `A^T = Q_a R_a`, and the SVD of the r x r core `R_b R_a^T`. Exact up
    to rounding and never larger than r x r. The result has at most `min(m, n)` directions, the
    largest first; rows of `A` are orthonormal, so the norms of the columns of `B` are the singular
    values and the first j directions are the best approximation of rank j.
    """
    with one_thread():
        if isinstance(x, Dense):
            left, values, right = torch.linalg.svd(wide(x.W), full_matrices=False)
            return LowRank(right, left * values)
        if x.rank == 0:
            return LowRank(wide(x.A), wide(x.B))
        q_b, r_b = torch.linalg.qr(wide(x.B))  # (m, p), (p, r) with p = min(m, r)
        q_a, r_a = torch.linalg.qr(wide(x.A).T)  # (n, q), (q, r) with q = min(n, r)
        left, values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        return LowRank(right @ q_a.T, q_b @ (left * values))


def merge_equal_rows(x: LowRank) -> LowRank:
    """The same `dW` with equal rows of `A` held once, and without directions whose `B` is zero.

    `B[:, i] A[i] + B[:, j] A[j] = (B[:, i] + B[:, j]) A[i]` where `A[i] = A[j]`. The starts of a
    round are cut from one adapter and share its rows of `A`, so subtracting them changes the
    weights of directions that are there and adds none.

    Args:
        x: `A (r, n)`, `B (m, r)`; it is not changed.

    Returns:
        At most r directions in the order in which they first appear; `x` itself where no row
        repeats and no column of `B` is zero.
    """
    first = _first_with_equal_ends(x.A)
    repeated = [row for row, earlier in enumerate(first) if row != earlier]
    if repeated:
        earlier_rows = [first[row] for row in repeated]
        equal = (x.A[repeated] == x.A[earlier_rows]).all(dim=1).tolist()
        b = wide(x.B).clone()
        for row, earlier, is_equal in zip(repeated, earlier_rows, equal, strict=True):
            if is_equal:
                b[:, earlier] += b[:, row]
                b[:, row] = 0
        x = LowRank(wide(x.A), b)
    used = x.B.any(dim=0)
    return x if bool(used.all()) else LowRank(x.A[used], x.B[:, used])


def _first_with_equal_ends(a: Tensor) -> list[int]:
    """For every row the first one that begins and ends with the same 8 numbers.

    These are the candidates for equal rows: comparing all numbers of all pairs would take longer.
    """
    ends = torch.cat([a[:, :8], a[:, -8:]], dim=1).tolist()
    seen: dict[tuple[float, ...], int] = {}
    return [seen.setdefault(tuple(end), row) for row, end in enumerate(ends)]


def balance(x: LowRank) -> LowRank:
    """The same `B @ A` with every direction's weight shared evenly: `||A_i|| = ||B_i||`.

    Adam moves every entry by about its learning rate, so how a product is divided decides how far
    a step moves it. Directions that are zero stay as they are.
    """
    # Along contiguous rows, so that a direction's norm does not depend on how many there are.
    a, b = wide(x.A).norm(dim=1), wide(x.B).T.contiguous().norm(dim=1)  # (r,)
    ratio = torch.where((a > 0) & (b > 0), b / a.clamp_min(torch.finfo(a.dtype).tiny), 1.0).sqrt()
    return LowRank(wide(x.A) * ratio[:, None], wide(x.B) / ratio)


def cheaper_form(x: Delta) -> Delta:
    """The form of `dW` that holds fewer numbers: `Dense` where `r (m + n) > m n`, else as it is."""
    m, n = x.shape
    if isinstance(x, LowRank) and x.rank * (m + n) > m * n:
        return Dense(to_dense(x))
    return x


def drop_null_directions(x: Delta) -> Delta:
    """`dW` in its cheaper form; factors are refactored and lose directions that are zero.

    A direction counts as zero where its singular value is at most the largest one times the
    machine epsilon.
    """
    x = cheaper_form(x)
    if isinstance(x, Dense):
        return x
    exact = refactor(x)
    values = exact.B.norm(dim=0)
    if exact.rank == 0:
        return exact
    tiny = float(values[0]) * torch.finfo(values.dtype).eps
    return prefix(exact, int((values > tiny).sum()))


def prefix(x: LowRank, rank: int) -> LowRank:
    """The first `min(rank, r)` directions (views, not copies)."""
    return LowRank(x.A[:rank], x.B[:, :rank])


def suffix(x: LowRank, rank: int) -> LowRank:
    """All but the first `rank` directions (views, not copies)."""
    return LowRank(x.A[rank:], x.B[:, rank:])


_TOLERANCE, _SPARE, _SWEEPS = 1e-2, 32, 16


def leading(x: Delta, rank: int) -> LowRank:
    """The leading `min(rank, r)` directions of `dW`, as `prefix(refactor(x), rank)` gives them.

    Of a large dense `dW` they are found by subspace iteration from a random start, the same in
    every call, without a whole decomposition. It ends when

        ||dW^T U - V diag(s)||_F <= 0.01 ||s||

    over the directions wanted: `||dW V||_F` is then as large as that of the true ones to a part in
    a thousand. Single directions of a flat spectrum are not settled by that, nor need they be.
    Where it does not end, all of `dW` is decomposed.
    """
    block = rank + _SPARE
    if isinstance(x, LowRank) or 4 * block >= x.rank:
        return prefix(refactor(x), rank)
    matrix = wide(x.W)
    draw = torch.Generator().manual_seed(0)
    with one_thread():
        start = torch.randn(x.shape[1], block, generator=draw)
        right = torch.linalg.qr(start.to(matrix)).Q  # (n, block)
        for _ in range(_SWEEPS):
            basis, core = torch.linalg.qr(matrix @ right)
            turn, values, back = torch.linalg.svd(core)
            left = basis @ turn  # (m, block)
            image = matrix.T @ left  # (n, block)
            missed = image - right @ (back.T * values)
            if missed[:, :rank].norm() <= _TOLERANCE * values[:rank].norm():
                return prefix(refactor(LowRank(image.T, left)), rank)
            right = torch.linalg.qr(image).Q
    return prefix(refactor(x), rank)


def top(x: Delta, rank: int) -> LowRank:
    """The leading `min(rank, r)` directions of an update whose factors have the largest first.

    Args:
        x: dense, or factors in the form of `refactor`, of which the first are simply taken.
        rank: how many.
    """
    return prefix(x, rank) if isinstance(x, LowRank) else leading(x, rank)


def truncate(
    x: Delta, *, rank: int | None = None, energy: float | None = None
) -> tuple[LowRank, float]:
    """The best approximation of lower rank (Eckart-Young) and the relative error it caused.

    Args:
        x: the update.
        rank: keep this many singular directions.
        energy: keep the fewest directions whose squared singular values reach this share, in
            (0, 1], of the sum of squares.

    Returns:
        The leading directions in the form of `refactor`, and `||dW - kept|| / ||dW||` (0 for 0).

    Raises:
        ValueError: not exactly one of `rank` and `energy`, or one out of range.
    """
    if (rank is None) == (energy is None):
        raise ValueError("truncate needs either rank or energy")
    exact = refactor(x)
    squares = exact.B.double().square().sum(dim=0)  # (r,) squared singular values
    total = float(squares.sum())
    if rank is not None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        keep = min(rank, exact.rank)
    else:
        assert energy is not None
        if not 0.0 < energy <= 1.0:
            raise ValueError(f"energy must be in (0, 1], got {energy}")
        share = squares.cumsum(0) / total if total > 0 else torch.ones_like(squares)
        keep = exact.rank if energy == 1.0 else int((share < energy).sum()) + 1
        keep = min(keep, exact.rank)
    lost = float(squares[keep:].sum())
    return prefix(exact, keep), (lost / total) ** 0.5 if total > 0 else 0.0


def add_all(terms: Sequence[Deltas]) -> dict[str, Delta]:
    """Module by module `sum_i dW_i`, over every module that any term names."""
    names = dict.fromkeys(name for term in terms for name in term)
    return {name: add([term[name] for term in terms if name in term]) for name in names}


def scale_all(deltas: Deltas, factor: float) -> dict[str, Delta]:
    """Module by module `factor * dW`."""
    return {name: scale(x, factor) for name, x in deltas.items()}


def factor_bytes(deltas: Deltas, factors: str = "AB") -> int:
    """Bytes of the named factors of all updates; a dense update counts whole."""
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
    """LoRA's trained `A (r, n)`, `B (m, r)` as an update: `dW = s B A`. Copies, in float32."""
    return LowRank(a.detach().float().clone(), b.detach().float() * scale)


def unfold(x: LowRank, scale: float) -> tuple[Tensor, Tensor]:
    """An update as the `A`, `B` that LoRA trains under scale s: `B / s`. Copies."""
    return x.A.detach().clone(), x.B.detach() / scale
