"""The frozen base: what is loaded into its layers, and what is read back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedlora.lowrank import LowRank, to_dense
from fedlora.model.base import BaseModel, attach
from fedlora.model.lora_layer import ClientAdapter
from fedlora.model.targets import find_targets
from support.adapters import random_lowrank
from support.packing import SIZES, built


def base(*modules_to_save: str, **more: Any) -> BaseModel:
    """A small Llama with adapter layers at q_proj."""
    model = built("llama", {**SIZES, **more})
    targets = find_targets(model, ["q_proj"], "tiny", modules_to_save=modules_to_save)
    return attach(model, None, targets)


def adapter(it: BaseModel, rank: int, seed: int) -> dict[str, LowRank]:
    """Random factors for every module."""
    return {n: random_lowrank(shape, rank, seed) for n, shape in it.targets.shapes.items()}


def logits(it: BaseModel) -> torch.Tensor:
    """Of a short text."""
    with torch.no_grad():
        out: torch.Tensor = it.model(input_ids=torch.arange(3, 11)[None]).logits
    return out


def test_only_what_is_loaded_requires_gradients() -> None:
    it = base("lm_head")
    assert {n for n, p in it.model.named_parameters() if p.requires_grad} == {"lm_head.weight"}
    it.load([], adapter(it, 2, 0), trains="B")
    assert [name.rpartition(".")[2] for name, _ in it.parameters_of(0)] == ["B", "B", "weight"]


def test_an_update_acts_alike_frozen_trained_or_in_the_weight() -> None:
    it, changed = base(), base()
    update = adapter(it, 2, 0)
    for name, x in update.items():
        changed.layers[name].weight.data += to_dense(x)
    wanted = logits(changed)
    assert not torch.allclose(logits(it), wanted, atol=1e-3)
    it.load([update])
    torch.testing.assert_close(logits(it), wanted, rtol=1e-4, atol=1e-4)
    it.load([], {n: LowRank(x.A, x.B) for n, x in update.items()}, scale=2.0)
    torch.testing.assert_close(logits(it), wanted, rtol=1e-4, atol=1e-4)
    it.load([])
    torch.testing.assert_close(logits(it), logits(base()), rtol=0, atol=0)


def test_each_client_of_a_pass_is_read_from_its_slot() -> None:
    it = base("lm_head")
    updates = [adapter(it, 2, 0), adapter(it, 3, 1)]
    heads = [{"lm_head.weight": torch.full((100, 32), float(k))} for k in range(2)]
    it.load_clients(
        [], [ClientAdapter(x, full_params=h) for x, h in zip(updates, heads, strict=True)]
    )
    for client in range(2):
        for name, x in it.read_adapter(client).items():
            assert torch.equal(x.B, updates[client][name].B)
        assert float(it.read_full_params(client)["lm_head.weight"].mean()) == client
    own = it.full_params["lm_head.weight"].detach()
    assert own.std() > 0  # the model's own are untouched


def test_nothing_to_read_is_an_error() -> None:
    it = base()
    with pytest.raises(ValueError, match="the model holds no adapter"):
        it.read_adapter()


def test_a_tensor_in_two_places_is_known() -> None:
    assert not base("lm_head").tied
    assert base("lm_head", tie_word_embeddings=True).tied
