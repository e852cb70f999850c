"""Measures models on rows: the run's held-out rows, and windows of general text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.client.evaluate import evaluate
from fedlora.commands.eval import general
from fedlora.commands.eval.measuring import Measuring
from fedlora.commands.eval.models import Models, tokenizer_of
from fedlora.commands.eval.options import first
from fedlora.commands.eval.results import GENERAL, HELD_OUT
from fedlora.commands.eval.subject import BASE, Subject
from fedlora.data.datasets import FederatedData
from fedlora.data.general_text import windows
from fedlora.data.server_rows import load_server_rows
from fedlora.data.tokenize import Tokens
from fedlora.errors import InputError
from fedlora.runs.absolute_paths import resolve_paths
from fedlora.runs.session import tokenized


def own_rows_of(subject: Subject) -> tuple[Any, FederatedData]:
    """The tokenizer and the rows of a run; where clients are sites, what its server evaluates."""
    config = resolve_paths(subject.config)
    if not config.trains_at_sites:
        _, tokenizer, data = tokenized(config)
        return tokenizer, data
    tokenizer = tokenizer_of(subject)
    return tokenizer, load_server_rows(config, tokenizer, config.label_names or ())


def measure_held_out(measuring: Measuring, models: Models, data: FederatedData) -> None:
    """Evaluate every model asked for on the run's rows: those of all clients, and those of each.

    A client's own model is evaluated on that client's rows and on those of all clients.

    Raises:
        InputError: the run has no held-out rows.
    """
    subject, limit = measuring.subject, measuring.options.limit
    names = measuring.models_on_rows
    shared = [name for name in names if name not in subject.clients]
    sets = {HELD_OUT: (list(first(data.eval, limit)), names)}
    for number, client_data in enumerate(data.clients):
        if client_data.eval:
            client = f"client-{number}"
            own_model = [client] if client in names else []
            rows = list(first(client_data.eval, limit))
            sets[f"{HELD_OUT}:{client}"] = (rows, [*shared, *own_model])
    if not any(rows for rows, _ in sets.values()):
        raise InputError(
            f"{subject.name}: the run has no held-out rows (eval_file, eval_fraction, "
            "dataset_test_split or client_eval_fraction); say what to measure: --tasks, "
            "--mmlu_file, --mt_bench_file or --general_file with --held_out false"
        )
    for measure, (rows, evaluated) in sets.items():
        for name in evaluated if rows else ():
            _evaluate_on(measuring, models, name, measure, rows, data.label_names)


def _evaluate_on(
    measuring: Measuring,
    models: Models,
    name: str,
    measure: str,
    rows: Sequence[Tokens],
    label_names: Sequence[str],
) -> None:
    """Evaluate one model on one set of rows, and keep its scores."""
    config = measuring.subject.config
    client = measure.partition(":")[2]
    sentence = f"{name}: {len(rows)} held-out rows" + (f" of {client}" if client else "")
    with measuring.saying(sentence), models.using(name) as model:
        scores = evaluate(
            model,
            models.tokenizer,
            rows,
            batch_size=measuring.batch_size,
            exact_match=config.eval_exact_match is True,
            max_new_tokens=config.generation_max_new_tokens,
            label_names=label_names,
        )
    settings = measuring.settings(models, limit=measuring.options.limit)
    measuring.results.record(measure, name, {**scores, "rows": len(rows)}, settings)


def general_text_of(measuring: Measuring) -> Path | None:
    """The general text asked for; else the one that the run itself was evaluated on."""
    options, subject = measuring.options, measuring.subject
    if options.general_file:
        return options.general_file
    of_run = options.own_rows and subject.of_a_run and not subject.classifies
    return Path(subject.config.general_file) if of_run and subject.config.general_file else None


def measure_general(measuring: Measuring, models: Models, path: Path) -> None:
    """Measure the loss on general text, and how much more of it a model has than the base."""
    rows, length = _windows(measuring, models, path)
    settings = measuring.settings(models, file=str(path), length=length)
    base: general.Losses | None = None
    # The base comes first, for forgetting is the difference to it.
    for name in sorted(measuring.models_elsewhere, key=lambda name: name != BASE):
        sentence = f"{name}: {len(rows)} windows of general text"
        with measuring.saying(sentence), models.using(name) as model:
            losses = general.measured(model, rows, measuring.batch_size)
        scores = dict(losses.scores)
        if name == BASE:
            base = losses
        elif base is not None:
            scores |= general.forgetting(losses, base)
        measuring.results.record(GENERAL, name, scores, settings)


def _windows(measuring: Measuring, models: Models, path: Path) -> tuple[list[Tokens], int]:
    """Windows of the text and their length in tokens.

    Of the text that the run itself was evaluated on, they are those that the run took.
    """
    options, config = measuring.options, measuring.subject.config
    length, limit = options.general_length or 1024, options.limit
    if not options.general_file:
        length = options.general_length or config.max_length
        limit = config.max_eval_samples if limit is None else limit
    length = min(length, models.context)
    number = int(limit) if limit is not None and limit >= 1 else None
    rows = windows(models.tokenizer, path, length, number)
    if limit is not None and limit < 1:
        rows = list(first(rows, limit))
    return rows, length
