"""Modules that are trained whole, in float32, and a copy of them for each client of a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fedlora.model.client_rows import ClientRows, Form, MixedRowsError

Kinds = tuple[int | None, ...]
"""What a module is called with, or returns: each tensor's number of axes, None for all else."""


def kinds_of(leaves: Sequence[Any]) -> Kinds:
    """See `Kinds`."""
    return tuple(x.ndim if isinstance(x, Tensor) else None for x in leaves)


class FullModule:
    """A module trained whole; beside several clients, a copy of its parameters for each.

    Args:
        module: its `forward` is wrapped, nothing else is changed.
        client_rows: whose rows are whose.

    Attributes:
        inputs: kinds of a call -> where the clients' rows lie in each tensor; None: it is no
            tensor, or all clients share it.
        outputs: likewise of what it returns.
        watch: told what it is called with and what it returns where it runs undivided.
    """

    def __init__(self, module: nn.Module, client_rows: ClientRows) -> None:
        self.module, self.client_rows, self.forward = module, client_rows, module.forward
        self.copies: list[dict[str, nn.Parameter]] = []
        self.inputs: dict[Kinds, tuple[Form | None, ...]] = {}
        self.outputs: dict[Kinds, tuple[Form | None, ...]] = {}
        self.watch: Callable[[str, Any], None] | None = None
        module.forward = self._forward

    def load_copies(self, name: str, values: Sequence[Mapping[str, Tensor]]) -> None:
        """Make copies for clients with these values, by full name; none: the module's own."""
        own = dict(self.module.named_parameters())
        self.copies = [
            {
                end: nn.Parameter(given.get(f"{name}.{end}", value).detach().to(value).clone())
                for end, value in own.items()
            }
            for given in values
        ]

    def _forward(self, *given: Any, **named: Any) -> Any:
        """Each client's rows by its copy.

        Raises:
            MixedRowsError: they cannot be told apart.
        """
        if not self.copies or self.client_rows.bare:
            return self._undivided(*given, **named)
        if self.client_rows.sole is not None:
            with _swapped(self.module, self.copies[self.client_rows.sole]):
                return self.forward(*given, **named)
        return self._divided(*given, **named)

    def _undivided(self, *given: Any, **named: Any) -> Any:
        """All rows by the module's own parameters; whoever watches is told."""
        self.client_rows.whole += 1
        try:
            if self.watch is None:
                return self.forward(*given, **named)
            self.watch("inputs", (given, named))
            out = self.forward(*given, **named)
            self.watch("outputs", out)
            return out
        finally:
            self.client_rows.whole -= 1

    def _divided(self, *given: Any, **named: Any) -> Any:
        """Client after client, the results joined as if the module had run once."""
        client_rows, kind = self.client_rows, type(self.module).__name__
        leaves, tree = tree_flatten((given, named))
        forms = self.inputs.get(kinds_of(leaves))
        unit = next((form.unit for form in forms or () if form is not None), None)
        if forms is None or unit is None or not client_rows.number(unit):
            raise MixedRowsError(f"{kind} got rows that cannot be told apart")
        results, clients = [], [span.client for span in client_rows.of_unit(unit)]
        for client in clients:
            part = [
                x if form is None else self._part(x, form, client)
                for x, form in zip(leaves, forms, strict=True)
            ]
            args, keys = tree_unflatten(part, tree)
            with _swapped(self.module, self.copies[client]), client_rows.only(client):
                results.append(tree_flatten(self.forward(*args, **keys)))
        first, out_tree = results[0]
        out_forms = self.outputs.get(kinds_of(first))
        if out_forms is None:
            raise MixedRowsError(f"{kind} returned what cannot be put together")
        joined = [
            first[i]
            if form is None
            else form.join([x[i] for x, _ in results], self._counts(form, clients))
            for i, form in enumerate(out_forms)
        ]
        return tree_unflatten(joined, out_tree)

    def _part(self, x: Tensor, form: Form, client: int) -> Tensor:
        span = next((s for s in self.client_rows.of_unit(form.unit) if s.client == client), None)
        if span is None:
            raise MixedRowsError(f"a client has no {form.unit} here")
        return form.narrow(x, self.client_rows.number(form.unit), span)

    def _counts(self, form: Form, clients: Sequence[int]) -> list[int]:
        spans = {s.client: s.end - s.begin for s in self.client_rows.of_unit(form.unit)}
        return [spans[client] for client in clients]


def full_modules_of(model: nn.Module) -> list[FullModule]:
    """The modules of a model that are trained whole."""
    wrapped = (getattr(m.__dict__.get("forward"), "__self__", None) for m in model.modules())
    return [x for x in wrapped if isinstance(x, FullModule)]


def make_float32(module: nn.Module, keep_output: bool) -> None:
    """Train a module of a half-precision base in float32: small steps would be rounded away.

    Args:
        module: changed in place.
        keep_output: it is a head, whose output nothing but the loss reads.
    """
    kind = next(module.parameters()).dtype
    if kind in (torch.float32, torch.float64):
        return

    def cast(values: Any, dtype: torch.dtype) -> Any:
        """Also of tuples (a router's) and of keywords."""
        return tree_map(
            lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, values
        )

    module.float()
    module.register_forward_pre_hook(
        lambda _, args, keys: cast((args, keys), torch.float32), with_kwargs=True
    )
    if not keep_output:
        module.register_forward_hook(lambda _, args, out: cast(out, kind))


@contextmanager
def _swapped(module: nn.Module, values: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Other parameters in the place of a module's own."""
    places, before = [], []
    for name in values:
        owner, _, leaf = name.rpartition(".")
        places.append((module.get_submodule(owner)._parameters, leaf))
        before.append(places[-1][0][leaf])
    try:
        for (owner_parameters, leaf), value in zip(places, values.values(), strict=True):
            owner_parameters[leaf] = value
        yield
    finally:
        for (owner_parameters, leaf), old in zip(places, before, strict=True):
            owner_parameters[leaf] = old
