"""Computes a linear layer and the low-rank terms of its clients, with their gradients.

    y = x W^T + b + x A_s^T B_s^T + (rows of client k) s_k (x * keep / (1 - p)) A_k^T B_k^T
                                                     + x A_k0^T B_k0^T

W, b, the shared branch `B_s A_s` and the clients' `B_k0 A_k0` are frozen. One autograd function
computes all of it on slices: no padding of ranks, no copies of rows, and the gradient of x is
accumulated in place instead of being summed over as many tensors as there are terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.lowrank import Delta, LowRank


@dataclass(frozen=True)
class Term:
    """What acts on rows `begin` to `end`.

    Args:
        begin, end: the rows.
        A, B: `(r, n)` and `(m, r)`, what is trained; None: nothing.
        scale: s.
        private: the frozen `B_0 A_0` on the same rows, or None.
        keep: which entries of the rows dropout keeps `(end - begin, n)`, or None.
        dropout: p.
    """

    begin: int
    end: int
    A: Tensor | None
    B: Tensor | None
    scale: float
    private: LowRank | None
    keep: Tensor | None
    dropout: float


def adapted(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shared: Delta | None,
    terms: Sequence[Term],
) -> Tensor:
    """`x (..., n)` -> `(..., m)`, see the formula of this module.

    Args:
        x: in the dtype of the base; products are taken in it, whatever the dtype of A and B.
        y: what the layer computes itself where it is no plain `x W^T + b`, else None.
        weight, bias: `(m, n)` and `(m,)` where it does not.
        shared: the shared branch.
        terms: the clients'.
    """
    factors = [f for t in terms for f in (t.A, t.B)]
    flat = x.reshape(-1, x.shape[-1])
    into = None if y is None else y.reshape(-1, y.shape[-1])
    out = _Adapted.apply(flat, into, weight, bias, shared, terms, *factors)  # type: ignore[no-untyped-call]
    return cast(Tensor, out).view(*x.shape[:-1], -1)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a b` as the gradient of a factor. In float16 a sum over many tokens would overflow."""
    if a.dtype == torch.float16:
        a, b = a.float(), b.float()
    return (a @ b).to(dtype)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        shared: Delta | None,
        terms: Sequence[Term],
        *factors: Tensor | None,
    ) -> Tensor:
        # With y given, autograd goes on to the layer that made it.
        out = F.linear(x, cast(Tensor, weight), bias) if y is None else y.clone()
        if isinstance(shared, LowRank):
            out.addmm_(x @ shared.A.T, shared.B.T)
        elif shared is not None:
            out.addmm_(x, shared.W.T)
        kept = list[Tensor | None]()
        for term in terms:
            rows, to = x[term.begin : term.end], out[term.begin : term.end]
            if term.private is not None:
                to.addmm_(rows @ term.private.A.T, term.private.B.T)
            if term.A is None or term.B is None:
                kept += [None, None]
                continue
            masked = None
            if term.keep is not None:
                masked = rows = rows * (term.keep.to(x.dtype) / (1 - term.dropout))
            low = rows @ term.A.to(x.dtype).T  # (rows, r)
            to.addmm_(low, (term.B * term.scale).to(x.dtype).T)
            kept += [low, masked]
        ctx.weight, ctx.shared, ctx.terms, ctx.fused = weight, shared, terms, y is None
        ctx.save_for_backward(x, *kept, *factors)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (g,), (x, *saved) = grads, ctx.saved_tensors
        terms, shared, number = ctx.terms, ctx.shared, 2 * len(ctx.terms)
        kept, factors = saved[:number], saved[number:]
        wanted = ctx.needs_input_grad
        dx: Tensor | None = None
        if wanted[0]:
            dx = g @ ctx.weight if ctx.fused else torch.zeros_like(x)
            if isinstance(shared, LowRank):
                dx.addmm_(g @ shared.B, shared.A)
            elif shared is not None:
                dx.addmm_(g, shared.W)
        out = list[Tensor | None]()
        for i, term in enumerate(terms):
            rows, gs = x[term.begin : term.end], g[term.begin : term.end]
            to = None if dx is None else dx[term.begin : term.end]
            if to is not None and term.private is not None:
                to.addmm_(gs @ term.private.B, term.private.A)
            (low, masked), (a, b) = kept[2 * i : 2 * i + 2], factors[2 * i : 2 * i + 2]
            if a is None or b is None:
                out += [None, None]
                continue
            need_a, need_b = wanted[6 + 2 * i], wanted[7 + 2 * i]
            back = gs @ (b * term.scale).to(g.dtype)  # (rows, r)
            rows = rows if masked is None else masked
            out.append(_product(back.T, rows, a.dtype) if need_a else None)
            out.append(_product(gs.T, low, b.dtype).mul_(term.scale) if need_b else None)
            if to is not None:
                if term.keep is None:
                    to.addmm_(back, a.to(g.dtype))
                else:
                    to += (back @ a.to(g.dtype)) * (term.keep.to(g.dtype) / (1 - term.dropout))
        dy = g if not ctx.fused and wanted[1] else None
        return dx, dy, None, None, None, None, *out
