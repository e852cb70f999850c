"""A model's own pass in a wider dtype, against the model converted to that dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedlora.model.wide import (
    SAME_SHAPES,
    ForwardState,
    WideMode,
    computing_in,
    nearly_equal,
    wide_dtype,
)
from support.packing import MIXTURES, SIZES, built


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_narrow_model_computes_in_float64(dtype: torch.dtype) -> None:
    model = built("llama", SIZES, dtype=dtype)
    ids = torch.arange(3, 15)[None]
    exact = copy.deepcopy(model).double()
    with torch.no_grad(), computing_in([model.config], torch.float64):
        logits = model(input_ids=ids).logits
    with torch.no_grad():
        wanted = exact(input_ids=ids).logits
    assert logits.dtype == torch.float64
    assert nearly_equal(logits, wanted, torch.float64, 100)  # rotary factors are float32 in one
    assert next(model.parameters()).dtype == dtype


def test_single_operations() -> None:
    weight, x = torch.randn(4, 3).bfloat16(), torch.randn(2, 3, dtype=torch.float64)
    with WideMode(torch.float64):
        assert torch.equal(F.linear(x, weight), x @ weight.double().T)
        assert torch.zeros(2).dtype == torch.float64
        assert torch.tensor([0.1]).item() == 0.1
        assert torch.tensor([1]).dtype == torch.int64
        assert torch.arange(3).dtype == torch.int64
        assert weight.float().dtype == torch.float64
        assert (torch.tensor([1]) / 3).dtype == torch.float64
        into = torch.zeros(3, dtype=torch.float32, out=torch.empty(3, dtype=torch.float64))
        into[0] = 1 / 3
    assert torch.zeros(2).dtype == torch.float32


def test_experts_are_computed_one_by_one_meanwhile() -> None:
    name, config = MIXTURES["mixtral"]
    model = built(name, config)
    before = model.config._experts_implementation_internal
    with computing_in([model.config], torch.float64):
        assert model.config._experts_implementation_internal == "eager"
    assert model.config._experts_implementation_internal == before


def test_a_state_that_a_pass_changes_is_put_back() -> None:
    class Growing(nn.Module):
        """Remembers the longest input."""

        def __init__(self) -> None:
            super().__init__()
            self.longest = 0
            self.register_buffer("factors", torch.ones(2), persistent=False)

        def forward(self, length: int) -> None:
            self.longest, self.seen = max(self.longest, length), True
            self.factors *= length

    model = nn.Sequential(Growing())
    state = ForwardState(model)
    for _ in range(2):
        model[0](7)
        state.restore()
        assert model[0].longest == 0
        assert not hasattr(model[0], "seen")
        assert torch.equal(model[0].factors, torch.ones(2))


def test_equal_but_for_rounding() -> None:
    x = torch.tensor([100.0, 1.0])
    assert nearly_equal(x + 9e-3, x, torch.float32)  # 1e-4 of the largest
    assert not nearly_equal(x + 2e-2, x, torch.float32)
    assert not nearly_equal(x + 9e-3, x, torch.float32, SAME_SHAPES)
    assert not nearly_equal(x, x[:1], torch.float32)
    assert not nearly_equal(x, torch.tensor([float("nan"), 1.0]), torch.float32)
    assert wide_dtype(nn.Linear(2, 2)) == torch.float64
