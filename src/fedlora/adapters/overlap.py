"""Measures how far adapters change the same directions of the same modules.

With the singular directions `dW_k = U_k S_k V_k^T` of a module, for adapters i and j:

    cosine          <dW_i, dW_j> / (||dW_i|| ||dW_j||)
    shared(i in j)  ||U_j U_j^T dW_i V_j V_j^T||^2 / ||dW_i||^2, i's energy within j's directions
    angles          arccos of the singular values of U_i^T U_j (out) and of V_i^T V_j (in)

Small angles and much shared energy say that adapters meet in the same directions; the cosine then
says whether they agree there. All of it is computed in the space that the updates span
(`lowrank.common_space`), in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from fedlora.adapters.base_fingerprint import compare_bases
from fedlora.adapters.bases import check_bases
from fedlora.adapters.common import common_shapes, with_common_names
from fedlora.adapters.saved_adapter import SavedAdapter
from fedlora.errors import InputError
from fedlora.lowrank import common_space, zeros
from fedlora.text import natural
from fedlora.threads import one_thread

_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Pair:
    """How two adapters overlap, in one module or over all.

    Args:
        first, second: which adapters, counted from 0.
        cosine: of their updates, from -1 to 1; None where one of them is zero.
        shared: share of the first's energy within the second's directions, and the other way round;
            None where an update is zero.
        angles_out: principal angles between their output directions in degrees, ascending; over
            all modules their mean alone.
        angles_in: between their input directions.
    """

    first: int
    second: int
    cosine: float | None
    shared: tuple[float | None, float | None]
    angles_out: tuple[float, ...]
    angles_in: tuple[float, ...]


@dataclass(frozen=True)
class LayerOverlap:
    """One module.

    Args:
        norms: `||dW||_F` in each adapter; None in those that do not have it.
        pairs: of every two adapters.
    """

    norms: tuple[float | None, ...]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Overlap:
    """How adapters overlap.

    Args:
        norms: `||dW||_F` of each adapter over all modules.
        pairs: of every two adapters, over all modules.
        layers: target module -> its overlap.
        notes: what the user should know.
        bases: how far the adapters' bases could be compared, in a sentence.
    """

    norms: tuple[float, ...]
    pairs: tuple[Pair, ...]
    layers: Mapping[str, LayerOverlap]
    notes: tuple[str, ...] = ()
    bases: str = ""


def overlap(adapters: Sequence[SavedAdapter], *, same_base: bool = False) -> Overlap:
    """Measure how adapters of one base model overlap; ranks and modules may differ.

    Args:
        adapters: at least two.
        same_base: bases that are named differently are the same.

    Raises:
        InputError: fewer than two adapters, or of different bases.
    """
    if len(adapters) < 2:
        raise InputError("overlap: needs at least two adapters")
    bases, notes = compare_bases(adapters, same_base)
    notes = [*check_bases([a.config for a in adapters], same_base), *notes]
    adapters = with_common_names(adapters)
    shapes = common_shapes(adapters)
    layers = dict[str, LayerOverlap]()
    sums = {pair: _Sums() for pair in combinations(range(len(adapters)), 2)}
    squares = [0.0] * len(adapters)
    for name in sorted(shapes, key=natural):
        space = common_space([a.deltas.get(name, zeros(shapes[name])) for a in adapters])
        directions = [_directions(core) for core in space.cores]
        sizes = [float(core.square().sum()) for core in space.cores]
        squares = [total + size for total, size in zip(squares, sizes, strict=True)]
        pairs = []
        for (i, j), total in sums.items():
            found = _Sums()
            found.add(space.cores, directions, sizes, i, j)
            total.merge(found)
            pairs.append(found.pair(i, j))
        norms = tuple(
            math.sqrt(size) if name in a.deltas else None
            for a, size in zip(adapters, sizes, strict=True)
        )
        layers[name] = LayerOverlap(norms, tuple(pairs))
    return Overlap(
        tuple(math.sqrt(x) for x in squares),
        tuple(total.pair(i, j, mean=True) for (i, j), total in sums.items()),
        layers,
        tuple(notes),
        bases,
    )


def _directions(core: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal output directions `(p, r)` and input directions `(q, r)` of a core `(p, q)`."""
    if 0 in core.shape or not bool(core.any()):
        return core.new_zeros(core.shape[0], 0), core.new_zeros(core.shape[1], 0)
    with one_thread():
        left, values, right = torch.linalg.svd(core, full_matrices=False)
    used = values > _EPS * values[0]
    return left[:, used], right[used].T


def _angles(one: Tensor, other: Tensor) -> tuple[float, ...]:
    """Principal angles between two spaces of orthonormal columns in degrees, ascending.

    Small ones are taken from their sines, which the cosines do not tell apart.
    """
    if 0 in (one.shape[1], other.shape[1]):
        return ()
    if one.shape[1] < other.shape[1]:
        one, other = other, one  # the smaller space is measured against the larger
    with one_thread():
        cosines = torch.linalg.svdvals(one.T @ other).clamp(max=1.0)
        sines = torch.linalg.svdvals(other - one @ (one.T @ other)).clamp(max=1.0).flip(0)
    radians = torch.where(cosines > 0.7, sines.arcsin(), cosines.arccos())
    return tuple(math.degrees(float(x)) for x in radians)


class _Sums:
    """What the numbers of a pair are made of; sums over modules are those of all of them."""

    def __init__(self) -> None:
        self.inner = 0.0
        self.squares, self.within = [0.0, 0.0], [0.0, 0.0]
        self.angles_out, self.angles_in = list[float](), list[float]()

    def add(
        self,
        cores: Tensor,
        directions: Sequence[tuple[Tensor, Tensor]],
        sizes: Sequence[float],
        i: int,
        j: int,
    ) -> None:
        """Add one module of adapters i and j."""
        self.inner += float((cores[i] * cores[j]).sum())
        for side, (own, other) in enumerate(((i, j), (j, i))):
            left, right = directions[other]
            self.squares[side] += sizes[own]
            self.within[side] += float((left.T @ cores[own] @ right).square().sum())
        self.angles_out += _angles(directions[i][0], directions[j][0])
        self.angles_in += _angles(directions[i][1], directions[j][1])

    def merge(self, other: _Sums) -> None:
        """Add another module's sums."""
        self.inner += other.inner
        for side in (0, 1):
            self.squares[side] += other.squares[side]
            self.within[side] += other.within[side]
        self.angles_out += other.angles_out
        self.angles_in += other.angles_in

    def pair(self, first: int, second: int, mean: bool = False) -> Pair:
        """The numbers themselves; with `mean`, of the angles their mean."""
        size = math.sqrt(self.squares[0] * self.squares[1])
        shares = [
            min(1.0, within / square) if square else None
            for within, square in zip(self.within, self.squares, strict=True)
        ]
        return Pair(
            first,
            second,
            self.inner / size if size else None,
            (shares[0], shares[1]),
            _mean(self.angles_out) if mean else tuple(self.angles_out),
            _mean(self.angles_in) if mean else tuple(self.angles_in),
        )


def _mean(angles: Sequence[float]) -> tuple[float, ...]:
    return (sum(angles) / len(angles),) if angles else ()
