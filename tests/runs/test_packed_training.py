"""Clients that train in one packed pass end where each ends alone, also where lengths matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fedlora.client.cohort import train_cohort
from fedlora.client.local_training import LocalTraining
from fedlora.data.tokenize import Tokens
from fedlora.lowrank import LowRank
from fedlora.model.base import BaseModel, attach
from fedlora.model.client_rows import MixedRowsError
from fedlora.model.lora_layer import ClientAdapter
from fedlora.model.passes import runner_of
from fedlora.model.targets import find_targets
from fedlora.seeds import Purpose, fresh_factors
from support.packing import ROPES, SIZES, WINDOWS, built, routed, rows_of


def base_of(model: Any) -> BaseModel:
    model.config.use_cache = False
    return attach(model, None, find_targets(model, "all-linear", "it", None, [], "CAUSAL_LM"))


def adapter_of(base: BaseModel, client: int) -> dict[str, LowRank]:
    fresh = fresh_factors(7, 0, client, Purpose.CLIENT_INIT, base.targets.shapes)
    source = torch.Generator().manual_seed(client)
    return {
        n: LowRank(fresh(n, 2), 0.05 * torch.randn(m, 2, generator=source))
        for n, (m, _) in base.targets.shapes.items()
    }


def ends(base: BaseModel, data: Sequence[Sequence[Tokens]], groups: Sequence[Sequence[int]]) -> Any:
    """Each client's trained factors as one vector, and its losses."""
    out: dict[int, Any] = {}
    for group in groups:
        client_adapters = [
            ClientAdapter(adapter_of(base, k), scale=2.0, dropout=0.2) for k in group
        ]
        base.load_clients([], client_adapters)
        trainings = [
            LocalTraining(
                client=k, per_device_train_batch_size=4, max_steps=4, learning_rate=2e-3, seed=3
            )
            for k in group
        ]
        metrics = train_cohort(base, [data[k] for k in group], trainings)
        for slot, k in enumerate(group):
            x = base.read_adapter(slot)
            flat = torch.cat([f.flatten() for y in x.values() for f in (y.A, y.B)])
            out[k] = flat, metrics[slot]["loss"]
    return [out[k] for k in sorted(out)]


TOGETHER: dict[str, Any] = {
    "longrope": lambda: built(*ROPES["longrope, Phi-3"]),
    "dynamic": lambda: built(*ROPES["dynamic"]),
    "auxiliary loss": lambda: routed("mixtral"),
    "a window": lambda: built(*WINDOWS["Mistral"][:2]),
    "a number nothing explains": lambda: built("llama", {**SIZES, "reach_of_it": 45}),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_together_is_alone(case: str) -> None:
    base = base_of(TOGETHER[case]())
    passes = runner_of(base.model)
    assert passes.joint
    if case == "a number nothing explains":
        assert passes.longest == 45
    data = [rows_of([10, 50, 33, 28, 44, 7], seed=k) for k in range(3)]
    one = ends(base, data, [[0], [1], [2]])
    for (x, loss), (y, other) in zip(ends(base, data, [[0, 1, 2]]), one, strict=True):
        assert float((x - y).norm()) <= 1e-5 * float(y.norm())
        assert loss == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_modules_trained_whole_beside_rows_that_run_padded(name: str) -> None:
    """Rows longer than a packed pass may be run client by client, each by its own copy."""
    model = built(name, {**SIZES, "reach_of_it": 45})
    model.config.use_cache = False
    whole = [n for n, m in model.named_modules() if n.endswith("norm") and len([*m.parameters()])]
    targets = find_targets(model, "all-linear", "it", None, whole, "CAUSAL_LM")
    base = attach(model, None, targets)
    passes = runner_of(base.model)
    assert passes.joint
    assert passes.longest == 45
    data = [rows_of([10, 50, 33, 28, 60, 7], seed=k) for k in range(3)]
    start, dense = base.read_full_params(), []
    for groups in ([[0], [1], [2]], [[0, 1, 2]]):
        found: dict[int, Any] = {}
        for group in groups:
            client_adapters = [
                ClientAdapter(adapter_of(base, k), dropout=0.2, full_params=start) for k in group
            ]
            base.load_clients([], client_adapters)
            trainings = [
                LocalTraining(
                    client=k, per_device_train_batch_size=4, max_steps=3, learning_rate=2e-3
                )
                for k in group
            ]
            train_cohort(base, [data[k] for k in group], trainings)
            found |= {k: base.read_full_params(slot) for slot, k in enumerate(group)}
        dense.append(found)
    one, all_ = dense
    for k in range(3):
        for key, value in one[k].items():
            moved = float((value - start[key]).norm())
            assert moved > 0
            assert float((all_[k][key] - value).norm()) <= 1e-3 * moved, key


def test_what_cannot_be_packed_trains_one_client_at_a_time() -> None:
    config = {**SIZES, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8}
    base = base_of(built("lfm2", config))
    with pytest.raises(MixedRowsError, match="one client at a time"):
        ends(base, [rows_of([9, 5]), rows_of([4, 7])], [[0, 1]])
