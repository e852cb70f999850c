"""Tells which labels the rows of a classifier's head stand for, and which labels adapters share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.adapters.bases import skeletons
from fedlora.adapters.saved_adapter import SavedAdapter
from fedlora.errors import InputError

_PLACEHOLDER = re.compile(r"^LABEL_(\d+)$")
_LAST = ("score", "classifier", "out_proj", "logits_proj", "output", "fc", "head", "decoder")
"""Last layers of heads, where the base's class is not known."""
_INNER = ("dense", "pre_classifier", "pooler", "fc1", "norm", "LayerNorm")
"""Layers of heads that are not the last, though they may be as wide as there are labels."""


def label_names(model_config: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """The labels that a `config.json` names, in the order of their ids.

    None where it names no labels, or numbers them only (`LABEL_0`).

    Raises:
        InputError: it names them, but not one for each id.
    """
    names = named_labels(model_config)
    return None if names is None or numbered(names) else names


def named_labels(model_config: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """As `label_names`, but labels that are only numbered are names too.

    `LABEL_3`, `3` and 3 are the same name.
    """
    config = model_config or {}
    by_number, by_name = config.get("id2label"), config.get("label2id")
    if not by_number and by_name:
        if not isinstance(by_name, Mapping):
            raise InputError("config.json: label2id is no object; expected names and numbers")
        by_number = {number: name for name, number in by_name.items()}
    if not by_number:
        return None
    try:
        by_id = {int(number): str(name) for number, name in by_number.items()}
    except (TypeError, ValueError, AttributeError):
        raise InputError(
            "config.json: id2label is no object of numbers and names; expected "
            '{"0": "first label", "1": "second label"}'
        ) from None
    if sorted(by_id) != list(range(len(by_number))):
        raise InputError(
            f"config.json: id2label numbers its {len(by_number)} labels {sorted(by_id)}; "
            f"expected 0 to {len(by_number) - 1}, each once"
        )
    names = tuple(_PLACEHOLDER.sub(r"\1", by_id[i]) for i in range(len(by_id)))
    if len(set(names)) < len(names):
        raise InputError(f"config.json: id2label names a label twice: {', '.join(names)}")
    return names


def numbered(names: Sequence[str]) -> bool:
    """Whether labels are just the numbers of their ids, in any order, and so have no names."""
    return sorted(names) == sorted(str(i) for i in range(len(names)))


def whose(source: str) -> str:
    """What an adapter is called in a message."""
    return source or "one adapter"


def classifies(adapter: SavedAdapter) -> bool:
    """Whether an adapter is that of a classifier, of texts or of tokens."""
    task = adapter.config.get("task_type")
    if task is not None:
        return task in ("SEQ_CLS", "TOKEN_CLS")
    listed = (adapter.model_config or {}).get("architectures")
    classes = list(listed) if isinstance(listed, list) else []
    mapping = adapter.config.get("auto_mapping")
    if isinstance(mapping, Mapping):
        classes.append(mapping.get("base_model_class"))
    return any(str(name).endswith("Classification") for name in classes)


def labels_of_head(
    adapter: SavedAdapter, config: Mapping[str, Any] | None
) -> tuple[str, ...] | None:
    """An adapter's labels in the order of its head's rows; None where nothing names them.

    The base's own labels count only where they are as many as the head has rows: a head that was
    made for other data has other labels.

    Args:
        adapter: of a classifier.
        config: the `config.json` beside the adapter, or else the base's.

    Raises:
        InputError: the `config.json` beside the adapter names labels that cannot be.
    """
    try:
        names = named_labels(config)
    except InputError as error:
        if adapter.model_config is None:
            return None
        raise InputError(f"{whose(adapter.source)}: {error}") from None
    if names is None or adapter.model_config is not None:
        return names
    if numbered(names) or (adapter.dense and not label_rows(adapter, config or {}, len(names))):
        return None
    return names


def common_orders(
    adapters: Sequence[SavedAdapter], named: Sequence[tuple[str, ...] | None]
) -> list[tuple[str, ...]] | None:
    """The labels of each adapter's rows, by which rows are matched.

    None says that rows are matched by their numbers, since no adapter names its labels.

    Args:
        adapters: classifiers.
        named: each one's labels, as `labels_of_head` gives them.

    Raises:
        InputError: only some name their labels, or two labels differ in case or space alone.
    """
    known = [names for names in named if names is not None]
    if len(known) == len(named) and _alike(known):
        return known
    if all(names is None or numbered(names) for names in named):
        return None
    _refuse_unnamed(adapters, named)
    _refuse_near_labels(known)
    return known


def _alike(named: Sequence[tuple[str, ...]]) -> bool:
    """Whether all have the same labels, and these say more than the order of the rows does."""
    in_order = all(numbered(names) and list(names) == sorted(names, key=int) for names in named)
    return len({frozenset(names) for names in named}) == 1 and not in_order


def _refuse_unnamed(
    adapters: Sequence[SavedAdapter], named: Sequence[tuple[str, ...] | None]
) -> None:
    """Refuse an adapter without names for its labels beside one that has them."""
    for adapter, names in zip(adapters, named, strict=True):
        if names is None or numbered(names):
            others = next(n for n in named if n is not None and not numbered(n))
            raise InputError(
                f"{whose(adapter.source)}: does not say what labels the rows of its head stand "
                f"for, and another adapter has {', '.join(others)}, in this order; put a "
                'config.json beside it with "id2label": {"0": "...", "1": "..."}, in the order it '
                "was trained with"
            )


def _refuse_near_labels(named: Sequence[tuple[str, ...]]) -> None:
    """Refuse labels that differ in case or white space alone, which are one label misspelt."""
    first_spelling: dict[str, str] = {}
    for name in dict.fromkeys(name for names in named for name in names):
        other = first_spelling.setdefault(" ".join(name.split()).casefold(), name)
        if other != name:
            raise InputError(
                f"the labels {other!r} and {name!r} differ in case or white space alone; write "
                "them the same way in every config.json (id2label), or rename one if they are two"
            )


# --- where a head has its rows ---


def label_rows(
    adapter: SavedAdapter, model_config: Mapping[str, Any], number: int
) -> dict[str, int]:
    """The parameters of a head that have a row for each label, and along which dimension.

    They are those whose shape changes with the number of labels in the base's own class; where
    that is not known, those of the last layer.

    Args:
        adapter: of a classifier.
        model_config: the `config.json` beside the adapter, or else the base's.
        number: of labels.
    """
    for dims in _label_dims_by_class(adapter, model_config, number):
        saved = {n: dims[n] for n in adapter.dense if n in dims}
        if saved and all(adapter.dense[n].shape[d] == number for n, d in saved.items()):
            return saved
    rows = [n for n, t in adapter.dense.items() if t.ndim and t.shape[0] == number]
    layers = dict.fromkeys(n.rpartition(".")[0] for n in rows)
    last = [layer for layer in layers if layer.rpartition(".")[2] not in _INNER]
    if len(last) > 1:
        last = [layer for layer in last if layer.rpartition(".")[2] in _LAST]
    return {n: 0 for n in rows if n.rpartition(".")[0] in last[-1:]}


def _label_dims_by_class(
    adapter: SavedAdapter, model_config: Mapping[str, Any], number: int
) -> list[dict[str, int]]:
    """Parameter -> the dimension of its labels, for each class that the adapter's model may have.

    Models without weights are made for so many labels and for one more; a parameter in which this
    makes a difference has a row for each label.
    """
    shapes = []
    for count in (number, number + 1):
        config = {k: v for k, v in model_config.items() if k not in ("label2id", "num_labels")}
        config["id2label"] = {i: f"LABEL_{i}" for i in range(count)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(count)}
        models = skeletons(adapter.config, config) if model_config.get("model_type") else ()
        shapes.append([{n: tuple(p.shape) for n, p in m.named_parameters()} for m in models])
    by_class = []
    for small, large in zip(*shapes, strict=False):
        by_class.append(
            {
                name: next(d for d, size in enumerate(shape) if size != large[name][d])
                for name, shape in small.items()
                if large.get(name, shape) != shape
            }
        )
    return by_class
