"""Heads of several adapters become one: what is averaged, and which rows stand for which label."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters.bases import base_config, skeletons
from fedlora.adapters.contents import same_weights
from fedlora.adapters.saved_adapter import SavedAdapter
from fedlora.errors import InputError

_PLACEHOLDER = re.compile(r"^LABEL_(\d+)$")
_LAST = ("score", "classifier", "out_proj", "logits_proj", "output", "fc", "head", "decoder")
"""Last layers of heads, where the base's class is not known."""
_INNER = ("dense", "pre_classifier", "pooler", "fc1", "norm", "LayerNorm")


@dataclass(frozen=True)
class Heads:
    """What became of what was trained whole.

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


def label_names(model_config: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """The labels a `config.json` names, in the order of their ids; None where it names none, or
    only numbers them.

    Raises:
        InputError: it names them, but not one for each id.
    """
    found = _named(model_config)
    return None if found is None or _numbered(found) else found


def _named(model_config: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """As `label_names`, with numbers: `LABEL_3`, `3` and 3 are the same name."""
    config = model_config or {}
    given, turned = config.get("id2label"), config.get("label2id")
    if not given and turned:
        if not isinstance(turned, Mapping):
            raise InputError("config.json: label2id is no object; expected names and numbers")
        given = {number: name for name, number in turned.items()}
    if not given:
        return None
    try:
        by_id = {int(number): str(name) for number, name in given.items()}
    except (TypeError, ValueError, AttributeError):
        raise InputError(
            "config.json: id2label is no object of numbers and names; expected "
            '{"0": "first label", "1": "second label"}'
        ) from None
    if sorted(by_id) != list(range(len(given))):
        raise InputError(
            f"config.json: id2label numbers its {len(given)} labels {sorted(by_id)}; expected 0 to "
            f"{len(given) - 1}, each once"
        )
    names = tuple(_PLACEHOLDER.sub(r"\1", by_id[i]) for i in range(len(by_id)))
    if len(set(names)) < len(names):
        raise InputError(f"config.json: id2label names a label twice: {', '.join(names)}")
    return names


def _numbered(names: Sequence[str]) -> bool:
    return sorted(names) == sorted(str(i) for i in range(len(names)))


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
    beside = next((dict(a.model_config) for a, _ in counted if a.model_config), None)
    heads = [(a, p) for a, p in counted if _classifies(a)]
    if not heads:
        return Heads(_mean(having, {}), (), beside, ())
    configs = [a.model_config or base_config(a.config) for a, _ in heads]
    named = [_named_of(a, config) for (a, _), config in zip(heads, configs, strict=True)]
    orders = _common_orders([a for a, _ in heads], named)
    if orders is None:
        return Heads(_mean(having, {}), (), beside, ())
    union = tuple(dict.fromkeys(name for names in orders for name in names))
    config = next(dict(c) for c, names in zip(configs, named, strict=True) if c and names)
    config["id2label"] = {str(i): name for i, name in enumerate(union)}
    config["label2id"] = {name: i for i, name in enumerate(union)}
    config.pop("_num_labels", None)
    if "num_labels" in config:
        config["num_labels"] = len(union)
    if all(names == union for names in orders):
        return Heads(_mean(having, {}), union, config, ())
    rows = {}
    for (a, _), own, names in zip(heads, configs, orders, strict=True):
        rows[id(a)] = _label_rows(a, own or {}, len(names)), [union.index(n) for n in names]
    notes = [
        f"the label {name} is that of {_whose(one[0].source)} alone"
        for name in union
        if len(one := [a for (a, _), names in zip(heads, orders, strict=True) if name in names])
        == 1
        and len(heads) > 1
    ]
    return Heads(_mean(having, rows, len(union)), union, config, tuple(notes))


def _whose(source: str) -> str:
    return source or "one adapter"


def _classifies(adapter: SavedAdapter) -> bool:
    """Whether an adapter is a classifier's, of whatever is classified."""
    task = adapter.config.get("task_type")
    if task is not None:
        return task in ("SEQ_CLS", "TOKEN_CLS")
    known = (adapter.model_config or {}).get("architectures")
    mapping = adapter.config.get("auto_mapping")
    kinds = [*(known if isinstance(known, list) else [])]
    if isinstance(mapping, Mapping):
        kinds.append(mapping.get("base_model_class"))
    return any(str(kind).endswith("Classification") for kind in kinds)


