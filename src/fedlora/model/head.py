"""Computes a language model's loss from its trunk's output: on labelled tokens alone, in chunks.

The logits of a token are as many numbers as the vocabulary has entries; together they would be by
far the largest tensor of a pass. So only the tokens whose successor is labelled get any, and only
`CHUNK_NUMBERS` are held at once: each chunk's backward pass runs before the next chunk's logits are
computed.

A head is the model itself, called with a trunk that gives back what the real one has computed. So
whatever an architecture does to its logits (scaling, soft caps) is done here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fedlora.model.client_rows import ClientRows, ClientSpan, spans_within
from fedlora.model.loss import CrossEntropy
from fedlora.model.trunk import replaced_forward

CHUNK_NUMBERS = 2**24
"""Logits held at once, as numbers: 64 MiB in float32."""
SMALLEST_CHUNK = 64
"""Tokens of a chunk at least, however large the vocabulary is."""


def chunks(model: Any, number: int) -> Iterator[slice]:
    """Slices of `number` tokens whose logits are held at once."""
    vocabulary = model.get_input_embeddings().num_embeddings
    size = max(SMALLEST_CHUNK, CHUNK_NUMBERS // vocabulary)
    for begin in range(0, number, size):
        yield slice(begin, min(begin + size, number))


def hidden_states(trunk_output: Any) -> Tensor:
    """A packed trunk's last hidden states, `(tokens, width)`."""
    return cast(Tensor, trunk_output.last_hidden_state).squeeze(0)


def head_logits(model: Any, trunk: Any, trunk_output: Any, hidden: Tensor) -> Tensor:
    """What the model makes of a part of its trunk's output.

    Args:
        model: of transformers.
        trunk: its part without the head.
        trunk_output: what the trunk gave for all tokens.
        hidden: `(n, width)`, the hidden states of the tokens that are wanted.

    Returns:
        `(n, vocabulary)`, float32.
    """
    given = type(trunk_output)(**{**trunk_output, "last_hidden_state": hidden[None]})
    with replaced_forward(trunk, lambda *_, **__: given):
        # The ids are read by nobody: the trunk that would embed them has been replaced.
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        return cast(Tensor, model(input_ids=ids, use_cache=False).logits)[0].float()


@dataclass(frozen=True)
class HeadPass:
    """What the forward and backward pass of a head gave.

    Args:
        losses: `(n,)`, the weighted cross-entropy of each labelled token, detached.
        hidden: `(n, width)`, what the head read, still tied to the trunk's graph.
        gradient: `(n, width)`, of the summed losses by `hidden`; None: the trunk trains nothing.
    """

    losses: Tensor
    hidden: Tensor
    gradient: Tensor | None


def head_backward(
    model: Any,
    trunk: Any,
    trunk_output: Any,
    labels: Tensor,
    weights: Tensor,
    spans: Sequence[ClientSpan],
    client_rows: ClientRows,
) -> HeadPass:
    """Run a head forwards and backwards on the labelled tokens; the trunk's turn comes afterwards.

    The head is cut off from the trunk: every chunk's backward pass ends at a copy of the hidden
    states that collects their gradient, so that the trunk runs backwards once and not once a chunk.

    Args:
        model: of transformers; the gradients of what its head trains are added to.
        trunk: its part without the head.
        trunk_output: what the trunk gave, with the hidden states before labelled tokens alone.
        labels: `(n,)`, of these tokens.
        weights: `(n,)`, of each token's loss, float32.
        spans: which of the n tokens belong to which client.
        client_rows: of the model.
    """
    hidden = hidden_states(trunk_output)
    cut_off = hidden.detach().requires_grad_(hidden.requires_grad)
    losses = []
    for at in chunks(model, len(labels)):
        with client_rows.divided(chunked=True, tokens=spans_within(spans, at)):
            logits = head_logits(model, trunk, trunk_output, cut_off[at])
            loss: Tensor = CrossEntropy.apply(logits, labels[at], weights[at])  # type: ignore[no-untyped-call]
            loss.sum().backward()
        losses.append(loss.detach())
        del logits, loss  # before the next chunk's are computed
    return HeadPass(torch.cat(losses), hidden, cut_off.grad)


def auxiliary_losses(model: Any, trunk: Any, trunk_output: Any, tokens: Sequence[int]) -> Tensor:
    """The model's own auxiliary loss of each client's tokens.

    Routers balance their experts over the tokens of a batch, so each client's tokens have to be a
    batch of their own: the model computes the loss from the router's logits of these alone.

    Args:
        model: of transformers, a mixture of experts.
        trunk: its part without the head.
        trunk_output: what the trunk gave for all tokens, with `router_logits`.
        tokens: of each client, side by side.

    Returns:
        `(clients,)`, float32, 0 for a client without tokens.
    """
    losses, begin = [], 0
    for count in tokens:
        if not count:
            device = trunk_output.last_hidden_state.device
            losses.append(torch.zeros((), dtype=torch.float32, device=device))
            continue
        given = type(trunk_output)(
            last_hidden_state=trunk_output.last_hidden_state[:, :1].detach(),
            router_logits=tuple(x[begin : begin + count] for x in trunk_output.router_logits),
        )
        with replaced_forward(trunk, lambda *_, given=given, **__: given):
            ids = torch.zeros(1, 1, dtype=torch.long, device=given.last_hidden_state.device)
            losses.append(model(input_ids=ids, use_cache=False).aux_loss)
        begin += count
    return torch.stack(losses)
