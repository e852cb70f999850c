"""Reads a run's directory as it is: whole, unfinished, damaged, or from an older version.

Nothing here raises over what one run lacks: it is said in `Run.problems`, and the rest is used.
"""

from __future__ import annotations

import json
import math
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.sources import read_yaml
from fedlora.errors import InputError
from fedlora.runs.file_names import AS_WRITTEN, CONFIG, FINAL, METRICS
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
        problems: what is missing or damaged, a sentence each.
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
    problems: tuple[str, ...]

    @property
    def method(self) -> str:
        """The aggregation rule, or "unknown method"."""
        return str(self.config.get("method") or self.begin.get("method") or "unknown method")

    @property
    def written(self) -> dict[str, Any]:
        """The configuration with what the run settled by itself as the user wrote it."""
        last = self.config_text.rstrip().rpartition("\n")[2]
        if not self.config or not last.startswith(AS_WRITTEN):
            return self.config
        try:
            return {**self.config, **mapping(json.loads(last.removeprefix(AS_WRITTEN)))}
        except (ValueError, RecursionError):
            return self.config

    @property
    def seed(self) -> int | None:
        """The seed, where it is known."""
        value = self.config.get("seed")
        return value if isinstance(value, int) else None


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


def mapping(value: Any) -> dict[str, Any]:
    """A mapping with text as keys, or an empty one."""
    return {str(k): x for k, x in value.items()} if isinstance(value, Mapping) else {}


def listed(value: Any) -> list[dict[str, Any]]:
    """The mappings of a list, or none."""
    return [mapping(x) for x in value if isinstance(x, Mapping)] if isinstance(value, list) else []


# --- which runs ---


def _is_run(path: Path) -> bool:
    return (path / CONFIG).is_file() or (path / METRICS).is_file()


def find_runs(paths: Sequence[str]) -> list[Path]:
    """The runs in these directories: each is a run, or holds runs as its subdirectories.

    Raises:
        InputError: a path does not exist, is no directory, or holds no run.
    """
    runs: dict[Path, Path] = {}
    for text in paths:
        path = Path(text)
        if not path.exists():
            raise InputError(f"{text}: no such directory; give the output directory of a run")
        if not path.is_dir():
            raise InputError(f"{text}: is a file; give the output directory of a run")
        try:
            inside = [path] if _is_run(path) else _below(path)
        except OSError as error:
            raise InputError(f"{text}: cannot be read: {error.strerror}") from None
        if not inside:
            raise InputError(
                f"{text}: holds no run (neither {CONFIG} nor {METRICS}, nor a directory that does);"
                " give what --output_dir named"
            )
        for run in inside:
            runs.setdefault(run.resolve(), run)
    return list(runs.values())


def _below(path: Path) -> list[Path]:
    """Runs one or two levels below, as a study or the demo writes them."""
    out = []
    for child in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if _is_run(child):
            out.append(child)
        else:
            inner = (p for p in child.iterdir() if p.is_dir() and not p.name.startswith("."))
            out += sorted(p for p in inner if _is_run(p))
    return out


def names_of(paths: Sequence[Path]) -> list[str]:
    """A different name for every run: as many last parts of its path as that takes."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(x[-depth:]) for x in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


# --- one run ---


def read_run(path: Path, name: str) -> Run:
    """Everything a run's directory says, and what it does not."""
    problems: list[str] = []
    config, text = _read_config(path, problems)
    lines = _read_lines(path, problems)
    first = _one(lines, "begin")
    start = _one(lines, "start")
    end = _one(lines, "end")
    rounds = sorted(
        (x for x in lines if x["event"] == "round" and whole(x["round"])),
        key=lambda line: int(line["round"]),
    )
    evals = tuple(x for x in lines if x["event"] == "eval")
    if lines:
        _say_what_lacks(path, config, first, start, rounds, end, problems)
    return Run(
        path, name, config, text, first, start, tuple(rounds), evals, end, tuple(problems)
    )  # fmt: skip


def _one(lines: Sequence[Line], event: str) -> Line:
    return next((x for x in reversed(lines) if x["event"] == event), {})


def _read_config(path: Path, problems: list[str]) -> tuple[dict[str, Any], str]:
    file = path / CONFIG
    if not file.is_file():
        problems.append(f"{CONFIG} is missing: the configuration cannot be shown")
        return {}, ""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
        return read_yaml(file), text
    except OSError as error:
        problems.append(f"{CONFIG} cannot be read: {error.strerror}")
        return {}, ""
    except InputError as error:
        problems.append(f"{CONFIG} is damaged ({str(error).partition(': ')[2]})")
        return {}, text


def _read_lines(path: Path, problems: list[str]) -> list[Line]:
    """The lines that can be used, in the sense of `read_metrics`."""
    file = path / METRICS
    if not file.is_file():
        problems.append(f"{METRICS} is missing: there is nothing measured to show")
        return []
    try:
        content = file.read_bytes()
    except OSError as error:
        problems.append(f"{METRICS} cannot be read: {error.strerror}")
        return []
    texts = content.decode("utf-8", errors="replace").splitlines()
    sound = [text for text in texts if _sound(text)]
    broken = sum(bool(text.strip()) for text in texts) - len(sound)
    if broken:
        lines = "line is" if broken == 1 else "lines are"
        problems.append(f"{METRICS}: {broken} {lines} damaged and left out")
    elif not sound:
        problems.append(f"{METRICS} is empty: the run has not begun")
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


def _say_what_lacks(
    path: Path,
    config: Line,
    begin: Line,
    start: Line,
    rounds: Sequence[Line],
    end: Line,
    problems: list[str],
) -> None:
    if not begin:
        problems.append(
            "no line on how it began (an older version wrote none): rows by kind, model size and "
            "environment are not known"
        )
    if not start:
        problems.append("the base was not evaluated before training, or its line is lost")
    planned = whole(config.get("num_rounds")) or whole(begin.get("num_rounds"))
    numbers = [int(line["round"]) for line in rounds]
    last = max(numbers, default=0)
    missing = sorted(set(range(1, last + 1)) - set(numbers))
    if missing:
        problems.append(f"no line of round{'s' * (len(missing) > 1)} {_brief(missing)}")
    if not end:
        of = f" of {planned}" if planned else ""
        problems.append(
            f"not finished: {last}{of} rounds; if it no longer runs, go on with: "
            f"fedlora run --resume {shlex.quote(str(path))}"
            if last
            else f"not finished: no round of {planned or 'it'} has ended"
        )
    elif not (path / FINAL).is_dir():
        problems.append("final/ is missing though the run ended")
    silent = [int(x["round"]) for x in rounds if not mapping(x.get("evaluation"))]
    if rounds and len(silent) == len(rounds):
        problems.append("no round was evaluated: quality by round cannot be shown")


def _brief(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return shown + (f" and {len(numbers) - 6} more" if len(numbers) > 6 else "")
