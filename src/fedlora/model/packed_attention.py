"""Computes attention over samples that lie side by side without padding, each by itself.

    o_t = sum_{u <= t, u in the same sample} softmax_u(c q_t k_u) v_u

A model's linear layers see `(1, tokens, width)`; only here samples of similar length are gathered
into padded groups. On the CPU short samples are computed with batched matrix products, in which the
matrix units are three times as fast as in torch's fused kernel's backward pass; long ones, and all
on a GPU, go through `scaled_dot_product_attention`, which needs no memory of square size.

Registered with transformers as the attention implementation `NAME`; it reads the `Samples` of the
pass that is running. Which tokens of its own sample a token may look at (windows, chunks) is what
the model itself says: transformers hands its mask functions to `sample_mask`, at the length being
run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.model.client_rows import ClientRows

NAME = "fedlora_packed"
SITES = 2_000_000
"""Where attention's sites of dropout begin, see `ClientRows.keep`."""
SITES_OF_LAYER = 10_000
"""Sites between one attention layer and the next: one for each sample of a client."""
LONGEST_PRODUCT = 512
"""Samples up to this length are computed with products that are kept, length x length."""
UNKNOWN = (
    "softcap",
    "s_aux",
    "sinks",
    "position_bias",
    "attention_bias",
    "alibi",
    "head_mask",
    "indices",
    "block_indices",
)
"""What some models hand to their attention beside the mask, and is not computed here."""
PLAIN = 64
"""A mask function without a window is evaluated up to this length; beyond, it is taken to go on."""


class PackingError(RuntimeError):
    """This architecture's attention cannot be computed without padding."""


@dataclass(frozen=True)
class Group:
    """Samples of similar length, padded to the longest of them.

    Args:
        size, length: samples, and tokens of the longest.
        gather: `(size * length,)` the token in every cell of the padded group; padding points to
            the first token of its own sample, so that not even a NaN gets from one to another.
        real: `(tokens,)` the cells that hold tokens; None: all of them, in order.
        padding: `(padding,)` the other cells.
        tokens: `(tokens,)` the token in every cell of `real`.
        samples: which samples.
    """

    size: int
    length: int
    gather: Tensor
    real: Tensor | None
    padding: Tensor
    tokens: Tensor
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Samples:
    """The samples of a pass.

    Args:
        lengths: tokens of each, in order.
        clients: whose each is.
        groups: for attention.
    """

    lengths: tuple[int, ...]
    clients: tuple[int, ...]
    groups: tuple[Group, ...]


def samples_of(
    lengths: Sequence[int], clients: Sequence[int], device: torch.device | str = "cpu"
) -> Samples:
    """Group samples by length, so that a group's shortest has three quarters of its longest."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    groups, chosen = [], list[int]()
    for i in reversed(order):
        if chosen and lengths[i] < 0.75 * lengths[chosen[0]]:
            groups.append(_group(chosen, lengths, starts, device))
            chosen = []
        chosen.append(i)
    groups.append(_group(chosen, lengths, starts, device))
    return Samples(tuple(lengths), tuple(clients), tuple(groups))


def _group(
    chosen: Sequence[int],
    lengths: Sequence[int],
    starts: Sequence[int],
    device: torch.device | str,
) -> Group:
    longest = lengths[chosen[0]]
    begins = torch.tensor([starts[i] for i in chosen])[:, None]
    sizes = torch.tensor([lengths[i] for i in chosen])[:, None]
    steps = torch.arange(longest)[None]
    real = (steps < sizes).reshape(-1)
    tokens = (begins + steps).reshape(-1)
    whole = bool(real.all())
    return Group(
        size=len(chosen),
        length=longest,
        gather=torch.where(real, tokens, begins.expand(-1, longest).reshape(-1)).to(device),
        real=None if whole else real.nonzero()[:, 0].to(device),
        padding=(~real).nonzero()[:, 0].to(device),
        tokens=tokens[real].to(device),
        samples=tuple(chosen),
    )


# transformers calls attention by name and hands it no more than tensors, so what a pass consists of
# has to be found from the outside. Context variables keep passes in several threads apart.
_running: ContextVar[tuple[Samples, ClientRows] | None] = ContextVar("fedlora_pass", default=None)
_windows: ContextVar[set[int] | None] = ContextVar("fedlora_windows", default=None)


@contextmanager
def attending(samples: Samples, client_rows: ClientRows) -> Iterator[None]:
    """Let the attention of models that run meanwhile in this thread keep these samples apart."""
    token = _running.set((samples, client_rows))
    try:
        yield
    finally:
        _running.reset(token)


def running_samples() -> Samples:
    """The samples of the pass that runs in this thread.

    Raises:
        PackingError: none runs.
    """
    running = _running.get()
    if running is None:
        raise PackingError("no packed pass is running")
    return running[0]


@contextmanager
def noting_windows() -> Iterator[set[int]]:
    """Collect the sizes of the windows and chunks for which models ask for masks meanwhile."""
    windows = set[int]()
    token = _windows.set(windows)
    try:
        yield windows
    finally:
        _windows.reset(token)


def recomputing(
    client_rows: ClientRows,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint`: a layer that is computed again gets what it got.

    It draws the same dropout and attends to the same samples. On a GPU the second computation runs
    in a thread of autograd's, which would not see the context variable of the pass.

    Returns:
        Contexts for the first computation and for the second.
    """
    first, again = client_rows.recomputing()
    running = _running.get()

    @contextmanager
    def as_then() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(again)
            if running is not None:
                stack.enter_context(attending(*running))
            yield

    return first, as_then()


