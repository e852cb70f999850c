"""What a client trains on in a round, and what is kept on disk."""

from __future__ import annotations

from fedlora.config.config import Config
from fedlora.runs.planning.plan import disk_of_server, tokens_of_round
from fedlora.runs.planning.simulated_traffic import Traffic


def test_tokens_of_a_round() -> None:
    assert tokens_of_round(Config(num_train_epochs=2), [10, 20, 30]) == 120
    four_steps = Config(max_steps=4, per_device_train_batch_size=2)
    assert tokens_of_round(four_steps, [10, 20, 30]) == 4 * 2 * 20
    assert tokens_of_round(four_steps, []) == 0


def test_rounds_that_are_kept_count() -> None:
    traffic = Traffic(0, 0, 0, 0, model=10, state=100, updates=0, adds_to_base=False, played=1)
    assert disk_of_server(Config(num_rounds=9, save_total_limit=3), traffic) == 3 * 110 + 10
    assert disk_of_server(Config(num_rounds=9, save_total_limit=1), traffic) == 2 * 110 + 10
    assert disk_of_server(Config(num_rounds=9, save_total_limit=None), traffic) == 9 * 110 + 10
