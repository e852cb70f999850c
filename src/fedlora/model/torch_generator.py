"""Lends torch's default random generator to one user at a time.

torch has one default generator for all threads of a process. Whoever seeds it, or looks whether
something has drawn from it, does so in here, so that threads that train other models meanwhile
change neither the numbers that are drawn nor the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock

import torch

_lock = RLock()


@contextmanager
def borrowed_generator(
    gpus: Sequence[int | torch.device], seed: int | None = None
) -> Iterator[None]:
    """Use the default generators of the CPU and of these GPUs; afterwards they are as before.

    Args:
        gpus: the CUDA devices whose generators may be drawn from.
        seed: what they are seeded with; None: they go on from where they stand.
    """
    with _lock, torch.random.fork_rng(devices=list(gpus)):
        if seed is not None:
            torch.manual_seed(seed)
        yield
