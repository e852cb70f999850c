"""Finds out by running a model's layers which of them can carry an adapter.

An adapter is added to what a layer gives, `y + x A^T B^T`. That needs a layer that makes one
tensor `(..., m)` of one tensor `(..., n)`, and a model that uses the layer by calling it. Routers
that give several tensors, layers of groups, and weights that a model reads past their layer are
neither, and no list of names knows them all.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedlora.model.device import device_of
from fedlora.model.quantised_linear import QuantisedLinear
from fedlora.model.torch_generator import borrowed_generator

_USUAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D: a linear layer whose weight is stored `(n, m)`."""
    return _conv1d_class(module) is not None


def is_fan_in_fan_out(module: nn.Module) -> bool:
    """Whether the checkpoint stores this layer's weight as `(n, m)`, quantised here or not."""
    return is_conv1d(module) or bool(getattr(module, "fan_in_fan_out", False))


def _conv1d_class(module: nn.Module) -> type[Any] | None:
    for kind in type(module).__mro__:
        if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
            return kind
    return None


def shape_of(module: Any) -> tuple[int, int]:
    """`(m, n)` = (out features, in features) of a linear layer or a Conv1D.

    The weight says it, unless it is packed into other shapes (quantised).
    """
    if isinstance(module, QuantisedLinear):
        return module.out_features, module.in_features
    weight = module.weight
    if weight.ndim != 2 or weight.dtype not in _USUAL:
        return int(module.out_features), int(module.in_features)
    rows, columns = weight.shape
    return (int(columns), int(rows)) if is_conv1d(module) else (int(rows), int(columns))


def is_plain(module: nn.Module) -> bool:
    """Whether a layer is `x W^T + b` and nothing else, so that it may be computed in its place.

    Its `forward` has to be torch's (or transformers' for a Conv1D) and its weight a parameter as
    it is: subclasses with a `forward` of their own, hooks, parametrisations and quantised weights
    do something more.
    """
    kind = type(module)
    plain = _conv1d_class(module) or nn.Linear
    if not issubclass(kind, plain) or kind.forward is not plain.forward:
        return False
    if kind.__call__ is not nn.Module.__call__ or "forward" in vars(module):
        return False
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    weight = module._parameters.get("weight")
    return not any(hooks) and type(weight) is nn.Parameter and weight.dtype in _USUAL


