"""Which layers of a model can carry an adapter, found by running them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fedlora.model.layers import (
    is_conv1d,
    is_plain,
    replace_module,
    shape_of,
    short_pass,
    undisturbed,
    why_bypassed,
    why_unfit,
)


class Pair(nn.Linear):
    """Gives two tensors, as routers do."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Wider(nn.Linear):
    """Gives more outputs than its weight has."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x)] * 2, -1)


class Model(nn.Module):
    """An embedding and two layers, one of which it may use by its weight alone."""

    def __init__(self, bypass: bool = False) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 20)
        self.bypass, self.drop = bypass, nn.Dropout(0.5)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = self.embed(input_ids)
        x = F.linear(x, self.a.weight) if self.bypass else self.a(x)
        return SimpleNamespace(logits=self.b(self.drop(x)))


def test_plain_layers_and_their_shapes() -> None:
    assert is_plain(nn.Linear(3, 5))
    assert shape_of(nn.Linear(3, 5)) == (5, 3)
    conv = Conv1D(5, 3)  # of 5 outputs, 3 inputs
    assert is_conv1d(conv)
    assert is_plain(conv)
    assert shape_of(conv) == (5, 3)
    hooked = nn.Linear(3, 5)
    hooked.register_forward_hook(lambda *_: None)
    patched = nn.Linear(3, 5)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    assert not any(map(is_plain, (Pair(3, 5), hooked, patched, nn.Embedding(3, 5))))


def test_layers_that_make_something_else_are_unfit() -> None:
    model = nn.ModuleDict({"pair": Pair(3, 5), "wider": Wider(3, 5), "plain": nn.Linear(3, 5)})
    why = why_unfit(model.to("meta"), dict(model.items()))
    assert why["pair"] == "gives a tuple instead of one tensor"
    assert why["wider"].endswith("where 5 outputs a row were expected")
    assert "plain" not in why


def test_a_weight_that_is_read_past_its_layer_is_found() -> None:
    for bypass in (False, True):
        model = Model(bypass)
        why = why_bypassed(model, {"a": model.a, "b": model.b})
        assert why == ({"a": "has its weight read past the layer"} if bypass else {})
        assert isinstance(model.a, nn.Linear)  # it is back in its place


def test_undisturbed_leaves_modes_and_draws_as_they_were() -> None:
    model = Model().train()
    model.drop.eval()
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    with undisturbed(model, training=True):
        assert model.drop.training
        assert not torch.is_grad_enabled()
        torch.rand(5)
    assert torch.equal(torch.rand(1), wanted)
    assert model.training
    assert not model.drop.training


def test_a_short_pass_is_the_same_every_time() -> None:
    model = Model().eval()
    assert short_pass(model).shape == (1, 8, 20)
    assert torch.equal(short_pass(model, 1), short_pass(model, 1))
    assert not torch.equal(short_pass(model, 1), short_pass(model, 2))


def test_a_module_is_replaced_by_its_name() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1)))
    replace_module(model, "0.0", nn.Identity())
    assert isinstance(model[0][0], nn.Identity)  # type: ignore[index]
    with pytest.raises(AttributeError):
        replace_module(model, "absent.0", nn.Identity())
