"""Dropout of a model's own layers, drawn from each client's own stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedlora.model.client_dropout import client_dropout
from fedlora.model.client_rows import ClientRows, RowLayout, spans_of

P, WIDTH = 0.25, 400
IN_ORDER = {3: RowLayout(1)}
"""`(1, tokens, width)`."""


def dropped(
    x: Tensor, counts: list[int], seeds: list[int], forms: dict[int, RowLayout], number: int = 0
) -> Tensor:
    """What the layer makes of the tokens of clients with these seeds."""
    rows = ClientRows()
    forward = client_dropout(nn.Dropout(P).train(), number, forms, rows, len(counts))
    with rows.seeded(seeds), rows.divided(tokens=spans_of(counts)):
        return forward(x)


def test_the_kept_entries_are_scaled_and_as_many_as_they_should_be() -> None:
    out = dropped(torch.ones(1, 50, WIDTH), [50], [7], IN_ORDER)
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / (1 - P)).item()}
    share = float((out == 0).float().mean())
    assert abs(share - P) < 0.01  # 20,000 draws: a standard deviation of 0.003


def test_a_client_draws_the_same_whoever_is_beside_it() -> None:
    x = torch.ones(1, 9, WIDTH)
    alone = dropped(x[:, 4:], [5], [8], IN_ORDER)
    together = dropped(x, [4, 5], [7, 8], IN_ORDER)
    assert torch.equal(together[:, 4:], alone)
    assert not torch.equal(dropped(x[:, 4:], [5], [9], IN_ORDER), alone)


def test_layers_draw_from_streams_of_their_own() -> None:
    x = torch.ones(1, 5, WIDTH)
    one, other = (dropped(x, [5], [7], IN_ORDER, number) for number in (0, 1))
    assert not torch.equal(one, other)


def test_tokens_along_another_axis_draw_what_they_draw_in_order() -> None:
    """`(tokens, heads * d)` as `(1, heads, tokens, d)`: each token's entries stay together."""
    heads = {4: RowLayout(2)}
    x = torch.ones(1, 2, 9, WIDTH)
    together = dropped(x, [4, 5], [7, 8], heads)
    assert torch.equal(together[:, :, 4:], dropped(x[:, :, 4:], [5], [8], heads))
    assert together.shape == x.shape


def test_in_evaluation_nothing_is_dropped() -> None:
    forward = client_dropout(nn.Dropout(P).eval(), 0, IN_ORDER, ClientRows(), 1)
    x = torch.randn(1, 5, WIDTH)
    assert torch.equal(forward(x), x)
