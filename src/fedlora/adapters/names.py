"""Tells what a key of a PEFT state dict names, however the model was wrapped when it was saved.

It also tells which names of several adapters are one module.

`torch.compile`, DDP, FSDP, checkpointing and trainers put parts of their own into names; a state
dict that was saved raw has the adapter's name in them; and transformers has renamed modules, which
PEFT follows when it loads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

from fedlora.errors import InputError

PREFIX = "base_model.model."
_WRAPPERS = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_fpw_module",  # FSDP of PyTorch 1
    "_checkpoint_wrapped_module",
    "_forward_module",
)
_LORA = re.compile(
    r"^(.+)\.lora_(?P<part>[A-Za-z_]+)(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?"
    r"(?:\.(?P<end>weight|bias))?$"
)
_COPY, _ORIGINAL, _BASE = ".modules_to_save.", ".original_module.", ".base_layer."


@dataclass(frozen=True)
class Key:
    """What a key names.

    Args:
        kind: `lora` (a factor), `whole` (a trained copy), `original` (what it is a copy of), `base`
            (a weight under a LoRA layer), `plain` (any other parameter).
        name: of the module for `lora`, else of the parameter, as in the model without PEFT.
        part: of a factor: `A`, `B`, `E`, `embedding_A` ...
        adapter: the adapter's name, where the key says it.
    """

    kind: str
    name: str
    part: str = ""
    adapter: str | None = None


def unwrapped(key: str) -> str:
    """A key without the parts that wrappers around the model or the PEFT model put in it, and
    without PEFT's own prefix."""
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    ends = [i + 2 for i in range(len(parts) - 2) if parts[i : i + 2] == ["base_model", "model"]]
    parts = parts[ends[-1] :] if ends else parts
    while len(parts) > 2 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def read_keys(keys: Iterable[str]) -> dict[str, Key]:
    """Every key of a state dict and what it names.

    Raises:
        InputError: the keys are of several adapters.
    """
    plain = {key: unwrapped(key) for key in keys}
    out = {}
    for key, name in plain.items():
        if match := _LORA.match(name):
            part = match["part"] if match["end"] != "bias" else f"{match['part']}.bias"
            out[key] = Key("lora", match[1], part, match["adapter"])
        elif _BASE in f".{name}":
            out[key] = Key("base", name.replace(_BASE.lstrip("."), "", 1))
        elif _ORIGINAL in f".{name}":
            out[key] = Key("original", name.replace(_ORIGINAL.lstrip("."), "", 1))
        elif _COPY not in f".{name}":
            out[key] = Key("plain", name)
    named = {key.adapter for key in out.values() if key.kind == "lora"} - {None}
    originals = {key.name for key in out.values() if key.kind == "original"}
    for key, name in plain.items():
        if key not in out:
            out[key] = _copy(name, named, originals)
    adapters = sorted({key.adapter for key in out.values() if key.adapter is not None})
    if len(adapters) > 1:
        raise InputError(
            f"its weights hold several adapters ({', '.join(adapters)}); save one of them alone: "
            "model.save_pretrained(directory, selected_adapters=[name])"
        )
    return {key: out[key] for key in plain}


def _copy(name: str, adapters: Collection[str | None], originals: Collection[str]) -> Key:
    """A trained copy. `x.modules_to_save.y.weight`: y is an adapter, or a module inside of x."""
    owner, _, inside = f".{name}".rpartition(_COPY)
    owner = owner.lstrip(".")
    first, _, rest = inside.partition(".")
    full = f"{owner}.{inside}".lstrip(".")
    a_module = full in originals or not rest
    if a_module or (first != "default" and not adapters and f"{owner}.{rest}" not in originals):
        return Key("whole", full)
    return Key("whole", f"{owner}.{rest}".lstrip("."), adapter=first)


# --- one module under two names ---


@dataclass(frozen=True)
class Twin:
    """Two names that look like one module's, each of some adapters."""

    first: str
    second: str


