"""A decoder layer as one operation, against the same formulas through autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.model.decoder_pass import DecoderPass, LayerCall, RotaryGroup, Shapes
from fedlora.model.lora_linear import Term
from fedlora.model.lora_product import LinearCall
from fedlora.model.sample_groups import samples_of, score_bar

WIDTH, INNER, D, LENGTHS = 12, 10, 4, [5, 4, 2]
SHAPES = Shapes(queries=4, keys=2, width=D, scale=0.5)
TOKENS = sum(LENGTHS)


def tensor(*shape: int, seed: int) -> Tensor:
    """Normal numbers in float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary, as transformers writes it."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def by_hand(x: Tensor, call: LayerCall, cos: Tensor, sin: Tensor) -> Tensor:
    """The layer, sample by sample, through autograd."""

    def norm(x: Tensor, number: int) -> Tensor:
        r = torch.rsqrt(x.square().mean(-1, keepdim=True) + call.eps[number])
        return call.norms[number] * x * r

    def linear(layer: LinearCall, x: Tensor) -> Tensor:
        (term,) = layer.terms
        assert term.A is not None
        assert term.B is not None
        return F.linear(x, layer.weight) + term.scale * x @ term.A.T @ term.B.T

    out, begin = [], 0
    for length in LENGTHS:
        own, part = x[begin : begin + length], slice(begin, begin + length)
        q, k, v = (linear(layer, norm(own, 0)) for layer in call.inputs)
        heads = [y.view(length, -1, D).transpose(0, 1) for y in (q, k, v)]
        q, k = (turned(y, cos[part], sin[part]) for y in heads[:2])
        k, v = (y.repeat_interleave(2, 0) for y in (k, heads[2]))
        rows = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SHAPES.scale)
        h = own + linear(call.others[0], rows.transpose(0, 1).reshape(length, -1))
        m = norm(h, 1)
        inner = F.silu(linear(call.others[1], m)) * linear(call.others[2], m)
        out.append(h + linear(call.others[3], inner))
        begin += length
    return torch.cat(out)


@pytest.mark.parametrize("wanted", [None, [1, 4, 8, 10]])
@pytest.mark.parametrize("input_trains", [True, False])
def test_output_and_gradients(wanted: list[int] | None, input_trains: bool) -> None:
    sizes = [(16, WIDTH), (8, WIDTH), (8, WIDTH), (WIDTH, 16), (INNER, WIDTH), (INNER, WIDTH)]
    sizes.append((WIDTH, INNER))
    factors, calls = list[Tensor](), list[LinearCall]()
    for i, (m, n) in enumerate(sizes):
        a = (0.3 * tensor(2, n, seed=i)).requires_grad_()
        b = tensor(m, 2, seed=50 + i).requires_grad_()
        factors += [a, b]
        rows = TOKENS if wanted is None or i < 3 else len(wanted)
        term = Term(0, rows, a, b, 0.5, None, None, 0.0)
        calls.append(LinearCall(0.3 * tensor(m, n, seed=20 + i), None, None, [term]))
    cos, sin = tensor(TOKENS, D, seed=80), tensor(TOKENS, D, seed=81)
    groups = []
    for group in samples_of(LENGTHS, [0] * len(LENGTHS)).groups:
        of = [y[group.gather].view(group.size, group.length, D) for y in (cos, sin)]
        groups.append(RotaryGroup(group, of[0], of[1], score_bar(group, cos, True, None)))
    assert len(groups) > 1  # of them, one with padding
    at = None if wanted is None else torch.tensor(wanted)
    norms = 1 + 0.1 * tensor(WIDTH, seed=90), 1 + 0.1 * tensor(WIDTH, seed=91)
    inputs, others = (calls[0], calls[1], calls[2]), (calls[3], calls[4], calls[5], calls[6])
    call = LayerCall(SHAPES, norms, (1e-6, 1e-5), inputs, others, groups, at)
    x = tensor(TOKENS, WIDTH, seed=99).requires_grad_(input_trains)
    theirs = by_hand(x, call, cos, sin)
    theirs = theirs if at is None else theirs[at]
    g = tensor(*theirs.shape, seed=98)
    leaves = [x, *factors] if input_trains else factors
    gradients = list(torch.autograd.grad(theirs, leaves, g))
    anchor = torch.zeros(0, requires_grad=True)
    ours = DecoderPass.apply(x, anchor, call)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ours.backward(g)
    for value, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(value.grad, gradient, rtol=1e-3, atol=1e-4)


def test_nothing_runs_backwards_where_nothing_trains() -> None:
    plain = [
        LinearCall(tensor(m, n, seed=1), None, None, ())
        for m, n in [(16, WIDTH), (8, WIDTH), (8, WIDTH), (WIDTH, 16), (INNER, WIDTH)]
    ]
    plain += [plain[4], LinearCall(tensor(WIDTH, INNER, seed=2), None, None, ())]
    (group,) = samples_of([3], [0]).groups
    factors = torch.ones(1, 3, D)
    groups = [RotaryGroup(group, factors, factors, None)]
    ones = torch.ones(WIDTH)
    inputs, others = (plain[0], plain[1], plain[2]), (plain[3], plain[4], plain[5], plain[6])
    call = LayerCall(SHAPES, (ones, ones), (1e-6, 1e-6), inputs, others, groups, None)
    assert not call.trains
    y = DecoderPass.apply(tensor(3, WIDTH, seed=3), None, call)  # type: ignore[no-untyped-call]
    assert not y.requires_grad
