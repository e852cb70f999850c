"""Sites in memory: the messages of a federation of processes, answered by a function call.

`SiteInMemory` is the smallest site that keeps to the protocol. It has a session like a worker's,
answers bytes with bytes, and keeps on its "disk" what has to outlive its worker.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedlora.client.evaluate import evaluate
from fedlora.client.trainer import train
from fedlora.client.worker import Worker
from fedlora.config.config import Config
from fedlora.data.tokenize import IGNORE
from fedlora.engines.carrier import SiteError
from fedlora.engines.run_sites import MakeCalls, resume_with_sites, run_with_sites
from fedlora.engines.site_calls import SiteCalls
from fedlora.engines.transport import Answer
from fedlora.errors import InputError
from fedlora.federation.envelope import Message, RefusedMessageError, check_header, decode, encode
from fedlora.federation.handshake import (
    AGREE,
    EVALUATE,
    JOIN,
    LEAVE,
    Agreed,
    Evaluated,
    Joined,
    Leave,
    agreed_message,
    counted_of,
    evaluated_message,
    joined_message,
    leave_message,
    read_agree,
    read_evaluate,
    read_join,
)
from fedlora.federation.messages import ClientState
from fedlora.federation.wire import TRAIN, read_train, trained_message
from fedlora.lowrank import LowRank
from fedlora.runs.directory import RunDirectory
from fedlora.runs.events import Event, ignore
from fedlora.runs.results import Result
from fedlora.runs.resume import as_it_began
from fedlora.runs.site_session import SiteSession, assemble_site

Keys = Mapping[str, Any]
LOCK = threading.Lock()
"""Sites in one process share torch and the bases that tests keep: one answers at a time."""


@dataclass
class Disk:
    """What a site keeps of a run.

    Args:
        states: (round, attempt) of a training -> what outlives it.
        answers: (round, attempt) -> the answer's bytes.
    """

    states: dict[tuple[int, int], ClientState] = field(default_factory=dict)
    answers: dict[tuple[int, int], bytes] = field(default_factory=dict)


class SiteInMemory:
    """A site that answers in this process.

    Args:
        name: its name.
        keys: of its configuration: its rows, and where its base lies.
        fails: raises an exception at the start of a training, given its round and attempt.
    """

    def __init__(
        self, name: str, keys: Keys, fails: Callable[[int, int], None] = lambda r, a: None
    ) -> None:
        self.name, self.keys, self.fails = name, dict(keys), fails
        self.disk: dict[str, Disk] = {}
        self.leaves = ""  # why it leaves, from now on
        self.trained: list[tuple[int, int]] = []
        self.restart()

    def restart(self) -> None:
        """Lose all that a worker has in memory."""
        self.session: SiteSession | None = None
        self.run = ""
        self.newest = (0, -1)

    def answer(self, data: bytes) -> bytes:
        """The answer to a message.

        Raises:
            SiteError: it is refused, or the training fails.
        """
        try:
            message = decode(data)
            if self.leaves and message.header.kind != LEAVE:
                return encode(leave_message(message.header, Leave(self.leaves)))
            answers = {
                JOIN: self._join,
                AGREE: self._agree,
                TRAIN: self._train,
                EVALUATE: self._evaluate,
                LEAVE: self._leave,
            }
            return answers[message.header.kind](message)
        except (RefusedMessageError, InputError) as error:
            raise SiteError("refused", str(error)) from None

    def _join(self, message: Message) -> bytes:
        join = read_join(message)
        config = Config(**{**join.config, **self.keys, "method": join.method})
        config = config.model_copy(update={"num_clients": join.num_clients})
        self.session = session = assemble_site(config, join.client)
        self.first = session.base.read_full_params()
        self.run, self.newest = message.header.run, (message.header.round, 1 << 30)
        self.disk.setdefault(self.run, Disk())
        rows = session.data
        joined = Joined(
            site=self.name,
            client=join.client,
            num_examples=len(rows.train),
            tokens=sum(len(row["input_ids"]) for row in rows.train),
            eval_rows=len(rows.eval),
            rank=session.report.rank,
            label_names=session.report.label_names,
            base=session.report.base,
            data=session.report.data,
            architecture=type(session.base.model).__name__,
            parameters=sum(p.numel() for p in session.base.model.parameters()),
            shapes=session.agreement.shapes,
            full_params={name: tuple(x.shape) for name, x in self.first.items()},
        )
        return encode(joined_message(message.header, joined))

    def _here(self, message: Message) -> SiteSession:
        """The session, where the message belongs to it."""
        if self.session is None or message.header.run != self.run:
            raise RefusedMessageError("it belongs to a run that this site has not joined")
        agreement = self.session.agreement.digest
        base = self.session.report.base
        check_header(message.header, replace(message.header, base=base, agreement=agreement))
        return self.session

    def _agree(self, message: Message) -> bytes:
        session, agree = self._here(message), read_agree(message)
        values = self.first if agree.first_values else {}
        return encode(agreed_message(message.header, Agreed(session.agreement.digest, values)))

    def _train(self, message: Message) -> bytes:
        session, disk = self._here(message), self.disk[self.run]
        asked = message.header.round, message.header.attempt
        if asked in disk.answers:
            return disk.answers[asked]
        if asked <= self.newest:
            raise RefusedMessageError(f"round and attempt {asked} are over")
        self.newest = asked
        self.fails(*asked)
        (broadcast,), _ = read_train(message, {})
        counted = counted_of(message)
        states = {broadcast.client: disk.states[counted]} if counted in disk.states else {}
        worker = Worker(
            session.base, {broadcast.client: session.data}, session.config, session.agreement,
            train, states,
        )  # fmt: skip
        update = worker.handle(broadcast)
        self.trained.append(asked)
        if broadcast.client in states:
            disk.states[asked] = states[broadcast.client]
        disk.answers[asked] = encode(trained_message(message.header, [update], {}))
        return disk.answers[asked]

    def _evaluate(self, message: Message) -> bytes:
        session, model = self._here(message), read_evaluate(message)
        kept = self.disk[self.run].states.get(counted_of(message), ClientState())
        adapter = model.adapter
        if session.agreement.training.keeps:
            adapter = {
                name: LowRank(x.A, kept.factors.get(f"{name}.B", x.B))
                for name, x in adapter.items()
                if isinstance(x, LowRank)
            }
        session.base.load([model.base_delta, adapter], full_params=model.dense)
        rows = session.data.eval
        metrics = evaluate(
            session.base.model,
            session.base.tokenizer,
            rows,
            batch_size=session.config.per_device_eval_batch_size,
            label_names=session.report.label_names,
        )
        labels = len(rows)
        if not session.report.label_names:
            labels = sum(label != IGNORE for row in rows for label in row["labels"][1:])
        return encode(evaluated_message(message.header, Evaluated(len(rows), labels, metrics)))

    def _leave(self, message: Message) -> bytes:
        self._here(message)
        self.disk.pop(self.run)
        self.restart()
        return encode(leave_message(message.header, Leave("as told")))


Mangle = Callable[[str, Message, Callable[[], Answer]], Iterator[tuple[str, Answer]]]
"""What comes of a message to a site, given the site, the message, and what asks the site."""


def faithfully(
    name: str, message: Message, ask: Callable[[], Answer]
) -> Iterator[tuple[str, Answer]]:
    """Its answer, once."""
    yield name, ask()


class InMemoryTransport:
    """A transport to sites in memory.

    Args:
        sites: those that are up, by name; it may change.
        names: all there are; None: those that are up.
        mangle: what comes of each message.
    """

    def __init__(
        self,
        sites: Mapping[str, SiteInMemory],
        names: Sequence[str] | None = None,
        mangle: Mangle = faithfully,
    ) -> None:
        self.sites, self.mangle = sites, mangle
        self._names = sorted(sites if names is None else names)
        self.sent: list[tuple[str, str]] = []

    def names(self) -> Sequence[str]:
        return self._names

    def send(
        self, messages: Mapping[str, bytes], deadline: float | None
    ) -> Iterator[tuple[str, Answer]]:
        for name, data in messages.items():
            message = decode(data)
            self.sent.append((name, message.header.kind))
            yield from self.mangle(name, message, partial(self._ask, name, data))

    def _ask(self, name: str, data: bytes) -> Answer:
        site = self.sites.get(name)
        if site is None:
            return SiteError("absent", "no worker has its socket there")
        with LOCK:
            torch.set_num_threads(1)
            try:
                return site.answer(data)
            except SiteError as error:
                return error
            except Exception as error:
                return SiteError("failed", f"{type(error).__name__}: {error}")

    def close(self) -> None:
        pass


NAMES = ("alpha", "beta", "gamma", "delta")
"""What the sites of tests are called; the order of their names is that of client numbers."""
NAMES = tuple(sorted(NAMES))

_AT_SITE = ("train_file", "label_column_name", "text_column_names", "use_cpu", "template")
_SERVER_ONLY = ("client_ranks", "client_overrides", "num_clients", "clients_per_round")


def sites_of(keys: Keys, count: int = 3) -> dict[str, SiteInMemory]:
    """A site for each of the first files of a run whose `train_file` is a pattern."""
    pattern = str(keys["train_file"])
    files = sorted(Path(pattern).parent.glob(Path(pattern).name))[:count]
    own = {key: x for key, x in keys.items() if key in _AT_SITE}
    own |= {"model_name_or_path": keys["model_name_or_path"], "num_threads": 1}
    return {
        name: SiteInMemory(name, {**own, "train_file": str(file)})
        for name, file in zip(NAMES, files, strict=False)
    }


def server_keys(keys: Keys, names: Sequence[str], out: Path) -> dict[str, Any]:
    """The server's configuration of a run: no rows of clients, and an address for every site."""
    plain = {key: x for key, x in keys.items() if key not in ("train_file", "cohort_size")}
    sites = {name: f"/nowhere/{name}.sock" for name in names}
    return {**plain, "engine": "sites", "sites": sites, "output_dir": str(out)}


def making(transport: InMemoryTransport, pauses: Sequence[float] = (0.01, 0.01)) -> MakeCalls:
    """What `run_with_sites` is given to reach sites in memory."""
    return lambda config, tell: SiteCalls(transport, tell, pauses)


def federate(
    keys: Keys,
    out: Path,
    transport: InMemoryTransport,
    events: list[Event] | None = None,
    callbacks: Sequence[Callable[[Any], None]] = (),
) -> Result:
    """A whole run over sites in memory."""
    config = Config(**server_keys(keys, transport.names(), out))
    hear = events.append if events is not None else ignore
    return run_with_sites(config, callbacks, hear, making(transport))


def federate_on(
    out: Path, transport: InMemoryTransport, events: list[Event] | None = None
) -> Result:
    """Go on with such a run whose server was killed."""
    hear = events.append if events is not None else ignore
    directory = RunDirectory.open(out)
    try:
        config = as_it_began(directory.path, None)
        return resume_with_sites(config, directory, (), hear, making(transport))
    finally:
        directory.close()
