"""Hands messages to a site's worker: what of fedlora runs in NVIDIA FLARE's client job process.

It holds no model, no row and no torch. The worker is a process of its own (`fedlora worker`), so
that a training which takes the last memory costs this site one round, and not the job.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedlora.engines import carrier
from fedlora.engines.carrier import SiteError
from fedlora.engines.nvflare.kit import TASK, socket_of
from fedlora.engines.nvflare.parcels import CANCEL, STATUS, TOLD, pack, pack_error, unpack
from fedlora.errors import InputError

_LOOK = 0.1  # seconds between two looks at whether a call is to be given up


class SiteExecutor(Executor):  # type: ignore[misc]
    """Carries each message of the server to the worker of its site, and the answer back.

    The worker's socket is named in the site's kit (`fedlora.engines.nvflare.kit`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._kit = Path()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Begin to listen as the job starts."""
        if event_type == EventType.START_RUN:
            engine = fl_ctx.get_engine()
            self._kit = Path(engine.get_workspace().get_root_dir())
            for topic, answer in ((CANCEL, self._on_cancel), (STATUS, self._on_status)):
                engine.register_aux_message_handler(topic=topic, message_handle_func=answer)

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Ask the worker, and give up when the task is aborted."""
        if task_name != TASK:
            return make_reply(ReturnCode.TASK_UNKNOWN)
        outcomes = SimpleQueue[Shareable]()

        def ask() -> None:
            outcomes.put(self._ask(shareable))

        threading.Thread(target=ask, name="worker-call", daemon=True).start()
        while not abort_signal.triggered:
            with suppress(Empty):
                return outcomes.get(timeout=_LOOK)
        self._cancel()
        return make_reply(ReturnCode.TASK_ABORTED)

    def _ask(self, parcel: Shareable) -> Shareable:
        try:
            message, seconds = unpack(parcel)
            return pack(carrier.call(self._address(), message, seconds=seconds))
        except SiteError as error:
            self.logger.warning(f"the worker does not do what it was asked: {error.reason}")
            return pack_error(error)

    def _address(self) -> str:
        try:
            return socket_of(self._kit)
        except InputError as error:
            raise SiteError("absent", str(error)) from None

    def _cancel(self) -> None:
        with suppress(SiteError):  # it is gone, and trains no more
            carrier.cancel(self._address())

    def _on_cancel(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        self._cancel()
        return make_reply(ReturnCode.OK)

    def _on_status(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        reply = make_reply(ReturnCode.OK)
        with suppress(SiteError):
            status: dict[str, Any] = carrier.status(self._address())
            reply.update({key: status[key] for key in TOLD if key in status})
        return reply
