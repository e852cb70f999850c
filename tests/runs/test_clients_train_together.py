"""Clients that train in one pass end where each ends alone, under any setting and dropout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from fedlora.client.cohort import train_cohort
from fedlora.lowrank import Adapter, Dense, add, prefix, scale, to_dense
from fedlora.model.base import BaseModel
from fedlora.model.batches import count_labelled
from fedlora.model.lora_layer import ClientAdapter
from fedlora.model.passes import runner_of
from support.cohort import (
    ALONE,
    MODELS,
    RANKS,
    TOGETHER,
    Ends,
    adapter_of,
    base_of,
    client_adapters_of,
    close,
    rows_of,
    trained,
    trainings_of,
)


def distance(one: Ends, client_adapters: Sequence[ClientAdapter]) -> float:
    """How far the clients have come, relative to where they began."""
    return min(
        float((x[n].A - s.adapter[n].A).norm() / s.adapter[n].A.norm())
        for (x, _, _), s in zip(one, client_adapters, strict=True)
        for n in x
        if "A" in s.trains
    )


@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_together_are_twenty_steps_alone(name: str) -> None:
    base = base_of(name)
    client_adapters, trainings = (
        client_adapters_of(base),
        trainings_of(max_steps=20, learning_rate=5e-4),
    )
    data = [rows_of(name, 14, k) for k in range(len(RANKS))]
    assert runner_of(base.model).joint
    alone = trained(base, client_adapters, data, trainings, ALONE)
    close(trained(base, client_adapters, data, trainings, TOGETHER), alone, 1e-5)
    close(trained(base, client_adapters, data, trainings, [[2, 0], [3, 1]]), alone, 1e-5)
    assert distance(alone, client_adapters) > 1e-3


CASES: dict[str, dict[str, Any]] = {
    "clipping bites": {"max_grad_norm": 0.05},
    "no clipping": {"max_grad_norm": 0.0},
    "FedProx": {"proximal_mu": 3.0},
    "accumulation": {"gradient_accumulation_steps": 3},
    "weight decay": {"weight_decay": 0.3},
    "a penalty on tails": {"tail_penalty": 0.05, "tail_from": 0.5},
    "epochs, the last batch short": {"max_steps": -1, "num_train_epochs": 2.0},
    "the run's schedule": {"lr_scheduler_scope": "federation", "num_rounds": 4},
}


@cache
def without_settings(name: str) -> Ends:
    """The ends of the same clients under none of `CASES`, trained once for each model."""
    base = base_of(name)
    data = [rows_of(name, 11 + k, k) for k in range(len(RANKS))]
    return trained(base, client_adapters_of(base), data, trainings_of(), ALONE)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_each_client_has_its_own(name: str, case: dict[str, Any]) -> None:
    base = base_of(name)
    client_adapters, trainings = client_adapters_of(base), trainings_of(**case)
    data = [rows_of(name, 11 + k, k) for k in range(len(RANKS))]
    alone = trained(base, client_adapters, data, trainings, ALONE)
    close(trained(base, client_adapters, data, trainings, TOGETHER), alone, 1e-5)
    if case.get("max_steps") != -1:
        assert [m["steps"] for _, _, m in alone] == [6, 9, 4, 9]
    if "num_train_epochs" not in case and case.get("max_grad_norm") != 0:
        moved = [
            float((x[n].A - y[n].A).norm())
            for (x, _, _), (y, _, _) in zip(alone, without_settings(name), strict=True)
            for n in x
        ]
        assert max(moved) > 1e-5, "the setting changes nothing here"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("where", ["before the adapter", "in the base"])
def test_dropout_is_drawn_from_each_clients_own_stream(name: str, where: str) -> None:
    base = base_of(name, 0.2 if where == "in the base" else 0.0)
    assert runner_of(base.model).joint
    client_adapters = client_adapters_of(base, dropout=0.0 if where == "in the base" else 0.3)
    data = [rows_of(name, 9, k) for k in range(len(RANKS))]
    trainings = trainings_of()
    alone = trained(base, client_adapters, data, trainings, ALONE)
    close(trained(base, client_adapters, data, trainings, TOGETHER), alone, 1e-5)
    close(trained(base, client_adapters, data, trainings, [[3, 1], [0, 2]]), alone, 1e-5)
    other = trained(base, client_adapters, data, [replace(b, seed=4) for b in trainings], ALONE)
    name_of = next(iter(alone[0][0]))
    assert not torch.equal(other[0][0][name_of].B, alone[0][0][name_of].B)


@pytest.mark.parametrize("trains", ["A", "B"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_frozen_factor_stays_to_the_bit(name: str, trains: str) -> None:
    base = base_of(name)
    client_adapters = client_adapters_of(base, trains=trains)
    data = [rows_of(name, 9, k) for k in range(len(RANKS))]
    alone = trained(base, client_adapters, data, trainings_of(), ALONE)
    together = trained(base, client_adapters, data, trainings_of(), TOGETHER)
    close(together, alone, 1e-5)
    for (x, _, _), client_adapter in zip(together, client_adapters, strict=True):
        for n, began in client_adapter.adapter.items():
            assert torch.equal(x[n].A, began.A) == (trains == "B")
            assert torch.equal(x[n].B, began.B) == (trains == "A")


def whole_update(base: BaseModel, rank: int, dense: bool) -> dict[str, Any]:
    found = adapter_of(base, rank, 99)
    return {n: Dense(to_dense(x)) if dense else x for n, x in found.items()}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_common_update_less_each_start_is_each_clients_rest(
    name: str, dense: bool, dropout: float
) -> None:
    """S beneath everybody and `-start_k` its own, or `S - start_k` merged for one client alone."""
    base = base_of(name)
    whole = whole_update(base, 6, dense)
    starts: list[Adapter] = [
        {n: prefix(adapter_of(base, 6, 99)[n], rank) for n in whole} for rank in RANKS
    ]
    data = [rows_of(name, 9, k) for k in range(len(RANKS))]
    trainings = trainings_of()
    common = [
        ClientAdapter(start, {n: scale(x, -1.0) for n, x in start.items()}, 2.0, dropout)
        for start in starts
    ]
    together = trained(base, common, data, trainings, TOGETHER, [{}, whole])
    for k, start in enumerate(starts):
        rest = {n: add([whole[n], scale(x, -1.0)]) for n, x in start.items()}
        one = [ClientAdapter(start, {}, 2.0, dropout)]
        base.load_clients([rest], one)
        metrics = train_cohort(base, [data[k]], [trainings[k]])[0]
        close([(base.read_adapter(), {}, metrics)], [together[k]], 1e-5)


def test_in_bfloat16_a_shared_branch_gives_what_merging_gives_in_float32() -> None:
    """The same run with S beside a bfloat16 base and merged into the same weights in float32."""
    narrow, wide = base_of("llama", dtype=torch.bfloat16), base_of("llama")
    with torch.no_grad():
        for (_, x), (_, y) in zip(
            narrow.model.named_parameters(), wide.model.named_parameters(), strict=True
        ):
            y.copy_(x.float())
    data = [rows_of("llama", 9, k) for k in range(len(RANKS))]
    ends = []
    for base in (narrow, wide):
        whole = whole_update(base, 6, dense=False)
        base.load_clients([whole], [])
        layer = next(iter(base.layers.values()))
        assert (layer.branch is not None) == (base is narrow)
        trainings = trainings_of(learning_rate=1e-4)
        ends.append(trained(base, client_adapters_of(base), data, trainings, TOGETHER, [whole]))
    for (_, _, m), (_, _, n) in zip(*ends, strict=True):
        assert m["loss"] == pytest.approx(n["loss"], rel=2e-2)
    # And without S the loss is another, by more than that.
    without = trained(
        narrow, client_adapters_of(narrow), data, trainings_of(learning_rate=1e-4), TOGETHER
    )
    assert abs(without[0][2]["loss"] - ends[0][0][2]["loss"]) > 1e-3


def test_the_head_in_chunks_is_the_head_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("llama")
    data = [rows_of("llama", 9, k) for k in range(len(RANKS))]
    whole = trained(base, client_adapters_of(base), data, trainings_of(), TOGETHER)
    monkeypatch.setattr("fedlora.model.head.CHUNK_NUMBERS", 64 * 100)
    assert max(count_labelled(rows) for rows in data) > 64
    close(trained(base, client_adapters_of(base), data, trainings_of(), TOGETHER), whole, 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_padding_is_reported(name: str) -> None:
    base = base_of(name)
    data = [rows_of(name, 9, k) for k in range(len(RANKS))]
    ends = trained(base, client_adapters_of(base), data, trainings_of(), TOGETHER)
    assert [m["padding"] for _, _, m in ends] == [0.0] * len(RANKS)
