"""Combines adapters that were trained apart into one, for `fedlora aggregate` and in Python.

Any rule that needs no shared start does it, by the same `encode` and `finalize` as in a federation.
Memory stays near the size of the adapters: no base model, and no m x n matrix unless the factors of
the sum would be larger than that.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from fedlora.adapters.bases import base_config, base_name, check_bases, common_base, skeletons
from fedlora.adapters.contents import holds, modules_to_save
from fedlora.adapters.heads import combine_heads, common_base_weights
from fedlora.adapters.names import common_names
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
        labels: of a classifier's rows; empty where no adapter names them.
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
        same_base: bases that are named differently are one; else that is noted in `notes`, and
            warned of.
        options: the rule's own.

    Raises:
        InputError: adapters of different bases or of ranks the rule cannot combine, heads that do
            not fit each other, one module under two names, or impossible values.
    """
    rule, chosen = _rule(method, options)
    shares = _shares(weights, len(adapters))
    if rank is not None and energy is not None:
        raise InputError("rank and energy exclude each other; give one of them")
    if rank is not None and rank < 1:
        raise InputError(f"rank: {rank} must be at least 1")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise InputError(f"energy: {energy} must be above 0 and at most 1")
    notes = check_bases([a.config for a in adapters], same_base)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    adapters = _with_common_names(adapters)
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
            found[name] = zeros(shapes[name], 0)
        bound = min(*shapes[name], sum(x.rank for x, _ in having))
        deltas[name] = kept = _cut(found[name], bound, rank, energy)
        size = norm(wanted)
        if size <= 1e-6 * sum(p * norm(x) for x, p in having):
            size = 0.0  # the terms cancel; what is left is rounding
        lost = norm(subtract(kept, wanted))
        ranks = tuple(None if x is None else x.rank for x in parts)
        layers[name] = Layer(ranks, kept.rank, lost / size if size else 0.0)
    heads = combine_heads(adapters, shares)
    dense = heads.dense
    base, said = common_base_weights(adapters)
    for owner in sorted({name.rpartition(".")[0] for name in dense} & deltas.keys(), key=natural):
        raise InputError(
            f"{owner}: one adapter changes it by LoRA, another was trained whole there "
            "(modules_to_save); these cannot be combined"
        )
    whole = [m for m in config["modules_to_save"] if holds(dense, m)]
    whole += {
        n.rpartition(".")[0]: n for n in dense if not any(holds({n: dense[n]}, m) for m in whole)
    }
    config["modules_to_save"] = whole or None
    return Aggregated(
        deltas,
        dense,
        config,
        layers,
        tuple(shares),
        heads.labels,
        (*notes, *heads.notes, *said),
        base={name: value for name, value in base.items() if name not in dense},
        embeddings=frozenset(name for a in adapters for name in a.embeddings),
        model_config=heads.model_config,
    )


def _with_common_names(adapters: Sequence[SavedAdapter]) -> list[SavedAdapter]:
    """The same adapters, a module under one name in all of them."""

    def models(twins: bool) -> Iterator[Any]:
        for a in adapters:
            own = a.model_config or base_config(a.config)
            yield from skeletons(a.config, own, only_renamed=not twins)

    named = [
        {name: x.shape for name, x in a.deltas.items()}
        | {name: tuple(t.shape) for name, t in [*a.dense.items(), *a.base.items()]}
        for a in adapters
    ]
    sources = [a.source or f"adapter {i}" for i, a in enumerate(adapters, 1)]
    out = []
    for a, new in zip(adapters, common_names(named, sources, models), strict=True):
        if len(set(new.values())) < len(new):
            raise InputError(f"{a.source}: holds one module under two names")
        out.append(
            replace(
                a,
                deltas={new[name]: x for name, x in a.deltas.items()},
                dense={new[name]: t for name, t in a.dense.items()},
                base={new[name]: t for name, t in a.base.items()},
                embeddings=frozenset(new[name] for name in a.embeddings),
            )
        )
    return out


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
    tables = {name for a in adapters for name in a.embeddings}
    for adapter in adapters:
        for name, x in adapter.deltas.items():
            if (name in tables) != (name in adapter.embeddings):
                raise InputError(
                    f"{name}: an embedding in one adapter and a linear layer in another; these are "
                    "for different base models"
                )
            if out.setdefault(name, x.shape) != x.shape:
                raise InputError(
                    f"{name}: shapes {out[name]} and {x.shape}; these adapters are for different "
                    "base models"
                )
    return out


def _common_config(adapters: Sequence[SavedAdapter]) -> dict[str, Any]:
    """What all have in common; the first one's where it does not matter.

    Raises:
        InputError: another task.
    """
    tasks = list(dict.fromkeys(t for a in adapters if (t := a.config.get("task_type")) is not None))
    if len(tasks) > 1:
        raise InputError(
            f"task_type: {tasks[0]!r} and {tasks[1]!r}; these adapters do not belong together"
        )
    name = common_base([base_name(a.config) for a in adapters])
    # A revision is one of the base that is named.
    same = [a.config for a in adapters if name is None or base_name(a.config) == name]
    revision = next((c["revision"] for c in same if c.get("revision")), None)
    out: dict[str, Any] = {"revision": revision, "task_type": tasks[0] if tasks else None}
    # PEFT saves what its last layer was; it finds the rest out itself when it loads.
    out["fan_in_fan_out"] = any(a.config.get("fan_in_fan_out") for a in adapters)
    saved = [m for a in adapters for m in modules_to_save(a.config)]
    lists = [_target_names(a) for a in adapters]
    names = None if None in lists else sorted({name for x in lists for name in x or []})
    return {
        **out,
        "base_model_name_or_path": name,
        "modules_to_save": sorted(set(saved)),
        "target_modules": names,
    }


def _target_names(adapter: SavedAdapter) -> list[str] | None:
    """PEFT's `target_modules`, where that alone says which modules there are, by the names that
    they have here."""
    names = adapter.config.get("target_modules")
    if not isinstance(names, list) or any(
        adapter.config.get(key) not in (None, [], "")
        for key in ("layers_to_transform", "exclude_modules", "target_parameters")
    ):
        return None
    ends = [f".{name}" for name in names]
    if any(not any(f".{module}".endswith(end) for end in ends) for module in adapter.deltas):
        return None
    if any(not any(f".{module}".endswith(end) for module in adapter.deltas) for end in ends):
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

    widths = {name: max(of) for name, of in ranks.items()}
    averages_factors = "factors" in rule.secure_sum
    state = ServerState(
        round=0,
        adapter={n: zeros(shapes[n], width) for n, width in widths.items()}
        if averages_factors
        else {},
        ranks=dict(enumerate(levels)),
    )
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


def _cut(x: Delta, bound: int, rank: int | None, energy: float | None) -> LowRank:
    """As factors of no more directions than `bound`, which every rule's result has at the most."""
    if rank is not None or energy is not None:
        return truncate(x, rank=rank, energy=energy)[0]
    if isinstance(x, LowRank) and x.rank <= bound:
        return x
    return prefix(refactor(x), bound)


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
    """Number by number: `alpha = r` gives back the very factors that were written."""
    if one.keys() != other.keys():
        return False
    for name, x in one.items():
        mine, theirs = as_factors(x), as_factors(other[name])
        if not (torch.equal(mine.A, theirs.A) and torch.equal(mine.B, theirs.B)):
            return False
    return True
