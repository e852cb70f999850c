"""Writes what an evaluation found to files, to the run's log and into tables."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora import __version__
from fedlora.commands.eval.subject import BASE, Subject
from fedlora.commands.json_lines import Emit
from fedlora.errors import InputError
from fedlora.runs.directory import RunDirectory, append_eval
from fedlora.text import finite

EVAL = "eval"
HELD_OUT, GENERAL, MMLU, MT_BENCH, TASK = "held_out", "general", "mmlu", "mt_bench", "lm_eval:"
Scores = Mapping[str, Any]


@dataclass
class Results:
    """Where results go, and what there is so far.

    A model's results lie in a directory of their own: `base/`, `global-round-5/`.

    Args:
        subject: what is evaluated.
        directory: of all results.
        logged: each result is written into the run's `metrics.jsonl` too.
        emit: writes each result as a line of JSON, for a program that reads along.
        scores: of all results so far, by `(measure, model)`.
    """

    subject: Subject
    directory: Path
    logged: bool
    emit: Emit | None = None
    scores: dict[tuple[str, str], Scores] = field(default_factory=dict)

    def directory_of(self, model: str) -> Path:
        """The directory of one model's results."""
        of_round = f"-round-{self.subject.round}" if self.subject.run and model != BASE else ""
        return self.directory / f"{model}{of_round}"

    def record(
        self,
        name: str,
        model: str,
        scores: Scores,
        settings: Mapping[str, Any],
        items: Iterable[Mapping[str, Any]] | None = None,
    ) -> None:
        """Keep a result: in `NAME.json`, `NAME.items.jsonl`, and the run's log.

        Args:
            name: of the measure.
            model: its name.
            scores: of the model.
            settings: what the scores depend on, beside the model.
            items: the questions or samples one by one; None: they are not kept.

        Raises:
            InputError: it cannot be written.
        """
        line = {
            "event": "eval",
            "round": self.subject.round,
            "name": name,
            "model": model,
            "scores": finite(scores),
        }
        directory = self.directory_of(model)
        stem = re.sub(r"[^\w.-]+", ".", name)
        whole = {
            **line,
            "subject": self.subject.name,
            "base": self.subject.source.name,
            "fingerprint": self.subject.fingerprint(model),
            "settings": finite(settings),
            "fedlora": __version__,
        }
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if items is not None:
                texts = (json.dumps(finite(x), ensure_ascii=False, default=str) for x in items)
                _write(directory / f"{stem}.items.jsonl", "".join(text + "\n" for text in texts))
            text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
            _write(directory / f"{stem}.json", text)
        except OSError as error:
            raise InputError(f"{directory}: cannot be written to: {error.strerror}") from None
        if self.logged and self.subject.run:
            append_eval(self.subject.run, line)
        if self.emit:
            self.emit(line)
        self.scores[name, model] = scores

    def of(self, name: str) -> dict[str, Scores]:
        """Model -> its scores of the measure of this name."""
        return {model: x for (measure, model), x in self.scores.items() if measure == name}


def open_results(subject: Subject, output_dir: str | None, emit: Emit | None = None) -> Results:
    """Decide where results go: the run's `eval/`, `output_dir`, or `eval/NAME` here.

    Raises:
        InputError: another process is writing to the run, which is not to be waited for.
    """
    if output_dir is not None:
        return Results(subject, Path(output_dir), False, emit)
    if subject.run is None:
        parts = [x for x in Path(subject.name).parts[-2:] if x not in (".", "..", os.sep)]
        name = re.sub(r"[^\w.-]+", "-", "-".join(parts)) or "model"
        return Results(subject, Path(EVAL) / name, False, emit)
    try:
        RunDirectory(subject.run).close()
    except InputError as error:
        raise InputError(
            f"{error}; --output_dir DIR keeps the results elsewhere, and out of the run's log"
        ) from None
    return Results(subject, subject.run / EVAL, True, emit)


