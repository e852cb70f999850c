"""The base model: loaded once, frozen, and wrapped so that adapters come and go.

Every target module is wrapped in an `AdapterLayer` once. A client's turn loads what lies frozen
beside its adapter and the adapter itself into the layers; the base weights are never written to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.adapters import Targets, fold, is_conv1d, unfold
from fedlora.lowrank import Adapter, Delta, Deltas, LowRank, add, to_dense


class AdapterLayer(nn.Module):
    """`y = W_0 x + frozen x + s B A dropout(x)` over a linear layer or a Conv1D.

    The frozen side is added to a copy of a float32 weight, always from the pristine base, so that
    nothing drifts. Beside a weight of lower precision, where adding would round small updates
    away, it is computed as a branch of its own.

    Args:
        base: the layer to wrap; its weight is left as it is.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.conv1d = is_conv1d(base)
        self.A: nn.Parameter | None = None  # (r, n)
        self.B: nn.Parameter | None = None  # (m, r)
        self.scale = 1.0
        self.dropout = 0.0
        self.start: tuple[Tensor, Tensor] | None = None  # B at the start, with and without scale
        self.merged: Tensor | None = None  # (m, n), or (n, m) for Conv1D
        self.branch: Delta | None = None

    @property
    def weight(self) -> Tensor:
        """The pristine base weight; some architectures ask a layer for its dtype this way."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias; some architectures (Mamba) read it."""
        return cast("Tensor | None", self.base.bias)

    def load(
        self,
        frozen: Sequence[Delta],
        adapter: LowRank | None,
        scale: float,
        dropout: float,
        trains: str = "AB",
    ) -> None:
        """Take a client's frozen updates and its adapter (None: nothing), of which `trains`."""
        weight = self.weight
        self.merged = self.branch = self.A = self.B = self.start = None
        self.scale, self.dropout = scale, dropout
        if frozen:
            device = weight.device
            total = add([_move(x, device) for x in frozen])
            if weight.dtype in (torch.float32, torch.float64):
                dense = to_dense(total).to(weight.dtype)
                self.merged = weight.detach() + (dense.T if self.conv1d else dense)
            else:
                self.branch = total
        if adapter is not None:
            a, b = unfold(adapter, scale)
            self.start = adapter.B, b.clone()
            self.A = nn.Parameter(a.to(weight.device), requires_grad="A" in trains)
            self.B = nn.Parameter(b.to(weight.device), requires_grad="B" in trains)

    def tail(self, share: float) -> Tensor | None:
        """`||s B[:, t:]||_F ||A[t:]||_F` with `t = share * r`, rounded down, for HetLoRA."""
        if self.A is None or self.B is None:
            return None
        begin = int(share * self.A.shape[0])
        size: Tensor = self.scale * self.B[:, begin:].norm() * self.A[begin:].norm()
        return size

    def forward(self, x: Tensor) -> Tensor:
        """`x (..., n)` -> `(..., m)`."""
        if self.merged is None:
            y = cast(Tensor, self.base(x))
        elif self.conv1d:
            y = torch.addmm(
                cast(Tensor, self.base.bias), x.reshape(-1, x.shape[-1]), self.merged
            ).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.merged, cast("Tensor | None", self.base.bias))
        if isinstance(self.branch, LowRank):
            side = F.linear(F.linear(x.float(), self.branch.A), self.branch.B)
            y = y + side.to(y.dtype)
        elif self.branch is not None:
            y = y + F.linear(x.float(), self.branch.W).to(y.dtype)
        if self.A is not None and self.B is not None:
            into = F.dropout(x, self.dropout, self.training) if self.dropout else x
            low = F.linear(into.to(self.A.dtype), self.A)  # (..., r)
            if y.dtype == self.B.dtype:
                flat = low.reshape(-1, low.shape[-1])
                y = torch.addmm(y.reshape(-1, y.shape[-1]), flat, self.B.T, alpha=self.scale).view(
                    y.shape
                )
            else:
                y = y + (self.scale * F.linear(low, self.B)).to(y.dtype)
        return y


def _move(x: Delta, device: torch.device) -> Delta:
    if isinstance(x, LowRank):
        return LowRank(x.A.to(device), x.B.to(device))
    return type(x)(x.W.to(device))


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
    """

    model: Any
    tokenizer: Any
    targets: Targets
    layers: Mapping[str, AdapterLayer]
    fingerprint: str
    dense: Mapping[str, nn.Parameter] = field(default_factory=dict)

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
        """Set all layers: `W_0 + sum frozen`, and what is trained on top.

        Args:
            frozen: what lies beside the base and is not trained.
            adapter: what is trained; a module it does not name has nothing to train.
            scale: of the adapter.
            dropout: before the adapter.
            dense: values of the parameters trained whole; None leaves them as they are.
            trains: the factors that are trained, "AB", "A" or "B"; the others keep their values.
        """
        for name, layer in self.layers.items():
            parts = [deltas[name] for deltas in frozen if name in deltas]
            layer.load(parts, (adapter or {}).get(name), scale, dropout, trains)
        with torch.no_grad():
            for name, value in (dense or {}).items():
                self.dense[name].copy_(value)

    def read_adapter(self) -> dict[str, LowRank]:
        """The adapter as it now is, scale folded, in float32, on the CPU.

        `B` is its start plus the scaled change, so that what was not trained comes back to the bit:
        dividing by a scale and multiplying again would count as learning.

        Raises:
            ValueError: no adapter is loaded.
        """
        out = {}
        for name, layer in self.layers.items():
            if layer.A is None or layer.B is None or layer.start is None:
                continue
            folded, plain = layer.start
            learnt = fold(layer.A.cpu(), layer.B.cpu() - plain, layer.scale)
            out[name] = LowRank(learnt.A, folded + learnt.B)
        if not out:
            raise ValueError("the model holds no adapter")
        return out

    def read_dense(self) -> dict[str, Tensor]:
        """The parameters trained whole as they now are. Copies, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.dense.items()}


def attach(model: Any, tokenizer: Any, targets: Targets) -> BaseModel:
    """Freeze a model, wrap its target modules, and make what is trained whole float32.

    The model is changed in place.
    """
    model.requires_grad_(False)
    dense = {}
    for name in targets.modules_to_save:
        module = model.get_submodule(name)
        _make_float32(module, keep_output="." not in name)
        for end, parameter in module.named_parameters(name):
            dense[end] = parameter.requires_grad_(True)
    fingerprint = weights_fingerprint(model, skip=dense)
    layers = {}
    for name in targets.shapes:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent) if parent else model
        layers[name] = AdapterLayer(getattr(owner, child))
        setattr(owner, child, layers[name])
    return BaseModel(model, tokenizer, targets, layers, fingerprint, dense)


def _make_float32(module: nn.Module, keep_output: bool) -> None:
    """Train a module of a half-precision base in float32: small steps would be rounded away.

    Args:
        module: changed in place.
        keep_output: it is a head, whose output nothing but the loss reads.
    """
    kind = next(module.parameters()).dtype
    if kind in (torch.float32, torch.float64):
        return

    def wide(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
        )

    module.float()
    module.register_forward_pre_hook(wide)
    if not keep_output:
        module.register_forward_hook(lambda _, inputs, out: out.to(kind))


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
