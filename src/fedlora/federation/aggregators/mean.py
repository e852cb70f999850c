"""Sums weighted updates one at a time, and gives their weighted mean.

Memory is that of the sum: factors are collected while they are the cheaper form, from then on every
term is added to one matrix in place. No term is held after it was folded into a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlora.lowrank import Delta, Dense, LowRank, concat, merge_equal_rows, scale, wide
from fedlora.methods.values import DENSE, Encoded


class ProductSum:
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
        m, n = self._check_shape(term)
        if self._matrix is None and isinstance(term, LowRank):
            if term.rank == 0 and self._factors:
                return
            self._factors.append(LowRank(wide(term.A), wide(term.B) * weight))
            self._rank += term.rank
            if self._rank * (m + n) > m * n:
                self._use_less_memory(m * n)
            return
        if self._matrix is None:
            self._densify((m, n))
        self._add_to_matrix(term, weight)

    def value(self) -> Delta:
        """The sum of what was added; at least one term was."""
        return self._merged_factors() if self._matrix is None else Dense(self._matrix)

    def _check_shape(self, term: Delta) -> tuple[int, int]:
        held = self._matrix if self._matrix is not None else next(iter(self._factors), None)
        if held is not None and term.shape != tuple(held.shape):
            raise ValueError(f"cannot add updates of shapes {tuple(held.shape)} and {term.shape}")
        return term.shape

    def _merged_factors(self) -> LowRank:
        whole = merge_equal_rows(concat(self._factors))
        self._factors, self._rank = [whole], whole.rank
        return whole

    def _use_less_memory(self, most: int) -> None:
        """Hold equal directions once; where more than `most` numbers are left, go to a matrix."""
        whole = self._merged_factors()
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


class Mean:
    """The weighted mean of the updates, `sum_k w_k x_k / sum_k w_k`: an `Aggregator`."""

    is_mean = True

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget what was folded."""
        self.factors: dict[str, Tensor] = {}
        self.products: dict[str, ProductSum] = {}
        self.weights: dict[str, Tensor] = {}
        self.weight = 0.0

    def fold(self, encoded: Encoded, weight: float) -> None:
        """Add `weight` times an encoded update; `weight > 0`."""
        _add_tensors(self.factors, encoded.factors, weight)
        _add_tensors(self.weights, encoded.weights, weight)
        for name, term in encoded.products.items():
            self.products.setdefault(name, ProductSum()).add(term, weight)
        self.weight += weight

    def result(self, normalised: bool = True) -> Encoded:
        """The sum over the sum of the weights, or the sum itself; dense parameters as a mean.

        It takes the sum of the products out module by module, so that none is held twice, and can
        be asked for once.
        """
        mean = 1.0 / self.weight
        share = mean if normalised else 1.0
        return Encoded(
            factors={
                name: value * (mean if name.startswith(DENSE) else share)
                for name, value in self.factors.items()
            },
            products={
                name: scale(self.products.pop(name).value(), share) for name in list(self.products)
            },
            weights={name: value * share for name, value in self.weights.items()},
        )


def _add_tensors(sums: dict[str, Tensor], terms: Mapping[str, Tensor], weight: float) -> None:
    for name, value in terms.items():
        if name in sums:
            total = sums[name] = _promoted(sums[name], value)
            total.add_(value, alpha=weight)
        else:
            sums[name] = value * weight
