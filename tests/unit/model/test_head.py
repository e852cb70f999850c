"""A language model's loss on labelled tokens alone and in chunks, against the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fedlora.model import head
from fedlora.model.client_rows import ClientRows, spans_of
from fedlora.model.head import auxiliary_losses, chunks, head_backward, head_logits, hidden_states
from support.packing import SIZES, built, routed

IDS = torch.arange(3, 15)[None]


def test_chunks_cover_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("llama", SIZES)
    assert list(chunks(model, 5)) == [slice(0, 5)]
    monkeypatch.setattr(head, "CHUNK_NUMBERS", 100 * 70)
    assert list(chunks(model, 150)) == [slice(0, 70), slice(70, 140), slice(140, 150)]
    monkeypatch.setattr(head, "CHUNK_NUMBERS", 1)
    assert next(chunks(model, 150)) == slice(0, head.SMALLEST_CHUNK)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_heads_logits_are_the_models_with_all_it_does_to_them(name: str) -> None:
    """Gemma 2 caps its logits softly."""
    more: dict[str, Any] = {"head_dim": 8, "final_logit_softcapping": 2.0}
    model = built(name, {**SIZES, **(more if name == "gemma2" else {})})
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits[0]
        out = model.model(input_ids=IDS)
        part = hidden_states(out)[4:9]
        torch.testing.assert_close(head_logits(model, model.model, out, part), wanted[4:9])


def test_losses_and_gradients_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_NUMBERS", 1)
    monkeypatch.setattr(head, "SMALLEST_CHUNK", 2)
    model = built("llama", SIZES)
    at, labels = torch.tensor([1, 4, 5, 8, 9]), torch.tensor([7, 8, 9, 10, 11])
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 3.0])
    whole = F.cross_entropy(model(input_ids=IDS).logits[0, at], labels, reduction="none") * weights
    whole.sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    out = model.model(input_ids=IDS)
    out["last_hidden_state"] = out.last_hidden_state[:, at]
    spans = spans_of([2, 3])
    result = head_backward(model, model.model, out, labels, weights, spans, ClientRows())
    assert result.gradient is not None
    result.hidden.backward(result.gradient)
    torch.testing.assert_close(result.losses, whole.detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-5)


def test_auxiliary_losses_are_those_of_each_clients_tokens_alone() -> None:
    model = routed("mixtral")
    with torch.no_grad():
        out = model.model(input_ids=IDS, output_router_logits=True)
        losses = auxiliary_losses(model, model.model, out, [5, 0, 7])
        first = model.model(input_ids=IDS[:, :5], output_router_logits=True)
        alone = auxiliary_losses(model, model.model, first, [5])
    torch.testing.assert_close(losses[0], alone[0], rtol=1e-4, atol=1e-5)
    assert float(losses[1]) == 0.0
    assert float(losses[2]) > 0.0
