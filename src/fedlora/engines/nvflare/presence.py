"""Finds the sites that a run is submitted to, and says who is missing."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.config.config import Config
from fedlora.engines.nvflare.kit import AdminKit
from fedlora.engines.roster import Roster
from fedlora.errors import InputError


def present_sites(
    config: Config, roster: Roster, kit: AdminKit, connected: Sequence[str]
) -> tuple[list[str], list[str]]:
    """All sites of a run, and those of them that are there.

    All are those that the admin's kit names, or else who is connected, and who takes part already.

    Args:
        config: of the run.
        roster: of a run that goes on; empty: it is new.
        kit: of the admin.
        connected: sites that are connected to the server.

    Returns:
        Both in the order of their names.

    Raises:
        InputError: who is missing, and what to do.
    """
    members = {name for name, member in roster.members.items() if member.left is None}
    names = sorted(set(kit.sites or connected) | members)
    present = [name for name in names if name in set(connected)]
    least = config.min_clients_per_round
    if members:
        missing = sorted(members - set(present))
    else:
        missing = [name for name in names if name not in present]
        if least is not None and len(present) >= least:
            missing = []
    if missing:
        advice = "" if members or least else ", or set min_clients_per_round to begin without it"
        raise InputError(
            f"sites: {', '.join(missing)}: not connected to the server at {kit.server}; start it "
            f"there with ./start in its folder (without one: startup/start.sh of its kit){advice}"
        )
    wanted = _wanted(config)
    if not members and not kit.sites and wanted is not None and len(names) < wanted:
        there = ", ".join(names) or "no site"
        raise InputError(
            f"sites: {wanted} are asked for, and {there} is connected to the server at "
            f"{kit.server}; start the others"
        )
    if not present:
        raise InputError(f"sites: none is connected to the server at {kit.server}; start them")
    return names, present


def _wanted(config: Config) -> int | None:
    """How many sites the configuration speaks of; None: as many as there are."""
    if config.num_clients is not None:
        return config.num_clients
    return len(config.client_ranks) if isinstance(config.client_ranks, list) else None
