"""The order of calls at a site: one at a time, and what is no message of a run is refused."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.config.site import Site
from fedlora.engines.carrier import SiteError
from fedlora.engines.site_service import SiteService
from fedlora.engines.site_store import RunStore
from fedlora.federation.envelope import Header, Message, encode
from fedlora.federation.handshake import Join, join_message

HEADER = Header("run", 1, 0, "train", "base", "agreement")
TRAIN = encode(Message(HEADER))


@pytest.fixture
def service(tmp_path: Path) -> SiteService:
    return SiteService(Site(name="clinic", state_dir=str(tmp_path)))


def refused(service: SiteService, message: bytes, seconds: float | None = None) -> SiteError:
    with pytest.raises(SiteError) as raised:
        service.handle(message, seconds)
    return raised.value


@pytest.mark.parametrize("kind", ["train", "agree", "evaluate", "leave", "dance"])
def test_whoever_has_not_joined_is_refused(kind: str, service: SiteService) -> None:
    error = refused(service, encode(Message(replace(HEADER, kind=kind))))
    assert error.kind == "refused"
    assert "it has to be asked to join" in error.reason


def test_garbage_is_refused(service: SiteService) -> None:
    for message in (b"", b"\xff" * 20, TRAIN[:-1], TRAIN[:40] + b"?" + TRAIN[41:]):
        assert refused(service, message).kind == "refused"


def test_a_server_of_another_version_is_told_what_to_do(service: SiteService) -> None:
    join = replace(Join(0, 1, "exact", {}), version="0.0.7")
    error = refused(service, encode(join_message(HEADER, join)))
    assert "runs fedlora 0.0.7" in error.reason
    assert "install the same version on both" in error.reason


def test_one_message_at_a_time(service: SiteService) -> None:
    """Another one is told so at once; the very same one waits, as long as it may."""
    with service._alone(HEADER, float("inf")):
        assert service.status()["state"] == "training"
        assert service.status()["round"] == 1
        error = refused(service, encode(Message(replace(HEADER, attempt=1))))
        assert (error.kind, error.reason) == ("busy", "this site is at train of round 1, attempt 0")
        assert refused(service, TRAIN, 0.01).kind == "deadline"
        waiting = threading.Thread(target=refused, args=(service, TRAIN))
        waiting.start()
    waiting.join(5)
    assert not waiting.is_alive()
    assert service.status()["state"] == "idle"


def test_a_cancelled_call_ends_at_its_next_step(service: SiteService) -> None:
    service.cancel()  # nothing is worked on: nothing to cancel
    with service._alone(HEADER, float("inf")):
        service._on_step(1, 3, 0.5, 9)
        status = service.status()
        assert (status["step"], status["steps"], status["loss"]) == (1, 3, 0.5)
        service.cancel()
        with pytest.raises(Exception, match="was cancelled"):
            service._on_step(2, 3, 0.5, 9)
        service._on_step(3, 3, 0.5, 9)  # it is done, so it is answered
    with service._alone(HEADER, 0.0), pytest.raises(Exception, match="deadline has passed"):
        service._on_step(1, 3, 0.5, 9)


def test_there_is_nothing_to_go_on_with(service: SiteService) -> None:
    service.restore()
    assert service.status()["run"] is None


def test_a_run_that_cannot_be_gone_on_with_is_told_and_left(
    service: SiteService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunStore.of(tmp_path, "run").keep("join", b"damaged")
    service.restore()
    assert "cannot go on with run run" in capsys.readouterr().err
    assert (service.status()["run"], service.status()["state"]) == (None, "idle")
