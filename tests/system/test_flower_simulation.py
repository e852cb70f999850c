"""A simulation on Flower itself: a SuperLink, Ray, and clients that share resident processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fedlora
from fedlora.config.config import Config
from fedlora.errors import FedloraError
from fedlora.runs.events import Event
from support.conformance import Keys, assert_same, in_memory, three_clients
from support.flower_deployment import simulating

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def _superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with (
        simulating(tmp_path_factory.mktemp("flower")) as (environment, _),
        pytest.MonkeyPatch.context() as patch,
    ):
        for key, value in environment.items():
            patch.setenv(key, value)
        yield


@pytest.fixture
def keys(small_run: dict[str, Any]) -> Keys:
    return {**three_clients(small_run), "num_rounds": 1, "engine": "flower"}


@pytest.mark.usefixtures("_superlink")
def test_a_simulation_gives_the_bytes_of_a_run_in_one_process(keys: Keys, tmp_path: Path) -> None:
    events: list[Event] = []
    config = Config(**{**keys, "output_dir": str(tmp_path / "flower")})
    result = fedlora.run(config, report=events.append)
    assert_same(in_memory({**keys, "engine": "local"}, tmp_path / "memory"), result)
    assert [e["event"] for e in events if e["event"] in ("begin", "round", "end")] == [
        "begin",
        "round",
        "end",
    ]
    assert not Path(f"{config.output_dir}.clients").exists(), "it is complete"


@pytest.mark.usefixtures("_superlink")
def test_a_mistake_is_one_message(keys: Keys, tmp_path: Path) -> None:
    keys |= {"train_file": str(tmp_path / "missing.jsonl"), "output_dir": str(tmp_path / "flower")}
    with pytest.raises(FedloraError, match=r"missing\.jsonl") as error:
        fedlora.run(Config(**keys))
    assert "Traceback" not in str(error.value)
