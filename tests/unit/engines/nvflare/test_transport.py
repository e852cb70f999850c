"""Tasks bring messages to sites, and answers as they come; who is not waited for is cancelled."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.controller_spec import Task, TaskCompletionStatus
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply

from fedlora.engines.carrier import SiteError
from fedlora.engines.nvflare.parcels import CANCEL, pack, pack_error, unpack
from fedlora.engines.nvflare.transport import NvflareTransport
from support.flare import Engine, Workspace


class Controller:
    """Answers tasks as a test tells it to: name -> parcel, a status, or nothing."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers, self.sent, self.cancelled = answers, dict[str, Task](), list[str]()

    def send(self, task: Task, fl_ctx: FLContext, targets: Sequence[str]) -> None:
        (name,) = targets
        self.sent[name] = task
        answer = self.answers.get(name)
        if isinstance(answer, Shareable):
            client = SimpleNamespace(name=name)
            done = SimpleNamespace(client=client, result=answer)
            task.result_received_cb(client_task=done, fl_ctx=fl_ctx)
            assert done.result is None
        elif answer is not None:
            task.completion_status = answer
        if answer is not None:
            task.task_done_cb(task=task, fl_ctx=fl_ctx)

    def cancel_task(self, task: Task) -> None:
        self.cancelled += [name for name, sent in self.sent.items() if sent is task]


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine("server", Workspace(tmp_path, tmp_path))


def transport_of(
    engine: Engine, answers: dict[str, Any], aborted: bool = False
) -> tuple[NvflareTransport, Controller]:
    controller = Controller(answers)
    names = ["beta", "alpha", "gamma"]
    transport = NvflareTransport(controller, engine, names, ["alpha", "beta"], lambda: aborted)
    return transport, controller


def test_every_site_has_a_task_of_its_own(engine: Engine) -> None:
    answers = {"alpha": pack(b"one"), "beta": pack_error(SiteError("failed", "no memory"))}
    transport, controller = transport_of(engine, answers)
    assert transport.names() == ["alpha", "beta", "gamma"]
    came = dict(transport.send({"alpha": b"1", "beta": b"2", "gamma": b"3"}, None))
    assert came["alpha"] == b"one"
    assert {name: x.kind for name, x in came.items() if isinstance(x, SiteError)} == {
        "beta": "failed", "gamma": "absent",
    }  # fmt: skip
    assert {n: unpack(task.data) for n, task in controller.sent.items()} == {
        "alpha": (b"1", None), "beta": (b"2", None),
    }  # fmt: skip
    assert controller.cancelled == []


def test_who_does_not_answer_in_time_is_cancelled(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.engines.nvflare.transport._GRACE", 0.0)
    transport, controller = transport_of(engine, {})
    ((name, answer),) = transport.send({"beta": b"2"}, time.monotonic() - 1)
    assert (name, answer.kind) == ("beta", "deadline")  # type: ignore[union-attr]
    assert unpack(controller.sent["beta"].data) == (b"2", 0.0)
    assert controller.cancelled == ["beta"]


def test_an_aborted_job_waits_for_nobody(engine: Engine) -> None:
    transport, controller = transport_of(engine, {}, aborted=True)
    ((_, answer),) = transport.send({"beta": b"2"}, None)
    assert (answer.kind, answer.reason) == ("died", "the job was aborted")  # type: ignore[union-attr]
    assert controller.cancelled == ["beta"]
    assert transport.status("beta") == {}


def test_a_site_that_flare_has_lost_has_died(engine: Engine) -> None:
    transport, _ = transport_of(engine, {"beta": TaskCompletionStatus.CLIENT_DEAD})
    ((_, answer),) = transport.send({"beta": b"2"}, None)
    assert answer.kind == "died"  # type: ignore[union-attr]


def test_a_site_of_which_nothing_is_left_in_the_job_has_died(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.engines.nvflare.transport._PULSE", 0.0)
    there = {"alpha": make_reply(ReturnCode.OK), "beta": make_reply(ReturnCode.TIMEOUT)}

    def send_aux_request(targets: Any, topic: str, **_: Any) -> dict[str, Shareable]:
        return {name: there[name] for name in targets}

    monkeypatch.setattr(engine, "send_aux_request", send_aux_request)
    transport, controller = transport_of(engine, {})
    coming = transport.send({"alpha": b"1", "beta": b"2"}, None)
    name, answer = next(coming)
    assert (name, answer.kind) == ("beta", "died")  # type: ignore[union-attr]
    coming.close()  # type: ignore[attr-defined]
    assert controller.cancelled == ["alpha"]  # it is there, and trains
    ((_, answer),) = transport.send({"beta": b"3"}, None)
    assert answer.kind == "absent"  # type: ignore[union-attr]
    there["beta"] = make_reply(ReturnCode.OK)
    controller.answers = {"beta": pack(b"back")}
    assert dict(transport.send({"beta": b"3"}, None)) == {"beta": b"back"}


def test_sites_are_asked_aside(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[Any, str]]()
    reply = make_reply(ReturnCode.OK)
    reply.update({"step": 2, "rows": 7})

    def send_aux_request(targets: Any, topic: str, **_: Any) -> dict[str, Shareable]:
        asked.append((targets, topic))
        return {"alpha": reply, "beta": make_reply(ReturnCode.COMMUNICATION_ERROR)}

    monkeypatch.setattr(engine, "send_aux_request", send_aux_request)
    transport, _ = transport_of(engine, {})
    assert transport.status("alpha") == {"step": 2}
    assert transport.status("beta") == {}
    transport.cancel(["alpha", "gamma"])
    transport.cancel(["gamma"])
    assert [topic for _, topic in asked].count(CANCEL) == 1
    assert asked[-1] == (["alpha"], CANCEL)
    transport.close()