def _named_of(adapter: SavedAdapter, config: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """An adapter's labels. Those of its base count only where they are as many as the head has
    rows: a head of its own has other labels."""
    try:
        names = _named(config)
    except InputError as error:
        if adapter.model_config is None:
            return None
        raise InputError(f"{_whose(adapter.source)}: {error}") from None
    if names is None or adapter.model_config is not None:
        return names
    if _numbered(names) or (adapter.dense and not _label_rows(adapter, config or {}, len(names))):
        return None
    return names


def _common_orders(
    adapters: Sequence[SavedAdapter], named: Sequence[tuple[str, ...] | None]
) -> list[tuple[str, ...]] | None:
    """The labels of each adapter's rows; None: rows are matched by their numbers."""
    known = [names for names in named if names is not None]
    sets = {frozenset(names) for names in known}
    if (
        len(known) == len(named)
        and len(sets) == 1
        and not (_numbered(known[0]) and all(list(n) == sorted(n, key=int) for n in known))
    ):
        return known
    if all(names is None or _numbered(names) for names in named):
        return None
    bare = next(
        (a for a, n in zip(adapters, named, strict=True) if n is None or _numbered(n)), None
    )
    if bare is not None:
        told = next(n for n in known if not _numbered(n))
        raise InputError(
            f"{_whose(bare.source)}: does not say what labels the rows of its head stand for, and "
            f"another adapter has {', '.join(told)}, in this order; put a config.json beside it "
            'with "id2label": {"0": "...", "1": "..."}, in the order it was trained with'
        )
    alike: dict[str, str] = {}
    for name in dict.fromkeys(name for names in known for name in names):
        other = alike.setdefault(" ".join(name.split()).casefold(), name)
        if other != name:
            raise InputError(
                f"the labels {other!r} and {name!r} differ in case or white space alone; write "
                "them the same way in every config.json (id2label), or rename one if they are two"
            )
    return known


def _label_rows(
    adapter: SavedAdapter, model_config: Mapping[str, Any], number: int
) -> dict[str, int]:
    """The parameters of a head that have a row for each label, and along which dimension.

    They are those whose shape changes with the number of labels in the base's own class; where
    that is not known, those of the last layer.
    """
    for dims in _by_class(adapter, model_config, number):
        found = {n: dims[n] for n in adapter.dense if n in dims}
        if found and all(adapter.dense[n].shape[d] == number for n, d in found.items()):
            return found
    rows = [n for n, t in adapter.dense.items() if t.ndim and t.shape[0] == number]
    owners = dict.fromkeys(n.rpartition(".")[0] for n in rows)
    last = [o for o in owners if o.rpartition(".")[2] not in _INNER]
    if len(last) > 1:
        last = [o for o in last if o.rpartition(".")[2] in _LAST]
    return {n: 0 for n in rows if n.rpartition(".")[0] in last[-1:]}


def _by_class(
    adapter: SavedAdapter, model_config: Mapping[str, Any], number: int
) -> list[dict[str, int]]:
    """For each class the adapter may be of: parameter -> the dimension of its labels."""
    shapes = []
    for count in (number, number + 1):
        own = {k: v for k, v in model_config.items() if k not in ("label2id", "num_labels")}
        own["id2label"] = {i: f"LABEL_{i}" for i in range(count)}
        own["label2id"] = {f"LABEL_{i}": i for i in range(count)}
        models = skeletons(adapter.config, own) if model_config.get("model_type") else ()
        shapes.append([{n: tuple(p.shape) for n, p in m.named_parameters()} for m in models])
    out = []
    for small, large in zip(*shapes, strict=False):
        out.append(
            {
                name: next(d for d, size in enumerate(shape) if size != large[name][d])
                for name, shape in small.items()
                if large.get(name, shape) != shape
            }
        )
    return out


def _mean(
    having: Sequence[tuple[SavedAdapter, float]],
    rows: Mapping[int, tuple[dict[str, int], list[int]]],
    number: int = 0,
) -> dict[str, Tensor]:
    """The mean of each parameter; of those with a row for each label, of each row."""
    out: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for a, _ in having for name in a.dense):
        parts = [(a, a.dense[name], p) for a, p in having if name in a.dense]
        dims = {rows[id(a)][0].get(name) for a, _, _ in parts if id(a) in rows}
        if rows and dims - {None}:
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
    rows: Mapping[int, tuple[dict[str, int], list[int]]],
    number: int,
) -> Tensor:
    dims = {rows[id(a)][0].get(name) if id(a) in rows else None for a, _, _ in parts}
    moved = []
    for a, t, p in parts:
        dim = rows[id(a)][0].get(name) if id(a) in rows else None
        if dim is None or len(dims) > 1 or t.shape[dim] != len(rows[id(a)][1]):
            raise InputError(
                f"{name}: {_whose(a.source)}: has the shape {tuple(t.shape)}, which does not fit "
                "the labels that its config.json names (id2label)"
            )
        moved.append((t.double().movedim(dim, 0), rows[id(a)][1], p))
    rest = {tuple(t.shape[1:]) for t, _, _ in moved}
    if len(rest) > 1:
        raise InputError(f"{name}: saved heads of different widths cannot be averaged")
    total = torch.zeros(number, *rest.pop(), dtype=torch.float64)
    weight = torch.zeros(number, dtype=torch.float64)
    for t, places, p in moved:
        total[places] += p * t
        weight[places] += p
    mean = total / weight.reshape(-1, *[1] * (total.ndim - 1))
    (dim,) = dims
    assert dim is not None
    return mean.movedim(0, dim).to(parts[0][1].dtype).contiguous()


