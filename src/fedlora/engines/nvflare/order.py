"""Describes a run to the server that is to take it: what a job of NVIDIA FLARE says, and no code.

An admin writes the order into the server's part of the job, beside FLARE's own configuration, and
with it the saved state of a run that went on elsewhere; the server's job process reads it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedlora.engines.nvflare.kit import CONTROLLER, EXECUTOR, TASK
from fedlora.errors import InputError
from fedlora.runs.file_names import CONFIG, METRICS, ROUND

POLL = 0.1
"""Seconds after which a site that has nothing to do asks again; read under "server" alone."""

_FILE, _SAVED = "fedlora_run.json", "fedlora_saved"
_RUN = re.compile(r"[0-9a-f]{16}")
_SERVER, _SITE = "app_server", "app_site"


@dataclass(frozen=True)
class Order:
    """What the server is asked to run.

    Args:
        run: the run's id, 16 hexadecimal digits; the server keeps the run under this name.
        settings: the configuration, flat.
        sites: all sites that take part, present or not.
        resumes: whether the run has begun before, so that there must be something to go on from.
    """

    run: str
    settings: Mapping[str, Any]
    sites: Sequence[str]
    resumes: bool = False


def run_id(directory: Path) -> str | None:
    """The id by which a server knows a run that has begun; None: nothing was logged yet.

    A run that began without sites has none, and is named after its first line.
    """
    try:
        with (directory / METRICS).open("rb") as file:
            first = file.readline()
        header = json.loads(first)
    except (OSError, ValueError):
        return None
    run = header.get("run") if isinstance(header, dict) else None
    if isinstance(run, str) and _RUN.fullmatch(run):
        return run
    return hashlib.sha256(first).hexdigest()[:16]


def write_job(path: Path, order: Order, present: Sequence[str], saved: Path | None = None) -> None:
    """Write a job.

    FLARE ends a job whose sites are fewer than `min_clients`, at any moment. The run itself decides
    how many a round needs, and who must be there at its start.

    Args:
        path: the directory to make; its name is the job's.
        order: what is to be run.
        present: the sites that it is deployed to.
        saved: directory of a run whose saved rounds go with it.
    """
    meta = {
        "name": path.name,
        "min_clients": 1,
        "deploy_map": {_SERVER: ["server"], _SITE: list(present)},
        "resource_spec": {},
    }
    server = {
        "format_version": 2,
        "server": {"task_request_interval": POLL},
        "task_data_filters": [],
        "task_result_filters": [],
        "components": [],
        "workflows": [{"id": "fedlora", "path": CONTROLLER, "args": {}}],
    }
    site = {
        "format_version": 2,
        "executors": [{"tasks": [TASK], "executor": {"path": EXECUTOR, "args": {}}}],
        "task_data_filters": [],
        "task_result_filters": [],
        "components": [],
    }
    server_config, site_config = path / _SERVER / "config", path / _SITE / "config"
    server_config.mkdir(parents=True)
    site_config.mkdir(parents=True)
    _write(path / "meta.json", meta)
    _write(server_config / "config_fed_server.json", server)
    _write(site_config / "config_fed_client.json", site)
    _write(server_config / _FILE, asdict(order))
    if saved is not None:
        copy_saved(saved, server_config / _SAVED)


def read_order(config: Path) -> Order:
    """The order in a job's configuration at the server.

    Raises:
        InputError: it is none.
    """
    try:
        values = json.loads((config / _FILE).read_text(encoding="utf-8"))
        order = Order(**values)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"the job says not what is to be run: {error}") from None
    if not isinstance(order.run, str) or not _RUN.fullmatch(order.run):
        raise InputError("the job names no run")
    if not isinstance(order.settings, Mapping) or not isinstance(order.sites, Sequence):
        raise InputError("the job says not what is to be run")
    return order


def saved_in(config: Path) -> Path | None:
    """The directory of the saved run that came with a job; None: none came."""
    return config / _SAVED if (config / _SAVED).is_dir() else None


def copy_saved(run: Path, to: Path) -> None:
    """Copy what a run goes on from: its configuration, its log and its rounds.

    Not the newest one alone: it may be damaged, and an earlier one may be the best.
    """
    to.mkdir(parents=True)
    for name in (CONFIG, METRICS):
        if (run / name).is_file():
            shutil.copyfile(run / name, to / name)
    for number in rounds_in(run):
        shutil.copytree(run / f"round-{number}", to / f"round-{number}")


def rounds_in(run: Path) -> list[int]:
    """The rounds that lie in a run's directory, ascending."""
    matches = (ROUND.fullmatch(path.name) for path in run.iterdir() if path.is_dir())
    return sorted(int(match.group(1)) for match in matches if match)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