def _spread(x: Tensor, group: Group, *, zero: bool = False) -> Tensor:
    """`(heads, tokens, d)` -> `(heads * size, length, d)`."""
    heads, _, d = x.shape
    out = x.index_select(1, group.gather)
    if zero and len(group.padding):
        out.index_fill_(1, group.padding, 0)
    return out.view(heads * group.size, group.length, d)


def _collect(x: Tensor, group: Group, heads: int) -> Tensor:
    """`(heads * size, length, d)` -> `(heads, tokens of the group, d)`."""
    out = x.view(heads, group.size * group.length, x.shape[-1])
    return out if group.real is None else out.index_select(1, group.real)


def _barred(group: Group, like: Tensor, causal: bool, mask: Tensor | None) -> Tensor | None:
    """What is added to scores, `(1 or size, length, length)`: -inf where a token may not look."""
    length = group.length
    bar = torch.zeros(1, length, length, dtype=torch.bool, device=like.device)
    if mask is not None:
        bar = ~mask[None, :length, :length]
    elif causal:
        bar |= bar.new_ones(length, length).triu(1)
    elif not len(group.padding):
        return None
    if len(group.padding) and not (causal and mask is None):
        real = torch.ones(group.size * length, dtype=torch.bool, device=like.device)
        real[group.padding] = False
        real = real.view(group.size, 1, length)
        # Nobody reads what padding sees, but a softmax over nothing would be NaN: it sees all.
        bar = (bar | ~real) & real.transpose(1, 2)
    return torch.zeros_like(bar, dtype=like.dtype).masked_fill_(bar, float("-inf"))


class _AttentionProducts(torch.autograd.Function):
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
            qs, ks, vs = (_spread(x, group) for x in (q, k, v))
            scores = torch.bmm(qs, ks.transpose(1, 2)).mul_(scale)
            if (bar := _barred(group, scores, causal, mask)) is not None:
                by_sample = (heads, group.size, group.length, group.length)
                scores = scores.view(by_sample).add_(bar).view_as(scores)
            p = torch.softmax(scores, -1)
            kept += [p, qs, ks, vs]
            dropped = p if dropout is None else p * dropout[i]
            outputs = _collect(torch.bmm(dropped, vs), group, heads)
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
            d_outs = _spread(d_out, group, zero=True)
            dropped = p if ctx.dropout is None else p * ctx.dropout[i]
            dvs = torch.bmm(dropped.transpose(1, 2), d_outs)
            dv.index_copy_(1, group.tokens, _collect(dvs, group, heads))
            dp = torch.bmm(d_outs, vs.transpose(1, 2))
            if ctx.dropout is not None:
                dp = dp * ctx.dropout[i]
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(ctx.scale)
            dq.index_copy_(1, group.tokens, _collect(torch.bmm(ds, ks), group, heads))
            dks = torch.bmm(ds.transpose(1, 2), qs)
            dk.index_copy_(1, group.tokens, _collect(dks, group, heads))
        return dq, dk, dv, None, None, None, None, None


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
    qs, ks, vs = (_spread(x, group).view(shape).transpose(0, 1) for x in (q, k, v))
    barred = not causal or mask is not None
    bar = _barred(group, qs, causal, mask) if barred else None
    out = F.scaled_dot_product_attention(
        qs,
        ks,
        vs,
        attn_mask=None if bar is None else bar[:, None],
        is_causal=causal and bar is None,
        scale=scale,
    )
    return _collect(
        out.transpose(0, 1).reshape(len(q) * group.size, group.length, -1), group, len(q)
    )


