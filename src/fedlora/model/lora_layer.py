"""Adds adapters to a linear layer: one for each client of a pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.lowrank import Adapter, Delta, LowRank, add, fold, to_dense, unfold
from fedlora.model.client_rows import ClientRows, RowLayout
from fedlora.model.layers import is_conv1d, is_plain, shape_of
from fedlora.model.lora_linear import Term, adapted
from fedlora.model.lora_product import LinearCall
from fedlora.model.quantised_linear import QuantisedLinear
from fedlora.model.shared_memory import shared_like


@dataclass(frozen=True)
class ClientAdapter:
    """What one client brings into the model.

    Args:
        adapter: what it trains; a module it does not name has nothing to train.
        private: what is frozen and its own, as factors.
        scale: LoRA's scale of the adapter.
        dropout: before the adapter.
        trains: the factors that are trained, "AB", "A" or "B"; the others keep their values.
        full_params: its values of the parameters trained whole.
    """

    adapter: Adapter
    private: Adapter = field(default_factory=dict)
    scale: float = 1.0
    dropout: float = 0.0
    trains: str = "AB"
    full_params: Mapping[str, Tensor] = field(default_factory=dict)


class ClientTerm(nn.Module):
    """One client's part of a layer: `s B A dropout(x) + B_0 A_0 x`, the second part frozen.

    Args:
        adapter: what is trained, or None.
        private: `B_0 A_0`, or None.
        client_adapter: its scale, dropout and what it trains.
        weight: of the layer, for device and dtype.
    """

    def __init__(
        self,
        adapter: LowRank | None,
        private: LowRank | None,
        client_adapter: ClientAdapter,
        weight: Tensor,
    ) -> None:
        super().__init__()
        self.scale, self.dropout = client_adapter.scale, client_adapter.dropout
        self.A: nn.Parameter | None = None  # (r, n)
        self.B: nn.Parameter | None = None  # (m, r)
        self.start: tuple[Tensor, Tensor] | None = None  # B at the start, with and without scale
        self.private = None if private is None else _like(private, weight)
        if adapter is not None:
            a, b = unfold(adapter, client_adapter.scale)
            self.start = adapter.B, b.clone()
            self.A = nn.Parameter(a.to(weight.device), requires_grad="A" in client_adapter.trains)
            self.B = nn.Parameter(b.to(weight.device), requires_grad="B" in client_adapter.trains)

    def tail(self, share: float) -> Tensor | None:
        """`||s B[:, t:]||_F ||A[t:]||_F` with `t = share * r`, rounded down, for HetLoRA."""
        if self.A is None or self.B is None:
            return None
        begin = int(share * self.A.shape[0])
        size: Tensor = self.scale * self.B[:, begin:].norm() * self.A[begin:].norm()
        return size

    def read(self) -> LowRank | None:
        """The adapter as it now is: see `BaseModel.read_adapter`."""
        if self.A is None or self.B is None or self.start is None:
            return None
        folded, plain = self.start
        learnt = fold(self.A.cpu(), self.B.cpu() - plain, self.scale)
        return LowRank(learnt.A, folded + learnt.B)


class AdapterLayer(nn.Module):
    """`y = W_0 x + frozen x + s_k B_k A_k dropout(x)` over a linear layer or a Conv1D.

    The rows of x that belong to client k go through that client's adapter alone. Where the base's
    weight is float32, frozen updates are added to a copy of it, always from the pristine base, so
    that rounding does not accumulate. They are a separate branch beside a weight of lower
    precision, where adding would round small updates away, and beside a layer that is not simply
    `W_0 x + b` (`layers.is_plain`).

    Args:
        base: the layer to wrap; its weight is left as it is.
        client_rows: which rows of a pass belong to which client; one for all layers of a model.
        site: the layer's number among those that draw dropout.

    Attributes:
        clients: the term of each client of the pass, slot by slot.
        frozen: the updates that lie frozen beside the base.
        merged: the weight with them, or None.
        branch: their sum, where they are not merged, or None.
        place: memory that forked processes share, for a weight that one of them has merged.
        layouts: where clients' rows lie in the input, by the input's number of axes.
    """

    def __init__(
        self, base: nn.Module, client_rows: ClientRows | None = None, site: int = 0
    ) -> None:
        super().__init__()
        self.base = base
        self.client_rows = client_rows or ClientRows()
        self.site = site
        self.conv1d, self.plain = is_conv1d(base), is_plain(base)
        self.clients = nn.ModuleList()
        self.frozen: tuple[Delta, ...] = ()
        self.merged: Tensor | None = None  # (m, n), or (n, m) for Conv1D
        self.branch: Delta | None = None
        self.place: Tensor | None = None
        self.layouts: dict[int, RowLayout] = {}  # of its inputs, by their number of axes

    @property
    def weight(self) -> Tensor:
        """The pristine base weight; some architectures ask a layer for its dtype this way."""
        return cast(Tensor, self.base.weight)

    @property
    def like(self) -> Tensor:
        """A tensor on the device and in the dtype of the base weight; not computed for it."""
        return self.base.like if isinstance(self.base, QuantisedLinear) else self.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias; some architectures (Mamba) read it."""
        return cast("Tensor | None", self.base.bias)

    @property
    def in_features(self) -> int:
        """n."""
        return shape_of(self.base)[1]

    @property
    def out_features(self) -> int:
        """m."""
        return shape_of(self.base)[0]

    @property
    def A(self) -> nn.Parameter | None:
        """`(r, n)` of the only client, if it trains this module."""
        return cast(ClientTerm, self.clients[0]).A if len(self.clients) == 1 else None

    @property
    def B(self) -> nn.Parameter | None:
        """`(m, r)` of the only client, if it trains this module."""
        return cast(ClientTerm, self.clients[0]).B if len(self.clients) == 1 else None

    def freeze(self, parts: Sequence[Delta]) -> None:
        """Set the frozen updates that all clients share; does nothing if they are set already."""
        if len(parts) == len(self.frozen) and all(
            new is old for new, old in zip(parts, self.frozen, strict=True)
        ):
            return
        self.merged = self.branch = None
        self.frozen = tuple(parts)
        if not parts:
            return
        if self.merges:
            self.merged = torch.empty_like(self.weight)
            self._merge(parts, self.merged)
        else:
            self.branch = _like(self._sum(parts), self.like)

    @property
    def merges(self) -> bool:
        """Whether frozen updates are added to the weight: see the class."""
        return self.plain and self.weight.dtype in (torch.float32, torch.float64)

    def _sum(self, parts: Sequence[Delta]) -> Delta:
        return add([_move(x, self.like.device) for x in parts])

    def _merge(self, parts: Sequence[Delta], out: Tensor) -> None:
        """Write the weight with these updates."""
        dense = to_dense(self._sum(parts)).to(out.dtype)
        torch.add(self.weight.detach(), dense.T if self.conv1d else dense, out=out)

    def share(self) -> None:
        """Make a place for a merged weight that processes forked from now on see."""
        if self.merges and self.weight.device.type == "cpu":
            self.place = shared_like(self.weight)

    def merge_for_others(self, parts: Sequence[Delta]) -> None:
        """Write the weight with these updates where other processes find it."""
        if self.place is not None and parts:
            self._merge(parts, self.place)

    def adopt(self, parts: Sequence[Delta]) -> None:
        """As `freeze`, where another process has merged these updates already."""
        if self.place is None or not parts:
            self.freeze(parts)
            return
        self.frozen, self.merged, self.branch = tuple(parts), self.place, None

    def load_clients(self, name: str, client_adapters: Sequence[ClientAdapter]) -> None:
        """Load the adapters of these clients, of which this module is `name`."""
        self.clients = nn.ModuleList(
            ClientTerm(own.adapter.get(name), own.private.get(name), own, self.like)
            for own in client_adapters
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
        """`x (..., n)` -> `(..., m)`; further arguments go to the wrapped layer.

        It is left out of compiled graphs, because rows belong to other clients in every step and
        each step would compile a graph of its own.
        """
        y = None if self.plain else cast(Tensor, self.base(x, *given, **named))
        layout = self.layouts.get(x.ndim)
        count = self.client_rows.count(layout.unit) if layout is not None else 0
        if layout is None or not count or layout.in_order(x):
            return self._in_order(x, y, layout)
        y = None if y is None else layout.rows_first(y, count)
        return layout.undo_rows_first(self._in_order(layout.rows_first(x, count), y, layout))

    def _in_order(self, x: Tensor, y: Tensor | None, layout: RowLayout | None) -> Tensor:
        """`x (..., n)` -> `(..., m)`, with the clients' rows one after the other.

        Args:
            x: the input.
            y: the wrapped layer's own output, where it is not plain; else None.
            layout: where rows lie in the input.
        """
        terms = self._terms(x, layout)
        if y is not None:
            if not terms and self.branch is None:
                return y
            # The layer may compute in another dtype than its input or its weights have.
            self.branch = _in_dtype(self.branch, y.dtype)
            terms = [replace(t, private=_in_dtype(t.private, y.dtype)) for t in terms]
            return adapted(x.to(y.dtype), y, None, None, self.branch, terms)
        weight = self.merged if self.merged is not None else self.weight
        if not terms and self.branch is None and self.merged is None:
            return cast(Tensor, self.base(x))
        flat = weight.T if self.conv1d else weight  # (m, n)
        if not terms and self.branch is None:
            return F.linear(x, flat, self.bias)
        return adapted(x, None, flat, self.bias, self.branch, terms)

    def call_of(self, x: Tensor) -> LinearCall:
        """The layer as `lora_product` computes it, on as many rows as x has.

        Args:
            x: `(1, rows, any width)`, the rows in their order; only its shape is read.
        """
        rows = x[..., :1].expand(*x.shape[:-1], self.in_features)
        weight = self.merged if self.merged is not None else self.weight
        terms = self._terms(rows, self.layouts.get(x.ndim))
        return LinearCall(weight, self.bias, self.branch, terms)

    def _terms(self, x: Tensor, layout: RowLayout | None) -> list[Term]:
        """The clients' terms, each with the rows of `x` that it acts on."""
        if not len(self.clients) or self.client_rows.base_only:
            return []
        rows = x.numel() // x.shape[-1]
        spans = self.client_rows.spans(rows, len(self.clients), layout)
        each = rows // count if layout and (count := self.client_rows.count(layout.unit)) else 1
        out = []
        for span in spans:
            client = cast(ClientTerm, self.clients[span.client])
            if client.A is None and client.private is None:
                continue
            keep = None
            if client.A is not None and client.dropout and self.training:
                shape = (span.end - span.begin, x.shape[-1])
                drawn = shape, client.dropout, x.device, span.first, each
                keep = self.client_rows.keep(span.client, self.site, *drawn)
            out.append(
                Term(
                    span.begin,
                    span.end,
                    client.A,
                    client.B,
                    client.scale,
                    client.private,
                    keep,
                    client.dropout,
                )
            )
        return out


def _move(x: Delta, device: torch.device) -> Delta:
    if isinstance(x, LowRank):
        return LowRank(x.A.to(device), x.B.to(device))
    return type(x)(x.W.to(device))


def _in_dtype(x: Any, dtype: torch.dtype) -> Any:
    """An update, or none, in this dtype."""
    if isinstance(x, LowRank):
        return x if x.A.dtype == dtype else LowRank(x.A.to(dtype), x.B.to(dtype))
    return x if x is None or x.W.dtype == dtype else type(x)(x.W.to(dtype))


def _like(x: Any, weight: Tensor) -> Any:
    """An update on the device and in the dtype of a layer's weight (quantised: float32)."""
    unquantised = weight.is_floating_point() and weight.element_size() > 1
    dtype = weight.dtype if unquantised else torch.float32
    if isinstance(x, LowRank):
        return LowRank(x.A.to(weight.device, dtype), x.B.to(weight.device, dtype))
    return type(x)(x.W.to(weight.device, dtype))
