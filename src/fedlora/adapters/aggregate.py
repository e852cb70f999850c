"""Combines adapters that were trained apart into one, for `fedlora aggregate` and in Python.

Any rule that needs no shared start can be used, with the same `encode` and `finalize` as in a
federation. Memory stays near the size of the adapters: no base model is loaded, and no m x n matrix
is made unless the factors of the sum would be larger than it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters.base_weights import common_base_weights
from fedlora.adapters.bases import check_bases
from fedlora.adapters.common import common_config, common_shapes, target_names, with_common_names
from fedlora.adapters.contents import holds, modules_to_save, saved_whole
from fedlora.adapters.heads import combine_heads
from fedlora.adapters.saved_adapter import SavedAdapter, as_factors, load_adapter, write_adapter
from fedlora.errors import CheckpointError, InputError
from fedlora.federation.aggregators.mean import Mean
from fedlora.lowrank import (
    Delta,
    Deltas,
    LowRank,
    add,
    add_all,
    norm,
    prefix,
    refactor,
    scale,
    subtract,
    truncate,
    zeros,
)
from fedlora.methods import METHODS, ONE_SHOT
from fedlora.methods.rule import Rule
from fedlora.methods.shared import with_shift
from fedlora.methods.values import RoundNumbers, ServerState, Start
from fedlora.model.targets import Targets
from fedlora.text import natural


@dataclass(frozen=True)
class Layer:
    """How one target module was combined.

    Args:
        ranks: its rank in each adapter; None in those that do not have it.
        rank: of the result.
        error: `||dW - dW*||_F / ||dW*||_F` with the exact sum `dW* = sum_k p_k s_k B_k A_k`; 0
            where this sum is zero.
    """

    ranks: tuple[int | None, ...]
    rank: int
    error: float


@dataclass(frozen=True)
class Aggregated(SavedAdapter):
    """The result of `aggregate`, ready for `save_adapter`.

    Args:
        layers: target module -> how it was combined.
        weights: of the adapters; they sum to one.
        labels: of the rows of a classifier's head, in order; empty where no adapter names them.
        notes: what the user should know.
    """

    layers: Mapping[str, Layer]
    weights: tuple[float, ...]
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def aggregate(
    adapters: Sequence[SavedAdapter],
    weights: Sequence[float] | None = None,
    *,
    method: str = "exact",
    rank: int | None = None,
    energy: float | None = None,
    same_base: bool = False,
    **options: Any,
) -> Aggregated:
    """Combine adapters of one base model: `dW = sum_k p_k s_k B_k A_k`, or what another rule makes.

    A module that an adapter does not have counts as zero there, with the adapter's full weight.
    Saved heads are averaged over the adapters that have them, row by row where their labels are
    named (see `combine_heads`). Weights of the base that lie in adapters are carried along.

    Args:
        adapters: from `load_adapter`, at least one.
        weights: positive, normalised here; None: all alike.
        method: a rule that needs no shared start (`ONE_SHOT`).
        rank: keep at most this many singular directions of each module.
        energy: keep the fewest whose squared singular values reach this share of their sum.
        same_base: bases that are named differently are the same; without it a warning is given,
            and stands in `notes`.
        options: the rule's own.

    Raises:
        InputError: adapters of different bases or of ranks the rule cannot combine, heads that do
            not fit each other, one module under two names, or impossible values.
    """
    rule, rule_options = _rule(method, options)
    shares = _shares(weights, len(adapters))
    _check_cut(rank, energy)
    base_notes = check_bases([a.config for a in adapters], same_base)
    for note in base_notes:
        warnings.warn(note, stacklevel=2)
    adapters = with_common_names(adapters)
    shapes = common_shapes(adapters)
    config = common_config(adapters)
    if not rule.mixed_ranks:
        _check_equal(rule, adapters, shapes)
    combined = _combined(rule, rule_options, adapters, shares, shapes)
    deltas, layers = {}, {}
    for name in sorted(shapes, key=natural):
        updates = [a.deltas.get(name) for a in adapters]
        # If only adapters of weight zero have the module, nothing was combined.
        total = combined.get(name, zeros(shapes[name], 0))
        deltas[name], layers[name] = _cut_module(total, updates, shares, rank, energy)
    heads = combine_heads(adapters, shares)
    base, weight_notes = common_base_weights(adapters)
    _refuse_both_ways(deltas, heads.dense)
    config["modules_to_save"] = _names_to_save(config["modules_to_save"], heads.dense)
    return Aggregated(
        deltas,
        heads.dense,
        config,
        layers,
        tuple(shares),
        heads.labels,
        (*base_notes, *heads.notes, *weight_notes),
        base={name: value for name, value in base.items() if name not in heads.dense},
        embeddings=frozenset(name for a in adapters for name in a.embeddings),
        model_config=heads.model_config,
    )


def _check_cut(rank: int | None, energy: float | None) -> None:
    """Refuse an impossible limit of the result's rank, or two limits."""
    if rank is not None and energy is not None:
        raise InputError("rank and energy exclude each other; give one of them")
    if rank is not None and rank < 1:
        raise InputError(f"rank: {rank} must be at least 1")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise InputError(f"energy: {energy} must be above 0 and at most 1")


