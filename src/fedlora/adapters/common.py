"""Finds what adapters have in common before they are combined: names, shapes and configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from fedlora.adapters.bases import base_config, base_name, common_base, skeletons
from fedlora.adapters.contents import modules_to_save
from fedlora.adapters.names import common_names
from fedlora.adapters.saved_adapter import SavedAdapter
from fedlora.errors import InputError


def with_common_names(adapters: Sequence[SavedAdapter]) -> list[SavedAdapter]:
    """The same adapters, in which each module has one name in all of them.

    Raises:
        InputError: nothing tells whether two names are one module's, or an adapter has one module
            under two names.
    """

    def models(has_twins: bool) -> Iterator[Any]:
        for adapter in adapters:
            model_config = adapter.model_config or base_config(adapter.config)
            yield from skeletons(adapter.config, model_config, only_renamed=not has_twins)

    named = [
        {name: x.shape for name, x in a.deltas.items()}
        | {name: tuple(t.shape) for name, t in [*a.dense.items(), *a.base.items()]}
        for a in adapters
    ]
    sources = [a.source or f"adapter {i}" for i, a in enumerate(adapters, 1)]
    renamed = []
    for adapter, new in zip(adapters, common_names(named, sources, models), strict=True):
        if len(set(new.values())) < len(new):
            raise InputError(f"{adapter.source}: holds one module under two names")
        renamed.append(
            replace(
                adapter,
                deltas={new[name]: update for name, update in adapter.deltas.items()},
                dense={new[name]: tensor for name, tensor in adapter.dense.items()},
                base={new[name]: tensor for name, tensor in adapter.base.items()},
                embeddings=frozenset(new[name] for name in adapter.embeddings),
            )
        )
    return renamed


def common_shapes(adapters: Sequence[SavedAdapter]) -> dict[str, tuple[int, int]]:
    """Target module -> `(m, n)`, of every module that an adapter has.

    Raises:
        InputError: a module has two shapes, or is an embedding in some adapters alone.
    """
    shapes: dict[str, tuple[int, int]] = {}
    embeddings = {name for a in adapters for name in a.embeddings}
    for adapter in adapters:
        for name, update in adapter.deltas.items():
            if (name in embeddings) != (name in adapter.embeddings):
                raise InputError(
                    f"{name}: an embedding in one adapter and a linear layer in another; these are "
                    "for different base models"
                )
            if shapes.setdefault(name, update.shape) != update.shape:
                raise InputError(
                    f"{name}: shapes {shapes[name]} and {update.shape}; these adapters are for "
                    "different base models"
                )
    return shapes


def common_config(adapters: Sequence[SavedAdapter]) -> dict[str, Any]:
    """Keys of `adapter_config.json` for the result.

    Returns:
        base_model_name_or_path, revision, task_type, fan_in_fan_out, modules_to_save (sorted), and
        target_modules (None where names alone do not say which modules are meant).

    Raises:
        InputError: the adapters are for different tasks.
    """
    tasks = list(dict.fromkeys(t for a in adapters if (t := a.config.get("task_type")) is not None))
    if len(tasks) > 1:
        raise InputError(
            f"task_type: {tasks[0]!r} and {tasks[1]!r}; these adapters do not belong together"
        )
    name = common_base([base_name(a.config) for a in adapters])
    # A revision belongs to the base whose name is written.
    of_named_base = [a.config for a in adapters if name is None or base_name(a.config) == name]
    target_lists = [target_names(a) for a in adapters]
    return {
        "revision": next((c["revision"] for c in of_named_base if c.get("revision")), None),
        "task_type": tasks[0] if tasks else None,
        # PEFT writes here what the last layer it adapted was, and corrects it when it loads.
        "fan_in_fan_out": any(a.config.get("fan_in_fan_out") for a in adapters),
        "base_model_name_or_path": name,
        "modules_to_save": sorted({m for a in adapters for m in modules_to_save(a.config)}),
        "target_modules": None
        if None in target_lists
        else sorted({module for names in target_lists for module in names or []}),
    }


def target_names(adapter: SavedAdapter) -> list[str] | None:
    """PEFT's `target_modules`, if this list alone says which modules `deltas` has; else None."""
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
