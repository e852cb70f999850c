"""Finds the runs that a report is about, and says what they lack."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from fedlora.commands.run_files import Run, is_run, mapping
from fedlora.errors import InputError
from fedlora.runs.file_names import CONFIG, FINAL, METRICS


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
            inside = [path] if is_run(path) else _below(path)
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
        if is_run(child):
            out.append(child)
        else:
            inner = (p for p in child.iterdir() if p.is_dir() and not p.name.startswith("."))
            out += sorted(p for p in inner if is_run(p))
    return out


def names_of(paths: Sequence[Path]) -> list[str]:
    """A different name for every run: as many last parts of its path as that takes."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(x[-depth:]) for x in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def what_lacks(run: Run) -> list[str]:
    """What a report cannot show of a run, a sentence each: damage, and what was never written."""
    problems = list(run.damage)
    if not (run.begin or run.start or run.rounds or run.evals or run.end):
        return problems
    if not run.begin:
        problems.append(
            "no line on how it began (an older version wrote none): rows by kind, model size and "
            "environment are not known"
        )
    if not run.start:
        problems.append("the base was not evaluated before training, or its line is lost")
    numbers = [int(line["round"]) for line in run.rounds]
    missing = sorted(set(range(1, run.last_round + 1)) - set(numbers))
    if missing:
        problems.append(f"no line of round{'s' * (len(missing) > 1)} {_brief(missing)}")
    if not run.end:
        of = f" of {run.planned}" if run.planned else ""
        problems.append(
            f"not finished: {run.last_round}{of} rounds; if it no longer runs, go on with: "
            f"fedlora run --resume {shlex.quote(str(run.path))}"
            if run.last_round
            else f"not finished: no round of {run.planned or 'it'} has ended"
        )
    elif not (run.path / FINAL).is_dir():
        problems.append("final/ is missing though the run ended")
    silent = [int(x["round"]) for x in run.rounds if not mapping(x.get("evaluation"))]
    if run.rounds and len(silent) == len(run.rounds):
        problems.append("no round was evaluated: quality by round cannot be shown")
    return problems


def _brief(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return shown + (f" and {len(numbers) - 6} more" if len(numbers) > 6 else "")
