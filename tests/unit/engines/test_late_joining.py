"""Sites that join a run which goes on: one at a time, and only those that go with the others."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.engines import late_joining
from fedlora.engines.late_joining import LateJoining
from fedlora.engines.site_calls import SiteCalls
from fedlora.engines.site_handshake import Handshake
from fedlora.federation.envelope import Message
from fedlora.federation.exchange import Agreement
from fedlora.federation.participants import Federation
from fedlora.methods import METHODS
from support.told_sites import BASE, ToldSites, handshaking

SHAPES = {"q_proj": (4, 4)}


def fitting(name: str, message: Message, **more: Any) -> Message:
    return handshaking(name, message, **{"shapes": SHAPES, **more})


def late(
    transport: ToldSites, waiting: str, told: list[str] | None = None, method: str = "exact"
) -> LateJoining:
    rule = METHODS[method]
    agreement = Agreement(rule, rule.options(), SHAPES, 0)
    session: Any = SimpleNamespace(
        config=Config(method=method, lora_r=16),
        federation=Federation([8, 4], [10, 11], agreement),
        sites=(SimpleNamespace(base=BASE, label_names=()),),
    )
    calls = SiteCalls(transport, lambda text: None, pauses=())
    handshake = Handshake(session.config, "r1", calls)
    return LateJoining(handshake, session, waiting, (told if told is not None else []).append)


def test_who_comes_gets_the_next_number_and_no_higher_rank() -> None:
    transport = ToldSites("cde", fitting, absent="cd")
    joining = late(transport, "cde")
    assert [(x.site, x.client, x.rank) for x in joining.joined(2, 1)] == [("e", 2, 8)]
    assert joining.waiting == ["c", "d"]
    transport.absent = ""
    assert [(x.site, x.client) for x in joining.joined(3, 2)] == [("c", 3), ("d", 4)]
    assert joining.joined(5, 3) == []


@pytest.mark.parametrize(
    ("more", "method", "says"),
    [
        ({"base": "other"}, "exact", "other weights"),
        ({"label_names": ("a",)}, "exact", "label_names"),
        ({"shapes": {}}, "exact", "other target modules"),
        ({"rank": 9}, "exact", "trains rank 9; nobody who joins later may exceed 8"),
        ({"rank": 4}, "fedit", "method fedit needs rank 8 of all, it has 4"),
    ],
)
def test_who_does_not_go_with_the_others_is_asked_no_more(
    more: dict[str, Any], method: str, says: str
) -> None:
    told: list[str] = []

    def say(name: str, message: Message) -> Message:
        return fitting(name, message, **more)

    joining = late(ToldSites("c", say), "c", told, method)
    assert joining.joined(2, 0) == []
    assert joining.waiting == []
    (text,) = told
    assert text.startswith("site c takes no part: ")
    assert says in text


def test_a_round_does_not_wait_for_one_that_is_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number stays its own meanwhile, so the others wait for it."""
    loaded = threading.Event()

    def slow(name: str, message: Message) -> Message:
        if name == "c":
            loaded.wait(30)
        return fitting(name, message)

    monkeypatch.setattr(late_joining, "PATIENCE", 0.01)
    joining = late(ToldSites("cd", slow), "cd")
    assert joining.joined(2, 0) == []
    loaded.set()
    monkeypatch.setattr(late_joining, "PATIENCE", 30.0)
    assert [(x.site, x.client) for x in joining.joined(2, 1)] == [("c", 2), ("d", 3)]
