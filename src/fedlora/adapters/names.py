"""Tells which names in several adapters mean the same module, and gives it one name.

Names differ because transformers has renamed modules (PEFT follows when it loads an adapter), and
because wrappers around a model put parts of their own into names.
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
    """Two names that look like one module's; each occurs in some adapters, and never both."""

    first: str
    second: str


_SENSES = (("vision", "visual", "image", "pixel"), ("audio", "speech"))


def _role(prefix: Sequence[str]) -> tuple[int | None, str | None]:
    """Which part of a model a path leads to: of which sense (by number), and encoder or decoder.

    None stands for a path that does not say.
    """
    text = ".".join(prefix).lower()
    sense = next((i for i, words in enumerate(_SENSES) if any(w in text for w in words)), None)
    sides = [side for side in ("encoder", "decoder") if any(side in part for part in prefix)]
    return sense, sides[0] if len(sides) == 1 else None


def _same_part(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two paths to a layer list may lead to the same part of a model.

    They do not if one leads to the encoder and one to the decoder, or one to text and one to
    pictures.
    """
    (sense, side), (other_sense, other_side) = _role(one), _role(other)
    return sense == other_sense and (side == other_side or None in (side, other_side))


def find_twins(named: Sequence[Mapping[str, tuple[int, ...]]]) -> list[Twin]:
    """Pairs of names that look like one module under two names.

    They have the same shape and are alike from the layer's number on, but for one part that a
    wrapper may have put there; and no adapter has both.

    Args:
        named: for each adapter, name of a module or parameter -> shape.
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
    """Groups of names of one shape that are alike from the layer's number on.

    Names without such a number are in one group if their last parts are alike.
    """
    groups: dict[tuple[Any, ...], dict[str, None]] = {}
    for names in named:
        for name, shape in names.items():
            path, tail = split_name(name)
            groups.setdefault((shape, tail if path else tail[-1:]), {})[name] = None
    return [list(group) for group in groups.values()]


def _may_be_one(one: str, other: str, paths: Sequence[Set[tuple[str, ...]]]) -> bool:
    """Whether two names may be one module's, by what stands before the layer's number.

    Args:
        one, other: two names that are alike from there on.
        paths: for each adapter, the paths to its layer lists.
    """
    path, other_path = split_name(one)[0], split_name(other)[0]
    if bool(path) != bool(other_path):
        return False
    if not path:  # the module is in no layer: one name has to be the other's end
        return one.endswith(f".{other}") or other.endswith(f".{one}")
    in_one_adapter = any({path, other_path} <= of_adapter for of_adapter in paths)
    return _same_part(path, other_path) and not in_one_adapter


def _wrapped_twins(named: Sequence[Mapping[str, tuple[int, ...]]]) -> list[tuple[str, str]]:
    """Pairs of names of which the second has one part more within the layer.

    Wrappers around a module put such a part there. No adapter has both names of a pair.
    """
    shapes = {name: shape for names in named for name, shape in names.items()}
    pairs = []
    for longer, shape in shapes.items():
        path, tail = split_name(longer)
        for i in range(1, len(tail) - 1):
            shorter = ".".join((*path, *tail[:i], *tail[i + 1 :]))
            in_one_adapter = any(longer in names and shorter in names for names in named)
            if shapes.get(shorter) == shape and not (tail[i].isdecimal() or in_one_adapter):
                pairs.append((shorter, longer))
    return pairs


def common_names(
    named: Sequence[Mapping[str, tuple[int, ...]]],
    sources: Sequence[str],
    models: Callable[[bool], Iterable[Any]],
) -> list[dict[str, str]]:
    """Give each module one name in all adapters.

    Where the base's configuration is at hand, names become those of its modules by the rules by
    which PEFT renames what it loads. Otherwise two names that look like one module's are taken for
    one where transformers documents that it renamed one to the other.

    Args:
        named: for each adapter, name of a module or parameter -> shape.
        sources: what each adapter is called in messages.
        models: yields models without weights that the base may be. It is told whether two names
            look like one module's: if none do, the base matters only where transformers has renamed
            modules of its architecture.

    Returns:
        For each adapter, its names -> the common names.

    Raises:
        InputError: two names look like one module's, and nothing says whether they are.
    """
    common, base_modules = _named_by_base(named, models)
    renamed = [
        {common[i][name]: shape for name, shape in names.items()} for i, names in enumerate(named)
    ]
    for twin in find_twins(renamed):
        older, newer = twin.first, twin.second
        if {any_layer(older), any_layer(newer)} <= base_modules:
            continue  # two modules of the base, each changed by other adapters
        if not documented(older, newer):
            older, newer = newer, older
        if base_modules or not documented(older, newer):
            _refuse_twin(twin, renamed, sources)
        for names in common:
            names.update({name: newer for name, now in names.items() if now == older})
    return common


def _named_by_base(
    named: Sequence[Mapping[str, tuple[int, ...]]], models: Callable[[bool], Iterable[Any]]
) -> tuple[list[dict[str, str]], frozenset[str]]:
    """Name modules as the base does: of the models it may be, as the one that knows most names.

    Returns:
        For each adapter, its names -> the base's, or themselves where no model is known; and the
        names of that model's modules (`any_layer`), empty where none is known.
    """
    best = [{name: name for name in names} for names in named]
    base_modules: frozenset[str] = frozenset()
    most_known = 0
    for model in models(bool(find_twins(named))):
        rename, modules = renamer(model), module_names(model)
        renamed = [{name: rename(name) for name in names} for names in named]
        known = sum(any_layer(now) in modules for names in renamed for now in names.values())
        if known > most_known:
            best, base_modules, most_known = renamed, modules, known
    return best, base_modules


def _refuse_twin(twin: Twin, named: Sequence[Mapping[str, Any]], sources: Sequence[str]) -> None:
    """Refuse two names of which nothing tells whether they are one module's."""
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
