"""Bytes of living tensors are counted, with memory and without."""

from __future__ import annotations

import pytest
import torch

from fedlora.client.live_bytes import LiveBytes


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_peak_is_what_is_alive_at_once(device: str) -> None:
    with LiveBytes(device_type=device) as live:
        x = torch.empty(100, device=device)
        y = x + x
        assert live.now == 800
        del y
        z = x.view(10, 10)  # the same memory
        assert live.now == 400
        del x, z
    assert live.now == 0
    assert live.peak == 800


def test_what_was_there_before_is_not_counted() -> None:
    x = torch.empty(100, device="meta")
    with LiveBytes([x]) as live:
        x.add_(1)
        x.view(10, 10)
    assert live.peak == 0


def test_a_question_about_values_is_answered_with_no() -> None:
    with LiveBytes():
        assert not bool(torch.empty(3, device="meta").all())
        assert int(torch.empty((), dtype=torch.long, device="meta")) == 0
        assert not torch.equal(torch.empty(2, device="meta"), torch.empty(2, device="meta"))