def _dropout_factors(
    samples: Samples, client_rows: ClientRows, layer: int, heads: int, p: float, like: Tensor
) -> list[Tensor]:
    """Dropout on the probabilities: `keep / (1 - p)` of every group, `(heads * size, l, l)`.

    Every sample has a site of its own, numbered within its client's samples of the pass, so that it
    draws the same whatever other clients are in the pass and however samples are grouped.

    Args:
        samples: of the pass.
        client_rows: of the model.
        layer: the attention layer's number.
        heads: of the layer.
        p: the share of probabilities that is dropped.
        like: gives device and dtype.
    """
    factors = []
    for group in samples.groups:
        padded = like.new_zeros(heads, group.size, group.length, group.length)
        for row, sample in enumerate(group.samples):
            client, length = samples.clients[sample], samples.lengths[sample]
            of_client = sample - samples.clients.index(client)
            site = SITES + SITES_OF_LAYER * layer + of_client
            keep = client_rows.keep(client, site, (heads, length, length), p, like.device)
            # In float32 whatever torch's default dtype is; and only then in that of the model.
            padded[:, row, :length, :length] = keep.float() / (1 - p)
        factors.append(padded.view(-1, group.length, group.length))
    return factors


def sample_mask(
    batch_size: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    local_size: int | None = None,
    use_vmap: bool = False,
    **others: Any,
) -> Tensor | None:
    """What transformers calls for a mask: the model's own rule, for a sample by itself.

    Args:
        batch_size, kv_length: of the pass.
        mask_function: `(batch, head, i, j)` -> whether token i may look at token j.
        local_size: of the window or chunk it bars at.
        use_vmap: the model has changed the rule in a way of its own.

    Returns:
        `(1, 1, length, length)`, bool, at the length of the longest sample; the corner of it is the
        mask of a shorter one. None: causal, or no bar at all, as the layer's `is_causal` says.

    Raises:
        PackingError: the rule depends on where in the pass a sample lies.
    """
    running = _running.get()
    if running is None or (batch_size, kv_length) != (1, sum(running[0].lengths)):
        raise PackingError(f"a mask over {batch_size} x {kv_length}")
    samples, windows = running[0], _windows.get()
    longest = samples.groups[0].length
    if local_size is not None and windows is not None:
        windows.add(int(local_size))
    short = longest <= local_size if local_size is not None else longest > PLAIN
    if short and not use_vmap:
        return None
    device = samples.groups[0].gather.device
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    masks, begin = [], 0
    for length in samples.lengths:
        at = torch.arange(begin, begin + length, device=device)
        seen = mask_function(zero, zero, at[:, None], at[None, :])
        masks.append(seen.expand(length, length))
        begin += length
    mask = max(masks, key=len)
    for seen in masks:
        if not torch.equal(seen, mask[: len(seen), : len(seen)]):
            raise PackingError("a mask that depends on a sample's place in the pass")
    if bool(mask.all()) or torch.equal(mask, torch.ones_like(mask).tril()):
        return None
    return mask[None, None]


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: `(1, heads, tokens, d)` each -> `(1, tokens, heads, d)`.

    Raises:
        PackingError: a form of attention that is not known here.
    """
    running = _running.get()
    unknown = [k for k in UNKNOWN if others.get(k) is not None]
    if running is None or unknown:
        raise PackingError(f"attention with {', '.join(unknown) or 'no samples'}")
    samples, client_rows = running
    mask = _sample_mask_of(attention_mask, sliding_window, samples.groups[0].length)
    client_rows.mixing |= client_rows.whole > 0
    if query.shape[0] != 1 or {query.shape[2], key.shape[2]} != {sum(samples.lengths)}:
        raise PackingError(f"attention over {tuple(query.shape)}")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    q, k, v = (x.squeeze(0) for x in (query, key, value))  # (heads, tokens, d)
    heads, scale = len(q), query.shape[-1] ** -0.5 if scaling is None else scaling
    if len(k) != heads:  # several heads of queries share one of keys and values
        k, v = (x.repeat_interleave(heads // len(k), dim=0) for x in (k, v))
    products = not q.is_cuda and samples.groups[0].length <= LONGEST_PRODUCT
    if not products and not dropout:
        return _all_fused(q, k, v, samples.groups, causal, mask, scale)[None], None
    factors = None
    if dropout:  # torch's kernel would draw from its own generator, not from each client's stream
        layer = client_rows.number_of(module)
        factors = _dropout_factors(samples, client_rows, layer, heads, dropout, q)
    grouped = (samples.groups, causal, mask, scale, factors)
    out: Tensor = _AttentionProducts.apply(q, k, v, *grouped)  # type: ignore[no-untyped-call]
    return out[None], None


def _sample_mask_of(
    attention_mask: Tensor | None, sliding_window: int | None, longest: int
) -> Tensor | None:
    """The mask `(longest, longest)` that `sample_mask` made for the model; None: there is none.

    Raises:
        PackingError: the model's mask was made by something else.
    """
    if attention_mask is None:
        if sliding_window is not None and sliding_window < longest:
            raise PackingError(f"a window of {sliding_window} without a mask")
        return None
    if attention_mask.dtype != torch.bool or attention_mask.shape != (1, 1, longest, longest):
        raise PackingError(f"attention with a mask of shape {tuple(attention_mask.shape)}")
    return attention_mask[0, 0]


def _all_fused(
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


def register() -> None:
    """Make `NAME` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sample_mask)
