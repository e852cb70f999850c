"""Tells from shapes alone how much memory a client's training takes.

The passes of a model on the meta device make the same tensors as the real ones, without numbers and
without memory. Counting what is alive at once (`live_bytes`) gives the peak of a pass before any
weight is read, by the very code that trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedlora.client.live_bytes import LiveBytes
from fedlora.data.tokenize import Tokens
from fedlora.lowrank import LowRank
from fedlora.model.base import BaseModel
from fedlora.model.lora_layer import ClientAdapter
from fedlora.model.packed_attention import as_on_gpu
from fedlora.model.passes import runner_of

LIBRARIES = {"cpu": 500_000_000, "cuda": 500_000_000}
"""Bytes that Python with torch and transformers takes before anything is loaded: on the CPU in
memory, on a GPU for the CUDA context and the libraries' workspaces."""


FRAGMENTED = {"cpu": 1.2, "cuda": 1.0}
"""What a pass takes of the process in relation to its tensors: glibc's heap keeps holes between
them. 1.09 and 1.4 were measured, and 1.0 with MALLOC_MMAP_THRESHOLD_=1000000; a GPU was not."""


@dataclass(frozen=True)
class ClientMemory:
    """What a client's training takes at once, in bytes.

    Args:
        libraries: Python, torch and transformers, or the CUDA context.
        weights: of the frozen base.
        merged: copies of the target modules with the global update merged into them, which a
            float32 base has from round 2 on where the rule adds to the base.
        adapter: what is trained, float32.
        optimizer: its gradients and AdamW's two moments, float32.
        activations: the most that a pass holds beside all this.
    """

    libraries: int
    weights: int
    merged: int
    adapter: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        held = self.libraries + self.weights + self.merged
        return held + self.adapter + self.optimizer + self.activations


def bytes_of_base(base: BaseModel) -> int:
    """What the frozen base takes in memory, where it holds no adapters."""
    return sum(x.nbytes for x in (*base.model.parameters(), *base.model.buffers()))


def client_memory(
    base: BaseModel,
    batch: Sequence[Tokens],
    rank: int,
    *,
    on_gpu: bool = False,
    merges: bool = False,
    dropout: float = 0.0,
) -> ClientMemory:
    """What training takes with this micro-batch and an adapter of this rank.

    Args:
        base: on the meta device; it holds no adapters afterwards.
        batch: the tokenised rows of one micro-batch, at least one.
        rank: of the adapter.
        on_gpu: training runs on a GPU, where attention keeps no scores.
        merges: the rule adds to the base, so that a client holds a merged copy of target modules.
        dropout: before the adapter.

    Raises:
        PackingError: a form of attention that is not known here.
    """
    adapter = {
        name: LowRank(torch.empty(rank, n, device="meta"), torch.empty(m, rank, device="meta"))
        for name, (m, n) in base.targets.shapes.items()
    }
    weights = bytes_of_base(base)
    base.load_clients([], [ClientAdapter(adapter, dropout=dropout)])
    trained = sum(p.numel() for _, p in base.parameters_of(0))
    base.model.train()
    known = [*base.model.parameters(), *base.model.buffers()]
    try:
        with as_on_gpu(on_gpu), LiveBytes(known) as live:
            runner_of(base.model).loss_of_shapes(base.model, batch)
    finally:
        base.model.eval()
        base.model.zero_grad(set_to_none=True)
        base.load_clients([], [])
    whole = sum(p.numel() for p in base.full_params.values())
    return ClientMemory(
        libraries=LIBRARIES["cuda" if on_gpu else "cpu"],
        weights=weights,
        merged=sum(layer.weight.nbytes for layer in base.layers.values() if layer.merges)
        if merges
        else 0,
        adapter=4 * (trained - whole),
        optimizer=12 * trained,
        # The pass makes the gradients, which are counted with the optimiser.
        activations=int(FRAGMENTED["cuda" if on_gpu else "cpu"] * max(0, live.peak - 4 * trained)),
    )
