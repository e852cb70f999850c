"""Reads a run's directory as it is: whole, unfinished, damaged, or from an older version.

What one run lacks raises nothing: it is said in `Run.damage`, and the rest is used. Neither torch
nor a rule is imported, so that a look at a run is quick.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.yaml_file import read_yaml
from fedlora.errors import InputError
from fedlora.runs.file_names import CONFIG, METRICS, as_written
from fedlora.runs.metrics_log import read_metrics

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run's directory holds.

    Args:
        path: the directory.
        name: what to call it where nothing tells runs apart better.
        config: its resolved configuration; empty where there is none.
        config_text: the same as it stands in the file.
        begin: the line on model, clients and environment; empty in older runs.
        start: the line on the base before training; empty where there is none.
        rounds: the lines of the rounds, ascending.
        evals: the lines that `fedlora eval` appended.
        end: the last line of a run that is complete; empty otherwise.
        damage: what is missing or damaged of its files, a sentence each.
    """

    path: Path
    name: str
    config: dict[str, Any]
    config_text: str
    begin: Line
    start: Line
    rounds: tuple[Line, ...]
    evals: tuple[Line, ...]
    end: Line
    damage: tuple[str, ...]

    @property
    def method(self) -> str:
        """The aggregation rule, or "unknown method"."""
        return str(self.config.get("method") or self.begin.get("method") or "unknown method")

    @property
    def written(self) -> dict[str, Any]:
        """The configuration with what the run settled by itself as the user wrote it."""
        return {**self.config, **as_written(self.config_text)} if self.config else self.config

    @property
    def seed(self) -> int | None:
        """The seed, where it is known."""
        value = self.config.get("seed")
        return value if isinstance(value, int) else None

    @property
    def planned(self) -> int | None:
        """How many rounds there will be, where it is known."""
        return whole(self.config.get("num_rounds")) or whole(self.begin.get("num_rounds"))

    @property
    def last_round(self) -> int:
        """The newest round that is saved; 0 before the first."""
        return int(self.rounds[-1]["round"]) if self.rounds else 0


def number(value: Any) -> float | None:
    """A finite number, or None: damaged lines hold anything."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond float64
        return None


def whole(value: Any) -> int | None:
    """A whole number that is not negative, or None."""
    plain = number(value)
    return int(plain) if plain is not None and plain >= 0 and plain == int(plain) else None


def bytes_of(line: Line) -> tuple[int, int]:
    """All bytes up and down that a line tells of: its round, attempts given up, evaluations."""
    up, down = ("bytes_up", "given_up_bytes_up"), ("bytes_down", "given_up_bytes_down")
    together = [sum(whole(line.get(key)) or 0 for key in keys) for keys in (up, down)]
    return together[0], together[1] + (whole(line.get("evaluation_bytes_down")) or 0)


def mapping(value: Any) -> dict[str, Any]:
    """A mapping with text as keys, or an empty one."""
    return {str(k): x for k, x in value.items()} if isinstance(value, Mapping) else {}


def listed(value: Any) -> list[dict[str, Any]]:
    """The mappings of a list, or none."""
    return [mapping(x) for x in value if isinstance(x, Mapping)] if isinstance(value, list) else []


def outcome_of(entry: Line) -> str:
    """What became of a client in a round: `counted`, `failed`, `late` or `unneeded`.

    Args:
        entry: of the client, in the round's line; older versions only say why it does not count.
    """
    return str(entry.get("outcome") or ("failed" if entry.get("rejected") else "counted"))


# --- one run ---


def is_run(path: Path) -> bool:
    """Whether a directory holds a run, be it a damaged one."""
    return (path / CONFIG).is_file() or (path / METRICS).is_file()


def read_run(path: Path, name: str = "") -> Run:
    """Everything a run's directory says.

    Args:
        path: the directory.
        name: what to call the run; "": as its directory.
    """
    damage: list[str] = []
    config, text = _read_config(path, damage)
    lines = _read_lines(path, damage)
    rounds = sorted(
        (x for x in lines if x["event"] == "round" and whole(x["round"])),
        key=lambda line: int(line["round"]),
    )
    return Run(
        path,
        name or path.name,
        config,
        text,
        _one(lines, "begin"),
        _one(lines, "start"),
        tuple(rounds),
        tuple(x for x in lines if x["event"] == "eval"),
        _one(lines, "end"),
        tuple(damage),
    )


def _one(lines: Sequence[Line], event: str) -> Line:
    return next((x for x in reversed(lines) if x["event"] == event), {})


def _read_config(path: Path, damage: list[str]) -> tuple[dict[str, Any], str]:
    file = path / CONFIG
    if not file.is_file():
        damage.append(f"{CONFIG} is missing: the configuration cannot be shown")
        return {}, ""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
        return read_yaml(file), text
    except OSError as error:
        damage.append(f"{CONFIG} cannot be read: {error.strerror}")
        return {}, ""
    except InputError as error:
        damage.append(f"{CONFIG} is damaged ({str(error).partition(': ')[2]})")
        return {}, text


def _read_lines(path: Path, damage: list[str]) -> list[Line]:
    """The lines that can be used, in the sense of `read_metrics`."""
    file = path / METRICS
    if not file.is_file():
        damage.append(f"{METRICS} is missing: there is nothing measured to show")
        return []
    try:
        content = file.read_bytes()
    except OSError as error:
        damage.append(f"{METRICS} cannot be read: {error.strerror}")
        return []
    texts = content.decode("utf-8", errors="replace").splitlines()
    sound = [text for text in texts if _sound(text)]
    broken = sum(bool(text.strip()) for text in texts) - len(sound)
    if broken:
        lines = "line is" if broken == 1 else "lines are"
        damage.append(f"{METRICS}: {broken} {lines} damaged and left out")
    elif not sound:
        damage.append(f"{METRICS} is empty: the run has not begun")
    if not broken:
        return [*read_metrics(path)]
    # What resuming means is known in one place; it is given what can be read.
    with tempfile.TemporaryDirectory() as mended:
        (Path(mended) / METRICS).write_text("".join(f"{x}\n" for x in sound), encoding="utf-8")
        return [*read_metrics(mended)]


def _sound(text: str) -> bool:
    if "\ufffd" in text:  # what is no text; lines are written in ASCII
        return False
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(line, dict)
        and isinstance(line.get("event"), str)
        and whole(line.get("round")) is not None
    )
