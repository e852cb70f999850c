"""Asks a site, reads its answer, and asks again where its worker died or is busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fedlora.engines.carrier import SiteError
from fedlora.engines.transport import Transport
from fedlora.federation.envelope import (
    Message,
    RefusedMessageError,
    check_header,
    decode,
    encode,
)
from fedlora.federation.handshake import JOIN, LEAVE, read_leave

PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds before a site is asked again, time after time; then it has failed."""

PASSING = ("absent", "died", "busy")
"""Kinds of a SiteError that may be over in a moment."""

T = TypeVar("T")


class LeftError(Exception):
    """A site has answered that it takes part no longer.

    Args:
        reason: in its words.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class SiteCalls:
    """Asks sites; every method may be called from many threads at a time.

    Args:
        transport: reaches them.
        tell: is told what people should know, in words; from any thread.
        pauses: seconds before a site is asked again.
        closing: set when nobody is to be asked any more.
    """

    transport: Transport
    tell: Callable[[str], None]
    pauses: Sequence[float] = PAUSES
    closing: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        """Ask nobody any more."""
        self.closing.set()
        self.transport.close()

    def ask(
        self,
        name: str,
        message: Message,
        read: Callable[[Message], T],
        deadline: float | None = None,
        recover: Callable[[], object] = lambda: None,
        passing: Sequence[str] = PASSING,
    ) -> T:
        """Ask a site until it has answered, or has failed too often.

        Args:
            name: of the site.
            message: to it.
            read: reads its answer, and raises RefusedMessageError where it is not what it has to
                be.
            deadline: a moment of `time.monotonic()` after which it is not waited for.
            recover: called before a site is asked again that was absent or died; it may raise
                SiteError too.
            passing: kinds of a SiteError after which it is asked again.

        Returns:
            What `read` has read.

        Raises:
            SiteError: what became of it instead.
            LeftError: it takes part no longer.
        """
        gone = False
        for pause in (*self.pauses, None):
            try:
                if gone:
                    recover()
                return self.once(name, message, read, deadline)
            except SiteError as error:
                if error.kind not in passing or pause is None or not self._wait(pause, deadline):
                    raise
                if error.kind != "busy":
                    if not gone:
                        self.tell(f"site {name}: {error.reason}; it is asked again")
                    gone = True
        raise AssertionError("the last pause is None")

    def _wait(self, pause: float, deadline: float | None) -> bool:
        """Whether there was time for a pause, and still is some to ask again."""
        if deadline is not None and time.monotonic() + pause >= deadline:
            return False
        return not self.closing.wait(pause)

    def once(
        self,
        name: str,
        message: Message,
        read: Callable[[Message], T],
        deadline: float | None = None,
    ) -> T:
        """Ask a site once; see `ask`.

        An answer to anything else (a late one, one that came twice, one of another run) is refused
        and told, and the right one waited for.
        """
        problem = SiteError("died", "nothing came of it")
        for sender, answer in self.transport.send({name: encode(message)}, deadline):
            if isinstance(answer, SiteError):
                problem = answer
                continue
            try:
                if sender != name:
                    raise RefusedMessageError(f"it is site {sender}'s")
                return self._read(message, answer, read)
            except RefusedMessageError as error:
                problem = SiteError("refused", f"its answer is refused: {error}")
                self.tell(f"site {name}: an answer is refused: {error}")
        raise problem

    def _read(self, message: Message, answer: bytes, read: Callable[[Message], T]) -> T:
        reply = decode(answer)
        expected = message.header
        if expected.kind == JOIN:  # that is how the server learns of a site's base
            expected = replace(expected, base=reply.header.base)
        check_header(reply.header, expected)
        if reply.header.kind == LEAVE:
            raise LeftError(read_leave(reply).reason)
        return read(reply)
