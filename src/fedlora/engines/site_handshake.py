"""Brings a server and its sites together before the first round: who they are, what all hold to."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from fedlora.config.clients import client_ranks
from fedlora.config.config import Config
from fedlora.engines.carrier import SiteError
from fedlora.engines.roster import Member, Roster
from fedlora.engines.site_calls import LeftError, SiteCalls
from fedlora.errors import InputError
from fedlora.federation.envelope import Header, Message, RefusedMessageError
from fedlora.federation.exchange import Agreement
from fedlora.federation.handshake import (
    Agree,
    Agreed,
    Join,
    Joined,
    agree_message,
    join_message,
    read_agreed,
    read_joined,
)
from fedlora.runs.absolute_paths import resolve_paths
from fedlora.runs.server_session import ServerSession, assemble_server
from fedlora.runs.site_report import SiteReport
from fedlora.runs.site_settings import site_settings

T = TypeVar("T")


@dataclass(frozen=True)
class Handshake:
    """Asks sites to take part, and to hold to what all hold to.

    Args:
        config: of the run, with absolute paths.
        run: the run's id.
        calls: reaches the sites.
    """

    config: Config
    run: str
    calls: SiteCalls

    def join(self, name: str, member: Member, num_clients: int, round: int) -> Joined:
        """Ask a site to take part.

        Args:
            name: of the site.
            member: its number, and the rank it is asked to train.
            num_clients: how many sites there are.
            round: the last one that is committed.

        Raises:
            SiteError: it does not.
            LeftError: it takes no part any more.
        """
        settings = site_settings(self.config, member.client, member.rank)
        join = Join(member.client, num_clients, self.config.method, settings)

        def read(message: Message) -> Joined:
            joined = read_joined(message)
            if (joined.site, joined.client) != (name, member.client):
                raise RefusedMessageError(
                    f"it calls itself {joined.site} (client {joined.client}); give it the name in "
                    "sites that its own file gives it"
                )
            return joined

        header = Header(self.run, round, 0, "", "", "")
        return self.calls.ask(name, join_message(header, join), read, passing=("busy",))

    def agree(
        self,
        joined: Joined,
        agreement: Agreement,
        num_clients: int,
        round: int,
        first_values: bool = False,
    ) -> Agreed:
        """Have a site hold its agreement against the server's.

        Args:
            joined: what it has told.
            agreement: the server's.
            num_clients: how many sites there are.
            round: the last one that is committed.
            first_values: also ask for the parameters that are trained whole.

        Raises:
            SiteError: it holds to another one.
            LeftError: it takes no part any more.
        """
        digest, wanted = agreement.digest, joined.full_params if first_values else {}
        agree = Agree(joined.client, joined.rank, num_clients, digest, first_values)

        def read(message: Message) -> Agreed:
            agreed = read_agreed(message, wanted)
            if agreed.digest != digest:
                raise RefusedMessageError("it holds to another agreement")
            return agreed

        header = Header(self.run, round, 0, "", joined.base, digest)
        message = agree_message(header, agree)
        return self.calls.ask(joined.site, message, read, passing=("busy",))


@dataclass(frozen=True)
class Opened:
    """A federation whose sites have joined.

    Args:
        session: of the server.
        handshake: by which others join later.
        joined: site -> what it has told.
        waiting: sites that were not there; they are asked again before every round.
        left: site -> its number and why it has left, of those that have said so just now.
    """

    session: ServerSession
    handshake: Handshake
    joined: Mapping[str, Joined]
    waiting: tuple[str, ...]
    left: Mapping[str, Member]


def open_federation(config: Config, calls: SiteCalls, roster: Roster, round: int) -> Opened:
    """Have the sites join, make the server's session of what they tell, and agree with them.

    In a new run all sites have to be there; with `min_clients_per_round` so many are enough, and
    the others join when they come. In a run that goes on, all have to be there that have not left.

    Args:
        config: of the run.
        calls: reaches the sites.
        roster: who takes part in a run that goes on; empty: it is new.
        round: the last one that is committed.

    Raises:
        InputError: a site is not there, refuses, or does not go with the others; what to do.
    """
    config = resolve_paths(config)
    members = dict(roster.members) or _numbered(config, calls.transport.names())
    _check_named(members, calls.transport.names())
    handshake = Handshake(config, roster.run or secrets.token_hex(8), calls)
    asked = {name: member for name, member in members.items() if member.left is None}
    answers = _each(asked, lambda name: handshake.join(name, members[name], len(members), round))
    absent: list[str] = []
    if not roster.members:
        absent = _absent(answers, config.min_clients_per_round)
        if absent:  # who is there gets the first numbers
            there = [name for name in members if name not in absent]
            members = {n: replace(members[n], client=k) for k, n in enumerate(there)}
            answers = _each(
                members, lambda name: handshake.join(name, members[name], len(members), round)
            )
    joined = {name: x for name, x in answers.items() if isinstance(x, Joined)}
    left = _left(members, answers, resumed=bool(roster.members))
    for name, answer in answers.items():
        if isinstance(answer, SiteError):
            raise InputError(f"sites: {name}: {answer.reason}")
    session = replace(_session(config, {**members, **left}, joined), run=handshake.run)
    session = _agreed(handshake, session, joined, round)
    known = {*members, *absent}
    late = [name for name in calls.transport.names() if name not in known]
    return Opened(session, handshake, joined, (*absent, *late), left)


def report_of(joined: Joined) -> SiteReport:
    """What a site has told, as the server's session takes it."""
    return SiteReport(
        client=joined.client,
        name=joined.site,
        num_examples=joined.num_examples,
        rank=joined.rank,
        label_names=joined.label_names,
        base=joined.base,
        data=joined.data,
        tokens=joined.tokens,
        eval_rows=joined.eval_rows,
        shapes=joined.shapes,
        full_params=joined.full_params,
    )


