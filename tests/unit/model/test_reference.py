"""The reference is the untouched base, in the same memory."""

from __future__ import annotations

from pathlib import Path

import torch

from fedlora.lowrank import LowRank
from fedlora.model.reference import reference_model
from support.models import load_base


def test_it_is_the_base_without_what_was_learnt(tiny_llama: Path) -> None:
    base = load_base(str(tiny_llama), target_modules="all-linear")
    ids = torch.arange(3, 9)[None]

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits  # type: ignore[no-any-return]

    base.load([])
    of_base = logits(base.model)
    change = {
        name: LowRank(torch.randn(2, n), torch.randn(m, 2))
        for name, (m, n) in base.targets.shapes.items()
    }
    base.load([change], change)
    learnt = logits(base.model)
    reference = reference_model(base.model)
    assert type(reference) is type(base.model)
    assert torch.equal(logits(reference), of_base)
    assert torch.equal(logits(base.model), learnt), "the model itself is as it was"
    assert not torch.equal(learnt, of_base)
    assert not any(p.requires_grad for p in reference.parameters())
    ours = {p.data_ptr() for p in base.model.parameters()}
    assert {p.data_ptr() for p in reference.parameters()} <= ours, "no weight is copied"
