"""A Flower grid whose nodes are ClientApps in this process; the apps are the real ones.

Every message is answered in a thread of its own, from a copy, as if it had travelled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Errors = Callable[[Message], int | None]
"""The code of the error that a message is answered with, or None: it reaches its node."""


class InProcessGrid(Grid):
    """Reaches ClientApps in this process.

    Args:
        app: of all nodes.
        node_configs: of each node; the nodes' ids are not in their order.
        errors: which messages are answered with an error in the place of their nodes.
    """

    def __init__(
        self,
        app: ClientApp,
        node_configs: Sequence[Mapping[str, Any]],
        run_config: Mapping[str, Any] | None = None,
        errors: Errors = lambda message: None,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.app, self.errors = app, errors
        self.contexts = {
            1000 - 7 * k: Context(
                run_id=1,
                node_id=1000 - 7 * k,
                node_config=dict(config),
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for k, config in enumerate(node_configs)
        }
        self.pushed: list[Message] = []
        self._replies: dict[str, Message] = {}
        self._run: Run | None = None

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        assert self._run is not None
        return self._run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError("messages are made by their constructor")

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            id = str(uuid4())
            message.metadata.__dict__["_message_id"] = id
            self.pushed.append(message)
            threading.Thread(target=self._answer, args=(id, deepcopy(message)), daemon=True).start()
            ids.append(id)
        return ids

    def _answer(self, id: str, message: Message) -> None:
        code = self.errors(message)
        if code is None and message.metadata.dst_node_id not in self.contexts:
            code = 5
        if code is not None:
            reply = Message(Error(code), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = 1  # the SuperLink's own number
        else:
            try:
                reply = self.app(message, self.contexts[message.metadata.dst_node_id])
            except Exception as error:
                reason = f"{type(error)}:<'{error}'>"
                reply = Message(Error(2, reason), reply_to=message)
        self._replies[id] = deepcopy(reply)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(id) for id in message_ids if id in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError("replies are taken as they come")


class LosingGrid(InProcessGrid):
    """A grid that loses the first message to some nodes, as a SuperLink does that is killed.

    Args:
        app, node_configs: of the nodes.
        lost: ids of those nodes.
    """

    def __init__(
        self, app: ClientApp, node_configs: Sequence[Mapping[str, Any]], lost: Iterable[int]
    ) -> None:
        super().__init__(app, node_configs)
        self._to_lose = set(lost)

    def _answer(self, id: str, message: Message) -> None:
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        if kind == MessageType.TRAIN and node in self._to_lose:
            self._to_lose.remove(node)
            return
        super()._answer(id, message)