def _cut_module(
    total: Delta,
    updates: Sequence[LowRank | None],
    shares: Sequence[float],
    rank: int | None,
    energy: float | None,
) -> tuple[LowRank, Layer]:
    """Cut one module's result to the rank that is wanted, and measure how far it is from the sum.

    Args:
        total: what the rule made of the module's updates.
        updates: of the module in each adapter; None in those that do not have it.
        shares: of the adapters; they sum to one.
        rank, energy: as `aggregate` takes them.
    """
    terms = [(x, p) for x, p in zip(updates, shares, strict=True) if x is not None]
    exact = add([scale(x, p) for x, p in terms])
    # No rule's result has more directions than the sum may have.
    most_directions = min(*total.shape, sum(x.rank for x, _ in terms))
    kept = _cut(total, most_directions, rank, energy)
    size = norm(exact)
    if size <= 1e-6 * sum(p * norm(x) for x, p in terms):
        size = 0.0  # the terms cancel, and their sum is rounding
    lost = norm(subtract(kept, exact))
    ranks = tuple(None if x is None else x.rank for x in updates)
    return kept, Layer(ranks, kept.rank, lost / size if size else 0.0)


def _refuse_both_ways(deltas: Mapping[str, Delta], dense: Mapping[str, Tensor]) -> None:
    """Refuse a module that one adapter changes by LoRA and another has trained whole."""
    for owner in sorted({name.rpartition(".")[0] for name in dense} & deltas.keys(), key=natural):
        raise InputError(
            f"{owner}: one adapter changes it by LoRA, another was trained whole there "
            "(modules_to_save); these cannot be combined"
        )


def _names_to_save(named: Sequence[str], dense: Mapping[str, Tensor]) -> list[str] | None:
    """PEFT's `modules_to_save` that finds exactly these parameters; None where there are none.

    Args:
        named: what the adapters' own `modules_to_save` name.
        dense: the parameters that were trained whole.
    """
    names = [module for module in named if holds(dense, module)]
    unnamed = [n for n in dense if not any(saved_whole(n, [module]) for module in names)]
    names += dict.fromkeys(parameter.rpartition(".")[0] for parameter in unnamed)
    return names or None


def check_options(method: str, options: Iterable[str]) -> Rule:
    """The rule of this name, which has to be one that `aggregate` can use, with these options.

    Args:
        method: name of the rule.
        options: names of options.

    Raises:
        InputError: it is not, or has other options.
    """
    if method not in ONE_SHOT:
        why = "needs a start that all clients share" if method in METHODS else "is unknown"
        raise InputError(f"method: {method} {why}; there are {', '.join(ONE_SHOT)}")
    rule = METHODS[method]
    on_training = {f.name for f in fields(rule.options) if f.metadata.get("training")}
    known = [f.name for f in fields(rule.options) if f.name not in on_training]
    for name in options:
        if name in on_training:
            raise InputError(
                f"{name}: acts on training, and these adapters are trained; to cut the result "
                "there are rank and energy"
            )
        if name not in known:
            has = f"its options: {', '.join(known)}" if known else "it has no options"
            raise InputError(f"{name}: unknown to aggregate with the method {method}; {has}")
    return rule


