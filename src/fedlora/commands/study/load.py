"""Lists the runs that a study stands for: every combination of its axes' values, every seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedlora.commands.study.plan import Part, Planned, Study
from fedlora.commands.study.study_file import (
    Grid,
    Keys,
    PartAtSize,
    base_keys,
    check_metric,
    part_at_size,
    read_study_file,
)
from fedlora.config.config import Config
from fedlora.config.sources import layered
from fedlora.errors import InputError
from fedlora.methods import METHODS

TRAINERS = ("adalora",)
"""What `trainer` may say."""
_FIXED = {"output_dir": "each run has its own directory", "seed": "give seeds: [0, 1, 2]"}
"""Keys that no run may set, and why."""


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
        seeds: in place of the file's; None: the file's.
        only: names of the parts to keep; empty: all.
        where: axis -> names of the values to keep; of other axes all are kept.
        overrides: configuration keys over all others, for every run.

    Returns:
        The parts, and the runs of all parts, those of the first seed before those of the second.

    Raises:
        InputError: the file or a run's configuration is wrong.
    """
    file = read_study_file(name, size)
    for part_name in only:
        if part_name not in file.parts:
            raise InputError(f"--part {part_name}: {file.path.name} has {', '.join(file.parts)}")
    base = base_keys(file.path, file.at_size.get("base"))
    metric = str(file.at_size.get("metric") or file.top.get("metric") or "loss")
    check_metric(str(file.path), metric)
    parts, runs = list[Part](), list[Planned]()
    for part_name in file.parts:
        if only and part_name not in only:
            continue
        part_in_file = part_at_size(file, part_name, base, metric, seeds)
        part, planned = _laid_out(part_in_file, where or {}, overrides or {})
        parts.append(part)
        runs += planned
    _check_axes(where or {}, parts)
    # One seed after the other, so that a study that is cut short still compares like with like.
    runs.sort(key=lambda run: run.seed)
    question = str(file.top.get("question", "")).strip()
    return Study(file.path.stem, file.size, question, tuple(parts), tuple(runs))


def _check_axes(where: Mapping[str, Sequence[str]], parts: Sequence[Part]) -> None:
    """Refuse an axis of `--where` that none of the parts has."""
    axes = dict.fromkeys(axis for part in parts for axis in part.axes)
    for axis in where:
        if axis not in axes:
            raise InputError(f"--where {axis}: no such axis; there are {', '.join(axes)}")


def _laid_out(
    part_in_file: PartAtSize, where: Mapping[str, Sequence[str]], overrides: Keys
) -> tuple[Part, list[Planned]]:
    """A part and its runs: every combination of one value of each axis, with every seed.

    Args:
        part_in_file: the part as the file has it at the size that was chosen.
        where: axis -> names of the values to keep.
        overrides: configuration keys over all others.
    """
    compare, reference = _comparison(part_in_file)
    choose = _chosen_axis(part_in_file, compare)
    check_metric(part_in_file.called, str(part_in_file.settings["metric"]))
    grid = _kept(part_in_file.grid, where)
    if reference not in grid[compare]:  # --where left it out
        reference = next(iter(grid[compare]))
    runs: list[Planned] = []
    left_out: dict[str, None] = {}
    for labels in _combinations(grid):
        keys = layered(
            {"save_total_limit": 2},
            *part_in_file.layers,
            *(grid[axis][label] for axis, label in labels.items()),
            overrides,
        )
        alone, trainer = _pop_alone_and_trainer(part_in_file.called, keys)
        if why := _impossible(keys):
            left_out[why] = None
            continue
        keys = _typed(part_in_file.called, labels, keys)
        if choose and not keys.get("client_eval_fraction"):
            raise InputError(
                f"{part_in_file.called}: choose: {choose} is chosen on rows that clients hold out; "
                "give client_eval_fraction"
            )
        runs += [
            Planned(part_in_file.name, labels, seed, keys, alone, trainer)
            for seed in part_in_file.seeds
        ]
    part = Part(
        name=part_in_file.name,
        title=str(part_in_file.settings.get("title", part_in_file.name)),
        axes={axis: tuple(values) for axis, values in grid.items()},
        compare=compare,
        reference=reference,
        metric=part_in_file.settings["metric"],
        left_out=tuple(left_out),
        choose=choose,
    )
    return part, runs


