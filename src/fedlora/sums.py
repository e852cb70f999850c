"""Sums weighted updates one at a time, takes the server's step, and measures what became of it.

Memory is that of the sum: factors are collected while they are the smaller form, from then on every
term is added to one matrix in place. No term is held after it was folded into a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora.lowrank import (
    Delta,
    Deltas,
    Dense,
    LowRank,
    add_all,
    compact,
    each,
    inner,
    scale,
    scale_all,
    stacked,
)
from fedlora.state import Encoded, ServerState

DENSE = "dense/"
"""Marks dense parameters among the factors of a sum: they are averaged like them, by every rule."""


def wide(value: Tensor) -> Tensor:
    """At least float32."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


class Total:
    """`sum_k w_k dW_k` of one target module, `(m, n)`, in whichever form is smaller."""

    def __init__(self) -> None:
        self._factors: list[LowRank] = []
        self._rank = 0
        self._matrix: Tensor | None = None

    def add(self, term: Delta, weight: float) -> None:
        """Add `weight * dW`; `term` is not changed, its `A` may be held.

        Raises:
            ValueError: a shape other than that of the terms before.
        """
        held = self._matrix if self._matrix is not None else self._first()
        m, n = term.shape
        if held is not None and (m, n) != held.shape:
            raise ValueError(f"cannot add updates of shapes {tuple(held.shape)} and {(m, n)}")
        if self._matrix is None and isinstance(term, LowRank):
            if term.rank == 0 and self._factors:
                return
            self._factors.append(LowRank(wide(term.A), wide(term.B) * weight))
            self._rank += term.rank
            if self._rank * (m + n) > m * n:
                self._shrink(m * n)
            return
        if self._matrix is None:
            self._densify((m, n))
        self._add_to_matrix(term, weight)

    def value(self) -> Delta:
        """The sum of what was added; at least one term was."""
        if self._matrix is not None:
            return Dense(self._matrix)
        return self._gather()

    def _first(self) -> LowRank | None:
        return self._factors[0] if self._factors else None

    def _gather(self) -> LowRank:
        whole = stacked(self._factors)
        self._factors, self._rank = [whole], whole.rank
        return whole

    def _shrink(self, most: int) -> None:
        """Take equal directions together; where that is not enough, go over to a matrix."""
        whole = self._gather()
        if whole.rank * sum(whole.shape) > most:
            self._densify(whole.shape)

    def _densify(self, shape: tuple[int, int]) -> None:
        terms, self._factors, self._rank = self._factors, [], 0
        if terms:
            self._matrix = terms[0].B.new_zeros(shape)
            for term in terms:
                self._add_to_matrix(term, 1.0)

    def _add_to_matrix(self, term: Delta, weight: float) -> None:
        if isinstance(term, Dense):
            value = wide(term.W)
            if self._matrix is None:
                self._matrix = value * weight
                return
            self._matrix = _promoted(self._matrix, value)
            self._matrix.add_(value, alpha=weight)
            return
        assert self._matrix is not None
        b = wide(term.B)
        self._matrix = _promoted(self._matrix, b)
        self._matrix.addmm_(b.to(self._matrix), term.A.to(self._matrix), alpha=weight)


def _promoted(total: Tensor, term: Tensor) -> Tensor:
    return total.to(torch.promote_types(total.dtype, term.dtype))


class WeightedSum:
    """`sum_k w_k x_k` and `sum_k w_k`, folded one update at a time."""

    def __init__(self) -> None:
        self.factors: dict[str, Tensor] = {}
        self.products: dict[str, Total] = {}
        self.learnt: dict[str, Total] | None = {}
        self.weight = 0.0

    def fold(self, encoded: Encoded, learnt: Deltas | None, weight: float) -> None:
        """Add one update.

        Args:
            encoded: what the rule needs of it.
            learnt: `M_k - M_k_start`; None where `encoded.products` are just that.
            weight: `w_k > 0`.
        """
        for name, value in encoded.factors.items():
            if name in self.factors:
                total = self.factors[name] = _promoted(self.factors[name], value)
                total.add_(value, alpha=weight)
            else:
                self.factors[name] = value * weight
        _add_each(self.products, encoded.products, weight)
        if learnt is None:
            self.learnt = None
        elif self.learnt is not None:
            _add_each(self.learnt, learnt, weight)
        self.weight += weight

    def mean(self, fixed: bool = False) -> Encoded:
        """The sum over the weights that counted; a rule's fixed weights are not normalised.

        It takes the sum of the products out, and so can be asked for once.
        """
        whole = 1.0 / self.weight
        inverse = 1.0 if fixed else whole
        return Encoded(
            {
                name: value * (whole if name.startswith(DENSE) else inverse)
                for name, value in self.factors.items()
            },
            _mean(self.products, inverse),
        )

    def wanted(self, mean: Encoded, fixed: bool = False) -> Deltas:
        """`sum_k p_k (M_k - M_k_start)`, by which the global model should change."""
        if self.learnt is None:
            return mean.products
        return _mean(self.learnt, 1.0 if fixed else 1.0 / self.weight)


def _add_each(totals: dict[str, Total], terms: Deltas, weight: float) -> None:
    for name, term in terms.items():
        totals.setdefault(name, Total()).add(term, weight)


def _mean(totals: dict[str, Total], inverse: float) -> dict[str, Delta]:
    """Every total times `inverse`; taken out one by one, so that none is held twice."""
    return {name: scale(totals.pop(name).value(), inverse) for name in list(totals)}


def step(total: Encoded, velocity: Encoded, rate: float, momentum: float) -> tuple[Encoded, ...]:
    """`v = mu v + total`; returns what is applied, `eta v`, and `v`."""
    if momentum:
        factors = {name: momentum * value for name, value in velocity.factors.items()}
        for name, value in total.factors.items():
            factors[name] = value + factors[name] if name in factors else value
        products = add_all([total.products, scale_all(velocity.products, momentum)])
        total = velocity = Encoded(factors, each(compact, products))
    if rate != 1.0:
        factors = {name: rate * value for name, value in total.factors.items()}
        total = Encoded(factors, scale_all(total.products, rate))
    return total, velocity


# --- what became of the global model ---


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
_EXACT, _PROBES, _BLOCK, _CHUNK = 256, 64, 64, 1 << 18


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
