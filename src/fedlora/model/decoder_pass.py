"""Runs a decoder layer forwards and backwards as one operation of autograd.

Of hidden states `x (tokens, width)`, with samples side by side, a layer of Llama's family makes

    h = x + o(attention(rotary(q(n)), rotary(k(n)), v(n)))        n = norm_1(x)
    y = h + down(silu(gate(m)) o up(m))                           m = norm_2(h)

    norm(x) = w o x / sqrt(mean(x^2) + eps)                       mean over the width

The operations between the products are short and many in a small model: autograd would run some
ninety of them and keep what each made. Here they write over what nobody needs any more, queries and
keys are rotated while they are gathered into attention's groups, and the gradients of the frozen
weights and norms are never thought of. With `wanted`, all after attention runs on those rows alone:
of a last layer only the rows before labelled tokens are read.

The gradients of norm and rotary, with `r = 1 / sqrt(mean(x^2) + eps)` and `g = dL/dy`:

    dx = r (w o g) - x r^3 mean(w o g o x)
    (x_1, x_2) -> (x_1 c_1 - x_2 s_1, x_2 c_2 + x_1 s_2)          halves of a head
    (g_1, g_2) -> (g_1 c_1 + g_2 s_2, g_2 c_2 - g_1 s_1)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.model.lora_product import LinearCall, product, product_backward
from fedlora.model.sample_groups import Group


@dataclass(frozen=True)
class RotaryGroup:
    """A group of samples of similar length, and what its attention takes from the pass alone.

    Args:
        group: of samples.
        cos, sin: `(size, length, d)`, the rotary factors of the token in every cell.
        bar: added to scores, `(1 or size, length, length)`, or None.
    """

    group: Group
    cos: Tensor
    sin: Tensor
    bar: Tensor | None


@dataclass(frozen=True)
class Shapes:
    """Heads of queries, heads of keys (as many of values), and the width of a head."""

    queries: int
    keys: int
    width: int
    scale: float

    @property
    def rotated(self) -> int:
        """Heads that rotary factors turn."""
        return self.queries + self.keys

    @property
    def heads(self) -> int:
        """All of them."""
        return self.queries + 2 * self.keys

    def columns(self) -> tuple[slice, slice, slice]:
        """Where queries, keys and values lie side by side."""
        first, second = self.queries * self.width, self.rotated * self.width
        return slice(0, first), slice(first, second), slice(second, self.heads * self.width)


@dataclass(frozen=True)
class LayerCall:
    """A decoder layer as it runs in one pass.

    Args:
        shapes: of attention.
        norms: weights `(width,)` of the two norms.
        eps: of the two norms.
        inputs: the layers of queries, keys and values.
        others: the output's of attention, then gate, up and down.
        groups: attention's, which hold every token once.
        wanted: `(n,)`, rows that are wanted of the layer's output; None: all.
    """

    shapes: Shapes
    norms: tuple[Tensor, Tensor]
    eps: tuple[float, float]
    inputs: tuple[LinearCall, LinearCall, LinearCall]
    others: tuple[LinearCall, LinearCall, LinearCall, LinearCall]
    groups: Sequence[RotaryGroup]
    wanted: Tensor | None

    @property
    def trains(self) -> bool:
        """Whether a factor in it is trained."""
        return any(call.trains for call in (*self.inputs, *self.others))


class DecoderPass(torch.autograd.Function):
    """See the formulas of this module; `x (tokens, width)` -> `(tokens or wanted rows, width)`.

    The gradients of factors are added to the parameters' own by the backward pass itself. `_anchor`
    requires a gradient, and gets none: without it, autograd would not run a layer backwards whose
    input needs no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor | None, call: LayerCall) -> Tensor:
        saved, numbers = list[Tensor](), list[int]()

        def linear(layer: LinearCall, rows: Tensor, out: Tensor | None = None) -> Tensor:
            y, kept = product(layer, rows, out)
            saved.extend(kept)
            numbers.append(len(kept))
            return y

        shapes, wanted = call.shapes, call.wanted
        normed, r1 = _norm(x, call.norms[0], call.eps[0])
        heads = x.new_empty(len(x), shapes.heads * shapes.width)
        for layer, columns in zip(call.inputs, shapes.columns(), strict=True):
            linear(layer, normed, heads[:, columns])
        attended = x.new_empty(len(x), shapes.queries * shapes.width)
        of_groups = list[Tensor]()
        for group in call.groups:
            of_groups += _attend(group, heads, attended, shapes)
        out, gate, up, down = call.others
        rows, residual = attended, x
        if wanted is not None:
            rows, residual = attended.index_select(0, wanted), x.index_select(0, wanted)
        h = linear(out, rows).add_(residual)
        m, r2 = _norm(h, call.norms[1], call.eps[1])
        gated, upward = linear(gate, m), linear(up, m)
        active = F.silu(gated)
        inner = active * upward
        y = linear(down, inner).add_(h)
        ctx.call, ctx.numbers, ctx.number = call, numbers, len(of_groups)
        mine = (x, r1, normed, rows, h, r2, m, gated, upward, active, inner)
        ctx.save_for_backward(*mine, *of_groups, *saved)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (g,), call, shapes = grads, ctx.call, ctx.call.shapes
        (x, r1, normed, rows, h, r2, m, gated, upward, active, inner), rest = (
            ctx.saved_tensors[:11],
            ctx.saved_tensors[11:],
        )
        of_groups, kept = rest[: ctx.number], _parts(rest[ctx.number :], ctx.numbers)
        inputs, (of_out, of_gate, of_up, of_down) = kept[:3], kept[3:]
        out, gate, up, down = call.others
        needs_x = ctx.needs_input_grad[0]
        below = needs_x or any(layer.trains for layer in call.inputs)
        d_inner = _wanted(product_backward(down, g, inner, of_down))
        d_up = d_inner * active
        d_gate = torch.ops.aten.silu_backward(d_inner.mul_(upward), gated)
        dm = product_backward(gate, d_gate, m, of_gate)
        dm = _wanted(product_backward(up, d_up, m, of_up, dm))
        dh = _norm_backward(dm, h, r2, call.norms[1]).add_(g)
        d_rows = product_backward(out, dh, rows, of_out, needs_x=below)
        if d_rows is None:
            return None, None, None
        if call.wanted is not None:
            d_rows = _spread(d_rows, call.wanted, len(x))
            dh = _spread(dh, call.wanted, len(x)) if needs_x else dh
        d_heads = x.new_empty(len(x), shapes.heads * shapes.width)
        for i, group in enumerate(call.groups):
            _attend_backward(group, d_rows, of_groups[4 * i : 4 * i + 4], d_heads, shapes)
        dn: Tensor | None = None
        for layer, columns, of_layer in zip(call.inputs, shapes.columns(), inputs, strict=True):
            part = d_heads[:, columns]
            dn = product_backward(layer, part, normed, of_layer, dn, needs_x=needs_x)
        if dn is None:
            return None, None, None
        return _norm_backward(dn, x, r1, call.norms[0]).add_(dh), None, None


