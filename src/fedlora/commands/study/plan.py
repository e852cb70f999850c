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

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.config.config import EVALUATED, Config
from fedlora.config.sources import layered, read_yaml
from fedlora.embedded import CONFIG as EMBEDDED_CONFIG
from fedlora.embedded import EMBEDDED
from fedlora.errors import InputError
from fedlora.methods import METHODS
from fedlora.text import nearest

SHIPPED = Path(__file__).parent / "studies"
TRAINERS = ("adalora",)
_STUDY = {"question", "metric", "seeds", "sizes", "parts"}
_PART = {"title", "compare", "reference", "grid", "keys", "metric", "seeds", "sizes"}
_SIZE = {"base", "keys", "grid", "seeds", "metric"}
_FIXED = {"output_dir": "each run has its own directory", "seed": "give seeds: [0, 1, 2]"}


@dataclass(frozen=True)
class Part:
    """One table of a study.

    Args:
        name, title: what it is called, and one line on it.
        axes: axis -> its values' names, in the order of the file.
        compare: the axis whose values are compared.
        reference: the value of it that differences are taken to.
        metric: the key of the last evaluation that is compared.
        left_out: what of the grid cannot be run, and why.
    """

    name: str
    title: str
    axes: Mapping[str, tuple[str, ...]]
    compare: str
    reference: str
    metric: str
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Planned:
    """One run of a study.

    Args:
        part: the part it belongs to.
        labels: axis -> the value it stands for.
        seed: of all its draws.
        keys: configuration keys, without `output_dir`.
        alone: the client that trains by itself; None: the federation.
        trainer: another local training; None: fedlora's.
        called: the name of its directory; "": one that its settings make.
    """

    part: str
    labels: Mapping[str, str]
    seed: int
    keys: Mapping[str, Any]
    alone: int | None = None
    trainer: str | None = None
    called: str = ""

    @property
    def directory(self) -> str:
        """The same for the same settings, whatever part asks for them: they run once."""
        if self.called:
            return self.called
        text = json.dumps([dict(self.keys), self.seed, self.alone, self.trainer], sort_keys=True)
        who = "" if self.alone is None else f"-alone-{self.alone}"
        trainer = f"-{self.trainer}" if self.trainer else ""
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        return f"{self.keys.get('method', 'exact')}{who}{trainer}-seed-{self.seed}-{digest}"

    def config(self, output_dir: Path) -> Config:
        """Its configuration.

        Raises:
            InputError: a key or value is wrong.
        """
        return Config(**{**self.keys, "seed": self.seed, "output_dir": str(output_dir)})


@dataclass(frozen=True)
class Study:
    """A study at one size.

    Args:
        name: of its file.
        size: which of its sizes.
        question: what it asks.
        parts: its tables.
        runs: all runs, in the order they are made: one seed after the other.
    """

    name: str
    size: str
    question: str
    parts: tuple[Part, ...]
    runs: tuple[Planned, ...] = field(repr=False)


