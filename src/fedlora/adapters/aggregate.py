"""Combines adapters that were trained apart into one, for `fedlora aggregate` and in Python.

Any rule that needs no shared start can be used, with the same `encode` and `finalize` as in a
federation, and merges beyond sums in the space that all updates span (`combining`). Memory stays
near the size of the adapters: no base model is loaded, and no m x n matrix is made unless the
factors of the sum would be larger than it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters.base_fingerprint import compare_bases
from fedlora.adapters.base_weights import common_base_weights
from fedlora.adapters.bases import check_bases
from fedlora.adapters.combining import combine, method_with_options, used_weights
from fedlora.adapters.common import common_config, common_shapes, target_names, with_common_names
from fedlora.adapters.contents import holds, modules_to_save, saved_whole
from fedlora.adapters.heads import combine_heads
from fedlora.adapters.saved_adapter import SavedAdapter, as_factors, load_adapter, write_adapter
from fedlora.errors import CheckpointError, InputError
from fedlora.lowrank import (
    Delta,
    Deltas,
    LowRank,
    add,
    norm,
    prefix,
    refactor,
    scale,
    subtract,
    truncate,
    zeros,
)
from fedlora.model.targets import Targets
from fedlora.text import natural


@dataclass(frozen=True)
class Layer:
    """How one target module was combined.

    Args:
        ranks: its rank in each adapter; None in those that do not have it.
        rank: of the result.
        error: `||dW - dW*||_F / ||dW*||_F` with the exact sum `dW* = sum_k p_k s_k B_k A_k` under
            the weights that are used; 0 where this sum is zero.
    """

    ranks: tuple[int | None, ...]
    rank: int
    error: float


@dataclass(frozen=True)
class Aggregated(SavedAdapter):
    """The result of `aggregate`, ready for `save_adapter`.

    Args:
        layers: target module -> how it was combined.
        weights: of the adapters as they were used. They sum to one; to the number of adapters where
            the merge adds updates up; raw ones are as they were given.
        labels: of the rows of a classifier's head, in order; empty where no adapter names them.
        notes: what the user should know.
        bases: how far the adapters' bases could be compared, in a sentence.
    """

    layers: Mapping[str, Layer]
    weights: tuple[float, ...]
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    bases: str = ""


def aggregate(
    adapters: Sequence[SavedAdapter],
    weights: Sequence[float] | None = None,
    *,
    method: str = "exact",
    raw_weights: bool = False,
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
        method: a rule that needs no shared start (`methods.ONE_SHOT`), or a merge
            (`methods.merges.MERGES`).
        raw_weights: weights are taken as they are and may be negative, to take an adapter out of
            a sum again; for `exact` and merges.
        rank: keep at most this many singular directions of each module.
        energy: keep the fewest whose squared singular values reach this share of their sum.
        same_base: bases that are named differently are the same; without it a warning is given,
            and stands in `notes`.
        options: the rule's or merge's own.

    Raises:
        InputError: adapters of different bases or of ranks the rule cannot combine, heads that do
            not fit each other, one module under two names, or impossible values.
    """
    how, own_options = method_with_options(method, options)
    used = used_weights(how, weights, len(adapters), raw_weights)
    _check_cut(rank, energy)
    bases, base_notes = compare_bases(adapters, same_base)
    base_notes = [*check_bases([a.config for a in adapters], same_base), *base_notes]
    for note in base_notes:
        warnings.warn(note, stacklevel=2)
    adapters = with_common_names(adapters)
    shapes = common_shapes(adapters)
    config = common_config(adapters)
    combined = combine(how, own_options, adapters, used, shapes, raw_weights)
    deltas, layers = {}, {}
    for name in sorted(shapes, key=natural):
        updates = [a.deltas.get(name) for a in adapters]
        # If only adapters of weight zero have the module, nothing was combined.
        total = combined.get(name, zeros(shapes[name], 0))
        deltas[name], layers[name] = _cut_module(total, updates, used, rank, energy)
    heads = combine_heads(adapters, used)
    base, weight_notes = common_base_weights(adapters)
    _refuse_both_ways(deltas, heads.dense)
    config["modules_to_save"] = _names_to_save(config["modules_to_save"], heads.dense)
    return Aggregated(
        deltas,
        heads.dense,
        config,
        layers,
        tuple(used),
        heads.labels,
        (*base_notes, *heads.notes, *weight_notes),
        bases,
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
    weights: Sequence[float],
    rank: int | None,
    energy: float | None,
) -> tuple[LowRank, Layer]:
    """Cut one module's result to the rank that is wanted, and measure how far it is from the sum.

    Args:
        total: what the rule made of the module's updates.
        updates: of the module in each adapter; None in those that do not have it.
        weights: of the adapters, as they are used.
        rank, energy: as `aggregate` takes them.
    """
    terms = [(x, w) for x, w in zip(updates, weights, strict=True) if x is not None]
    exact = add([scale(x, w) for x, w in terms])
    # No rule's result has more directions than the sum may have.
    most_directions = min(*total.shape, sum(x.rank for x, _ in terms))
    kept = _cut(total, most_directions, rank, energy)
    size = norm(exact)
    if size <= 1e-6 * sum(abs(w) * norm(x) for x, w in terms):
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
