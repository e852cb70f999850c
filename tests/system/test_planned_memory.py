"""The memory that a plan tells from shapes is the memory that training takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.planned import measured_peak, planned

WIDE: dict[str, Any] = {
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
"""58 MB a layer of activations at 1,024 tokens."""
GROUPED: dict[str, Any] = {
    "vocab_size": 16000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
"""Grouped-query attention, and a larger vocabulary."""
SHAPES = {
    "short rows": (WIDE, {"length": 256, "batch": 8, "rank": 16}),
    "long rows": (GROUPED, {"length": 700, "batch": 4, "rank": 64}),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_the_plan_is_within_15_percent_of_the_peak_on_the_cpu(shape: str) -> None:
    sizes, asked = SHAPES[shape]
    expected = planned(sizes, **asked, device="cpu").total
    assert measured_peak(sizes, **asked, device="cpu") == pytest.approx(expected, rel=0.15)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_plan_is_within_15_percent_of_the_peak_on_a_gpu(shape: str) -> None:
    sizes, asked = SHAPES[shape]
    memory = planned(sizes, **asked, device="cuda")
    expected = memory.total - memory.libraries
    assert measured_peak(sizes, **asked, device="cuda") == pytest.approx(expected, rel=0.15)
