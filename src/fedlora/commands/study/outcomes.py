"""Reads from a complete run what a study compares: the metric, its cost in bytes and seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.runs.file_names import FINAL
from fedlora.runs.metrics_log import read_metrics

LESS_IS_BETTER = ("loss", "perplexity")


@dataclass(frozen=True)
class Outcome:
    """What a complete run came to.

    Args:
        value: the metric at the end.
        best: its best value over all evaluated rounds.
        error: mean aggregation error of a round; None where it has none.
        up, down: bytes of the whole run.
        seconds: of all rounds, evaluation aside.
        traffic: bytes up and down over those of full fine-tuning with the same participation, every
            parameter as float32 both ways; None where the run does not say how many there are.
        with_base: the same with the download of the base to every client counted.
        validation: the metric at the end on the rows that the clients hold out
            (`client_eval_fraction`), the mean over all of these; None where there are none.
    """

    value: float
    best: float
    error: float | None
    up: int
    down: int
    seconds: float
    traffic: float | None = None
    with_base: float | None = None
    validation: float | None = None


def outcome(path: Path, metric: str) -> Outcome | str:
    """A run's outcome, or why there is none.

    Args:
        path: its directory.
        metric: a key of its evaluations.
    """
    if not (path / FINAL).is_dir():
        return "not complete"
    lines = read_metrics(path)
    evaluations = [
        line["evaluation"] for line in lines if line.get("evaluation") and line["event"] != "eval"
    ]
    last = evaluations[-1] if evaluations else {}
    if metric not in last:
        measured = ", ".join(key for key, value in last.items() if isinstance(value, float))
        return f"measures no {metric}" + (f" (there are {measured})" if measured else "")
    if last[metric] is None:
        return f"ended with a {metric} that is no number"
    values = [x[metric] for x in evaluations if x.get(metric) is not None]
    rounds = [line for line in lines if line["event"] == "round"]
    errors = [x["aggregation_error"] for x in rounds if x["aggregation_error"] is not None]
    up, down = sum(x["bytes_up"] for x in rounds), sum(x["bytes_down"] for x in rounds)
    begin = next((line for line in lines if line["event"] == "begin"), {})
    traffic, with_base = _shares_of_full_fine_tuning(begin, rounds, up + down)
    return Outcome(
        value=last[metric],
        best=min(values) if metric in LESS_IS_BETTER else max(values),
        error=sum(errors) / len(errors) if errors else None,
        up=up,
        down=down,
        seconds=sum(x["seconds"]["train"] + x["seconds"]["aggregate"] for x in rounds),
        traffic=traffic,
        with_base=with_base,
        validation=_validation(begin, lines, metric),
    )


def _validation(
    begin: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], metric: str
) -> float | None:
    """`Outcome.validation`: clients count by their number of held-out rows.

    Args:
        begin: the log's line of the run's beginning.
        lines: all lines.
        metric: a key of the evaluations.
    """
    by_client = [x["client_evaluations"] for x in lines if x.get("client_evaluations")]
    if not by_client:
        return None
    rows = {str(x["client"]): x["eval_rows"] for x in begin["clients"]}
    values = {k: x[metric] for k, x in by_client[-1].items() if x.get(metric) is not None}
    count = sum(rows[k] for k in values)
    return sum(rows[k] * value for k, value in values.items()) / count if count else None


def _shares_of_full_fine_tuning(
    begin: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], nbytes: int
) -> tuple[float | None, float | None]:
    """`Outcome.traffic` and `Outcome.with_base` of a run that sent so many bytes up and down.

    Args:
        begin: the log's line of the run's beginning; empty: it has none.
        rounds: its lines of rounds.
        nbytes: up and down together.
    """
    if not begin.get("parameters"):
        return None, None
    base = 4 * begin["parameters"]  # bytes, as float32
    full = 2 * base * sum(len(x["clients"]) for x in rounds)
    return nbytes / full, (nbytes + base * len(begin["clients"])) / full
