"""Runs a federation whose sites are other processes, from the first call to the last."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

from fedlora.client.local_training import TrainFunction
from fedlora.client.trainer import train
from fedlora.config.config import Config
from fedlora.engines.roster import Roster, roster_of
from fedlora.engines.site_calls import SiteCalls
from fedlora.engines.site_handshake import Opened, open_federation
from fedlora.engines.sites import SitesEngine
from fedlora.engines.transport import SocketTransport, Transport
from fedlora.errors import InputError
from fedlora.runs.absolute_paths import resolve_paths
from fedlora.runs.course import Course
from fedlora.runs.directory import RunDirectory
from fedlora.runs.events import Report
from fedlora.runs.file_names import METRICS
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.observers import observers
from fedlora.runs.results import Callbacks, Result
from fedlora.runs.run_header import config_file
from fedlora.runs.session import starting_state

MakeCalls = Callable[[Config, Callable[[str], None]], SiteCalls]
"""Makes what reaches the sites, of the configuration and of who is told what people should know."""


def calls_on_sockets(config: Config, tell: Callable[[str], None]) -> SiteCalls:
    """Reaches the workers whose sockets the configuration names."""
    transport: Transport = SocketTransport(resolve_paths(config).sites or {})
    return SiteCalls(transport, tell)


def check_trains_itself(train_function: TrainFunction) -> None:
    """Refuse a local training that would have to travel to the sites.

    Raises:
        InputError: it is not the package's own.
    """
    if train_function is not train:
        raise InputError("train_function: sites train by themselves; it cannot be sent to them")


def run_with_sites(
    config: Config,
    callbacks: Callbacks,
    report: Report,
    make: MakeCalls = calls_on_sockets,
    run: str = "",
) -> Result:
    """Run a new federation.

    Args:
        config, callbacks, report: see `fedlora.engines.local.run`.
        make: makes what reaches the sites.
        run: the run's id; "": any.
    """
    notices = SimpleQueue[str]()
    with closing(make(config, notices.put)) as calls:
        opened = open_federation(config, calls, Roster(run), 0)
        path = Path(opened.session.config.output_dir)
        directory = RunDirectory.create(path, config_file(opened.session))
        with closing(directory):
            return _take(opened, directory, callbacks, report, notices, resumes=False)


def resume_with_sites(
    config: Config,
    directory: RunDirectory,
    callbacks: Callbacks,
    report: Report,
    make: MakeCalls = calls_on_sockets,
    run: str = "",
) -> Result:
    """Go on with a federation after its last commit.

    Args:
        config: as the run began.
        directory: of the run; whoever opened it closes it.
        callbacks, report: see `fedlora.engines.local.run`.
        make: makes what reaches the sites.
        run: the id of a run that has logged none; "": any.
    """
    notices = SimpleQueue[str]()
    saved, problems = directory.load_latest()
    number = saved.state.round if saved else 0
    lines = read_metrics(directory.path) if (directory.path / METRICS).is_file() else []
    roster = roster_of([line for line in lines if line["round"] <= number])
    roster = replace(roster, run=roster.run or run)
    with closing(make(config, notices.put)) as calls:
        opened = open_federation(config, calls, roster, number)
        for problem in problems:
            notices.put(f"{problem}; going on from {f'round {number}' if saved else 'the start'}")
        return _take(opened, directory, callbacks, report, notices, resumes=True)


def _take(
    opened: Opened,
    directory: RunDirectory,
    callbacks: Callbacks,
    report: Report,
    notices: SimpleQueue[str],
    resumes: bool,
) -> Result:
    """The course of a run whose sites have joined."""
    session = opened.session
    session = replace(session, warnings=(*session.warnings, *_drained(notices)))
    initial = starting_state(session)
    with observers(session.config, directory.path, report) as tell:
        engine = SitesEngine(replace(opened, session=session), tell, notices)
        course = Course(session, directory, initial, engine, callbacks, tell)
        engine.serve(course.server)
        result = course.resume() if resumes else course.start()
        engine.say_goodbye()
        return result


def _drained(notices: SimpleQueue[str]) -> list[str]:
    """What was told until now."""
    return [notices.get() for _ in range(notices.qsize())]
