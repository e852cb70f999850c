"""Submits a run to Flower for `fedlora run`: the app's bundle, the run's events, its end.

The run is made by the ServerApp, on the machine of the SuperLink, which writes `output_dir`. What
happens there comes back as lines in Flower's log, so that a person sees the same as of a run in one
process. One that Flower has lost is submitted again, and goes on after its last whole round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedlora.adapters.saved_adapter import load_adapter
from fedlora.client.local_training import TrainFunction
from fedlora.client.trainer import train, training_of
from fedlora.config.config import Config
from fedlora.engines.flower.event_lines import read_event
from fedlora.engines.flower.run_config import write_bundle
from fedlora.engines.run_sites import check_trains_itself
from fedlora.errors import FedloraError, InputError
from fedlora.runs.absolute_paths import resolve_paths
from fedlora.runs.directory import check_free
from fedlora.runs.events import Notice, Report
from fedlora.runs.file_names import CONFIG, FINAL
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.results import Result
from fedlora.runs.resume import as_it_began
from fedlora.runs.session import assemble

MOST_FAILURES = 3
"""How often in a row a run is submitted again that has saved no further round."""

_TAIL = 5  # last lines of a log that are shown
_PATIENCE = 120.0  # seconds in which a SuperLink that is started again has to answer


def check_flower() -> None:
    """Refuse to begin where Flower is not installed.

    Raises:
        InputError: how to install it.
    """
    if find_spec("flwr") is None:
        raise InputError("engine: flower needs Flower: pip install 'fedlora[flower]'")


def check_training(config: Config, given: TrainFunction) -> None:
    """Refuse a local training that clients in other processes would not find.

    Clients of a simulation import the one that the configuration names; sites have their own.

    Args:
        config: of the run.
        given: in Python; fedlora's own where nothing was given.

    Raises:
        InputError: it has no name in the configuration, or there is no function of that name.
    """
    if config.trains_at_sites:
        check_trains_itself(given)
    elif training_of(config.train_function, given) is not train and config.train_function is None:
        raise InputError(
            "train_function: with engine: flower the clients train in other processes, which a "
            "function given in Python does not reach; name it in the configuration instead, such "
            "as train_function: my_training.py:sft"
        )


def submit(config: Config, report: Report, *, resume: bool) -> Result:
    """Run a federation on Flower, and follow it to its end.

    Args:
        config: of the run; `flower_superlink` names the connection of Flower's `config.toml`.
        report: told about everything that happens.
        resume: go on with the run in `output_dir`.

    Raises:
        InputError: the configuration cannot be used.
        FedloraError: what the ServerApp says, or that Flower has lost the run again and again.
    """
    check_flower()
    path = Path(config.output_dir).absolute()
    config = resolve_paths(config).model_copy(update={"output_dir": str(path)})
    if resume:
        config = as_it_began(path, config)
    else:
        check_free(config.output_dir)
    clients = check_simulation(config)
    failures, saved, end = 0, -1, _Submitted()
    while True:
        end = _follow(config, clients, report, resume=resume or failures > 0)
        if end.error:
            raise FedloraError(end.error)
        if end.completed:
            return _result(path)
        failures = failures + 1 if end.saved <= saved else 1
        saved = max(saved, end.saved)
        if failures > MOST_FAILURES or not end.run:
            raise FedloraError(_lost(end, path))
        where = f"after round {saved}" if saved >= 0 else "from the start"
        message = f"Flower's run {end.run} ended ({end.status}); it is submitted again, and goes on"
        report(Notice(event="warning", message=f"{message} {where}"))


@dataclass
class _Submitted:
    """What became of one submission.

    Args:
        run: Flower's id of it; "": it was not begun.
        status: how it ended, in Flower's words.
        error: what the ServerApp says of a run that cannot go on; "": nothing.
        saved: the last round that was saved; -1: none.
        tail: the last lines of the log that are no events.
        heard: the lines of events, which come again where the log is read anew.
    """

    run: str = ""
    status: str = ""
    error: str = ""
    saved: int = -1
    tail: list[str] = field(default_factory=list)
    heard: set[str] = field(default_factory=set)

    @property
    def completed(self) -> bool:
        """Whether the run has come to its end."""
        return self.status == "finished:completed"

    @property
    def goes_on(self) -> bool:
        """Whether Flower still runs it."""
        return self.status.partition(":")[0] in ("pending", "starting", "running")

    def hear(self, line: str, report: Report) -> None:
        """Take a line of Flower's log."""
        event = read_event(line)
        if event is None:
            if "started run " in line and not self.run:
                self.run = line.split("started run ")[1].split()[0]
            if line.strip():
                self.tail = [*self.tail, line.strip()][-_TAIL:]
            return
        if line in self.heard:
            return
        self.heard.add(line)
        if event["event"] == "error":
            self.error = str(event["message"])
            return
        if event["event"] == "round":
            self.saved = int(event["round"])
        report(event)


