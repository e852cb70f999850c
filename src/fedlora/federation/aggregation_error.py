"""Measures how far the global model's change is from the clients' weighted sum.

The change of a module and what it should be are kept as terms, updates with a sign, whose sum is
never formed. Their norms are computed in one of three ways: from matrices some rows at a time, from
the Gram matrices of short factors, or, where those would cost as much as the round itself, from
random probes.

Of a global update that is kept by appending (`methods.tracking`), the terms are what was appended,
so that their cost does not grow with the rounds. That the update has changed by just these terms is
checked on four random vectors Z: `S' Z - S Z - dS Z` counts as missed.
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
    concat,
    inner,
    merge_equal_rows,
    scale,
    wide,
)
from fedlora.methods.tracking import known_part
from fedlora.methods.values import ServerState
from fedlora.threads import map_modules

MEASURED_RANK = 256
"""Directions of a module, those of all its terms together, up to which norms are exact."""
_PROBES, _PROBE_BLOCK, _ROW_BLOCK = 64, 64, 1 << 18
_CHECKS, _CHECKED_ROWS = 4, 256  # probes and rows of a module that is kept by appending


class Norms(NamedTuple):
    """Frobenius norms of a change, or their squares.

    Args:
        size: `||dG||`, of the change itself.
        wanted: `||sum_k p_k (M_k - M_k_start)||`, of what it should be.
        missed: `||dG - sum_k p_k (M_k - M_k_start)||`.
    """

    size: float
    wanted: float
    missed: float

    @classmethod
    def of_squares(cls, squares: Sequence[Norms]) -> Norms:
        """The norms over several modules, from the squares of theirs."""
        return cls(*(math.sqrt(max(sum(column), 0.0)) for column in zip(*squares, strict=True)))


class Change(NamedTuple):
    """How the global model has changed in a round.

    Args:
        total: over all modules.
        modules: target module -> its own norms.
    """

    total: Norms
    modules: Mapping[str, Norms]


class _Term(NamedTuple):
    """`sign * update`."""

    update: Delta
    sign: float


def measure_change(before: ServerState, after: ServerState, wanted: Deltas) -> Change:
    """How the global model has changed, and how it was to; module by module, none held longer.

    Matrices, and factors of up to 256 directions in all, are measured exactly. Norms of longer
    factors are estimated by 64 random directions, the same in every call: within 10% for a single
    module, 1-2% over many.

    Args:
        before: the state before a round.
        after: the state after it.
        wanted: `sum_k p_k (M_k - M_k_start)`; a module without an entry was not to change.
    """

    def squares(name: str) -> Norms:
        aim = [_Term(wanted[name], 1.0)] if name in wanted else []
        appended = _appended(before, after, name)
        if appended is None:
            return _squares(_change(before, after, name), aim)
        norms = _squares([*_merged(before, after, name), *appended], aim)
        slip = _slip(before.adapter[name], after.adapter[name], appended, after.round)
        return norms._replace(missed=norms.missed + slip)

    names = dict.fromkeys([*after.base_delta, *after.adapter])
    modules = map_modules(squares, {name: name for name in names})
    return Change(
        Norms.of_squares([*modules.values(), Norms(0.0, 0.0, 0.0)]),
        {name: Norms.of_squares([x]) for name, x in modules.items()},
    )


def _change(before: ServerState, after: ServerState, name: str) -> list[_Term]:
    """Terms that add up to the change of one module, `base_delta + adapter`."""
    terms = _merged(before, after, name)
    old, new = before.adapter.get(name), after.adapter.get(name)
    terms += [_Term(old, -1.0)] if old is not None else []
    terms += [_Term(new, 1.0)] if new is not None else []
    return _without_opposites(terms)


def _appended(before: ServerState, after: ServerState, name: str) -> list[_Term] | None:
    """Terms that one module's adapter has changed by; None where it was not kept by appending."""
    change = after.changes.get(after.round)
    increment = None if change is None else change.increments.get(name)
    if increment is None or name not in before.leading:
        return None
    known = known_part(increment.weights, before.leading[name])
    return [_Term(x, 1.0) for x in (increment.stack, known) if x.rank]