def _wanted(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _parts(values: Sequence[Tensor], numbers: Sequence[int]) -> list[Sequence[Tensor]]:
    """A sequence cut into parts of so many values."""
    rest: Iterator[Tensor] = iter(values)
    return [[next(rest) for _ in range(number)] for number in numbers]


def _spread(rows: Tensor, at: Tensor, number: int) -> Tensor:
    """Rows in their places among `number`, zero elsewhere."""
    return rows.new_zeros(number, rows.shape[1]).index_copy_(0, at, rows)


# --- norm ---


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`w o x r` and `r = 1 / sqrt(mean(x^2) + eps)`, `(tokens, width)` and `(tokens, 1)`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * r).mul_(weight), r


def _norm_backward(g: Tensor, x: Tensor, r: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x; written over `g`."""
    g.mul_(weight)
    shared = (g * x).sum(-1, keepdim=True).mul_(r * r * r).div_(x.shape[-1])
    return g.mul_(r).addcmul_(x, shared, value=-1)


# --- attention of a group ---


def _attend(of: RotaryGroup, heads: Tensor, out: Tensor, shapes: Shapes) -> list[Tensor]:
    """Write what a group's samples attend to into `out (tokens, heads * d)`.

    Args:
        of: the group.
        heads: `(tokens, all heads * d)`: queries, keys and values before they are rotated.
        out: written to at the group's tokens.
        shapes: of attention.

    Returns:
        P, and queries, keys and values as they were multiplied, `(heads * size, ...)`.
    """
    group, d = of.group, shapes.width
    cells = heads.index_select(0, group.gather).view(group.size, group.length, shapes.heads, d)
    by_head = cells.permute(2, 0, 1, 3)  # (heads, size, length, d)
    turned = _turn(by_head[: shapes.rotated], of.cos, of.sin)
    q = turned[: shapes.queries].view(-1, group.length, d)
    k = _repeated(turned[shapes.queries :], shapes).view(-1, group.length, d)
    v = _repeated(by_head[shapes.rotated :], shapes).reshape(-1, group.length, d)
    transposed = k.transpose(1, 2)
    if of.bar is None:
        scores = torch.bmm(q, transposed).mul_(shapes.scale)
    else:
        bar = of.bar if len(of.bar) == 1 else of.bar.repeat(shapes.queries, 1, 1)
        scores = torch.baddbmm(bar, q, transposed, alpha=shapes.scale)
    p = torch.softmax(scores, -1)
    rows = torch.bmm(p, v).view(shapes.queries, group.size, group.length, d).permute(1, 2, 0, 3)
    _place(rows.reshape(group.size * group.length, -1), group, out)
    return [p, q, k, v]


def _attend_backward(
    of: RotaryGroup, d_out: Tensor, kept: Sequence[Tensor], d_heads: Tensor, shapes: Shapes
) -> None:
    """Write the gradient of queries, keys and values at the group's tokens into `d_heads`.

    Args:
        of: the group.
        d_out: `(tokens, heads * d)`, of what `_attend` wrote.
        kept: what it gave.
        d_heads: `(tokens, all heads * d)`, written to.
        shapes: of attention.
    """
    group, d, (p, q, k, v) = of.group, shapes.width, kept
    cells = d_out.index_select(0, group.gather)
    if len(group.padding):
        cells.index_fill_(0, group.padding, 0)
    g = cells.view(group.size, group.length, shapes.queries, d).permute(2, 0, 1, 3)
    g = g.reshape(-1, group.length, d)
    ds = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype)
    ds.mul_(shapes.scale)
    dq, dk, dv = torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q), torch.bmm(p.transpose(1, 2), g)
    gathered = g.new_empty(group.size, group.length, shapes.heads, d)
    by_head = gathered.permute(2, 0, 1, 3)
    by_size = (-1, group.size, group.length, d)
    _turn_back(dq.view(by_size), of, by_head[: shapes.queries])
    _turn_back(_summed(dk.view(by_size), shapes), of, by_head[shapes.queries : shapes.rotated])
    by_head[shapes.rotated :].copy_(_summed(dv.view(by_size), shapes))
    _place(gathered.view(group.size * group.length, -1), group, d_heads)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads turned by the rotary factors, `(heads, size, length, d)`, in a new tensor."""
    out, half = torch.mul(x, cos, out=x.new_empty(x.shape)), x.shape[-1] // 2
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _turn_back(g: Tensor, of: RotaryGroup, out: Tensor) -> None:
    """The gradient through `_turn`, written to `out`."""
    half, sin = g.shape[-1] // 2, of.sin
    torch.mul(g, of.cos, out=out)
    out[..., :half].addcmul_(g[..., half:], sin[..., half:])
    out[..., half:].addcmul_(g[..., :half], sin[..., :half], value=-1)


def _repeated(x: Tensor, shapes: Shapes) -> Tensor:
    """Heads of keys or values, each as often as it has heads of queries."""
    times = shapes.queries // shapes.keys
    return x if times == 1 else x.repeat_interleave(times, dim=0)


def _summed(g: Tensor, shapes: Shapes) -> Tensor:
    """The gradient through `_repeated`."""
    times = shapes.queries // shapes.keys
    return g if times == 1 else g.unflatten(0, (shapes.keys, times)).sum(1)


def _place(cells: Tensor, group: Group, out: Tensor) -> None:
    """Write the cells of a group that hold tokens, `(cells, n)`, to their tokens' rows."""
    real = cells if group.real is None else cells.index_select(0, group.real)
    out.index_copy_(0, group.tokens, real)
