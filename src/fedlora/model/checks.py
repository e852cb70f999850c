"""Checks once for each run that a known update acts on its model as PEFT's merge does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.errors import InputError
from fedlora.lowrank import LowRank, to_dense
from fedlora.model.base import BaseModel
from fedlora.model.layers import short_pass, undisturbed
from fedlora.model.lora_layer import AdapterLayer, ClientAdapter

_TEXTS = 3
_LARGEST = {torch.float32: 1e-2, torch.float64: 1e-2}
_HALF = 0.25


def check_updates(base: BaseModel) -> None:
    """Change one layer of every kind, once in its weight and once by an update beside it.

    With `z` the logits of a short text, `z'` those with `W + dW` in the place of the weights (the
    formula `y + x dW^T` for a layer that is no plain `W x + b`, where PEFT's layer says the same),
    and `z''` those with `dW` frozen beside the layers, or trained in them:

        ||z'' - z'|| <= e ||z' - z||        e = 0.01, in half precision 0.25

    A layer has to fail on all of a few texts: in half precision one may send a token to another
    expert. The weights are put back to the bit. A model that does not run on token ids alone, or
    whose logits the update hardly moves, is not judged.

    Raises:
        InputError: which module's updates act otherwise, so that what is trained would not be what
            is saved.
    """
    kinds: dict[tuple[str, str], str] = {}
    for name, layer in base.layers.items():
        kinds.setdefault((type(layer.base).__name__, name.rpartition(".")[2]), name)
    names = list(kinds.values())
    try:
        if not _wrong(base, names, 0):
            return
    except _FailsError as error:
        raise InputError(
            f"lora_target_modules: {error.name} runs without an adapter and fails with one, so it "
            f"can carry none ({error}); name other modules"
        ) from None
    for name in names:
        if all(_wrong(base, [name], text) for text in range(_TEXTS)):
            raise InputError(
                f"lora_target_modules: an update of {name} does not move the model's output as a "
                "change of its weight does, so what is trained would not be what is saved; name "
                "other modules"
            )


class _FailsError(Exception):
    """A pass that works without an adapter does not with one; `name` was the last layer in it."""

    def __init__(self, name: str, why: Exception) -> None:
        super().__init__(" ".join(str(why).split())[:200] or type(why).__name__)
        self.name = name


def _wrong(base: BaseModel, names: list[str], text: int) -> bool:
    """Whether updates of these layers act otherwise than changed weights."""
    updates = {name: _update(base.targets.shapes[name], i) for i, name in enumerate(names)}
    try:
        plain = _logits(base, text)
        with _changed(base, updates):
            wanted = _logits(base, text)
    except Exception:  # it does not run on token ids alone
        return False
    bound = _bound(base)
    moved = float((wanted - plain).norm())
    if not moved > bound * float(plain.norm()) / 2:  # nor where it is NaN
        return False
    client_adapter = ClientAdapter(updates, full_params=base.read_full_params())
    for frozen, client_adapters in (([updates], []), ([], [client_adapter])):
        base.load_clients(frozen, client_adapters)
        try:
            with _last_layer(base) as last:
                logits = _logits(base, text)
        except Exception as error:
            raise _FailsError(last[-1] if last else names[0], error) from None
        finally:
            base.load_clients([], [])
        if not float((logits - wanted).norm()) <= bound * moved:
            return True
    return False


def _bound(base: BaseModel) -> float:
    """The largest relative error: one part in half precision (a module trained whole is float32 in
    a half-precision base) makes all of it that coarse."""
    kinds = {p.dtype for p in base.model.parameters() if p.is_floating_point()}
    return max((_LARGEST.get(kind, _HALF) for kind in kinds), default=_HALF)


def _logits(base: BaseModel, text: int) -> Tensor:
    with undisturbed(base.model, training=False):
        return short_pass(base.model, text)


def _update(shape: tuple[int, int], number: int) -> LowRank:
    """A random update of rank 2 as large as a usual weight: `||dW x|| ~ ||x|| sqrt(m / n)`."""
    m, n = shape
    source = torch.Generator().manual_seed(number)
    a = torch.randn(2, n, generator=source) / n**0.5
    return LowRank(a, torch.randn(m, 2, generator=source))


@contextmanager
def _changed(base: BaseModel, updates: Mapping[str, LowRank]) -> Iterator[None]:
    """These layers with other weights for a while."""
    with ExitStack() as stack:
        for name, update in updates.items():
            stack.enter_context(_other_weight(base.layers[name], update))
        yield


@contextmanager
def _other_weight(layer: AdapterLayer, update: LowRank) -> Iterator[None]:
    module: Any = layer.base
    dense = to_dense(update).to(layer.weight.device)  # (m, n)
    if layer.plain:
        own = module._parameters["weight"]
        change = dense.T if layer.conv1d else dense
        # Another parameter, not other values: a tensor that is used elsewhere too stays there.
        module._parameters["weight"] = nn.Parameter((own + change).to(own.dtype), False)
        try:
            yield
        finally:
            module._parameters["weight"] = own
        return

    def beside(_: nn.Module, given: tuple[Any, ...], y: Tensor) -> Tensor:
        out: Tensor = y + (given[0].float() @ dense.T.float()).to(y.dtype)
        return out

    handle = module.register_forward_hook(beside)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _last_layer(base: BaseModel) -> Iterator[list[str]]:
    """The name of the layer that is running."""
    last: list[str] = []
    handles = []
    for name, layer in base.layers.items():

        def note(*_: Any, name: str = name) -> None:
            last[:] = [name]

        handles.append(layer.register_forward_pre_hook(note))
    try:
        yield last
    finally:
        for handle in handles:
            handle.remove()
