"""Models that cannot be packed as they are: a mask of their own, another auxiliary loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.errors import InputError
from fedlora.model.passes import runner_of
from support.packing import SIZES, built, found, routed, rows_of


def test_a_mask_that_only_comes_with_length_is_met_with_padding() -> None:
    """A model that makes a mask of its own once rows are longer than was tried."""
    model = built("llama", SIZES)
    passes = runner_of(model)
    assert passes.packed
    run = model.model.forward

    def forward(input_ids: Tensor, **named: Any) -> Any:
        n = input_ids.shape[1]
        if n > 32:
            bar = torch.full((n, n), float("-inf"))
            named["attention_mask"] = (bar.triu(1) + bar.tril(-8))[None, None]
        return run(input_ids=input_ids, **named)

    model.model.forward = forward
    rows = rows_of([20, 60, 25, 40])
    with torch.no_grad():
        wanted = [model(input_ids=torch.tensor([r["input_ids"]])).logits[0, :-1] for r in rows]
    for x, y in zip(found(model, rows), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert passes.longest < 60


def test_an_auxiliary_loss_of_another_form_is_refused() -> None:
    model = routed("mixtral")
    run = model.forward

    def forward(**named: Any) -> Any:
        out = run(**named)
        if named.get("labels") is not None:
            out["loss"] = out.loss + out.logits.square().mean()
        return out

    model.forward = forward
    with pytest.raises(InputError, match="set it to false"):
        runner_of(model)
