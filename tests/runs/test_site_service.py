"""A site's service in this process: it joins, trains, evaluates, goes on, and refuses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.client.trainer import train
from fedlora.engines.carrier import SiteError
from fedlora.engines.site_service import SiteService
from fedlora.federation.envelope import Message, decode, encode
from support.one_site import ASKED, OneSite, made_site

pytestmark = pytest.mark.usefixtures("kept_bases")

MakeService = Callable[..., SiteService]


@pytest.fixture
def make(tiny_llama: Path, site_files: Path, tmp_path: Path) -> MakeService:
    """Makes the service of a site with 16 rows; every call gives another one of the same site."""

    def make(train_function: Any = train, **keys: Any) -> SiteService:
        keys.setdefault("train_file", str(site_files / "site_1.jsonl"))
        return SiteService(made_site(tmp_path / "at", tiny_llama, **keys), train_function)

    return make


def refusal(function: Callable[[], Any]) -> SiteError:
    """What a call is refused with."""
    with pytest.raises(SiteError) as raised:
        function()
    return raised.value


@pytest.mark.parametrize("method", ["exact", "fedsa"])
def test_rounds_of_a_site(make: MakeService, method: str) -> None:
    service = make()
    run = OneSite(service.handle, method)
    run.begin()
    told = run.joined
    assert (told.site, told.num_examples, told.eval_rows, told.rank) == ("clinic", 12, 4, 4)
    before = run.evaluate()
    updates = [run.fold(run.train()) for _ in range(3)]
    after = run.evaluate()
    assert [update.metrics["steps"] for update in updates] == [2, 2, 2]
    assert (before.rows, after.rows) == (4, 4)
    assert after.metrics["loss"] < before.metrics["loss"]
    assert service.bases_loaded == 1
    assert run.join(round=3).confirmed == 3


def test_the_same_asked_again_is_answered_and_not_trained_again(make: MakeService) -> None:
    trainings = []

    def counting(*arguments: Any) -> Any:
        trainings.append(1)
        return train(*arguments)

    run = OneSite(make(counting).handle)
    run.begin()
    assert run.train() == run.train()
    assert len(trainings) == 1
    assert decode(run.train(attempt=1)).header.attempt == 1
    assert len(trainings) == 2


@pytest.mark.parametrize("method", ["exact", "fedsa"])
def test_a_service_that_was_killed_goes_on_with_the_same_bytes(
    make: MakeService, method: str, tmp_path: Path
) -> None:
    through = OneSite(make(name="a", state_dir=str(tmp_path / "a")).handle, method)
    through.begin()
    whole = []
    for _ in range(3):
        whole.append(through.train())
        through.fold(whole[-1])
    services = [make(name="a", state_dir=str(tmp_path / "b"))]
    broken = OneSite(lambda message: services[-1].handle(message), method)
    broken.begin()
    answers = []
    for _ in range(3):
        answers.append(broken.train())
        services.append(make(name="a", state_dir=str(tmp_path / "b")))
        services[-1].restore()
        assert broken.train() == answers[-1], "it is on disk"
        assert services[-1].status()["confirmed"] == len(answers) - 1, "so is the global model"
        broken.fold(answers[-1])
    assert [timeless(x) for x in answers] == [timeless(x) for x in whole]


def timeless(answer: bytes) -> list[Any]:
    """What was trained, without how long it took."""
    message = decode(answer)
    return [{name: value.tolist() for name, value in message.tensors.items()}]


def test_what_was_trained_in_vain_leaves_no_trace(make: MakeService) -> None:
    """Another attempt goes on from what counted, not from what a lost attempt has kept."""
    run = OneSite(make().handle, "fedsa")
    run.begin()
    run.fold(run.train())
    first, again = run.train(), run.train(attempt=1)
    assert timeless(first) == timeless(again)


def test_a_state_that_is_gone_is_said(make: MakeService, tmp_path: Path) -> None:
    run = OneSite(make(state_dir=str(tmp_path / "s")).handle, "fedsa")
    run.begin()
    run.fold(run.train())
    for path in (tmp_path / "s").rglob("state-*"):
        path.unlink()
    error = refusal(run.train)
    assert (error.kind, "has lost what it kept after round 1" in error.reason) == ("refused", True)


def test_after_a_join_the_past_is_asked_anew(make: MakeService) -> None:
    service = make()
    run = OneSite(service.handle)
    run.begin()
    run.fold(run.train())
    run.train()
    run.join(round=1)
    assert refusal(run.train).reason.startswith("nothing was agreed yet")
    run.agree()
    assert decode(run.train()).header.round == 2
    assert service.bases_loaded == 1, "the same was in memory"


def changed(server: OneSite, **header: Any) -> Callable[[], bytes]:
    """Asks for a round with another header."""
    return lambda: server.call(server.train_bytes(**header))


def test_what_is_not_for_this_site_is_refused(make: MakeService) -> None:
    service = make()
    run = OneSite(service.handle)
    run.base, run.digest = "b", "d"
    stranger = encode(Message(run.header("train", 1)))
    assert "has to be asked to join" in refusal(lambda: service.handle(stranger)).reason
    run.base = run.digest = ""
    run.begin()
    run.fold(run.train())
    run.fold(run.train(attempt=1))
    for ask, said in (
        (changed(run, run="run-2"), "it belongs to run run-2"),
        (changed(run, base="other"), "a base model of other weights"),
        (changed(run, agreement="other"), "another agreement"),
        (changed(run, round=2), "attempt 0 of round 2 is of the past"),
        (changed(run, round=1), "attempt 0 of round 1 is of the past"),
        (lambda: service.handle(b"garbage!"), "cut short, or no message"),
        (lambda: service.handle(encode(Message(run.header("odd")))), "answers no message odd"),
        (lambda: run.agree(rank=2), "it asks for rank 2, and this site trains rank 4"),
        (lambda: run.agree(client=3), "calls this site client 3"),
        (lambda: run.join(version="0.0.0"), "install the same version on both"),
    ):
        error = refusal(ask)
        assert (error.kind, said in error.reason) == ("refused", True), error.reason
    assert run.train(), "nothing was lost"


@pytest.mark.parametrize(
    ("keys", "asked", "said"),
    [
        ({"bounds": {"lora_r": 2}}, {}, "lora_r: 4 is asked for, and this site allows at most 2"),
        ({"bounds": {"max_steps": 1}}, {}, "max_steps: 2 is asked for"),
        (
            {"bounds": {"max_steps": 3}},
            {"max_steps": -1},
            "max_steps: the epochs asked for are 4 steps on the rows of this site",
        ),
        ({}, {"train_file": "/etc/passwd"}, "train_file: is not a server's to set"),
        ({}, {"learning_rate": -1.0}, "learning_rate: -1.0 must be greater than 0"),
    ],
)
def test_a_server_that_asks_too_much_is_refused_and_nothing_is_loaded(
    make: MakeService, keys: dict[str, Any], asked: dict[str, Any], said: str
) -> None:
    service = make(**keys)
    error = refusal(OneSite(service.handle, asked={**ASKED, **asked}).join)
    assert error.kind == "refused"
    assert said in error.reason
    assert service.bases_loaded == 0


def test_a_deadline_and_a_cancelled_call(make: MakeService) -> None:
    service = make()
    seconds: list[float | None] = [None]
    run = OneSite(lambda message: service.handle(message, seconds[0]))
    run.begin()
    expected = timeless(run.train())
    seconds[0] = 0.0
    error = refusal(lambda: run.train(attempt=1))
    assert (error.kind, error.reason) == ("deadline", "the deadline has passed")
    seconds[0] = None

    original = service._on_step

    def cancelling(*arguments: Any) -> None:
        service.cancel()
        original(*arguments)

    service._on_step = cancelling  # type: ignore[method-assign]
    error = refusal(lambda: run.train(attempt=2))
    assert (error.kind, error.reason) == ("deadline", "the call was cancelled")
    service._on_step = original  # type: ignore[method-assign]
    assert timeless(run.train(attempt=3)) == expected, "a broken training leaves no trace"


def test_while_it_trains_it_is_busy_tells_how_far_and_answers_the_same_twice(
    make: MakeService,
) -> None:
    trains, goes_on = threading.Event(), threading.Event()

    def waiting(model: Any, dataset: Any, training: Any) -> Any:
        training.on_step(1, 2, 0.5, 10)
        trains.set()
        goes_on.wait(20)
        return train(model, dataset, training)

    service = make(waiting)
    run = OneSite(service.handle)
    run.begin()
    message, answers = run.train_bytes(), list[bytes]()
    threads = [
        threading.Thread(target=lambda: answers.append(service.handle(message))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    assert trains.wait(20)
    status = service.status()
    error = refusal(lambda: service.handle(run.train_bytes(attempt=1)))
    goes_on.set()
    for thread in threads:
        thread.join(30)
    told = {key: status[key] for key in ("state", "run", "round", "step", "steps", "loss", "rows")}
    assert told == {
        "state": "training",
        "run": "run-1",
        "round": 1,
        "step": 1,
        "steps": 2,
        "loss": 0.5,
        "rows": 12,
    }
    assert status["since"] <= time.time()
    assert (error.kind, error.reason) == ("busy", "this site is at train of round 1, attempt 0")
    assert len(answers) == 2
    assert answers[0] == answers[1]
    assert service.status()["state"] == "idle"


def test_what_goes_wrong_at_a_site_is_told_without_its_rows(
    make: MakeService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def quoting(model: Any, dataset: Any, training: Any) -> Any:
        raise RuntimeError("the row 'secret patient' broke it")

    run = OneSite(make(quoting).handle)
    run.begin()
    error = refusal(run.train)
    assert error.kind == "failed"
    assert error.reason.startswith("its training failed with RuntimeError; the worker's log")
    assert "secret patient" in capsys.readouterr().err

    (tmp_path / "bad.jsonl").write_text('{"text": "secret patient", "label": "secret"}\n')
    service = make(
        train_file=str(tmp_path / "bad.jsonl"), label_column_name="label", label_names=["a", "b"]
    )
    error = refusal(OneSite(service.handle).join)
    assert error.kind == "mistake"
    assert error.reason.startswith("label_names cannot be used at this site; the worker's log")
    assert "secret" in capsys.readouterr().err


def test_a_site_s_rank_is_its_own_or_limited(make: MakeService) -> None:
    assert OneSite(make(rank=8).handle).join().rank == 8
    assert OneSite(make(max_rank=2).handle).join().rank == 2
    assert OneSite(make(max_rank=32).handle).join().rank == 4


def test_who_has_left_is_asked_to_join_first(make: MakeService) -> None:
    from fedlora.federation.handshake import Leave, leave_message, read_leave

    service = make()
    run = OneSite(service.handle)
    run.begin()
    answer = run.ask(leave_message(run.header(), Leave("it is over")))
    assert read_leave(answer).reason == "it is over"
    assert "has to be asked to join" in refusal(run.train).reason
    run.begin()
    assert run.train()
    assert service.bases_loaded == 1
