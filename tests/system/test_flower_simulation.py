"""A simulation on Flower itself: a SuperLink, Ray, and clients that share resident processes."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedlora
from fedlora.config.config import Config
from fedlora.errors import FedloraError
from fedlora.runs.events import Event
from support.conformance import Keys, assert_same, in_memory, three_clients
from support.courses import tensor_files
from support.flower_deployment import TOOLS, simulating
from support.guide_shell import shell
from support.paths import REPOSITORY

GUIDE = REPOSITORY / "docs" / "guides" / "flower.md"

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
def test_flwr_run_takes_the_app_that_the_guide_writes(keys: Keys, tmp_path: Path) -> None:
    """The guide's two commands, of a smaller run."""
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(dict(keys)))
    text = GUIDE.read_text().partition("## In simulation")[2]
    block = re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)[0]
    ours = {
        " embedded ": " small.yaml ",
        "num-supernodes=10": "num-supernodes=3",
        "num_rounds=3": "num_rounds=1",
        "/tmp/out": str(tmp_path / "flower"),
    }
    for theirs, mine in ours.items():
        assert theirs in block
        block = block.replace(theirs, mine)
    told = shell(block, tmp_path)
    assert "round 1: clients [0, 1, 2]" in told
    quiet = in_memory({**keys, "engine": "local"}, tmp_path / "memory")
    assert tensor_files(quiet.output_dir) == tensor_files(tmp_path / "flower")


@pytest.mark.usefixtures("_superlink")
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_an_app_like_flowertune_s_runs_with_clients_of_mixed_rank(tmp_path: Path) -> None:
    """`examples/flower_strategy`, as Flower starts it: a strategy alone, PEFT and TRL in actors."""
    small = f'num-server-rounds=1 max-steps=1 output="{tmp_path / "tuned"}"'
    nodes = "num-supernodes=3 client-resources-num-cpus=1"
    app = REPOSITORY / "examples" / "flower_strategy"
    command = [TOOLS / "flwr", "run", app, "--stream", "--run-config", small]
    told = subprocess.run(
        [*command, "--federation-config", nodes], capture_output=True, text=True, check=False
    )
    assert (tmp_path / "tuned").is_dir(), told.stdout + told.stderr
    assert fedlora.load_adapter(tmp_path / "tuned").deltas


@pytest.mark.usefixtures("_superlink")
def test_a_mistake_is_one_message(keys: Keys, tmp_path: Path) -> None:
    keys |= {"train_file": str(tmp_path / "missing.jsonl"), "output_dir": str(tmp_path / "flower")}
    with pytest.raises(FedloraError, match=r"missing\.jsonl") as error:
        fedlora.run(Config(**keys))
    assert "Traceback" not in str(error.value)
