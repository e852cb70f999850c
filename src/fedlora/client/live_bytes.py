"""Counts the bytes of all tensors that are alive at once, also of tensors without any memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows every tensor that operations make until it is freed.

    Within `with LiveBytes(known) as live`, `live.peak` is the most that was alive at once. Tensors
    of the meta device are counted as if they had memory, so that a pass of a model of shapes alone
    tells what the pass of the real one takes. A question about such a tensor's values is answered
    with no, or zero.

    Args:
        known: tensors that were there before and are not counted.
        device_type: of the tensors that are counted.

    Attributes:
        now: bytes alive.
        peak: the most that `now` has been.
    """

    def __init__(self, known: Iterable[Tensor] = (), device_type: str = "meta") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.now = self.peak = 0
        self._seen = weakref.WeakSet[Any](x.untyped_storage() for x in known)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation, and count what it makes."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False if args[0].dtype == torch.bool else 0
        if func is torch.ops.aten.equal.default and args[0].is_meta:
            return False
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.device.type == self.device_type:
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size
