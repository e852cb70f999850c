"""Runs `fedlora worker`: one site of a federation, whose rows stay where they are."""

from __future__ import annotations

import getpass
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.commands.json_lines import Emit
from fedlora.config.arguments import Option, Syntax, take
from fedlora.engines import carrier
from fedlora.errors import FedloraError, InputError

if TYPE_CHECKING:
    from fedlora.config.site import Site

HELP = """\
fedlora worker --site SITE.yaml [--status | --stop | --check | --install [--output FILE]] [--json]
fedlora worker --example > SITE.yaml

Takes part in federations as one site. The worker holds the model and the site's rows, and waits on
a socket that its own user alone can open for what a server asks: to join a run, to train a round,
to evaluate the global model. Adapters, counts and metrics leave, and nothing else: no row, no
token, no text of an error that quotes one. The file says what is the site's own and what a server
may set at most.

  --example   print a site's file with a comment on every key
  --check     read the file, the rows and the model's shapes, and say how many rows can be used;
              no weights are read, nothing is served; exit code 1 with what to do if it cannot work
  --status    what the worker is at: state, run, round, step, loss, since when, rows, memory;
              it answers while it trains
  --stop      end it; a training is given up after its next step, and can be asked for again
  --install   print a systemd unit that may touch as little as it needs, and the commands that
              start it now and with the machine; see --output
  --output FILE   with --install: write the unit to this file
  --json      one JSON object: with --status what stands above, else event, and what was found

A process that crashes is started again, and goes on with the run it was in: what it has answered
and what the site keeps for itself lie in `state_dir`. Ctrl-C and SIGTERM end the worker and remove
its socket. Rows and model are read once; after a change of them, stop and start it.

Example:
  fedlora worker --example > clinic.yaml         # edit it
  fedlora worker --site clinic.yaml --check
  fedlora worker --site clinic.yaml
"""
SYNTAX = Syntax(
    {
        "site": Option("the site's file", path="file"),
        "example": Option("print a site's file", flag=True),
        "check": Option("say whether the site's rows and model can be used", flag=True),
        "status": Option("what the worker is at", flag=True),
        "stop": Option("end the worker", flag=True),
        "install": Option("print a systemd unit", flag=True),
        "output": Option("where the unit is written", path="file"),
    }
)

_ACTIONS = ("example", "check", "status", "stop", "install")
_ENDING = 30.0  # seconds for a worker to end


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora worker`."""
    own = take(arguments, SYNTAX)
    if arguments:
        raise InputError(f"{arguments[0]}: worker has no such option; see fedlora worker --help")
    asked = [name for name in _ACTIONS if own[name]]
    if len(asked) > 1:
        raise InputError(f"--{asked[0]} and --{asked[1]}: give one of them")
    if own["output"] and asked != ["install"]:
        raise InputError("--output belongs to --install")
    if asked == ["example"]:
        return _example(emit)
    if own["site"] is None:
        raise InputError(
            "worker: give the site's file, as --site SITE.yaml; fedlora worker --example prints one"
        )
    from fedlora.config.site import read_site

    path = Path(own["site"])
    site = read_site(path)
    if asked == ["check"]:
        return _check(path, site, emit)
    if asked == ["status"]:
        return _status(site, emit)
    if asked == ["stop"]:
        return _stop(site, emit)
    if asked == ["install"]:
        return _install(path, site, own["output"], emit)
    return _serve(path, site, emit)


def _example(emit: Emit | None) -> int:
    from fedlora.commands.worker.example import EXAMPLE

    if emit:
        emit({"event": "example", "text": EXAMPLE})
    else:
        print(EXAMPLE, end="")
    return 0


def _serve(path: Path, site: Site, emit: Emit | None) -> int:
    """Serve the site until the worker is told to end."""
    from fedlora.engines.site_process import supervise

    def tell(message: str) -> None:
        if emit:
            emit({"event": "worker", "site": site.name, "message": message})
        else:
            print(message, flush=True)

    supervise(path, site, tell)
    return 0


def _status(site: Site, emit: Emit | None) -> int:
    from fedlora.commands.worker.show import status_lines

    try:
        status = carrier.status(site.socket)
    except carrier.SiteError as error:
        raise FedloraError(error.reason) from None
    if emit:
        emit({"event": "status", **status})
    else:
        print("\n".join(status_lines(status, time.time())))
    return 0


def _stop(site: Site, emit: Emit | None) -> int:
    """Tell the worker to end, and wait until its socket is gone."""
    try:
        carrier.stop(site.socket)
    except carrier.SiteError as error:
        raise FedloraError(error.reason) from None
    until = time.monotonic() + _ENDING
    while Path(site.socket).exists():
        if time.monotonic() > until:
            raise FedloraError(
                f"{site.socket}: the worker was told to end, and is still at its step after "
                f"{_ENDING:.0f} s; --status says what it is at"
            )
        time.sleep(0.05)
    if emit:
        emit({"event": "stopped", "site": site.name})
    else:
        print(f"{site.name}: stopped")
    return 0


def _check(path: Path, site: Site, emit: Emit | None) -> int:
    """Whether the site can work; what is wrong is said like a finding, with exit code 1."""
    from fedlora.commands.console import quiet_libraries

    quiet_libraries()
    from fedlora.commands.worker.show import check_lines
    from fedlora.runs.site_check import check_site

    try:
        check = check_site(site)
    except InputError as error:
        if emit:
            emit({"event": "check", "site": site.name, "ok": False, "problem": str(error)})
        else:
            print(f"{site.name}: cannot work\n  {error}")
        return 1
    if emit:
        emit({"event": "check", "site": site.name, "ok": True, **asdict(check)})
    else:
        print("\n".join(check_lines(path, site, check)))
    return 0


def _install(path: Path, site: Site, output: str | None, emit: Emit | None) -> int:
    from fedlora.commands.worker.unit import unit_of

    installed = unit_of(path, site, sys.executable, getpass.getuser(), output)
    if output:
        try:
            Path(output).write_text(installed.text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"--output {output}: cannot be written: {error.strerror}") from None
    told: dict[str, Any] = {
        "event": "install",
        "name": installed.name,
        "unit": installed.text,
        "commands": installed.commands,
        "output": output,
    }
    if emit:
        emit(told)
        return 0
    if not output:
        print(installed.text)
    to_start = "\n".join(f"#   {command}" for command in installed.commands)
    saved = f"# written: {output}\n" if output else f"# save this as {installed.name}\n"
    print(f"{saved}# to start it, now and with the machine:\n{to_start}")
    return 0
