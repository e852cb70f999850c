"""The log-likelihood of every labelled token, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora.commands.eval.likelihood import cross_entropy, per_row
from fedlora.data.tokenize import IGNORE
from support.packing import SIZES, built, rows_of


def test_rows_come_back_in_their_order_whatever_their_batches() -> None:
    model = built("llama", SIZES)
    rows = [dict(row) for row in rows_of([9, 4, 7, 5])]
    rows[0]["labels"] = [IGNORE] * 6 + rows[0]["input_ids"][6:]
    losses = per_row(model, rows, 3, cross_entropy)
    assert [len(x) for x in losses] == [3, 3, 6, 4]
    for row, own in zip(rows, losses, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        p = torch.log_softmax(logits.double(), -1)
        wanted = [-p[i, x] for i, x in enumerate(row["labels"][1:]) if x != IGNORE]
        torch.testing.assert_close(own.double(), torch.stack(wanted), rtol=1e-3, atol=1e-4)


def test_any_measure_of_logits_and_labels() -> None:
    def hit(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([logits.argmax(-1) == labels, labels > 50], -1)

    rows = rows_of([4, 6])
    out = per_row(built("llama", SIZES), rows, 2, hit)
    assert [tuple(x.shape) for x in out] == [(3, 2), (5, 2)]
    assert out[1][:, 1].tolist() == [x > 50 for x in rows[1]["labels"][1:]]
