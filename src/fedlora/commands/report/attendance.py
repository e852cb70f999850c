"""Says who took part in which round of a run, and why the others did not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.commands.run_files import Run, listed, outcome_of, whole

OUTCOMES = ("counted", "failed", "late", "unneeded", "not_sampled")
"""What can become of a client in a round."""


@dataclass(frozen=True)
class Attendance:
    """What became of every client in every round.

    Args:
        rounds: ascending.
        attempts: how often each round was tried.
        times: outcome -> in how many rounds it was each client's, in the order of the clients.
        absent: (round, client, outcome, why) of those that were to count and did not. Clients that
            a round did not need are not among them.
    """

    rounds: tuple[int, ...]
    attempts: tuple[int, ...]
    times: dict[str, tuple[int, ...]]
    absent: tuple[tuple[int, int, str, str], ...]


def attendance(run: Run, ids: Sequence[int]) -> Attendance:
    """Who took part in a run.

    Args:
        run: as its files say.
        ids: the numbers of its clients.
    """
    times = {outcome: dict.fromkeys(ids, 0) for outcome in OUTCOMES}
    absent = []
    for line in run.rounds:
        asked = {
            client: entry
            for entry in listed(line.get("clients"))
            if (client := whole(entry.get("client"))) in times["counted"]
        }
        for client in ids:
            outcome = outcome_of(asked[client]) if client in asked else "not_sampled"
            times.setdefault(outcome, dict.fromkeys(ids, 0))[client] += 1
            if outcome not in ("counted", "unneeded", "not_sampled"):
                why = str(asked[client].get("rejected") or "")
                absent.append((int(line["round"]), client, outcome, why))
    return Attendance(
        tuple(int(line["round"]) for line in run.rounds),
        tuple(whole(line.get("attempts")) or 1 for line in run.rounds),
        {outcome: tuple(own.values()) for outcome, own in times.items()},
        tuple(absent),
    )
