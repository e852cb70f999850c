"""Gathers all numbers of a report from what the runs wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedlora.commands.report.attendance import Attendance, attendance
from fedlora.commands.report.measures import KINDS, Panel, change, panels, titled
from fedlora.commands.report.reading import what_lacks
from fedlora.commands.report.series import Series, differing, group
from fedlora.commands.report.spectrum import Spectrum
from fedlora.commands.run_files import Line, Run, bytes_of, listed, mapping, number, whole

MOST_KINDS = 10
"""Different values shown in a client's bar; the rarest beyond them are summed up."""
BYTES = 4
"""Of a number as it travels: float32."""


@dataclass(frozen=True)
class Clients:
    """Who took part, and with what; every tuple has an entry per client.

    Args:
        ids: their numbers.
        names: what they are called, or "".
        ranks: of their adapters.
        rows: to train on.
        eval_rows: held out at the client.
        tokens: to train on.
        column: what `kinds` are values of; None: rows are not told apart.
        kinds: values, the most frequent first, the last perhaps "others".
        counts: rows of each kind.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    ranks: tuple[int | None, ...]
    rows: tuple[int | None, ...]
    eval_rows: tuple[int | None, ...]
    tokens: tuple[int | None, ...]
    column: str | None
    kinds: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Errors:
    """What aggregation lost; `cells` and `norms` have a row per layer and an entry per round."""

    rounds: tuple[int, ...]
    total: tuple[float | None, ...]
    truncation: tuple[float | None, ...]
    norm: tuple[float | None, ...]
    rank: tuple[int | None, ...]
    layers: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]
    norms: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Traffic:
    """Bytes by round and client (None: did not take part), in the order of `Clients.ids`.

    Args:
        rounds: ascending.
        up: from clients to the server.
        down: from the server to clients.
        lower: of each client and round: its own trained factors, in float32.
        upper: of a client and round: the whole base, in float32.
        total_up: of the run, with attempts that were given up.
        total_down: the same, with what sites were sent to evaluate.
    """

    rounds: tuple[int, ...]
    up: tuple[tuple[int | None, ...], ...]
    down: tuple[tuple[int | None, ...], ...]
    lower: tuple[int | None, ...]
    upper: int | None
    total_up: int
    total_down: int


@dataclass(frozen=True)
class RunView:
    """One run as it is shown."""

    label: str
    name: str
    path: str
    series: int
    method: str
    seed: int | None
    model: str
    architecture: str
    parameters: int | None
    modules: int
    dense: int | None
    task: str
    eval_rows: int | None
    planned: int | None
    done: int
    finished: bool
    final: int | None
    best: int | None
    started: str
    environment: dict[str, str]
    problems: tuple[str, ...]
    clients: Clients
    quality: tuple[dict[str, Any], ...]
    changes: tuple[dict[str, Any], ...]
    per_class: dict[str, dict[str, float | None]]
    errors: Errors
    spectrum: Spectrum
    traffic: Traffic
    attendance: Attendance
    seconds: dict[str, tuple[float | None, ...]]
    privacy: tuple[tuple[int, float | None, float | None], ...]
    evals: tuple[dict[str, Any], ...]
    config: str


@dataclass(frozen=True)
class Collected:
    """A whole report.

    Args:
        title: of the page.
        series: runs that differ by their seed alone.
        runs: in the order given.
        panels: quality by round.
        differing: configuration keys that are not alike in all runs, with a value for every run.
    """

    title: str
    series: tuple[Series, ...]
    runs: tuple[RunView, ...]
    panels: tuple[Panel, ...]
    differing: tuple[tuple[str, tuple[str, ...]], ...]


def collect(runs: Sequence[Run], spectra: Sequence[Spectrum]) -> Collected:
    """Everything that a report shows of these runs."""
    series = group(runs)
    of = {i: k for k, x in enumerate(series) for i in x.runs}
    views = tuple(
        _view(run, spectrum, of[i], _run_label(run, series[of[i]], len(runs)))
        for i, (run, spectrum) in enumerate(zip(runs, spectra, strict=True))
    )
    configs = [run.config for run in runs]
    keys = differing([x for x in configs if x]) if len(runs) > 1 else []
    keys += ["seed"] if len({run.seed for run in runs}) > 1 else []
    return Collected(
        _title(views, series),
        tuple(series),
        views,
        tuple(panels(runs, series)),
        tuple((key, tuple(_plain(x.get(key)) for x in configs)) for key in keys),
    )


def _title(views: Sequence[RunView], series: Sequence[Series]) -> str:
    models = list(dict.fromkeys(x.model for x in views if x.model))
    what = models[0] if len(models) == 1 else f"{len(models)} models" if models else "runs"
    what = what.rstrip("/").rpartition("/")[2] or what
    if len(series) == 1:
        return f"{what}, {series[0].label}"
    labels = ", ".join(x.label for x in series)
    return f"{what}: {labels}" if len(labels) <= 60 else f"{what}: {len(series)} configurations"


def _run_label(run: Run, series: Series, runs: int) -> str:
    if runs == 1 or len(series.runs) == 1 or run.seed is None:
        return series.label
    return f"{series.label}, seed {run.seed}"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


# --- one run ---


def _view(run: Run, spectrum: Spectrum, series: int, label: str) -> RunView:
    begin, config = run.begin, run.config
    clients = _clients(run)
    modules = {
        name: shape
        for name, shape in mapping(begin.get("modules")).items()
        if isinstance(shape, list) and len(shape) == 2 and all(whole(x) for x in shape)
    }
    numbers = tuple(int(line["round"]) for line in run.rounds)
    last = _last_evaluation(run)
    order = {name: i for i, name in enumerate(modules)}
    layers = sorted(spectrum.layers, key=lambda x: order.get(x.name, len(order)))
    return RunView(
        label=label,
        name=run.name,
        path=str(run.path),
        series=series,
        method=run.method,
        seed=run.seed,
        model=str(config.get("model_name_or_path") or begin.get("model") or ""),
        architecture=str(begin.get("architecture") or ""),
        parameters=whole(begin.get("parameters")),
        modules=len(modules) or len(spectrum.layers),
        dense=whole(begin.get("dense_parameters")),
        task=str(begin.get("task") or config.get("lora_task_type") or ""),
        eval_rows=whole(begin.get("eval_rows")),
        planned=run.planned,
        done=run.last_round,
        finished=bool(run.end),
        final=whole(run.end.get("final")),
        best=whole(run.end.get("best")),
        started=str(begin.get("started") or ""),
        environment={k: str(x) for k, x in _environment(begin).items()},
        problems=tuple(what_lacks(run)),
        clients=clients,
        quality=tuple(_quality(run)),
        changes=tuple(change(run, clients.ids)),
        per_class={
            name: {key: number(mapping(x).get(key)) for key in _BY_LABEL}
            for name, x in mapping(last.get("per_class")).items()
        },
        errors=_errors(run, numbers, order),
        spectrum=replace(spectrum, layers=tuple(layers)),
        traffic=_traffic(run, numbers, clients, modules),
        attendance=attendance(run, clients.ids),
        seconds=_seconds(run),
        privacy=tuple(_privacy(run)),
        evals=tuple(_evals(run)),
        config=run.config_text,
    )


_BY_LABEL = ("precision", "recall", "f1", "support")


def _environment(begin: Line) -> dict[str, Any]:
    version = {"fedlora": begin["fedlora"]} if begin.get("fedlora") else {}
    return {**version, **mapping(begin.get("environment"))}


def _last_evaluation(run: Run) -> dict[str, Any]:
    evaluations = [mapping(x.get("evaluation")) for x in (run.start, *run.rounds)]
    return next((x for x in reversed(evaluations) if x), {})


def _clients(run: Run) -> Clients:
    known: dict[int, dict[str, Any]] = {}
    for line in run.rounds:  # what an older run says of its clients
        for entry in listed(line.get("clients")):
            client = whole(entry.get("client"))
            if client is not None and client not in known:
                known[client] = {"rank": entry.get("rank"), "rows": entry.get("num_examples")}
    for entry in listed(run.begin.get("clients")):
        client = whole(entry.get("client"))
        if client is not None:
            known[client] = entry
    ids = tuple(sorted(known))
    entries = [known[client] for client in ids]
    counts = [
        {k: n for k, x in mapping(entry.get("counts")).items() if (n := whole(x)) is not None}
        for entry in entries
    ]
    kinds, table = _kinds(counts)
    column = run.begin.get("column")
    return Clients(
        ids,
        tuple(str(entry.get("name") or "") for entry in entries),
        tuple(whole(entry.get("rank")) for entry in entries),
        tuple(whole(entry.get("rows")) for entry in entries),
        tuple(whole(entry.get("eval_rows")) for entry in entries),
        tuple(whole(entry.get("tokens")) for entry in entries),
        str(column) if column else None,
        kinds,
        table,
    )


def _kinds(counts: Sequence[Mapping[str, int]]) -> tuple[tuple[str, ...], Any]:
    """The most frequent values, and how many rows of each every client has."""
    totals: dict[str, int] = {}
    for own in counts:
        for kind, n in own.items():
            totals[kind] = totals.get(kind, 0) + n
    ordered = sorted(totals, key=lambda kind: -totals[kind])
    kept = ordered if len(ordered) <= MOST_KINDS else ordered[: MOST_KINDS - 1]
    rest = len(ordered) - len(kept)
    table = []
    for own in counts:
        row = [own.get(kind, 0) for kind in kept]
        table.append(tuple([*row, sum(own.values()) - sum(row)] if rest else row))
    return (*kept, f"{rest} others") if rest else tuple(kept), tuple(table)


def _quality(run: Run) -> Iterable[dict[str, Any]]:
    """A row per round: every number of its evaluations, as the file has it."""
    for line in (run.start, *run.rounds):
        if line:
            measures = {kind: titled(line, kind) for kind in KINDS}
            yield {"round": int(line["round"]), **{k: x for k, x in measures.items() if x}}


def _errors(run: Run, numbers: tuple[int, ...], order: Mapping[str, int]) -> Errors:
    by_round = [mapping(line.get("layers")) for line in run.rounds]
    named = dict.fromkeys(name for errors in by_round for name in errors)
    layers = tuple(sorted(named, key=lambda name: order.get(name, len(order))))

    def of(key: str) -> tuple[float | None, ...]:
        return tuple(number(line.get(key)) for line in run.rounds)

    def table(key: str) -> tuple[tuple[float | None, ...], ...]:
        return tuple(
            tuple(number(mapping(errors.get(name)).get(key)) for errors in by_round)
            for name in layers
        )

    return Errors(
        numbers,
        of("aggregation_error"),
        of("truncation_error"),
        of("update_norm"),
        tuple(whole(line.get("global_rank")) for line in run.rounds),
        layers,
        table("error"),
        table("norm"),
    )


def _traffic(
    run: Run, numbers: tuple[int, ...], clients: Clients, modules: Mapping[str, Any]
) -> Traffic:
    place = {client: i for i, client in enumerate(clients.ids)}
    up, down = [], []
    for line in run.rounds:
        rows: dict[str, list[int | None]] = {k: [None] * len(place) for k in ("up", "down")}
        for entry in listed(line.get("clients")):
            client = whole(entry.get("client"))
            if client is None or client not in place:
                continue
            for key, row in rows.items():
                row[place[client]] = whole(entry.get(f"bytes_{key}"))
        up.append(tuple(rows["up"]))
        down.append(tuple(rows["down"]))
    width = sum(m + n for m, n in modules.values())
    dense = whole(run.begin.get("dense_parameters")) or 0
    parameters = whole(run.begin.get("parameters"))
    return Traffic(
        numbers,
        tuple(up),
        tuple(down),
        tuple((rank * width + dense) * BYTES if rank and width else None for rank in clients.ranks),
        parameters * BYTES if parameters else None,
        sum(bytes_of(line)[0] for line in run.rounds),
        sum(bytes_of(line)[1] for line in (run.start, *run.rounds)),
    )


def _seconds(run: Run) -> dict[str, tuple[float | None, ...]]:
    seconds = [mapping(line.get("seconds")) for line in run.rounds]
    phases = dict.fromkeys(key for x in seconds for key in x)
    return {phase: tuple(number(x.get(phase)) for x in seconds) for phase in phases}


def _privacy(run: Run) -> Iterable[tuple[int, float | None, float | None]]:
    for line in run.rounds:
        privacy = mapping(line.get("privacy"))
        if privacy:
            yield int(line["round"]), number(privacy.get("epsilon")), number(privacy.get("delta"))


def _evals(run: Run) -> Iterable[dict[str, Any]]:
    for line in run.evals:
        yield {
            "round": whole(line.get("round")),
            "name": str(line.get("name") or ""),
            "model": str(line.get("model") or ""),
            "scores": dict(_flat(mapping(line.get("scores")))),
        }


def _flat(scores: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for key, value in scores.items():
        if isinstance(value, Mapping):
            yield from _flat(mapping(value), f"{prefix}{key}.")
        elif (plain := number(value)) is not None:
            yield f"{prefix}{key}", plain
