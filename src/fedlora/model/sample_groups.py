"""Groups samples of similar length, and pads and unpads what attention computes group by group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIMILAR = 0.75
"""A group's shortest sample has at least this share of its longest one's tokens."""


@dataclass(frozen=True)
class Group:
    """Samples of similar length, padded to the longest of them.

    Args:
        size, length: samples, and tokens of the longest.
        gather: `(size * length,)`, the number of the token in every cell of the padded group.
            Padding points to the first token of its own sample, so that not even a NaN of another
            sample can get in.
        real: `(tokens,)`, the cells that hold tokens; None: all of them, in order.
        padding: `(cells without a token,)`, the others.
        tokens: `(tokens,)`, the number of the token in every cell of `real`.
        samples: numbers of the samples in the pass.
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
        clients: of each, the client it belongs to.
        groups: samples of similar length, which attention computes together.
    """

    lengths: tuple[int, ...]
    clients: tuple[int, ...]
    groups: tuple[Group, ...]


def samples_of(
    lengths: Sequence[int], clients: Sequence[int], device: torch.device | str = "cpu"
) -> Samples:
    """Group samples by length, see `SIMILAR`; the group of the longest comes first."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    groups, chosen = [], list[int]()
    for i in reversed(order):
        if chosen and lengths[i] < SIMILAR * lengths[chosen[0]]:
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
    has_padding = not bool(real.all())
    return Group(
        size=len(chosen),
        length=longest,
        gather=torch.where(real, tokens, begins.expand(-1, longest).reshape(-1)).to(device),
        real=real.nonzero()[:, 0].to(device) if has_padding else None,
        padding=(~real).nonzero()[:, 0].to(device),
        tokens=tokens[real].to(device),
        samples=tuple(chosen),
    )


def pad_group(x: Tensor, group: Group, *, zero: bool = False) -> Tensor:
    """`(heads, tokens, d)` -> `(heads * size, length, d)`."""
    heads, _, d = x.shape
    out = x.index_select(1, group.gather)
    if zero and len(group.padding):
        out.index_fill_(1, group.padding, 0)
    return out.view(heads * group.size, group.length, d)


def unpad_group(x: Tensor, group: Group, heads: int) -> Tensor:
    """`(heads * size, length, d)` -> `(heads, tokens of the group, d)`."""
    out = x.view(heads, group.size * group.length, x.shape[-1])
    return out if group.real is None else out.index_select(1, group.real)


def score_bar(group: Group, like: Tensor, causal: bool, mask: Tensor | None) -> Tensor | None:
    """Added to scores: -inf where a token may not attend, `(1 or size, length, length)`."""
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
        # The outputs of padding are never read, but a softmax over nothing would be NaN. So padding
        # may attend to everything.
        bar = (bar | ~real) & real.transpose(1, 2)
    return torch.zeros_like(bar, dtype=like.dtype).masked_fill_(bar, float("-inf"))