def shipped() -> dict[str, Path]:
    """The studies of the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


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
    path = shipped().get(name, Path(name))
    if not path.is_file():
        raise InputError(
            f"{name}: no such study; give a file or one of {', '.join(shipped())}"
            + nearest(name, list(shipped()), "")
        )
    file = read_yaml(path)
    _check_keys(str(path), file, _STUDY)
    sizes = _mapping(path, "sizes", file.get("sizes") or {"default": {}})
    chosen = size or next(iter(sizes))
    if chosen not in sizes:
        raise InputError(f"--size {chosen}: {path.name} has {', '.join(sizes)}")
    own = _mapping(path, f"sizes: {chosen}", sizes[chosen] or {})
    _check_keys(f"{path}: sizes: {chosen}", own, _SIZE)
    parts = _mapping(path, "parts", file.get("parts"))
    for wanted in only:
        if wanted not in parts:
            raise InputError(f"--part {wanted}: {path.name} has {', '.join(parts)}")
    base = _base(path, own.get("base"))
    metric = str(own.get("metric") or file.get("metric") or "loss")
    _check_metric(str(path), metric)
    made, runs = list[Part](), list[Planned]()
    for part_name, given in parts.items():
        if only and part_name not in only:
            continue
        spec = _mapping(path, f"parts: {part_name}", given)
        _check_keys(f"{path}: parts: {part_name}", spec, _PART)
        at_size = _mapping(path, f"{part_name}: sizes", spec.get("sizes") or {}).get(chosen) or {}
        _check_keys(f"{path}: {part_name}: sizes: {chosen}", at_size, _PART)
        spec = {**spec, **{key: x for key, x in at_size.items() if key not in ("grid", "keys")}}
        grid = _grid(path, part_name, spec, own.get("grid") or {}, at_size.get("grid") or {})
        keys = [
            _mapping(path, f"{part_name}: keys", layer.get("keys") or {})
            for layer in (own, spec, at_size)
        ]
        part, planned = _part(
            f"{path.name}: {part_name}",
            part_name,
            {"metric": metric, **spec},
            grid,
            where or {},
            [base, *keys],
            _seeds(path, seeds or spec.get("seeds") or own.get("seeds") or file.get("seeds")),
            overrides or {},
        )
        made.append(part)
        runs += planned
    for axis in where or {}:
        if not any(axis in part.axes for part in made):
            axes = dict.fromkeys(axis for part in made for axis in part.axes)
            raise InputError(f"--where {axis}: no such axis; there are {', '.join(axes)}")
    runs.sort(key=lambda run: run.seed)  # whole seeds first: a study cut short compares fairly
    return Study(path.stem, chosen, str(file.get("question", "")).strip(), tuple(made), tuple(runs))


def _part(
    where: str,
    name: str,
    spec: Mapping[str, Any],
    grid: dict[str, dict[str, dict[str, Any]]],
    kept: Mapping[str, Sequence[str]],
    layers: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    overrides: Mapping[str, Any],
) -> tuple[Part, list[Planned]]:
    compare = str(spec.get("compare", list(grid)[-1]))
    if compare not in grid:
        raise InputError(f"{where}: compare: {compare!r} is no axis; there are {', '.join(grid)}")
    reference = str(spec.get("reference", next(iter(grid[compare]))))
    if reference not in grid[compare]:
        raise InputError(
            f"{where}: reference: {reference!r} is no value of {compare}; there are "
            + ", ".join(grid[compare])
        )
    _check_metric(where, str(spec["metric"]))
    grid = _kept(grid, kept)
    if reference not in grid[compare]:
        reference = next(iter(grid[compare]))  # the first that --where leaves
    runs: list[Planned] = []
    left_out: dict[str, None] = {}
    for labels in itertools.product(*grid.values()):
        of = dict(zip(grid, labels, strict=True))
        keys = layered(
            {"save_total_limit": 2},
            *layers,
            *(grid[axis][label] for axis, label in of.items()),
            overrides,
        )
        alone, trainer = keys.pop("alone", None), keys.pop("trainer", None)
        if alone is not None and not (type(alone) is int and alone >= 0):
            raise InputError(f"{where}: alone: {alone!r}: expected a client's number, from 0")
        if trainer is not None and trainer not in TRAINERS:
            raise InputError(f"{where}: trainer: {trainer!r} is none of {', '.join(TRAINERS)}")
        for key, why in _FIXED.items():
            if key in keys:
                raise InputError(f"{where}: {key}: {why}")
        if why := _impossible(keys):
            left_out[why] = None
            continue
        try:
            typed = Config(**keys).flat()  # `1` from the command line and 1 are the same run
        except InputError as error:
            at = ", ".join(f"{axis} {label}" for axis, label in of.items())
            raise InputError(f"{where}, {at}: {error}") from None
        keys = {key: typed[key] for key in keys}
        runs += [Planned(name, of, int(seed), keys, alone, trainer) for seed in seeds]
    axes = {axis: tuple(values) for axis, values in grid.items()}
    title = str(spec.get("title", name))
    return Part(name, title, axes, compare, reference, spec["metric"], tuple(left_out)), runs


def _impossible(keys: Mapping[str, Any]) -> str:
    """Why a combination of the grid is no run; empty where it is one."""
    rule, ranks = METHODS.get(str(keys.get("method", "exact"))), keys.get("client_ranks")
    if rule and not rule.mixed_ranks and isinstance(ranks, list) and len(set(ranks)) > 1:
        return f"{rule.name} needs one rank for all clients"
    return ""


def _grid(
    path: Path,
    part: str,
    spec: Mapping[str, Any],
    of_size: Mapping[str, Any],
    of_part: Mapping[str, Any],
) -> dict[str, dict[str, dict[str, Any]]]:
    """The part's axes; a size may give other keys for a value, or leave it out with null."""
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for axis, given in _mapping(path, f"{part}: grid", spec.get("grid")).items():
        where, values = f"{part}: grid: {axis}", dict[str, Any]()
        for layer in (given, of_size.get(axis) or {}, of_part.get(axis) or {}):
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
    known = dict.fromkeys(name for names in EVALUATED.values() for name in names)
    if metric not in known:
        raise InputError(
            f"{where}: metric: {metric!r} is not measured; there are {', '.join(known)}"
        )


def _kept(
    grid: dict[str, dict[str, dict[str, Any]]], where: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, dict[str, Any]]]:
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
