"""NVIDIA FLARE on machines of their own: namespaces with addresses, whose links can be cut."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fedlora
from fedlora.config.config import Config
from fedlora.engines import carrier
from fedlora.errors import FedloraError
from fedlora.runs.events import Event
from support.courses import tensor_files
from support.deployed import SITES, Deployed, in_one_process, until
from support.namespaces import Network, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KEYS: dict[str, Any] = {
    "engine": "nvflare",
    "server_evaluation": False,
    "model_name_or_path": "embedded",
    "method": "exact",
    "client_ranks": [8, 4, 2],
    "num_rounds": 3,
    "max_steps": 4,
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
    """A server and three sites, each on a machine of its own; this one is the admin's."""
    if why := why_not():
        pytest.skip(why)
    network = Network(("server", *SITES))
    deployed = Deployed(tmp_path_factory.mktemp("n") / "clinics", network=network)
    try:
        network.start()
        deployed.deploy({"lora_r": 8, "max_steps": 10})
        deployed.start()
        yield deployed
    finally:
        network.stop()


@pytest.fixture(scope="module")
def quiet(federation: Deployed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The files of the same run in one process, in which nothing happens."""
    out = tmp_path_factory.mktemp("quiet") / "rows" / "out"
    return tensor_files(in_one_process({**KEYS, "output_dir": str(out)}, federation.folders, out))


def network_of(federation: Deployed) -> Network:
    assert federation.network
    return federation.network


def status_of(federation: Deployed, site: str) -> dict[str, Any]:
    """What a site's worker is at; empty where it cannot be asked."""
    with contextlib.suppress(carrier.SiteError):
        return carrier.status(str(federation.folders / site / "worker.sock"))
    return {}


def trains(federation: Deployed, site: str, after: int) -> bool:
    """Whether a site trains a later round than this one."""
    status = status_of(federation, site)
    return status.get("state") == "training" and status.get("round", 0) > after


class Happening:
    """Does something in the middle of the round after one, beside the run.

    Args:
        after: the round.
        what: is done.
    """

    def __init__(self, after: int, what: Callable[[], None]) -> None:
        self.after, self.what = after, what
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def hear(self, event: Event) -> None:
        """Listens to the run."""
        if event["event"] == "round" and event["round"] == self.after and self.thread is None:
            self.thread = threading.Thread(target=self._do)
            self.thread.start()

    def _do(self) -> None:
        try:
            self.what()
        except BaseException as error:
            self.error = error

    def end(self) -> None:
        """Wait until it is done; what went wrong with it is raised."""
        assert self.thread, "the round has not come"
        self.thread.join()
        if self.error:
            raise self.error


def run_with(federation: Deployed, out: Path, happening: Happening, **changed: Any) -> Path:
    keys = {**KEYS, "kit": str(federation.kit()), "output_dir": str(out), **changed}
    try:
        return fedlora.run(Config(**keys), report=happening.hear).output_dir
    finally:
        happening.end()


def test_a_link_that_is_cut_in_a_round_and_restored(
    federation: Deployed, quiet: dict[str, Any], tmp_path: Path
) -> None:
    """It comes back once the site has trained, so that its answer finds no way at first."""
    network = network_of(federation)

    def cut() -> None:
        until(lambda: trains(federation, "beta", 1), "beta trains")
        network.cut("beta")
        try:
            until(lambda: status_of(federation, "beta").get("state") == "idle", "beta is done")
        finally:
            network.restore("beta")

    out = run_with(federation, tmp_path / "out", Happening(1, cut))
    assert tensor_files(out) == quiet


def test_the_server_and_its_parent_are_killed(
    federation: Deployed, quiet: dict[str, Any], tmp_path: Path
) -> None:
    network = network_of(federation)

    def kill() -> None:
        until(lambda: trains(federation, "alpha", 1), "alpha trains")
        network.switch_off("server")
        federation.start(["server"])

    out = run_with(federation, tmp_path / "out", Happening(1, kill))
    assert tensor_files(out) == quiet


def test_a_site_that_is_twenty_times_slower(
    federation: Deployed, quiet: dict[str, Any], tmp_path: Path
) -> None:
    """It is let run for a twentieth of the time while it trains a round."""

    def slow() -> None:
        until(lambda: trains(federation, "gamma", 1), "gamma trains")
        pid = int(status_of(federation, "gamma")["pid"])
        for _ in range(15):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.95)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.05)

    out = run_with(federation, tmp_path / "out", Happening(1, slow))
    assert tensor_files(out) == quiet


def test_a_machine_that_is_gone_and_comes_back(
    federation: Deployed, quiet: dict[str, Any], tmp_path: Path
) -> None:
    """Without it there is no quorum; the run goes on once it is back, or can be resumed."""
    network = network_of(federation)

    def switch() -> None:
        until(lambda: trains(federation, "gamma", 1), "gamma trains")
        network.switch_off("gamma")
        federation.start(["gamma"])

    happening = Happening(1, switch)
    try:
        out = run_with(federation, tmp_path / "out", happening, min_clients_per_round=3)
    except FedloraError:
        out = fedlora.run(resume=tmp_path / "out").output_dir
    assert tensor_files(out) == quiet
