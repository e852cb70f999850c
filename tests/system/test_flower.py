"""Runs on Flower itself: a SuperLink with TLS and authentication, three SuperNodes, one deployment.

The sites' workers are in this process, behind their sockets; all of Flower is processes. A run in
which nothing happens is that of the guide (`test_flower_guide.py`).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import fedlora
from fedlora.config.config import Config
from fedlora.runs.events import Event
from fedlora.runs.results import Result
from support.conformance import Keys, assert_same, for_rule, in_memory, three_clients
from support.courses import tensor_files
from support.flower_deployment import CONNECTION, Deployment, deployed, wait_for
from support.flower_sites import on_sockets
from support.sites import InMemoryTransport, SiteInMemory, federate, server_keys, sites_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


class Federation:
    """Three sites and the Flower that carries to them.

    Args:
        deployment: of Flower.
        sites: by name.
    """

    round_seconds = 30.0
    """Of a round in which nothing is amiss; on a busy machine it takes many times longer."""

    def __init__(self, deployment: Deployment, sites: dict[str, SiteInMemory]) -> None:
        self.deployment, self.sites = deployment, sites

    def run(self, keys: Keys, out: Path, events: list[Event] | None = None, **own: Any) -> Result:
        """`fedlora run --engine flower`."""
        plain = server_keys(keys, list(self.sites), out)
        del plain["sites"]
        own = {"engine": "flower", "flower_superlink": CONNECTION, "num_clients": 3, **own}
        hear = events.append if events is not None else (lambda event: None)
        return fedlora.run(Config(**{**plain, **own}), report=hear)


@pytest.fixture(scope="module")
def keys(tiny_llama: Path, site_files: Path) -> Keys:
    """Two rounds of one step over three clients."""
    small = {
        "model_name_or_path": str(tiny_llama),
        "train_file": str(site_files / "site_*.jsonl"),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "eval_exact_match": False,
        "num_threads": 1,
    }
    return {**three_clients(small), "num_rounds": 2}


@pytest.fixture(scope="module")
def federation(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    directory = tmp_path_factory.mktemp("flower")
    sites = sites_of(keys, tmp_path_factory.mktemp("sites"))
    with ExitStack() as stack:
        sockets = stack.enter_context(on_sockets(sites))
        deployment = stack.enter_context(deployed(directory, sockets))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for key, value in deployment.environment.items():
            patch.setenv(key, value)
        yield Federation(deployment, sites)


def outcomes(result: Result) -> list[list[str]]:
    """What became of every client in every round."""
    rounds = [line for line in result.metrics if line["event"] == "round"]
    return [[client["outcome"] for client in line["clients"]] for line in rounds]


def test_a_server_app_that_is_killed_is_submitted_again_and_goes_on(
    federation: Federation, keys: Keys, tmp_path: Path
) -> None:
    keys = for_rule(keys, "ffa") | {"num_rounds": 2}
    deployment = federation.deployment

    class Killing(list[Event]):
        """Events whose first saved round is the end of the ServerApp."""

        def append(self, event: Event) -> None:
            super().append(event)
            if event["event"] == "round" and event["round"] == 1:
                app = deployment.server_app()
                assert app is not None
                os.kill(app, signal.SIGKILL)

    events = Killing()
    result = federation.run(keys, tmp_path / "flower", events)
    quiet = in_memory(keys, tmp_path / "memory")
    assert tensor_files(quiet.output_dir) == tensor_files(result.output_dir)
    rounds = [line for line in result.metrics if line["event"] == "round"]
    federation.round_seconds = max(line["seconds"]["train"] for line in rounds)
    warnings = [e["message"] for e in events if e["event"] == "warning"]
    assert any("submitted again, and goes on after round 1" in text for text in warnings)


def test_a_supernode_and_the_superlink_are_killed_and_started_again(
    federation: Federation, keys: Keys, tmp_path: Path
) -> None:
    """The site is asked again, and the run goes on, to what a run in one process leaves."""
    deployment, killed = federation.deployment, list[str]()

    def kill_its_node(round: int, attempt: int) -> None:
        if not killed:
            killed.append("alpha")
            deployment.kill("alpha")

    class Killing(list[Event]):
        """Events whose first saved round is the end of the SuperLink."""

        def append(self, event: Event) -> None:
            super().append(event)
            if event["event"] == "round" and event["round"] == 1:
                killed.append("superlink")
                deployment.kill("superlink")

    federation.sites["alpha"].fails = kill_its_node
    events = Killing()
    try:
        result = federation.run(keys, tmp_path / "flower", events)
    finally:
        federation.sites["alpha"].fails = lambda round, attempt: None
    assert killed == ["alpha", "superlink"]
    assert outcomes(result) == [["counted"] * 3, ["counted"] * 3]
    assert_same(in_memory(keys, tmp_path / "memory"), result)
    assert [e["round"] for e in events if e["event"] == "round"] == [1, 2]


def test_a_straggler_is_left_out_of_its_round(
    federation: Federation, keys: Keys, tmp_path: Path
) -> None:
    keys = {**keys, "num_rounds": 1}
    free = threading.Event()

    def sleep(round: int, attempt: int) -> None:
        free.wait(1200)

    class Freeing(list[Event]):
        """Events whose first saved round lets the straggler go."""

        def append(self, event: Event) -> None:
            super().append(event)
            if event["event"] == "round":
                free.set()

    federation.sites["beta"].fails = sleep
    timeout = max(40.0, 3 * federation.round_seconds)
    try:
        result = federation.run(keys, tmp_path / "flower", Freeing(), round_timeout=timeout)
    finally:
        free.set()
        federation.sites["beta"].fails = lambda round, attempt: None

    def fail(round: int, attempt: int) -> None:
        raise ValueError("it is left out")

    sites = sites_of(keys, tmp_path / "memory sites")
    sites["beta"].fails = fail
    reference = federate(keys, tmp_path / "memory", InMemoryTransport(sites))
    assert outcomes(result) == [["counted", "late", "counted"]]
    assert tensor_files(reference.output_dir) == tensor_files(result.output_dir)


def test_a_supernode_with_an_unregistered_key_is_refused(federation: Federation) -> None:
    deployment = federation.deployment
    deployment.make_key("stranger")
    deployment.start_supernode("stranger", kept=False)
    process = deployment.processes["stranger"]
    assert wait_for(lambda: process.poll() is not None, "its end")
    assert "305" in deployment.log("stranger")
