"""Sites in memory: a federation of processes without processes, sockets and their failures.

What answers is a site's own service (`fedlora.engines.site_service`), called as a function; what it
keeps on its disk outlives its restart, as it outlives that of a worker.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedlora.config.config import Config
from fedlora.config.site import Site, read_site
from fedlora.engines.carrier import SiteError
from fedlora.engines.run_sites import MakeCalls, resume_with_sites, run_with_sites
from fedlora.engines.site_calls import SiteCalls
from fedlora.engines.site_service import SiteService
from fedlora.engines.transport import Answer
from fedlora.federation.envelope import Message, decode, encode
from fedlora.federation.handshake import LEAVE, Leave, leave_message
from fedlora.federation.wire import TRAIN
from fedlora.runs.directory import RunDirectory
from fedlora.runs.events import Event, ignore
from fedlora.runs.results import Result
from fedlora.runs.resume import as_it_began
from support.one_site import site_file

Keys = Mapping[str, Any]
LOCK = threading.Lock()
"""Sites in one process share torch and the bases that tests keep: one answers at a time."""


@dataclass
class SiteInMemory:
    """A site that answers in this process.

    Args:
        site: its file.
        fails: raises an exception in the place of a training, given its round and attempt.
        leaves: why it leaves, from now on; "": it does not.
        trained: round and attempt of its trainings.
    """

    site: Site
    fails: Callable[[int, int], None] = lambda round, attempt: None
    leaves: str = ""
    trained: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.service = SiteService(self.site)

    def restart(self) -> None:
        """Lose all that a worker has in memory, and start another one."""
        with LOCK:
            self.service = SiteService(self.site)
            self.service.restore()

    def answer(self, data: bytes) -> bytes:
        """The answer to a message.

        Raises:
            SiteError: it is refused, or the training fails.
        """
        header = decode(data).header
        if self.leaves and header.kind != LEAVE:
            return encode(leave_message(header, Leave(self.leaves)))
        if header.kind == TRAIN:
            self.fails(header.round, header.attempt)
        with LOCK:
            torch.set_num_threads(1)
            answer = self.service.handle(data)
        if header.kind == TRAIN:
            self.trained.append((header.round, header.attempt))
        return answer


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
        try:
            return site.answer(data)
        except SiteError as error:
            return error
        except Exception as error:
            return SiteError("failed", f"{type(error).__name__}: {error}")

    def cancel(self, names: Sequence[str]) -> None:
        self.sent += [(name, "cancel") for name in names]

    def status(self, name: str) -> Mapping[str, Any]:
        return {}

    def close(self) -> None:
        pass


NAMES = ("alpha", "beta", "delta", "gamma")
"""What the sites of tests are called, in the order of client numbers."""

_AT_SITE = ("label_column_name", "text_column_names", "label_names")


def site_files_of(keys: Keys, directory: Path, count: int = 3) -> dict[str, Path]:
    """The file of a site for each of the first files that a run's `train_file` matches."""
    pattern = Path(str(keys["train_file"]))
    files = sorted(pattern.parent.glob(pattern.name))[:count]
    own = {key: x for key, x in keys.items() if key in _AT_SITE}
    own["port"] = 1  # nobody listens; the path of a socket would be too long here
    model = Path(keys["model_name_or_path"])
    return {
        name: site_file(directory / name, model, str(file), name, **own)
        for name, file in zip(NAMES, files, strict=False)
    }


def sites_of(keys: Keys, directory: Path, count: int = 3) -> dict[str, SiteInMemory]:
    """The sites of such files."""
    files = site_files_of(keys, directory, count)
    return {name: SiteInMemory(read_site(path)) for name, path in files.items()}


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
