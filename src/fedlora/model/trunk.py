"""Replaces a module's forward pass for a while, and runs a classifier's trunk without padding.

A classifier's head picks the last token of every row, or a pooler the first, by its place in a
padded batch. So the model goes on seeing padded rows: the trunk takes them and gives them back, and
computes without padding in between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def unpadded_trunk(trunk: Any, positions: Callable[[torch.device], Tensor]) -> Iterator[None]:
    """The trunk takes and gives padded tensors, and computes without padding inside.

    Args:
        trunk: of the model, with a pooler or without.
        positions: gives every token's position `(1, tokens)` on a device.
    """
    packed_forward, pooler = trunk.forward, getattr(trunk, "pooler", None)
    # The pooler runs inside the trunk's forward pass and needs to know the padded batch it is of.
    batches: list[_PaddedBatch] = []

    def forward(input_ids: Tensor, attention_mask: Tensor, **named: Any) -> Any:
        batch = _PaddedBatch.of(attention_mask)
        batches.append(batch)
        if named.get("token_type_ids") is not None:
            named["token_type_ids"] = batch.pack(named["token_type_ids"])
        named["position_ids"] = positions(input_ids.device)
        out = packed_forward(input_ids=batch.pack(input_ids), **named)
        out["last_hidden_state"] = batch.pad(out.last_hidden_state)
        return out

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced_forward(trunk, forward))
        if isinstance(pooler, nn.Module):
            pool = pooler.forward

            def padded_pool(hidden: Tensor, *given: Any, **named: Any) -> Any:
                return pool(batches[-1].pad(hidden), *given, **named)

            stack.enter_context(replaced_forward(pooler, padded_pool))
        yield


@dataclass(frozen=True)
class _PaddedBatch:
    """Where the tokens of a batch lie between its padding.

    Args:
        size, longest: rows, and tokens of each with its padding.
        real: `(tokens,)`, the numbers of the entries that are no padding, row after row.
    """

    size: int
    longest: int
    real: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor) -> _PaddedBatch:
        """The batch of a mask `(size, longest)`."""
        size, longest = attention_mask.shape
        return cls(size, longest, attention_mask.reshape(-1).nonzero()[:, 0])

    def pack(self, ids: Tensor) -> Tensor:
        """`(size, longest)` -> `(1, tokens)`."""
        return ids.reshape(-1)[self.real][None]

    def pad(self, hidden: Tensor) -> Tensor:
        """`(1, tokens, width)` -> `(size, longest, width)`, zero where there is padding."""
        out = hidden.new_zeros(self.size * self.longest, hidden.shape[-1])
        return out.index_copy(0, self.real, hidden[0]).view(self.size, self.longest, -1)


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another `forward` for a while; afterwards it has the one it had."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
