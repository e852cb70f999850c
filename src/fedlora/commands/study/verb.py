"""Runs `fedlora study`: a grid of runs, and one table with intervals."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fedlora.commands.json_lines import Emit
from fedlora.commands.study.load import load_study
from fedlora.commands.study.plan import Planned, Study, shipped
from fedlora.config.arguments import Option, Syntax, parse_overrides, take
from fedlora.errors import InputError

HELP = """\
fedlora study STUDY [--size SIZE] [--output_dir DIR] [--seeds N ...] [--part NAME ...]
              [--where AXIS=VALUE ...] [--processes N] [--dry_run] [--key value ...] [--json]

Makes a grid of runs, several at a time, and one page of tables: mean and spread over seeds, and the
paired difference to a reference with its 95% interval. What is complete is kept, so the same
command goes on after an interruption, and with more seeds makes only those that are new.

STUDY is a YAML file or the name of one that comes with the package:
  flora-paper         FLoRA's paper: its table, clients alone, traffic, scaling factors, AdaLoRA
  many-short-rounds   100 rounds of 10 steps, where rules that reset are known to fail
  rules               every rule, equal and mixed ranks, iid and Dirichlet, long and short rounds
  tuned-rates         every rule at its own best learning rate, chosen on held-out rows
  heterogeneity       how uneven the data, the ranks and the participation are
Each has the sizes `embedded` (minutes to hours on two cores, no network) and `gpu` (real models).

  --size SIZE         which of its sizes; the first unless given
  --output_dir DIR    study-NAME-SIZE unless given; in it table.md, runs.csv, summary.csv and runs/
  --seeds 0 1 2       instead of the file's
  --part NAME ...     only these of its tables
  --where AXIS=VALUE  only these values of an axis; several are separated by commas. Parts that do
                      not have the axis are made whole: choose parts with --part
  --processes N       runs at a time; otherwise one for each core (one on a GPU), fewer where memory
                      does not hold them
  --dry_run           list the runs
  --json              one JSON object when a run starts, ends a round, is done, fails or was kept;
                      then a table for each part, and end. With --dry_run one object, study
  --key value         a configuration key for every run, over all others

Examples:
  fedlora study many-short-rounds --where method=exact,flora --seeds 0
  fedlora study rules --part table --output_dir rules
  fedlora report rules/runs --output rules.html
