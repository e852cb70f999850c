"""Sums weighted updates one at a time, takes the server's step, and measures what became of it.

Memory is that of the sum: factors are collected while they are the smaller form, from then on every
term is added to one matrix in place. No term is held after it was folded into a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora.lowrank import (
    Delta,
    Deltas,
    Dense,
    LowRank,
    add_all,
    compact,
    scale,
    scale_all,
    stacked,
    wide,
)
from fedlora.methods.values import Encoded
from fedlora.threads import each

DENSE = "dense/"
"""Marks dense parameters among the factors of a sum: they are averaged like them, by every rule."""


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


_EXACT, _PROBES, _BLOCK, _CHUNK = 256, 64, 64, 1 << 18
