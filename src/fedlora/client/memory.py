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
"""Bytes per trained parameter: its value, its gradient and AdamW's two moments, all float32."""


@dataclass(frozen=True)
class MemoryNeed:
    """What one client needs in a pass: the most memory, and the usual number of tokens.

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
    """What a client needs at most, measured on the largest micro-batch that any client can have.

    Only its longest row is run; the others are estimated from their tokens. So finding out what
    fits takes less memory than the training itself.

    Args:
        base: the model; it holds no adapters afterwards.
        clients: of each its rows, its micro-batch size and its rank; at least one has rows.
        seed: of the adapter that is tried.
    """
    with_rows = [client for client in clients if client[0]]
    batch = max((_longest_rows(rows, size) for rows, size, _ in with_rows), key=_tokens)
    row = max(batch, key=lambda row: len(row["input_ids"]))
    adapter = _fresh_adapter(base, max(rank for _, _, rank in with_rows), seed)
    base.load_clients([], [ClientAdapter(adapter, full_params=base.read_full_params())])
    kept = _bytes_kept(base, row)
    trained = sum(p.numel() for _, p in base.parameters_of(0))
    base.load_clients([], [])
    usual = [min(size, len(rows)) * _tokens(rows) / len(rows) for rows, size, _ in with_rows]
    return MemoryNeed(
        tokens=round(sum(usual) / len(usual)),
        activations=kept * _tokens(batch) // len(row["input_ids"]),
        state=_STATE_BYTES * trained,
    )


def _longest_rows(rows: Sequence[Tokens], number: int) -> list[Tokens]:
    return sorted(rows, key=lambda row: len(row["input_ids"]))[-number:]


def _fresh_adapter(base: BaseModel, rank: int, seed: int) -> Adapter:
    """An adapter of this rank for every target module, as a client's first one is."""
    draw = fresh_factors(seed, 0, 0, Purpose.CLIENT_INIT, base.targets.shapes)
    return {
        name: LowRank(draw(name, rank), torch.zeros(m, rank))
        for name, (m, _) in base.targets.shapes.items()
    }


def _bytes_kept(base: BaseModel, row: Tokens) -> int:
    """Bytes that a training pass of one row keeps for its backward pass, the weights aside.

    Tensors that share memory are counted once, by the address of what they share.
    """
    weights = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
    sizes: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    base.model.train()
    # All tensors must live until they are counted: a freed address would be used again.
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), torch.enable_grad():
        out = runner_of(base.model).forward(base.model, [row])
    del out
    base.model.eval()
    return sum(sizes.values())


def _tokens(rows: Sequence[Tokens]) -> int:
    return sum(len(row["input_ids"]) for row in rows)


def memory_available(device: torch.device) -> int:
    """Bytes that are free now, on the GPU or in the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        return int(lines["MemAvailable"].split()[0]) * 1024
    return 4 * 2**30


def automatic_size(
    need: MemoryNeed, clients: int, available_bytes: int, device: torch.device
) -> int:
    """How many clients share a pass: as many as fit into memory and still make it faster.

    Args:
        need: of one client, at most.
        clients: of a round.
        available_bytes: that the pass may take.
        device: where the base is.
    """
    fitting = max(1, (available_bytes - 4 * CHUNK_NUMBERS * 4) // max(need.nbytes, 1))
    enough = max(1, ENOUGH_TOKENS.get(device.type, 2**12) // max(need.tokens, 1))
    return int(min(clients, fitting, enough))
