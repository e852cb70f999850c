"""Computes a linear layer with its clients' low-rank terms where the caller keeps what is saved.

The formulas are those of `lora_linear`. There autograd calls one layer after the other; here the
caller runs several layers forwards and backwards by itself (`decoder_pass`). So products write
where their result is needed, and gradients are added to the parameters' own, without a tensor in
between. All tensors are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.lowrank import Delta, LowRank
from fedlora.model.lora_linear import Term


@dataclass(frozen=True)
class LinearCall:
    """A linear layer as it runs in one pass.

    Args:
        weight, bias: `(m, n)` and `(m,)`, frozen.
        shared: the branch that all rows go through, or None.
        terms: the clients'.
    """

    weight: Tensor
    bias: Tensor | None
    shared: Delta | None
    terms: Sequence[Term]

    @property
    def trains(self) -> bool:
        """Whether a factor of some client is trained."""
        return any(
            factor is not None and factor.requires_grad for t in self.terms for factor in (t.A, t.B)
        )


def product(call: LinearCall, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """The layer's output, and what its backward pass needs besides x.

    Args:
        call: the layer.
        x: `(rows, n)`.
        out: `(rows, m)`, where the output is written; None: a new tensor.

    Returns:
        The output, and what `_add_term` gave of every client: `L_k = (x o D_k) A_k^T` first.
    """
    transposed = call.weight.T
    if call.bias is None:
        out = torch.mm(x, transposed, out=out)
    else:
        out = torch.addmm(call.bias, x, transposed, out=out)
    if isinstance(call.shared, LowRank):
        out.addmm_(x @ call.shared.A.T, call.shared.B.T)
    elif call.shared is not None:
        out.addmm_(x, call.shared.W.T)
    kept = list[Tensor]()
    for term in call.terms:
        kept += _add_term(term, x[term.begin : term.end], out[term.begin : term.end])
    return out, kept


def _add_term(term: Term, x: Tensor, out: Tensor) -> list[Tensor]:
    """Add a client's terms to its rows of the output, and give what its backward pass needs.

    Without dropout, the trained factors and the private ones are multiplied side by side: two
    products of twice the rank take less time than four.
    """
    if term.A is None or term.B is None:
        if term.private is not None:
            out.addmm_(x @ term.private.A.T, term.private.B.T)
        return []
    if term.keep is None and term.private is not None:
        below = torch.cat([term.A, term.private.A])  # (r + r_p, n)
        above = torch.cat([term.B * term.scale, term.private.B], 1)  # (m, r + r_p)
        low = x @ below.T
        out.addmm_(low, above.T)
        return [low, below, above]
    if term.private is not None:
        out.addmm_(x @ term.private.A.T, term.private.B.T)
    if term.keep is not None:
        x = x * (term.keep.to(x.dtype) / (1 - term.dropout))
    low = x @ term.A.T  # (rows, r)
    out.addmm_(low, term.B.T, alpha=term.scale)
    return [low] if term.keep is None else [low, x]


def product_backward(
    call: LinearCall,
    g: Tensor,
    x: Tensor,
    kept: Sequence[Tensor],
    dx: Tensor | None = None,
    *,
    needs_x: bool = True,
) -> Tensor | None:
    """Add the gradients of the factors to their own, and give that of x.

    Args:
        call: the layer.
        g: `(rows, m)`, dL/dy.
        x: `(rows, n)`, its input.
        kept: what `product` gave.
        dx: `(rows, n)`, changed in place: what other layers have added to dL/dx already.
        needs_x: whether dL/dx is wanted.

    Returns:
        dL/dx, or None where it is not wanted.
    """
    if not needs_x:
        dx = None
    elif dx is None:
        dx = g @ call.weight
    else:
        dx.addmm_(g, call.weight)
    if dx is not None:
        if isinstance(call.shared, LowRank):
            dx.addmm_(g @ call.shared.B, call.shared.A)
        elif call.shared is not None:
            dx.addmm_(g, call.shared.W)
    saved = iter(kept)
    for term in call.terms:
        span = slice(term.begin, term.end)
        own = None if dx is None else dx[span]
        if term.A is None or term.B is None or term.keep is not None:
            if own is not None and term.private is not None:
                own.addmm_(g[span] @ term.private.B, term.private.A)
            if term.A is None or term.B is None:
                continue
        low = next(saved)
        if term.keep is not None:
            _term_backward(term, g[span], next(saved), low, own)
        elif term.private is not None:
            _joint_backward(term, g[span], x[span], (low, next(saved), next(saved)), own)
        else:
            _term_backward(term, g[span], x[span], low, own)
    return dx


def _term_backward(term: Term, g: Tensor, x: Tensor, low: Tensor, dx: Tensor | None) -> None:
    """One client's part of `product_backward`; `x` is its input after dropout."""
    a, b = term.A, term.B
    assert a is not None
    assert b is not None
    _add_to_b(term, g, low)
    if not a.requires_grad and dx is None:
        return
    high = g @ b  # (rows, r)
    if a.requires_grad:
        _gradient(a).addmm_(high.T, x, alpha=term.scale)
    if dx is None:
        return
    if term.keep is None:
        dx.addmm_(high, a, alpha=term.scale)
    else:
        factors = term.keep.to(g.dtype) / (1 - term.dropout)
        dx.addcmul_(high @ a, factors, value=term.scale)


def _joint_backward(
    term: Term, g: Tensor, x: Tensor, kept: tuple[Tensor, Tensor, Tensor], dx: Tensor | None
) -> None:
    """As `_term_backward`, with the private factors beside the trained ones."""
    low, below, above = kept
    a = term.A
    assert a is not None
    rank = len(a)
    _add_to_b(term, g, low[:, :rank])
    high = g @ above  # (rows, r + r_p), the scale in it
    if a.requires_grad:
        _gradient(a).addmm_(high[:, :rank].T, x)
    if dx is not None:
        dx.addmm_(high, below)


def _add_to_b(term: Term, g: Tensor, low: Tensor) -> None:
    """Add the gradient of B; `low (rows, r)` is what B was multiplied with."""
    if term.B is not None and term.B.requires_grad:
        # The long side last: a product with few columns is several times slower than its transpose.
        _gradient(term.B).T.add_(low.T @ g, alpha=term.scale)


def _gradient(parameter: Tensor) -> Tensor:
    """The parameter's gradient, zero where it has none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
