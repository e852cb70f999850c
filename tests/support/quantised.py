"""Looks at quantised layers, and computes weights back by the definition of their format."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from fedlora.model.quantised_linear import BLOCK, QuantisedLinear

# arXiv 2305.14314, appendix E.
NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


def layers_of(model: Any) -> dict[str, QuantisedLinear]:
    """The quantised layers of a model, by the names they had before adapters came around them."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, QuantisedLinear)}
    return {name.removesuffix(".base"): layer for name, layer in found.items()}


def digest_of(model: Any) -> str:
    """A SHA-256 over all that its quantised layers hold."""
    digest = hashlib.sha256()
    for name, layer in layers_of(model).items():
        for end, value in layer.named_buffers():
            digest.update(f"{name}.{end}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def rounded(weight: Tensor, bits: int) -> Tensor:
    """The weight rounded to int8 by rows, or to NF4 by blocks, in the plainest way."""
    weight = weight.float()
    if bits == 8:
        scale = weight.half().float().abs().amax(1, keepdim=True) / 127
        return (weight.half().float() / scale).round() * scale
    flat = weight.reshape(-1)
    blocks = flat.split(BLOCK)
    out = []
    for block in blocks:
        largest = block.abs().max()
        nearest = (block[:, None] / largest - NF4).abs().argmin(1)
        out.append(NF4[nearest] * largest)
    return torch.cat(out).view(weight.shape)


def assert_rounded(got: Tensor, weight: Tensor, bits: int) -> None:
    """Every value is as near to the original as the plainest rounding; ties may go either way."""
    plain, weight = rounded(weight, bits), weight.float()
    slack = 1e-3 * float(weight.abs().max())
    assert got.shape == weight.shape
    assert bool(((got - weight).abs() <= (plain - weight).abs() + slack).all())
    assert float(((got - plain).abs() <= slack).float().mean()) > 0.98
