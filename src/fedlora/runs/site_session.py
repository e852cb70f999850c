"""Makes what the site of one client needs, which has the rows of no other client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedlora.config.clients import check_overrides, client_ranks, settled_overrides
from fedlora.config.config import Config
from fedlora.data.datasets import ClientData, FederatedData, load_data
from fedlora.data.notes import alike
from fedlora.data.raw_data import RawData
from fedlora.data.reading import template_of
from fedlora.data.site_rows import load_site_rows
from fedlora.data.templates import Template, label_of
from fedlora.data.tokenize import Tokens
from fedlora.errors import InputError
from fedlora.federation.exchange import Agreement
from fedlora.model.base import BaseModel
from fedlora.model.passes import runner_of
from fedlora.model.sources import Source, load_tokenizer
from fedlora.runs.absolute_paths import resolve_paths
from fedlora.runs.automatic import choose_exact_match, choose_threads, frozen_dtype, with_dtype
from fedlora.runs.checks import dropped_line
from fedlora.runs.session import (
    classifies,
    general_rows,
    load_base,
    make_agreement,
    model_source,
    task_of,
)
from fedlora.runs.site_report import SiteReport


@dataclass(frozen=True)
class SiteSession:
    """What the site of one client needs to train.

    Args:
        config: resolved.
        base: the frozen base with adapter layers.
        data: the client's own rows.
        agreement: what it holds to, as all others do.
        report: what the server has to know.
        eval: rows that the global model is evaluated on here.
        general: windows of general text, whose loss shows what is forgotten.
        warnings: what the user should know before it starts.
        choices: what was decided for this machine, in words.
    """

    config: Config
    base: BaseModel
    data: ClientData
    agreement: Agreement
    report: SiteReport
    eval: Sequence[Tokens] = ()
    general: Sequence[Tokens] = ()
    warnings: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


def assemble_site(config: Config, client: int) -> SiteSession:
    """Load and check what the site of one client needs; it reads no row of any other client.

    Args:
        config: of the run; `train_file` or `dataset_name` names the site's own rows, and
            `label_names` a classifier's labels, of which one site may have some alone.
        client: its number, counted from 0.

    Raises:
        InputError: what cannot be used, and what to do.
    """
    config = resolve_paths(config)
    threads = choose_threads(config, look=True)
    torch.set_num_threads(threads.number)
    number = _number_of_clients(config, client)
    check_overrides(config, number)
    raw = load_site_rows(config, client, number)
    source, tokenizer, data = _tokenized_at_site(config, raw)
    config, why_dtype = with_dtype(config, source)
    ranks = client_ranks(config, number)
    base, notes = load_base(source, tokenizer, config, data.label_names)
    runner_of(base.model)  # a model that cannot be trained is refused here, before any round
    task = task_of(data.label_names)
    exact_match, context = choose_exact_match(config, base, data, task)
    resolved = settled_overrides(config, ranks).model_copy(
        update={
            "num_threads": threads.number,
            "use_cpu": base.device.type != "cuda",
            "template": data.template,
            "lora_task_type": task,
            "label_names": list(data.label_names) or None,
            "dtype": frozen_dtype(base),
            "cohort_size": 1,
            "eval_exact_match": exact_match,
        }
    )
    client_data = data.clients[client]
    dropped = [dropped_line(rows, why) for why, rows in data.dropped.items()]
    return SiteSession(
        resolved,
        base,
        client_data,
        make_agreement(config, base),
        SiteReport(
            client=client,
            name=raw.names[client],
            num_examples=len(client_data.train),
            rank=ranks[client],
            label_names=data.label_names,
            base=base.fingerprint,
            data=data.fingerprint,
        ),
        eval=data.eval,
        general=general_rows(config, tokenizer, min(context, config.max_length), task),
        warnings=(*threads.warnings, *notes, *dropped, *alike(data.label_names)),
        choices=(*threads.choices, *why_dtype, *data.taken),
    )


def _number_of_clients(config: Config, client: int) -> int:
    """How many clients there are, as far as a site's configuration tells.

    Raises:
        InputError: the client is none of them, or ranks are drawn and their number is left open.
    """
    ranks = config.client_ranks
    number = config.num_clients or (len(ranks) if isinstance(ranks, list) else None)
    if number is not None:
        if not 0 <= client < number:
            raise InputError(f"client {client}, but there are {number} clients, counted from 0")
        return number
    if config.rank_choices:
        raise InputError(
            "rank_choices: ranks are drawn for all clients at once; give num_clients, so that this "
            "site draws the same as the others"
        )
    assert not isinstance(config.client_overrides, str)
    return 1 + max([client, *(config.client_overrides or {})])


def _tokenized_at_site(config: Config, raw: RawData) -> tuple[Source, Any, FederatedData]:
    """As `tokenized`, for rows of one site, which need not show all labels.

    Raises:
        InputError: the labels are not named, or rows have others.
    """
    source = model_source(config)
    classify = classifies(config, source)
    label_names: Sequence[str] = ()
    if classify:
        label_names = config.label_names or (source.labels if source.classifier else ())
        _check_site_labels(label_names, raw, template_of(config, raw, True))
    tokenizer = load_tokenizer(
        source, config.tokenizer_name, config.chat_template_path, generates=not classify
    )
    data = load_data(config, tokenizer, raw, classify=classify, label_names=label_names)
    return source, tokenizer, data


def _check_site_labels(label_names: Sequence[str], raw: RawData, template: Template) -> None:
    column = template.columns[-1][0]
    if not label_names:
        raise InputError(
            "label_names: a site knows the labels of its own rows alone; name all labels of the "
            "federation, in the same order at every site"
        )
    held = {label_of(row, column) for row in (*raw.train, *raw.eval)}
    if unknown := sorted(held - set(label_names)):
        raise InputError(
            f"label_names: the data has labels that are not among them: {', '.join(unknown)}"
        )
