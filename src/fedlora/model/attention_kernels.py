"""Computes attention of grouped samples, as matrix products or through torch's fused kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.model.sample_groups import Group, pad_group, score_bar, unpad_group


class AttentionProducts(torch.autograd.Function):
    """Attention as matrix products, group by group.

    With `P = softmax(c Q K^T + bar)` and dropout's factors D (`keep / (1 - p)`), each of a sample:

        O = (P o D) V
        dV = (P o D)^T dO           dP = (dO V^T) o D
        dS = c P o (dP - rowsum(P o dP))                     (the softmax's own gradient, times c)
        dQ = dS K                   dK = dS^T Q

    P and the padded Q, K, V are kept for the backward pass: a fused kernel would compute P again,
    in products that are slower than the memory they save is worth at these lengths.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        groups: Sequence[Group],
        causal: bool,
        mask: Tensor | None,
        scale: float,
        dropout: Sequence[Tensor] | None,
    ) -> Tensor:
        heads = len(q)
        out, kept = v.new_empty(v.shape[1], heads, v.shape[2]), []
        for i, group in enumerate(groups):
            qs, ks, vs = (pad_group(x, group) for x in (q, k, v))
            scores = torch.bmm(qs, ks.transpose(1, 2)).mul_(scale)
            if (bar := score_bar(group, scores, causal, mask)) is not None:
                by_sample = (heads, group.size, group.length, group.length)
                scores = scores.view(by_sample).add_(bar).view_as(scores)
            p = torch.softmax(scores, -1)
            kept += [p, qs, ks, vs]
            dropped = p if dropout is None else p * dropout[i]
            outputs = unpad_group(torch.bmm(dropped, vs), group, heads)
            out.index_copy_(0, group.tokens, outputs.transpose(0, 1))
        ctx.groups, ctx.scale, ctx.dropout = groups, scale, dropout
        ctx.shapes = q.shape, k.shape, v.shape
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        d_out, kept = grads[0].transpose(0, 1), ctx.saved_tensors
        heads = len(d_out)
        dq, dk, dv = (d_out.new_empty(shape) for shape in ctx.shapes)
        for i, group in enumerate(ctx.groups):
            p, qs, ks, vs = kept[4 * i : 4 * i + 4]
            d_outs = pad_group(d_out, group, zero=True)
            dropped = p if ctx.dropout is None else p * ctx.dropout[i]
            dvs = torch.bmm(dropped.transpose(1, 2), d_outs)
            dv.index_copy_(1, group.tokens, unpad_group(dvs, group, heads))
            dp = torch.bmm(d_outs, vs.transpose(1, 2))
            if ctx.dropout is not None:
                dp = dp * ctx.dropout[i]
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(ctx.scale)
            dq.index_copy_(1, group.tokens, unpad_group(torch.bmm(ds, ks), group, heads))
            dks = torch.bmm(ds.transpose(1, 2), qs)
            dk.index_copy_(1, group.tokens, unpad_group(dks, group, heads))
        return dq, dk, dv, None, None, None, None, None


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Sequence[Group],
    causal: bool,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """All groups through torch's kernel, `(heads, tokens, d)` each -> `(tokens, heads, d)`."""
    parts = [_fused(q, k, v, group, causal, mask, scale) for group in groups]
    tokens = torch.cat([group.tokens for group in groups])
    out = parts[0].new_zeros(v.shape[1], len(q), v.shape[2])
    return out.index_copy(0, tokens, torch.cat(parts, 1).transpose(0, 1))


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group,
    causal: bool,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """One group through torch's kernel, `(heads, tokens of the group, d)`."""
    shape = (len(q), group.size, group.length, -1)
    qs, ks, vs = (pad_group(x, group).view(shape).transpose(0, 1) for x in (q, k, v))
    needs_bar = not causal or mask is not None
    bar = score_bar(group, qs, causal, mask) if needs_bar else None
    attend = _shapes_of_fused if qs.is_meta else F.scaled_dot_product_attention
    out = attend(
        qs,
        ks,
        vs,
        attn_mask=None if bar is None else bar[:, None],
        is_causal=causal and bar is None,
        scale=scale,
    )
    return unpad_group(
        out.transpose(0, 1).reshape(len(q) * group.size, group.length, -1), group, len(q)
    )


def _shapes_of_fused(*tensors: Tensor, **named: Any) -> Tensor:
    """The kernel's result without numbers: for tensors of shapes alone torch would not choose it.

    It keeps what the kernel keeps, so that the memory of a pass can be told from shapes.
    """
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tensors, **named)[0]
    return out
