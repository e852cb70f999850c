"""Defines what a merge of adapters is: a function of their cores in the space that they span.

A merge combines adapters on the disk and is no rule of a federation: it is no function of the sum
of what clients send, and needs all updates side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora.methods.rule import NoOptions, bounded


@dataclass(frozen=True)
class Cores:
    """One module's updates in their common space (`lowrank.common_space`).

    Args:
        values: `(K, p, q)` in float64, a core for each adapter; zero where one lacks the module.
        weights: `(K,)` in float64.
        normalised: the weights are shares; else they are as the user gave them.
        shape: `(m, n)` of the module.
        module: its name.
        places: which adapter each core is of, counted from 0.
    """

    values: Tensor
    weights: Tensor
    normalised: bool
    shape: tuple[int, int]
    module: str
    places: tuple[int, ...]

    @property
    def weighted(self) -> Tensor:
        """`w_k C_k`, `(K, p, q)`."""
        return self.values * self.weights[:, None, None]


@dataclass(frozen=True)
class Merge:
    """One way to merge adapters beyond sums.

    Args:
        name: what `--method` says.
        title: one line on what it does.
        paper: the source.
        same_as_dense: whether the result is that of the whole matrices; else it depends on the
            basis in which it is computed.
        combine: `(cores, options) -> (p, q)`, the merged core.
        adds_up: the paper adds updates up instead of averaging them, so that weights are normalised
            to a mean of 1 instead of a sum of 1.
        options: a frozen dataclass, `bounded` as a rule's options are.
    """

    name: str
    title: str
    paper: str
    same_as_dense: bool
    combine: Callable[[Cores, Any], Tensor]
    adds_up: bool = False
    options: type[Any] = NoOptions


def density_option(default: float) -> Any:
    """The field `density`: the share of a core's numbers that is kept."""
    return bounded(default, gt=0, le=1)


def largest(cores: Tensor, density: float) -> Tensor:
    """Every core with its largest numbers alone, at least one; the others become zero.

    Args:
        cores: `(K, p, q)`.
        density: the share of the `p q` numbers that stays, rounded down.
    """
    flat = cores.flatten(1)
    if flat.shape[1] == 0:
        return cores
    keep = max(1, int(density * flat.shape[1]))
    places = flat.abs().topk(keep, dim=1).indices
    mask = torch.zeros_like(flat).scatter_(1, places, 1.0)
    return (flat * mask).view_as(cores)
