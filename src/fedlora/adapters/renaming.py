"""Follows the names that transformers gave to modules since an adapter was saved, as PEFT does."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any


def split_name(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The parts of a name in two: the path to its layer list, and the rest from the number on.

    `model.layers.3.mlp` is `(model, layers)` and `(3, mlp)`. A name without a number has no path.
    """
    parts = tuple(name.split("."))
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return ((), parts) if number is None else (parts[:number], parts[number:])


def any_layer(name: str) -> str:
    """A name with 0 for every number: models that differ in depth alone then have equal names."""
    return ".".join("0" if part.isdecimal() else part for part in name.split("."))


def module_names(model: Any) -> frozenset[str]:
    """Names of all modules and parameters of a model, with 0 for every number (`any_layer`)."""
    names = [name for name, _ in model.named_modules()]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return frozenset(any_layer(name) for name in names)


def renamer(model: Any, extra: Collection[str] = ()) -> Callable[[str], str]:
    """How PEFT would rename the names of older adapters when it loads them into this model.

    A name that is no module's either way stays as it is.

    Args:
        model: of transformers; it may be on the meta device, without weights.
        extra: further names that count as the model's.

    Returns:
        Name of a module or parameter -> the model's own name of it.
    """
    known = module_names(model) | {any_layer(name) for name in extra}
    prefix = str(getattr(model, "base_model_prefix", ""))
    renamings = _renamings(model)
    patterns = dict(getattr(model, "_checkpoint_conversion_mapping", None) or {})

    def rename(name: str) -> str:
        if any_layer(name) in known:
            return name
        candidates = [name]
        for pattern, replacement in patterns.items():
            if (changed := re.sub(pattern, replacement, name)) != name:
                candidates.append(changed)
                break
        candidates += [_applied(renamings, candidate) for candidate in list(candidates)]
        if prefix:  # one was saved from the whole model, the other from the model without its head
            outer = [f"{prefix}.{candidate}" for candidate in candidates]
            inner = [candidate.removeprefix(f"{prefix}.") for candidate in candidates]
            candidates += outer + inner
        return next((new for new in candidates if any_layer(new) in known), name)

    return rename


def _renamings(model: Any) -> list[Any]:
    """Transformers' rules for renaming the weights of older checkpoints of this model."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        rules = get_model_conversion_mapping(model, add_legacy=False)
    except Exception:  # a transformers without such rules; PEFT has none then either
        return []
    return [rule for rule in rules if isinstance(rule, WeightRenaming)]


def _applied(renamings: Sequence[Any], name: str) -> str:
    """A name as transformers' rules rename it.

    The rules are for parameters: a module's name is given to them as that of its weight.
    """
    is_parameter = name.endswith((".weight", ".bias"))
    key = name if is_parameter else f"{name}.weight"
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    return key if is_parameter else key.removesuffix(".weight")


@cache
def _families() -> tuple[tuple[Any, ...], ...]:
    """Every list of renamings that transformers knows, each once."""
    try:
        from transformers import conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        architectures = conversion_mapping._build_checkpoint_conversion_mapping()
    except Exception:
        return ()
    families: dict[str, tuple[Any, ...]] = {}
    for rules in architectures.values():
        renamings = tuple(rule for rule in rules if isinstance(rule, WeightRenaming))
        patterns = str([(rule.source_patterns, rule.target_patterns) for rule in renamings])
        if renamings:
            families.setdefault(patterns, renamings)
    return tuple(families.values())


def _applied_safely(rules: Sequence[Any], name: str) -> str:
    """As `_applied`; a name that a rule of another architecture fails on stays as it is."""
    try:
        return _applied(rules, name)
    except Exception:
        return name


def documented(one: str, other: str) -> bool:
    """Whether transformers renames `one` to `other` in some architecture.

    The rules of one architecture are tried, and behind them those of a model inside of it. Paths to
    a layer list that are as short as `layers` or `model.layers` are not looked at: a text model by
    itself has them, and only the base can say what they became inside of a larger model.
    """
    if any(set(path[:-1]) <= {"model"} for name in (one, other) if (path := split_name(name)[0])):
        return False
    for rules in _families():
        renamed = _applied_safely(rules, one)
        if renamed == other:
            return True
        if renamed == one or not renamed.startswith("model."):
            continue
        inside = renamed.removeprefix("model.")
        if any(f"model.{_applied_safely(nested, inside)}" == other for nested in _families()):
            return True
    return False
