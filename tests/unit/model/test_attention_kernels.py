"""Attention of grouped samples, against one sample at a time in dense float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedlora.model.attention_kernels import AttentionProducts, fused_attention
from fedlora.model.sample_groups import samples_of

LENGTHS, HEADS, WIDTH, SCALE = (5, 2, 6), 3, 4, 0.4


def inputs() -> list[Tensor]:
    """Queries, keys and values `(heads, tokens, d)`."""
    torch.manual_seed(0)
    return [torch.randn(HEADS, sum(LENGTHS), WIDTH, dtype=torch.float64) for _ in range(3)]


def by_hand(q: Tensor, k: Tensor, v: Tensor, causal: bool, factors: list[Tensor] | None) -> Tensor:
    """`softmax(c Q K^T) V` of each sample, its probabilities times dropout's factors."""
    parts, begin = [], 0
    for sample, length in enumerate(LENGTHS):
        qs, ks, vs = (x[:, begin : begin + length] for x in (q, k, v))
        scores = SCALE * qs @ ks.transpose(1, 2)
        if causal:
            ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(ahead, float("-inf"))
        p = torch.softmax(scores, -1)
        parts.append((p if factors is None else p * factors[sample]) @ vs)
        begin += length
    return torch.cat(parts, 1).transpose(0, 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_products_and_their_gradients(causal: bool, dropout: bool) -> None:
    samples = samples_of(LENGTHS, [0, 0, 1])
    of_samples = [torch.rand(HEADS, n, n, dtype=torch.float64).round() * 2 for n in LENGTHS]
    of_groups = []
    for group in samples.groups:
        padded = torch.zeros(HEADS, group.size, group.length, group.length, dtype=torch.float64)
        for row, sample in enumerate(group.samples):
            padded[:, row, : LENGTHS[sample], : LENGTHS[sample]] = of_samples[sample]
        of_groups.append(padded.flatten(0, 1))
    given = [x.requires_grad_() for x in inputs()]
    wanted = by_hand(*given, causal, of_samples if dropout else None)
    weights = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, given, weights)
    out = AttentionProducts.apply(
        *given, samples.groups, causal, None, SCALE, of_groups if dropout else None
    )  # type: ignore[no-untyped-call]
    torch.testing.assert_close(out, wanted)
    for mine, exact in zip(torch.autograd.grad(out, given, weights), gradients, strict=True):
        torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize("causal", [False, True])
def test_the_fused_kernel(causal: bool) -> None:
    q, k, v = inputs()
    out = fused_attention(q, k, v, samples_of(LENGTHS, [0, 0, 1]).groups, causal, None, SCALE)
    torch.testing.assert_close(out, by_hand(q, k, v, causal, None))


def test_a_sample_of_no_numbers_spoils_no_other() -> None:
    q, k, v = inputs()
    v[:, : LENGTHS[0]] = float("nan")
    groups = samples_of(LENGTHS, [0, 0, 1]).groups
    out = AttentionProducts.apply(q, k, v, groups, True, None, SCALE, None)  # type: ignore[no-untyped-call]
    for result in (out, fused_attention(q, k, v, groups, True, None, SCALE)):
        assert result[: LENGTHS[0]].isnan().all()
        assert result[LENGTHS[0] :].isfinite().all()