def why_unfit(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The layers that cannot carry an adapter, and why not.

    Layers that are not plain are tried on a few rows. Those that take more than one tensor are
    watched in a pass of the whole model. A model with weights then shows whether it uses all
    layers by calling them (`why_bypassed`).

    Args:
        model: of transformers, without adapters.
        modules: full name -> linear layer or Conv1D.
    """
    out, unknown = {}, {}
    for name, module in modules.items():
        if is_plain(module):
            continue
        why = _tried(module)
        if why is None:
            unknown[name] = module
        elif why:
            out[name] = why
    if unknown:
        out.update(_watched(model, unknown))
    fit = {name: module for name, module in modules.items() if name not in out}
    return {**out, **why_bypassed(model, fit)}


def _tried(module: nn.Module) -> str | None:
    """Why a layer is unfit, nothing where it is fit, None where it takes no single tensor."""
    m, n = shape_of(module)
    weight = cast(Tensor, module.weight)
    dtypes = (weight.dtype,) if weight.dtype in _USUAL else (torch.float32, torch.bfloat16)
    with undisturbed(module, training=False):
        for dtype in dtypes:
            for rows in ((1, 3), (3,)):
                x = torch.ones(*rows, n, dtype=dtype, device=weight.device)
                try:
                    y = module(x)
                except Exception:  # whatever it takes, it is not this
                    continue
                return _judged(x, y, m)
    return None


def _judged(x: Any, y: Any, m: int) -> str:
    """Why `x -> y` is not that of a linear layer with m outputs; nothing where it is."""
    if not isinstance(x, Tensor):
        return "is not given one tensor"
    if not isinstance(y, Tensor):
        return f"gives a {type(y).__name__} instead of one tensor"
    if y.shape != (*x.shape[:-1], m):
        return f"makes {tuple(y.shape)} of {tuple(x.shape)}, where {m} outputs a row were expected"
    return ""


def _watched(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why layers are unfit by what they are given and give in a pass of the model."""
    out = dict.fromkeys(modules, "cannot be tried by itself, nor is it reached by a short text")
    handles = []
    for name, module in modules.items():

        def note(layer: nn.Module, given: Any, y: Any, name: str = name) -> None:
            out[name] = _judged(given[0] if given else None, y, shape_of(layer)[0])

        handles.append(module.register_forward_hook(note))
    try:
        with undisturbed(model, training=False):
            short_pass(model)
    except Exception:  # judged by what was seen until then
        pass
    finally:
        for handle in handles:
            handle.remove()
    return {name: why for name, why in out.items() if why}


class _Watch(nn.Module):
    """In the place of a layer: who reads its weight, or calls it behind this, is found out.

    Args:
        base: the layer.
        poison: what is read instead of its weight.
    """

    def __init__(self, base: nn.Module, poison: Tensor | None) -> None:
        super().__init__()
        self.base, self.poison, self.inside = base, poison, 0

    def __getattr__(self, name: str) -> Any:
        if name in ("base", "_modules"):
            return super().__getattr__(name)
        if name == "weight" and vars(self)["poison"] is not None:
            return vars(self)["poison"]
        return getattr(self.base, name)

    def forward(self, *given: Any, **named: Any) -> Any:
        self.inside += 1
        try:
            return self.base(*given, **named)
        finally:
            self.inside -= 1


def why_bypassed(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The layers that a model uses in another way than by calling them, and how.

    A pass of a short text, in evaluation and in training, with NaN to be read for every weight:
    an output that is finite has read none of them past its layer. Nothing can be found without
    weights, nor where the model does not run on token ids alone.

    Args:
        model: of transformers, without adapters.
        modules: full name -> layer.
    """
    if not modules or any(p.is_meta for p in model.parameters()):
        return {}
    out: dict[str, str] = {}
    for training in (False, True):
        clean, called = _reads(model, modules, training, modules)
        out |= dict.fromkeys(called, "is also called past the place where it stands")
        if clean:
            continue
        if not _reads(model, modules, training, ())[0]:
            return out  # it does not run on token ids alone, or its logits are no numbers anyway
        for name in _culprits(model, modules, training):
            out[name] = "has its weight read past the layer"
    return out


def _culprits(model: nn.Module, modules: Mapping[str, nn.Module], training: bool) -> list[str]:
    """Which weights are read, by halving."""
    names = list(modules)
    waiting, out = [names], []
    while waiting:
        part = waiting.pop()
        if _reads(model, modules, training, part)[0]:
            continue
        if len(part) == 1:
            out += part
        else:
            waiting += [part[: len(part) // 2], part[len(part) // 2 :]]
    return sorted(out, key=names.index)


def _reads(
    model: nn.Module, modules: Mapping[str, nn.Module], training: bool, poisoned: Container[str]
) -> tuple[bool, list[str]]:
    """Whether the logits stay numbers with NaN to be read for these weights, and the layers that
    were called past their place."""
    called: dict[str, None] = {}
    handles = []
    with undisturbed(model, training), _replaced(model, modules, poisoned) as watches:
        for name, watch in watches.items():

            def note(*_: Any, name: str = name, watch: _Watch = watch) -> None:
                if not watch.inside:
                    called[name] = None

            handles.append(watch.base.register_forward_pre_hook(note))
        try:
            return not bool(short_pass(model).isnan().any()), list(called)
        except Exception:
            return False, []
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _replaced(
    model: nn.Module, modules: Mapping[str, nn.Module], poisoned: Container[str]
) -> Iterator[dict[str, _Watch]]:
    watches = {}
    try:
        for name, module in modules.items():
            weight, poison = cast(Tensor, module.weight), None
            if name in poisoned and weight.is_floating_point():
                poison = torch.full((1, 1), torch.nan, dtype=weight.dtype, device=weight.device)
                poison = poison.expand(weight.shape)
            watches[name] = _Watch(module, poison)
            replace_module(model, name, watches[name])
        yield watches
    finally:
        for name in watches:
            replace_module(model, name, modules[name])


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Another module in the place of this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, child, module)


@contextmanager
def undisturbed(model: nn.Module, training: bool) -> Iterator[None]:
    """In training mode or not, without gradients, whatever is drawn; afterwards as before."""
    modes = [(module, module.training) for module in model.modules()]
    gpus = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    try:
        model.train(training)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # it would count the rows it sees
        with borrowed_generator(gpus, seed=0), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def short_pass(model: Any, number: int = 0) -> Tensor:
    """The logits of one short text (there are many) of a model of transformers, in float32.

    Raises:
        Exception: whatever a model raises that does not run on token ids alone.
    """
    embeddings = model.get_input_embeddings()
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    source = torch.Generator().manual_seed(number)
    ids = torch.randint(embeddings.num_embeddings, (1, 8), generator=source)
    ids = torch.where(ids == (-1 if padding is None else padding), (ids + 1), ids)
    ids = (ids % embeddings.num_embeddings).to(device_of(model))
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return cast(Tensor, out.logits).float()
