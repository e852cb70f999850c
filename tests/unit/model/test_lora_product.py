"""A linear layer whose caller keeps what is saved, against `lora_linear` through autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedlora.lowrank import Delta, Dense
from fedlora.model.lora_linear import Term, adapted
from fedlora.model.lora_product import LinearCall, product, product_backward
from support.adapters import random_lowrank

ROWS, N, M = 9, 5, 4


def tensor(*shape: int, seed: int) -> Tensor:
    """Normal numbers in float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def terms_of(factors: list[Tensor]) -> list[Term]:
    """Clients with dropout, with a private part, with both and with neither."""
    keep = tensor(3, N, seed=6) > 0
    private = random_lowrank((M, N), 1, 7)
    return [
        Term(0, 3, factors[0], factors[1], 2.0, private, keep, 0.25),
        Term(3, 5, None, None, 1.0, private, None, 0.0),
        Term(5, 8, factors[2], factors[3], 0.5, None, None, 0.0),
        Term(8, 9, factors[4], factors[5], 2.0, private, None, 0.0),
    ]


@pytest.mark.parametrize("shared", ["none", "factors", "dense"])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_autograd(shared: str, bias: bool) -> None:
    low = random_lowrank((M, N), 2, 5)
    branch: Delta | None = {"none": None, "factors": low, "dense": Dense(low.B @ low.A)}[shared]
    shapes = [(2, N), (M, 2), (3, N), (M, 3), (1, N), (M, 1)]
    factors = [tensor(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    x, g, weight = (tensor(*s, seed=9 + i) for i, s in enumerate(((ROWS, N), (ROWS, M), (M, N))))
    offset = tensor(M, seed=12) if bias else None
    terms = terms_of(factors)
    x.requires_grad_()
    wanted = adapted(x, None, weight, offset, branch, terms)
    gradients = torch.autograd.grad(wanted, [x, *factors], g)
    call = LinearCall(weight, offset, branch, terms)
    with torch.no_grad():
        out = torch.empty(ROWS, M + 2)[:, 1:-1]  # a part of wider rows
        y, kept = product(call, x.detach(), out)
        before = tensor(ROWS, N, seed=13)
        dx = product_backward(call, g, x.detach(), kept, before.clone())
        assert product_backward(call, g, x.detach(), kept, needs_x=False) is None
    assert y.data_ptr() == out.data_ptr()
    assert dx is not None
    torch.testing.assert_close(y, wanted.detach())
    torch.testing.assert_close(dx, before + gradients[0])
    for factor, gradient in zip(factors, gradients[1:], strict=True):
        torch.testing.assert_close(factor.grad, 2 * gradient)  # added twice, once without dx


def test_a_frozen_factor_gets_no_gradient_and_nothing_trains_without_factors() -> None:
    a, b = tensor(2, N, seed=0), tensor(M, 2, seed=1).requires_grad_()
    call = LinearCall(tensor(M, N, seed=2), None, None, [Term(0, 4, a, b, 1.0, None, None, 0.0)])
    x, g = tensor(4, N, seed=3), tensor(4, M, seed=4)
    with torch.no_grad():
        product_backward(call, g, x, product(call, x)[1])
    assert a.grad is None
    assert b.grad is not None
    assert call.trains
    assert not LinearCall(call.weight, None, None, ()).trains
