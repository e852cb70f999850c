"""Tensors in memory that forked processes share."""

from __future__ import annotations

import pytest
import torch

from fedlora.model.shared_memory import shared_like


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_dtype_and_values(dtype: torch.dtype) -> None:
    like = torch.ones(3, 5, dtype=dtype)
    made = shared_like(like)
    assert (made.shape, made.dtype) == (like.shape, dtype)
    assert made.is_contiguous()
    assert not made.any()
    made.copy_(like)
    assert torch.equal(made, like)
    assert made.data_ptr() % 64 == 0  # as torch's own, so that products give the same bits