def _numbered(config: Config, names: Iterable[str]) -> dict[str, Member]:
    """The sites of a new run, with numbers in the order of their names."""
    names = list(names)
    if config.num_clients not in (None, len(names)):
        raise InputError(
            f"num_clients: {config.num_clients}, but there are {len(names)} sites; leave it out"
        )
    ranks = client_ranks(config, len(names))
    return {name: Member(k, rank) for k, (name, rank) in enumerate(zip(names, ranks, strict=True))}


def _check_named(members: Mapping[str, Member], names: Iterable[str]) -> None:
    """All that take part have an address."""
    unnamed = [n for n, member in members.items() if member.left is None and n not in set(names)]
    if unnamed:
        raise InputError(
            f"sites: {unnamed[0]} takes part in this run and is not among them; name all that have "
            "not left"
        )


def _absent(answers: Mapping[str, object], least: int | None) -> list[str]:
    """Sites that are not there and may come later, because enough others are there."""
    absent = [
        name
        for name, answer in answers.items()
        if isinstance(answer, SiteError) and answer.kind in ("absent", "died")
    ]
    return absent if least is not None and len(answers) - len(absent) >= least else []


def _left(
    members: Mapping[str, Member], answers: Mapping[str, object], resumed: bool
) -> dict[str, Member]:
    """Sites that have answered that they take no part any more.

    Raises:
        InputError: they would be asked for the first time.
    """
    left = {}
    for name, answer in answers.items():
        if isinstance(answer, LeftError):
            if not resumed:
                raise InputError(f"sites: {name} takes no part: {answer.reason}")
            left[name] = replace(members[name], left=answer.reason)
    return left


def _session(
    config: Config, members: Mapping[str, Member], joined: Mapping[str, Joined]
) -> ServerSession:
    """The server's session; who has left keeps the number, and has no rows."""
    if not joined:
        raise InputError("sites: no site takes part any more")
    reports = [report_of(told) for told in joined.values()]
    some = reports[0]
    reports += [
        replace(some, client=m.client, name=name, rank=m.rank, num_examples=0, eval_rows=0)
        for name, m in members.items()
        if m.left is not None
    ]
    # What there is of clients is what the sites have told.
    return assemble_server(config.model_copy(update={"num_clients": None}), reports)


def _agreed(
    handshake: Handshake, session: ServerSession, joined: Mapping[str, Joined], round: int
) -> ServerSession:
    """The session, with the first values of what is trained whole, once all sites have agreed."""
    first = min(joined.values(), key=lambda told: told.client)
    values = bool(session.base.full_params)
    agreement, number = session.federation.agreement, len(session.federation.ranks)

    def agree(name: str) -> Agreed:
        told = joined[name]
        return handshake.agree(told, agreement, number, round, values and told is first)

    answers = _each(joined, agree)
    for name, answer in answers.items():
        if isinstance(answer, SiteError | LeftError):
            raise InputError(f"sites: {name}: {answer.reason}")
    agreed = answers[first.site]
    assert isinstance(agreed, Agreed)
    return replace(session, first_values=agreed.full_params)


def _each(names: Iterable[str], ask: Callable[[str], T]) -> dict[str, T | SiteError | LeftError]:
    """Ask all sites at a time; what comes of each, in the order of the names."""

    def answer(name: str) -> T | SiteError | LeftError:
        try:
            return ask(name)
        except (SiteError, LeftError) as error:
            return error

    names = list(names)
    with ThreadPoolExecutor(max(1, len(names)), "site") as pool:
        return dict(zip(names, pool.map(answer, names), strict=True))
