"""Draws the dropout of a model's own layers from each client's own stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.model.client_rows import ClientRows, RowLayout

SITES = 1_000_000
"""Where the sites of a model's own dropout layers begin, see `ClientRows.keep`."""


def client_dropout(
    module: nn.Dropout,
    number: int,
    layouts: Mapping[int, RowLayout],
    client_rows: ClientRows,
    clients: int,
) -> Callable[[Tensor], Tensor]:
    """A `forward` that drops what each client's own stream says, whoever else is in the pass.

    Args:
        module: the layer whose `forward` it stands in for.
        number: of the layer among the model's dropout layers; it names the stream.
        layouts: where the clients' rows lie in its input, by the input's number of axes.
        client_rows: of the model.
        clients: in the pass.
    """

    def forward(x: Tensor) -> Tensor:
        if not module.training or not client_rows.has_streams:
            return F.dropout(x, module.p, module.training)
        layout = layouts.get(x.ndim)
        if layout is None or layout.in_order(x):
            return dropped(x, layout)
        return layout.undo_rows_first(
            dropped(layout.rows_first(x, client_rows.count(layout.unit)), layout)
        )

    def dropped(x: Tensor, layout: RowLayout | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        rows_each = len(rows) // client_rows.count(layout.unit) if layout else 1
        parts = []
        for span in client_rows.spans(len(rows), clients, layout):
            part = rows[span.begin : span.end]
            keep = client_rows.keep(
                span.client, SITES + number, part.shape, module.p, x.device, span.first, rows_each
            )
            parts.append(part * (keep.to(x.dtype) / (1 - module.p)))
        return torch.cat(parts).view_as(x)

    return forward
