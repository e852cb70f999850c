"""Decides by a quick measurement whether the base is held in bfloat16 or float32."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 1024
"""Rows of the layer that is measured."""
SMALLEST = 256
"""In narrower layers, matrix products take so little of the time that the dtype does not matter."""
WORTH = 1.5
"""How many times faster bfloat16 has to be to be chosen."""


def resolve_dtype(config: Any, device: torch.device) -> tuple[torch.dtype, str]:
    """float32, or bfloat16 where it is clearly faster; adapters are float32 beside either.

    On the CPU one feed-forward layer of the model's width is run forwards and backwards in both:
    processors with matrix units for bfloat16 (AMX) take a fraction of the time, those without take
    longer. GPUs that support bfloat16 are not measured.

    Args:
        config: of the model, of transformers.
        device: where it will be.

    Returns:
        The dtype, and why in a few words.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "this GPU computes in it"
        return torch.float32, "this GPU does not compute in bfloat16"
    width = hidden_size(config)
    if width < SMALLEST:
        return torch.float32, f"layers {width} wide gain nothing from bfloat16"
    if not bfloat16_is_worth_a_trial():
        return torch.float32, "this CPU takes longer in bfloat16"
    ratio = _seconds(width, torch.float32) / _seconds(width, torch.bfloat16)
    if ratio >= WORTH:
        return torch.bfloat16, f"a layer takes 1/{ratio:.1f} of the time it takes in float32"
    return torch.float32, f"a layer in bfloat16 takes {1 / ratio:.1f} times as long"


def hidden_size(config: Any) -> int:
    """The width of a model's layers; `SMALLEST` where its configuration does not tell."""
    text = config.get_text_config()
    return int(getattr(text, "hidden_size", None) or getattr(text, "d_model", None) or SMALLEST)


def bfloat16_is_worth_a_trial() -> bool:
    """Whether the CPU multiplies bfloat16 about as fast as float32, found out in milliseconds.

    Some take twenty times as long: a layer of a wide model, let alone a step, would take minutes.
    """
    return _seconds(SMALLEST, torch.bfloat16, 32) < WORTH * _seconds(SMALLEST, torch.float32, 32)


def _seconds(width: int, dtype: torch.dtype, tokens: int = TOKENS) -> float:
    """The shortest of a few passes through a feed-forward layer and the norm before it."""
    layer = nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
    )
    layer = layer.to(dtype).requires_grad_(False)
    x: Tensor = torch.zeros(tokens, width, dtype=dtype).requires_grad_()
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        layer(x).sum().backward()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
