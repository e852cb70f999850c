"""A linear layer in 8 or 4 bits is rounded by the definition, linear, and never written to."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedlora.errors import InputError
from fedlora.model.layers import is_plain, shape_of
from fedlora.model.quantised_linear import Bits, QuantisedLinear, require_bitsandbytes
from support.extras import needs_bitsandbytes
from support.quantised import assert_rounded, digest_of

SHAPES = [(48, 64), (32, 24), (10, 100), (7, 10), (1, 64)]
"""Among them rows shorter than a block of 64, and blocks that cross rows."""


def layer_of(m: int, n: int, bits: Bits, bias: bool = False) -> tuple[torch.Tensor, Any]:
    torch.manual_seed(m + n)
    weight = torch.randn(m, n)
    return weight, QuantisedLinear(weight, torch.randn(m) if bias else None, bits, torch.float32)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_shapes_alone_take_the_bytes_of_the_real_one(m: int, n: int, bits: Bits) -> None:
    """A plan counts them on the meta device."""
    _, real = layer_of(m, n, bits)
    planned = QuantisedLinear(torch.empty(m, n, device="meta"), None, bits, torch.float32)
    for (name, buffer), (_, wanted) in zip(
        planned.named_buffers(), real.named_buffers(), strict=True
    ):
        assert (name, buffer.nbytes) == (name, wanted.nbytes)
        assert (buffer.shape, buffer.dtype) == (wanted.shape, wanted.dtype)
    x = torch.empty(3, n, device="meta", requires_grad=True)
    planned(x).sum().backward()
    assert x.grad is not None
    assert planned.weight.shape == (m, n)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_weight_is_rounded_by_the_definition(m: int, n: int, bits: Bits) -> None:
    weight, layer = layer_of(m, n, bits)
    assert_rounded(layer.weight, weight, bits)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_as_a_full_layer_of_that_weight(bits: Bits, dtype: torch.dtype) -> None:
    """Forwards and backwards, and to the bit: the products are the same ones."""
    _, layer = layer_of(48, 64, bits, bias=True)
    x = torch.randn(2, 5, 64).to(dtype).requires_grad_()
    z = x.detach().clone().requires_grad_()
    y, wanted = layer(x), F.linear(z, layer.weight.to(dtype), layer.bias.to(dtype))
    assert y.dtype == dtype
    assert torch.equal(y, wanted)
    g = torch.randn_like(y)
    y.backward(g)
    wanted.backward(g)
    torch.testing.assert_close(x.grad, z.grad)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_does_not_depend_on_others(bits: Bits) -> None:
    """Bitsandbytes' own layer rounds a column of all rows otherwise where one row has outliers."""
    _, layer = layer_of(48, 64, bits)
    x = torch.randn(6, 64)
    outliers = x.clone()
    outliers[3:] *= 1000
    torch.testing.assert_close(layer(x)[:3], layer(outliers)[:3], rtol=1e-6, atol=1e-6)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [8, 4])
def test_nothing_writes_to_it(bits: Bits) -> None:
    _, layer = layer_of(48, 64, bits, bias=True)
    model = nn.Sequential(layer)
    before = digest_of(model)
    for training in (True, False):
        model.train(training)
        x = torch.randn(4, 64, requires_grad=training)
        y = model(x)
        if training:
            y.sum().backward()
    assert digest_of(model) == before
    assert not [p for p in model.parameters() if p.requires_grad]


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [8, 4])
def test_it_takes_a_fraction_of_the_memory(bits: Bits) -> None:
    _, layer = layer_of(256, 256, bits)
    held = sum(x.untyped_storage().nbytes() for x in layer.buffers())
    assert held < 256 * 256 * {8: 1.05, 4: 0.6}[bits]


@needs_bitsandbytes
def test_equal_weights_are_packed_alike_in_any_dtype() -> None:
    weight = torch.randn(16, 64).bfloat16()
    for bits in (8, 4):
        one, other = (
            QuantisedLinear(w, None, bits, torch.float32) for w in (weight, weight.float())
        )
        assert torch.equal(one.packed, other.packed)
        assert torch.equal(one.scale, other.scale)


@needs_bitsandbytes
def test_it_is_a_linear_layer_but_no_plain_one() -> None:
    _, layer = layer_of(48, 64, 4)
    assert isinstance(layer, nn.Linear)
    assert not is_plain(layer)
    assert shape_of(layer) == (48, 64)


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"load_in_4bit: .* pip install 'fedlora\[quantized\]'"):
        require_bitsandbytes(4)
