"""The executor hands messages to the worker of its site, and nothing else."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from fedlora.engines import carrier
from fedlora.engines.carrier import SiteError
from fedlora.engines.nvflare.executor import SiteExecutor
from fedlora.engines.nvflare.kit import OWN_FILE, TASK
from fedlora.engines.nvflare.parcels import CANCEL, STATUS, pack, unpack_answer
from support.flare import Engine, Workspace


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    (tmp_path / OWN_FILE).parent.mkdir()
    (tmp_path / OWN_FILE).write_text(json.dumps({"socket": "/run/a.sock"}))
    return Engine("alpha", Workspace(tmp_path, tmp_path))


@pytest.fixture
def executor(engine: Engine) -> SiteExecutor:
    executor = SiteExecutor()
    with engine.new_context() as context:
        executor.handle_event(EventType.START_RUN, context)
    return executor


def execute(executor: SiteExecutor, parcel: Shareable, signal: Signal | None = None) -> Shareable:
    return executor.execute(TASK, parcel, FLContext(), signal or Signal())


def test_a_message_is_carried_with_its_deadline(
    executor: SiteExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(address: str, message: bytes, *, seconds: float | None) -> bytes:
        assert (address, message, seconds) == ("/run/a.sock", b"train", 3.0)
        return b"trained"

    monkeypatch.setattr(carrier, "call", call)
    assert unpack_answer(execute(executor, pack(b"train", 3.0))) == b"trained"


def test_what_the_worker_refuses_is_answered(
    executor: SiteExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*_: Any, **__: Any) -> bytes:
        raise SiteError("refused", "no")

    monkeypatch.setattr(carrier, "call", call)
    with pytest.raises(SiteError, match="no"):
        unpack_answer(execute(executor, pack(b"train")))


def test_a_kit_without_a_socket_is_answered(tmp_path: Path) -> None:
    executor, engine = SiteExecutor(), Engine("alpha", Workspace(tmp_path, tmp_path))
    with engine.new_context() as context:
        executor.handle_event(EventType.START_RUN, context)
    with pytest.raises(SiteError, match="give the socket") as caught:
        unpack_answer(execute(executor, pack(b"train")))
    assert caught.value.kind == "absent"


def test_an_aborted_task_stops_the_worker(
    executor: SiteExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, signal = threading.Event(), Signal()

    def call(*_: Any, **__: Any) -> bytes:
        signal.trigger(True)
        stopped.wait(30)
        return b""

    monkeypatch.setattr(carrier, "call", call)
    monkeypatch.setattr(carrier, "cancel", lambda address: stopped.set())
    assert execute(executor, pack(b"train"), signal).get_return_code() == ReturnCode.TASK_ABORTED
    assert stopped.is_set()


def test_another_task_is_not_known(executor: SiteExecutor) -> None:
    reply = executor.execute("other", pack(b""), FLContext(), Signal())
    assert reply.get_return_code() == ReturnCode.TASK_UNKNOWN


def test_aside_it_tells_the_step_alone_and_cancels(
    executor: SiteExecutor, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled = list[str]()
    told = {"round": 1, "step": 2, "steps": 5, "loss": 0.5, "rows": 7, "memory": 9}
    monkeypatch.setattr(carrier, "status", lambda address: told)
    monkeypatch.setattr(carrier, "cancel", cancelled.append)
    with engine.new_context() as context:
        reply = engine.aside[STATUS](STATUS, Shareable(), context)
        engine.aside[CANCEL](CANCEL, Shareable(), context)
    values = {key: x for key, x in reply.items() if not key.startswith("__")}
    assert values == {"round": 1, "step": 2, "steps": 5, "loss": 0.5}
    assert cancelled == ["/run/a.sock"]
