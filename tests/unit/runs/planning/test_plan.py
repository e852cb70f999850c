"""A plan says what it knows, and why it does not know the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedlora.config.config import Config
from fedlora.errors import InputError
from fedlora.methods import METHODS
from fedlora.runs.planning import plan as planning
from fedlora.runs.planning.client_needs import ClientNeeds
from fedlora.runs.planning.plan import _on_gpu, disk_of_server, make_plan
from fedlora.runs.planning.simulated_traffic import Traffic
from fedlora.runs.session import assemble

TRAFFIC = Traffic(0, 0, 0, 0, model=10, state=100, updates=0, adds_to_base=False, played=1)


def test_rounds_that_are_kept_count() -> None:
    assert disk_of_server(Config(num_rounds=9, save_total_limit=3), TRAFFIC) == 3 * 110 + 10
    assert disk_of_server(Config(num_rounds=9, save_total_limit=1), TRAFFIC) == 2 * 110 + 10
    assert disk_of_server(Config(num_rounds=9, save_total_limit=None), TRAFFIC) == 9 * 110 + 10


@pytest.mark.parametrize(
    ("keys", "evaluates", "states", "adapters"),
    [
        ({"save_total_limit": None, "save_adapter_rounds": 4}, True, 20, 5),
        ({"save_total_limit": 6, "save_adapter_rounds": 2}, False, 6, 3),
        ({"save_total_limit": 6, "save_adapter_rounds": 2}, True, 7, 4),  # and the best
        ({"save_total_limit": 3, "save_adapter_rounds": 10}, False, 4, 1),  # and one that has it
        ({"save_total_limit": 3, "load_best_model_at_end": True}, True, 4, 4),
    ],
)
def test_adapters_that_are_kept_count(
    keys: dict[str, Any], evaluates: bool, states: int, adapters: int
) -> None:
    config = Config(num_rounds=20, **keys)
    wanted = states * 100 + adapters * 10 + 10
    assert disk_of_server(config, TRAFFIC, evaluates=evaluates) == wanted


@pytest.fixture
def _exact_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traffic of other methods takes time."""
    monkeypatch.setattr(planning, "METHODS", {"exact": METHODS["exact"]})


def test_methods_that_take_no_server_optimiser_are_left_out(
    small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "METHODS", {name: METHODS[name] for name in ("hetlora", "exact")})
    plan = make_plan(Config(**small_run, server_momentum=0.9), seconds=None)
    assert plan.excluded["hetlora"].startswith("divides by weights of its own")
    assert plan.traffic.keys() == {"exact"}


@pytest.mark.usefixtures("_exact_alone")
@pytest.mark.parametrize(
    "keys", [{"load_in_4bit": True}, {"client_overrides": {1: {"load_in_4bit": True}}}]
)
def test_a_quantised_base_is_not_timed(small_run: dict[str, Any], keys: dict[str, Any]) -> None:
    plan = make_plan(Config(**small_run, **keys), seconds=0)
    assert plan.speed is None
    assert plan.no_speed == "not measured on a quantised base"
    weights = [client.memory.weights for client in plan.clients if client.memory]
    assert weights[1] == min(weights)


@pytest.mark.usefixtures("_exact_alone")
def test_what_cannot_be_measured_leaves_the_rest(
    small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("no kernel\nat all")

    def not_planned(*arguments: Any) -> Any:
        raise InputError("no shapes")

    monkeypatch.setattr(planning, "calibrate", unknown)
    monkeypatch.setattr(ClientNeeds, "memory", not_planned)
    plan = make_plan(Config(**small_run))
    assert plan.no_speed == "not measured: no kernel"
    assert plan.no_memory == "no shapes"
    assert [client.memory for client in plan.clients] == [None] * 4
    assert plan.traffic["exact"].up > 0
    assert plan.server_memory > 500_000_000


@pytest.mark.parametrize(("use_cpu", "on_gpu"), [(None, True), (False, True), (True, False)])
def test_shapes_alone_do_not_say_where_a_run_trains(
    small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, use_cpu: bool | None, on_gpu: bool
) -> None:
    session = assemble(Config(**small_run, use_cpu=use_cpu), weights=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _on_gpu(session) == on_gpu
