"""Runs a federation as Flower's ServerApp `app`: fedlora's course of a run, over Flower's grid.

It is the same run as `fedlora run` makes: the same files in `output_dir`, on the machine of the
SuperLink, and the same bytes. In a deployment the clients are the workers beside the SuperNodes; in
a simulation, resident processes of this machine that share one base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from logging import ERROR, INFO, WARNING
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from fedlora.config.config import Config
from fedlora.engines.flower.event_lines import event_line
from fedlora.engines.flower.grid_transport import GridTransport
from fedlora.engines.flower.run_config import EVENTS, RESUME, config_of
from fedlora.engines.flower.simulation import is_simulation, simulated_workers
from fedlora.engines.run_sites import MakeCalls, resume_with_sites, run_with_sites
from fedlora.engines.site_calls import SiteCalls
from fedlora.errors import FedloraError, InputError
from fedlora.runs.directory import RunDirectory, check_free
from fedlora.runs.events import Event, Report
from fedlora.runs.file_names import CONFIG
from fedlora.runs.results import Result
from fedlora.runs.resume import as_it_began, refuse_complete

_PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds before a site is asked again whose SuperNode is gone: one that was killed is let in again
only after its time is over, and has to start once more after that."""

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator, unused-ignore]
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run-config describes.

    Raises:
        FedloraError: what cannot be used, or why the run cannot go on; it was told before.
    """
    report = _telling(context.run_config)
    try:
        config = config_of(context.run_config)
        serve(grid, context, config, bool(context.run_config.get(RESUME)), report)
    except FedloraError as error:
        report({"event": "error", "message": str(error)})
        raise


def serve(grid: Grid, context: Context, config: Config, resume: bool, report: Report) -> Result:
    """Run a federation over a grid, or go on with one.

    Args:
        grid, context: as Flower hands them to a ServerApp.
        config: of the run.
        resume: go on with the run in `output_dir` after its last whole round, where there is one.
        report: told about everything that happens.

    Raises:
        FedloraError: what cannot be used, or why the run cannot go on.
    """
    with ExitStack() as stack:
        least = config.num_clients or _listed(config)
        simulated = is_simulation(grid)
        if simulated:
            config, least = stack.enter_context(simulated_workers(grid, context, config))
        elif config.train_function is not None:
            raise InputError(
                "train_function: sites train by themselves; each names its own training in its own "
                "file"
            )

        def make(config: Config, tell: Callable[[str], None]) -> SiteCalls:
            transport = GridTransport(grid, least, config.node_timeout, probes=not simulated)
            return SiteCalls(transport, tell, _PAUSES)

        return run_or_resume(config, resume, report, make)


def run_or_resume(config: Config, resume: bool, report: Report, make: MakeCalls) -> Result:
    """Begin a run over sites, or go on with the one in `output_dir`.

    Raises:
        FedloraError: what cannot be used, or why the run cannot go on.
    """
    path = Path(config.output_dir)
    if not (resume and (path / CONFIG).is_file()):
        check_free(config.output_dir)
        return run_with_sites(config, (), report, make)
    refuse_complete(path, config)
    directory = RunDirectory.open(path)
    try:
        began = as_it_began(directory.path, config)
        return resume_with_sites(began, directory, (), report, make)
    finally:
        directory.close()


def _listed(config: Config) -> int:
    """How many nodes the configuration's ranks are of; 1 where it does not say."""
    ranks = config.client_ranks
    return len(ranks) if isinstance(ranks, list) else 1


# --- telling ---


def _telling(run_config: Mapping[str, Any]) -> Report:
    """Who is told what happens: a program that reads lines, or a person who reads Flower's log."""
    return _print_line if run_config.get(EVENTS) else _log_event


def _print_line(event: Event) -> None:
    print(event_line(event), flush=True)


def _log_event(event: Event) -> None:
    """Tell a person of what matters, in Flower's own log."""
    kind = event["event"]
    if kind == "error":
        log(ERROR, "%s", event["message"])
    elif kind == "warning":
        log(WARNING, "%s", event["message"])
    elif kind == "begin":
        ranks = " ".join(map(str, event["ranks"]))
        log(INFO, "%s, clients of ranks %s, into %s", event["method"], ranks, event["output_dir"])
    elif kind in ("start", "round"):
        scores = event.get("evaluation") or {}
        numbers = {key: round(x, 4) for key, x in scores.items() if isinstance(x, int | float)}
        counted = [c["client"] for c in event.get("clients", ()) if c["weight"]]
        log(INFO, "round %d: clients %s, evaluation %s", event["round"], counted or "-", numbers)
    elif kind == "end":
        log(INFO, "ended after round %d; final/ holds round %d", event["round"], event["final"])
