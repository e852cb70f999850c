"""Measures how far the global model's change is from the clients' weighted sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora.federation.aggregators.mean import _BLOCK, _CHUNK, _EXACT, _PROBES
from fedlora.lowrank import (
    Delta,
    Deltas,
    Dense,
    LowRank,
    inner,
    scale,
    stacked,
    wide,
)
from fedlora.methods.values import ServerState
from fedlora.threads import each


class Moved(NamedTuple):
    """Frobenius norms over all modules, with dG the change of the global model.

    Args:
        size: `||dG||`.
        wanted: `||sum_k p_k (M_k - M_k_start)||`.
        missed: `||dG - sum_k p_k (M_k - M_k_start)||`.
        modules: the same three of every module.
    """

    size: float
    wanted: float
    missed: float
    modules: Mapping[str, tuple[float, float, float]]


def moved(before: ServerState, after: ServerState, wanted: Deltas) -> Moved:
    """How the global model has moved, and how it was to; module by module, none held longer.

    Matrices, and factors of up to 256 directions in all, are measured exactly. Of longer factors,
    whose Gram matrices would cost as much as the round itself, the norms are estimated by 64 random
    directions, the same in every call: within 10% for a single module, 1-2% over many.
    """

    def squares(name: str) -> tuple[float, float, float]:
        aim: _Terms = [(wanted[name], 1.0)] if name in wanted else []
        return _squares(_change(before, after, name), aim)

    names = dict.fromkeys([*after.base_delta, *after.adapter])
    found = each(squares, {name: name for name in names})
    size, aimed, missed = (_root(sum(x[i] for x in found.values())) for i in range(3))
    modules = {n: (_root(x[0]), _root(x[1]), _root(x[2])) for n, x in found.items()}
    return Moved(size, aimed, missed, modules)


def _root(square: float) -> float:
    return math.sqrt(max(square, 0.0))


_Terms = Sequence[tuple[Delta, float]]


def _change(before: ServerState, after: ServerState, name: str) -> _Terms:
    """Terms that add up to the change of one module."""
    old, new, merge = (x.get(name) for x in (before.base_delta, after.base_delta, after.last_merge))
    known = old.rank if old else 0
    if isinstance(merge, LowRank) and isinstance(new, LowRank) and new.rank == known + merge.rank:
        old, new = None, merge  # factors are appended to those that were there
    sides = [(old, -1.0), (before.adapter.get(name), -1.0)]
    sides += [(new, 1.0), (after.adapter.get(name), 1.0)]
    return _cancelled([(x, sign) for x, sign in sides if x is not None])


def _cancelled(terms: _Terms) -> _Terms:
    """The terms without those that stand there with either sign."""
    return [
        (x, sign) for x, sign in terms if not any(x is y and sign == -other for y, other in terms)
    ]


def _squares(change: _Terms, aim: _Terms) -> tuple[float, float, float]:
    """The squares of `Moved` for one module."""
    gap = _cancelled([*change, *((x, -sign) for x, sign in aim)])
    if any(isinstance(x, Dense) for x, _ in [*change, *aim]):
        return _squares_by_rows(change, aim)
    if sum(x.rank for x, _ in [*change, *aim]) > _EXACT:
        aimed = _image(aim)
        size = _image(change) if gap else aimed
        missed = size - aimed
        found = [float(x.square().sum()) / _PROBES for x in (size, aimed, missed)]
    else:
        found = [inner(x, x) if (x := _stack(part)) else 0.0 for part in (change, aim, gap)]
    return found[0], found[1], found[2]


def _stack(terms: _Terms) -> LowRank | None:
    factors = [scale(x, sign) for x, sign in terms]
    return stacked([x for x in factors if isinstance(x, LowRank)]) if factors else None


@lru_cache(maxsize=4)
def _probes(n: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(n, _PROBES, generator=draw, dtype=torch.float64)


def _image(terms: _Terms) -> Tensor:
    """`dW G` in float64, with standard normal numbers in G `(n, 64)`: `||dW||^2 ~ ||dW G||^2 / 64`.

    Some directions at a time, so that no factor is copied as a whole.
    """
    total = torch.zeros((), dtype=torch.float64)
    for x, sign in terms:
        assert isinstance(x, LowRank)
        probes = _probes(x.shape[1]).to(x.A.device)
        for begin in range(0, x.rank, _BLOCK):
            part = slice(begin, begin + _BLOCK)
            inside = sign * (x.A[part].double() @ probes)  # (64, j)
            total = total.to(inside.device) + x.B[:, part].double() @ inside
    return total


def _squares_by_rows(change: _Terms, aim: _Terms) -> tuple[float, float, float]:
    """The squares from matrices, some rows at a time: no other matrix of this size is made."""
    m, n = (change or aim)[0][0].shape
    step = max(1, _CHUNK // n)
    size = aimed = missed = 0.0
    for begin in range(0, m, step):
        rows = slice(begin, begin + step)
        made, ideal = _rows(change, rows), _rows(aim, rows)
        size += _square(made)
        aimed += _square(ideal)
        missed += _square(made - ideal)
    return size, aimed, missed


def _rows(terms: _Terms, rows: slice) -> Tensor:
    """These rows of the sum; a zero where there are no terms."""
    total = torch.zeros(())
    for x, sign in terms:
        part = wide(x.W[rows]) if isinstance(x, Dense) else wide(x.B[rows]) @ wide(x.A)
        total = torch.add(total.to(part.device), part, alpha=sign)
    return total


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
