"""Finds out that Flower has lost a message to a node, or the node's reply.

That happens where a SuperLink is killed between taking note that a message was fetched and handing
it out, where a SuperNode is started again so soon that it was never missed, or where it cannot send
what it has to say. Flower tells nobody, and a reply would be waited for until the message's ttl.
"""

from __future__ import annotations

import time
from logging import DEBUG

from flwr.app import Message, MessageType, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.supercore.run import RunNotRunningException

FIRST = 60.0
"""Seconds after a message before its node is asked a question."""

_LONGER, _LATEST = 1.5, 600.0  # from one question to the next; seconds
_TTL = 45.0  # seconds; a question that a busy node has not fetched by then costs it nothing


class Probe:
    """Asks a node questions, each of which it answers after all messages that came before.

    A SuperNode takes one message at a time, in the order in which they were made. So one that
    answers a question is done with the earlier message, whose reply is there or will never be.

    Args:
        grid: reaches the node.
        message: that it was sent.
    """

    def __init__(self, grid: Grid, message: Message) -> None:
        self.grid, self.node = grid, message.metadata.dst_node_id
        self._pause = FIRST
        self._next = time.monotonic() + FIRST
        self._question: str | None = None

    def finds_idle(self) -> bool:
        """Whether the node has answered a question; asks one when it is time to."""
        try:
            if self._question is None:
                self._ask()
                return False
            return self._is_answered(self._question)
        except RunNotRunningException:
            raise
        except Exception as error:  # of the grid; the next question may do better
            log(DEBUG, "node %d could not be asked a question: %s", self.node, error)
            self._later()
            return False

    def _ask(self) -> None:
        if time.monotonic() < self._next:
            return
        question = Message(RecordDict(), self.node, MessageType.QUERY, ttl=_TTL, group_id="0")
        self._question = next(iter(self.grid.push_messages([question])), None)
        if not self._question:
            self._later()

    def _is_answered(self, question: str) -> bool:
        answer = next(iter(self.grid.pull_messages([question])), None)
        if answer is None:
            return False
        self._later()
        return not answer.has_error()  # an error is Flower's: the question's time is over

    def _later(self) -> None:
        """Have the next question wait."""
        self._question = None
        self._next = time.monotonic() + self._pause
        self._pause = min(_LATEST, _LONGER * self._pause)