def _slip(old: Delta, new: Delta, terms: Sequence[_Term], number: int) -> float:
    """An estimate of `||new - old - sum of the terms||^2`, from four random vectors.

    At most some hundred rows of the products are looked at, other ones in every round, so that the
    check costs no pass over a matrix.

    Args:
        old: the update before a round.
        new: the update after it.
        terms: what it is said to have changed by.
        number: of the round.
    """
    if old is new and not terms:
        return 0.0
    m, n = old.shape
    step = max(1, m // _CHECKED_ROWS)
    rows = slice(number % step, None, step)
    vectors = _probes(n)[:, :_CHECKS]
    gap = _times(new, vectors, rows) - _times(old, vectors, rows)
    for x, sign in terms:
        gap = gap - sign * _times(x, vectors, rows)
    return _square(gap) / gap.numel() * m


def _times(x: Delta, vectors: Tensor, rows: slice) -> Tensor:
    """These rows of `dW Z`, in the dtype of dW."""
    if isinstance(x, Dense):
        w = wide(x.W[rows])
        return w @ vectors.to(w)
    a = wide(x.A)
    return wide(x.B[rows]) @ (a @ vectors.to(a))


def _merged(before: ServerState, after: ServerState, name: str) -> list[_Term]:
    """Terms that add up to the change of one module's `base_delta`."""
    merge, old = after.last_merge.get(name), before.base_delta.get(name)
    if merge is None:
        return []
    new = after.base_delta[name]
    if isinstance(new, LowRank):  # the merged factors were appended to those that were there
        return [_Term(merge, 1.0)]
    return [*([_Term(old, -1.0)] if old is not None else []), _Term(new, 1.0)]


def _without_opposites(terms: Sequence[_Term]) -> list[_Term]:
    """The terms less pairs of one and the same update with either sign, which add up to nothing.

    A module that nobody trained keeps its very update, and FLoRA merges the very sum that was
    wanted. Such pairs are known by being one object; comparing their numbers would cost more.
    """
    return [
        term
        for term in terms
        if not any(term.update is x.update and term.sign == -x.sign for x in terms)
    ]


def _squares(change: list[_Term], aim: list[_Term]) -> Norms:
    """The squares of one module's norms."""
    gap = _without_opposites([*change, *(_Term(x, -sign) for x, sign in aim)])
    terms = [*change, *aim]
    if any(isinstance(x, Dense) for x, _ in terms):
        return _squares_by_rows(change, aim)
    if sum(x.rank for x, _ in terms) > MEASURED_RANK:
        return _squares_by_probes(change, aim, gap)
    return Norms(_square_by_gram(change), _square_by_gram(aim), _square_by_gram(gap))


def _square_by_gram(terms: list[_Term]) -> float:
    """`||sum of the terms||^2`, of factors, from their r x r Gram matrices."""
    factors = [x for x in (scale(x, sign) for x, sign in terms) if isinstance(x, LowRank)]
    if not factors:
        return 0.0
    total = merge_equal_rows(concat(factors))
    return inner(total, total)


def _squares_by_probes(change: list[_Term], aim: list[_Term], gap: list[_Term]) -> Norms:
    """Estimates from `||dW||^2 ~ ||dW G||^2 / 64`, with standard normal numbers in G `(n, 64)`."""
    aimed = _times_probes(aim)
    size = _times_probes(change) if gap else aimed
    return Norms(*(float(x.square().sum()) / _PROBES for x in (size, aimed, size - aimed)))


@lru_cache(maxsize=4)
def _probes(n: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(n, _PROBES, generator=draw, dtype=torch.float64)


def _times_probes(terms: list[_Term]) -> Tensor:
    """`dW G` in float64; some directions at a time, so that no factor is copied as a whole."""
    total = torch.zeros((), dtype=torch.float64)
    for x, sign in terms:
        assert isinstance(x, LowRank)
        probes = _probes(x.shape[1]).to(x.A.device)
        for begin in range(0, x.rank, _PROBE_BLOCK):
            part = slice(begin, begin + _PROBE_BLOCK)
            inside = sign * (x.A[part].double() @ probes)  # (j, 64)
            total = total.to(inside.device) + x.B[:, part].double() @ inside
    return total


def _squares_by_rows(change: list[_Term], aim: list[_Term]) -> Norms:
    """The squares from matrices, some rows at a time: no other matrix of this size is made."""
    m, n = (change or aim)[0].update.shape
    step = max(1, _ROW_BLOCK // n)
    size = aimed = missed = 0.0
    for begin in range(0, m, step):
        rows = slice(begin, begin + step)
        made, ideal = _rows(change, rows), _rows(aim, rows)
        size += _square(made)
        aimed += _square(ideal)
        missed += _square(made - ideal)
    return Norms(size, aimed, missed)


def _rows(terms: list[_Term], rows: slice) -> Tensor:
    """These rows of the sum; a zero where there are no terms."""
    total = torch.zeros(())
    for x, sign in terms:
        part = wide(x.W[rows]) if isinstance(x, Dense) else wide(x.B[rows]) @ wide(x.A)
        total = torch.add(total.to(part.device), part, alpha=sign)
    return total


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
