"""Makes what the server of a federation needs whose clients' rows lie elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedlora.config.clients import check_overrides, settled_overrides
from fedlora.config.config import Config
from fedlora.data.datasets import FederatedData
from fedlora.data.server_rows import load_server_rows
from fedlora.data.tokenize import Tokens
from fedlora.errors import InputError
from fedlora.federation.participants import Federation
from fedlora.model.base import BaseModel
from fedlora.model.sources import Source, load_tokenizer
from fedlora.runs.absolute_paths import resolve_paths
from fedlora.runs.automatic import choose_exact_match, choose_threads, frozen_dtype, with_dtype
from fedlora.runs.checks import GIVE_ROWS, check_method, check_metric, check_quorum
from fedlora.runs.events import HeaderClient
from fedlora.runs.session import (
    SETTLED,
    check_init_adapter,
    general_rows,
    load_base,
    make_federation,
    model_source,
    task_of,
)
from fedlora.runs.site_report import SiteReport, in_client_order
from fedlora.runs.starting import init_notes
from fedlora.runs.tracker_checks import check_trackers


@dataclass(frozen=True)
class ServerSession:
    """What the server of a federation needs whose clients' rows lie elsewhere.

    Args:
        config: resolved, as far as that needs no rows.
        base: the base; of shapes alone where the server evaluates nothing.
        federation: who takes part.
        sites: what the sites have reported, in client order.
        data: the rows that the server evaluates on; no client has any here.
        general: windows of general text that it evaluates on.
        warnings: what the user should know before it starts.
        choices: what was decided for this machine, in words.
        asked: of the keys in `SETTLED` that `config` holds otherwise, what the user wrote.
        first_values: the parameters trained whole, as they are before round 1; a site has sent
            them, for the server may have no weights.
        run: the run's id, by which sites know it again.
    """

    config: Config
    base: BaseModel
    federation: Federation
    sites: tuple[SiteReport, ...]
    data: FederatedData
    general: Sequence[Tokens] = ()
    warnings: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    asked: Mapping[str, Any] = field(default_factory=dict)
    first_values: Mapping[str, Tensor] = field(default_factory=dict)
    run: str = ""

    @property
    def label_names(self) -> tuple[str, ...]:
        """A classifier's labels in the order of their ids; empty: a causal model."""
        return self.sites[0].label_names

    @property
    def clients(self) -> list[HeaderClient]:
        """What the log says of every site: its name and counts, as it has reported them."""
        return [
            HeaderClient(
                client=site.client,
                name=site.name,
                rank=site.rank,
                rows=site.num_examples,
                eval_rows=site.eval_rows,
                tokens=site.tokens,
                counts={},
            )
            for site in self.sites
        ]

    @property
    def column(self) -> None:
        """Nobody counts the sites' values here."""

    @property
    def lone(self) -> None:
        """It is a federation."""

    @property
    def own_threads(self) -> bool:
        """The server's threads train nobody, and stay as many as they are."""
        return False

    @property
    def evaluates(self) -> bool:
        """Whether the server has rows of its own to evaluate on."""
        return bool(self.data.eval or self.general)


def assemble_server(config: Config, reports: Sequence[SiteReport]) -> ServerSession:
    """Load and check what the server of a federation needs; it reads no row of any client.

    Of the base it makes the shapes alone, without memory, unless it evaluates by itself: with
    `server_evaluation`, where `eval_file` or `general_file` names rows. Then it loads the weights
    as well.

    Args:
        config: of the run.
        reports: one of every site, in any order.

    Raises:
        InputError: what cannot be used, or what sites do not agree on.
    """
    config = asked = resolve_paths(config)
    threads = choose_threads(config, look=False)
    torch.set_num_threads(threads.number)
    check_trackers(config)
    check_init_adapter(config)
    sites = in_client_order(config, reports)
    ranks, label_names = [site.rank for site in sites], sites[0].label_names
    check_overrides(config, len(sites))
    check_method(config, ranks)
    task = task_of(label_names)
    check_metric(config, task, exact_match=config.eval_exact_match is not False)
    source = model_source(config)
    tokenizer = load_tokenizer(
        source, config.tokenizer_name, config.chat_template_path, generates=not label_names
    )
    evaluates = config.server_evaluation and bool(config.eval_file or config.general_file)
    why_dtype: list[str] = []
    if evaluates:
        config, why_dtype = with_dtype(config, source)
    base, notes = _load_base(config, source, tokenizer, sites[0], weights=evaluates)
    data = FederatedData((), (), config.template, {}, "", label_names)
    general: Sequence[Tokens] = ()
    if evaluates:
        data = load_server_rows(config, tokenizer, label_names)
        _, context = choose_exact_match(config, base, data, task)
        general = general_rows(config, tokenizer, min(context, config.max_length), task)
    federation = make_federation(config, base, ranks, [site.num_examples for site in sites])
    _check_evaluation(config, bool(data.eval), any(site.eval_rows for site in sites))
    check_quorum(config, len(federation.sample(1)))
    resolved = settled_overrides(config, ranks).model_copy(
        update={
            "num_threads": threads.number,
            "num_clients": len(ranks),
            "lora_task_type": task,
            "label_names": list(label_names) or None,
            "greater_is_better": config.metric_is_better_when_greater,
            **({"dtype": frozen_dtype(base)} if evaluates else {}),
        }
    )
    return ServerSession(
        resolved,
        base,
        federation,
        tuple(sites),
        data,
        general,
        warnings=(*notes, *init_notes(config)),
        choices=(*threads.choices, *why_dtype),
        asked={k: x for k in SETTLED if (x := getattr(asked, k)) != getattr(resolved, k)},
    )


def _load_base(
    config: Config, source: Source, tokenizer: Any, site: SiteReport, *, weights: bool
) -> tuple[BaseModel, list[str]]:
    """The base, held against what a site has reported of its own.

    Shapes alone do not show which weights a checkpoint lacks; these modules are trained whole, and
    the site knows them.
    """
    base, notes = load_base(source, tokenizer, config, site.label_names, weights=weights)
    if new := set(site.full_params) - set(base.full_params):
        modules = {name.rpartition(".")[0] for name in new}
        whole = [*(config.lora_modules_to_save or ()), *sorted(modules)]
        config = config.model_copy(update={"lora_modules_to_save": whole})
        base, notes = load_base(source, tokenizer, config, site.label_names, weights=weights)
    if site.shapes and base.targets.shapes != dict(site.shapes):
        different = sorted(set(base.targets.shapes.items()) ^ set(site.shapes.items()))
        raise InputError(
            f"model_name_or_path: site {site.name} has other target modules than the server "
            f"({different[0][0]}); give both the same base and lora_target_modules"
        )
    if weights and base.fingerprint != site.base:
        raise InputError(
            f"model_name_or_path: the server holds other weights than site {site.name}, or holds "
            "them in another dtype; give both the same base and dtype, or set server_evaluation: "
            "false, for which the server needs no weights"
        )
    return base, notes


def _check_evaluation(config: Config, at_server: bool, at_sites: bool) -> None:
    """Refuse what needs an evaluation where there is nothing to evaluate on.

    Raises:
        InputError: which key needs it.
    """
    if config.eval_personal and not at_server:
        raise InputError("eval_personal needs rows at the server: give eval_file")
    for key in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(config, key) and not (at_server or at_sites):
            raise InputError(f"{key} {GIVE_ROWS}")
