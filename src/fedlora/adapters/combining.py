"""Combines the updates of adapters, module by module, by a rule or by a merge.

A rule is used as in one round in which every client started from zero. A merge works on all updates
in the space that they span (`lowrank.common_space`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from fedlora.adapters.saved_adapter import SavedAdapter
from fedlora.errors import InputError
from fedlora.federation.aggregators.mean import Mean, ProductSum
from fedlora.lowrank import (
    Delta,
    Deltas,
    LowRank,
    add_all,
    common_space,
    drop_null_directions,
    zeros,
)
from fedlora.methods import MERGES, METHODS, ONE_SHOT
from fedlora.methods.merges.merge import Cores, Merge
from fedlora.methods.rule import Rule
from fedlora.methods.shared import with_shift
from fedlora.methods.values import RoundNumbers, ServerState, Start

Method = Rule | Merge
"""How adapters are combined."""
Shapes = Mapping[str, tuple[int, int]]
"""Target module -> `(m, n)`."""


def check_options(method: str, options: Iterable[str]) -> Method:
    """The rule or merge of this name, which has to be one that `aggregate` can use.

    Args:
        method: its name.
        options: names of options.

    Raises:
        InputError: it is not, or has other options.
    """
    if method not in (*ONE_SHOT, *MERGES):
        why = "needs a start that all clients share" if method in METHODS else "is unknown"
        raise InputError(f"method: {method} {why}; there are {', '.join([*ONE_SHOT, *MERGES])}")
    found = MERGES[method] if method in MERGES else METHODS[method]
    on_training = {f.name for f in fields(found.options) if f.metadata.get("training")}
    known = [f.name for f in fields(found.options) if f.name not in on_training]
    for name in options:
        if name in on_training:
            raise InputError(
                f"{name}: acts on training, and these adapters are trained; to cut the result "
                "there are rank and energy"
            )
        if name not in known:
            has = f"its options: {', '.join(known)}" if known else "it has no options"
            raise InputError(f"{name}: unknown to aggregate with the method {method}; {has}")
    return found


def method_with_options(method: str, options: Mapping[str, Any]) -> tuple[Method, Any]:
    """The rule or merge of this name, and its options as its own dataclass.

    Raises:
        InputError: there is none, or its options are impossible.
    """
    found = check_options(method, options)
    given = dict(options)
    for f in fields(found.options):
        # A command line gives numbers as floats.
        if isinstance(f.default, int) and isinstance(given.get(f.name), float):
            if not given[f.name].is_integer():
                raise InputError(f"{f.name}: {given[f.name]} is no whole number")
            given[f.name] = int(given[f.name])
    try:
        return found, found.options(**given)
    except (TypeError, ValueError) as error:
        raise InputError(f"method {method}: {error}") from None


def used_weights(
    method: Method, weights: Sequence[float] | None, number: int, raw: bool
) -> list[float]:
    """The weight of each adapter as it is used.

    Args:
        method: of a merge that adds updates up the mean is 1, else the sum is 1.
        weights: as given; None: all alike.
        number: of adapters.
        raw: they are not normalised, and may be negative.

    Raises:
        InputError: impossible weights, or raw ones for a rule that averages.
    """
    if number == 0:
        raise InputError("aggregate needs at least one adapter")
    weights = [1.0] * number if weights is None else list(weights)
    if len(weights) != number:
        raise InputError(f"weights: {len(weights)} for {number} adapters; give one for each")
    said = f"weights: {' '.join(map(str, weights))}"
    if raw:
        if isinstance(method, Rule) and not method.plain_sum:
            able = [name for name in ONE_SHOT if METHODS[name].plain_sum]
            raise InputError(
                f"raw_weights: {method.name} averages, and its weights are shares; use "
                f"{', '.join([*able, *MERGES])}"
            )
        if not all(math.isfinite(weight) for weight in weights) or not any(weights):
            raise InputError(f"{said}: expected numbers, one of them other than 0")
        return weights
    if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise InputError(
            f"{said}: expected positive numbers; negative ones go with --raw_weights "
            "(raw_weights=True), which does not normalise them"
        )
    total = sum(weights)
    if isinstance(method, Merge) and method.adds_up:
        total /= sum(weight > 0 for weight in weights)
    return [weight / total for weight in weights]


def combine(
    method: Method,
    options: Any,
    adapters: Sequence[SavedAdapter],
    weights: Sequence[float],
    shapes: Shapes,
    raw: bool,
) -> dict[str, Delta]:
    """Combine the updates of adapters; those of weight zero take no part.

    Args:
        method: a rule or a merge.
        options: its own dataclass.
        adapters: with common names of modules.
        weights: of `used_weights`.
        shapes: of every module that an adapter has.
        raw: the weights are not normalised.

    Returns:
        Target module -> what the method makes of it. Modules that no adapter with a weight has may
        lack.

    Raises:
        InputError: adapters of ranks that the rule cannot combine.
    """
    counted = [i for i, weight in enumerate(weights) if weight != 0]
    kept, shares = [adapters[i] for i in counted], [weights[i] for i in counted]
    if isinstance(method, Merge):
        return _merged(method, options, kept, shares, shapes, not raw, counted)
    if not method.mixed_ranks:
        _check_equal(method, adapters, shapes)
    if method.plain_sum:
        return _weighted_sum(kept, shares)
    return _one_round(method, options, adapters, weights, shapes)


def _weighted_sum(adapters: Sequence[SavedAdapter], weights: Sequence[float]) -> dict[str, Delta]:
    """`sum_k w_k s_k B_k A_k` of every module."""
    sums: dict[str, ProductSum] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, x in adapter.deltas.items():
            sums.setdefault(name, ProductSum()).add(x, weight)
    return {name: total.value() for name, total in sums.items()}


def _merged(
    merge: Merge,
    options: Any,
    adapters: Sequence[SavedAdapter],
    weights: Sequence[float],
    shapes: Shapes,
    normalised: bool,
    places: Sequence[int],
) -> dict[str, Delta]:
    """Merge module by module in the space that its updates span."""
    merged = dict[str, Delta]()
    for name in dict.fromkeys(name for a in adapters for name in a.deltas):
        space = common_space([a.deltas.get(name, zeros(shapes[name])) for a in adapters])
        cores = Cores(
            space.cores,
            torch.tensor(weights, dtype=torch.float64),
            normalised,
            shapes[name],
            name,
            tuple(places),
        )
        x = space.expand(merge.combine(cores, options))
        merged[name] = drop_null_directions(LowRank(x.A.float(), x.B.float()))
    return merged


def _check_equal(rule: Rule, adapters: Sequence[SavedAdapter], shapes: Shapes) -> None:
    """Refuse adapters of different ranks for a rule that averages factors of one rank."""
    for name in shapes:
        ranks = [a.deltas[name].rank if name in a.deltas else 0 for a in adapters]
        if len(set(ranks)) > 1:
            able = ", ".join(n for n in ONE_SHOT if METHODS[n].mixed_ranks)
            raise InputError(
                f"method: {rule.name} needs one rank in all adapters, {name} has "
                f"{' '.join(map(str, ranks))}; use {able}"
            )


def _one_round(
    rule: Rule,
    options: Any,
    adapters: Sequence[SavedAdapter],
    shares: Sequence[float],
    shapes: Shapes,
) -> dict[str, Delta]:
    """Combine the adapters as one round of the rule, in which every client started from zero.

    Each adapter's whole update is then what the client changed in the round. The shares are the
    clients' weights, and adapters of weight zero take no part.

    Returns:
        Target module -> what the rule makes of it: its adapter and what it merges, together.
    """
    ranks = {name: [a.deltas[name].rank for a in adapters if name in a.deltas] for name in shapes}
    levels = sorted({rank for of_module in ranks.values() for rank in of_module})
    widths = {name: max(of_module) for name, of_module in ranks.items()}
    # A rule that averages factors changes the adapter that clients started from; it is zero here.
    averages_factors = "factors" in rule.secure_sum
    adapter_before: Deltas = (
        {name: zeros(shapes[name], width) for name, width in widths.items()}
        if averages_factors
        else {}
    )
    state = ServerState(round=0, adapter=adapter_before, ranks=dict(enumerate(levels)))
    numbers = RoundNumbers(widths, state.levels)
    fixed = rule.fixed_weight(options)
    total = Mean()
    for adapter, share in zip(adapters, shares, strict=True):
        if share > 0:
            start = Start({name: zeros(x.shape, x.rank) for name, x in adapter.deltas.items()})
            weight = share if fixed is None else fixed
            encoded = rule.encode(adapter.deltas, start, numbers, options)
            total.fold(with_shift(rule, encoded, state, options), weight)
    result = rule.finalize(total.result(fixed is None), state, max(levels), options)
    return add_all([result.adapter, result.merge])
