"""What a worker process answers, served by a thread over a pipe."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import Pipe
from typing import Any

import pytest
import torch

from fedlora.engines import worker_process
from fedlora.engines.worker_process import FAILED, STEP, STOP, STOPPED, has_stopped, serve
from fedlora.errors import FedloraError
from fedlora.federation.envelope import Header, Message, RefusedMessageError, decode, encode
from fedlora.federation.messages import Broadcast, ClientState, ClientUpdate
from fedlora.federation.wire import TRAINED, GroupNames, read_trained, train_message
from fedlora.lowrank import LowRank
from fedlora.methods.values import RoundNumbers

HEADER = Header("run", 0, 0, "", "base", "agreement")
SHAPES = {"q": (3, 2)}


class Trains:
    """In a worker's place: adds one to B, keeps it, and reports a step."""

    def __init__(self) -> None:
        self.states: dict[int, ClientState] = {}
        self.error: Exception | None = None
        self.hold = threading.Event()  # while it is not set, a step takes long
        self.hold.set()

    def handle_together(self, broadcasts: Any, on_step: Any) -> list[Any]:
        if self.error is not None:
            raise self.error
        out = []
        for sent in broadcasts:
            self.hold.wait(10)
            on_step(sent.client)(1, 2, 0.5, 30)
            kept = self.states.get(sent.client, ClientState({"q.B": torch.zeros(3, 1)}))
            x = sent.adapter["q"]
            self.states[sent.client] = ClientState({"q.B": kept.factors["q.B"] + 1})
            update = ClientUpdate(sent.client, sent.round, {"q": LowRank(x.A, x.B + 1)}, 5)
            out.append(type("Trained", (), {"update": update}))
        return out


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Trains, list[BaseException]]]:
    """The pool's end of a connection, what trains at the other, and what the thread ended with."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # only the main thread may
    monkeypatch.setattr(worker_process, "end_with_parent", lambda: None)
    ours, theirs = Pipe()
    worker, ended = Trains(), list[BaseException]()

    def run() -> None:
        try:
            serve(theirs, lambda: worker, HEADER, [])  # type: ignore[arg-type, return-value]
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    threads = torch.get_num_threads()
    thread.start()
    yield ours, worker, ended
    ours.close()
    thread.join(10)
    assert not thread.is_alive()
    torch.set_num_threads(threads)


def broadcast(client: int, round: int = 1) -> Broadcast:
    adapter = {"q": LowRank(torch.ones(1, 2), torch.zeros(3, 1))}
    return Broadcast(round, client, 1, adapter, adapter, {}, {}, 0, RoundNumbers({"q": 1}, (1,)))


def ask(connection: Any, message: Message) -> list[Message]:
    """Send a request, and read up to its last answer."""
    connection.send_bytes(encode(message))
    answers = [decode(connection.recv_bytes())]
    while answers[-1].header.kind == STEP:
        answers.append(decode(connection.recv_bytes()))
    return answers


def test_clients_train_and_their_states_come_back(served: Any) -> None:
    connection, _, _ = served
    header = replace(HEADER, round=1, attempt=1)
    states = {4: ClientState({"q.B": torch.full((3, 1), 7.0)})}
    request, _ = train_message(header, [broadcast(2), broadcast(4)], states, GroupNames())
    first, second, last = ask(connection, request)
    assert [m.body["client"] for m in (first, second)] == [2, 4]
    assert first.body == {"client": 2, "step": 1, "steps": 2, "loss": 0.5, "tokens": 30}
    assert last.header == replace(header, kind=TRAINED)
    updates, back = read_trained(last, {2: SHAPES, 4: SHAPES})
    assert [u.client for u in updates] == [2, 4]
    assert torch.equal(updates[0].adapter["q"].B, torch.ones(3, 1))
    assert torch.equal(back[4].factors["q.B"], torch.full((3, 1), 8.0))
    assert torch.equal(back[2].factors["q.B"], torch.ones(3, 1))


def test_groups_are_held_for_one_round(served: Any) -> None:
    connection, _, _ = served
    names = GroupNames()
    first, second = broadcast(0), broadcast(1)
    second = replace(second, adapter=first.adapter, leading=first.leading)
    header = replace(HEADER, round=1)
    request, known = train_message(header, [first], {}, names)
    ask(connection, request)
    request, _ = train_message(header, [second], {}, names, known)
    assert not request.tensors
    assert ask(connection, request)[-1].header.kind == TRAINED


def test_errors_are_answers(served: Any) -> None:
    connection, worker, _ = served
    request, _ = train_message(replace(HEADER, round=1), [broadcast(0)], {}, GroupNames())
    for error, mistake, memory, reason in (
        (ZeroDivisionError("no steps"), False, False, "ZeroDivisionError: no steps"),
        (FedloraError("say what to do"), True, False, "say what to do"),
        (MemoryError("full"), False, True, "MemoryError: full"),
    ):
        worker.error = error
        (answer,) = ask(connection, request)
        assert answer.header.kind == FAILED
        assert (answer.body["mistake"], answer.body["memory"]) == (mistake, memory)
        assert answer.body["reason"] == reason
        assert "handle_together" in answer.body["trace"]
    worker.error = None
    assert ask(connection, request)[-1].header.kind == TRAINED


def test_a_request_that_is_called_off_is_trained_to_the_next_step(served: Any) -> None:
    connection, worker, _ = served
    request, _ = train_message(replace(HEADER, round=1), [broadcast(0)], {}, GroupNames())
    worker.hold.clear()
    connection.send_bytes(encode(request))
    connection.send_bytes(encode(Message(replace(HEADER, kind=STOP), {})))
    worker.hold.set()
    assert decode(connection.recv_bytes()).header.kind == STEP
    assert decode(connection.recv_bytes()).header.kind == STOPPED
    assert worker.states == {}
    assert ask(connection, request)[-1].header.kind == TRAINED


def test_a_request_that_is_called_off_when_it_is_done_disturbs_nothing(served: Any) -> None:
    connection, _, _ = served
    request, _ = train_message(replace(HEADER, round=1), [broadcast(0)], {}, GroupNames())
    ask(connection, request)
    connection.send_bytes(encode(Message(replace(HEADER, kind=STOP), {})))
    assert ask(connection, request)[-1].header.kind == TRAINED


def test_whether_a_worker_has_stopped() -> None:
    soon = time.monotonic() + 10
    for last in (STOPPED, TRAINED, FAILED):
        ours, theirs = Pipe()
        for kind in (STEP, STEP, last):
            theirs.send_bytes(encode(Message(replace(HEADER, kind=kind), {})))
        assert has_stopped(ours, soon)
        assert not ours.poll()
    assert not has_stopped(ours, time.monotonic())  # it goes on
    theirs.close()
    assert not has_stopped(ours, soon)  # it has ended


def test_a_request_of_another_federation_is_not_trained(served: Any) -> None:
    connection, _, ended = served
    header = replace(HEADER, round=1, agreement="other")
    request, _ = train_message(header, [broadcast(0)], {}, GroupNames())
    connection.send_bytes(encode(request))
    while not ended:
        pass
    assert isinstance(ended[0], RefusedMessageError)
    assert "another agreement" in str(ended[0])
