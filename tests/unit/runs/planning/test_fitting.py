"""Ranks and micro-batches are chosen to fit."""

from __future__ import annotations

import pytest

from fedlora.config.config import Config
from fedlora.errors import InputError
from fedlora.runs.planning.fitting import Fit, fit, with_fitting_ranks


def need(batch: int, rank: int) -> int:
    return 100 + 10 * batch + rank


@pytest.mark.parametrize(
    ("room", "chosen"),
    [
        (1000, Fit(16, 12, 2)),
        (176, Fit(16, 6, 4)),  # the rank first
        (126, Fit(16, 1, 24)),
        (119, Fit(8, 1, 24)),
        (111, Fit(1, 1, 24)),
    ],
)
def test_the_rank_is_halved_last(room: int, chosen: Fit) -> None:
    assert fit(16, 12, 2, need, room) == chosen


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match="111"):
        fit(16, 12, 2, need, 110)


def test_clients_get_ranks_and_micro_batches_of_their_own() -> None:
    config = Config(
        client_ranks="auto",
        client_memory=["1KB", "0.12KB"],
        client_overrides={0: {"learning_rate": 1e-3}},
    )
    decided, said = with_fitting_ranks(config, 2, lambda client, size, rank: need(size, rank))
    assert decided.client_ranks == [16, 8]
    assert decided.client_overrides == {
        0: {"learning_rate": 1e-3},
        1: {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    }
    assert said == [
        "ranks that fit into client_memory: 16, 8",
        "client 1 with 8 micro-batches of 1 in a step",
    ]


def test_a_machine_that_is_too_small_is_refused() -> None:
    config = Config(client_ranks="auto", client_memory="0.1KB")
    says = r"client 0 has 100 B, but one sample at rank 1 takes 111 B; try .*load_in_4bit: true"
    with pytest.raises(InputError, match=says):
        with_fitting_ranks(config, 1, lambda client, size, rank: need(size, rank))


def test_needs_that_cannot_be_told_are_passed_on() -> None:
    def unknown(client: int, size: int, rank: int) -> int:
        raise InputError("nobody knows")

    config = Config(client_ranks="auto", client_memory="1KB")
    with pytest.raises(InputError, match=r"^nobody knows$"):
        with_fitting_ranks(config, 1, unknown)


def test_other_ranks_stay_as_they_are() -> None:
    config = Config(client_ranks=4, client_memory="1KB")
    assert with_fitting_ranks(config, 1, lambda client, size, rank: 0) == (config, [])
