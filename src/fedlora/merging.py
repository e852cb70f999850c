"""Combines adapters that were trained apart into one, for `fedlora aggregate` and in Python.

Any rule that needs no shared start does it, by the same `encode` and `finish` as in a federation.
Memory stays near the size of the adapters: no base model, and no m x n matrix unless the factors of
the sum would be larger than that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters import (
    SavedAdapter,
    Targets,
    as_factors,
    holds,
    load_adapter,
    write_adapter,
)
from fedlora.errors import CheckpointError, InputError
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
)
from fedlora.methods import METHODS
from fedlora.methods.rule import Rule
from fedlora.partition import natural
from fedlora.state import ServerState, Start
from fedlora.sums import WeightedSum

ONE_SHOT = tuple(name for name, rule in METHODS.items() if rule.one_shot)
"""Rules that can combine adapters without a shared start."""


@dataclass(frozen=True)
class Layer:
    """What became of one target module.

    Args:
        ranks: of the adapters that have it, None for those that have not.
        rank: of the result.
        error: `||dW - sum_k p_k s_k B_k A_k||_F / ||sum_k p_k s_k B_k A_k||_F`; 0 for a zero sum.
    """

    ranks: tuple[int | None, ...]
    rank: int
    error: float


@dataclass(frozen=True)
class Aggregated(SavedAdapter):
    """The result of `aggregate`, ready for `save_adapter`.

    Args:
        layers: target module -> what became of it.
        weights: of the adapters; they sum to one.
    """

    layers: Mapping[str, Layer]
    weights: tuple[float, ...]


def aggregate(
    adapters: Sequence[SavedAdapter],
    weights: Sequence[float] | None = None,
    *,
    method: str = "exact",
    rank: int | None = None,
    energy: float | None = None,
    **options: Any,
) -> Aggregated:
    """Combine adapters of one base model: `dW = sum_k p_k s_k B_k A_k`, or what another rule makes.

    A module that an adapter does not have counts as zero there, with the adapter's full weight.
    Saved heads are averaged over the adapters that have them.

    Args:
        adapters: from `load_adapter`, at least one.
        weights: positive, normalised here; None: all alike.
        method: a rule that needs no shared start (`ONE_SHOT`).
        rank: keep at most this many singular directions of each module.
        energy: keep the fewest whose squared singular values reach this share of their sum.
        options: the rule's own.

    Raises:
        InputError: adapters of different bases or of ranks the rule cannot combine, heads of
            different shapes, or impossible values.
    """
    rule, chosen = _rule(method, options)
    shares = _shares(weights, len(adapters))
    if rank is not None and energy is not None:
        raise InputError("rank and energy exclude each other; give one of them")
    if rank is not None and rank < 1:
        raise InputError(f"rank: {rank} must be at least 1")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise InputError(f"energy: {energy} must be above 0 and at most 1")
    shapes = _shapes(adapters)
    config = _common_config(adapters)
    if not rule.mixed_ranks:
        _check_equal(rule, adapters, shapes)
    found = _combined(rule, chosen, adapters, shares, shapes)
    deltas, layers = {}, {}
    for name in sorted(shapes, key=natural):
        parts = [a.deltas.get(name) for a in adapters]
        having = [(x, p) for x, p in zip(parts, shares, strict=True) if x is not None]
        wanted = add([scale(x, p) for x, p in having])
        if name not in found:  # only adapters of weight zero have it
            found[name] = _zero(shapes[name], 0)
        bound = min(*shapes[name], sum(x.rank for x, _ in having))
        deltas[name] = kept = _cut(found[name], bound, rank, energy)
        size = norm(wanted)
        if size <= 1e-6 * sum(p * norm(x) for x, p in having):
            size = 0.0  # the terms cancel; what is left is rounding
        lost = norm(subtract(kept, wanted))
        ranks = tuple(None if x is None else x.rank for x in parts)
        layers[name] = Layer(ranks, kept.rank, lost / size if size else 0.0)
    dense = _mean_heads(adapters, shares)
    for owner in sorted({name.rpartition(".")[0] for name in dense} & deltas.keys(), key=natural):
        raise InputError(
            f"{owner}: one adapter changes it by LoRA, another was trained whole there "
            "(modules_to_save); these cannot be combined"
        )
    whole = [m for m in config["modules_to_save"] if holds(dense, m)]
    config["modules_to_save"] = whole or None
    return Aggregated(deltas, dense, config, layers, tuple(shares))


def _rule(method: str, options: Mapping[str, Any], names_only: bool = False) -> tuple[Rule, Any]:
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
    try:
        return rule, None if names_only else rule.options(**options)
    except (TypeError, ValueError) as error:
        raise InputError(f"method {method}: {error}") from None


def _shares(weights: Sequence[float] | None, number: int) -> list[float]:
    if number == 0:
        raise InputError("aggregate needs at least one adapter")
    given = [1.0] * number if weights is None else list(weights)
    if len(given) != number:
        raise InputError(f"weights: {len(given)} for {number} adapters; give one for each")
    if min(given) < 0 or not 0 < sum(given) < float("inf"):
        raise InputError(f"weights: {' '.join(map(str, given))}: expected positive numbers")
    return [w / sum(given) for w in given]


def _shapes(adapters: Sequence[SavedAdapter]) -> dict[str, tuple[int, int]]:
    out: dict[str, tuple[int, int]] = {}
    for adapter in adapters:
        for name, x in adapter.deltas.items():
            if out.setdefault(name, x.shape) != x.shape:
                raise InputError(
                    f"{name}: shapes {out[name]} and {x.shape}; these adapters are for different "
                    "base models"
                )
    return out


def _base_name(config: Mapping[str, Any]) -> str:
    return str(config.get("base_model_name_or_path") or "")


def _same_base(one: str, other: str) -> bool:
    """Equal names; a name without its organisation is the hub's old one for the same model."""
    if one == other or not one or not other:
        return True
    ends = one.rpartition("/")[2] == other.rpartition("/")[2]
    return ends and (("/" in one) != ("/" in other))


