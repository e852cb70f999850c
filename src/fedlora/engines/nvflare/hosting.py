"""Runs at the server what a job orders, in a directory that outlives the job."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlora.config.config import Config
from fedlora.engines.nvflare.kit import base_at_server, runs_of
from fedlora.engines.nvflare.order import Order, copy_saved, rounds_in
from fedlora.engines.run_sites import MakeCalls, resume_with_sites, run_with_sites
from fedlora.errors import FedloraError, InputError
from fedlora.runs.directory import RunDirectory
from fedlora.runs.events import Report
from fedlora.runs.file_names import CONFIG, FINAL, LOCK, METRICS
from fedlora.runs.progress import PROGRESS

RESULT = "fedlora"
"""Directory of a job's result in which the run lies."""

_FORMER_JOB = 60.0  # seconds for the process of a former job to let go of the run
_KEPT_HERE = (PROGRESS, LOCK)


def configuration(order: Order, kit: Path) -> Config:
    """The configuration of a run as the server takes it: its own directory, base and kit.

    Raises:
        InputError: the order asks for what the server does not do.
    """
    settings: dict[str, Any] = {
        **order.settings,
        "engine": "nvflare",
        "kit": str(kit),
        "sites": None,
        "num_workers": "auto",
        "output_dir": str(runs_of(kit) / order.run),
        "report_to": None,  # who has submitted it tells the trackers
        "logging_dir": None,
        "num_threads": None,
    }
    if (base := base_at_server(kit)) is not None:
        settings |= {"model_name_or_path": base, "model_revision": None}
    config = Config(**settings)
    if config.trust_remote_code:
        raise InputError(
            "trust_remote_code: the server of a federation runs no code that comes with a model; "
            "a site decides it for itself"
        )
    return config


def host(
    order: Order,
    config: Config,
    saved: Path | None,
    make: MakeCalls,
    report: Report,
    begun: Callable[[Path], None],
) -> Path:
    """Run what is ordered, or go on with it.

    Args:
        order: what to run.
        config: as `configuration` makes it.
        saved: what came with the job to go on from.
        make: makes what reaches the sites.
        report: told about everything that happens.
        begun: told the run's directory.

    Returns:
        The run's directory.

    Raises:
        InputError: it cannot be run.
        FedloraError: it cannot go on.
    """
    path = Path(config.output_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    if saved is not None:
        take_over(saved, path)
        shutil.rmtree(saved)  # it need not come back with the job's result
    if order.resumes and not (path / CONFIG).is_file():
        raise InputError(
            f"--resume: the server keeps no run {order.run}, and none came with the job; start a "
            "new run"
        )
    begun(path)
    if (path / FINAL).is_dir():
        return path  # only its result was not fetched
    if not (path / CONFIG).is_file():
        run_with_sites(config, (), report, make, run=order.run)
        return path
    directory = _opened(path)
    try:
        resume_with_sites(config, directory, (), report, make, run=order.run)
    finally:
        directory.close()
    return path


def take_over(saved: Path, path: Path) -> None:
    """Put a saved run into the place of the server's, where that has not come as far."""
    if path.is_dir() and (rounds_in(path) or [0])[-1] >= (rounds_in(saved) or [0])[-1]:
        return
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy_saved(saved, partial)
    if path.is_dir():
        _opened(path).close()  # nobody writes to it any more
        shutil.rmtree(path)
    partial.rename(path)


def publish(run: Path, to: Path) -> None:
    """Lay a run's files where FLARE takes a job's results from; without copying, if it can be."""
    if not (run / CONFIG).is_file():
        return

    def left_out(directory: str, names: list[str]) -> set[str]:
        if Path(directory) != run:
            return set()
        return {name for name in names if name in _KEPT_HERE or ".partial" in name}

    shutil.copytree(run, to, ignore=left_out, copy_function=_link)


def _link(source: str, target: str) -> None:
    # A log that is appended to is no file to have two names.
    if Path(source).name == METRICS:
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _opened(path: Path) -> RunDirectory:
    """The run's directory, once the process of a former job is gone."""
    until = time.monotonic() + _FORMER_JOB
    while True:
        try:
            return RunDirectory(path)
        except InputError as error:
            if time.monotonic() > until:
                raise FedloraError(f"the server's former job still runs: {error}") from None
            time.sleep(0.5)
