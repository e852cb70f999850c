"""Adds up the singular directions of all updates after making them orthogonal to each other.

    C_k = U_k S_k V_k^T, cut to the first min(m, n) / K directions
    U = [U_1 | ... | U_K], V likewise, S = diag(w_1 S_1, ..., w_K S_K)
    dC = polar(U) S polar(V)^T        polar(X) = P Q^T of the decomposition X = P D Q^T

`polar(X)` is the closest matrix with orthonormal columns, so that the adapters' directions no
longer overlap. Directions whose singular value is zero take no part: of a low-rank update there are
many, and they are arbitrary.

Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", CVPR 2025,
arXiv 2412.00081 (TSV-M, with its scale alpha = 1). The paper adds updates up: weights have a mean
of 1.

The common space has orthonormal bases, and all of this commutes with them: the result is that of
the whole matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora.methods.merges.merge import Cores, Merge
from fedlora.threads import one_thread

_EPS = torch.finfo(torch.float32).eps


def _combine(cores: Cores, options: object) -> Tensor:
    most = max(1, min(cores.shape) // len(cores.values))
    left, values, right = list[Tensor](), list[Tensor](), list[Tensor]()
    with one_thread():
        for core, weight in zip(cores.values, cores.weights, strict=True):
            u, s, v = torch.linalg.svd(core, full_matrices=False)
            used = min(most, _count(s))
            left.append(u[:, :used])
            values.append(s[:used] * weight)
            right.append(v[:used])
        u, s, v = _polar(torch.cat(left, dim=1)), torch.cat(values), torch.cat(right)
        return u * s @ _polar(v.T).T


def _polar(x: Tensor) -> Tensor:
    """The orthonormal polar factor `(p, t)` of a matrix, on the directions that it has."""
    if 0 in x.shape:
        return x
    p, d, q = torch.linalg.svd(x, full_matrices=False)
    used = _count(d)
    polar: Tensor = p[:, :used] @ q[:used]
    return polar


def _count(values: Tensor) -> int:
    """How many singular values are more than rounding."""
    return int((values > _EPS * values.max()).sum()) if len(values) else 0


MERGE = Merge(
    name="tsv",
    title="make the singular directions of all updates orthogonal, add up",
    paper="Gargiulo et al., CVPR 2025, arXiv 2412.00081",
    same_as_dense=True,
    combine=_combine,
    adds_up=True,
)
