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
        dense: parameter -> its mean, in the dtype of the first adapter that has it.
        labels: of the rows of the head, in order; empty where no adapter names them.
        model_config: the result's `config.json`; None where no adapter has one.
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

    Args:
        adapters: with heads or without.
        shares: weights of the adapters; those with 0 are left out. They need not sum to one, and
            a negative one takes a head out of a mean again.

    Raises:
        InputError: only some name their labels, heads of different shapes, or weights of those
            that have a head whose sum is not positive.
    """
    counted = [(a, p) for a, p in zip(adapters, shares, strict=True) if p != 0]
    with_heads = [(a, p) for a, p in counted if a.dense]
    classifiers = [a for a, _ in counted if classifies(a)]
    configs = [a.model_config or base_config(a.config) for a in classifiers]
    named = [labels_of_head(a, config) for a, config in zip(classifiers, configs, strict=True)]
    orders = common_orders(classifiers, named) if classifiers else None
    if orders is None:
        first_config = next((dict(a.model_config) for a, _ in counted if a.model_config), None)
        return Heads(_mean(with_heads, {}), (), first_config, ())
    union = tuple(dict.fromkeys(name for names in orders for name in names))
    config = _with_labels(
        next(c for c, names in zip(configs, named, strict=True) if c and names), union
    )
    if all(names == union for names in orders):
        return Heads(_mean(with_heads, {}), union, config, ())
    rows = {
        id(a): _Rows(label_rows(a, model_config or {}, len(names)), [union.index(n) for n in names])
        for a, model_config, names in zip(classifiers, configs, orders, strict=True)
    }
    notes = _notes_on_single(classifiers, orders) if len(classifiers) > 1 else ()
    return Heads(_mean(with_heads, rows, len(union)), union, config, notes)


@dataclass(frozen=True)
class _Rows:
    """Where the rows of one adapter's head go in the result.

    Args:
        dims: parameter that has a row for each label -> the dimension along which the rows lie.
        targets: for each of its rows, the number of the row of the result it is added to.
    """

    dims: Mapping[str, int]
    targets: Sequence[int]


def _with_labels(config: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """A `config.json` with these labels in the place of its own."""
    relabelled = dict(config)
    relabelled["id2label"] = {str(i): name for i, name in enumerate(labels)}
    relabelled["label2id"] = {name: i for i, name in enumerate(labels)}
    relabelled.pop("_num_labels", None)
    if "num_labels" in relabelled:
        relabelled["num_labels"] = len(labels)
    return relabelled


def _notes_on_single(
    adapters: Sequence[SavedAdapter], orders: Sequence[Sequence[str]]
) -> tuple[str, ...]:
    """A note on each label that one adapter alone has, for nothing is averaged there."""
    notes = []
    for label in dict.fromkeys(name for names in orders for name in names):
        with_label = [a for a, names in zip(adapters, orders, strict=True) if label in names]
        if len(with_label) == 1:
            notes.append(f"the label {label} is that of {whose(with_label[0].source)} alone")
    return tuple(notes)


def _mean(
    with_heads: Sequence[tuple[SavedAdapter, float]],
    rows: Mapping[int, _Rows],
    num_labels: int = 0,
) -> dict[str, Tensor]:
    """The weighted mean of each parameter; of one with a row for each label, row by row.

    Args:
        with_heads: adapters with parameters trained whole, and their shares.
        rows: `id` of an adapter -> where its rows go; empty: all have the same rows.
        num_labels: of the result.
    """
    means: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for a, _ in with_heads for name in a.dense):
        parts = [(a, a.dense[name], p) for a, p in with_heads if name in a.dense]
        if any(name in rows[id(a)].dims for a, _, _ in parts if id(a) in rows):
            means[name] = _mean_rows(name, parts, rows, num_labels)
            continue
        shapes = {tuple(t.shape) for _, t, _ in parts}
        if len(shapes) > 1:
            raise InputError(
                f"{name}: saved heads of the shapes {' and '.join(map(str, sorted(shapes)))}; only "
                "heads of one shape can be averaged, or classifiers that all name their labels in "
                "a config.json beside them (id2label)"
            )
        total = sum(p for _, _, p in parts)
        _check_positive(name, total)
        mean = torch.stack([t.double() * (p / total) for _, t, p in parts]).sum(0)
        means[name] = mean.to(parts[0][1].dtype)
    return means


def _mean_rows(
    name: str,
    parts: Sequence[tuple[SavedAdapter, Tensor, float]],
    rows: Mapping[int, _Rows],
    num_labels: int,
) -> Tensor:
    """The weighted mean of a parameter row by row, each over the adapters that have its label.

    Args:
        name: of the parameter.
        parts: adapter, its tensor of this name, its share.
        rows: `id` of an adapter -> where its rows go.
        num_labels: of the result.
    """
    dims = {rows[id(a)].dims.get(name) if id(a) in rows else None for a, _, _ in parts}
    labels_first = []  # tensors with the rows along dimension 0, where these go, shares
    for adapter, tensor, share in parts:
        of_adapter = rows.get(id(adapter))
        dim = of_adapter.dims.get(name) if of_adapter else None
        if (
            of_adapter is None
            or dim is None
            or len(dims) > 1
            or tensor.shape[dim] != len(of_adapter.targets)
        ):
            raise InputError(
                f"{name}: {whose(adapter.source)}: has the shape {tuple(tensor.shape)}, which does "
                "not fit the labels that its config.json names (id2label)"
            )
        labels_first.append((tensor.double().movedim(dim, 0), of_adapter.targets, share))
    widths = {tuple(tensor.shape[1:]) for tensor, _, _ in labels_first}
    if len(widths) > 1:
        raise InputError(f"{name}: saved heads of different widths cannot be averaged")
    total = torch.zeros(num_labels, *widths.pop(), dtype=torch.float64)
    weight = torch.zeros(num_labels, dtype=torch.float64)
    for tensor, targets, share in labels_first:
        total[targets] += share * tensor
        weight[targets] += share
    _check_positive(name, float(weight.min()))
    mean = total / weight.reshape(-1, *[1] * (total.ndim - 1))
    (dim,) = dims
    assert dim is not None
    return mean.movedim(0, dim).to(parts[0][1].dtype).contiguous()


def _check_positive(name: str, total: float) -> None:
    """Refuse weights that cancel: a head is no update, and zero of it means nothing."""
    if total <= 0:
        raise InputError(
            f"{name}: was trained whole and is averaged, and the weights of the adapters that have "
            f"it sum to {total:g}; give weights with a positive sum"
        )
