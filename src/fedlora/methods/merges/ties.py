"""Trims updates, elects a sign for every number, and averages those that have it (TIES).

    T_k = C_k, all but the largest `density` of its numbers set to zero
    sign = sgn(sum_k w_k T_k)
    dC = sum_(k: sgn(w_k T_k) = sign) w_k T_k / sum_(k: sgn(w_k T_k) = sign) w_k

With weights as given (`raw_weights`) it is divided by how many agree instead, as in PEFT, so that a
weight scales, and a negative one takes part with the other sign.

Every module is trimmed by itself, as in PEFT and Core Space; the paper trims over a whole model.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, arXiv
2306.01708, whose default is to keep 20%.

In the common space this depends on the basis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.methods.merges.merge import Cores, Merge, density_option, largest
from fedlora.methods.rule import check_bounds


@dataclass(frozen=True)
class Options:
    """Keys of the merge.

    Args:
        density: the share of every core's numbers that is kept, the largest.
    """

    density: float = density_option(0.2)

    def __post_init__(self) -> None:
        check_bounds(self)


def _combine(cores: Cores, options: Options) -> Tensor:
    values = largest(cores.values, options.density) * cores.weights[:, None, None]
    elected = torch.where(values.sum(0) >= 0, 1.0, -1.0).to(values)
    agrees = values.sign() == elected
    counts = cores.weights if cores.normalised else torch.ones_like(cores.weights)
    total = (agrees * counts[:, None, None]).sum(0)
    return (values * agrees).sum(0) / torch.where(total > 0, total, 1.0)


MERGE = Merge(
    name="ties",
    title="trim, elect a sign for every number, average what has that sign",
    paper="Yadav et al., NeurIPS 2023, arXiv 2306.01708",
    same_as_dense=False,
    combine=_combine,
    options=Options,
)
