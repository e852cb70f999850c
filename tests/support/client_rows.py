"""Trains clients alone and together, and compares how their parameters moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fedlora.client.cohort import train_cohort
from fedlora.client.local_training import LocalTraining
from fedlora.data.tokenize import IGNORE, Tokens
from fedlora.lowrank import LowRank
from fedlora.model.base import BaseModel
from fedlora.model.lora_layer import ClientAdapter
from fedlora.seeds import Purpose, fresh_factors
from support.models import SMALL, TOKENS

COMMON: dict[str, Any] = {**SMALL, **TOKENS, "vocab_size": 60, "intermediate_size": 24}


GROUPED = {**COMMON, "num_key_value_heads": 2}


def rows_of(lengths: Sequence[int], seed: int) -> list[Tokens]:
    """Random rows of these lengths, their second half learnt."""
    source = torch.Generator().manual_seed(seed)
    out = []
    for length in lengths:
        ids = torch.randint(3, 60, (length,), generator=source).tolist()
        out.append({"input_ids": ids, "labels": [IGNORE] * (length // 2) + ids[length // 2 :]})
    return out


def adapter_of(base: BaseModel, rank: int, client: int) -> dict[str, LowRank]:
    """A client's adapter in mid-course: neither factor is zero."""
    fresh = fresh_factors(7, 0, client, Purpose.CLIENT_INIT, base.targets.shapes)
    source = torch.Generator().manual_seed(client)
    return {
        name: LowRank(fresh(name, rank), 0.05 * torch.randn(m, rank, generator=source))
        for name, (m, _) in base.targets.shapes.items()
    }


Ends = list[tuple[dict[str, torch.Tensor], dict[str, Any]]]


def trained(
    base: BaseModel,
    data: Sequence[Sequence[Tokens]],
    groups: Sequence[Sequence[int]],
    dropout: float = 0.0,
    size: int = 8,
) -> Ends:
    """A few steps of these clients in these groups: what each trained, and its metrics."""
    start, found = base.read_full_params(), dict[int, Any]()
    for group in groups:
        client_adapters = [
            ClientAdapter(adapter_of(base, 2 + k, k), scale=2.0, dropout=dropout, full_params=start)
            for k in group
        ]
        trainings = [
            LocalTraining(
                client=k,
                max_steps=3,
                learning_rate=2e-2,
                adam_epsilon=1e-2,  # a gradient that is but rounding moves nothing
                seed=3,
                per_device_train_batch_size=size,
            )
            for k in group
        ]
        base.load_clients([], client_adapters)
        metrics = train_cohort(base, [data[k] for k in group], trainings)
        for slot, k in enumerate(group):
            values = base.read_full_params(slot)
            for n, x in base.read_adapter(slot).items():
                values |= {f"{n}.A": x.A, f"{n}.B": x.B}
            found[k] = values, metrics[slot]
    base.load_clients([], [])
    with torch.no_grad():
        for n, value in start.items():
            base.full_params[n].copy_(value)
    return [found[k] for k in range(len(data))]


def assert_alike(one: Ends, other: Ends, began: dict[str, torch.Tensor]) -> None:
    """Every parameter moved, and both moved alike to a thousandth of how far."""
    for (x, m), (y, n) in zip(one, other, strict=True):
        assert x.keys() == y.keys()
        for name, value in x.items():
            if name in began:
                moved = float((y[name] - began[name]).norm())
                assert moved > 5e-6, name
                assert float((value - y[name]).norm()) <= 1e-6 + 2e-3 * moved, name
            else:
                torch.testing.assert_close(value, y[name], rtol=2e-3, atol=2e-5, msg=name)
        assert m["loss"] == pytest.approx(n["loss"], rel=1e-5)
