"""Adds, scales and compares low-rank updates without forming their matrices.

A sum is a concatenation of factors, and an inner product is a trace of r x r Gram matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.lowrank.updates import Delta, Deltas, Dense, LowRank, to_dense, wide


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
    dtypes = {(t.W if isinstance(t, Dense) else t.B).dtype for t in terms}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
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


def merge_equal_rows(x: LowRank) -> LowRank:
    """The same `dW` with equal rows of `A` held once, and without directions whose `B` is zero.

    Where `A[i] = A[j]`, `B[:, i] A[i] + B[:, j] A[j] = (B[:, i] + B[:, j]) A[i]`. This keeps sums
    small in a round: what clients start from is cut from one adapter and shares its rows of `A`, so
    that subtracting it changes the weights of directions that are there, and adds none.

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

    Only these pairs can be equal rows. Comparing all numbers of all pairs would take longer.
    """
    ends = torch.cat([a[:, :8], a[:, -8:]], dim=1).tolist()
    seen: dict[tuple[float, ...], int] = {}
    return [seen.setdefault(tuple(end), row) for row, end in enumerate(ends)]


def balance(x: LowRank) -> LowRank:
    """The same `B @ A` with `||A_i|| = ||B_i||` in every direction i.

    Adam moves every number by about its learning rate, so that the norms of both factors decide how
    far a step moves their product. Directions that are zero stay as they are.
    """
    # Norms are taken along contiguous rows: so the last digits of a direction's norm do not depend
    # on how many other directions there are.
    a, b = wide(x.A).norm(dim=1), wide(x.B).T.contiguous().norm(dim=1)  # (r,)
    ratio = torch.where((a > 0) & (b > 0), b / a.clamp_min(torch.finfo(a.dtype).tiny), 1.0).sqrt()
    return LowRank(wide(x.A) * ratio[:, None], wide(x.B) / ratio)


def add_all(terms: Sequence[Deltas]) -> dict[str, Delta]:
    """`sum_i dW_i` for every module that any term has; a module counts as zero in other terms."""
    names = dict.fromkeys(name for term in terms for name in term)
    return {name: add([term[name] for term in terms if name in term]) for name in names}


def scale_all(deltas: Deltas, factor: float) -> dict[str, Delta]:
    """`factor * dW` for every module."""
    return {name: scale(x, factor) for name, x in deltas.items()}
