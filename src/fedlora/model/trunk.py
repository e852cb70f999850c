"""Puts other forward passes in the place of a module's own for a while: a trunk without padding.

A classifier's head takes the last token of every row from a padded output, and a pooler the first.
So the trunk is given padded rows and gives padded rows back, and only inside it is nothing padded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def unpadded_trunk(trunk: Any, positions: Callable[[torch.device], Tensor]) -> Iterator[None]:
    """The trunk takes and gives padded tensors, and computes without padding inside.

    Args:
        trunk: of the model, with a pooler or without.
        positions: gives every token's position `(1, tokens)` on a device.
    """
    run, pooler = trunk.forward, getattr(trunk, "pooler", None)
    place: list[tuple[tuple[int, int], Tensor]] = []

    def padded(x: Tensor) -> Tensor:
        (batch, longest), where = place[-1]
        out = x.new_zeros(batch * longest, x.shape[-1]).index_copy(0, where, x[0])
        return out.view(batch, longest, -1)

    def forward(input_ids: Tensor, attention_mask: Tensor, **named: Any) -> Any:
        real = attention_mask.reshape(-1).nonzero()[:, 0]
        place.append((cast("tuple[int, int]", tuple(input_ids.shape)), real))
        if named.get("token_type_ids") is not None:
            named["token_type_ids"] = named["token_type_ids"].reshape(-1)[real][None]
        named["position_ids"] = positions(input_ids.device)
        out = run(input_ids=input_ids.reshape(-1)[real][None], **named)
        out["last_hidden_state"] = padded(out.last_hidden_state)
        return out

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced_forward(trunk, forward))
        if isinstance(pooler, nn.Module):
            pool = pooler.forward
            stack.enter_context(
                replaced_forward(pooler, lambda x, *a, **k: pool(padded(x), *a, **k))
            )
        yield


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another `forward` for a while."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
