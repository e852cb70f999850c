"""What a training of the user's own does to a model is undone, but for what is learnt."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedlora.model.left_as_it_was import left_as_it_was


class Model(nn.Module):
    """A linear layer behind dropout, with a configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(2, 2), nn.Dropout(0.5)
        self.register_buffer("scale", torch.ones(1))
        self.config = SimpleNamespace(use_cache=True, nested={"pad": 0})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.linear(self.dropout(x))


def change(model: Model) -> None:
    """All that trainers do to a model."""
    model.forward = lambda x: x  # type: ignore[method-assign, assignment]
    model.eval()
    model.dropout.p = 0.0
    model.linear.register_forward_hook(lambda *_: None)
    model.linear = nn.Sequential(model.linear)  # type: ignore[assignment]
    model.scale = torch.zeros(1)
    model.config.use_cache, model.config.nested["pad"] = False, 1
    model.config.more = model.more = "of it"  # type: ignore[assignment]


def test_all_but_what_is_learnt_is_undone() -> None:
    model = Model()
    linear, weight = model.linear, model.linear.weight
    with left_as_it_was(model):
        with torch.no_grad():
            weight.fill_(3.0)
        linear.bias = nn.Parameter(torch.full((2,), 5.0))
        change(model)
        assert model(torch.ones(1, 2)).tolist() == [[1.0, 1.0]]
    assert model.linear is linear
    assert model.linear.weight is weight
    assert weight.unique().tolist() == [3.0]
    assert linear.bias.tolist() == [5.0, 5.0]
    assert (model.training, model.dropout.p, model.scale.item()) == (True, 0.5, 1.0)
    assert not linear._forward_hooks
    assert vars(model.config) == {"use_cache": True, "nested": {"pad": 0}}
    assert not hasattr(model, "more")
    model.eval()
    assert model(torch.ones(1, 2)).tolist() == [[11.0, 11.0]]


def test_it_is_undone_after_an_error_too() -> None:
    model = Model()
    with pytest.raises(KeyError), left_as_it_was(model):
        _ = [change(model), {}["missing"]]
    assert "forward" not in vars(model)
    assert model.dropout.p == 0.5


def test_the_handle_of_a_hook_from_before_still_removes_it() -> None:
    model = Model()
    handle = model.linear.register_forward_hook(lambda *_: None)
    with left_as_it_was(model):
        model.linear.register_forward_hook(lambda *_: None)
    assert len(model.linear._forward_hooks) == 1
    handle.remove()
    assert not model.linear._forward_hooks