"""


SYNTAX = Syntax(
    {
        "size": Option("the name of a size"),
        "output_dir": Option("where tables and runs go", path="directory"),
        "seeds": Option("seeds", many=True),
        "part": Option("tables", many=True),
        "where": Option("AXIS=VALUE", many=True),
        "processes": Option("runs at a time"),
        "dry_run": Option("list the runs", flag=True),
    },
    Option("a study or its file", values=tuple(shipped()), path="file"),
    keys=True,
)


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """Run or go on with a study and write its tables."""
    if not arguments or arguments[0].startswith("--"):
        raise InputError(f"study: give a file or one of {', '.join(shipped())}")
    name, rest = arguments[0], arguments[1:]
    options = take(rest, SYNTAX)
    overrides = parse_overrides(rest)
    where = _where(overrides.pop("where", None))
    only = [str(part) for part in _list(overrides.pop("part", None))]
    seeds = [_whole("seeds", seed, 0) for seed in _list(overrides.pop("seeds", None))]
    processes, output = options["processes"], options["output_dir"]
    number = None if processes is None else _whole("processes", processes, 1)
    study = load_study(
        name,
        size=options["size"],
        seeds=seeds or None,
        only=only,
        where=where,
        overrides=overrides,
    )
    directory = Path(str(output or f"study-{study.name}-{study.size}"))
    if directory.is_file():
        raise InputError(f"--output_dir {directory}: is a file")
    if options["dry_run"]:
        if emit:
            emit({"event": "study", "study": study.name, "size": study.size, **_runs(study)})
        else:
            _list_runs(study)
        return 0
    return _run(study, directory, number, emit)


def _run(study: Study, directory: Path, processes: int | None, emit: Emit | None) -> int:
    """Make the runs, write the tables, and show them; gives the exit code."""
    import torch

    from fedlora.commands.console import quiet_libraries
    from fedlora.commands.study.execute import check_kept, execute
    from fedlora.commands.study.show import Progress, show_tables
    from fedlora.commands.study.tables import table_record, tables

    quiet_libraries()
    runs = directory / "runs"
    check_kept(study.runs, runs)
    gpu = torch.cuda.is_available() and not all(r.keys.get("use_cpu") for r in study.runs)
    began = time.perf_counter()
    try:
        with nullcontext(_teller(emit)) if emit else Progress(study) as on_change:
            failed = execute(study.runs, runs, processes=processes, gpu=gpu, on_change=on_change)
    finally:  # what there is by now is worth a table, whatever ended the study
        if runs.is_dir():
            _write(study, directory, runs)
    if emit:
        for table in tables(study, runs):
            emit({"event": "table", **table_record(table)})
        seconds = time.perf_counter() - began
        emit({"event": "end", "seconds": seconds, "output_dir": str(directory), "failed": failed})
        return 1 if failed else 0
    show_tables(tables(study, runs))
    print(
        f"{time.perf_counter() - began:.0f} s; {directory}/table.md, runs.csv, summary.csv. "
        f"The page: fedlora report {runs} --output {directory}/report.html"
    )
    for run, why in failed.items():
        print(f"failed: {run}: {why}")
    return 1 if failed else 0


def _teller(emit: Emit) -> Callable[[str, Planned, Mapping[str, Any]], None]:
    """What happens to runs, as lines of JSON."""

    def on_change(what: str, run: Planned, message: Mapping[str, Any]) -> None:
        emit({"event": what, "run": run.directory, **_labels(run), **message})

    return on_change


def _labels(run: Planned) -> dict[str, Any]:
    return {"part": run.part, "labels": dict(run.labels), "seed": run.seed}


def _runs(study: Study) -> dict[str, Any]:
    """The runs of a study, as a program reads them."""
    parts = {p.name: {"title": p.title, "left_out": list(p.left_out)} for p in study.parts}
    return {"parts": parts, "runs": [{"run": r.directory, **_labels(r)} for r in study.runs]}


def _write(study: Study, directory: Path, runs: Path) -> None:
    from fedlora.commands.study.tables import tables
    from fedlora.commands.study.tables_csv import runs_csv, summary_csv
    from fedlora.commands.study.tables_markdown import markdown

    all_tables = tables(study, runs)
    texts = {
        "table.md": markdown(study, all_tables, _machine()),
        "runs.csv": runs_csv(study, runs),
        "summary.csv": summary_csv(all_tables),
    }
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")


def _machine() -> str:
    import os
    import platform

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return (
        f"`fedlora study`, {os.cpu_count()} cores, {device}, Python {platform.python_version()}, "
        f"torch {torch.__version__}."
    )


def _list_runs(study: Study) -> None:
    """Print the parts of a study and its runs, for `--dry_run`."""
    print(f"{study.name} ({study.size}): {len({r.directory for r in study.runs})} runs")
    for part in study.parts:
        mine = [run for run in study.runs if run.part == part.name]
        print(f"\n{part.name}: {part.title} ({len(mine)} runs)")
        for axis, labels in part.axes.items():
            print(f"  {axis}: {', '.join(labels)}")
        for why in part.left_out:
            print(f"  left out: {why}")
    print()
    for run in study.runs:
        print(f"  {describe(run)}  ->  runs/{run.directory}")


def describe(run: Planned) -> str:
    """A run by what it stands for."""
    return " ".join([f"{run.part}:", *run.labels.values(), f"seed {run.seed}"])


def _where(given: Any) -> Mapping[str, list[str]]:
    out: dict[str, list[str]] = {}
    for item in _list(given):
        axis, sign, labels = str(item).partition("=")
        if not sign or not labels:
            raise InputError(f"--where {item}: expected AXIS=VALUE, such as method=exact,flora")
        out[axis] = labels.split(",")
    return out


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    if value is True:
        raise InputError("a key without a value; see fedlora study --help")
    return value if isinstance(value, list) else [value]


def _whole(key: str, value: Any, least: int) -> int:
    if not str(value).isdecimal() or int(value) < least:
        raise InputError(f"--{key} {value}: expected a whole number from {least}")
    return int(value)
