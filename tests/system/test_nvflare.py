"""NVIDIA FLARE with three sites under mutual TLS on loopback, in real processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fedlora
from fedlora.config.config import Config
from fedlora.engines import carrier
from fedlora.errors import FedloraError, InputError
from fedlora.runs.events import Event
from support.courses import tensor_files
from support.deployed import MEMBER, Deployed, in_one_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KEYS: dict[str, Any] = {
    "engine": "nvflare",
    "server_evaluation": False,
    "model_name_or_path": "embedded",
    "method": "exact",
    "client_ranks": [8, 4, 2],
    "num_rounds": 3,
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "max_length": 64,
    "dtype": "float32",
    "eval_exact_match": False,
    "num_threads": 1,
}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Three sites that grant rank 8 and ten steps; all of them run."""
    deployed = Deployed(Path(tmp_path_factory.mktemp("f")))
    deployed.deploy({"lora_r": 8, "max_steps": 10})
    try:
        deployed.start()
        yield deployed
    finally:
        deployed.stop()


def keys_of(federation: Deployed, out: Path, **changed: Any) -> dict[str, Any]:
    return {**KEYS, "kit": str(federation.kit()), "output_dir": str(out), **changed}


def after_round(acts: dict[int, Callable[[], None]]) -> Callable[[Event], None]:
    """Listens, and acts once after each of these rounds."""

    def hear(event: Event) -> None:
        if event["event"] == "round" and event["round"] in acts:
            acts.pop(event["round"])()

    return hear


def test_a_run_gives_the_bytes_of_one_process(
    federation: Deployed, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from fedlora.commands.cli import main

    keys = keys_of(federation, tmp_path / "out")
    plain = {key: x for key, x in keys.items() if key not in ("engine", "kit")}
    (tmp_path / "run.yaml").write_text(Config(**plain).to_yaml())
    kit = ["--engine", "nvflare", "--kit", str(federation.kit())]
    assert main(["run", str(tmp_path / "run.yaml"), *kit]) == 0
    told = capfd.readouterr().out
    assert "ended after round 3" in told
    assert "3 clients, ranks 8 4 2, rows 72 72 72" in told
    quiet = in_one_process(keys, federation.folders, tmp_path / "rows" / "out")
    assert tensor_files(quiet) == tensor_files(tmp_path / "out")
    assert main(["status", str(tmp_path / "out")]) == 0
    assert not any((federation.folders / "alpha" / "kit").glob("*/app_alpha/custom"))


def test_processes_that_are_killed_change_nothing(federation: Deployed, tmp_path: Path) -> None:
    """A worker, then a client's job process (which costs the job), then all of the server."""
    keys = keys_of(federation, tmp_path / "out", method="ffa", client_ranks=4, num_rounds=4)
    told = list[Event]()

    def kill_worker() -> None:
        status = carrier.status(str(federation.folders / "beta" / "worker.sock"))
        os.kill(status["pid"], signal.SIGKILL)

    def kill_job() -> None:
        os.kill(federation.job_process("gamma"), signal.SIGKILL)

    def kill_server() -> None:
        federation.kill("server")
        federation.start(["server"])

    act = after_round({1: kill_worker, 2: kill_job, 3: kill_server})

    def hear(event: Event) -> None:
        told.append(event)
        act(event)

    result = fedlora.run(Config(**keys), report=hear)
    quiet = in_one_process(keys, federation.folders, tmp_path / "rows" / "out")
    assert tensor_files(quiet) == tensor_files(result.output_dir)
    begun = [event["resumed_from"] for event in told if event["event"] == "begin"]
    assert begun[0] is None
    assert len(begun) >= 2


def test_who_stops_a_run_goes_on_with_it(federation: Deployed, tmp_path: Path) -> None:
    keys = keys_of(federation, tmp_path / "out", num_rounds=3)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedlora.run(Config(**keys), report=after_round({1: interrupt}))
    assert (tmp_path / "out" / "round-1").is_dir()
    sites = {n: str(federation.folders / n / "worker.sock") for n in ("alpha", "beta", "gamma")}
    over_sockets = {**keys, "engine": "sites", "kit": None, "sites": sites}
    result = fedlora.run(Config(**over_sockets), resume=tmp_path / "out")
    quiet = in_one_process(keys, federation.folders, tmp_path / "rows" / "out")
    assert tensor_files(quiet) == tensor_files(result.output_dir)


def test_what_a_site_does_not_grant_is_refused(federation: Deployed, tmp_path: Path) -> None:
    keys = keys_of(federation, tmp_path / "out", max_steps=11)
    with pytest.raises(InputError, match="max_steps: 11 is asked for, and this site allows"):
        fedlora.run(Config(**keys))
    assert not (tmp_path / "out").exists()


def test_who_may_not_submit_is_refused(federation: Deployed, tmp_path: Path) -> None:
    keys = keys_of(federation, tmp_path / "out", kit=str(federation.kit(MEMBER)))
    with pytest.raises(InputError, match=f"{MEMBER} may not submit runs to this federation"):
        fedlora.run(Config(**keys))


def test_a_server_that_is_not_there_is_said(federation: Deployed, tmp_path: Path) -> None:
    """A kit of another federation, whose server does not run."""
    other = Deployed(tmp_path)
    other.deploy({})
    keys = keys_of(federation, tmp_path / "out", kit=str(other.kit()))
    with pytest.raises(FedloraError, match=r"the server at localhost:\d+ cannot be reached"):
        fedlora.run(Config(**keys))
