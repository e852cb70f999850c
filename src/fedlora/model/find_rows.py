"""Finds out by running the model where the clients' rows lie in what a module gets.

Rows are `(1, tokens, width)` in most modules, but norms of queries and keys get
`(1, heads, tokens, d)` or `(1, tokens, heads, d)`, routers `(tokens, width)`, a classifier's head
`(samples, ...)`, and sizes may be equal by chance. So a few random rows are run three times: twice
with different numbers of tokens and samples, which shows what grows with them, and once with some
of the samples changed, which shows whether just their part of it changes.
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
from fedlora.model.client_rows import Form
from fedlora.model.full_modules import FullModule, Kinds, kinds_of

LENGTHS = ((7, 3, 12), (5, 2, 9, 13))
"""Of the rows. Tokens, samples, and the longest row grow from the first to the second by three
different ratios."""
CHANGED = (0, 2)
"""Samples of the second that are changed."""
SUMS = 8
"""Weighted sums by which an entry is known: one alone may be the same by chance."""
QUIET = 0.05
"""How much the others may change, of the largest change: by rounding, where experts share a sum."""


@dataclass(frozen=True)
class _Seen:
    """A tensor that a module got: its shape, and for every axis sums `(entries, SUMS)`."""

    shape: tuple[int, ...]
    sums: tuple[Tensor, ...]


Recorded = list[tuple[Kinds, list[_Seen | None]]]
"""What a module got, or returned, call by call."""


@dataclass
class _Calls:
    """All calls of one module in a pass."""

    inputs: Recorded = field(default_factory=list)
    outputs: Recorded = field(default_factory=list)


Watched = nn.Module | FullModule
Forms = dict[Kinds, tuple[Form | None, ...]]
"""Where rows lie in the tensors a module gets or returns, by their kinds."""


def find_rows(
    draw: Callable[[Sequence[int], int], list[Tokens]],
    full: Sequence[FullModule],
    others: Sequence[nn.Module],
    run: Callable[[Sequence[Tokens]], object],
) -> tuple[bool, dict[nn.Module, dict[int, Form]]]:
    """Find out where the clients' rows lie, and tell the modules trained whole.

    Args:
        draw: gives random rows of so many tokens, by a seed.
        full: its modules trained whole; their `inputs` and `outputs` are set.
        others: modules of one input that have to know.
        run: a pass of the model over rows, in evaluation mode, without gradients.

    Returns:
        Whether it is known of all that ran, and of each of the others its forms by the number of
        axes.
    """
    watched: list[Watched] = [*full, *others]
    passes = [_recorded(watched, partial(run, rows)) for rows in _three_batches(draw)]
    known = True
    for module in full:
        # One that does not run, a list of modules for example, may be used by its parts.
        module.inputs = _forms([calls[module].inputs for calls in passes])
        module.outputs = _forms([calls[module].outputs for calls in passes])
        known &= bool(module.inputs and module.outputs)
        known &= all(any(forms) for forms in module.inputs.values())
    forms_of = dict[nn.Module, dict[int, Form]]()
    for other in others:
        forms_of[other], all_known = _forms_by_axes([calls[other].inputs for calls in passes])
        known &= all_known
    return known, forms_of


def _three_batches(draw: Callable[[Sequence[int], int], list[Tokens]]) -> list[list[Tokens]]:
    """Rows of other lengths in the second batch than in the first; a few changed in the third."""
    first, second, changed = draw(LENGTHS[0], 0), draw(LENGTHS[1], 1), draw(LENGTHS[1], 2)
    third = [changed[i] if i in CHANGED else row for i, row in enumerate(second)]
    return [first, second, third]


def _forms_by_axes(passes: Sequence[Recorded]) -> tuple[dict[int, Form], bool]:
    """Of a module's first input its form by the number of its axes, and whether all are known."""
    if not any(passes):  # it never ran
        return {}, True
    inputs = _forms(passes)
    known, out = bool(inputs), dict[int, Form]()
    for (axes, *_), (form, *_) in inputs.items():
        known &= form is not None
        if form is not None and axes is not None:
            out[axes] = form
    return out, known


