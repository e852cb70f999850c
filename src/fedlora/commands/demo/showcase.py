"""Runs `fedlora demo`: two methods and every client alone, one table and one picture."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotext
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora.commands.json_lines import Emit
from fedlora.commands.study.execute import execute
from fedlora.commands.study.plan import Planned, Study
from fedlora.commands.study.show import Progress
from fedlora.commands.study.statistics import mean_and_sd, paired
from fedlora.config.clients import client_ranks
from fedlora.config.config import Config
from fedlora.config.sources import layered
from fedlora.config.yaml_file import read_yaml
from fedlora.data.raw_data import load_rows
from fedlora.embedded import CONFIG
from fedlora.errors import FedloraError, InputError
from fedlora.runs.absolute_paths import resolve_paths
from fedlora.runs.metrics_log import read_metrics
from fedlora.text import human_bytes

COMPARED = ("exact", "flora")
METRIC = "exact_match"
SEEDS = (0,)
"""Another seed is another division of the data, initialisation and order of batches. One shows what
training together brings; two methods that lie close need several to be told apart."""
SETTINGS = {"num_rounds": 4, "eval_rounds": 2}
"""In the place of the embedded default's five rounds, each evaluated: less to wait for."""
FIXED = ("method", "eval_rounds", "eval_exact_match", "early_stopping_patience")


@dataclass(frozen=True)
class Shown:
    """What the demonstration measured; exact match is a share of the held-out rows.

    Args:
        rounds: the numbers of the rounds that were evaluated; 0 is the base.
        curves: method -> seed -> exact match after each of these rounds.
        alone: client -> exact match of its own training, on the first seed, at the end.
        sizes: method -> bytes up and down of a run, the mean over seeds.
        seconds: all of it took.
        path: the directory that holds the runs.
    """

    rounds: Sequence[int]
    curves: Mapping[str, Mapping[int, Sequence[float]]]
    alone: Mapping[int, float]
    sizes: Mapping[str, tuple[float, float]]
    seconds: float
    path: Path

    @property
    def seeds(self) -> list[int]:
        """Every seed that was run."""
        return list(next(iter(self.curves.values())))

    def means(self, method: str) -> list[float]:
        """Exact match by evaluated round, the mean over seeds."""
        by_round = zip(*self.curves[method].values(), strict=True)
        return [sum(values) / len(values) for values in by_round]

    def last(self, method: str) -> dict[int, float]:
        """Seed -> exact match after the last round."""
        return {seed: values[-1] for seed, values in self.curves[method].items()}


def _free_directory(wanted: str) -> Path:
    """The wanted directory, or the first of its name with a number that does not exist."""
    path, number = Path(wanted), 2
    while path.exists():
        path, number = Path(f"{wanted}-{number}"), number + 1
    return path


def demo(overrides: Mapping[str, Any], emit: Emit | None = None) -> Shown:
    """Run the demonstration and show it.

    Args:
        overrides: configuration keys that go to every run; `output_dir` holds all of them. `seeds`
            takes others than the usual one, `seed` is one other, `processes` says how many runs go
            on at a time.
        emit: writes JSON, for a program that looks on; None: for a person.

    Raises:
        InputError: a key that the demonstration sets itself, or a wrong value.
        FedloraError: a run failed.
    """
    given = dict(overrides)
    seeds, processes = _seeds(given), _processes(given.pop("processes", None))
    for key in FIXED:
        if key in given:
            raise InputError(
                f"{key}: the demo compares {' and '.join(COMPARED)} by exact match, every other "
                "round; for another comparison use fedlora run or fedlora study"
            )
    values = layered(read_yaml(CONFIG), {**SETTINGS, **given})
    where = _free_directory(str(values.pop("output_dir", "fedlora-demo")))
    console, began = Console(), time.perf_counter()
    runs = _plan(values, seeds)
    console.print(
        f"{' and '.join(COMPARED)} on seed{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}, "
        f"and every client of seed {seeds[0]} alone:\n"
        f"{len(runs)} runs, several at a time, into {where}/",
        highlight=False,
        soft_wrap=True,
    )
    study = Study("demo", "", "", (), tuple(runs))
    with Progress(study, console) as progress:
        failed = execute(
            runs, where, processes=processes, gpu=_on_gpu(values), on_change=progress, small=True
        )
    for name, why in failed.items():
        raise FedloraError(f"{where / name}: {why}")
    shown = _read(runs, where, time.perf_counter() - began)
    if emit:
        emit(_as_json(shown))
    else:
        show(shown, console)
    return shown


