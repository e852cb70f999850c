"""Estimates how much memory clients that train together need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedlora.client.cohort import ENOUGH_TOKENS
from fedlora.data.tokenize import Tokens
from fedlora.lowrank import Adapter, LowRank
from fedlora.model.base import BaseModel
from fedlora.model.head import CHUNK_NUMBERS
from fedlora.model.lora_layer import ClientAdapter
from fedlora.model.passes import runner_of
from fedlora.seeds import Purpose, fresh_factors

_STATE_BYTES = 16
"""Of a trained number: itself, its gradient and two moments in float32."""


@dataclass(frozen=True)
class MemoryNeed:
    """What one client needs in a pass: memory at its largest, tokens as they usually are.

    Args:
        tokens: of a micro-batch, on average over the clients.
        activations: bytes kept for the backward pass.
        state: bytes of its parameters, their gradients and the optimiser's moments.
    """

    tokens: int
    activations: int
    state: int

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.activations + self.state


def largest_need(
    base: BaseModel, clients: Sequence[tuple[Sequence[Tokens], int, int]], seed: int = 0
) -> MemoryNeed:
    """What the largest micro-batch any client can have keeps, by a forward pass of its longest row.

    Args:
        base: the model; it holds no adapters afterwards.
        clients: of each its rows, its micro-batch's size and its rank; at least one with rows.
        seed: of the adapter that is tried.
    """

    def longest(rows: Sequence[Tokens], size: int) -> list[Tokens]:
        return sorted(rows, key=lambda row: len(row["input_ids"]))[-size:]

    batches = [longest(rows, size) for rows, size, _ in clients if rows]
    batch = max(batches, key=_tokens)
    rank = max(rank for rows, _, rank in clients if rows)
    draw = fresh_factors(seed, 0, 0, Purpose.CLIENT_INIT, base.targets.shapes)
    adapter: Adapter = {
        name: LowRank(draw(name, rank), torch.zeros(m, rank))
        for name, (m, _) in base.targets.shapes.items()
    }
    base.load_clients([], [ClientAdapter(adapter, full_params=base.read_full_params())])
    row = max(batch, key=lambda row: len(row["input_ids"]))
    known = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        where = x.untyped_storage()
        if where.data_ptr() not in known:
            kept[where.data_ptr()] = where.nbytes()
        return x

    base.model.train()
    # What is kept has to stay until it is counted: a freed address would be taken again.
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), torch.enable_grad():
        out = runner_of(base.model).forward(base.model, [row])
    del out
    base.model.eval()
    numbers = sum(p.numel() for _, p in base.parameters_of(0))
    base.load_clients([], [])
    activations = sum(kept.values()) * _tokens(batch) // len(row["input_ids"])
    usual = [min(size, len(rows)) * _tokens(rows) / len(rows) for rows, size, _ in clients if rows]
    return MemoryNeed(round(sum(usual) / len(usual)), activations, _STATE_BYTES * numbers)


def _tokens(rows: Sequence[Tokens]) -> int:
    return sum(len(row["input_ids"]) for row in rows)


def memory_available(device: torch.device) -> int:
    """Bytes that are free now, on the GPU or in the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = Path("/proc/meminfo")
    if found.exists():
        lines = dict(line.split(":", 1) for line in found.read_text().splitlines() if ":" in line)
        return int(lines["MemAvailable"].split()[0]) * 1024
    return 4 * 2**30


def automatic_size(need: MemoryNeed, clients: int, budget: int, device: torch.device) -> int:
    """How many clients share a pass: as many as the budget holds and as make it faster.

    Args:
        need: of one client, at its largest.
        clients: of a round.
        budget: bytes.
        device: where the base is.
    """
    held = max(1, (budget - 4 * CHUNK_NUMBERS * 4) // max(need.nbytes, 1))
    enough = max(1, ENOUGH_TOKENS.get(device.type, 2**12) // max(need.tokens, 1))
    return int(min(clients, held, enough))