def _write(path: Path, text: str) -> None:
    """Write a file that is never seen half written."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


# --- tables ---


def show(results: Results, tasks: Sequence[str], console: Console) -> None:
    """All that was found: a table for each measure, models below each other."""
    _held_out(results, console)
    _by_client(results, console)
    _general(results, console)
    _mmlu(results, console)
    _tasks(results, tasks, console)
    _mt_bench(results, console)


def _table(title: str, columns: Sequence[str]) -> Table:
    """Names to the left, numbers to the right; `_print` puts the title above."""
    table = Table(caption=title, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _print(table: Table, console: Console) -> None:
    """The title on a line of its own: a narrow table would break it."""
    title, table.caption = str(table.caption), None
    console.print(Text(title, style="bold"))
    console.print(table)


def _form(value: Any, form: str) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return format(value, ".1e" if form == ".5g" and abs(value) >= 1e5 else form)


def _between(low: Any, high: Any, form: str) -> str:
    return "-" if low is None or high is None else f"{low:{form}} .. {high:{form}}"


_MEASURES = (
    ("loss", "loss", ".4f"),
    ("perplexity", "perplexity", ".5g"),
    ("token_accuracy", "token acc.", ".1%"),
    ("exact_match", "exact match", ".1%"),
    ("accuracy", "accuracy", ".1%"),
    ("macro_f1", "macro F1", ".1%"),
)


def _held_out(results: Results, console: Console) -> None:
    by_model = results.of(HELD_OUT)
    if not by_model:
        return
    one = next(iter(by_model.values()))
    measures = [m for m in _MEASURES if m[0] in one]
    table = _table(f"held-out rows ({one['rows']})", ["model", *(m[1] for m in measures)])
    for model, x in by_model.items():
        table.add_row(model, *(_form(x.get(key), form) for key, _, form in measures))
    _print(table, console)


MAIN = ("exact_match", "accuracy", "token_accuracy")
"""Scores of which the first that there is stands for a model, where one number has room."""


def _by_client(results: Results, console: Console) -> None:
    """Each client's own held-out rows: the shared models beside the client's own."""
    names = [n for n, _ in results.scores if n.startswith(f"{HELD_OUT}:")]
    names = list(dict.fromkeys(names))
    if not names:
        return
    one = next(iter(results.of(names[0]).values()))
    key = next(k for k in MAIN if k in one)
    heading = next(h for k, h, _ in _MEASURES if k == key)
    shared = [m for m in results.subject.models if any(m in results.of(n) for n in names)]
    shared = [m for m in shared if not m.startswith("client-")]
    has_own = any(n.partition(":")[2] in results.of(n) for n in names)
    columns = ["client", "rows", *shared, *(["its own"] if has_own else [])]
    table = _table(f"each client's own held-out rows: {heading}", columns)
    for name in names:
        client, by_model = name.partition(":")[2], results.of(name)
        rows = next(iter(by_model.values()))["rows"]
        cells = [
            _form((by_model.get(m) or {}).get(key), ".1%")
            for m in [*shared, *([client] if has_own else [])]
        ]
        table.add_row(client, str(rows), *cells)
    _print(table, console)


def _general(results: Results, console: Console) -> None:
    """Loss on general text, and forgetting where the base was measured too."""
    by_model = results.of(GENERAL)
    if not by_model:
        return
    one = next(iter(by_model.values()))
    title = f"general text ({one['tokens']:,} tokens in {one['windows']} windows)"
    columns = ["model", "loss", "perplexity"]
    compared = any("forgetting" in x for x in by_model.values())
    table = _table(title, [*columns, *(["forgetting", "95% interval"] if compared else [])])
    for model, x in by_model.items():
        cells = [_form(x["loss"], ".4f"), _form(x["perplexity"], ".5g")]
        if compared:
            low, high = x.get("forgetting_low"), x.get("forgetting_high")
            cells += [_form(x.get("forgetting"), "+.4f"), _between(low, high, "+.4f")]
        table.add_row(model, *cells)
    _print(table, console)
    if compared:
        console.print("forgetting: nats per token more than the base\n", highlight=False)


def _mmlu(results: Results, console: Console) -> None:
    """Accuracy by subject, as many models as fit side by side, then over all subjects."""
    by_model = results.of(MMLU)
    if not by_model:
        return
    one = next(iter(by_model.values()))
    subjects = list(one["by_subject"])
    for part in _few(list(by_model)):
        table = _table("MMLU by subject", ["subject", "questions", *part])
        for name in subjects:
            cells = [f"{by_model[m]['by_subject'][name]['accuracy']:.1%}" for m in part]
            table.add_row(name, str(one["by_subject"][name]["rows"]), *cells)
        _print(table, console)
    table = _table(
        f"MMLU ({one['rows']:,} questions, {len(subjects)} subjects)",
        ["model", "accuracy", "95% interval", "mean of subjects"],
    )
    for model, x in by_model.items():
        between = _between(x["low"], x["high"], ".1%")
        table.add_row(model, f"{x['accuracy']:.1%}", between, f"{x['subject_mean']:.1%}")
    _print(table, console)


def _few(models: list[str]) -> list[list[str]]:
    """As many columns as stand beside each other in a terminal of 80."""
    return [models[i : i + 4] for i in range(0, len(models), 4)]


def _tasks(results: Results, wanted: Sequence[str], console: Console) -> None:
    """The harness's metrics with their standard errors."""
    names = [n.removeprefix(TASK) for n, _ in results.scores if n.startswith(TASK)]
    names = list(dict.fromkeys(names))
    if not names:
        return
    # If a group has many tasks inside, the group alone is shown; the tasks are in the files.
    names = [n for n in names if n in wanted] if len(names) > 12 else names
    models = list(results.of(TASK + names[0])) if names else []
    for part in _few(models):
        table = _table("lm-evaluation-harness", ["task", "metric", *part])
        for name in names:
            by_model = results.of(TASK + name)
            metrics = [k for k in next(iter(by_model.values())) if not _is_error(k) and k != "rows"]
            for i, metric in enumerate(metrics):
                cells = [_with_error(by_model.get(m) or {}, metric) for m in part]
                table.add_row("" if i else name, metric, *cells)
        _print(table, console)


