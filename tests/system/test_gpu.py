"""The same laws on a CUDA device; skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fedlora.client.memory import automatic_size, largest_need, memory_available
from fedlora.lowrank import LowRank, refactor, to_dense
from fedlora.model.passes import runner_of
from support.cohort import (
    ALONE,
    MODELS,
    RANKS,
    TOGETHER,
    base_of,
    client_adapters_of,
    close,
    rows_of,
    trained,
    trainings_of,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def plain_float32() -> Iterator[None]:
    """Products in float32 proper, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", MODELS)
def test_together_is_alone(name: str, dropout: float) -> None:
    base = base_of(name, dropout)
    base.model.to("cuda")
    assert runner_of(base.model).joint
    client_adapters = client_adapters_of(base, dropout=dropout)
    data = [rows_of(name, 9, k) for k in range(len(RANKS))]
    alone = trained(base, client_adapters, data, trainings_of(), ALONE)
    close(trained(base, client_adapters, data, trainings_of(), TOGETHER), alone, 1e-4)


def test_a_gpu_gives_what_the_cpu_gives() -> None:
    ends = []
    for device in ("cpu", "cuda"):
        base = base_of("llama")
        base.model.to(device)
        data = [rows_of("llama", 9, k) for k in range(len(RANKS))]
        ends.append(trained(base, client_adapters_of(base), data, trainings_of(), TOGETHER))
    close(ends[1], ends[0], 1e-4)


def test_bfloat16_trains() -> None:
    base = base_of("llama", dtype=torch.bfloat16)
    base.model.to("cuda")
    data = [rows_of("llama", 9, k) for k in range(len(RANKS))]
    trainings = trainings_of(learning_rate=1e-2, max_steps=20)
    for _, _, metrics in trained(base, client_adapters_of(base), data, trainings, TOGETHER):
        assert metrics["loss_last"] < metrics["loss_first"]


def test_the_size_of_a_cohort_is_measured() -> None:
    base = base_of("llama")
    base.model.to("cuda")
    need = largest_need(base, [(rows_of("llama", 8, 0), 4, 8)])
    device = torch.device("cuda")
    assert need.activations > 0
    assert 1 <= automatic_size(need, 10, memory_available(device) // 2, device) <= 10


def test_refactoring_stays_on_the_device() -> None:
    x = LowRank(torch.randn(24, 96, device="cuda"), torch.randn(64, 24, device="cuda"))
    found = refactor(x)
    assert found.A.is_cuda
    torch.testing.assert_close(to_dense(found), to_dense(x), rtol=1e-3, atol=1e-4)
