"""Makes updates of every kind for the modules of a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from fedlora.lowrank import Delta, Dense, LowRank, to_dense
from fedlora.model.targets import Targets

LLAMA_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def plain_model(path: Path) -> Any:
    """The untouched base."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def random_lowrank(shape: tuple[int, int], rank: int, seed: int, size: float = 0.1) -> LowRank:
    """Normal factors of a fixed seed."""
    rng = torch.Generator().manual_seed(seed)
    m, n = shape
    return LowRank(
        size * torch.randn(rank, n, generator=rng), size * torch.randn(m, rank, generator=rng)
    )


def mixed_deltas(targets: Targets) -> dict[str, Delta]:
    """Every kind of update at once: ranks 0 to 5, a dense one, and a module left out."""
    out: dict[str, Delta] = {}
    for i, (name, shape) in enumerate(targets.shapes.items()):
        if i == 1:
            continue
        x = random_lowrank(shape, i % 6, i)
        out[name] = Dense(to_dense(random_lowrank(shape, 30, 100 + i))) if i == 4 else x
    return out