def _as_json(shown: Shown) -> dict[str, Any]:
    """What was measured, as a program reads it; exact match is a share of the held-out rows."""
    return {
        "event": "demo",
        "metric": METRIC,
        "seeds": shown.seeds,
        "rounds": list(shown.rounds),
        "by_round": {
            method: {str(seed): list(values) for seed, values in seeds.items()}
            for method, seeds in shown.curves.items()
        },
        "alone": {str(client): value for client, value in shown.alone.items()},
        "traffic": {
            method: {"bytes_up": up, "bytes_down": down}
            for method, (up, down) in shown.sizes.items()
        },
        "verdicts": list(verdicts(shown)),
        "seconds": shown.seconds,
        "output_dir": str(shown.path),
    }


def _seeds(given: dict[str, Any]) -> list[int]:
    first, several = given.pop("seed", None), given.pop("seeds", None)
    if several is None:
        wanted: Any = SEEDS if first is None else [first]
    else:
        wanted = several if isinstance(several, list) else [several]
    if not all(str(seed).isdecimal() for seed in wanted) or len(set(wanted)) < len(wanted):
        raise InputError(f"seeds: {several or first!r}: expected different whole numbers from 0")
    numbers = [int(seed) for seed in wanted]
    return numbers


def _processes(given: Any) -> int | None:
    if given is None or (str(given).isdecimal() and int(given) > 0):
        return None if given is None else int(given)
    raise InputError(f"processes: {given!r}: expected a whole number from 1")


def _on_gpu(values: Mapping[str, Any]) -> bool:
    import torch

    return torch.cuda.is_available() and not Config(**values).use_cpu


def _plan(values: Mapping[str, Any], seeds: Sequence[int]) -> list[Planned]:
    """Whole seeds first, and the clients of the first seed, which are short, at the end."""
    config = resolve_paths(Config(**{**values, "seed": seeds[0]}))
    typed = config.flat()
    keys = {key: typed[key] for key in values if key in typed}
    rows = load_rows(config).clients
    ranks = client_ranks(config, len(rows))
    runs = [
        Planned("demo", {"method": m}, seed, {**keys, "method": m}, called=f"{m}-seed-{seed}")
        for seed in seeds
        for m in COMPARED
    ]
    for client, rank in enumerate(ranks):
        if rows[client]:
            label = f"client {client} alone, r={rank}"
            ends = {**keys, "eval_rounds": 0}
            name = f"alone-{client}"
            runs.append(Planned("demo", {"who": label}, seeds[0], ends, client, called=name))
    return runs


def _read(runs: Sequence[Planned], where: Path, seconds: float) -> Shown:
    """What the runs' logs say, put together for the table and the picture."""
    evaluated: list[int] = []
    curves: dict[str, dict[int, list[float]]] = {}
    alone: dict[int, float] = {}
    sizes: dict[str, list[tuple[int, int]]] = {}
    for run in runs:
        lines = read_metrics(where / run.directory)
        evaluations = [x for x in lines if x.get("evaluation")]
        scores = [x["evaluation"][METRIC] for x in evaluations]
        if run.alone is not None:
            alone[run.alone] = scores[-1]
            continue
        evaluated = [x["round"] for x in evaluations]
        method = run.labels["method"]
        curves.setdefault(method, {})[run.seed] = scores
        rounds = [x for x in lines if x["event"] == "round"]
        up, down = (sum(x[key] for x in rounds) for key in ("bytes_up", "bytes_down"))
        sizes.setdefault(method, []).append((up, down))
    means = {
        method: (sum(up for up, _ in x) / len(x), sum(down for _, down in x) / len(x))
        for method, x in sizes.items()
    }
    return Shown(evaluated, curves, alone, means, seconds, where)


# --- what a person sees ---