def _comparison(part_in_file: PartAtSize) -> tuple[str, str]:
    """The axis whose values are compared (the last unless named), and the value to compare to."""
    grid, settings = part_in_file.grid, part_in_file.settings
    compare = str(settings.get("compare", list(grid)[-1]))
    if compare not in grid:
        raise InputError(
            f"{part_in_file.called}: compare: {compare!r} is no axis; there are {', '.join(grid)}"
        )
    reference = str(settings.get("reference", next(iter(grid[compare]))))
    if reference not in grid[compare]:
        raise InputError(
            f"{part_in_file.called}: reference: {reference!r} is no value of {compare}; there are "
            + ", ".join(grid[compare])
        )
    return compare, reference


def _chosen_axis(part_in_file: PartAtSize, compare: str) -> str:
    """The axis of which the best value is chosen; "" where all values are shown."""
    choose = str(part_in_file.settings.get("choose") or "")
    possible = [axis for axis in part_in_file.grid if axis != compare]
    if choose and choose not in possible:
        raise InputError(
            f"{part_in_file.called}: choose: {choose!r} is no axis beside {compare}; there are "
            + (", ".join(possible) or "none")
        )
    return choose


def _combinations(grid: Grid) -> Iterator[dict[str, str]]:
    """Axis -> the name of one of its values, in every combination."""
    for labels in itertools.product(*grid.values()):
        yield dict(zip(grid, labels, strict=True))


def _pop_alone_and_trainer(part: str, keys: dict[str, Any]) -> tuple[int | None, str | None]:
    """Take `alone` and `trainer` out of a run's keys, and refuse keys that no run may set.

    Args:
        part: as a message names it.
        keys: of the run; the two are removed from it.
    """
    alone, trainer = keys.pop("alone", None), keys.pop("trainer", None)
    if alone is not None and not (type(alone) is int and alone >= 0):
        raise InputError(f"{part}: alone: {alone!r}: expected a client's number, from 0")
    if trainer is not None and trainer not in TRAINERS:
        raise InputError(f"{part}: trainer: {trainer!r} is none of {', '.join(TRAINERS)}")
    for key, why in _FIXED.items():
        if key in keys:
            raise InputError(f"{part}: {key}: {why}")
    return alone, trainer


def _typed(part: str, labels: Mapping[str, str], keys: Keys) -> dict[str, Any]:
    """A run's keys with values of their types, so that `1` as text and 1 are the same run.

    Args:
        part: as a message names it.
        labels: axis -> name of its value, for a message.
        keys: of the run.

    Raises:
        InputError: they are no possible configuration.
    """
    try:
        typed = Config(**keys).flat()
    except InputError as error:
        combination = ", ".join(f"{axis} {label}" for axis, label in labels.items())
        raise InputError(f"{part}, {combination}: {error}") from None
    return {key: typed[key] for key in keys}


def _impossible(keys: Keys) -> str:
    """Why no run is made of a combination of the grid; empty where one is."""
    rule, ranks = METHODS.get(str(keys.get("method", "exact"))), keys.get("client_ranks")
    if rule and not rule.mixed_ranks and isinstance(ranks, list) and len(set(ranks)) > 1:
        return f"{rule.name} needs one rank for all clients"
    return ""


def _kept(grid: Grid, where: Mapping[str, Sequence[str]]) -> Grid:
    """The grid with those values alone that `--where` names."""
    kept = dict(grid)
    for axis, labels in where.items():
        if axis not in grid:
            continue
        whole = ",".join(labels)
        if whole in grid[axis]:  # a name that has a comma in it
            labels = [whole]
        for label in labels:
            if label not in grid[axis]:
                raise InputError(f"--where {axis}={label}: there are {', '.join(grid[axis])}")
        kept[axis] = {label: keys for label, keys in grid[axis].items() if label in labels}
    return kept
