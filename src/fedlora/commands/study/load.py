"""Reads a study's file and lists the runs that it stands for.

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
        grid:                      # every combination of one value of each axis
          ranks: {mixed: {client_ranks: [64, 4]}, equal: {client_ranks: 16}}
          method: {exact: {method: exact}, flora: {method: flora}}

A value of an axis is configuration keys. Two more words may stand among them: `alone: K` trains
client K by itself, `trainer: adalora` is another local training. `null` in the place of a whole
value leaves it out at this size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.commands.study.plan import Part, Planned, Study, shipped
from fedlora.config.config import Config
from fedlora.config.keys import EVALUATED
from fedlora.config.sources import layered, read_yaml
from fedlora.embedded import CONFIG as EMBEDDED_CONFIG
from fedlora.embedded import EMBEDDED
from fedlora.errors import InputError
from fedlora.methods import METHODS
from fedlora.text import nearest

Keys = Mapping[str, Any]
"""Configuration keys and their values, perhaps with `alone` and `trainer` among them."""
Grid = dict[str, dict[str, Keys]]
"""Axis -> name of a value -> what it sets."""

TRAINERS = ("adalora",)
_OF_STUDY = {"question", "metric", "seeds", "sizes", "parts"}
_OF_PART = {"title", "compare", "reference", "grid", "keys", "metric", "seeds", "sizes"}
_OF_SIZE = {"base", "keys", "grid", "seeds", "metric"}
_FIXED = {"output_dir": "each run has its own directory", "seed": "give seeds: [0, 1, 2]"}


def load_study(
    name: str,
    *,
    size: str | None = None,
    seeds: Sequence[int] | None = None,
    only: Sequence[str] = (),
    where: Mapping[str, Sequence[str]] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Study:
    """Read a study and lay out its runs.

    Args:
        name: a file, or the name of a shipped study.
        size: one of its sizes; None: the first.
        seeds: instead of the file's.
        only: names of parts; none: all.
        where: axis -> the values to keep.
        overrides: configuration keys over all others, for every run.

    Raises:
        InputError: the file or a run's configuration is wrong.
    """
    file = _read(name, size)
    for wanted in only:
        if wanted not in file.parts:
            raise InputError(f"--part {wanted}: {file.path.name} has {', '.join(file.parts)}")
    base = _base(file.path, file.at_size.get("base"))
    metric = str(file.at_size.get("metric") or file.top.get("metric") or "loss")
    _check_metric(str(file.path), metric)
    parts, runs = list[Part](), list[Planned]()
    for part_name in file.parts:
        if only and part_name not in only:
            continue
        table = _table(file, part_name, base, metric, seeds)
        part, planned = _laid_out(table, where or {}, overrides or {})
        parts.append(part)
        runs += planned
    _check_axes(where or {}, parts)
    runs.sort(key=lambda run: run.seed)  # whole seeds first: a study cut short compares fairly
    question = str(file.top.get("question", "")).strip()
    return Study(file.path.stem, file.size, question, tuple(parts), tuple(runs))


def _check_axes(where: Mapping[str, Sequence[str]], parts: Sequence[Part]) -> None:
    """Refuse an axis of `--where` that none of the parts has."""
    axes = dict.fromkeys(axis for part in parts for axis in part.axes)
    for axis in where:
        if axis not in axes:
            raise InputError(f"--where {axis}: no such axis; there are {', '.join(axes)}")


# --- what the file says ---


@dataclass(frozen=True)
class _File:
    """A study's file at one of its sizes.

    Args:
        path: where it lies.
        top: all that stands in it.
        size: the size that was chosen.
        at_size: what stands under that size.
        parts: name -> what stands under it.
    """

    path: Path
    top: Mapping[str, Any]
    size: str
    at_size: Mapping[str, Any]
    parts: Mapping[str, Any]


def _read(name: str, size: str | None) -> _File:
    """The file of a study, its outermost keys checked."""
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
    return _File(path, top, chosen, at_size, _mapping(path, "parts", top.get("parts")))


@dataclass(frozen=True)
class _Table:
    """A part of the file, with what its size changes put in its place.

    Args:
        where: the part in a message.
        name: of the part.
        settings: title, compare, reference and metric, where they are given.
        grid: its axes.
        layers: keys of all its runs, the later ones over the earlier.
        seeds: of its runs.
    """

    where: str
    name: str
    settings: Mapping[str, Any]
    grid: Grid
    layers: Sequence[Keys]
    seeds: Sequence[int]


def _table(file: _File, name: str, base: Keys, metric: str, seeds: Sequence[int] | None) -> _Table:
    """What a part of the file says at the size that was chosen.

    Args:
        file: the study's.
        name: of the part.
        base: the keys that all runs share.
        metric: where the part names none.
        seeds: instead of the file's.
    """
    path = file.path
    part = _mapping(path, f"parts: {name}", file.parts[name])
    _check_keys(f"{path}: parts: {name}", part, _OF_PART)
    sizes = _mapping(path, f"{name}: sizes", part.get("sizes") or {})
    at_size = sizes.get(file.size) or {}
    _check_keys(f"{path}: {name}: sizes: {file.size}", at_size, _OF_PART)
    settings = {**part, **{key: x for key, x in at_size.items() if key not in ("grid", "keys")}}
    grid = _grid(path, name, [part, file.at_size, at_size])
    layers = [
        _mapping(path, f"{name}: keys", layer.get("keys") or {})
        for layer in (file.at_size, part, at_size)
    ]
    given = seeds or settings.get("seeds") or file.at_size.get("seeds") or file.top.get("seeds")
    return _Table(
        f"{path.name}: {name}",
        name,
        {"metric": metric, **settings},
        grid,
        [base, *layers],
        _seeds(path, given),
    )


# --- the runs it stands for ---


def _laid_out(
    table: _Table, where: Mapping[str, Sequence[str]], overrides: Keys
) -> tuple[Part, list[Planned]]:
    """A part and its runs: every combination of one value of each axis, with every seed."""
    compare, reference = _comparison(table)
    _check_metric(table.where, str(table.settings["metric"]))
    grid = _kept(table.grid, where)
    if reference not in grid[compare]:
        reference = next(iter(grid[compare]))  # the first that --where leaves
    runs: list[Planned] = []
    left_out: dict[str, None] = {}
    for labels in _combinations(grid):
        keys = layered(
            {"save_total_limit": 2},
            *table.layers,
            *(grid[axis][label] for axis, label in labels.items()),
            overrides,
        )
        alone, trainer = _taken_apart(table.where, keys)
        if why := _impossible(keys):
            left_out[why] = None
            continue
        keys = _typed(table.where, labels, keys)
        runs += [Planned(table.name, labels, seed, keys, alone, trainer) for seed in table.seeds]
    part = Part(
        name=table.name,
        title=str(table.settings.get("title", table.name)),
        axes={axis: tuple(values) for axis, values in grid.items()},
        compare=compare,
        reference=reference,
        metric=table.settings["metric"],
        left_out=tuple(left_out),
    )
    return part, runs


def _comparison(table: _Table) -> tuple[str, str]:
    """The axis whose values are compared (the last unless named), and the value to compare to."""
    grid, settings = table.grid, table.settings
    compare = str(settings.get("compare", list(grid)[-1]))
    if compare not in grid:
        raise InputError(
            f"{table.where}: compare: {compare!r} is no axis; there are {', '.join(grid)}"
        )
    reference = str(settings.get("reference", next(iter(grid[compare]))))
    if reference not in grid[compare]:
        raise InputError(
            f"{table.where}: reference: {reference!r} is no value of {compare}; there are "
            + ", ".join(grid[compare])
        )
    return compare, reference


def _combinations(grid: Grid) -> Iterator[dict[str, str]]:
    """Axis -> the name of one of its values, in every combination."""
    for labels in itertools.product(*grid.values()):
        yield dict(zip(grid, labels, strict=True))


def _taken_apart(where: str, keys: dict[str, Any]) -> tuple[int | None, str | None]:
    """`alone` and `trainer`, taken out of the keys; what is left may not set what is fixed."""
    alone, trainer = keys.pop("alone", None), keys.pop("trainer", None)
    if alone is not None and not (type(alone) is int and alone >= 0):
        raise InputError(f"{where}: alone: {alone!r}: expected a client's number, from 0")
    if trainer is not None and trainer not in TRAINERS:
        raise InputError(f"{where}: trainer: {trainer!r} is none of {', '.join(TRAINERS)}")
    for key, why in _FIXED.items():
        if key in keys:
            raise InputError(f"{where}: {key}: {why}")
    return alone, trainer


def _typed(where: str, labels: Mapping[str, str], keys: Keys) -> dict[str, Any]:
    """Keys with values of their types: `1` from the command line and 1 are the same run."""
    try:
        typed = Config(**keys).flat()
    except InputError as error:
        at = ", ".join(f"{axis} {label}" for axis, label in labels.items())
        raise InputError(f"{where}, {at}: {error}") from None
    return {key: typed[key] for key in keys}


def _impossible(keys: Keys) -> str:
    """Why a combination of the grid is no run; empty where it is one."""
    rule, ranks = METHODS.get(str(keys.get("method", "exact"))), keys.get("client_ranks")
    if rule and not rule.mixed_ranks and isinstance(ranks, list) and len(set(ranks)) > 1:
        return f"{rule.name} needs one rank for all clients"
    return ""


def _kept(grid: Grid, where: Mapping[str, Sequence[str]]) -> Grid:
    """The grid with those values alone that `--where` names."""
    out = dict(grid)
    for axis, labels in where.items():
        if axis not in grid:
            continue
        whole = ",".join(labels)
        if whole in grid[axis]:  # a name that has a comma in it
            labels = [whole]
        for label in labels:
            if label not in grid[axis]:
                raise InputError(f"--where {axis}={label}: there are {', '.join(grid[axis])}")
        out[axis] = {label: keys for label, keys in grid[axis].items() if label in labels}
    return out


# --- the values in it ---


def _grid(path: Path, part: str, layers: Sequence[Mapping[str, Any]]) -> Grid:
    """The part's axes; a size may give other keys for a value, or leave it out with null.

    Args:
        path: of the file.
        part: its name.
        layers: the part, the size, and the part at this size, each with a `grid` perhaps.
    """
    of_part, *of_sizes = [layer.get("grid") for layer in layers]
    out: Grid = {}
    for axis, given in _mapping(path, f"{part}: grid", of_part).items():
        where, values = f"{part}: grid: {axis}", dict[str, Any]()
        for layer in (given, *((grid or {}).get(axis) or {} for grid in of_sizes)):
            if isinstance(layer, list):  # `method: [exact, flora]`: the axis is the key
                layer = {str(value): {axis: value} for value in layer}
            values |= _mapping(path, where, layer)
        out[axis] = {
            str(label): dict(_mapping(path, f"{where}: {label}", keys))
            for label, keys in values.items()
            if keys is not None
        }
        if not out[axis]:
            raise InputError(f"{path}: {where} has no values")
    if not out:
        raise InputError(f"{path}: {part}: grid: has no axes")
    return out


def _seeds(path: Path, given: Any) -> list[int]:
    seeds = [0] if given is None else given
    if not isinstance(seeds, list | tuple) or not all(type(s) is int and s >= 0 for s in seeds):
        raise InputError(f"{path}: seeds: {given!r}: expected a list of whole numbers from 0")
    return list(seeds)


def _check_metric(where: str, metric: str) -> None:
    measured = dict.fromkeys(name for names in EVALUATED.values() for name in names)
    if metric not in measured:
        raise InputError(
            f"{where}: metric: {metric!r} is not measured; there are {', '.join(measured)}"
        )


def _base(path: Path, given: Any) -> dict[str, Any]:
    """The keys all runs share: the embedded default's, another file's, or written out."""
    if given is None:
        return {}
    if given == EMBEDDED:
        return read_yaml(EMBEDDED_CONFIG)
    if isinstance(given, str):
        return read_yaml(path.parent / given)
    return dict(_mapping(path, "base", given))


def _mapping(path: Path, what: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or (not value and what == "parts"):
        raise InputError(f"{path}: {what}: expected names with their values, found {value!r}")
    return value


def _check_keys(where: str, values: Mapping[str, Any], known: set[str]) -> None:
    for key in values:
        if key not in known:
            raise InputError(f"{where}: {key}: unknown key" + nearest(key, sorted(known)))
