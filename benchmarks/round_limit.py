"""The arithmetic limit of a round: useful floating point operations over the measured GEMM rate."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ModelShape:
    """What the count needs of a model.

    Args:
        matrices: target module -> `(m, n)`: all matrices but the embedding and the head.
        layers: attention layers.
        attention: heads times the dimension of a head.
        hidden: width of the residual stream.
        vocabulary: rows of the head.
    """

    matrices: Mapping[str, tuple[int, int]]
    layers: int
    attention: int
    hidden: int
    vocabulary: int


def useful_flops(shape: ModelShape, rows: Sequence[tuple[int, int]], rank: int) -> float:
    """Floating point operations that training on these rows cannot do without.

    For rows of `l` tokens without padding, of which `c` are counted in the loss:

        matrices    4 P l                     forward and the gradient of the input; frozen
                                              weights have no gradient of their own
        head        4 V h c                   logits of the counted tokens alone
        attention   6 layers d l (l + 1)      Q K^T and P V forward, four products backward, each
                                              2 d l (l + 1) / 2: the causal half
        adapters    6 r sum(m + n) l          forward, gradients of input and factors

    with P the sum of `m n` over the matrices, d the width of attention.

    Args:
        shape: of the model.
        rows: `(l, c)` of every row trained on.
        rank: r.
    """
    tokens = sum(length for length, _ in rows)
    counted = sum(labelled for _, labelled in rows)
    pairs = sum(length * (length + 1) for length, _ in rows)
    matrices = sum(m * n for m, n in shape.matrices.values())
    sides = sum(m + n for m, n in shape.matrices.values())
    return (
        4.0 * matrices * tokens
        + 4.0 * shape.vocabulary * shape.hidden * counted
        + 6.0 * shape.layers * shape.attention * pairs
        + 6.0 * rank * sides * tokens
    )


def gemm_rate(
    matrices: Mapping[str, tuple[int, int]],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float = 1.5,
) -> float:
    """Operations a second of the model's own products, `x W^T` and its gradient `g W`.

    One layer's worth of every distinct shape is multiplied by turns; the best of several passes.

    Args:
        matrices: target module -> `(m, n)`.
        tokens: rows of x.
        dtype: of all operands.
        device: where.
        seconds: to spend, about.
    """
    counts: dict[tuple[int, int], int] = {}
    for size in matrices.values():
        counts[tuple(size)] = counts.get(tuple(size), 0) + 1
    least = min(counts.values())
    operands = []
    for (m, n), count in counts.items():
        made = [torch.randn(s, device=device).to(dtype) for s in ((tokens, n), (m, n), (tokens, m))]
        operands += [made] * (count // least)
    flops = sum(4.0 * tokens * w.shape[0] * w.shape[1] for _, w, _ in operands)

    def once() -> float:
        began = _now(device)
        for x, weight, gradient in operands:
            torch.nn.functional.linear(x, weight)
            torch.matmul(gradient, weight)
        return _now(device) - began

    once()
    best, until = once(), time.perf_counter() + seconds
    while time.perf_counter() < until:
        best = min(best, once())
    return flops / best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
