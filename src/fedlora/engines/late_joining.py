"""Lets sites join a run that goes on: those that were not there when it began."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from fedlora.engines.carrier import SiteError
from fedlora.engines.roster import Member
from fedlora.engines.site_calls import LeftError
from fedlora.engines.site_handshake import Handshake
from fedlora.federation.handshake import Joined
from fedlora.runs.server_session import ServerSession

PATIENCE = 10.0
"""Seconds that a round waits for a site which is about to join; it goes on joining meanwhile."""


class LateJoining:
    """Asks sites that are not there yet to join, one at a time, so that numbers have no gaps.

    Args:
        handshake: by which they join.
        session: of the server.
        waiting: the sites, in the order in which they are asked.
        tell: is told in words why a site cannot take part.
    """

    def __init__(
        self,
        handshake: Handshake,
        session: ServerSession,
        waiting: Sequence[str],
        tell: Callable[[str], None],
    ) -> None:
        self.handshake, self.session, self.tell = handshake, session, tell
        self.waiting = list(waiting)
        self._joining: tuple[str, SimpleQueue[Joined | SiteError | LeftError]] | None = None

    def joined(self, client: int, round: int) -> list[Joined]:
        """The sites that have joined since this was asked last.

        Args:
            client: the next number that nobody has had.
            round: the last one that is committed.
        """
        came: list[Joined] = []
        for name in list(self.waiting):
            number = client + len(came)
            if self._joining is None:
                self._begin(name, number, round)
            elif self._joining[0] != name:
                continue
            answer = self._answer()
            if answer is None:  # it is still loading; the next ones wait for its number
                break
            if isinstance(answer, Joined):
                self.waiting.remove(name)
                came.append(answer)
            elif not isinstance(answer, SiteError) or answer.kind not in ("absent", "died", "busy"):
                self.waiting.remove(name)
                self.tell(f"site {name} takes no part: {answer.reason}")
        return came

    def _begin(self, name: str, number: int, round: int) -> None:
        answers = SimpleQueue[Joined | SiteError | LeftError]()

        def join() -> None:
            try:
                answers.put(self._join(name, number, round))
            except (SiteError, LeftError) as error:
                answers.put(error)

        self._joining = name, answers
        threading.Thread(target=join, name=f"joining-{name}", daemon=True).start()

    def _answer(self) -> Joined | SiteError | LeftError | None:
        assert self._joining is not None
        try:
            answer = self._joining[1].get(timeout=PATIENCE)
        except Empty:
            return None
        self._joining = None
        return answer

    def _join(self, name: str, number: int, round: int) -> Joined:
        """Have a site join and agree.

        Raises:
            SiteError: it does not, or does not go with the others.
        """
        federation = self.session.federation
        config, largest = self.handshake.config, max(federation.ranks)
        rank = min(config.of_client(number).lora_r, largest)
        if not federation.agreement.rule.mixed_ranks:
            rank = largest
        joined = self.handshake.join(name, Member(number, rank), number + 1, round)
        if why := _does_not_go_with(joined, self.session, largest):
            raise SiteError("mistake", why)
        self.handshake.agree(joined, federation.agreement, number + 1, round)
        return joined


def _does_not_go_with(joined: Joined, session: ServerSession, largest: int) -> str:
    """Why a site cannot train with those that are there, or ""."""
    first = session.sites[0]
    if joined.base != first.base:
        return "it holds other weights of the base than the others, or holds them in another dtype"
    if joined.label_names != first.label_names:
        return "its label_names are others, or in another order"
    if dict(joined.shapes) != dict(session.federation.shapes):
        return "it has other target modules"
    if joined.rank > largest:
        return f"it trains rank {joined.rank}; nobody who joins later may exceed {largest}"
    if joined.rank != largest and not session.federation.agreement.rule.mixed_ranks:
        return f"method {session.config.method} needs rank {largest} of all, it has {joined.rank}"
    return ""
