"""How much memory clients need that train together."""

from __future__ import annotations

from pathlib import Path

import torch

from fedlora.client.memory import MemoryNeed, automatic_size, largest_need, memory_available
from fedlora.data.tokenize import Tokens
from fedlora.model.head import CHUNK_NUMBERS
from support.models import load_base

CPU = torch.device("cpu")
HEAD = 4 * CHUNK_NUMBERS * 4
"""Bytes that the head's chunks take beside the clients."""


def rows(*lengths: int) -> list[Tokens]:
    """Rows of these lengths, all learnt."""
    return [{"input_ids": [5] * n, "labels": [5] * n} for n in lengths]


def test_as_many_clients_as_the_budget_holds() -> None:
    need = MemoryNeed(tokens=1, activations=600, state=400)
    assert need.nbytes == 1000
    assert automatic_size(need, 8, HEAD + 3500, CPU) == 3
    assert automatic_size(need, 2, HEAD + 3500, CPU) == 2
    assert automatic_size(need, 8, 0, CPU) == 1  # one always trains


def test_no_more_than_make_it_faster() -> None:
    small, large = MemoryNeed(1, 1, 1), MemoryNeed(10**6, 1, 1)
    plenty = 2**50
    assert automatic_size(small, 50, plenty, CPU) == 50
    assert automatic_size(large, 50, plenty, CPU) == 1


def test_the_largest_batch_of_the_largest_client_counts(tiny_llama: Path) -> None:
    base = load_base(str(tiny_llama), target_modules=["q_proj"])
    small = largest_need(base, [(rows(8, 8), 2, 4)])
    both = largest_need(base, [(rows(8, 8), 2, 4), (rows(4, 16, 16), 2, 2)])
    assert (
        both.state == small.state == 16 * sum(4 * (m + n) for m, n in base.targets.shapes.values())
    )
    assert both.activations > 1.5 * small.activations  # 32 tokens of a row of 16, beside 16 of 8
    assert small.tokens == 16
    assert both.tokens == round((16 + 24) / 2)
    assert largest_need(base, [([], 2, 64), (rows(8, 8), 2, 4)]) == small  # one without rows
    assert all(not len(layer.clients) for layer in base.layers.values())


def test_free_memory_is_a_number_of_bytes() -> None:
    free = memory_available(CPU)
    assert isinstance(free, int)
    assert free > 2**20
