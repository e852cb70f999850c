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


def common_shapes(adapters: Sequence[SavedAdapter]) -> dict[str, tuple[int, int]]:
    """Target module -> its shape, which has to be the same in all adapters."""
    out: dict[str, tuple[int, int]] = {}
    embeddings = {name for a in adapters for name in a.embeddings}
    for adapter in adapters:
        for name, x in adapter.deltas.items():
            if (name in embeddings) != (name in adapter.embeddings):
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


def common_config(adapters: Sequence[SavedAdapter]) -> dict[str, Any]:
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
    lists = [target_names(a) for a in adapters]
    names = None if None in lists else sorted({name for x in lists for name in x or []})
    return {
        **out,
        "base_model_name_or_path": name,
        "modules_to_save": sorted(set(saved)),
        "target_modules": names,
    }


def target_names(adapter: SavedAdapter) -> list[str] | None:
    """PEFT's `target_modules`, where that alone names exactly the modules of `deltas`."""
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
