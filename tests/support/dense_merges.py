"""Merges adapters by hand: whole matrices in float64, and PEFT's own element-wise functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedlora.adapters.saved_adapter import SavedAdapter

EPS = torch.finfo(torch.float32).eps


def whole(adapters: Sequence[SavedAdapter], name: str) -> list[Tensor]:
    """A module's update in each adapter, `(m, n)` in float64; zero where one lacks it."""
    m, n = next(a.deltas[name].shape for a in adapters if name in a.deltas)
    return [
        a.deltas[name].B.double() @ a.deltas[name].A.double()
        if name in a.deltas
        else torch.zeros(m, n, dtype=torch.float64)
        for a in adapters
    ]


def bases(updates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Left singular vectors `(m, p)` of the updates side by side, right ones `(q, n)` stacked."""
    left, s, _ = torch.linalg.svd(torch.cat(list(updates), dim=1), full_matrices=False)
    _, t, right = torch.linalg.svd(torch.cat(list(updates)), full_matrices=False)
    return left[:, s > EPS * s[0]], right[t > EPS * t[0]]


def in_the_common_space(
    updates: Sequence[Tensor], merge: Callable[[list[Tensor]], Tensor]
) -> Tensor:
    """A merge of whole matrices, computed on their coordinates and turned back."""
    left, right = bases(updates)
    return left @ merge([left.T @ x @ right.T for x in updates]) @ right


def tsv(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TSV-M as its authors compute it, without singular vectors whose value is zero."""
    most = min(updates[0].shape) // len(updates)
    left, values, right = [], [], []
    for x, weight in zip(updates, weights, strict=True):
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        used = min(most, int((s > EPS * s[0]).sum())) if bool(s.any()) else 0
        left.append(u[:, :used])
        values.append(weight * s[:used])
        right.append(v[:used])
    u_u, _, v_u = torch.linalg.svd(torch.cat(left, dim=1), full_matrices=False)
    u_v, _, v_v = torch.linalg.svd(torch.cat(right), full_matrices=False)
    return torch.linalg.multi_dot((u_u, v_u, torch.diag(torch.cat(values)), u_v, v_v))
