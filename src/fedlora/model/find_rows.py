"""Finds out where the clients' rows lie in the tensors a module gets, by running the model.

Most modules get `(1, tokens, width)`, but norms of queries and keys get `(1, heads, tokens, d)` or
`(1, tokens, heads, d)`, routers `(tokens, width)`, a classifier's head `(samples, ...)`. Sizes may
also be equal by chance, so a shape alone does not say which axis is which. Therefore three batches
of random rows are run. The first two have different numbers of tokens and samples: the axis that
grows with them is theirs. The third changes some of the second's samples: just their entries of
that axis must change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from fedlora.data.tokenize import Tokens
from fedlora.model.client_rows import RowLayout
from fedlora.model.full_modules import FullModule, Kinds, kinds_of

LENGTHS = ((7, 3, 12), (5, 2, 9, 13))
"""Tokens of each row in the first batch and in the second. The number of tokens, the number of
samples and the longest row grow by three different ratios, so that they cannot be confused."""
CHANGED = (0, 2)
"""Samples of the second batch that the third batch changes."""
SUMS = 8
"""Weighted sums that are kept of every entry; a single one might be equal by chance."""
QUIET = 0.05
"""How much the unchanged samples may change, relative to the largest change: rounding reaches them
where a mixture of experts sums tokens in another order."""


@dataclass(frozen=True)
class _Seen:
    """What is kept of a tensor: its shape, and for every axis sums of `(entries, SUMS)`."""

    shape: tuple[int, ...]
    sums: tuple[Tensor, ...]


Recorded = list[tuple[Kinds, list[_Seen | None]]]
"""What a module got (or returned), call by call."""


@dataclass
class _Calls:
    """All calls of one module while one batch runs."""

    inputs: Recorded = field(default_factory=list)
    outputs: Recorded = field(default_factory=list)


Watched = nn.Module | FullModule
Layouts = dict[Kinds, tuple[RowLayout | None, ...]]
"""Kinds of a call's values -> where rows lie in each; None: no tensor, or one all clients share."""


def find_rows(
    draw: Callable[[Sequence[int], int], list[Tokens]],
    full: Sequence[FullModule],
    others: Sequence[nn.Module],
    run: Callable[[Sequence[Tokens]], object],
) -> tuple[bool, dict[nn.Module, dict[int, RowLayout]]]:
    """Find out where the clients' rows lie in every module that treats clients differently.

    Args:
        draw: `(lengths, seed) -> rows`: random rows of these numbers of tokens.
        full: the model's modules trained whole; their `inputs` and `outputs` are set.
        others: modules with one input (adapter layers, dropout).
        run: a pass of the model over rows, in evaluation mode, without gradients.

    Returns:
        Whether all modules that ran are known; and for each of the others its input's layout, by
        the input's number of axes.
    """
    watched: list[Watched] = [*full, *others]
    passes = [_recorded(watched, partial(run, rows)) for rows in _three_batches(draw)]
    known = True
    for module in full:
        # One that does not run, a list of modules for example, may be used by its parts.
        module.inputs = _layouts([calls[module].inputs for calls in passes])
        module.outputs = _layouts([calls[module].outputs for calls in passes])
        known &= bool(module.inputs and module.outputs)
        known &= all(any(layouts) for layouts in module.inputs.values())
    layouts_of = dict[nn.Module, dict[int, RowLayout]]()
    for other in others:
        layouts_of[other], all_known = _layouts_by_axes([calls[other].inputs for calls in passes])
        known &= all_known
    return known, layouts_of


def _three_batches(draw: Callable[[Sequence[int], int], list[Tokens]]) -> list[list[Tokens]]:
    """The three batches of the module's docstring."""
    first, second, changed = draw(LENGTHS[0], 0), draw(LENGTHS[1], 1), draw(LENGTHS[1], 2)
    third = [changed[i] if i in CHANGED else row for i, row in enumerate(second)]
    return [first, second, third]


def _layouts_by_axes(passes: Sequence[Recorded]) -> tuple[dict[int, RowLayout], bool]:
    """Layouts of a module's first input by its number of axes, and whether all are known."""
    if not any(passes):  # it never ran
        return {}, True
    inputs = _layouts(passes)
    known, out = bool(inputs), dict[int, RowLayout]()
    for (axes, *_), (layout, *_) in inputs.items():
        known &= layout is not None
        if layout is not None and axes is not None:
            out[axes] = layout
    return out, known


def _recorded(watched: Sequence[Watched], run: Callable[[], object]) -> dict[Watched, _Calls]:
    """What these modules got and returned while `run` ran."""
    calls = {module: _Calls() for module in watched}

    def note(module: Watched, side: str, values: Any) -> None:
        leaves = tree_flatten(values)[0]
        getattr(calls[module], side).append((kinds_of(leaves), [_seen(x) for x in leaves]))

    with ExitStack() as stack:
        for module in watched:
            if isinstance(module, FullModule):
                # By itself and not by a hook: hooks around its forward may change its input.
                module.watch = partial(note, module)
                stack.callback(setattr, module, "watch", None)
                continue
            hook = module.register_forward_pre_hook(
                lambda m, args, keys: note(m, "inputs", (args, keys)), with_kwargs=True
            )
            stack.callback(hook.remove)
        run()
    return calls


