"""Makes the tokenised data of every client, and of the evaluation, from a run's rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.data.notes import (
    alike,
    all_dropped,
    kept,
    left_out,
    one_answer_learnt,
    reasons,
    unused,
)
from fedlora.data.preferences import with_answers
from fedlora.data.raw_data import RawData, load_rows
from fedlora.data.reading import find_labels, is_classification, template_of, without_column
from fedlora.data.rendered import Rendered, learnt_part
from fedlora.data.rows import Row
from fedlora.data.subsets import RowSubsets, draw_subsets, in_turn
from fedlora.data.templates import Template
from fedlora.data.token_cache import tokens_of
from fedlora.data.tokenize import Outcome, Tokens, render
from fedlora.errors import InputError
from fedlora.seeds import Purpose, generator

if TYPE_CHECKING:
    from fedlora.config.config import Config


@dataclass(frozen=True)
class ClientData:
    """One client's tokenised rows.

    Args:
        train: to train on.
        eval: the client's own held-out rows; empty: there are none.
    """

    train: Sequence[Tokens]
    eval: Sequence[Tokens] = ()


@dataclass(frozen=True)
class FederatedData:
    """All clients' data and what the global model is evaluated on.

    Args:
        clients: in client order.
        eval: held-out rows of the global evaluation; empty: none is made.
        template: name of the template by which rows were read.
        dropped: why rows were left out -> how many.
        fingerprint: a digest of all tokens, by which a resumed run notices other data.
        label_names: a classifier's labels in the order of their ids.
        taken: sentences on how many rows of how many were drawn, and which columns are not used.
        notes: what the user should be warned of.
    """

    clients: tuple[ClientData, ...]
    eval: Sequence[Tokens]
    template: str
    dropped: Mapping[str, int]
    fingerprint: str
    label_names: tuple[str, ...] = field(default=())
    taken: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_data(
    config: Config,
    tokenizer: Any,
    raw: RawData | None = None,
    *,
    classify: bool = False,
    label_names: Sequence[str] = (),
) -> FederatedData:
    """Load the tokenised data of every client and of the evaluation.

    Rows are read and divided among clients (`load_rows`), some of them are drawn
    (`max_train_samples`, `max_eval_samples`), all are tokenised by one template, and a share of
    every client's rows is held out (`client_eval_fraction`). Without rows of its own, the global
    evaluation takes the rows that the clients held out.

    Args:
        config: of the run.
        tokenizer: of transformers.
        raw: rows that were read already; None: they are read now.
        classify: make texts and labels for a classifier, whatever the configuration says.
        label_names: its labels in the order of their ids; empty: those that are found in the data.

    Raises:
        InputError: data that cannot be used, with what was found and what to do.
    """
    raw = raw or load_rows(config)
    classify = classify or is_classification(
        config.lora_task_type, config.label_column_name, config.template
    )
    template = template_of(config, raw, classify)
    if classify and not label_names:
        label_names = find_labels(raw, template, config.label_names)
    subsets = draw_subsets(config, [len(rows) for rows in raw.clients], len(raw.eval))
    client_outcomes, eval_outcomes = _outcomes(
        config, tokenizer, raw, subsets, template, label_names
    )
    clients = [
        _with_held_out(client, kept(outcomes), config.client_eval_fraction, config.seed)
        for client, outcomes in enumerate(client_outcomes)
    ]
    unusable = {
        client: why
        for client, outcomes in enumerate(client_outcomes)
        if (why := all_dropped(outcomes))
    }
    notes = left_out(raw, unusable, config.strict_clients)
    if not any(client.train for client in clients):
        raise InputError("no client has a row to train on; lower client_eval_fraction")
    if why := all_dropped(eval_outcomes):
        raise InputError(f"the evaluation data: {why}")
    evaluation, drawn = kept(eval_outcomes), subsets.in_words
    if not raw.eval:
        held_out = [client.eval for client in clients]
        evaluation, limited = in_turn(held_out, config.max_eval_samples, config.seed)
        drawn += limited
    return FederatedData(
        clients=tuple(clients),
        eval=evaluation,
        template=template.name,
        dropped=dict(reasons(chain(*client_outcomes, eval_outcomes))),
        fingerprint=_fingerprint(clients, evaluation),
        label_names=tuple(label_names),
        taken=(
            *drawn,
            *unused(raw, template, config.partition_column, config.label_column_name),
            *one_answer_learnt(template.name, config.train_function),
        ),
        notes=(*notes, *_without_rows(clients, unusable), *alike(label_names)),
    )


def _outcomes(
    config: Config,
    tokenizer: Any,
    raw: RawData,
    subsets: RowSubsets,
    template: Template,
    label_names: Sequence[str],
) -> tuple[list[list[Outcome]], list[Outcome]]:
    """Tokenise the rows that were drawn.

    All are tokenised in one call, for the cache keeps the tokens of one call in a file: it then
    serves every other division of the same rows.

    Returns:
        For each row its tokens or why it is dropped: client by client, and of the evaluation.
    """
    why_left_out = without_column(raw, template)
    rendered = [
        why_left_out.get(client) or _rendered(raw.row_name(client, i), rows[i], template)
        for client, (rows, numbers) in enumerate(zip(raw.clients, subsets.clients, strict=True))
        for i in numbers
    ]
    eval_name = Path(config.eval_file).name if config.eval_file else f"{raw.title}, evaluation"
    rendered += [
        _rendered(f"{eval_name}, row {i + 1}", raw.eval[i], template) for i in subsets.eval
    ]
    tokens = tokens_of(
        [row if isinstance(row, str) else learnt_part(row) for row in rendered],
        tokenizer,
        config.max_length,
        config.completion_only_loss,
        label_names,
        config.num_threads,
    )
    outcomes = iter(with_answers(rendered, tokens))
    by_client = [list(islice(outcomes, len(numbers))) for numbers in subsets.clients]
    return by_client, list(outcomes)


def _rendered(row_name: str, row: Row, template: Template) -> Rendered | str:
    """A row as its template reads it, or why it is dropped; a complaint names the row."""
    try:
        return render(row, template)
    except InputError as error:
        raise InputError(f"{row_name}: {error}") from None


def _with_held_out(
    client: int, rows: Sequence[Tokens], eval_fraction: float, seed: int
) -> ClientData:
    """Draw which share of a client's rows is held out to evaluate on."""
    order = generator(seed, 0, client, Purpose.HOLDOUT).permutation(len(rows))
    held_out = set(order[: round(eval_fraction * len(rows))].tolist())
    return ClientData(
        train=[row for i, row in enumerate(rows) if i not in held_out],
        eval=[rows[i] for i in sorted(held_out)],
    )


def _without_rows(clients: Sequence[ClientData], unusable: Container[int]) -> list[str]:
    """A note on each client without rows, but not on those whose rows cannot be used."""
    return [
        f"client {number} has no rows and takes no part"
        for number, client in enumerate(clients)
        if not client.train and number not in unusable
    ]


def _fingerprint(clients: Sequence[ClientData], evaluation: Sequence[Tokens]) -> str:
    """A digest of all tokens in the order of clients, by which other data are noticed on resume."""
    digest = hashlib.sha256()
    for rows in [*(rows for client in clients for rows in (client.train, client.eval)), evaluation]:
        digest.update(b"|")
        for row in rows:
            digest.update(json.dumps(list(row.values())).encode())
    return digest.hexdigest()
