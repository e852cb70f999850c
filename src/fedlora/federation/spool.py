"""Keeps updates that have to wait for their turn on the disk.

Updates are folded in client order. One that comes before those of lower clients waits; with a
directory to spool to, its tensors wait there, and the server's memory does not grow with their
number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlora.errors import FedloraError
from fedlora.federation.messages import ClientUpdate
from fedlora.lowrank import LowRank

_ALIGNED = 64  # bytes


def settled(update: ClientUpdate) -> ClientUpdate:
    """The update with every tensor laid out as if it were new.

    The last bits of a result depend on strides and alignment; an update that went through the disk
    must count like one that did not.
    """
    return replace(
        update,
        adapter={n: LowRank(_as_new(x.A), _as_new(x.B)) for n, x in update.adapter.items()},
        dense={n: _as_new(t) for n, t in update.dense.items()},
    )


def _as_new(t: Tensor) -> Tensor:
    plain = torch.empty(t.shape, device="meta").stride()
    if t.stride() == plain and t.data_ptr() % _ALIGNED == 0:
        return t
    return torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t)


class Waiting:
    """One round's updates that are not folded yet.

    Args:
        spool: a directory for all but the one whose turn is next, a file each; it is made when it
            is first needed. None: all wait in memory.
    """

    def __init__(self, spool: Path | None) -> None:
        self.spool = spool
        self._held: dict[int, Callable[[], ClientUpdate]] = {}

    def put(self, update: ClientUpdate, is_next: bool) -> None:
        """Hold an update.

        Raises:
            OSError: the directory cannot be made.
            FedloraError: the file cannot be written.
        """
        if self.spool is None or is_next:
            kept = settled(update)
            self._held[update.client] = lambda: kept
        else:
            self.spool.mkdir(parents=True, exist_ok=True)
            self._held[update.client] = _written(update, _path(self.spool, update.client))

    def __contains__(self, client: int) -> bool:
        return client in self._held

    def take(self, client: int) -> ClientUpdate:
        """Let go of an update; what was written of it is removed."""
        return settled(self._held.pop(client)())

    def clear(self) -> None:
        """Let go of all; nothing is left on the disk, of a run that was killed neither."""
        self._held = {}
        if self.spool is not None and self.spool.is_dir():
            for path in self.spool.glob(_path(self.spool, "*").name):
                path.unlink(missing_ok=True)


def _path(directory: Path, client: int | str) -> Path:
    return directory / f"client-{client}.safetensors"


def _written(update: ClientUpdate, path: Path) -> Callable[[], ClientUpdate]:
    """Write an update's tensors; what else it says stays in memory. Reading removes the file."""
    tensors = {f"A/{n}": x.A for n, x in update.adapter.items()}
    tensors |= {f"B/{n}": x.B for n, x in update.adapter.items()}
    tensors |= {f"dense/{n}": t for n, t in update.dense.items()}
    devices = {key: t.device for key, t in tensors.items()}
    names, dense = list(update.adapter), list(update.dense)
    rest = replace(update, adapter={}, dense={})
    try:  # copies, because tensors that share memory are refused
        save_file({k: _as_new(t.clone()) for k, t in tensors.items()}, path)
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        raise FedloraError(f"{path}: cannot be written: {error}") from None

    def read() -> ClientUpdate:
        found = {key: t.to(devices[key]) for key, t in load_file(path).items()}
        path.unlink()
        adapter = {n: LowRank(found[f"A/{n}"], found[f"B/{n}"]) for n in names}
        return replace(rest, adapter=adapter, dense={n: found[f"dense/{n}"] for n in dense})

    return read
