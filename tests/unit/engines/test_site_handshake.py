"""Server and sites come together: who is there, who is whom, and what all hold to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.engines.carrier import SiteError
from fedlora.engines.roster import Member, Roster
from fedlora.engines.site_calls import SiteCalls
from fedlora.engines.site_handshake import Opened, open_federation, report_of
from fedlora.errors import InputError
from fedlora.federation.envelope import Message
from fedlora.federation.handshake import Leave, leave_message
from support.told_sites import BASE, Say, ToldSites, handshaking, joined


def opened(
    tiny_llama: Path,
    transport: ToldSites,
    roster: Roster | None = None,
    round: int = 0,
    **keys: Any,
) -> Opened:
    names = [*transport.names(), "spare"]
    config = Config(
        model_name_or_path=str(tiny_llama),
        num_threads=1,
        engine="sites",
        sites={name: f"/{name}.sock" for name in names},
        **keys,
    )
    calls = SiteCalls(transport, lambda text: None, pauses=())
    return open_federation(config, calls, roster or Roster(), round)


def test_sites_are_numbered_in_the_order_of_their_names(tiny_llama: Path) -> None:
    transport = ToldSites(["a", "b"])
    federation = opened(tiny_llama, transport, client_ranks=[8, 2]).session.federation
    assert list(federation.ranks) == [8, 2]
    assert list(federation.num_examples) == [10, 11]
    kinds = [header.kind for _, header in transport.asked]
    assert sorted(kinds[:2]) == ["join", "join"]
    assert sorted(kinds[2:]) == ["agree", "agree"]
    digests = {header.agreement for _, header in transport.asked[2:]}
    assert digests == {federation.agreement.digest}
    assert {header.base for _, header in transport.asked[2:]} == {BASE}


def test_who_is_not_there_may_come_later_where_others_are_enough(tiny_llama: Path) -> None:
    transport = ToldSites(["a", "b", "c"], absent="a")
    with pytest.raises(InputError, match="sites: a: no worker has its socket there"):
        opened(tiny_llama, transport)
    with pytest.raises(InputError, match="sites: a: "):
        opened(tiny_llama, transport, min_clients_per_round=3)
    two = opened(tiny_llama, transport, min_clients_per_round=2)
    assert {name: told.client for name, told in two.joined.items()} == {"b": 0, "c": 1}
    assert two.waiting == ("a",)


def test_a_run_goes_on_with_the_numbers_it_had(tiny_llama: Path) -> None:
    members = {"b": Member(0, 8), "a": Member(1, 2), "gone": Member(2, 4, "done")}
    transport = ToldSites(["a", "b", "new"])
    again = opened(tiny_llama, transport, Roster("r1", members), round=3)
    assert list(again.session.federation.ranks) == [8, 2, 4]
    assert list(again.session.federation.num_examples) == [10, 11, 0]
    assert again.session.run == "r1"
    assert again.waiting == ("new",)
    assert {header.round for _, header in transport.asked} == {3}
    with pytest.raises(InputError, match="sites: b takes part in this run and is not among them"):
        opened(tiny_llama, ToldSites(["a"]), Roster("r1", members))


def leaving(name: str, message: Message) -> Message:
    if name == "a":
        return leave_message(message.header, Leave("done"))
    return handshaking(name, message)


def test_who_leaves_before_it_begins_is_named_and_later_is_left_out(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match="sites: a takes no part: done"):
        opened(tiny_llama, ToldSites(["a", "b"], leaving))
    roster = Roster("r1", {"a": Member(0, 4), "b": Member(1, 4)})
    again = opened(tiny_llama, ToldSites(["a", "b"], leaving), roster)
    assert again.left == {"a": Member(0, 4, "done")}
    assert list(again.session.federation.num_examples) == [0, 11]
    with pytest.raises(InputError, match="no site takes part any more"):
        opened(tiny_llama, ToldSites(["a"], leaving), Roster("r1", {"a": Member(0, 4)}))


def renamed(name: str, message: Message) -> Message:
    return handshaking("other", message)


def other_base(name: str, message: Message) -> Message:
    return handshaking(name, message, base=name * 8)


def other_digest(name: str, message: Message) -> Message:
    answer = handshaking(name, message)
    if message.header.kind == "agree":
        return replace(answer, body={"digest": "other"})
    return answer


def refusing(name: str, message: Message) -> Message | SiteError:
    return SiteError("refused", "lora_r: 64 is asked for, and this site allows at most 16")


@pytest.mark.parametrize(
    ("say", "says"),
    [
        (renamed, "sites: a: .* it calls itself other"),
        (other_base, "holds other weights than client 0"),
        (other_digest, "sites: a: .* it holds to another agreement"),
        (refusing, "sites: a: lora_r: 64 is asked for, and this site allows at most 16"),
    ],
)
def test_what_does_not_go_together(tiny_llama: Path, say: Say, says: str) -> None:
    with pytest.raises(InputError, match=says):
        opened(tiny_llama, ToldSites(["a", "b"], say))


def test_another_number_of_clients_is_a_mistake(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match="num_clients: 3, but there are 2 sites; leave it out"):
        opened(tiny_llama, ToldSites(["a", "b"]), num_clients=3)


def test_what_a_site_tells_becomes_its_report() -> None:
    report = report_of(joined("a", 1, eval_rows=3))
    assert (report.client, report.name, report.num_examples, report.eval_rows) == (1, "a", 11, 3)
    assert (report.tokens, report.base) == (100, BASE)
