"""Keeps the largest numbers of every update and adds up.

    dC = sum_k w_k T_k        T_k = C_k, all but the largest `density` of its numbers set to zero

This is PEFT's `magnitude_prune` and the baseline of DARE's paper (arXiv 2311.03099), after Han et
al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015, arXiv
1506.02626. PEFT has no default; the one here is that of TIES, whose first step it is.

In the common space this depends on the basis.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    return (largest(cores.values, options.density) * cores.weights[:, None, None]).sum(0)


MERGE = Merge(
    name="magnitude_prune",
    title="keep the largest numbers of every update, add up",
    paper="Han et al., NeurIPS 2015, arXiv 1506.02626; as in PEFT",
    same_as_dense=False,
    combine=_combine,
    options=Options,
)
