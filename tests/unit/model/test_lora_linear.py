"""A linear layer with low-rank terms on slices of its rows, against autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.lowrank import Delta, Dense, LowRank
from fedlora.model.lora_linear import Term, adapted
from support.adapters import random_lowrank

ROWS, N, M, P = 9, 5, 4, 0.25


def tensor(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wide(x: LowRank) -> LowRank:
    """The same in float64."""
    return LowRank(x.A.double(), x.B.double())


def by_hand(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    shared: Delta | None,
    terms: list[Term],
) -> Tensor:
    """The formula of the module, term by term."""
    out = x @ weight.T + bias if y is None else y
    if isinstance(shared, LowRank):
        out = out + x @ shared.A.T @ shared.B.T
    elif shared is not None:
        out = out + x @ shared.W.T
    parts = []
    begin = 0
    for term in terms:
        parts.append(out[begin : term.begin])
        own, rows = x[term.begin : term.end], out[term.begin : term.end]
        if term.private is not None:
            rows = rows + own @ term.private.A.T @ term.private.B.T
        if term.A is not None and term.B is not None:
            kept = own if term.keep is None else own * term.keep / (1 - term.dropout)
            rows = rows + term.scale * kept @ term.A.T @ term.B.T
        parts.append(rows)
        begin = term.end
    return torch.cat([*parts, out[begin:]])


@pytest.mark.parametrize("shared", [None, "factors", "dense"])
@pytest.mark.parametrize("fused", [True, False])
def test_outputs_and_gradients(shared: str | None, fused: bool) -> None:
    branch: Delta | None = None
    if shared is not None:
        branch = wide(random_lowrank((M, N), 2, 5))
        branch = branch if shared == "factors" else Dense(branch.B @ branch.A)
    factors = [
        tensor(2, N, seed=1),
        tensor(M, 2, seed=2),
        tensor(3, N, seed=3),
        tensor(M, 3, seed=4),
    ]
    factors = [f.requires_grad_() for f in factors]
    keep = tensor(3, N, seed=6) > 0
    terms = [
        Term(0, 3, factors[0], factors[1], 2.0, wide(random_lowrank((M, N), 1, 7)), keep, P),
        Term(3, 5, None, None, 1.0, wide(random_lowrank((M, N), 1, 8)), None, 0.0),
        Term(5, 8, factors[2], factors[3], 0.5, None, None, 0.0),  # row 8 is nobody's
    ]
    x = tensor(ROWS, N, seed=9).requires_grad_()
    weight, bias = tensor(M, N, seed=10), tensor(M, seed=11)
    y = None if fused else (x * 2) @ weight.T
    wanted = by_hand(x, y, weight, bias, branch, terms)
    found = adapted(x, y, weight if fused else None, bias if fused else None, branch, terms)
    torch.testing.assert_close(found, wanted)
    g = tensor(ROWS, M, seed=12)
    exact = torch.autograd.grad(wanted, [x, *factors], g, retain_graph=True)
    for mine, other in zip(torch.autograd.grad(found, [x, *factors], g), exact, strict=True):
        torch.testing.assert_close(mine, other)


def test_leading_axes_are_kept() -> None:
    x, weight = tensor(2, 3, N), tensor(M, N)
    assert adapted(x, None, weight, None, None, []).shape == (2, 3, M)


def test_float16_gradients_do_not_overflow() -> None:
    """A sum over 4096 tokens of products near 100 is beyond float16."""
    x = torch.full((4096, 2), 10.0, dtype=torch.float16)
    a, b = torch.ones(1, 2, requires_grad=True), torch.ones(2, 1, requires_grad=True)
    out = adapted(
        x, None, torch.zeros(2, 2).half(), None, None, [Term(0, 4096, a, b, 1.0, None, None, 0)]
    )
    out.backward(torch.full_like(out, 10.0))
    grads: list[Any] = [a.grad, b.grad]
    assert [g.dtype for g in grads] == [torch.float32] * 2
    assert torch.equal(grads[1], torch.full((2, 1), 4096 * 10.0 * 20.0))
    assert torch.equal(grads[0], torch.full((1, 2), 4096 * 20.0 * 10.0))


def test_a_factor_that_is_frozen_gets_no_gradient() -> None:
    a, b = tensor(2, N), tensor(M, 2).requires_grad_()
    out = adapted(
        tensor(3, N), None, tensor(M, N), None, None, [Term(0, 3, a, b, 1.0, None, None, 0)]
    )
    out.sum().backward()
    assert a.grad is None
    assert b.grad is not None
