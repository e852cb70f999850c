"""Decomposes low-rank updates into singular directions, and shortens them to the leading ones.

The singular value decomposition of a long concatenation of factors is that of a small r x r core
between two QR factors.
"""

from __future__ import annotations

import torch

from fedlora.lowrank.updates import Delta, Dense, LowRank, cheaper_form, prefix, wide
from fedlora.threads import one_thread


def refactor(x: Delta) -> LowRank:
    """The singular value decomposition of `dW`, as factors: `A = V^T`, `B = U diag(s)`.

    Of factors it is computed by `B = Q_b R_b`, `A^T = Q_a R_a` and the SVD of the core
    `R_b R_a^T`, which is r x r at most; the m x n matrix is never formed.

    Args:
        x: the update, of shape `(m, n)`.

    Returns:
        At most `min(m, n)` directions in float32 or better, the largest first. Rows of `A` are
        orthonormal; so the norms of the columns of `B` are the singular values, and the first j
        directions are the best approximation of rank j.
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


def drop_null_directions(x: Delta) -> Delta:
    """The same `dW` in its cheaper form, factors without the directions that are zero.

    Factors come in the form of `refactor`. A direction counts as zero if its singular value is at
    most the largest one times the machine epsilon.
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


_TOLERANCE = 1e-2
"""How far from singular directions `leading` may end: the residual over the singular values."""
_SPARE = 32
"""Directions iterated beyond those wanted: the more, the faster these converge."""
_SWEEPS = 16
"""Iterations after which `leading` gives up and decomposes the whole matrix."""


def leading(x: Delta, rank: int) -> LowRank:
    """The leading `min(rank, r)` directions of `dW`, in the form of `refactor`.

    Those of factors and of small matrices are exact. Those of a large dense `dW` are found without
    a whole decomposition, by subspace iteration from a random start that is the same in every call.
    It ends when

        ||dW^T U - V diag(s)||_F <= 0.01 ||s||

    over the directions wanted. `||dW V||_F` is then as large as that of the true directions to a
    part in a thousand. Where singular values lie close together, single directions may still be
    mixtures of the true ones, but what they hold together is the same. If the iteration does not
    end in 16 sweeps, all of `dW` is decomposed.

    Args:
        x: the update, of shape `(m, n)`.
        rank: how many directions.
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
    """The leading `min(rank, r)` directions of an update whose factors are in order already.

    Args:
        x: dense, or factors in the form of `refactor`, of which the first are simply taken.
        rank: how many directions.
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
