"""Tells which names of several adapters are one module, and gives it one name.

Transformers has renamed modules, which PEFT follows when it loads, and wrappers around a model put
parts of their own into names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from fedlora.adapters.renaming import any_layer, documented, module_names, renamer, split_name
from fedlora.errors import InputError


@dataclass(frozen=True)
class Twin:
    """Two names that look like one module's, each of some adapters."""

    first: str
    second: str


_SENSES = (("vision", "visual", "image", "pixel"), ("audio", "speech"))


def _role(prefix: Sequence[str]) -> tuple[int | None, str | None]:
    """Which part of a model of several parts a path leads to: a sense, and encoder or decoder."""
    text = ".".join(prefix).lower()
    sense = next((i for i, words in enumerate(_SENSES) if any(w in text for w in words)), None)
    sides = [side for side in ("encoder", "decoder") if any(side in part for part in prefix)]
    return sense, sides[0] if len(sides) == 1 else None


def _same_part(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two paths to a layer list may lead to the same part of a model: not one to its
    encoder and one to its decoder, and not one to text and one to pictures."""
    (sense, side), (other_sense, other_side) = _role(one), _role(other)
    return sense == other_sense and (side == other_side or None in (side, other_side))


def find_twins(named: Sequence[Mapping[str, tuple[int, ...]]]) -> list[Twin]:
    """Pairs of names that look like one module under two names.

    They have the same shape and the same path from the layer's number on (but for one part that a
    wrapper may have put there), and no adapter has both.

    Args:
        named: for each adapter, name -> shape.
    """
    paths = [{split_name(name)[0] for name in names} for names in named]
    twins = [Twin(shorter, longer) for shorter, longer in _wrapped_twins(named)]
    for group in _alike_from_the_layer_on(named):
        for one, other in combinations(group, 2):
            in_one_adapter = any(one in names and other in names for names in named)
            if not in_one_adapter and _may_be_one(one, other, paths):
                twins.append(Twin(one, other))
    return twins


def _alike_from_the_layer_on(
    named: Sequence[Mapping[str, tuple[int, ...]]],
) -> list[list[str]]:
    """Names of one shape that go on alike from the layer's number, or without one end alike."""
    groups: dict[tuple[Any, ...], dict[str, None]] = {}
    for names in named:
        for name, shape in names.items():
            path, tail = split_name(name)
            groups.setdefault((shape, tail if path else tail[-1:]), {})[name] = None
    return [list(group) for group in groups.values()]


def _may_be_one(one: str, other: str, paths: Sequence[Set[tuple[str, ...]]]) -> bool:
    """Whether what stands before the layer's number may be two ways to write the same.

    Args:
        one, other: two names that go on alike.
        paths: for each adapter, the paths to its layer lists.
    """
    path, other_path = split_name(one)[0], split_name(other)[0]
    if bool(path) != bool(other_path):
        return False
    if not path:  # outside of layers: one name is the other's end
        return one.endswith(f".{other}") or other.endswith(f".{one}")
    in_one_adapter = any({path, other_path} <= own for own in paths)
    return _same_part(path, other_path) and not in_one_adapter


def _wrapped_twins(named: Sequence[Mapping[str, tuple[int, ...]]]) -> list[tuple[str, str]]:
    """Pairs of names of which one has a part more within the layer, as a wrapper puts it there.

    No adapter has both. The shorter name stands first.
    """
    shapes = {name: shape for names in named for name, shape in names.items()}
    out = []
    for longer, shape in shapes.items():
        path, tail = split_name(longer)
        for at in range(1, len(tail) - 1):
            shorter = ".".join((*path, *tail[:at], *tail[at + 1 :]))
            both = any(longer in names and shorter in names for names in named)
            if shapes.get(shorter) == shape and not (tail[at].isdecimal() or both):
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
    common, of_base = _named_by_base(named, models)
    renamed = [
        {common[i][name]: shape for name, shape in names.items()} for i, names in enumerate(named)
    ]
    for twin in find_twins(renamed):
        older, newer = twin.first, twin.second
        if {any_layer(older), any_layer(newer)} <= of_base:
            continue  # two modules of the base, each changed by other adapters
        if not documented(older, newer):
            older, newer = newer, older
        if of_base or not documented(older, newer):
            _refuse_twin(twin, renamed, sources)
        for names in common:
            names.update({name: newer for name, now in names.items() if now == older})
    return common


def _named_by_base(
    named: Sequence[Mapping[str, tuple[int, ...]]], models: Callable[[bool], Iterable[Any]]
) -> tuple[list[dict[str, str]], frozenset[str]]:
    """The names as the base has them, by whichever of its possible models knows most of them.

    Returns:
        For each adapter, its names -> the base's, or themselves where no model is known; and the
        names of that model's modules (`any_layer`), empty where none is known.
    """
    best = [{name: name for name in names} for names in named]
    of_base: frozenset[str] = frozenset()
    most = 0
    for model in models(bool(find_twins(named))):
        rename, modules = renamer(model), module_names(model)
        renamed = [{name: rename(name) for name in names} for names in named]
        known = sum(any_layer(now) in modules for names in renamed for now in names.values())
        if known > most:
            best, of_base, most = renamed, modules, known
    return best, of_base


def _refuse_twin(twin: Twin, named: Sequence[Mapping[str, Any]], sources: Sequence[str]) -> None:
    """Say that two names cannot be told to be one module, and whose they are."""
    first, second = (
        next(source for names, source in zip(named, sources, strict=True) if name in names)
        for name in (twin.first, twin.second)
    )
    raise InputError(
        f"{twin.first} ({first}) and {twin.second} ({second}) look like one module under two "
        "names, and combining them as two would halve both; save both adapters from the same class "
        "of model, or put the base's config.json beside the first adapter, which says what modules "
        "there are"
    )
