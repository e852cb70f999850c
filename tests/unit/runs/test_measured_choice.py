"""What is left open of how clients train is measured where that pays."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from transformers import LlamaConfig

from fedlora import threads
from fedlora.config.config import Config
from fedlora.data.datasets import ClientData, FederatedData
from fedlora.model.sources import Source
from fedlora.runs import measured_choice
from fedlora.runs.measured_choice import (
    candidates,
    choose_by_time,
    processes_can_be_forked,
    with_engine_of_here,
    with_way,
)
from fedlora.runs.planning.fastest_way import Way
from fedlora.runs.planning.trial_training import TrialClient

NARROW = Source("narrow", LlamaConfig(hidden_size=32), classifier=False)
WIDE = Source("wide", LlamaConfig(hidden_size=512, num_attention_heads=8), classifier=False)
ROW = {"input_ids": list(range(50)), "labels": list(range(50))}
CLIENTS = [TrialClient(8, [ROW])] * 10


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 2.0)
    monkeypatch.setattr(measured_choice, "bfloat16_is_worth_a_trial", lambda: True)


def places(free: int = 2, forks: bool = True, **keys: Any) -> tuple[tuple[int, int], ...]:
    return candidates(Config(**keys), NARROW, CLIENTS, 10, free, forks=forks).places


def test_places_to_train_in() -> None:
    assert places() == ((2, 0), (1, 0), (1, 2))
    assert places(forks=False) == ((2, 0), (1, 0))
    assert places(free=1) == ((1, 0), (1, 2))  # beside a busy program
    assert places(free=8) == ((8, 0), (4, 0), (1, 0), (1, 2))


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({"num_threads": 2}, ((2, 0),)),
        ({"engine": "local"}, ((2, 0), (1, 0))),
        ({"engine": "workers"}, ((1, 2),)),
        ({"engine": "workers", "num_workers": 4}, ((1, 4),)),
    ],
)
def test_what_is_configured_stays(keys: dict[str, Any], kept: tuple[tuple[int, int], ...]) -> None:
    assert places(**keys) == kept


def test_sizes_and_dtypes() -> None:
    narrow = candidates(Config(), NARROW, CLIENTS, 10, 2, forks=True)
    assert (narrow.dtypes, narrow.sizes) == (("float32",), (1, 2, 3, 5, 10))
    assert candidates(Config(), WIDE, CLIENTS, 10, 2, forks=True).dtypes == ("float32", "bfloat16")
    given = candidates(Config(dtype="bfloat16", cohort_size=4), WIDE, CLIENTS, 10, 2, forks=True)
    assert (given.dtypes, given.sizes) == (("bfloat16",), (4,))
    long = [TrialClient(8, [ROW] * 40)] * 10  # 2,000 tokens: two fill a pass
    assert candidates(Config(), WIDE, long, 10, 2, forks=False).sizes == (1, 2)


def test_a_short_run_keeps_to_the_rules() -> None:
    data = FederatedData((ClientData([ROW]),), (), "text", {}, "")
    assert choose_by_time(Config(num_rounds=1), NARROW, None, data, 2) == (None, [])


def test_a_training_of_the_user_s_own_is_not_timed() -> None:
    data = FederatedData((ClientData([ROW] * 100_000),), (), "text", {}, "")
    config = Config(num_rounds=100_000, train_function="mine:train", use_cpu=True)
    assert choose_by_time(config, WIDE, None, data, 2) == (None, [])


@pytest.mark.parametrize(
    "keys",
    [
        {"load_in_8bit": True},
        {"client_overrides": {0: {"load_in_4bit": True}}},
        {"load_in_4bit": True, "client_overrides": {0: {"load_in_4bit": False}}},
    ],
)
def test_a_base_that_any_client_holds_quantised_is_not_timed(keys: dict[str, Any]) -> None:
    data = FederatedData((ClientData([ROW] * 100_000),) * 2, (), "text", {}, "")
    config = Config(num_rounds=100_000, use_cpu=True, **keys)
    assert choose_by_time(config, WIDE, None, data, 2) == (None, [])


def test_where_processes_are_not_forked_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_choice.sys, "platform", "linux")
    monkeypatch.delitem(measured_choice.sys.modules, "ipykernel", raising=False)
    assert processes_can_be_forked()
    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(processes_can_be_forked).result()
    monkeypatch.setitem(measured_choice.sys.modules, "ipykernel", measured_choice)
    assert not processes_can_be_forked()


def test_the_configuration_that_is_written_down() -> None:
    config = Config()
    assert with_way(config, None) is config
    pool = with_way(config, Way("float32", 1, 2, 5))
    assert (pool.dtype, pool.engine, pool.num_workers) == ("float32", "workers", 2)
    alone = with_way(config, Way("bfloat16", 2, 0, 5))
    assert (alone.dtype, alone.engine, alone.num_workers) == ("bfloat16", "local", "auto")
    named = with_way(Config(engine="workers", num_workers=4), Way("float32", 1, 4, 5))
    assert named.num_workers == 4


CHOSEN = {"engine": "local", "num_workers": "auto", "num_threads": None}
"""What the user wrote of a run that chose worker processes by itself."""


def went_on(
    written: dict[str, Any], asked: Config | None = None, workers: int = 2
) -> tuple[str, int | str, int | None, list[str]]:
    """Engine, worker processes, threads and what is said of a run that goes on."""
    saved = Config(engine="workers", num_workers=workers, num_threads=4)
    config, words = with_engine_of_here(saved, written, asked)
    return config.engine, config.num_workers, config.num_threads, words


def test_chosen_worker_processes_are_not_forked_where_that_is_forbidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measured_choice, "processes_can_be_forked", lambda: False)
    told = ["worker processes: none, they cannot be forked here"]
    assert went_on(CHOSEN) == ("local", "auto", 1, told)
    assert went_on(CHOSEN, Config(num_rounds=3)) == ("local", "auto", 1, told)
    kept = ("workers", 2, 4, [])
    assert went_on({"num_workers": "auto"}) == kept  # the user had asked for them
    assert went_on(CHOSEN, Config(engine="workers")) == kept  # or asks for them now


def test_chosen_worker_processes_are_no_more_than_there_are_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measured_choice, "processes_can_be_forked", lambda: True)
    told = ["worker processes: 2 instead of 8, one for each core"]
    assert went_on(CHOSEN, workers=8) == ("workers", 2, 4, told)
    assert went_on(CHOSEN, workers=2) == ("workers", 2, 4, [])
    assert went_on({}, workers=8) == ("workers", 8, 4, [])
    asked = Config(engine="workers", num_workers=8)
    assert went_on(CHOSEN, asked, workers=8) == ("workers", 8, 4, [])
