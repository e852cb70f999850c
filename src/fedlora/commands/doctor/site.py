"""Looks at a site before any job: its kit, the server, its rows, its model, its memory."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from fedlora.commands.doctor.certificates import certificate_checks, credentials_of
from fedlora.commands.doctor.checks import OK, PROBLEM, WARNING, Check, requirements, shortfall
from fedlora.commands.doctor.connection import clock_check, server_checks
from fedlora.config.site import Site
from fedlora.engines import carrier
from fedlora.errors import FedloraError, InputError
from fedlora.text import human_bytes

NVFLARE_CLIENT = Path("startup") / "fed_client.json"
"""Of a site's kit: where its server is."""


def site_checks(site: Site, kit: Path | None, ready: bool) -> Iterator[Check]:
    """A line for everything that a site needs.

    Args:
        site: its file.
        kit: its kit for the engine; None: it is called through its socket alone.
        ready: the libraries work, so that model and rows can be read.
    """
    yield clock_check()
    if kit is not None:
        yield from _kit_checks(site, kit)
    yield _worker_check(site)
    if ready:
        yield from _rows_and_model(site)
    else:
        yield Check("rows", WARNING, "not read: a library does not work", "mend it, and look again")


def engine_check() -> Check:
    """Whether the engine of the kit is there in a version that the package works with."""
    remedy = "pip install 'fedlora[nvflare]'"
    for requirement in requirements("nvflare"):
        if wrong := shortfall(requirement):
            return Check("engine", PROBLEM, f"{requirement.name} {wrong}", remedy)
    try:
        return Check("engine", OK, f"nvflare {metadata.version('nvflare')}")
    except metadata.PackageNotFoundError:
        return Check("engine", PROBLEM, "nvflare is not installed", remedy)


def _kit_checks(site: Site, kit: Path) -> Iterator[Check]:
    yield engine_check()
    anew = "ask whoever deployed the federation for a new folder"
    try:
        client = json.loads((kit / NVFLARE_CLIENT).read_text(encoding="utf-8"))
        name, (server, *_) = client["client"]["fqsn"], client["servers"]
        host, _, port = server["service"]["target"].rpartition(":")
        number = int(port)
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Check("kit", PROBLEM, f"{kit / NVFLARE_CLIENT} cannot be read: {error}", anew)
        return
    if name != site.name:
        remedy = f"name: {name} in the site's file; the server calls it so"
        yield Check("kit", PROBLEM, f"is that of {name}, and the file that of {site.name}", remedy)
    else:
        yield Check("kit", OK, f"{name} of {server['name']}")
    yield _socket_check(site, kit)
    own = credentials_of(kit)
    yield from certificate_checks(own, name, datetime.datetime.now(datetime.UTC))
    if all(path.is_file() for path in (own.certificate, own.key, own.root)):
        yield from server_checks(host, number, own)


def _socket_check(site: Site, kit: Path) -> Check:
    """Whether the client of the kit calls the worker where it listens."""
    from fedlora.engines.nvflare.kit import OWN_FILE, socket_of

    try:
        called = Path(socket_of(kit)).resolve()
    except InputError as error:
        return Check("socket", PROBLEM, str(error), "write it as it was deployed")
    if called != Path(site.socket).resolve():
        found = f"the kit calls {called}, and the worker listens on {site.socket}"
        return Check("socket", PROBLEM, found, f"give both the same: {kit / OWN_FILE}, site's file")
    return Check("socket", OK, str(called))


def _worker_check(site: Site) -> Check:
    """Whether the site's worker answers."""
    try:
        status = carrier.status(site.socket)
    except (carrier.SiteError, FedloraError, OSError):
        remedy = "start it before a run: ./start in its folder, or fedlora worker --site"
        return Check("worker", WARNING, f"does not listen on {site.socket}", remedy)
    if status["site"] != site.name:
        found = f"{site.socket} is that of {status['site']}"
        return Check("worker", PROBLEM, found, "give each site a socket of its own")
    return Check("worker", OK, f"{status['state']}, process {status['pid']}")


def _rows_and_model(site: Site) -> Iterator[Check]:
    """Whether rows and model can be used, and fit in the memory that there is."""
    from fedlora.commands.console import quiet_libraries

    quiet_libraries()
    from fedlora.runs.site_check import check_site

    remedy = "see fedlora data --help on how rows are read, and the site's file"
    try:
        check = check_site(site)
    except InputError as error:
        yield Check("rows and model", PROBLEM, str(error), "correct the site's file, or the rows")
        return
    if check.train_rows is None:
        found = f"{check.rows:,} read; no model is named, so it is open how many can be used"
        remedy = "name model_name_or_path in the site's file, or bound what a server may name"
        yield Check("rows", WARNING, found, remedy)
        return
    dropped = sum(check.dropped.values())
    found = (
        f"{check.rows - dropped:,} of {check.rows:,} can be used: {check.train_rows:,} to train on "
        f"({check.tokens:,} tokens), {check.eval_rows:,} to evaluate on"
    )
    why = "; ".join(f"{number:,} dropped: {why}" for why, number in check.dropped.items())
    yield Check(
        "rows",
        WARNING if dropped else OK,
        found + (f"; {why}" if why else ""),
        remedy if dropped else "",
    )
    if not check.eval_rows:
        found, remedy = "none are held out", "give client_eval_fraction or eval_file"
        yield Check("evaluation", WARNING, found, remedy)
    yield from _model(site, check.architecture, check.parameters)


def _model(site: Site, architecture: str | None, parameters: int | None) -> Iterator[Check]:
    """The base's fingerprint, and the memory that training takes at the largest rank granted."""
    from fedlora.runs.site_check import measure_site

    try:
        need = measure_site(site)
    except (InputError, MemoryError, RuntimeError) as error:
        remedy = "more memory, or a smaller base at all sites"
        yield Check("base", PROBLEM, f"{architecture} cannot be loaded: {error}", remedy)
        return
    found = f"{architecture}, {parameters:,} parameters, {need.dtype}, fingerprint {need.base}"
    yield Check("base", OK, found)
    taken = (
        f"about {human_bytes(need.memory)} for rank {need.rank} and {need.batch_size} rows a step, "
        f"{human_bytes(need.available)} free beside the base"
    )
    if need.memory > need.available:
        remedy = (
            "grant less: bounds lora_r and max_length, or max_rank; or gradient_checkpointing: true"
        )
        yield Check("memory for training", PROBLEM, taken, remedy)
    elif need.memory > need.available // 2:
        yield Check("memory for training", WARNING, taken, "end other programs")
    else:
        yield Check("memory for training", OK, taken)
