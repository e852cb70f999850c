"""Holds the frozen base model, loaded once and wrapped so that adapters can come and go.

Every target module is wrapped in an `AdapterLayer` once. What lies frozen beside the adapters and
the adapters of one client, or of several that train in one pass, are loaded into the layers; the
base weights are never written to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.adapters import Targets, fold, unfold
from fedlora.full_modules import FullModule, make_float32
from fedlora.layers import is_conv1d, is_plain, put, shape_of
from fedlora.layout import Form, Layout
from fedlora.linear import Term, adapted
from fedlora.lowrank import Adapter, Delta, Deltas, LowRank, add, to_dense


@dataclass(frozen=True)
class Seat:
    """What one client brings into the model.

    Args:
        adapter: what it trains; a module it does not name has nothing to train.
        own: what is frozen and its own, as factors.
        scale: LoRA's scale of the adapter.
        dropout: before the adapter.
        trains: the factors that are trained, "AB", "A" or "B"; the others keep their values.
        dense: its values of the parameters trained whole.
    """

    adapter: Adapter
    own: Adapter = field(default_factory=dict)
    scale: float = 1.0
    dropout: float = 0.0
    trains: str = "AB"
    dense: Mapping[str, Tensor] = field(default_factory=dict)


class ClientTerm(nn.Module):
    """One client's part of a layer: `s B A dropout(x) + B_0 A_0 x`, the second part frozen.

    Args:
        adapter: what is trained, or None.
        own: `B_0 A_0`, or None.
        seat: its scale, dropout and what it trains.
        weight: of the layer, for device and dtype.
    """

    def __init__(
        self, adapter: LowRank | None, own: LowRank | None, seat: Seat, weight: Tensor
    ) -> None:
        super().__init__()
        self.scale, self.dropout = seat.scale, seat.dropout
        self.A: nn.Parameter | None = None  # (r, n)
        self.B: nn.Parameter | None = None  # (m, r)
        self.start: tuple[Tensor, Tensor] | None = None  # B at the start, with and without scale
        self.own = None if own is None else _like(own, weight)
        if adapter is not None:
            a, b = unfold(adapter, seat.scale)
            self.start = adapter.B, b.clone()
            self.A = nn.Parameter(a.to(weight.device), requires_grad="A" in seat.trains)
            self.B = nn.Parameter(b.to(weight.device), requires_grad="B" in seat.trains)

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

    The rows of x that belong to client k see its adapter alone. The frozen side is added to a copy
    of a float32 weight, always from the pristine base, so that nothing drifts. Beside a weight of
    lower precision, where adding would round small updates away, and beside a layer that is not
    plainly `W_0 x + b` (`layers.is_plain`), which computes its own part, it is a branch of its own.

    Args:
        base: the layer to wrap; its weight is left as it is.
        layout: whose rows are whose; one for all layers of a model.
        site: the layer's number among those that draw dropout.
    """

    def __init__(self, base: nn.Module, layout: Layout | None = None, site: int = 0) -> None:
        super().__init__()
        self.base = base
        self.layout = layout or Layout()
        self.site = site
        self.conv1d, self.plain = is_conv1d(base), is_plain(base)
        self.clients = nn.ModuleList()
        self.frozen: tuple[Delta, ...] = ()
        self.merged: Tensor | None = None  # (m, n), or (n, m) for Conv1D
        self.branch: Delta | None = None
        self.forms: dict[int, Form] = {}  # of its inputs, by their number of axes

    @property
    def weight(self) -> Tensor:
        """The pristine base weight; some architectures ask a layer for its dtype this way."""
        return cast(Tensor, self.base.weight)

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
        """Set what lies frozen beside the base for all clients; nothing is done twice."""
        if len(parts) == len(self.frozen) and all(
            new is old for new, old in zip(parts, self.frozen, strict=True)
        ):
            return
        weight = self.weight
        self.merged = self.branch = None
        self.frozen = tuple(parts)
        if not parts:
            return
        total = add([_move(x, weight.device) for x in parts])
        if self.plain and weight.dtype in (torch.float32, torch.float64):
            dense = to_dense(total).to(weight.dtype)
            self.merged = weight.detach() + (dense.T if self.conv1d else dense)
        else:
            self.branch = _like(total, weight)

    def seat(self, name: str, seats: Sequence[Seat]) -> None:
        """Take the adapters of these clients under this module's name."""
        self.clients = nn.ModuleList(
            ClientTerm(s.adapter.get(name), s.own.get(name), s, self.weight) for s in seats
        )

    def forward(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
        """`x (..., n)` -> `(..., m)`; what else a layer of its own kind is given goes to it."""
        y = None if self.plain else cast(Tensor, self.base(x, *given, **named))
        form = self.forms.get(x.ndim)
        number = self.layout.number(form.unit) if form is not None else 0
        if form is None or not number or form.in_order(x):
            return self._in_order(x, y, form)
        first = None if y is None else form.first(y, number)
        return form.back(self._in_order(form.first(x, number), first, form))

    def _in_order(self, x: Tensor, y: Tensor | None, form: Form | None) -> Tensor:
        """`x (..., n)` -> `(..., m)`, the clients' rows one after the other.

        Args:
            x: the input.
            y: what a layer that is not plain makes of it.
            form: where rows lie in the input.
        """
        terms = self._terms(x, form)
        if y is not None:
            if not terms and self.branch is None:
                return y
            # A layer may compute in another dtype than it is given, or than its weights have.
            self.branch = _in_dtype(self.branch, y.dtype)
            terms = [replace(t, own=_in_dtype(t.own, y.dtype)) for t in terms]
            return adapted(x.to(y.dtype), y, None, None, self.branch, terms)
        weight = self.merged if self.merged is not None else self.weight
        if not terms and self.branch is None and self.merged is None:
            return cast(Tensor, self.base(x))
        flat = weight.T if self.conv1d else weight  # (m, n)
        if not terms and self.branch is None:
            return F.linear(x, flat, self.bias)
        return adapted(x, None, flat, self.bias, self.branch, terms)

    def _terms(self, x: Tensor, form: Form | None) -> list[Term]:
        """The clients' terms with the rows of `x` they act on."""
        if not len(self.clients) or self.layout.bare:
            return []
        rows = x.numel() // x.shape[-1]
        spans = self.layout.spans(rows, len(self.clients), form)
        each = rows // number if form and (number := self.layout.number(form.unit)) else 1
        out = []
        for span in spans:
            client = cast(ClientTerm, self.clients[span.client])
            if client.A is None and client.own is None:
                continue
            keep = None
            if client.A is not None and client.dropout and self.training:
                shape = (span.end - span.begin, x.shape[-1])
                drawn = shape, client.dropout, x.device, span.first, each
                keep = self.layout.keep(span.client, self.site, *drawn)
            out.append(
                Term(
                    span.begin,
                    span.end,
                    client.A,
                    client.B,
                    client.scale,
                    client.own,
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
    whole = weight.is_floating_point() and weight.element_size() > 1
    dtype = weight.dtype if whole else torch.float32
    if isinstance(x, LowRank):
        return LowRank(x.A.to(weight.device, dtype), x.B.to(weight.device, dtype))
    return type(x)(x.W.to(weight.device, dtype))


@dataclass(frozen=True)
class BaseModel:
    """A frozen base with adapter layers in place.

    Args:
        model: the transformers model; only adapter factors require gradients.
        tokenizer: its tokenizer, with a padding token.
        targets: where the adapters go.
        layers: target module name -> its layer.
        fingerprint: of the base weights, to recognise another base on resume.
        dense: parameters trained whole (a classifier's head), by full name, in float32.
        heads: the modules that hold them, by full name.
        tied: one of these parameters is used in other modules too, so that there is but one of it.
    """

    model: Any
    tokenizer: Any
    targets: Targets
    layers: Mapping[str, AdapterLayer]
    fingerprint: str
    dense: Mapping[str, nn.Parameter] = field(default_factory=dict)
    heads: Mapping[str, FullModule] = field(default_factory=dict)
    tied: bool = False

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return cast(torch.device, next(self.model.parameters()).device)

    def load(
        self,
        frozen: Sequence[Deltas],
        adapter: Adapter | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
        dense: Mapping[str, Tensor] | None = None,
        trains: str = "AB",
    ) -> None:
        """Set all layers: `W_0 + sum frozen`, and what one client trains on top.

        Args:
            frozen: what lies beside the base and is not trained.
            adapter: what is trained; a module it does not name has nothing to train.
            scale: of the adapter.
            dropout: before the adapter.
            dense: values of the parameters trained whole; None leaves them as they are.
            trains: the factors that are trained, "AB", "A" or "B"; the others keep their values.
        """
        one = [] if adapter is None else [Seat(adapter, {}, scale, dropout, trains, dense or {})]
        self.seat(frozen, one)
        with torch.no_grad():
            for name, value in (dense or {}).items():
                self.dense[name].copy_(value)

    def seat(self, frozen: Sequence[Deltas], seats: Sequence[Seat]) -> None:
        """Set all layers for clients that train in one pass.

        Args:
            frozen: what lies beside the base for all of them.
            seats: what each of them brings; a single one trains the model's own dense parameters,
                several train copies.
        """
        for name, layer in self.layers.items():
            layer.freeze([deltas[name] for deltas in frozen if name in deltas])
            layer.seat(name, seats)
        for name, head in self.heads.items():
            head.seat(name, [s.dense for s in seats] if len(seats) > 1 else ())
        if len(seats) == 1:
            with torch.no_grad():
                for name, value in seats[0].dense.items():
                    self.dense[name].copy_(value)

    def terms_of(self, client: int) -> list[ClientTerm]:
        """The terms of the client in this seat, layer by layer."""
        return [cast(ClientTerm, layer.clients[client]) for layer in self.layers.values()]

    def parameters_of(self, client: int) -> list[tuple[str, nn.Parameter]]:
        """What the client in this seat trains, by name."""
        out = []
        for name, term in zip(self.layers, self.terms_of(client), strict=True):
            for factor in ("A", "B"):
                value = getattr(term, factor)
                if value is not None and value.requires_grad:
                    out.append((f"{name}.{factor}", value))
        return [*out, *self._dense_of(client).items()]

    def _dense_of(self, client: int) -> dict[str, nn.Parameter]:
        """The parameters trained whole of the client in this seat, by full name."""
        copies = {
            f"{name}.{end}": value
            for name, head in self.heads.items()
            if head.copies
            for end, value in head.copies[client].items()
        }
        return {**self.dense, **copies}

    def read_adapter(self, client: int = 0) -> dict[str, LowRank]:
        """The adapter in a seat as it now is, scale folded, in float32, on the CPU.

        `B` is its start plus the scaled change, so that what was not trained comes back to the bit:
        dividing by a scale and multiplying again would count as learning.

        Raises:
            ValueError: no adapter is loaded.
        """
        out = {}
        for name, layer in self.layers.items():
            if len(layer.clients) and (x := cast(ClientTerm, layer.clients[client]).read()):
                out[name] = x
        if not out:
            raise ValueError("the model holds no adapter")
        return out

    def read_dense(self, client: int = 0) -> dict[str, Tensor]:
        """The parameters trained whole in a seat as they now are. Copies, on the CPU."""
        return {n: value.detach().cpu().clone() for n, value in self._dense_of(client).items()}


def attach(model: Any, tokenizer: Any, targets: Targets) -> BaseModel:
    """Freeze a model, wrap its target modules, and make what is trained whole float32.

    The model is changed in place.
    """
    model.requires_grad_(False)
    dense, heads, layout = {}, {}, Layout()
    for name in targets.modules_to_save:
        module = model.get_submodule(name)
        make_float32(module, keep_output="." not in name)
        for end, parameter in module.named_parameters(name):
            dense[end] = parameter.requires_grad_(True)
        heads[name] = FullModule(module, layout)
    fingerprint = weights_fingerprint(model, skip=dense)
    layers = {}
    for site, name in enumerate(targets.shapes):
        layers[name] = AdapterLayer(model.get_submodule(name), layout, site)
        put(model, name, layers[name])
    places = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    tied = any(places.count(id(p)) > 1 for p in dense.values())
    return BaseModel(model, tokenizer, targets, layers, fingerprint, dense, heads, tied)


def weights_fingerprint(model: nn.Module, skip: Container[str] = ()) -> str:
    """A SHA-256 over names, shapes and at most 4,096 evenly spaced values of every parameter."""
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        if name in skip or value.is_meta:
            continue
        flat = value.detach().reshape(-1)
        step = max(1, flat.numel() // 4096)
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()