def _split(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A name as what leads to its layer list and what follows from the layer's number on."""
    parts = tuple(name.split("."))
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return ((), parts) if at is None else (parts[:at], parts[at:])


_SENSES = (("vision", "visual", "image", "pixel"), ("audio", "speech"))


def _role(prefix: Sequence[str]) -> tuple[int | None, str | None]:
    """Which part of a model of several parts a name leads to: a sense, and encoder or decoder."""
    text = ".".join(prefix).lower()
    sense = next((i for i, words in enumerate(_SENSES) if any(w in text for w in words)), None)
    sides = [side for side in ("encoder", "decoder") if any(side in part for part in prefix)]
    return sense, sides[0] if len(sides) == 1 else None


def _may_be_one(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two ways to a layer list may lead to the same one: not to encoder and decoder, and
    not to text and pictures."""
    (sense, side), (sense2, side2) = _role(one), _role(other)
    return sense == sense2 and (side == side2 or None in (side, side2))


def find_twins(named: Sequence[Mapping[str, tuple[int, ...]]]) -> list[Twin]:
    """Pairs of names that look like one module: the same path from the layer's number on (but for
    one part that a wrapper may have put there), the same shape, and no adapter that has both ways
    to its layers.

    Args:
        named: for each adapter, name -> shape.
    """
    ways = [{_split(name)[0] for name in names if _split(name)[0]} for names in named]
    groups: dict[tuple[Any, ...], dict[str, None]] = {}
    for names in named:
        for name, shape in names.items():
            way, tail = _split(name)
            groups.setdefault((shape, tail if way else tail[-1:]), {})[name] = None
    out = [Twin(one, other) for one, other in _wrapped_twins(named)]
    for group in groups.values():
        for one, other in combinations(group, 2):
            a, b = _split(one)[0], _split(other)[0]
            if bool(a) != bool(b) or any(one in n and other in n for n in named):
                continue
            if not a:
                if one.endswith(f".{other}") or other.endswith(f".{one}"):
                    out.append(Twin(one, other))
            elif _may_be_one(a, b) and not any({a, b} <= have for have in ways):
                out.append(Twin(one, other))
    return out


def _wrapped_twins(named: Sequence[Mapping[str, tuple[int, ...]]]) -> list[tuple[str, str]]:
    """Pairs of names of layers of which one has a part more within the layer, as of a wrapper, and
    no adapter has both."""
    every = {name: shape for names in named for name, shape in names.items()}
    out = []
    for longer, shape in every.items():
        way, tail = _split(longer)
        for at in range(1, len(tail) - 1):
            rest = (*way, *tail[:at], *tail[at + 1 :])
            shorter = ".".join(rest)
            both = any(longer in names and shorter in names for names in named)
            if every.get(shorter) == shape and not (tail[at].isdecimal() or both):
                out.append((shorter, longer))
    return out


def common_names(
    named: Sequence[Mapping[str, tuple[int, ...]]],
    sources: Sequence[str],
    models: Callable[[bool], Iterable[Any]],
) -> list[dict[str, str]]:
    """For each adapter, its names -> the names all adapters have in common.

    Where the base's configuration is at hand, names become those of its modules by the rules by
    which PEFT renames what it loads; else two names that look like one module are taken as one
    where transformers documents the renaming.

    Args:
        named: for each adapter, name of a module or parameter -> shape.
        sources: what each adapter is called in messages.
        models: gives what the base may be, without weights. It is told whether two names look like
            one; else the base matters only where transformers renamed modules of its architecture.

    Raises:
        InputError: two names look like one module's, and nothing says whether they are.
    """
    out = [{name: name for name in names} for names in named]
    known: frozenset[str] = frozenset()
    best = 0
    for base in models(bool(find_twins(named))):
        rename, patterns = renamer(base), module_names(base)
        found = [{name: rename(name) for name in names} for names in named]
        fits = sum(_pattern(now) in patterns for names in found for now in names.values())
        if fits > best:
            out, known, best = found, patterns, fits
    shown = [{out[i][n]: shape for n, shape in names.items()} for i, names in enumerate(named)]
    for twin in find_twins(shown):
        one, other = twin.first, twin.second
        if {_pattern(one), _pattern(other)} <= known:
            continue  # two modules of the base, each changed by other adapters
        if not documented(one, other):
            one, other = other, one
        if known or not documented(one, other):
            _refuse_twin(twin, shown, sources)
        for names in out:
            names.update({name: other for name, now in names.items() if now == one})
    return out


def _refuse_twin(twin: Twin, named: Sequence[Mapping[str, Any]], sources: Sequence[str]) -> None:
    whose = [
        next(s for names, s in zip(named, sources, strict=True) if name in names)
        for name in (twin.first, twin.second)
    ]
    raise InputError(
        f"{twin.first} ({whose[0]}) and {twin.second} ({whose[1]}) look like one module under two "
        "names, and combining them as two would halve both; save both adapters from the same class "
        "of model, or put the base's config.json beside the first adapter, which says what modules "
        "there are"
    )


def _pattern(name: str) -> str:
    """A name for any layer: a base's configuration may be known but for its depth."""
    return ".".join("0" if part.isdecimal() else part for part in name.split("."))


def module_names(model: Any) -> frozenset[str]:
    """All modules and parameters of a model by name, layers' numbers left open."""
    names = [name for name, _ in model.named_modules()]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return frozenset(_pattern(name) for name in names)


def renamer(model: Any, extra: Collection[str] = ()) -> Callable[[str], str]:
    """How PEFT would rename a module's or parameter's name for this model (which may have no
    weights). A name that is no module's either way stays as it is.

    Args:
        model: of transformers.
        extra: more names that are the model's.
    """
    known = module_names(model) | {_pattern(name) for name in extra}
    prefix = str(getattr(model, "base_model_prefix", ""))
    renamings = _renamings(model)
    patterns = dict(getattr(model, "_checkpoint_conversion_mapping", None) or {})

    def rename(name: str) -> str:
        if _pattern(name) in known:
            return name
        older = [name]
        for pattern, replacement in patterns.items():
            if (changed := re.sub(pattern, replacement, name)) != name:
                older.append(changed)
                break
        older += [_applied(renamings, one) for one in list(older)]
        more = [f"{prefix}.{x}" for x in older] + [x.removeprefix(f"{prefix}.") for x in older]
        return next((x for x in [*older, *(more if prefix else [])] if _pattern(x) in known), name)

    return rename


def _renamings(model: Any) -> list[Any]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        found = get_model_conversion_mapping(model, add_legacy=False)
    except Exception:  # another transformers: PEFT has no such rules either
        return []
    return [one for one in found if isinstance(one, WeightRenaming)]


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

        found = conversion_mapping._build_checkpoint_conversion_mapping()
    except Exception:
        return ()
    seen, out = set(), []
    for rules in found.values():
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
    """Whether transformers renames `one` to `other` in some architecture, by its rules for the
    whole model and for the model inside. Bare ways to a layer list (`layers`, `model.layers`) are
    those of a text model by itself, so that only the base can say what they became."""
    if any(set(way[:-1]) <= {"model"} for name in (one, other) if (way := _split(name)[0])):
        return False
    for rules in _families():
        whole = _applied_safely(rules, one)
        if whole == other:
            return True
        if whole == one or not whole.startswith("model."):
            continue
        inside = whole.removeprefix("model.")
        if any(f"model.{_applied_safely(nested, inside)}" == other for nested in _families()):
            return True
    return False