def _common_config(adapters: Sequence[SavedAdapter]) -> dict[str, Any]:
    """What all have in common; the first one's where it does not matter.

    Raises:
        InputError: another base, task, or way of storing weights.
    """
    for one, other in combinations(adapters, 2):
        first, config = one.config, other.config
        if not _same_base(_base_name(first), _base_name(config)):
            raise InputError(
                f"base_model_name_or_path: {_base_name(first)} and {_base_name(config)}; adapters "
                "of different base models cannot be combined"
            )
        for key in ("task_type", "revision"):
            if first.get(key) != config.get(key) and None not in (first.get(key), config.get(key)):
                raise InputError(
                    f"{key}: {first.get(key)!r} and {config.get(key)!r}; these adapters do not "
                    "belong together"
                )
    out = {
        key: next((a.config[key] for a in adapters if a.config.get(key) is not None), None)
        for key in ("base_model_name_or_path", "revision", "task_type")
    }
    # PEFT saves what its last layer was; it finds the rest out itself when it loads.
    out["fan_in_fan_out"] = any(a.config.get("fan_in_fan_out") for a in adapters)
    longest = max((_base_name(a.config) for a in adapters), key=len)
    saved = [m for a in adapters for m in a.config.get("modules_to_save") or []]
    lists = [_target_names(a) for a in adapters]
    names = None if None in lists else sorted({name for x in lists for name in x or []})
    return {
        **out,
        "base_model_name_or_path": longest,
        "modules_to_save": sorted(set(saved)),
        "target_modules": names,
    }


def _target_names(adapter: SavedAdapter) -> list[str] | None:
    """PEFT's `target_modules`, where that alone says which modules there are."""
    names = adapter.config.get("target_modules")
    if not isinstance(names, list) or any(
        adapter.config.get(key) not in (None, [], "")
        for key in ("layers_to_transform", "exclude_modules", "target_parameters")
    ):
        return None
    return names


def check_options(method: str, options: Sequence[str]) -> None:
    """Whether a method is one for `aggregate` and has these options.

    Raises:
        InputError: not so.
    """
    _rule(method, dict.fromkeys(options), names_only=True)


def _check_equal(rule: Rule, adapters: Sequence[SavedAdapter], shapes: Mapping[str, Any]) -> None:
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
    """One round of the rule, in which every client started from nothing."""
    ranks = {name: [a.deltas[name].rank for a in adapters if name in a.deltas] for name in shapes}
    levels = sorted({r for of_module in ranks.values() for r in of_module})

    shared = rule.secure_sum != "products"
    state = ServerState(
        round=0,
        adapter={name: _zero(shapes[name], max(of)) for name, of in ranks.items()}
        if shared
        else {},
        ranks=dict(enumerate(levels)),
    )
    fixed = rule.fixed_weight(options)
    total = WeightedSum()
    for adapter, share in zip(adapters, shares, strict=True):
        if share > 0:
            start = Start({name: _zero(x.shape, x.rank) for name, x in adapter.deltas.items()})
            weight = share if fixed is None else fixed
            total.fold(rule.encode(adapter.deltas, start, state, options), {}, weight)
    result = rule.finish(total.mean(fixed is not None), state, max(levels), options)
    return add_all([result.adapter, result.merge])


def _zero(shape: tuple[int, int], rank: int) -> LowRank:
    m, n = shape
    return LowRank(torch.zeros(rank, n), torch.zeros(m, rank))


def _cut(x: Delta, bound: int, rank: int | None, energy: float | None) -> LowRank:
    """As factors of no more directions than `bound`, which every rule's result has at the most."""
    if rank is not None or energy is not None:
        return truncate(x, rank=rank, energy=energy)[0]
    if isinstance(x, LowRank) and x.rank <= bound:
        return x
    return prefix(refactor(x), bound)


def _mean_heads(adapters: Sequence[SavedAdapter], shares: Sequence[float]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for a in adapters for name in a.dense):
        having = [
            (a.dense[name], p)
            for a, p in zip(adapters, shares, strict=True)
            if name in a.dense and p > 0
        ]
        if not having:
            continue
        shapes = {tuple(t.shape) for t, _ in having}
        if len(shapes) > 1:
            raise InputError(
                f"{name}: saved heads of the shapes {' and '.join(map(str, sorted(shapes)))}; only "
                "heads of one shape can be averaged"
            )
        total = sum(p for _, p in having)
        mean = torch.stack([t.double() * (p / total) for t, p in having]).sum(0)
        out[name] = mean.to(having[0][0].dtype)
    return out


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
        names=list(_target_names(adapter) or sorted(adapter.deltas)),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        model_name=_base_name(config),
        revision=config.get("revision"),
        task_type=config.get("task_type"),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
    )
    try:
        write_adapter(path, adapter.deltas, targets, adapter.dense)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    back = load_adapter(path)
    if not _equal(back.deltas, adapter.deltas) or back.dense.keys() != adapter.dense.keys():
        raise CheckpointError(f"{path}: what was read back differs from what was written")


def _equal(one: Deltas, other: Deltas) -> bool:
    """Number by number: `alpha = r` gives back the very factors that were written."""
    if one.keys() != other.keys():
        return False
    for name, x in one.items():
        mine, theirs = as_factors(x), as_factors(other[name])
        if not (torch.equal(mine.A, theirs.A) and torch.equal(mine.B, theirs.B)):
            return False
    return True
