"""Computes RMSNorm and its gradient in a third of the passes over memory that autograd makes.

    y = w x r,   r = (mean(x^2) + eps)^(-1/2)
    dx = r (w g) - x r^3 mean(w g x)

torch computes this norm from elementary operations on the CPU, in float32 copies of its input.
Here the sums are taken in float32 and everything else in the dtype of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        r = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, r)
        return torch.mul(x, r, out=torch.empty_like(x)).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, r = ctx.saved_tensors
        back = grads[0] * weight
        dot = (back * x).sum(-1, keepdim=True, dtype=r.dtype)
        share = dot.mul_(r**3).div_(x.shape[-1])
        return back.mul_(r).sub_(torch.mul(x, share, out=torch.empty_like(x))), None, None


def fast_norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A `forward` for a frozen RMSNorm that gives what its own gives; None where none is known."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    known = type(module).__name__.endswith("RMSNorm") and isinstance(weight, Tensor)
    if not known or weight is None or weight.ndim != 1 or not isinstance(eps, float):
        return None
    if weight.device.type != "cpu" or weight.requires_grad:
        return None

    def forward(x: Tensor) -> Tensor:
        out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return out

    # Some architectures scale by 1 + w or in another order: only what agrees is replaced.
    source = torch.Generator().manual_seed(0)
    x = torch.randn(3, len(weight), generator=source).to(weight.dtype)
    with torch.no_grad():
        ours, theirs = forward(x).double(), module(x).double()
    bound = 2e-2 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-5
    return forward if bool((ours - theirs).abs().max() <= bound * theirs.abs().max()) else None
