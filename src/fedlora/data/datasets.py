"""Makes the tokenised data of every client, and of the evaluation, from a run's rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.data.notes import alike, all_dropped, kept, left_out, reasons, unused
from fedlora.data.raw_data import RawData, load_rows
from fedlora.data.reading import find_labels, is_classification, template_of, without_column
from fedlora.data.rendered import Rendered
from fedlora.data.rows import Row
from fedlora.data.subsets import Subsets, in_turn, subsets
from fedlora.data.templates import Template
from fedlora.data.token_cache import tokens_of
from fedlora.data.tokenize import Outcome, Tokens, render
from fedlora.errors import InputError
from fedlora.seeds import Purpose, generator

if TYPE_CHECKING:
    from fedlora.config.config import Config


@dataclass(frozen=True)
class ClientData:
    """One client's tokenised rows."""

    train: Sequence[Tokens]
    eval: Sequence[Tokens] = ()


@dataclass(frozen=True)
class FederatedData:
    """All clients' data and what the global model is evaluated on.

    Args:
        clients: in client order.
        eval: held-out rows of the global evaluation; empty: none is made.
        template: the template used.
        dropped: why rows were left out -> how many.
        fingerprint: of all tokens, to recognise other data on resume.
        label_names: a classifier's labels in the order of their ids.
        taken: how many rows of how many were drawn and which columns are not, in words.
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
    """The tokenised data of every client and of the evaluation.

    Args:
        config: of the run.
        tokenizer: of transformers.
        raw: rows that were read already.
        classify: make texts and labels for a classifier.
        label_names: its labels in the order of their ids; none: `find_labels`.

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
    taken = subsets(config, [len(rows) for rows in raw.clients], len(raw.eval))
    of_clients, of_eval = _outcomes(config, tokenizer, raw, taken, template, label_names)
    parts = [
        _with_held_out(client, kept(rows), config.client_eval_fraction, config.seed)
        for client, rows in enumerate(of_clients)
    ]
    useless = {k: why for k, rows in enumerate(of_clients) if (why := all_dropped(rows))}
    notes = left_out(raw, useless, config.strict_clients)
    if not any(part.train for part in parts):
        raise InputError("no client has a row to train on; lower client_eval_fraction")
    if why := all_dropped(of_eval):
        raise InputError(f"the evaluation data: {why}")
    evaluation, in_words = kept(of_eval), taken.in_words
    if not raw.eval:
        held_out = [part.eval for part in parts]
        evaluation, limited = in_turn(held_out, config.max_eval_samples, config.seed)
        in_words += limited
    return FederatedData(
        clients=tuple(parts),
        eval=evaluation,
        template=template.name,
        dropped=dict(reasons(chain(*of_clients, of_eval))),
        fingerprint=_fingerprint(parts, evaluation),
        label_names=tuple(label_names),
        taken=(
            *in_words,
            *unused(raw, template, config.partition_column, config.label_column_name),
        ),
        notes=(*notes, *_without_rows(parts, useless), *alike(label_names)),
    )


def _outcomes(
    config: Config,
    tokenizer: Any,
    raw: RawData,
    taken: Subsets,
    template: Template,
    label_names: Sequence[str],
) -> tuple[list[list[Outcome]], list[Outcome]]:
    """Of every row taken, its tokens or why it is dropped: by client, and of the evaluation.

    All rows are tokenised at once, so that the cached tokens serve every division of the same rows.
    """
    why_left_out = without_column(raw, template)
    rendered = [
        why_left_out.get(client) or _rendered(raw.place(client, i), rows[i], template)
        for client, (rows, numbers) in enumerate(zip(raw.clients, taken.clients, strict=True))
        for i in numbers
    ]
    eval_name = Path(config.eval_file).name if config.eval_file else f"{raw.title}, evaluation"
    rendered += [_rendered(f"{eval_name}, row {i + 1}", raw.eval[i], template) for i in taken.eval]
    outcomes = iter(
        tokens_of(
            rendered,
            tokenizer,
            config.max_length,
            config.completion_only_loss,
            label_names,
            config.num_threads,
        )
    )
    of_clients = [list(islice(outcomes, len(numbers))) for numbers in taken.clients]
    return of_clients, list(outcomes)


def _rendered(place: str, row: Row, template: Template) -> Rendered | str:
    """A row as its template reads it, or why it is dropped; a complaint names the row."""
    try:
        return render(row, template)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def _with_held_out(
    client: int, rows: Sequence[Tokens], eval_fraction: float, seed: int
) -> ClientData:
    """A client's rows, a share of which is drawn to evaluate on."""
    order = generator(seed, 0, client, Purpose.HOLDOUT).permutation(len(rows))
    held_out = set(order[: round(eval_fraction * len(rows))].tolist())
    return ClientData(
        train=[row for i, row in enumerate(rows) if i not in held_out],
        eval=[rows[i] for i in sorted(held_out)],
    )


def _without_rows(parts: Sequence[ClientData], useless: Container[int]) -> list[str]:
    """What to say of clients without rows, except those whose rows `left_out` has explained."""
    return [
        f"client {client} has no rows and takes no part"
        for client, part in enumerate(parts)
        if not part.train and client not in useless
    ]


def _fingerprint(parts: Sequence[ClientData], evaluation: Sequence[Tokens]) -> str:
    """A digest of all tokens in the order of clients, to recognise other data on resume."""
    digest = hashlib.sha256()
    for rows in [*(r for part in parts for r in (part.train, part.eval)), evaluation]:
        digest.update(b"|")
        for row in rows:
            digest.update(json.dumps(list(row.values())).encode())
    return digest.hexdigest()
