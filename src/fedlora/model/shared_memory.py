"""Makes tensors that forked processes share."""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

_DONT_NEED = 4  # MADV_DONTNEED
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S{4} [0-9a-f]+ \S+ (\d+)")  # a line of smaps


def shared_like(like: Tensor) -> Tensor:
    """A contiguous tensor of this shape and dtype, zero, in memory that forked processes share.

    The memory is an anonymous mapping: it takes none until it is written to, is freed with the last
    process, and is not bounded by the size of /dev/shm, which containers keep small.
    """
    memory = mmap.mmap(-1, like.numel() * like.element_size())
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)


def unmap_pages(tensors: Iterable[Tensor]) -> None:
    """Give back this process's pages of tensors that lie in a file; they are read again when used.

    A page that is no unchanged part of a file stays, for nothing could bring it back. Does nothing
    where the system does not tell (`/proc/self/smaps`, Linux).
    """
    try:
        unchanged = _unchanged_files(Path("/proc/self/smaps").read_text())
        madvise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError, ValueError):
        return
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for value in tensors:
        begin = -(-value.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (value.data_ptr() + value.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end and any(first <= begin and end <= last for first, last in unchanged):
            madvise(begin, end - begin, _DONT_NEED)


def _unchanged_files(smaps: str) -> list[tuple[int, int]]:
    """The addresses of mapped files of which this process has changed no page."""
    places, kept = dict[tuple[int, int], int](), None
    for line in smaps.splitlines():
        if found := _MAPPING.match(line):
            begin, end, inode = found.groups()
            kept = (int(begin, 16), int(end, 16)) if int(inode) else None
            if kept:
                places[kept] = 0
        elif kept and line.startswith(("Anonymous:", "Swap:")):
            places[kept] += int(line.split()[1])
    return [place for place, changed in places.items() if not changed]
