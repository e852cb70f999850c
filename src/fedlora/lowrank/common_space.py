"""Expresses several low-rank updates of one weight in the small space that all of them span.

With the stacks `[B_1 | B_2 | ...] = Q_b R_b` and `[A_1; A_2; ...]^T = Q_a R_a`, every update is

    dW_k = Q_b C_k Q_a^T            C_k = Q_b^T B_k A_k Q_a, R x R at most, R = sum_k r_k

so that updates of different ranks are matrices of one shape, and nothing is lost (Core Space,
Panariello et al., NeurIPS 2025, arXiv 2509.17786). No m x n matrix is made.

What is done there number by number depends on the basis. The bases are turned to the left singular
vectors of `[dW_1 | dW_2 | ...]` and the right ones of `[dW_1; dW_2; ...]`, the directions that hold
the most of all updates together. These depend on the updates alone: not on how each is divided into
B and A, nor on the order of the updates. (The paper takes the singular vectors of the stacked
factors, which change with that division.) The sign of a vector is arbitrary, and turns the sign of
a row or column in all cores alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.lowrank.arithmetic import concat
from fedlora.lowrank.updates import LowRank
from fedlora.threads import one_thread


@dataclass(frozen=True)
class CommonSpace:
    """The space of several updates of shape `(m, n)`, in float64.

    Args:
        left: `(m, p)`, orthonormal columns.
        right: `(q, n)`, orthonormal rows.
        cores: `(K, p, q)`, with `dW_k = left @ cores[k] @ right`.
    """

    left: Tensor
    right: Tensor
    cores: Tensor

    def expand(self, core: Tensor) -> LowRank:
        """The update `left @ core @ right` of a core `(p, q)`, as factors in the smaller way."""
        if core.shape[0] <= core.shape[1]:
            return LowRank(core @ self.right, self.left)
        return LowRank(self.right, self.left @ core)


def common_space(updates: Sequence[LowRank]) -> CommonSpace:
    """The space that updates span, and each of them in it.

    Directions whose singular value is at most float32's epsilon times the largest are left out:
    they are rounding.

    Args:
        updates: at least one, of shape `(m, n)`; any may be of rank 0.
    """
    wide = [LowRank(x.A.double(), x.B.double()) for x in updates]
    stack = concat(wide)
    with one_thread():
        q_b = torch.linalg.qr(stack.B).Q  # (m, p)
        q_a = torch.linalg.qr(stack.A.T).Q  # (n, q)
        cores = torch.stack([(q_b.T @ x.B) @ (x.A @ q_a) for x in wide])  # (K, p, q)
        columns = _directions(torch.cat(list(cores), dim=1))  # (p, p')
        rows = _directions(torch.cat(list(cores.mT), dim=1))  # (q, q')
        return CommonSpace(q_b @ columns, rows.T @ q_a.T, columns.T @ cores @ rows)


def _directions(beside: Tensor) -> Tensor:
    """The left singular vectors of a matrix, without those that are rounding."""
    if 0 in beside.shape:
        return beside.new_zeros(beside.shape[0], 0)
    left, values, _ = torch.linalg.svd(beside, full_matrices=False)
    used = values > values[0] * torch.finfo(torch.float32).eps
    directions: Tensor = left[:, used]
    return directions
