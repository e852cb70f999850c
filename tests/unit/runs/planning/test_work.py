"""How much a run will compute is estimated from its configuration and the lengths of its rows."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from fedlora.config.config import Config
from fedlora.runs.planning.work import (
    RATE,
    clients_of_round,
    layer_parameters,
    planned_seconds,
    tokens_of_round,
)


def test_tokens_of_a_round() -> None:
    assert tokens_of_round(Config(num_train_epochs=2), [10, 20, 30]) == 120
    four_steps = Config(max_steps=4, per_device_train_batch_size=2)
    assert tokens_of_round(four_steps, [10, 20, 30]) == 4 * 2 * 20
    assert tokens_of_round(four_steps, []) == 0


SIZES: dict[str, int] = {
    "hidden_size": 8,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


def test_parameters_of_the_layers() -> None:
    model = LlamaConfig(**SIZES)
    assert layer_parameters(model) == 3 * (4 * 8 * 8 + 3 * 8 * 20)


@pytest.mark.parametrize(("wanted", "clients"), [(None, 8), (3, 3), (20, 8), (0.5, 4), (0.01, 1)])
def test_clients_of_a_round(wanted: float | None, clients: int) -> None:
    assert clients_of_round(Config(clients_per_round=wanted), 8) == clients


def test_the_time_of_a_run_grows_with_what_it_computes() -> None:
    model = LlamaConfig(**SIZES)
    lengths = [[10, 20], [30], []]
    seconds = planned_seconds(Config(num_rounds=5), model, lengths)
    assert seconds == pytest.approx(5 * 60 * 4 * layer_parameters(model) / RATE)
    sampled = planned_seconds(Config(num_rounds=5, clients_per_round=1), model, lengths)
    assert sampled == pytest.approx(seconds / 2)
