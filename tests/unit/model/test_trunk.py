"""A classifier's trunk runs without padding between a model and a head that see padded rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedlora.model.trunk import replaced_forward, unpadded_trunk

MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0]])
IDS = torch.tensor([[1, 2, 3, 9], [9, 4, 5, 9]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1]])


class Output(SimpleNamespace):
    """As transformers' outputs: by name and by key."""

    def __setitem__(self, name: str, value: Tensor) -> None:
        setattr(self, name, value)


class Trunk(nn.Module):
    """Gives each token's id and position, and pools by the first token of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.pooler = Pooler()
        self.seen: dict[str, Any] = {}

    def forward(self, input_ids: Tensor, position_ids: Tensor, **named: Any) -> Output:
        self.seen = {"input_ids": input_ids, **named}
        hidden = torch.stack([input_ids, position_ids], -1).float()
        return Output(last_hidden_state=hidden, pooled=self.pooler(hidden))


class Pooler(nn.Module):
    """Takes the first token of every row."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[:, 0]


def test_inside_there_is_no_padding_and_outside_there_is() -> None:
    trunk = Trunk()
    types = torch.tensor([[0, 0, 1, 7], [7, 0, 1, 7]])
    with unpadded_trunk(trunk, lambda device: POSITIONS.to(device)):
        out: Any = trunk(input_ids=IDS, attention_mask=MASK, token_type_ids=types)  # type: ignore[call-arg]
    assert trunk.seen["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert trunk.seen["token_type_ids"].tolist() == [[0, 0, 1, 0, 1]]
    assert out.last_hidden_state[..., 0].tolist() == [[1, 2, 3, 0], [0, 4, 5, 0]]
    assert out.last_hidden_state[..., 1].tolist() == [[0, 1, 2, 0], [0, 0, 1, 0]]
    assert out.pooled[:, 0].tolist() == [1, 0]  # the first cell of each padded row


def test_a_forward_is_put_back_whatever_happens() -> None:
    module = nn.Identity()
    with replaced_forward(module, lambda x: x + 1), replaced_forward(module, lambda x: x + 2):
        assert module(1) == 3
    assert module(1) == 1
    assert "forward" not in module.__dict__
    module.forward = lambda x: x + 5  # type: ignore[method-assign]
    with pytest.raises(RuntimeError), replaced_forward(module, lambda x: x):
        raise RuntimeError
    assert module(1) == 6
