"""Draws the dropout of a model's own layers from each client's own stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.model.client_rows import ClientRows, Form

SITES = 1_000_000
"""Where the sites of a model's own dropout layers begin, see `ClientRows.keep`."""


def client_dropout(
    module: nn.Dropout,
    number: int,
    forms: Mapping[int, Form],
    client_rows: ClientRows,
    clients: int,
) -> Callable[[Tensor], Tensor]:
    """A `forward` that drops what each client's own stream says, whoever else is in the pass.

    Args:
        module: the layer whose `forward` it stands in for.
        number: of the layer among the model's dropout layers; it names the stream.
        forms: where the clients' rows lie in its input, by the input's number of axes.
        client_rows: of the model.
        clients: in the pass.
    """

    def forward(x: Tensor) -> Tensor:
        if not module.training or not client_rows.streams:
            return F.dropout(x, module.p, module.training)
        form = forms.get(x.ndim)
        if form is None or form.in_order(x):
            return dropped(x, form)
        return form.back(dropped(form.first(x, client_rows.number(form.unit)), form))

    def dropped(x: Tensor, form: Form | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        rows_each = len(rows) // client_rows.number(form.unit) if form else 1
        parts = []
        for span in client_rows.spans(len(rows), clients, form):
            part = rows[span.begin : span.end]
            keep = client_rows.keep(
                span.client, SITES + number, part.shape, module.p, x.device, span.first, rows_each
            )
            parts.append(part * (keep.to(x.dtype) / (1 - module.p)))
        return torch.cat(parts).view_as(x)

    return forward
