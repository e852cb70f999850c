"""Brings updates that arrive in any order into client order, and keeps early ones on the disk.

Updates are folded in client order, so that the order of arrival changes no bit. One that comes
before those of lower clients has to wait. With a directory to spool to its tensors wait there, and
the server's memory does not grow with their number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from fedlora.federation.codec import as_new, pack_file, unpack_file
from fedlora.federation.messages import ClientUpdate, adapter_of
from fedlora.lowrank import LowRank


def canonical_layout(update: ClientUpdate) -> ClientUpdate:
    """The update with every tensor laid out as one that went through the disk: see `as_new`."""
    return replace(
        update,
        adapter={n: LowRank(as_new(x.A), as_new(x.B)) for n, x in update.adapter.items()},
        dense={n: as_new(t) for n, t in update.dense.items()},
    )


class ReorderBuffer:
    """One round's updates that wait for those of lower clients.

    Args:
        spool: a directory for all but the one whose turn is next, a file each; it is made when it
            is first needed. None: all wait in memory.
    """

    def __init__(self, spool: Path | None = None) -> None:
        self.spool = spool
        self._waiting: dict[int, Callable[[], ClientUpdate]] = {}
        self._skipped: set[int] = set()
        self._queue: deque[int] = deque()  # the clients that were not handed on yet, ascending

    def open(self, clients: Iterable[int] = ()) -> None:
        """Expect these clients, and let go of all that is held.

        Nothing is left on the disk, not even of a run that was killed.
        """
        self._waiting, self._skipped, self._queue = {}, set(), deque(sorted(clients))
        if self.spool is not None and self.spool.is_dir():
            for path in self.spool.glob(_path(self.spool, "*").name):
                path.unlink(missing_ok=True)

    def put(self, update: ClientUpdate) -> None:
        """Hold the update of a client that is expected.

        Raises:
            OSError: the directory cannot be made.
            FedloraError: the file cannot be written.
        """
        client = update.client
        if self.spool is None or client == self._queue[0]:
            held = canonical_layout(update)
            self._waiting[client] = lambda: held
        else:
            self.spool.mkdir(parents=True, exist_ok=True)
            self._waiting[client] = _written(update, _path(self.spool, client))

    def skip(self, client: int) -> None:
        """Wait for this client no longer, and let go of what it has sent."""
        self._skipped.add(client)
        if self._waiting.pop(client, None) and self.spool is not None:
            _path(self.spool, client).unlink(missing_ok=True)

    def __contains__(self, client: int) -> bool:
        """Whether an update of this client is held."""
        return client in self._waiting

    def ready(self) -> Iterator[ClientUpdate]:
        """Hand on, in client order, the updates that wait for nobody."""
        while self._queue and (self._queue[0] in self._waiting or self._queue[0] in self._skipped):
            client = self._queue.popleft()
            if client in self._waiting:
                yield self._waiting.pop(client)()

    def rest(self) -> Iterator[ClientUpdate]:
        """Hand on, in client order, all updates that are held: nobody is waited for any more."""
        for client in self._queue:
            if client not in self._waiting:
                self._skipped.add(client)
        return self.ready()


def _path(directory: Path, client: int | str) -> Path:
    return directory / f"client-{client}.safetensors"


def _written(update: ClientUpdate, path: Path) -> Callable[[], ClientUpdate]:
    """Write an update's tensors; what else it says stays in memory. Reading removes the file."""
    pack_file(path, update.tensors, {"client": update.client, "round": update.round})
    devices = {key: value.device for key, value in update.tensors.items()}
    shapes = {name: x.shape for name, x in update.adapter.items()}
    dense = list(update.dense)
    without_tensors = replace(update, adapter={}, dense={})

    def read() -> ClientUpdate:
        packet = unpack_file(path)
        path.unlink()
        tensors = {key: value.to(devices[key]) for key, value in packet.tensors.items()}
        return replace(
            without_tensors,
            adapter=adapter_of(tensors, shapes),
            dense={name: tensors[f"dense/{name}"] for name in dense},
        )

    return read
