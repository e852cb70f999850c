"""Holds a linear layer's weight in 8 or 4 bits, and computes with it as with any other weight.

The weight is quantised once by bitsandbytes: to int8 with one scale a row (as in LLM.int8(), arXiv
2208.07339), or to NF4 in blocks of 64 values with one scale each (as in QLoRA, arXiv 2305.14314,
without double quantisation). Nothing writes to what is packed after that.

Of an input `x (rows, n)`, with `W' (m, n)` the weight computed back from its packed form, a layer
makes `y = x W'^T + b` in the dtype of x, and `dL/dx = g W'`. So it is linear in x to the last bit:
an update beside it is as exact as beside a full weight, and no row depends on another. The layers
of bitsandbytes itself are neither: `Linear8bitLt` rounds the input too, by what all rows of a pass
hold, and `Linear4bit` packs its weight anew on some processors when it evaluates.

`W'` lives for one product; the backward pass computes it again.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.errors import InputError

Bits = Literal[8, 4]

BLOCK = 64
"""Values of a weight that share a scale in 4 bits."""


def require_bitsandbytes(bits: Bits) -> None:
    """Refuse to quantise where bitsandbytes is not installed.

    Raises:
        InputError: how to install it.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"load_in_{bits}bit: bitsandbytes, which quantises the base, is not installed; "
            "pip install 'fedlora[quantized]', or leave it out"
        )


class QuantisedLinear(nn.Linear):
    """`y = x W'^T + b` with `W'` held in 8 or 4 bits; see this module.

    It is an `nn.Linear` for whoever looks for linear layers, and reads or runs one.

    Args:
        weight: `(m, n)`, the original; on the meta device nothing is quantised, and shapes remain.
        bias: `(m,)` or None.
        bits: 8 or 4.
        dtype: of the weight that is read from this layer; a pass computes in that of its input.
        fan_in_fan_out: the original layer stored its weight `(n, m)` (Conv1D).

    Attributes:
        packed: `(m, n)` int8, or `(m n / 2, 1)` uint8 with two values in each.
        scale: float32, `(m,)`, or one for each block of 64 values.
        code: float32 `(16,)`, the values that four bits stand for; none with 8 bits.
        like: an empty tensor on the layer's device and in its dtype.
    """

    packed: Tensor
    scale: Tensor
    code: Tensor
    like: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        bits: Bits,
        dtype: torch.dtype,
        fan_in_fan_out: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear would make a full weight
        self.out_features, self.in_features = weight.shape
        self.bits, self.fan_in_fan_out = bits, fan_in_fan_out
        own = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        self.register_parameter("bias", own)
        pack = _pack_8bit if bits == 8 else _pack_4bit
        packed = _shapes(weight, bits) if weight.is_meta else pack(weight.detach())
        for name, value in packed.items():
            self.register_buffer(name, value)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=weight.device))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """`W' (m, n)`, computed anew each time."""
        return self.dequantised(self.like.dtype)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """`W' (m, n)` in this dtype."""
        if self.packed.is_meta:
            return torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta")
        import bitsandbytes.functional as bnb

        if self.bits == 8:
            return cast(Tensor, bnb.int8_vectorwise_dequant(self.packed, self.scale)).to(dtype)
        state = bnb.QuantState(
            absmax=self.scale,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.code,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=torch.float32,
        )
        return cast(Tensor, bnb.dequantize_4bit(self.packed, state)).to(dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """`x (..., n)` -> `(..., m)`."""
        flat = x.reshape(-1, self.in_features)
        y = cast(Tensor, _Product.apply(flat, self, self.bias))  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], self.out_features)


def _pack_8bit(weight: Tensor) -> dict[str, Tensor]:
    """Bitsandbytes takes float16 alone here, on any device."""
    import bitsandbytes.functional as bnb

    packed, scale, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
    return {"packed": packed, "scale": scale}


def _pack_4bit(weight: Tensor) -> dict[str, Tensor]:
    """From float32 whatever the checkpoint's dtype, so that equal weights are packed alike."""
    import bitsandbytes.functional as bnb

    values = weight.to(torch.float32).contiguous()
    packed, state = bnb.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
    return {"packed": packed, "scale": state.absmax, "code": state.code}


def _shapes(weight: Tensor, bits: Bits) -> dict[str, Tensor]:
    """What would be packed, without numbers: a plan counts its bytes."""
    values = weight.numel()
    if bits == 8:
        shapes = {"packed": (weight.shape, torch.int8), "scale": (weight.shape[:1], torch.float32)}
    else:
        shapes = {
            "packed": (torch.Size((-(-values // 2), 1)), torch.uint8),
            "scale": (torch.Size((-(-values // BLOCK),)), torch.float32),
            "code": (torch.Size((16,)), torch.float32),
        }
    return {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, (shape, dtype) in shapes.items()
    }


class _Product(torch.autograd.Function):
    """`x W'^T + b`, which keeps no `W'` for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, layer.dequantised(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (g,) = grads
        dx = g @ ctx.layer.dequantised(g.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None
