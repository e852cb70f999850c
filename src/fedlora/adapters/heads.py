"""Averages the heads of several classifiers into one, row by row where their labels are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters.bases import base_config
from fedlora.adapters.labels import classifies, common_orders, label_rows, labels_of_head, whose
from fedlora.adapters.saved_adapter import SavedAdapter
from fedlora.errors import InputError


@dataclass(frozen=True)
class Heads:
    """The averaged parameters that were trained whole.

    Args:
        dense: parameter -> its mean.
        labels: of the result in the order of its rows; empty: no adapter says.
        model_config: the result's `config.json`.
        notes: what the user should know.
    """

    dense: dict[str, Tensor]
    labels: tuple[str, ...]
    model_config: dict[str, Any] | None
    notes: tuple[str, ...]


def combine_heads(adapters: Sequence[SavedAdapter], shares: Sequence[float]) -> Heads:
    """The weighted mean of what was trained whole, over the adapters that have it.

    Rows of a classifier's last layer are matched by the names of their labels (`config.json` beside
    the adapter, or the base's own where it is on this machine), in the order of the first adapter,
    and each is averaged over the adapters that have the label. Without names in all of them rows
    are matched by their numbers.

    Raises:
        InputError: only some name their labels, or heads of different shapes.
    """
    counted = [(a, p) for a, p in zip(adapters, shares, strict=True) if p > 0]
    having = [(a, p) for a, p in counted if a.dense]
    classifiers = [a for a, _ in counted if classifies(a)]
    configs = [a.model_config or base_config(a.config) for a in classifiers]
    named = [labels_of_head(a, config) for a, config in zip(classifiers, configs, strict=True)]
    orders = common_orders(classifiers, named) if classifiers else None
    if orders is None:
        beside = next((dict(a.model_config) for a, _ in counted if a.model_config), None)
        return Heads(_mean(having, {}), (), beside, ())
    union = tuple(dict.fromkeys(name for names in orders for name in names))
    config = _with_labels(
        next(c for c, names in zip(configs, named, strict=True) if c and names), union
    )
    if all(names == union for names in orders):
        return Heads(_mean(having, {}), union, config, ())
    rows = {
        id(a): _Rows(label_rows(a, own or {}, len(names)), [union.index(n) for n in names])
        for a, own, names in zip(classifiers, configs, orders, strict=True)
    }
    notes = _notes_on_single(classifiers, orders) if len(classifiers) > 1 else ()
    return Heads(_mean(having, rows, len(union)), union, config, notes)


@dataclass(frozen=True)
class _Rows:
    """Which rows of the result the rows of one adapter's head are added to.

    Args:
        dims: parameter with a row for each label -> the dimension of its labels.
        targets: for each of its rows, the number of a row of the result.
    """

    dims: Mapping[str, int]
    targets: Sequence[int]


def _with_labels(config: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """A `config.json` that names these labels."""
    out = dict(config)
    out["id2label"] = {str(i): name for i, name in enumerate(labels)}
    out["label2id"] = {name: i for i, name in enumerate(labels)}
    out.pop("_num_labels", None)
    if "num_labels" in out:
        out["num_labels"] = len(labels)
    return out


def _notes_on_single(
    adapters: Sequence[SavedAdapter], orders: Sequence[Sequence[str]]
) -> tuple[str, ...]:
    """What to say of labels that one adapter alone has: nothing is averaged there."""
    notes = []
    for label in dict.fromkeys(name for names in orders for name in names):
        having = [a for a, names in zip(adapters, orders, strict=True) if label in names]
        if len(having) == 1:
            notes.append(f"the label {label} is that of {whose(having[0].source)} alone")
    return tuple(notes)


def _mean(
    having: Sequence[tuple[SavedAdapter, float]],
    rows: Mapping[int, _Rows],
    number: int = 0,
) -> dict[str, Tensor]:
    """The mean of each parameter; of those with a row for each label, of each row.

    Args:
        having: adapters with parameters trained whole, and their shares.
        rows: `id` of an adapter -> where its rows go; empty: all have the same rows.
        number: of labels in the result.
    """
    out: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for a, _ in having for name in a.dense):
        parts = [(a, a.dense[name], p) for a, p in having if name in a.dense]
        if any(name in rows[id(a)].dims for a, _, _ in parts if id(a) in rows):
            out[name] = _mean_rows(name, parts, rows, number)
            continue
        shapes = {tuple(t.shape) for _, t, _ in parts}
        if len(shapes) > 1:
            raise InputError(
                f"{name}: saved heads of the shapes {' and '.join(map(str, sorted(shapes)))}; only "
                "heads of one shape can be averaged, or classifiers that all name their labels in "
                "a config.json beside them (id2label)"
            )
        total = sum(p for _, _, p in parts)
        mean = torch.stack([t.double() * (p / total) for _, t, p in parts]).sum(0)
        out[name] = mean.to(parts[0][1].dtype)
    return out


def _mean_rows(
    name: str,
    parts: Sequence[tuple[SavedAdapter, Tensor, float]],
    rows: Mapping[int, _Rows],
    number: int,
) -> Tensor:
    """The mean of a parameter row by row, each over the adapters that have its label."""
    dims = {rows[id(a)].dims.get(name) if id(a) in rows else None for a, _, _ in parts}
    moved = []  # with the labels in front, where they go, and the share
    for a, t, p in parts:
        own = rows.get(id(a))
        dim = own.dims.get(name) if own else None
        if own is None or dim is None or len(dims) > 1 or t.shape[dim] != len(own.targets):
            raise InputError(
                f"{name}: {whose(a.source)}: has the shape {tuple(t.shape)}, which does not fit "
                "the labels that its config.json names (id2label)"
            )
        moved.append((t.double().movedim(dim, 0), own.targets, p))
    widths = {tuple(t.shape[1:]) for t, _, _ in moved}
    if len(widths) > 1:
        raise InputError(f"{name}: saved heads of different widths cannot be averaged")
    total = torch.zeros(number, *widths.pop(), dtype=torch.float64)
    weight = torch.zeros(number, dtype=torch.float64)
    for t, targets, p in moved:
        total[targets] += p * t
        weight[targets] += p
    mean = total / weight.reshape(-1, *[1] * (total.ndim - 1))
    (dim,) = dims
    assert dim is not None
    return mean.movedim(0, dim).to(parts[0][1].dtype).contiguous()
