"""Runs `fedlora doctor`: is this machine ready for a run, and what to do where it is not.

Nothing in this room imports a library that it looks at, whatever way that may be broken.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedlora.commands.doctor.checks import OK, PROBLEM, WARNING, Check, Machine, examine
from fedlora.commands.doctor.probe import probe
from fedlora.commands.json_lines import Emit
from fedlora.config.arguments import Option, Syntax, take
from fedlora.errors import InputError

HELP = """\
fedlora doctor [--output_dir DIR] [--json]
fedlora doctor --site SITE.yaml [--kit KIT] [--json]
fedlora doctor --federation FEDERATION.yaml [--kit KIT] [--json]

Says whether this machine is ready for a run, a line for each thing that a run needs: Python, the
libraries and their versions, the device, memory, the disk under the output and the caches, cores,
threads and load, offline mode, extras. Each is ok, a warning or a problem, the latter two with what
to do. Without --site it reads no model and no data.

  --output_dir DIR   where a run would be written (the current directory)
  --site SITE.yaml   a site of a federation: also its clock, its certificate and when it ends, the
                     server (name, port, TLS, whether it lets this site in), its worker, how many of
                     its rows can be used, its base's fingerprint, the memory for its largest rank
  --federation FEDERATION.yaml
                     where runs are started: also the clock, the server, the admin's certificate
  --kit KIT          of this participant, as fedlora deploy made it; with --site: `kit` beside
                     the file, if it is there
  --json             one JSON object: ok, and checks (name, state, found, remedy)

Exit code 1 if a problem prevents a run, otherwise 0.
"""
SYNTAX = Syntax(
    {
        "output_dir": Option("where a run would be written", path="directory"),
        "site": Option("the file of a site", path="file"),
        "federation": Option("the file of a federation", path="file"),
        "kit": Option("the kit of this participant", path="directory"),
    }
)


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora doctor`."""
    own = take(arguments, SYNTAX)
    if arguments:
        raise InputError(f"{arguments[0]}: doctor has no such option; see fedlora doctor --help")
    if own["site"] and own["federation"]:
        raise InputError("--site and --federation: give one of them")
    if own["kit"] and not (own["site"] or own["federation"]):
        raise InputError("--kit belongs to --site or --federation")
    checks = _checks(own)
    ready = all(check.state != PROBLEM for check in checks)
    if emit:
        emit({"event": "doctor", "ok": ready, "checks": [asdict(check) for check in checks]})
    else:
        _show(checks)
    return 0 if ready else 1


def _checks(own: Mapping[str, Any]) -> list[Check]:
    """Those of the machine, and those of what this machine is in a federation."""
    kit = Path(own["kit"]) if own["kit"] else None
    if own["site"]:
        from fedlora.commands.doctor.site import site_checks
        from fedlora.config.site import read_site

        site, beside = read_site(own["site"]), Path(own["site"]).parent / "kit"
        machine = examine(Machine(Path(own["output_dir"] or site.state_dir), probe()))
        works = all(check.state != PROBLEM for check in machine)
        return [*machine, *site_checks(site, kit or (beside if beside.is_dir() else None), works)]
    if own["federation"]:
        from fedlora.commands.doctor.federation import federation_checks
        from fedlora.config.federation_file import read_federation

        federation = read_federation(own["federation"])
        machine = examine(Machine(Path(own["output_dir"] or "."), probe()))
        return [*machine, *federation_checks(federation, kit)]
    return examine(Machine(Path(own["output_dir"] or "."), probe()))


_COLOURS = {OK: 32, WARNING: 33, PROBLEM: 31}


def _show(checks: Sequence[Check]) -> None:
    """A line for each; without a library, which may be what is broken."""
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    width = max(len(check.name) for check in checks)
    for check in checks:
        state = f"{check.state:<8}"
        if coloured:
            state = f"\x1b[{_COLOURS[check.state]}m{state}\x1b[0m"
        print(f"{state}{check.name:<{width}}  {check.found}")
        if check.remedy:
            print(f"{'':8}{'':{width}}  -> {check.remedy}")
    counts = {state: sum(c.state == state for c in checks) for state in (PROBLEM, WARNING)}
    totals = [f"{n} {state}{'s' * (n > 1)}" for state, n in counts.items() if n]
    print(f"\n{', '.join(totals) or 'ready'}")
