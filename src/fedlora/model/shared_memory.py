"""Makes tensors that forked processes share."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


def shared_like(like: Tensor) -> Tensor:
    """A contiguous tensor of this shape and dtype, zero, in memory that forked processes share.

    The memory is an anonymous mapping: it takes none until it is written to, is freed with the last
    process, and is not bounded by the size of /dev/shm, which containers keep small.
    """
    memory = mmap.mmap(-1, like.numel() * like.element_size())
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)
