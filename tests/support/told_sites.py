"""Sites that answer what a test tells them to, for units: no model, no training, no rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fedlora.engines.carrier import SiteError
from fedlora.engines.transport import Answer
from fedlora.federation.envelope import Header, Message, decode, encode
from fedlora.federation.handshake import (
    Agreed,
    Joined,
    agreed_message,
    joined_message,
    read_agree,
    read_join,
)

BASE = "b" * 64


def joined(site: str, client: int, rank: int = 4, **more: Any) -> Joined:
    """What a site tells of itself; client k has 10 + k rows."""
    told: dict[str, Any] = {
        "num_examples": 10 + client,
        "tokens": 100,
        "eval_rows": 0,
        "label_names": (),
        "base": BASE,
        "data": f"rows of {site}",
        "architecture": "LlamaForCausalLM",
        "parameters": 1,
        "shapes": {},
        "full_params": {},
    }
    return Joined(site=site, client=client, rank=rank, **{**told, **more})


Say = Callable[[str, Message], Message | SiteError]


def handshaking(name: str, message: Message, **more: Any) -> Message:
    """A site that joins with what it is asked for, and agrees with everybody."""
    header: Header = message.header
    if header.kind == "join":
        asked = read_join(message)
        told = {"rank": asked.config["lora_r"], **more}
        return joined_message(header, joined(name, asked.client, **told))
    assert header.kind == "agree", header.kind
    return agreed_message(header, Agreed(read_agree(message).digest))


class ToldSites:
    """A transport to such sites.

    Args:
        names: the sites; who is no key of `absent` answers.
        say: what a site answers; an error is raised as what becomes of the call.
        absent: sites that are not there; it may change.
    """

    def __init__(self, names: Sequence[str], say: Say = handshaking, absent: str = "") -> None:
        self._names, self.say, self.absent = list(names), say, absent
        self.asked: list[tuple[str, Header]] = []
        self.closed = False

    def names(self) -> Sequence[str]:
        return self._names

    def send(
        self, messages: Mapping[str, bytes], deadline: float | None
    ) -> Iterator[tuple[str, Answer]]:
        for name, data in messages.items():
            message = decode(data)
            self.asked.append((name, message.header))
            if name in self.absent:
                yield name, SiteError("absent", "no worker has its socket there")
                continue
            answer = self.say(name, message)
            yield name, answer if isinstance(answer, SiteError) else encode(answer)

    def status(self, name: str) -> Mapping[str, Any]:
        return {}

    def close(self) -> None:
        self.closed = True
