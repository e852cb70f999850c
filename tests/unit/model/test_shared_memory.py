"""Tensors in memory that forked processes share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedlora.model.shared_memory import shared_like, unmap_pages


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


def resident(value: Tensor) -> int:
    """KiB of the mapping that a tensor lies in which are in this process's memory."""
    begin, inside = value.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        ends = line.split()[0].split("-")
        if len(ends) == 2:
            inside = int(ends[0], 16) <= begin < int(ends[1], 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1])
    raise AssertionError("it lies nowhere")


def mapped(path: Path, numbers: int) -> Tensor:
    """A tensor whose memory is a file's; what is written to it does not reach the file."""
    torch.arange(numbers, dtype=torch.float32).numpy().tofile(path)
    return torch.from_file(str(path), shared=False, size=numbers, dtype=torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which pages are a file's")
def test_pages_of_a_file_are_given_back_and_read_again(tmp_path: Path) -> None:
    value = mapped(tmp_path / "weights", 2**20)
    total = value.sum()
    assert resident(value) >= 4000
    unmap_pages([value])
    assert resident(value) <= 8
    assert value.sum() == total


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which pages are a file's")
def test_what_no_file_holds_stays(tmp_path: Path) -> None:
    changed, own = mapped(tmp_path / "weights", 2**20), torch.ones(2**20)
    changed[1000] = 7.0
    shared = shared_like(own).fill_(2.0)
    unmap_pages([changed, own, shared])
    assert changed[1000] == 7.0
    assert own.sum() == 2**20
    assert shared.sum() == 2**21