def show(shown: Shown, console: Console) -> None:
    """The table, the picture, and what the figures do and do not say."""
    console.print()
    console.print(_table(shown))
    console.print(_picture(shown), highlight=False, markup=False, soft_wrap=True)
    for line in verdicts(shown):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"\n{shown.seconds:.0f} s; everything is in {shown.path}/. Next:\n"
        f"{f'  fedlora report {shown.path}':<52}a page of these runs\n"
        "  fedlora run --num_rounds 10 --output_dir longer   one run, for longer\n"
        "  fedlora config embedded > my.yaml                 its configuration, to edit\n"
        "  fedlora run --help                                your own model and data",
        highlight=False,
        markup=False,
    )


def _table(shown: Shown) -> Table:
    """Exact match by round, a row for each method, and the clients alone as mean and best."""
    number = len(shown.seeds)
    over = f"mean ± standard deviation over {number} seeds" if number > 1 else "one seed"
    table = Table(title=f"held-out exact match (%): {over}", box=SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for number in shown.rounds:
        table.add_column(str(number), justify="right", no_wrap=True)
    table.add_column("up", justify="right", no_wrap=True)
    table.add_column("down", justify="right", no_wrap=True)
    for method in shown.curves:
        *before, _ = [f"{100 * value:.1f}" for value in shown.means(method)]
        traffic = [human_bytes(size) for size in shown.sizes[method]]
        table.add_row(method, *before, spread(list(shown.last(method).values())), *traffic)
    if shown.alone:
        values = list(shown.alone.values())
        skipped = [""] * (len(shown.rounds) - 1)
        for name, value in (("mean", sum(values) / len(values)), ("best", max(values))):
            table.add_row(f"alone, {name}", *skipped, f"{100 * value:.1f}", "-", "-")
    return table


def spread(shares: Sequence[float]) -> str:
    """Shares in percent as mean ± standard deviation."""
    mean, sd = mean_and_sd([100 * share for share in shares])
    return f"{mean:.1f}" + ("" if sd is None else f" ± {sd:.1f}")


def verdicts(shown: Shown) -> list[str]:
    """Every seed's end, and what the differences to the first method amount to."""
    seeds, first = shown.seeds, COMPARED[0]
    by_seed = "by seed" if len(seeds) > 1 else "of seed"
    lines = [f"At the end, {by_seed} {', '.join(map(str, seeds))}:"]
    for method in shown.curves:
        each = ", ".join(f"{100 * value:.1f}" for value in shown.last(method).values())
        lines.append(f"  {method:<9} {each}")
    for method in COMPARED[1:]:
        x = paired(shown.last(first), shown.last(method))
        assert x is not None
        by = f"{first} against {method}: {100 * x.mean:+.1f} points"
        if x.low is None or x.high is None:
            lines.append(f"{by}; one seed shows no difference and no tie: try --seeds 0 1 2")
            continue
        says = f"these seeds show {'no' if x.verdict() == 'ties' else 'a'} difference"
        lines.append(f"{by}, 95% interval {100 * x.low:+.1f} to {100 * x.high:+.1f}:")
        lines.append(f"  {says}")
    if shown.alone:
        number = len(shown.alone)
        lines.append(
            f"alone: the {number} clients of seed {seeds[0]}, as many steps each by itself"
        )
    return lines


def _picture(shown: Shown) -> str:
    """A plot of text, without colours: means by round, and the clients alone as a level."""
    curves = {method: shown.means(method) for method in shown.curves}
    rounds = list(shown.rounds)
    if shown.alone:
        values = shown.alone.values()
        curves["alone at the end, mean"] = [sum(values) / len(values)] * len(rounds)
    figure = plotext.figure
    figure.clear()
    figure.theme("clear")
    figure.plot_size(78, 18)
    for (name, shares), marker in zip(curves.items(), "●xo.", strict=False):
        signal = figure.signal(rounds, [100 * share for share in shares], marker=marker)
        signal.lines()
        signal.label(name)
        figure.draw(signal)
    over = ", means over seeds" if len(shown.seeds) > 1 else ""
    figure.title(f"exact match (%) by round{over}")
    figure.ruler(0, 0).ticks(rounds)
    return Text.from_ansi(str(figure.build())).plain