def _recorded(watched: Sequence[Watched], run: Callable[[], object]) -> dict[Watched, _Calls]:
    """All calls of these modules while something runs."""
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
    """What is kept of a tensor: for each of its axes, weighted sums over all the others."""
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


def _forms(passes: Sequence[Recorded]) -> Forms:
    """The forms of a module's calls in three passes, by kind; none: not known."""
    forms_of: Forms = {}
    if len({len(calls) for calls in passes}) != 1:
        return {}
    for calls in zip(*passes, strict=True):
        kinds = calls[0][0]
        if any(k != kinds for k, _ in calls):
            return {}
        forms = list[Form | None]()
        for one, two, three in zip(*(leaves for _, leaves in calls), strict=True):
            if one is None or two is None or three is None:
                forms.append(None)
            elif (form := _form(one, two, three)) is not None:
                forms.append(form)
            elif one.shape == two.shape and _same(two, three):  # all share it
                forms.append(None)
            else:
                return {}
        both = _both(forms_of.get(kinds, tuple(forms)), tuple(forms))
        if both is None:
            return {}
        forms_of[kinds] = both
    return forms_of


def _both(
    one: tuple[Form | None, ...], other: tuple[Form | None, ...]
) -> tuple[Form | None, ...] | None:
    """One form for two calls of a kind, which may have other numbers of heads; None: there is
    none."""
    out = list[Form | None]()
    for x, y in zip(one, other, strict=True):
        if x is None or y is None:
            if x is not y:
                return None
            out.append(None)
        elif (x.axis, x.unit) != (y.axis, y.unit) or (
            x.apart != y.apart and min(max(x.multiples), max(y.multiples)) > 1
        ):
            return None
        else:
            out.append(Form(x.axis, x.unit, x.multiples | y.multiples, x.apart or y.apart))
    return tuple(out)


def _same(one: _Seen, other: _Seen) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one.sums, other.sums, strict=True))


def _form(one: _Seen, two: _Seen, three: _Seen) -> Form | None:
    """The only form that agrees with what was seen."""
    if len(one.shape) != len(two.shape) or two.shape != three.shape:
        return None
    tokens, samples = [sum(x) for x in LENGTHS], [len(x) for x in LENGTHS]
    candidates = []
    for axis, (small, large) in enumerate(zip(one.shape, two.shape, strict=True)):
        for unit, sizes in (("tokens", tokens), ("samples", samples)):
            each, rest = divmod(small, sizes[0])
            if not each or rest or large != each * sizes[1]:
                continue  # the axis does not grow as the number of these does
            change = (three.sums[axis] - two.sums[axis]).norm(dim=1)
            for apart in (False, True) if each > 1 else (False,):
                if _agrees(change, each, unit, apart):
                    candidates.append(Form(axis, unit, frozenset({each}), apart))
    return candidates[0] if len(candidates) == 1 else None


def _agrees(change: Tensor, each: int, unit: str, apart: bool) -> bool:
    """Whether, in this order, just the changed samples' entries change.

    Args:
        change: of each entry of the axis.
        each: entries of a token or sample.
        unit: which.
        apart: a token's entries do not follow each other.
    """
    lengths = LENGTHS[1] if unit == "tokens" else (1,) * len(LENGTHS[1])
    number = sum(lengths)
    table = change.view(each, number) if apart else change.view(number, each).T
    largest = change.max()
    if not largest:  # positions, for example: the order of several entries cannot be told
        return each == 1
    at = 0
    for sample, length in enumerate(lengths):
        changed = table[:, at : at + length].max() > QUIET * largest
        if bool(changed) != (sample in CHANGED):
            return False
        at += length
    return True
