"""Trains modules whole, in float32, with a copy of their parameters for each client of a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fedlora.model.client_rows import ClientRows, MixedRowsError, RowLayout

Kinds = tuple[int | None, ...]
"""Of the values a module gets or returns: each tensor's number of axes, None for the others."""


def kinds_of(leaves: Sequence[Any]) -> Kinds:
    """The number of axes of each value that is a tensor."""
    return tuple(x.ndim if isinstance(x, Tensor) else None for x in leaves)


class FullModule:
    """A module trained whole; beside several clients, a copy of its parameters for each.

    Args:
        module: its `forward` is wrapped, nothing else is changed.
        client_rows: which rows of the pass belong to which client.

    Attributes:
        copies: client by client, parameter name -> value; empty: the module's own parameters run.
        inputs: kinds of a call's values -> where the clients' rows lie in each; None for a value
            that is no tensor, or that all clients share.
        outputs: the same of what it returns.
        watch: called with "inputs" or "outputs" and the values whenever the module runs undivided.
    """

    def __init__(self, module: nn.Module, client_rows: ClientRows) -> None:
        self.module, self.client_rows, self.forward = module, client_rows, module.forward
        self.copies: list[dict[str, nn.Parameter]] = []
        self.inputs: dict[Kinds, tuple[RowLayout | None, ...]] = {}
        self.outputs: dict[Kinds, tuple[RowLayout | None, ...]] = {}
        self.watch: Callable[[str, Any], None] | None = None
        module.forward = self._forward

    def load_copies(self, name: str, values: Sequence[Mapping[str, Tensor]]) -> None:
        """Make a copy of the parameters for each client.

        Args:
            name: the module's full name.
            values: of each client, full parameter name -> value; the module's own where it is
                missing. No clients: the module's own parameters run.
        """
        own = dict(self.module.named_parameters())
        self.copies = [
            {
                end: nn.Parameter(given.get(f"{name}.{end}", value).detach().to(value).clone())
                for end, value in own.items()
            }
            for given in values
        ]

    def _forward(self, *given: Any, **named: Any) -> Any:
        """Run each client's rows by the client's copy.

        Raises:
            MixedRowsError: the clients' rows cannot be told apart.
        """
        if not self.copies or self.client_rows.base_only:
            return self._undivided(*given, **named)
        if self.client_rows.only_client is not None:
            with _swapped(self.module, self.copies[self.client_rows.only_client]):
                return self.forward(*given, **named)
        return self._divided(*given, **named)

    def _undivided(self, *given: Any, **named: Any) -> Any:
        """Run all rows by the module's own parameters, and tell `watch`."""
        self.client_rows.running_full_modules += 1
        try:
            if self.watch is None:
                return self.forward(*given, **named)
            self.watch("inputs", (given, named))
            out = self.forward(*given, **named)
            self.watch("outputs", out)
            return out
        finally:
            self.client_rows.running_full_modules -= 1

    def _divided(self, *given: Any, **named: Any) -> Any:
        """Run client after client, and join the results as if the module had run once."""
        client_rows, kind = self.client_rows, type(self.module).__name__
        leaves, tree = tree_flatten((given, named))
        layouts = self.inputs.get(kinds_of(leaves))
        unit = next((layout.unit for layout in layouts or () if layout is not None), None)
        if layouts is None or unit is None or not client_rows.count(unit):
            raise MixedRowsError(f"{kind} got rows that cannot be told apart")
        results, clients = [], [span.client for span in client_rows.spans_by_unit(unit)]
        for client in clients:
            part = [
                x if layout is None else self._part(x, layout, client)
                for x, layout in zip(leaves, layouts, strict=True)
            ]
            args, keys = tree_unflatten(part, tree)
            with _swapped(self.module, self.copies[client]), client_rows.only(client):
                results.append(tree_flatten(self.forward(*args, **keys)))
        first, out_tree = results[0]
        out_layouts = self.outputs.get(kinds_of(first))
        if out_layouts is None:
            raise MixedRowsError(f"{kind} returned what cannot be put together")
        joined = [
            first[i]
            if layout is None
            else layout.join([x[i] for x, _ in results], self._counts(layout, clients))
            for i, layout in enumerate(out_layouts)
        ]
        return tree_unflatten(joined, out_tree)

    def _part(self, x: Tensor, layout: RowLayout, client: int) -> Tensor:
        span = next(
            (s for s in self.client_rows.spans_by_unit(layout.unit) if s.client == client), None
        )
        if span is None:
            raise MixedRowsError(f"a client has no {layout.unit} here")
        return layout.narrow(x, self.client_rows.count(layout.unit), span)

    def _counts(self, layout: RowLayout, clients: Sequence[int]) -> list[int]:
        spans = {s.client: s.end - s.begin for s in self.client_rows.spans_by_unit(layout.unit)}
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
    """Let a module use other parameters than its own for a while."""
    slots, before = [], []  # the table and the name under which a submodule holds each parameter
    for name in values:
        owner, _, leaf = name.rpartition(".")
        slots.append((module.get_submodule(owner)._parameters, leaf))
        before.append(slots[-1][0][leaf])
    try:
        for (table, leaf), value in zip(slots, values.values(), strict=True):
            table[leaf] = value
        yield
    finally:
        for (table, leaf), old in zip(slots, before, strict=True):
            table[leaf] = old
