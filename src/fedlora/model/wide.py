"""Runs a model's own forward pass in a wider dtype, and puts its state back afterwards.

Two ways to compute the same thing differ by rounding. In float64 rounding is so small that a real
difference stands out, whatever the dtype of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Largest difference, relative to the largest logit, that counts as rounding. It is wide for
float64, because some modules compute a part in float32 all the same."""
SAME_SHAPES = 1e-3
"""Factor on `BOUNDS` for two passes of the same shape, which differ by less."""
LARGE = 2**30
"""Models with more parameters are judged in float32, to save memory and time."""
WEIGHT_PART = 2**25
"""A larger weight is widened in parts of so many numbers, to save memory."""


class WideMode(TorchFunctionMode):
    """Makes all operations of this thread compute in a wider dtype than the weights have.

    Weights are not converted beforehand: each is widened where it is used.

    Args:
        dtype: float64 or float32.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.narrow = {torch.float16, torch.bfloat16, torch.float32} - {dtype}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation of torch, widening narrow operands beside a wide one."""
        name = getattr(func, "__name__", "")
        if name in ("float", "half", "bfloat16"):
            return args[0].to(self.dtype)
        args = tuple(self._type(x) for x in args)
        named = {key: self._type(x) for key, x in (kwargs or {}).items()}
        if any(x.dtype == self.dtype for x in _tensors((*args, *named.values()))):
            if func is F.linear and args[1].dtype in self.narrow:
                return self._linear(*args, **named)
            # An operand that is written to must stay the same tensor.
            writes_first = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
            args = tuple(
                x if writes_first and i == 0 else self._wide(x) for i, x in enumerate(args)
            )
            named = {key: x if key == "out" else self._wide(x) for key, x in named.items()}
        elif _takes_the_default(func, args, named):
            # `torch.set_default_dtype` would affect other threads. Converting the result afterwards
            # would be too late: the lowest number of float64 is -inf in float32.
            named["dtype"] = self.dtype
        out = func(*args, **named)
        return out.to(self.dtype) if func is F.embedding or self._was_made(out, args) else out

    def _was_made(self, out: Any, args: tuple[Any, ...]) -> bool:
        """Whether narrow floats were made of other numbers, as by dividing integers."""
        if not isinstance(out, Tensor) or out.dtype not in self.narrow:
            return False
        return not any(x.is_floating_point() for x in _tensors(args))

    def _type(self, x: Any) -> Any:
        return self.dtype if isinstance(x, torch.dtype) and x in self.narrow else x

    def _wide(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(self.dtype) if x.dtype in self.narrow else x
        if type(x) in (list, tuple):
            return type(x)(self._wide(y) for y in x)
        return x

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = max(1, WEIGHT_PART // weight.shape[1])
        x = x.to(self.dtype)
        out = torch.cat([F.linear(x, part.to(self.dtype)) for part in weight.split(rows)], -1)
        return out if bias is None else out + bias.to(self.dtype)


_FLOATS = {torch.zeros, torch.ones, torch.empty, torch.eye, torch.rand, torch.randn, torch.linspace}
"""Functions that make tensors of torch's default dtype unless another is given."""
_FLOATS_OF_FLOATS = {torch.full, torch.tensor, torch.scalar_tensor, torch.arange}
"""Functions that do so where one of their arguments is a float."""


def _takes_the_default(func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> bool:
    """Whether a call makes a tensor of torch's default dtype."""
    if named.get("dtype") is not None:
        return False
    return func in _FLOATS or (func in _FLOATS_OF_FLOATS and _has_float([*args, *named.values()]))


def _has_float(values: Iterable[Any]) -> bool:
    return any(_has_float(x) if type(x) in (list, tuple) else isinstance(x, float) for x in values)


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif type(x) in (list, tuple):
            yield from (y for y in x if isinstance(y, Tensor))


@contextmanager
def computing_in(configs: Sequence[Any], dtype: torch.dtype) -> Iterator[None]:
    """Compute in this dtype; experts are computed one by one, as fused kernels know few dtypes."""
    name = "_experts_implementation_internal"
    before = [(c, getattr(c, name)) for c in configs if getattr(c, name, None) is not None]
    try:
        for config, _ in before:
            setattr(config, name, "eager")
        with WideMode(dtype):
            yield
    finally:
        for config, value in before:
            setattr(config, name, value)


def wide_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which passes of a model are compared."""
    large = sum(p.numel() for p in model.parameters()) > LARGE
    return torch.float32 if large else torch.float64


class ForwardState:
    """Remembers what modules may change in their forward pass, so that it can be put back.

    Rotary factors that follow the longest sample seen so far are an example.
    """

    def __init__(self, model: nn.Module) -> None:
        self.states = [
            (
                m,
                _plain(m),
                {n: None if b is None else b.clone() for n, b in _floating(m).items()},
            )
            for m in model.modules()
            if _floating(m)
        ]

    def restore(self) -> None:
        """Put everything back."""
        for module, values, buffers in self.states:
            for name in _plain(module).keys() - values.keys():
                delattr(module, name)
            module.__dict__.update(values)
            for name, value in buffers.items():
                module._buffers[name] = None if value is None else value.clone()


def _floating(module: nn.Module) -> dict[str, Tensor | None]:
    names = module._non_persistent_buffers_set
    return {
        n: b
        for n, b in module._buffers.items()
        if n in names and (b is None or b.is_floating_point())
    }


def _plain(module: nn.Module) -> dict[str, Any]:
    kinds = (bool, int, float, Tensor)
    return {
        n: x
        for n, x in module.__dict__.items()
        if not n.startswith("_") and n != "training" and isinstance(x, kinds)
    }


def nearly_equal(result: Tensor, wanted: Tensor, dtype: torch.dtype, times: float = 1.0) -> bool:
    """Whether two results, computed in this dtype, are the same but for rounding."""
    if result.shape != wanted.shape:
        return False
    return bool((result - wanted).abs().max() <= times * BOUNDS[dtype] * wanted.abs().max())