def _seen(x: Any) -> _Seen | None:
    """For each axis of a tensor, weighted sums over all other axes; None for other values."""
    if not isinstance(x, Tensor):
        return None
    numbers = torch.arange(1, SUMS + 1, device=x.device, dtype=torch.float64)
    sums = []
    for axis in range(x.ndim):
        if x.ndim > 1:
            entries = x.detach().movedim(axis, 0).flatten(1).double()  # (entries, all the rest)
        else:
            entries = x.double()[:, None]
        steps = torch.arange(1, entries.shape[1] + 1, device=x.device, dtype=torch.float64)
        weights = torch.outer(steps, numbers.sqrt()).cos()  # (all the rest, SUMS)
        sums.append((entries @ weights).cpu())
    return _Seen(tuple(x.shape), tuple(sums))


def _layouts(passes: Sequence[Recorded]) -> Layouts:
    """The layouts of a module's tensors from its calls in the three batches; empty: not known."""
    layouts_of: Layouts = {}
    if len({len(calls) for calls in passes}) != 1:
        return {}
    for calls in zip(*passes, strict=True):
        kinds = calls[0][0]
        if any(k != kinds for k, _ in calls):
            return {}
        layouts = list[RowLayout | None]()
        for one, two, three in zip(*(leaves for _, leaves in calls), strict=True):
            if one is None or two is None or three is None:
                layouts.append(None)
            elif (layout := _layout(one, two, three)) is not None:
                layouts.append(layout)
            elif one.shape == two.shape and _same(two, three):  # all clients share it
                layouts.append(None)
            else:
                return {}
        merged = _merged(layouts_of.get(kinds, tuple(layouts)), tuple(layouts))
        if merged is None:
            return {}
        layouts_of[kinds] = merged
    return layouts_of


def _merged(
    one: tuple[RowLayout | None, ...], other: tuple[RowLayout | None, ...]
) -> tuple[RowLayout | None, ...] | None:
    """One layout for two calls of the same kind, which may differ in their number of heads.

    Returns:
        None where no layout fits both.
    """
    out = list[RowLayout | None]()
    for x, y in zip(one, other, strict=True):
        if x is None or y is None:
            if x is not y:
                return None
            out.append(None)
        elif (x.axis, x.unit) != (y.axis, y.unit) or (
            x.strided != y.strided and min(max(x.multiples), max(y.multiples)) > 1
        ):
            return None
        else:
            out.append(RowLayout(x.axis, x.unit, x.multiples | y.multiples, x.strided or y.strided))
    return tuple(out)


def _same(one: _Seen, other: _Seen) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one.sums, other.sums, strict=True))


def _layout(one: _Seen, two: _Seen, three: _Seen) -> RowLayout | None:
    """The layout that agrees with all three batches; None: there is none, or more than one."""
    if len(one.shape) != len(two.shape) or two.shape != three.shape:
        return None
    tokens, samples = [sum(x) for x in LENGTHS], [len(x) for x in LENGTHS]
    candidates = []
    for axis, (small, large) in enumerate(zip(one.shape, two.shape, strict=True)):
        for unit, sizes in (("tokens", tokens), ("samples", samples)):
            each, rest = divmod(small, sizes[0])
            if not each or rest or large != each * sizes[1]:
                continue  # the axis does not grow with the number of tokens, or samples
            change = (three.sums[axis] - two.sums[axis]).norm(dim=1)
            for strided in (False, True) if each > 1 else (False,):
                if _agrees(change, each, unit, strided):
                    candidates.append(RowLayout(axis, unit, frozenset({each}), strided))
    return candidates[0] if len(candidates) == 1 else None


def _agrees(change: Tensor, each: int, unit: str, strided: bool) -> bool:
    """Whether just the entries of the changed samples change, if the axis is read in this order.

    Args:
        change: `(entries of the axis,)`, how much each entry changes.
        each: entries of a token or sample.
        unit: "tokens" or "samples".
        strided: a token's entries do not follow each other.
    """
    lengths = LENGTHS[1] if unit == "tokens" else (1,) * len(LENGTHS[1])
    number = sum(lengths)
    table = change.view(each, number) if strided else change.view(number, each).T
    largest = change.max()
    if not largest:  # nothing changes (positions): the order of several entries cannot be told
        return each == 1
    begin = 0
    for sample, length in enumerate(lengths):
        changed = table[:, begin : begin + length].max() > QUIET * largest
        if bool(changed) != (sample in CHANGED):
            return False
        begin += length
    return True
