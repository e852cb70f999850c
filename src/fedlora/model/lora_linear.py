"""Computes a linear layer and the low-rank terms of its clients, with their gradients.

Of an input `x (rows, n)` a layer makes `y (rows, m)`; W `(m, n)` and b `(m,)` are the base's:

    y = x W^T + b + x A_s^T B_s^T                                        on all rows
        + s_k (x o D_k) A_k^T B_k^T + x P_k^T Q_k^T                      on the rows of client k

`A_s (r_s, n)`, `B_s (m, r_s)` are the shared branch, frozen for all clients; `P_k`, `Q_k` are the
client's private part, frozen too; `A_k (r_k, n)`, `B_k (m, r_k)` are trained, with LoRA's scale
s_k. D_k holds `keep / (1 - p)` for every entry, dropout's factor, and o multiplies entry by entry.

With `g = dL/dy (rows, m)`, each on the rows of client k:

    L_k = (x o D_k) A_k^T            (rows, r_k)   saved by the forward pass
    H_k = g (s_k B_k)                (rows, r_k)
    dA_k = H_k^T (x o D_k)           (r_k, n)
    dB_k = s_k g^T L_k               (m, r_k)
    dx  = g W + g B_s A_s + g Q_k P_k + (H_k A_k) o D_k                  (rows, n)

One autograd function computes all of it on slices of rows: ranks are not padded, rows are not
copied, and dx is accumulated in one tensor, where autograd would sum as many as there are terms.
Saved are x; for each client L_k, which is small, and `x o D_k` where there is dropout; and the
factors, so that autograd notices if one is changed between the passes. W and the frozen factors
need no saving, because nothing changes them during a pass.
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
        private: the client's frozen part on the same rows, or None.
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
    """See the formulas of this module; the arguments are those of `adapted`."""

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
        kept = list[Tensor | None]()  # L_k and x o D_k of each term
        for term in terms:
            kept += _add_term(term, x[term.begin : term.end], out[term.begin : term.end])
        ctx.weight, ctx.shared, ctx.terms, ctx.fused = weight, shared, terms, y is None
        ctx.save_for_backward(x, *kept, *factors)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (g,), (x, *saved) = grads, ctx.saved_tensors
        number = 2 * len(ctx.terms)
        kept, factors = saved[:number], saved[number:]
        needs_x, needs_y, needs_factors = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1],
            ctx.needs_input_grad[_ARGUMENTS:],
        )
        dx: Tensor | None = None
        if needs_x:
            # A layer that made y itself gets its share of dx by its own backward pass, from dy.
            dx = g @ ctx.weight if ctx.fused else torch.zeros_like(x)
            if isinstance(ctx.shared, LowRank):
                dx.addmm_(g @ ctx.shared.B, ctx.shared.A)
            elif ctx.shared is not None:
                dx.addmm_(g, ctx.shared.W)
        d_factors = list[Tensor | None]()
        for i, term in enumerate(ctx.terms):
            rows, pair = slice(term.begin, term.end), slice(2 * i, 2 * i + 2)
            d_factors += _term_gradients(
                term,
                g[rows],
                x[rows],
                None if dx is None else dx[rows],
                kept[pair],
                factors[pair],
                needs_factors[pair],
            )
        dy = g if not ctx.fused and needs_y else None
        return dx, dy, None, None, None, None, *d_factors


_ARGUMENTS = 6
"""What `_Adapted.forward` takes before the factors."""


def _add_term(term: Term, x: Tensor, out: Tensor) -> list[Tensor | None]:
    """Add a client's terms to its rows of the output.

    Args:
        term: the client's.
        x: its rows of the input, `(rows, n)`.
        out: its rows of the output, `(rows, m)`; changed in place.

    Returns:
        L_k, and `x o D_k` where there is dropout; None for each that there is not.
    """
    if term.private is not None:
        out.addmm_(x @ term.private.A.T, term.private.B.T)
    if term.A is None or term.B is None:
        return [None, None]
    masked = None
    if term.keep is not None:
        masked = x = x * (term.keep.to(x.dtype) / (1 - term.dropout))
    low = x @ term.A.to(x.dtype).T  # (rows, r)
    out.addmm_(low, (term.B * term.scale).to(x.dtype).T)
    return [low, masked]


def _term_gradients(
    term: Term,
    g: Tensor,
    x: Tensor,
    dx: Tensor | None,
    kept: Sequence[Tensor | None],
    factors: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of a client's factors; its share of dx is added to `dx`.

    Args:
        term: the client's.
        g, x, dx: its rows of dL/dy, of the input and of dL/dx (None: nobody wants it).
        kept: what `_add_term` gave.
        factors: A and B.
        needs: whether their gradients are wanted.

    Returns:
        dA and dB, in the dtypes of A and B.
    """
    if dx is not None and term.private is not None:
        dx.addmm_(g @ term.private.B, term.private.A)
    (low, masked), (a, b) = kept, factors
    if a is None or b is None or low is None:
        return [None, None]
    high = g @ (b * term.scale).to(g.dtype)  # (rows, r)
    da = _product(high.T, x if masked is None else masked, a.dtype) if needs[0] else None
    # The long side last: a product with few columns is several times slower than its transpose.
    db = _product(low.T, g, b.dtype).mul_(term.scale).T if needs[1] else None
    if dx is not None:
        if term.keep is None:
            dx.addmm_(high, a.to(g.dtype))
        else:
            dx += (high @ a.to(g.dtype)) * (term.keep.to(g.dtype) / (1 - term.dropout))
    return [da, db]