def _follow(config: Config, clients: int | None, report: Report, *, resume: bool) -> _Submitted:
    """Submit a run, and report what happens until it ends.

    Args:
        config: of the run.
        clients: of a simulation; None: it is a deployment.
        report: told about everything that happens.
        resume: go on with the run in `output_dir`.
    """
    end = _Submitted()
    try:
        with tempfile.TemporaryDirectory(prefix="fedlora-app-") as app:
            write_bundle(Path(app), config.flat(), resume=resume, events=True)
            command = ["run", app, *_connection(config), "--stream", *_nodes(clients)]
            _listen(end, command, report)
        while end.run:
            end.status = _status(end.run, config)
            if not end.goes_on:
                break
            # The log has broken off, perhaps because the SuperLink was started again.
            _listen(end, ["log", end.run, *_connection(config), "--stream"], report)
    except BaseException:
        if end.run:
            _ask(["stop", end.run, *_connection(config)])
        raise
    return end


def _listen(end: _Submitted, command: Sequence[str], report: Report) -> None:
    """Run a command of Flower's that prints a run's log."""
    with subprocess.Popen(
        _flwr(*command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_environment(),
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                end.hear(line, report)
        finally:
            process.terminate()


def _status(run: str, config: Config) -> str:
    """How a run has ended: an exit code does not tell, but Flower's list of runs does.

    Raises:
        FedloraError: the SuperLink does not answer.
    """
    until = time.monotonic() + _PATIENCE
    while True:
        told = _ask(["list", "--run-id", run, *_connection(config), "--format", "json"])
        with suppress(ValueError, KeyError, IndexError, TypeError):
            return str(json.loads(told)["runs"][0]["status"])
        if time.monotonic() > until:
            raise FedloraError(
                f"the SuperLink does not answer any more; run {run} may go on without this command"
            )
        time.sleep(1.0)


def _ask(command: Sequence[str]) -> str:
    """What a command of Flower's prints."""
    asked = subprocess.run(_flwr(*command), capture_output=True, text=True, env=_environment())
    return asked.stdout


def _flwr(*arguments: str) -> list[str]:
    """The command line of Flower's own tool, of the Python that runs this."""
    return [sys.executable, "-m", "flwr.cli.app", *arguments]


def _environment() -> dict[str, str]:
    """This environment, in which Flower finds its own commands."""
    path = os.environ.get("PATH", "")
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{path}"}


def _connection(config: Config) -> list[str]:
    return [config.flower_superlink] if config.flower_superlink else []


def check_simulation(config: Config) -> int | None:
    """Check what a simulation will load, before Flower is started for it.

    Returns:
        How many clients there are, each of which needs a node; None: it is a deployment, whose
        rows lie elsewhere.

    Raises:
        InputError: what cannot be used, and what to do.
    """
    if not (config.train_file or config.dataset_name):
        return None
    session = assemble(config.model_copy(update={"engine": "workers"}), weights=False)
    return len(session.federation.ranks)


def _nodes(clients: int | None) -> list[str]:
    """What Flower has to be told of a simulation: how many nodes there are, and what each takes.

    Nodes only carry bytes. Flower's own default reserves two cores for each that is at work.
    """
    if clients is None:
        return []
    return ["--federation-config", f"num-supernodes={clients} client-resources-num-cpus=1"]


def _lost(end: _Submitted, path: Path) -> str:
    """What to say of a run that Flower does not bring to its end."""
    if not end.run:
        return "Flower has not begun the run:\n" + "\n".join(f"  {line}" for line in end.tail)
    on = f"; go on with: fedlora run --resume {path}" if (path / CONFIG).is_file() else ""
    tail = "\n".join(f"  {line}" for line in end.tail)
    return (
        f"Flower's run {end.run} ended ({end.status}), {MOST_FAILURES} times in a row{on}\n{tail}"
    )


def _result(path: Path) -> Result:
    """The result of a complete run, as its directory has it."""
    metrics: list[dict[str, Any]] = read_metrics(path)
    end: Mapping[str, Any] = next(line for line in reversed(metrics) if line["event"] == "end")
    adapter: Mapping[str, Any] = {}
    with suppress(InputError):  # every client has a model of its own
        adapter = load_adapter(path / FINAL).deltas
    return Result(path, path / FINAL, adapter, metrics, end["best"])
