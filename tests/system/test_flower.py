"""Runs on Flower itself: a SuperLink with TLS and authentication, three SuperNodes, one deployment.

The sites' workers are in this process, behind their sockets; all of Flower is processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import fedlora
from fedlora.config.config import Config
from fedlora.runs.events import Event
from support.conformance import Keys, assert_same, in_memory, three_clients
from support.flower_deployment import CONNECTION, Deployment, deployed
from support.flower_sites import on_sockets
from support.sites import SiteInMemory, server_keys, sites_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


class Federation:
    """Three sites and the Flower that carries to them."""

    def __init__(self, deployment: Deployment, sites: dict[str, SiteInMemory]) -> None:
        self.deployment, self.sites = deployment, sites

    def run(self, keys: Keys, out: Path, events: list[Event] | None = None, **own: Any) -> Any:
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


def test_exact_gives_the_bytes_of_a_run_in_one_process(
    federation: Federation, keys: Keys, tmp_path: Path
) -> None:
    events: list[Event] = []
    result = federation.run(keys, tmp_path / "flower", events)
    assert_same(in_memory(keys, tmp_path / "memory"), result)
    assert [e["round"] for e in events if e["event"] == "round"] == [1, 2]
