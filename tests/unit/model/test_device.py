"""Where a model lies."""

from __future__ import annotations

import torch
from torch import nn

from fedlora.model.device import device_of


def test_it_is_where_the_parameters_are() -> None:
    assert device_of(nn.Linear(2, 2)) == torch.device("cpu")
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
