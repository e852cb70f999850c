"""A server of one site: it asks by messages and folds what is answered, through any call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from fedlora.config.config import Config
from fedlora.config.site import Site, read_site
from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.envelope import Header, Message, decode, encode
from fedlora.federation.exchange import Agreement
from fedlora.federation.handshake import (
    Agree,
    Agreed,
    Counted,
    Evaluated,
    Join,
    Joined,
    agree_message,
    join_message,
    read_agreed,
    read_evaluated,
    read_joined,
    with_counted,
)
from fedlora.federation.messages import ClientUpdate
from fedlora.federation.participants import Federation
from fedlora.federation.server import Server, initial_state
from fedlora.federation.site_wire import model_message, read_confirmation, site_message
from fedlora.federation.wire import read_trained
from fedlora.methods import METHODS

Call = Callable[[bytes], bytes]

ASKED: dict[str, Any] = {
    "lora_r": 4,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "dtype": "float32",
    "max_length": 128,
    "eval_exact_match": False,
    "client_eval_fraction": 0.25,
    "num_rounds": 3,
    "seed": 42,
}
"""What the server sets unless a test changes it."""


def site_file(
    directory: Path, model: Path, train_file: str, name: str = "clinic", **keys: Any
) -> Path:
    """The file of a site, in a directory of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    values = {
        "name": name,
        "model_name_or_path": str(model),
        "train_file": train_file,
        "use_cpu": True,
        **keys,
    }
    path = directory / "site.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def made_site(*arguments: Any, **keys: Any) -> Site:
    """The site of such a file."""
    return read_site(site_file(*arguments, **keys))


@dataclass
class OneSite:
    """The server's side of a run with one site.

    Args:
        call: hands over a message and gives the answer.
        method: the aggregation rule.
        asked: what the server sets.
        run: the run's id.
        held: the round whose global model the site has confirmed; None: none.
    """

    call: Call
    method: str = "exact"
    asked: Mapping[str, Any] = field(default_factory=lambda: dict(ASKED))
    run: str = "run-1"
    counted: Counted = (0, 0)
    base: str = ""
    digest: str = ""
    held: int | None = None

    def header(self, kind: str = "", round: int = 0, attempt: int = 0) -> Header:
        """Of a message of this run."""
        return Header(self.run, round, attempt, kind, self.base, self.digest)

    def ask(self, message: Message) -> Message:
        """Send a message and read the answer."""
        return decode(self.call(encode(message)))

    def join(self, round: int = 0, **changed: Any) -> Joined:
        """Ask the site to take part."""
        join = replace(Join(0, 1, self.method, self.asked), **changed)
        joined = read_joined(self.ask(join_message(self.header(round=round), join)))
        self.base, config = joined.base, Config(method=self.method, **self.asked)
        self.agreement = Agreement(
            METHODS[self.method], config.rule_options(), joined.shapes, config.seed
        )
        self.digest = self.agreement.digest
        self.joined = joined
        return joined

    def agree(self, **changed: Any) -> Agreed:
        """Compare what both hold to."""
        joined = self.joined
        whole = bool(joined.full_params)
        agree = Agree(joined.client, joined.rank, 1, self.digest, first_values=whole)
        answer = self.ask(agree_message(self.header(), replace(agree, **changed)))
        return read_agreed(answer, joined.full_params)

    def begin(self) -> Server:
        """Join, agree, and the server before round 1."""
        joined = self.join()
        agreed = self.agree()
        federation = Federation([joined.rank], [joined.num_examples], self.agreement)
        state = initial_state(federation, {}, agreed.full_params)
        self.server = Server(federation, state, Mean())
        return self.server

    def train_bytes(self, attempt: int = 0, **header: Any) -> bytes:
        """The message that asks for the next round."""
        (broadcast,) = self.server.plan().values()
        asked = replace(self.header(round=broadcast.round, attempt=attempt), **header)
        message = site_message(asked, broadcast, self.server.lacking(0, self.held))
        return encode(with_counted(message, self.counted))

    def train(self, attempt: int = 0) -> bytes:
        """Ask for the next round."""
        return self.call(self.train_bytes(attempt))

    def fold(self, answer: bytes) -> ClientUpdate:
        """Take what was trained into the global model."""
        message = decode(answer)
        (update,), states = read_trained(message, {0: self.joined.shapes})
        assert not states
        confirmation = read_confirmation(message)
        assert confirmation is not None
        assert not self.server.has_drifted(confirmation)
        self.held = message.header.round - 1
        assert self.server.accept(update) == ""
        self.server.commit()
        self.counted = message.header.round, message.header.attempt
        return update

    def evaluate(self) -> Evaluated:
        """Ask for an evaluation of the global model."""
        header = self.header(round=self.server.state.round)
        message = model_message(header, self.server.model_lacking(self.held))
        evaluated = read_evaluated(self.ask(with_counted(message, self.counted)))
        self.held = header.round
        return evaluated