# --- weights of the base that lie in adapters ---


def common_base_weights(
    adapters: Sequence[SavedAdapter],
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Weights of the base that lie in some of the adapters, where they are equal in all of these,
    and what to say about them.

    Raises:
        InputError: they differ.
    """
    out: dict[str, Tensor] = {}
    notes = []
    for name in dict.fromkeys(name for a in adapters for name in a.base):
        having = [a for a in adapters if name in a.base]
        first = having[0]
        for other in having[1:]:
            if not same_weights(first.base[name], other.base[name]):
                raise InputError(_differs(name, first, other))
        out[name] = max((a.base[name] for a in having), key=lambda t: t.element_size())
        if len(having) < len(adapters):
            notes.append(f"{name}, a weight of the base, is that of {_whose(first.source)}")
    for name in dict.fromkeys(name for a in adapters for name in a.fingerprints):
        found = {a.fingerprints[name] for a in adapters if a.fingerprints.get(name)}
        if len({text.rpartition(" ")[0] for text in found}) < len(found):
            raise InputError(
                f"{name}: these adapters repeat weights of their base, and they differ; adapters "
                "of different bases cannot be combined"
            )
    return out, tuple(notes)


def _differs(name: str, one: SavedAdapter, other: SavedAdapter) -> str:
    a, b = one.base[name], other.base[name]
    both = f"{_whose(one.source)} and {_whose(other.source)}"
    if a.shape != b.shape:
        return (
            f"{name}: of the shapes {tuple(a.shape)} and {tuple(b.shape)} in {both}: their "
            "vocabularies were resized to different sizes. Resize it once, save that model, and "
            "train all adapters on it"
        )
    a, b = a.reshape(len(a) if a.ndim else 1, -1), b.reshape(len(b) if b.ndim else 1, -1)
    rows = int((a.double() != b.double()).any(1).sum())
    return (
        f"{name}: {both} repeat this weight of the base, and {rows} of its {len(a)} rows "
        "differ. Rows that a resized vocabulary got are drawn at random by everybody: resize "
        "it once, save that model, and train all adapters on it. If the weight was trained, name "
        "its module in modules_to_save of every adapter_config.json, and it is averaged"
    )
