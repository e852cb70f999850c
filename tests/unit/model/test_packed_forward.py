"""Rows side by side without padding give the logits that each row gives alone."""

from __future__ import annotations

import pytest
import torch

from fedlora.model.packed_forward import PackedForward
from fedlora.model.passes import runner_of
from support.packing import SIZES, built, rows_of


def forward_of(kind: str, classify: bool = False) -> tuple[object, PackedForward]:
    model = built(kind, SIZES, classify=classify)
    return model, runner_of(model).packed_forward


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_of_all_tokens(kind: str) -> None:
    model, forward = forward_of(kind)
    rows = rows_of([5, 9, 3])
    with torch.no_grad():
        packed = forward.all_logits(model, rows)
        alone = [model(input_ids=torch.tensor([r["input_ids"]])).logits[0] for r in rows]  # type: ignore[operator]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_logits_of_a_classifiers_rows() -> None:
    model, forward = forward_of("llama", classify=True)
    rows = rows_of([6, 3, 9], classify=True)
    assert forward.classifier
    with torch.no_grad():
        packed = forward.logits(model, rows)
        alone = [model(input_ids=torch.tensor([r["input_ids"]])).logits[0] for r in rows]  # type: ignore[operator]
    torch.testing.assert_close(packed, torch.stack(alone), rtol=1e-4, atol=1e-4)


def test_the_models_own_attention_comes_back_after_an_error() -> None:
    model, forward = forward_of("llama")
    before = [c._attn_implementation for c in forward.configs]
    during = []

    def fails() -> None:
        with forward.running([rows_of([3])], torch.device("cpu")):
            during.extend(c._attn_implementation for c in forward.configs)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert during != before
    assert [c._attn_implementation for c in forward.configs] == before
    assert model.config._attn_implementation == before[0]  # type: ignore[attr-defined]