def _is_error(key: str) -> bool:
    return key.partition(",")[0].endswith("_stderr")


def _with_error(scores: Scores, metric: str) -> str:
    name, comma, kind = metric.partition(",")
    error = scores.get(f"{name}_stderr{comma}{kind}")
    value = scores.get(metric)
    if value is None:
        return "-"
    return f"{value:.4f}" + ("" if error is None or not math.isfinite(error) else f" ± {error:.4f}")


def _mt_bench(results: Results, console: Console) -> None:
    """MT-bench's scores over all questions, then by category."""
    by_model = results.of(MT_BENCH)
    if not by_model:
        return
    table = _table(
        "MT-bench (1 to 10)", ["model", "score", "95% interval", "turn 1", "turn 2", "rated"]
    )
    for model, x in by_model.items():
        cells = [_form(x[k], ".2f") for k in ("turn_1", "turn_2")]
        between = _between(x["low"], x["high"], ".2f")
        table.add_row(model, f"{x['score']:.2f}", between, *cells, f"{x['rated']}/{x['turns']}")
    _print(table, console)
    categories = list(next(iter(by_model.values()))["by_category"])
    if len(categories) > 1:
        for part in _few(list(by_model)):
            table = _table("MT-bench by category", ["category", *part])
            for name in categories:
                cells = [_form(by_model[m]["by_category"].get(name), ".2f") for m in part]
                table.add_row(name, *cells)
            _print(table, console)
