"""Reads a study's file, part by part, at one of its sizes.

    question: what the study asks
    metric: exact_match            # of the last round's evaluation
    seeds: [0, 1, 2]
    sizes:                         # the first is the default
      embedded: {base: embedded, keys: {num_rounds: 5}}
      gpu: {base: {model_name_or_path: ...}}
    parts:
      table:
        title: one line
        compare: method            # the axis whose values are compared, with all else equal
        reference: exact           # differences are taken to this one
        choose: learning_rate      # an axis of which each value of `compare` shows its best value
        grid:                      # every combination of one value of each axis
          ranks: {mixed: {client_ranks: [64, 4]}, equal: {client_ranks: 16}}
          method: {exact: {method: exact}, flora: {method: flora}}

A value of an axis is configuration keys. Two more words may stand among them: `alone: K` trains
client K by itself, `trainer: adalora` is another local training. `null` in the place of a whole
value leaves it out at this size.

What is chosen by `choose` is chosen on validation rows and reported on others. Validation rows are
those that clients hold out (`client_eval_fraction`); the best value is the one whose mean over
seeds is best there, in each cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.commands.study.plan import shipped
from fedlora.config.keys import EVALUATED
from fedlora.config.yaml_file import read_yaml
from fedlora.embedded import CONFIG as EMBEDDED_CONFIG
from fedlora.embedded import EMBEDDED
from fedlora.errors import InputError
from fedlora.text import nearest

Keys = Mapping[str, Any]
"""Configuration keys and their values, perhaps with `alone` and `trainer` among them."""
Grid = dict[str, dict[str, Keys]]
"""Axis -> name of a value -> what it sets."""
_OF_STUDY = {"question", "metric", "seeds", "sizes", "parts"}
_OF_PART = {"title", "compare", "reference", "choose", "grid", "keys", "metric", "seeds", "sizes"}
_OF_SIZE = {"base", "keys", "grid", "seeds", "metric"}


@dataclass(frozen=True)
class StudyFile:
    """A study's file at one of its sizes.

    Args:
        path: of the file.
        top: its outermost keys and their values.
        size: name of the size that was chosen.
        at_size: keys under that size and their values.
        parts: name of a part -> the keys under it and their values.
    """

    path: Path
    top: Mapping[str, Any]
    size: str
    at_size: Mapping[str, Any]
    parts: Mapping[str, Any]


def read_study_file(name: str, size: str | None) -> StudyFile:
    """Read the file of a study at one of its sizes, and check its outermost keys.

    Args:
        name: a file, or the name of a shipped study.
        size: one of its sizes; None: the first.

    Raises:
        InputError: there is no such study or size, or a key is unknown.
    """
    path = shipped().get(name, Path(name))
    if not path.is_file():
        raise InputError(
            f"{name}: no such study; give a file or one of {', '.join(shipped())}"
            + nearest(name, list(shipped()), "")
        )
    top = read_yaml(path)
    _check_keys(str(path), top, _OF_STUDY)
    sizes = _mapping(path, "sizes", top.get("sizes") or {"default": {}})
    chosen = size or next(iter(sizes))
    if chosen not in sizes:
        raise InputError(f"--size {chosen}: {path.name} has {', '.join(sizes)}")
    at_size = _mapping(path, f"sizes: {chosen}", sizes[chosen] or {})
    _check_keys(f"{path}: sizes: {chosen}", at_size, _OF_SIZE)
    return StudyFile(path, top, chosen, at_size, _mapping(path, "parts", top.get("parts")))


@dataclass(frozen=True)
class PartAtSize:
    """A part of the file as it is at the size that was chosen.

    Args:
        called: file and part, as a message names them.
        name: of the part.
        settings: title, compare, reference, choose and metric, where they are given.
        grid: its axes.
        layers: configuration keys of all its runs; later layers go over earlier ones.
        seeds: of its runs.
    """

    called: str
    name: str
    settings: Mapping[str, Any]
    grid: Grid
    layers: Sequence[Keys]
    seeds: Sequence[int]


def part_at_size(
    file: StudyFile, name: str, base: Keys, metric: str, seeds: Sequence[int] | None
) -> PartAtSize:
    """Read a part of the file, at the size that was chosen.

    Args:
        file: the study's.
        name: of the part.
        base: configuration keys that the runs of all parts share.
        metric: for a part that names none.
        seeds: in place of the file's; None: the file's.

    Raises:
        InputError: a key is unknown, or a value is not what it has to be.
    """
    path = file.path
    part = _mapping(path, f"parts: {name}", file.parts[name])
    _check_keys(f"{path}: parts: {name}", part, _OF_PART)
    sizes = _mapping(path, f"{name}: sizes", part.get("sizes") or {})
    at_size = sizes.get(file.size) or {}
    _check_keys(f"{path}: {name}: sizes: {file.size}", at_size, _OF_PART)
    of_size = {key: value for key, value in at_size.items() if key not in ("grid", "keys")}
    settings = {**part, **of_size}
    grid = _grid(path, name, [part, file.at_size, at_size])
    layers = [
        _mapping(path, f"{name}: keys", layer.get("keys") or {})
        for layer in (file.at_size, part, at_size)
    ]
    seeds = seeds or settings.get("seeds") or file.at_size.get("seeds") or file.top.get("seeds")
    return PartAtSize(
        f"{path.name}: {name}",
        name,
        {"metric": metric, **settings},
        grid,
        [base, *layers],
        _checked_seeds(path, seeds),
    )


def base_keys(path: Path, given: Any) -> dict[str, Any]:
    """The configuration keys that all runs share.

    They are those of the embedded default configuration, of another file, or written out.
    """
    if given is None:
        return {}
    if given == EMBEDDED:
        return read_yaml(EMBEDDED_CONFIG)
    if isinstance(given, str):
        return read_yaml(path.parent / given)
    return dict(_mapping(path, "base", given))


def _grid(path: Path, part: str, layers: Sequence[Mapping[str, Any]]) -> Grid:
    """The axes of a part. A size may give other keys for a value, or leave it out with null.

    Args:
        path: of the file.
        part: its name.
        layers: the keys of the part, of the size, and of the part at this size; each may have a
            `grid`, and later ones go before.
    """
    of_part, *of_sizes = [layer.get("grid") for layer in layers]
    axes: Grid = {}
    for axis, values_of_part in _mapping(path, f"{part}: grid", of_part).items():
        called = f"{part}: grid: {axis}"
        values: dict[str, Any] = {}
        for layer in (values_of_part, *((grid or {}).get(axis) or {} for grid in of_sizes)):
            if isinstance(layer, list):  # `method: [exact, flora]`: the axis is the key
                layer = {str(value): {axis: value} for value in layer}
            values |= _mapping(path, called, layer)
        axes[axis] = {
            str(label): dict(_mapping(path, f"{called}: {label}", keys))
            for label, keys in values.items()
            if keys is not None
        }
        if not axes[axis]:
            raise InputError(f"{path}: {called} has no values")
    if not axes:
        raise InputError(f"{path}: {part}: grid: has no axes")
    return axes


def _checked_seeds(path: Path, given: Any) -> list[int]:
    """The seeds as a list of whole numbers; 0 where none are given."""
    seeds = [0] if given is None else given
    if not isinstance(seeds, list | tuple) or not all(type(s) is int and s >= 0 for s in seeds):
        raise InputError(f"{path}: seeds: {given!r}: expected a list of whole numbers from 0")
    return list(seeds)


def check_metric(named_in: str, metric: str) -> None:
    """Refuse a metric that no evaluation measures.

    Args:
        named_in: the file or part that names it, for a message.
        metric: its name.
    """
    measured = dict.fromkeys(name for names in EVALUATED.values() for name in names)
    if metric not in measured:
        raise InputError(
            f"{named_in}: metric: {metric!r} is not measured; there are {', '.join(measured)}"
        )


def _mapping(path: Path, called: str, value: Any) -> Mapping[str, Any]:
    """A value of the file that has to be names with their values; `parts` needs at least one.

    Args:
        path: of the file.
        called: the value's keys in the file, for a message.
        value: to check.
    """
    if not isinstance(value, Mapping) or (not value and called == "parts"):
        raise InputError(f"{path}: {called}: expected names with their values, found {value!r}")
    return value


def _check_keys(called: str, values: Mapping[str, Any], known: set[str]) -> None:
    """Refuse keys that are not known; `called` says in a message where they stand."""
    for key in values:
        if key not in known:
            raise InputError(f"{called}: {key}: unknown key" + nearest(key, sorted(known)))
