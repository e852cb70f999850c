"""Follows the names that transformers gave to modules since an adapter was saved, as PEFT does."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any


def split_name(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A name in two: the path to its layer list, and what follows from the layer's number on."""
    parts = tuple(name.split("."))
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return ((), parts) if at is None else (parts[:at], parts[at:])


def any_layer(name: str) -> str:
    """A name with every number 0: a base's configuration may be known but for its depth."""
    return ".".join("0" if part.isdecimal() else part for part in name.split("."))


def module_names(model: Any) -> frozenset[str]:
    """All modules and parameters of a model by name, layers' numbers left open."""
    names = [name for name, _ in model.named_modules()]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return frozenset(any_layer(name) for name in names)


def renamer(model: Any, extra: Collection[str] = ()) -> Callable[[str], str]:
    """How PEFT would rename the names of older adapters when it loads them into this model.

    A name that is no module's either way stays as it is.

    Args:
        model: of transformers; it may have no weights.
        extra: more names that are the model's.

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
        candidates += [_applied(renamings, one) for one in list(candidates)]
        if prefix:  # saved from the whole model, or from the model inside
            outer = [f"{prefix}.{one}" for one in candidates]
            inner = [one.removeprefix(f"{prefix}.") for one in candidates]
            candidates += outer + inner
        return next((one for one in candidates if any_layer(one) in known), name)

    return rename


def _renamings(model: Any) -> list[Any]:
    """Transformers' rules for renaming the weights of older checkpoints of this model."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        rules = get_model_conversion_mapping(model, add_legacy=False)
    except Exception:  # another transformers: PEFT has no such rules either
        return []
    return [one for one in rules if isinstance(one, WeightRenaming)]


def _applied(renamings: Sequence[Any], name: str) -> str:
    """Transformers' rules are for parameters; a module goes through them with one behind it."""
    ends = name.endswith((".weight", ".bias"))
    key = name if ends else f"{name}.weight"
    for one in renamings:
        key, _ = one.rename_source_key(key)
    return key if ends else key.removesuffix(".weight")


@cache
def _families() -> tuple[tuple[Any, ...], ...]:
    """Every list of renamings that transformers knows, each once."""
    try:
        from transformers import conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        architectures = conversion_mapping._build_checkpoint_conversion_mapping()
    except Exception:
        return ()
    seen, out = set(), []
    for rules in architectures.values():
        renamings = tuple(one for one in rules if isinstance(one, WeightRenaming))
        text = str([(one.source_patterns, one.target_patterns) for one in renamings])
        if renamings and text not in seen:
            seen.add(text)
            out.append(renamings)
    return tuple(out)


def _applied_safely(rules: Sequence[Any], key: str) -> str:
    try:
        return _applied(rules, key)
    except Exception:  # a rule that wants more of a name than this one has
        return key


def documented(one: str, other: str) -> bool:
    """Whether transformers renames `one` to `other` in some architecture.

    Its rules for the whole model are tried, and those for the model inside. Bare paths to a layer
    list (`layers`, `model.layers`) are those of a text model by itself, so that only the base can
    say what they became.
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
