"""Holds a study laid out: its tables, and the runs that fill them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.config.config import Config

SHIPPED = Path(__file__).parent / "studies"


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
        choose: the axis of which every row of the table has one value, the best one on validation
            rows; "": none, all values are shown.
    """

    name: str
    title: str
    axes: Mapping[str, tuple[str, ...]]
    compare: str
    reference: str
    metric: str
    left_out: tuple[str, ...] = ()
    choose: str = ""

    @property
    def of_cell(self) -> list[str]:
        """The axes whose values make a cell: all but the compared and the chosen one."""
        return [axis for axis in self.axes if axis not in (self.compare, self.choose)]


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
