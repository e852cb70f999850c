"""Drops numbers of every update at random, rescales the others, and adds up (DARE).

    dC = sum_k w_k m_k C_k / density        m_k ~ Bernoulli(density), number by number

The mean over all draws is the weighted sum itself, in any basis; single draws depend on it.

Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free
Lunch", ICML 2024, arXiv 2311.03099. The paper searches drop rates from 0.1 to 0.9; its code drops
0.1 by default, so that the density is 0.9.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlora.methods.merges.merge import Cores, Merge, density_option
from fedlora.methods.rule import bounded, check_bounds


@dataclass(frozen=True)
class Options:
    """Keys of the merge.

    Args:
        density: the share of numbers that stays, on average: 1 less the paper's drop rate.
        seed: of the draws; every adapter and module has a stream of its own.
    """

    density: float = density_option(0.9)
    seed: int = bounded(0, ge=0)

    def __post_init__(self) -> None:
        check_bounds(self)


def kept(shape: tuple[int, ...], options: Options, place: int, module: str) -> Tensor:
    """Which numbers of one adapter's core `(p, q)` stay, as ones and zeros in float64."""
    draw = np.random.default_rng([options.seed, place, zlib.crc32(module.encode())])
    return torch.from_numpy((draw.random(shape) < options.density).astype(np.float64))


def _combine(cores: Cores, options: Options) -> Tensor:
    shape = tuple(cores.values.shape[1:])
    masks = torch.stack([kept(shape, options, place, cores.module) for place in cores.places])
    return (cores.weighted * masks.to(cores.values)).sum(0) / options.density


MERGE = Merge(
    name="dare",
    title="drop numbers at random, rescale the others, add up",
    paper="Yu et al., ICML 2024, arXiv 2311.03099",
    same_as_dense=False,
    combine=_combine,
    options=Options,
)