def _rule(method: str, options: Mapping[str, Any]) -> tuple[Rule, Any]:
    """The rule, and its options as its own dataclass."""
    rule = check_options(method, options)
    try:
        return rule, rule.options(**options)
    except (TypeError, ValueError) as error:
        raise InputError(f"method {method}: {error}") from None


def _shares(weights: Sequence[float] | None, number: int) -> list[float]:
    """The adapters' weights, so that they sum to one."""
    if number == 0:
        raise InputError("aggregate needs at least one adapter")
    weights = [1.0] * number if weights is None else list(weights)
    if len(weights) != number:
        raise InputError(f"weights: {len(weights)} for {number} adapters; give one for each")
    if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise InputError(f"weights: {' '.join(map(str, weights))}: expected positive numbers")
    return [weight / sum(weights) for weight in weights]


def _check_equal(rule: Rule, adapters: Sequence[SavedAdapter], shapes: Mapping[str, Any]) -> None:
    """Refuse adapters of different ranks for a rule that averages factors of one rank."""
    for name in shapes:
        ranks = [a.deltas[name].rank if name in a.deltas else 0 for a in adapters]
        if len(set(ranks)) > 1:
            able = ", ".join(n for n in ONE_SHOT if METHODS[n].mixed_ranks)
            raise InputError(
                f"method: {rule.name} needs one rank in all adapters, {name} has "
                f"{' '.join(map(str, ranks))}; use {able}"
            )


def _combined(
    rule: Rule,
    options: Any,
    adapters: Sequence[SavedAdapter],
    shares: Sequence[float],
    shapes: Mapping[str, tuple[int, int]],
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
    adapter_before = (
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


def _cut(total: Delta, most_directions: int, rank: int | None, energy: float | None) -> LowRank:
    """The result as factors, of the rank or energy that is wanted.

    Args:
        total: of one module.
        most_directions: that it can have; further ones are rounding.
        rank, energy: as `aggregate` takes them.
    """
    if rank is not None or energy is not None:
        return truncate(total, rank=rank, energy=energy)[0]
    if isinstance(total, LowRank) and total.rank <= most_directions:
        return total
    return prefix(refactor(total), most_directions)


def check_output(path: str | Path) -> None:
    """Refuse a directory that holds anything.

    Raises:
        InputError: it does.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: exists and is not empty; choose another directory")


def save_adapter(path: str | Path, adapter: SavedAdapter) -> None:
    """Write an adapter as a PEFT directory (`alpha = r`), read it back and compare.

    Args:
        path: a directory that does not exist or is empty.
        adapter: of `load_adapter` or `aggregate`.

    Raises:
        InputError: the directory holds something, or cannot be made.
        CheckpointError: what was read back is not what was written.
    """
    check_output(path)
    path, config = Path(path), adapter.config
    targets = Targets(
        shapes={name: x.shape for name, x in adapter.deltas.items()},
        names=list(target_names(adapter) or sorted(adapter.deltas)),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        model_name=str(config.get("base_model_name_or_path") or ""),
        revision=config.get("revision"),
        task_type=config.get("task_type"),
        modules_to_save=tuple(modules_to_save(config)),
        model_config=None
        if adapter.model_config is None
        else json.dumps(adapter.model_config, indent=2, sort_keys=True) + "\n",
        embeddings=adapter.embeddings,
    )
    try:
        write_adapter(path, adapter.deltas, targets, adapter.dense, adapter.base)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    back = load_adapter(path)
    if not _equal(back.deltas, adapter.deltas) or any(
        one.keys() != other.keys()
        for one, other in ((back.dense, adapter.dense), (back.base, adapter.base))
    ):
        raise CheckpointError(f"{path}: what was read back differs from what was written")


def _equal(one: Deltas, other: Deltas) -> bool:
    """Whether the factors are the same number by number, as `alpha = r` gives them back."""
    if one.keys() != other.keys():
        return False
    pairs = [(as_factors(update), as_factors(other[name])) for name, update in one.items()]
    return all(torch.equal(x.A, y.A) and torch.equal(x.B, y.B) for x, y in pairs)
