"""Tells which sites take part in a run, by the lines that it has logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Member:
    """A site that has a number in a run.

    Args:
        client: the number.
        rank: of the adapter it trains.
        left: why it takes part no longer; None: it does.
    """

    client: int
    rank: int
    left: str | None = None


@dataclass(frozen=True)
class Roster:
    """The sites of a run.

    Args:
        run: the run's id; "" where nothing was logged yet.
        members: site -> what it is in the run.
    """

    run: str = ""
    members: Mapping[str, Member] = field(default_factory=dict)


def roster_of(lines: Sequence[Mapping[str, Any]]) -> Roster:
    """The sites of a run that goes on: those of its header, who joined later, and who has left.

    Args:
        lines: of its `metrics.jsonl`.
    """
    run, members = "", dict[str, Member]()
    for line in lines:
        if line["event"] == "begin" and line.get("run"):
            run = line["run"]
            members = {x["name"]: Member(x["client"], x["rank"]) for x in line["clients"]}
        elif line["event"] == "join":
            members[line["name"]] = Member(line["client"], line["rank"])
        elif line["event"] == "leave":
            before = members[line["name"]]
            members[line["name"]] = Member(before.client, before.rank, line["reason"])
    return Roster(run, members)
